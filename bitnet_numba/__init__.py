"""BitNet b1.58 inference in pure Python: ternary weights, 8-bit activations, on CPUs and NVIDIA GPUs.

import bitnet_numba as bn
llm = bn.load()                     # the built-in model; or bn.load("owner/name") of the Hugging Face hub, or a folder
print(llm.chat("Tell me a story about a fox and a lantern.").text)

Models       load, Engine (generate, stream, chat, generate_batch, agenerate, astream), Session, Scheduler
Requests     Prompt, Message, SamplingParams, Grammar
Answers      Completion, Stats, Stream, AsyncStream, Update; TokenLogprob, Score (of Engine.score); split_thought
Errors       BitNetError and its kinds: BackendError, CheckpointError, ConfigError, ContextFull, QueueFull,
             QueueTimeout, RequestError, SchedulerClosed, TokenizerError
Kernels      pack_linear, w2a8_linear, PackedLinear; modules quantize, packing
Also         Tokenizer, ModelConfig: of Engine.tokenizer and Engine.config; module errors; __version__
"""

import importlib
import os

TYPE_CHECKING = False  # type checkers know the name; importing typing would be most of what importing this costs

__version__ = "0.2.0"  # the only place: pyproject.toml reads it from here

_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, "kernels")):
    # A checkout: kernels/ and reference/ are beside this package, and are imported as its subpackages.
    __path__.append(os.path.dirname(_here))

if TYPE_CHECKING:
    from typing import Any

    from bitnet_numba import errors as errors
    from bitnet_numba import packing as packing
    from bitnet_numba import quantize as quantize
    from bitnet_numba.config import ModelConfig as ModelConfig
    from bitnet_numba.engine.asynchronous import AsyncStream as AsyncStream
    from bitnet_numba.engine.completion import Completion as Completion
    from bitnet_numba.engine.completion import Stats as Stats
    from bitnet_numba.engine.engine import Engine as Engine
    from bitnet_numba.engine.loading import load as load
    from bitnet_numba.engine.request import Prompt as Prompt
    from bitnet_numba.engine.scheduler import Scheduler as Scheduler
    from bitnet_numba.engine.scoring import Score as Score
    from bitnet_numba.engine.sequence import Update as Update
    from bitnet_numba.engine.session import Session as Session
    from bitnet_numba.engine.session import Stream as Stream
    from bitnet_numba.errors import BackendError as BackendError
    from bitnet_numba.errors import BitNetError as BitNetError
    from bitnet_numba.errors import CheckpointError as CheckpointError
    from bitnet_numba.errors import ConfigError as ConfigError
    from bitnet_numba.errors import ContextFull as ContextFull
    from bitnet_numba.errors import QueueFull as QueueFull
    from bitnet_numba.errors import QueueTimeout as QueueTimeout
    from bitnet_numba.errors import RequestError as RequestError
    from bitnet_numba.errors import SchedulerClosed as SchedulerClosed
    from bitnet_numba.errors import TokenizerError as TokenizerError
    from bitnet_numba.grammar import Grammar as Grammar
    from bitnet_numba.kernels.linear.operands import PackedLinear as PackedLinear
    from bitnet_numba.kernels.linear.w2a8 import pack_linear as pack_linear
    from bitnet_numba.kernels.linear.w2a8 import w2a8_linear as w2a8_linear
    from bitnet_numba.sampling import TokenLogprob as TokenLogprob
    from bitnet_numba.sampling_params import SamplingParams as SamplingParams
    from bitnet_numba.text.chat_template import Message as Message
    from bitnet_numba.text.thoughts import split_thought as split_thought
    from bitnet_numba.text.tokenizer import Tokenizer as Tokenizer

# Public names and their modules, imported on first use: `import bitnet_numba` itself is cheap.
_MODULES = ("errors", "packing", "quantize")
_HOMES = {
    "AsyncStream": "engine.asynchronous",
    "BackendError": "errors",
    "BitNetError": "errors",
    "CheckpointError": "errors",
    "Completion": "engine.completion",
    "ConfigError": "errors",
    "ContextFull": "errors",
    "Engine": "engine.engine",
    "Grammar": "grammar",
    "Message": "text.chat_template",
    "ModelConfig": "config",
    "PackedLinear": "kernels.linear.operands",
    "Prompt": "engine.request",
    "QueueFull": "errors",
    "QueueTimeout": "errors",
    "RequestError": "errors",
    "SamplingParams": "sampling_params",
    "Scheduler": "engine.scheduler",
    "SchedulerClosed": "errors",
    "Score": "engine.scoring",
    "Session": "engine.session",
    "Stats": "engine.completion",
    "Stream": "engine.session",
    "TokenLogprob": "sampling",
    "Tokenizer": "text.tokenizer",
    "TokenizerError": "errors",
    "Update": "engine.sequence",
    "load": "engine.loading",
    "pack_linear": "kernels.linear.w2a8",
    "split_thought": "text.thoughts",
    "w2a8_linear": "kernels.linear.w2a8",
}
__all__ = ["__version__", *_MODULES, *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> "Any":
    if name in _MODULES:
        return importlib.import_module(f"bitnet_numba.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"bitnet_numba.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'bitnet_numba' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
