"""`load` opens a packed checkpoint, chooses a backend and returns an Engine, which answers prompts."""

import contextlib
import ctypes
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.protocol import Backend, Context
from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed, read_packed
from bitnet_numba.config import ModelConfig
from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.request import Prompt, as_integer, check_ids, read_options, read_request
from bitnet_numba.engine.scheduler import Scheduler
from bitnet_numba.engine.session import Session, Stream, finite_arithmetic
from bitnet_numba.errors import BackendError, BitNetError, CheckpointError, RequestError
from bitnet_numba.model_folder import ModelFolder
from bitnet_numba.sampling import SamplingParams, read_sampling
from bitnet_numba.text.tokenizer import Tokenizer

BACKENDS = ("auto", "cuda", "reference")
DEMO = Path(__file__).parent.parent / "demo"  # the built-in model

_log = logging.getLogger("bitnet_numba")


class Engine:
    """A loaded model. Created by `load`."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        config: ModelConfig,
        context: int,
        sampling: SamplingParams | None = None,
    ):
        self.config = config
        self.sampling = sampling  # of the model's generation_config.json, for the chat; None if it has none
        self.tokenizer = tokenizer
        self.context = context  # tokens of prompt and answer together
        self._backend = backend
        self._idle: list[
            Context
        ] = []  # contexts of streams that have ended, to be reused: they are expensive to create

    @property
    def backend(self) -> str:
        """The backend in use: "reference" or "cuda"."""
        return self._backend.name

    def memory(self) -> dict[str, int]:
        """Memory in use, in bytes by purpose; see `Backend.memory`."""
        return self._backend.memory()

    def logits(self, token_ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """The logits after each token of a text, computed in a new context: float32 [T, vocab].

        Raises RequestError for an empty list, ids outside the vocabulary or more than the model's context holds, and
        BackendError if a number is not finite.
        """
        ids = check_ids(token_ids, self.config.vocab_size)
        if len(ids) > self.config.max_context:
            raise RequestError(f"{len(ids)} tokens do not fit the model's context of {self.config.max_context}")
        context = self._backend.new_context(len(ids))
        try:
            with finite_arithmetic():
                logits = context.logits(ids)
                if not np.isfinite(logits).all():
                    raise ValueError("logits hold NaN or infinity")
                return logits
        finally:
            context.close()

    def session(self) -> Session:
        """A context for a conversation: each turn computes only what is new in its prompt."""
        return Session(self._backend, self.tokenizer, self.config.vocab_size, self.context)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Completion:
        """The answer to a prompt; arguments and errors as for `stream`."""
        return self.stream(
            prompt, max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop
        ).result()

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Stream:
        """The answer to a prompt, in pieces of text as they are generated.

        prompt: a text to continue, token ids, or chat messages [{"role": "user", "content": "..."}, ...].
        max_new_tokens: None generates until the model stops or the context is full.
        temperature .. seed: see `sampling.SamplingParams`; temperature 0 is greedy.
        stop: one string or several; the answer ends before the first to appear.

        Raises RequestError or ContextFull immediately if the request is invalid. Nothing is cached between prompts, so
        an answer depends on its arguments alone; use `session` for conversations.
        """
        params = SamplingParams(temperature, top_p, top_k, min_p, repetition_penalty, seed)
        session = Session(self._backend, self.tokenizer, self.config.vocab_size, self.context, self._take_context)

        def ended() -> None:
            context = session.release()
            if context is not None:
                self._idle.append(context)

        return session.stream(prompt, params, max_new_tokens, stop, ended)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        max_sequences: int = 64,
    ) -> list[Completion]:
        """The answers to several prompts, in the order of the prompts, computed as a batch.

        params: for all prompts, or a list with one for each; None is greedy.
        max_new_tokens: per answer. KV cache is reserved for that many, so a small number lets more prompts run at once.
        stop: one string or several; an answer ends before the first to appear.
        max_sequences: how many run at once; the others wait.

        Raises RequestError or ContextFull, naming the prompt's index, before anything is computed; BackendError if
        memory is insufficient or a prompt produces numbers that are not finite.
        """
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Sequence):
            raise RequestError("prompts must be a list of prompts")
        if isinstance(params, SamplingParams) or params is None:
            params = [params] * len(prompts)
        elif not isinstance(params, Sequence):
            raise RequestError(f"params must be SamplingParams or a list of them, not {params!r}")
        elif len(params) != len(prompts):
            raise RequestError(f"there are {len(prompts)} prompts but {len(params)} sampling parameters")
        requests = []
        vocab = self.config.vocab_size
        for i in range(len(prompts)):
            with _naming_prompt(i):
                options = read_options(params[i], max_new_tokens, stop)
                requests.append(read_request(self.tokenizer, vocab, self.context, prompts[i], options))
        if not requests:
            return []
        completions: dict[int, Completion] = {}
        slots = as_integer(max_sequences)
        with self.scheduler(max_sequences if slots is None else min(slots, len(requests))) as scheduler:
            ids = []
            for i, request in enumerate(requests):
                with _naming_prompt(i):
                    ids.append(scheduler.add_request(request))
            while scheduler.busy:
                for update in scheduler.step():
                    if update.error is not None:
                        raise BackendError(f"prompt {ids.index(update.request)}: {update.error}")
                    if update.completion is not None:
                        completions[update.request] = update.completion
        return [completions[i] for i in ids]

    def scheduler(self, max_sequences: int = 64, tokens: int | None = None, prefill_chunk: int = 1024) -> Scheduler:
        """Continuous batching: requests can be added and cancelled at any time. Arguments as for `Scheduler`."""
        return Scheduler(
            self._backend, self.tokenizer, self.config.vocab_size, self.context, max_sequences, tokens, prefill_chunk
        )

    def _take_context(self, capacity: int) -> Context:
        """An empty context for a stream: an idle one if there is one, otherwise a new one."""
        if not self._idle:
            return self._backend.new_context(capacity)
        context = self._idle.pop()
        context.truncate(0)
        return context


@contextlib.contextmanager
def _naming_prompt(index: int) -> Iterator[None]:
    try:
        yield
    except BitNetError as error:
        raise type(error)(f"prompt {index}: {error}") from None


def load(path: str | os.PathLike[str] | None = None, backend: str = "auto", context: int | None = None) -> Engine:
    """Opens a packed checkpoint.

    path: a folder written by tools/convert.py; None opens the built-in model.
    backend: "cuda", "reference" or "auto": CUDA if it is usable, otherwise the reference, with a warning that says why.
    context: maximum number of tokens, prompt and answer together; None: the model's own maximum.

    Raises BitNetError, with a message of one line, if the folder, a file or an argument is invalid.
    """
    if backend not in BACKENDS:
        raise BackendError(f"there is no backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if path is None and not DEMO.is_dir():
        raise CheckpointError(
            "this version has no built-in model: convert one with  python tools/convert.py SRC DST  and open DST"
        )
    folder = DEMO if path is None else Path(path)

    def read(opened: ModelFolder) -> tuple[PackedCheckpoint, Tokenizer, SamplingParams | None]:
        checkpoint = open_packed(opened)
        return checkpoint, Tokenizer.open(opened, checkpoint.config.vocab_size), read_sampling(opened)

    checkpoint, tokenizer, sampling = read_packed(folder, read)
    config = checkpoint.config
    if context is None:
        context = config.max_context
    else:
        tokens = as_integer(context)
        if tokens is None or not 1 <= tokens <= config.max_context:
            raise RequestError(f"context must be between 1 and the model's {config.max_context}, not {context!r}")
        context = tokens
    return Engine(_open_backend(backend, checkpoint), tokenizer, config, context, sampling)


def _open_backend(name: str, checkpoint: PackedCheckpoint) -> Backend:
    if name == "auto" and not _has_nvidia_driver():
        _log.warning("no NVIDIA GPU found: running the NumPy reference on the CPU")
    elif name != "reference":
        try:
            return _open_cuda(checkpoint)
        except BackendError as error:
            if name == "cuda":
                raise
            _log.warning("%s; running the NumPy reference on the CPU instead", error)
    from bitnet_numba.backends.host import reference_backend

    return reference_backend(checkpoint)


def _has_nvidia_driver() -> bool:
    """Whether there is an NVIDIA driver or device. False means a CPU-only machine, not a broken install."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return os.path.exists("/dev/nvidiactl")
    return True


def _open_cuda(checkpoint: PackedCheckpoint) -> Backend:
    """The CUDA backend. Raises BackendError if there is no usable device, or too little memory on it."""
    if importlib.util.find_spec("numba_cuda") is None:
        # Numba has a numba.cuda of its own, but the kernels need numba-cuda's.
        raise BackendError("CUDA cannot be used: its packages are not installed (install the extra cuda13 or cuda12)")
    from bitnet_numba.backends.cuda.backend import CudaBackend, why_unusable

    reason = why_unusable()
    if reason is not None:
        raise BackendError(f"CUDA cannot be used: {reason}")
    return CudaBackend(checkpoint)
