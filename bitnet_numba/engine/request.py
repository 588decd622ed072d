"""Requests: prompts of every kind and the options that go with them, checked and turned into token ids."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bitnet_numba.errors import ContextFull, RequestError
from bitnet_numba.sampling import SamplingParams
from bitnet_numba.text.chat_template import Message
from bitnet_numba.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]  # a text to continue, token ids, or chat messages


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated. `read_options` checks a caller's values."""

    params: SamplingParams = SamplingParams()
    max_new_tokens: int | None = None  # None: until the model stops or the context is full
    stop: tuple[str, ...] = ()  # the answer ends before the first of these strings to appear


@dataclass(frozen=True)
class Request:
    """A checked prompt. Its options have a seed, and include the stop strings that the chat template needs."""

    ids: list[int]
    options: GenerationOptions


def read_options(
    params: SamplingParams | None, max_new_tokens: int | None, stop: str | Sequence[str]
) -> GenerationOptions:
    """Checks the options of a caller; params None is greedy. Raises RequestError if one of them is invalid."""
    if max_new_tokens is not None:
        max_new_tokens = positive_integer("max_new_tokens", max_new_tokens)
    stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise RequestError("a stop string must be a non-empty string")
    if not isinstance(params, SamplingParams | None):
        raise RequestError(f"params must be SamplingParams, not {params!r}")
    return GenerationOptions(params or SamplingParams(), max_new_tokens, stops)


def read_request(
    tokenizer: Tokenizer, vocab_size: int, capacity: int, prompt: Prompt, options: GenerationOptions
) -> Request:
    """Encodes a prompt for a context of `capacity` tokens. Raises RequestError or ContextFull if it cannot be used."""
    ids = encode_prompt(tokenizer, prompt, vocab_size, capacity)
    stop = options.stop
    if not isinstance(prompt, str) and isinstance(prompt[0], Mapping):
        stop += tokenizer.chat_stop
    return Request(ids, replace(options, params=options.params.with_seed(), stop=stop))


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, vocab_size: int, capacity: int) -> list[int]:
    """Token ids of any kind of prompt. Raises RequestError if it is empty or has ids outside the vocabulary, and
    ContextFull if it has more than `capacity` tokens."""
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Sequence | np.ndarray):
        raise RequestError("a prompt must be a string, a list of token ids or a list of messages")
    if len(prompt) == 0:
        raise RequestError("the prompt is empty")
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, max_tokens=capacity)
    elif isinstance(prompt[0], Mapping):
        # As in transformers' pipelines: an answer that stands last is continued.
        started = isinstance(prompt[-1], Mapping) and prompt[-1].get("role") == "assistant"
        ids = tokenizer.encode_chat(prompt, max_tokens=capacity, continue_final_message=started)  # type: ignore[arg-type]
    else:
        ids = prompt  # type: ignore[assignment]
    ids = check_ids(ids, vocab_size)
    if len(ids) > capacity:
        raise ContextFull(f"the prompt has {len(ids)} tokens, but the context holds {capacity}")
    return ids


def check_ids(ids: object, vocab_size: int) -> list[int]:
    """Token ids as a list of int. Raises RequestError if it is empty or if one is not an integer below `vocab_size`."""
    if isinstance(ids, str | bytes | bytearray | Mapping) or not isinstance(ids, Sequence | np.ndarray):
        raise RequestError("token ids must be a list of integers")
    if len(ids) == 0:
        raise RequestError("the prompt is empty")
    checked = []
    for i in ids:
        number = as_integer(i)
        if number is None:
            raise RequestError("token ids must be integers")
        if not 0 <= number < vocab_size:
            raise RequestError(f"token id {number} is not in the vocabulary of {vocab_size}")
        checked.append(number)
    return checked


def positive_integer(name: str, value: Any) -> int:
    """`value` as an int. Raises RequestError, naming it, if it is not a positive integer."""
    number = as_integer(value)
    if number is None or number < 1:
        raise RequestError(f"{name} must be a positive integer, not {value!r}")
    return number


def as_integer(value: Any) -> int | None:
    """`value`, which may be one of NumPy's integers, as an int; None if it is not an integer (bools are not)."""
    if isinstance(value, bool | np.bool_ | np.ndarray):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
