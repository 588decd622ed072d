"""What may be asked: prompts of every form, and what goes with them, checked, as token ids."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_numba.errors import ContextFull, RequestError
from bitnet_numba.sampling import SamplingParams
from bitnet_numba.text.chat_template import Message
from bitnet_numba.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]  # a text to continue, token ids, or chat messages


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be answered, checked."""

    ids: list[int]
    params: SamplingParams  # with a seed
    limit: int | None  # new tokens; None: until the model stops or the context is full
    stops: tuple[str, ...]  # texts before which the answer ends


def read_request(
    tokenizer: Tokenizer,
    vocab_size: int,
    capacity: int,
    prompt: Prompt,
    params: SamplingParams | None,
    max_new_tokens: int | None,
    stop: str | Sequence[str],
) -> Request:
    """Checks and encodes what `Session.stream` takes. Raises RequestError or ContextFull for what cannot be done."""
    if max_new_tokens is not None:
        limit = whole_number(max_new_tokens)
        if limit is None or limit < 1:
            raise RequestError(f"max_new_tokens must be a whole number of at least 1, not {max_new_tokens!r}")
        max_new_tokens = limit
    stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise RequestError("a stop string must be a text that is not empty")
    if not isinstance(params, SamplingParams | None):
        raise RequestError(f"params must be SamplingParams, not {params!r}")
    ids = encode_prompt(tokenizer, prompt, vocab_size, capacity)
    if not isinstance(prompt, str) and isinstance(prompt[0], Mapping):
        stops += tokenizer.chat_stop
    return Request(ids, (params or SamplingParams()).with_seed(), max_new_tokens, stops)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, vocab_size: int, capacity: int) -> list[int]:
    """Token ids of any form of prompt. Raises RequestError if it is empty or has ids that are no tokens, and
    ContextFull if there are more than `capacity`."""
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Sequence | np.ndarray):
        raise RequestError("a prompt is a text, a list of token ids or a list of messages")
    if len(prompt) == 0:
        raise RequestError("the prompt is empty")
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, most=capacity)
    elif isinstance(prompt[0], Mapping):
        ids = tokenizer.encode_chat(prompt, most=capacity)  # type: ignore[arg-type]
    else:
        ids = prompt  # type: ignore[assignment]
    ids = check_ids(ids, vocab_size)
    if len(ids) > capacity:
        raise ContextFull(f"the prompt has {len(ids)} tokens, but the context holds {capacity}")
    return ids


def check_ids(ids: object, vocab_size: int) -> list[int]:
    """Token ids as a list of int. Raises RequestError unless there is one and all are below `vocab_size`."""
    if isinstance(ids, str | bytes | bytearray | Mapping) or not isinstance(ids, Sequence | np.ndarray):
        raise RequestError("token ids must be a list of whole numbers")
    if len(ids) == 0:
        raise RequestError("the prompt is empty")
    whole = []
    for i in ids:
        number = whole_number(i)
        if number is None:
            raise RequestError("token ids must be whole numbers")
        if not 0 <= number < vocab_size:
            raise RequestError(f"token id {number} is not in the vocabulary of {vocab_size}")
        whole.append(number)
    return whole


def whole_number(value: Any) -> int | None:
    """Any whole number, NumPy's included, as an int; None for what is none, truth values among it."""
    if isinstance(value, bool | np.bool_ | np.ndarray):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
