"""Requests: prompts of every kind and the options that go with them, checked and turned into token ids."""

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from bitnet_numba.errors import ContextFull, RequestError, shown
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
    params: SamplingParams | None, max_new_tokens: int | None, stop: str | Iterable[str] | None
) -> GenerationOptions:
    """Checks the options of a caller; params None is greedy. Raises RequestError, naming the one that is invalid."""
    if max_new_tokens is not None:
        max_new_tokens = positive_integer("max_new_tokens", max_new_tokens)
    if params is None:
        params = SamplingParams()
    elif isinstance(params, SamplingParams):
        # Made again, so that it is checked whatever was done to it, or by whichever subclass.
        params = SamplingParams(**{field.name: getattr(params, field.name) for field in fields(SamplingParams)})
    else:
        raise RequestError(f"params must be SamplingParams, not {shown(params)}")
    return GenerationOptions(params, max_new_tokens, read_stop(stop))


def read_stop(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Stop strings: one, several, or none. Raises RequestError for anything else, and for an empty one."""
    if stop is None:
        return ()
    texts: Iterable[object] = (stop,)
    if not isinstance(stop, str):
        try:
            if isinstance(stop, bytes | bytearray | memoryview | Mapping):
                raise TypeError
            texts = iter(stop)
        except TypeError:
            raise RequestError(f"stop must be a string or a list of strings, not {shown(stop)}") from None
    stops = []
    for text in texts:
        if not isinstance(text, str) or not text:
            raise RequestError(f"a stop string must be a non-empty string, not {shown(text)}")
        stops.append(str(text))
    return tuple(stops)


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
    if not is_list(prompt) and not isinstance(prompt, str):
        raise RequestError(f"a prompt must be a string, a list of token ids or a list of messages, not {shown(prompt)}")
    if len(prompt) == 0:
        raise RequestError("the prompt is empty")
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, max_tokens=capacity)
    elif isinstance(prompt[0], Mapping):
        messages = [_read_message(message, vocab_size) for message in prompt]  # type: ignore[arg-type]
        # As in transformers' pipelines: an answer that stands last is continued.
        started = isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant"
        ids = tokenizer.encode_chat(messages, max_tokens=capacity, continue_final_message=started)
    elif isinstance(prompt[0], str) or is_list(prompt[0]):
        raise RequestError(
            "a prompt is one text, one list of token ids or one conversation: for several prompts, use "
            f"generate_batch; got {shown(prompt)}"
        )
    else:
        ids = prompt  # type: ignore[assignment]
    if len(ids) > capacity:  # before each is looked at: there may be any number of them
        raise ContextFull(f"the prompt has {len(ids)} tokens, but the context holds {capacity}")
    return check_ids(ids, vocab_size)


def _read_message(message: Message, vocab_size: int) -> Message:
    """A message with its "token_ids", if it has any, checked; the tokenizer checks the rest."""
    if not isinstance(message, Mapping) or message.get("token_ids") is None:
        return message
    ids = message["token_ids"]
    empty = is_list(ids) and len(ids) == 0
    return {**message, "token_ids": [] if empty else check_ids(ids, vocab_size)}


def check_ids(ids: object, vocab_size: int) -> list[int]:
    """Token ids as a list of int. Raises RequestError if it is empty or if one is not an integer below `vocab_size`."""
    if not is_list(ids):
        raise RequestError(f"token ids must be a list of integers, not {shown(ids)}")
    if len(ids) == 0:
        raise RequestError("the prompt is empty")
    checked = []
    for i in ids:
        number = as_integer(i)
        if number is None:
            raise RequestError(f"token ids must be integers, not {shown(i)}")
        if not 0 <= number < vocab_size:
            raise RequestError(f"token id {shown(number)} is not in the vocabulary of {vocab_size}")
        checked.append(number)
    return checked


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a sequence of things, a NumPy vector among them, rather than text, bytes or one thing."""
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes | bytearray | memoryview):
        return False
    try:
        return len(value) >= 0
    except (TypeError, OverflowError):  # an array without dimensions; a range longer than any list
        return False


def read_folder(path: object) -> Path:
    """The folder that a caller named. Raises RequestError if it cannot be the name of one."""
    try:
        name = os.fspath(path)  # type: ignore[call-overload]
    except TypeError:
        name = None
    if not isinstance(name, str):
        raise RequestError(f"path must be a string or a path, not {shown(path)}")
    if not name or "\0" in name:
        raise RequestError(f"path must be the name of a folder, not {shown(name)}")
    return Path(name)


def positive_integer(name: str, value: Any, most: int | None = None) -> int:
    """`value` as an int. Raises RequestError, naming it, if it is not a positive integer, or is above `most`."""
    number = as_integer(value)
    if number is None or number < 1:
        raise RequestError(f"{name} must be a positive integer, not {shown(value)}")
    if most is not None and number > most:
        raise RequestError(f"{name} must be at most {most}, not {shown(value)}")
    return number


def as_integer(value: Any) -> int | None:
    """`value`, which may be one of NumPy's integers, as an int; None if it is not an integer (bools are not)."""
    if isinstance(value, bool | np.bool_ | np.ndarray):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
