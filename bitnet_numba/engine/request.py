"""Requests: prompts of every kind and the parameters that go with them, checked and turned into token ids."""

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from bitnet_numba.engine.overflow import roll
from bitnet_numba.errors import ContextFull, RequestError, printable, shown, suggestion
from bitnet_numba.sampling_params import SamplingParams, check_stop_tokens, read_stop
from bitnet_numba.text.chat_template import Message
from bitnet_numba.text.constraint import CompiledGrammar, Constraint
from bitnet_numba.text.tokenizer import Tokenizer
from bitnet_numba.text.tool_messages import Tools

Prompt = str | Sequence[int] | Sequence[Message]  # a text to continue, token ids, or chat messages
PARAM_NAMES = tuple(field.name for field in fields(SamplingParams))
MODEL_CLOSED = "this model is closed"


@dataclass(frozen=True)
class Request:
    """A checked prompt and the parameters of its answer."""

    ids: list[int]
    params: SamplingParams  # with a seed, and all tokens that end the answer as stop_token_ids
    stop: tuple[str, ...]  # those of `params`, and those that the chat template needs
    form: CompiledGrammar | None = None  # of the answer: `params.grammar` for the model's tokens
    dropped_messages: int = 0  # of a conversation that was too long, see `overflow`

    def constraint(self, answer: Sequence[int] = ()) -> Constraint | None:
        """A new constraint for the rest of an answer, if its form is given."""
        return None if self.form is None else self.form.constraint(answer)

    def several(self, count: int) -> "list[Request]":
        """Requests for `count` answers to this prompt: the first is this one, each later one has the next seed."""
        return [self, *(replace(self, params=params) for params in self.params.several(count)[1:])]


def read_params(
    method: str, params: object, overrides: Mapping[str, object], default: SamplingParams | None = None
) -> SamplingParams:
    """What a call asks for: `overrides`, fields by name, on top of `params`, or of `default` where that is None.

    Raises RequestError, naming the method, for unknown fields and other `params`, and for values that are invalid.
    """
    check_names(method, overrides)
    if params is None:
        params = default or SamplingParams()
    elif not isinstance(params, SamplingParams):
        raise RequestError(
            f"params of {method} must be SamplingParams, not {shown(params)}: single options are given by name, "
            "as in max_new_tokens=50"
        )
    # Made again, so that it is checked whatever was done to it, or by whichever subclass.
    values: dict[str, Any] = {name: getattr(params, name) for name in PARAM_NAMES}
    return SamplingParams(**{**values, **overrides})


def check_names(method: str, overrides: Mapping[str, object], others: Sequence[str] = ()) -> None:
    """Raises RequestError for a keyword that is neither a field of SamplingParams nor one of `others`."""
    known = [*PARAM_NAMES, *others]
    for name in overrides:
        if name not in known:
            begun = [option for option in known if name.startswith(f"{option}_")]
            advice = suggestion(name, known, 0.5, surely=begun) or f"there are {', '.join(known)}"
            raise RequestError(f"{method} has no option {printable(name, 40)}: {advice}")


def read_request(
    tokenizer: Tokenizer,
    vocab_size: int,
    capacity: int,
    prompt: Prompt,
    params: SamplingParams,
    several: str = "use generate_batch",
    tools: Tools | None = None,
) -> Request:
    """Encodes a prompt for a context of `capacity` tokens. Raises RequestError or ContextFull if it cannot be used.

    several: what the message advises who gives a list of prompts. tools: functions that a conversation's answer may
    call, see `text.tool_messages`.
    """
    ids, dropped = encode_prompt(tokenizer, prompt, params, vocab_size, capacity, several, tools)
    for what, tokens in (("stop_token_ids", params.ends), ("logit_bias", [token for token, _ in params.biases])):
        for token in tokens:
            if token >= vocab_size:
                message = f"token {shown(token)} of {what} is not in the vocabulary of {vocab_size}"
                raise RequestError(message, option=what)
    stop = read_stop(params.stop)
    ends = {*params.ends, *tokenizer.special_stops(stop)}
    if not params.ignore_eos:
        ends |= tokenizer.stop_ids
        if not isinstance(prompt, str) and isinstance(prompt[0], Mapping):
            stop += tokenizer.chat_stop
            ends |= tokenizer.special_stops(tokenizer.chat_stop)
    ends = {token for token in ends if token < vocab_size}
    check_stop_tokens(len(ends))
    form = None
    if params.grammar is not None:
        if not ends & tokenizer.stop_ids:
            raise RequestError("grammar: this model has no token that ends an answer")
        form = tokenizer.grammars.compile(params.grammar)
    return Request(ids, params.with_seed().changed(stop_token_ids=tuple(sorted(ends))), stop, form, dropped)


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: Prompt,
    params: SamplingParams,
    vocab_size: int,
    capacity: int,
    several: str,
    tools: Tools | None = None,
) -> tuple[list[int], int]:
    """Token ids of any kind of prompt, and how many messages were left out of it (see `overflow`).

    Raises RequestError if it is empty or has ids outside the vocabulary, and ContextFull if it has more than `capacity`
    tokens.
    """
    dropped = 0
    if not is_list(prompt) and not isinstance(prompt, str):
        raise RequestError(f"a prompt must be a string, a list of token ids or a list of messages, not {shown(prompt)}")
    if len(prompt) == 0:
        raise RequestError("the prompt is empty")
    if params.thinking is not None and not (is_list(prompt) and isinstance(prompt[0], Mapping)):
        raise RequestError("thinking is for conversations, a list of messages; this prompt is none")
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, max_tokens=capacity)
    elif isinstance(prompt[0], Mapping):
        messages = [_read_message(message, vocab_size) for message in prompt]  # type: ignore[arg-type]
        # As in transformers' pipelines: an answer that stands last is continued.
        started = isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant"

        def encode(messages: Sequence[Message]) -> list[int]:
            ids = tokenizer.encode_chat(messages, True, capacity, started, tools, params.thinking)
            if len(ids) > capacity:
                raise ContextFull(f"the prompt has {len(ids)} tokens, but the context holds {capacity}")
            return ids

        if params.overflow == "roll":
            ids, dropped = roll(messages, encode, capacity, params.max_new_tokens)
        else:
            ids = encode(messages)
    elif isinstance(prompt[0], str) or is_list(prompt[0]):
        raise RequestError(
            f"a prompt is one text, one list of token ids or one conversation: for several prompts, {several}; "
            f"got {shown(prompt)}"
        )
    else:
        ids = prompt  # type: ignore[assignment]
    if len(ids) > capacity:  # before each is looked at: there may be any number of them
        raise ContextFull(f"the prompt has {len(ids)} tokens, but the context holds {capacity}")
    return check_ids(ids, vocab_size), dropped


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
    if type(ids) is list and set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
        return ids.copy()
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
    except Exception:  # noqa: BLE001 - a caller's own type may raise anything
        return None
