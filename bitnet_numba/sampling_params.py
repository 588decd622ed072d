"""The parameters that callers give for an answer: how its tokens are sampled, where it ends, what is told of it."""

import math
import secrets
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Literal, TypedDict, cast

from bitnet_numba.errors import RequestError, shown
from bitnet_numba.grammar import Grammar

DEFAULT_MAX_NEW_TOKENS = 512
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024  # tokens
MAX_STOP_TOKENS = 256
Overflow = Literal["error", "roll"]
LogitBias = Mapping[int, float] | Iterable[tuple[int, float]]


@dataclass(frozen=True, repr=False)
class SamplingParams:
    """How an answer is generated. Raises RequestError, naming the value, if one is invalid.

    temperature 0 takes the most likely token (of equally likely ones, the lowest id). top_k 0, top_p 1, min_p 0,
    repetition_penalty 1, presence_penalty 0 and frequency_penalty 0 have no effect. seed None: a new random seed for
    each request. They are applied in this order: logit_bias, presence_penalty, frequency_penalty, repetition_penalty,
    temperature, top_k, top_p, min_p.

    presence_penalty, frequency_penalty: taken off the logit of a token that the answer has already, once and for each
    time that it has it; -2 to 2, as OpenAI defines them: the prompt does not count. (It does for repetition_penalty.)
    logit_bias: what is added to the logits of single tokens, -100 to 100, by their ids; up to 1024 of them. Kept as a
    tuple of (id, bias), by rising ids.
    max_new_tokens: maximum tokens of the answer, 512 unless given; None: until the model stops. A full context ends
    every answer.
    stop: one string or several; the answer ends before the first to appear. Kept as a tuple.
    stop_token_ids: tokens that end the answer, besides those of the model, up to 256 with these; not part of it. Kept
    as a tuple.
    min_tokens: the answer does not end before it has so many tokens: those that would end it cannot be chosen, and stop
    strings are looked for only in the text after them.
    ignore_eos: the tokens with which the model ends an answer do not end it; they are sampled and kept like others.
    logprobs: also gives, for each token of the answer, its log probability and so many of the most likely tokens, 0 to
    20; None: neither. They are the model's own: log-softmax of its logits before bias, penalties and temperature.
    prompt_logprobs: the same for the tokens of the prompt but the first, which then is computed anew, and not reused.
    grammar: the form that the answer must have, see `Grammar`; it ends where the form does, and never before, but for
    stop strings, stop_token_ids and its length. Not together with min_tokens and ignore_eos.
    overflow: what happens to a conversation that is too long for the context: "error" refuses it; "roll" leaves out
    its oldest exchanges until it fits together with its answer, never the system message, and says how many messages
    these were (`Completion.dropped_messages`). Other prompts have no messages: they are refused.
    thinking: whether the model thinks before it answers a conversation, where its chat template has the switch
    (`enable_thinking`); None: as the template does where it is not told. `split_thought` tells the thought from the
    answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS
    stop: str | Iterable[str] | None = ()
    stop_token_ids: Iterable[int] | None = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: LogitBias | None = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    overflow: Overflow = "error"
    thinking: bool | None = None

    def __post_init__(self) -> None:
        # As Python's own numbers: NumPy's integers overflow in the generator, and a Fraction has no logarithm.
        for name, rule, low, high in (
            ("temperature", "a finite number of at least 0", 0.0, sys.float_info.max),
            ("top_p", "above 0 and at most 1", math.ulp(0.0), 1.0),
            ("min_p", "between 0 and 1", 0.0, 1.0),
            ("repetition_penalty", "between 0.001 and 1000", 1e-3, 1e3),
            ("presence_penalty", "between -2 and 2", -2.0, 2.0),
            ("frequency_penalty", "between -2 and 2", -2.0, 2.0),
        ):
            object.__setattr__(self, name, _read_float(name, getattr(self, name), rule, low, high))
        for name, rule, least, limit in (
            ("top_k", "0 or more", 0, math.inf),
            ("seed", "between 0 and 2^64 - 1", 0, 1 << 64),
            ("max_new_tokens", "1 or more", 1, math.inf),
            ("min_tokens", "0 or more", 0, math.inf),
            ("logprobs", f"between 0 and {MAX_LOGPROBS}", 0, MAX_LOGPROBS + 1),
            ("prompt_logprobs", f"between 0 and {MAX_LOGPROBS}", 0, MAX_LOGPROBS + 1),
        ):
            given = getattr(self, name)
            if given is not None or name in ("top_k", "min_tokens"):
                object.__setattr__(self, name, _read_integer(name, given, rule, least, limit))
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be True or False, not {shown(self.ignore_eos)}")
        if self.grammar is not None:
            if not isinstance(self.grammar, Grammar):
                raise RequestError(f"grammar must be a Grammar, not {shown(self.grammar)}")
            if self.min_tokens or self.ignore_eos:
                raise RequestError("a grammar says where the answer ends: leave out min_tokens and ignore_eos")
        if not isinstance(self.overflow, str) or self.overflow not in ("error", "roll"):
            raise RequestError(f"overflow must be 'error' or 'roll', not {shown(self.overflow)}")
        if not isinstance(self.thinking, bool | None):
            raise RequestError(f"thinking must be True, False or None, not {shown(self.thinking)}")
        if self.max_new_tokens is not None and self.min_tokens > self.max_new_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, but max_new_tokens is {self.max_new_tokens}")
        object.__setattr__(self, "stop", read_stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _read_stop_token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _read_logit_bias(self.logit_bias))

    def __repr__(self) -> str:
        """As Python writes it, without what has its default value."""
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return f"SamplingParams({', '.join(f'{name}={v!r}' for name, v, default in values if v != default)})"

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed before they are sampled from, by more than repetition_penalty."""
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty or self.min_tokens)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """logit_bias, as it is kept."""
        return cast("tuple[tuple[int, float], ...]", self.logit_bias)

    @property
    def ends(self) -> tuple[int, ...]:
        """stop_token_ids, as they are kept."""
        return cast("tuple[int, ...]", self.stop_token_ids)

    def with_seed(self) -> "SamplingParams":
        """These parameters with a seed: their own, or a new random one."""
        return self if self.seed is not None else self.changed(seed=secrets.randbits(64))

    def changed(self, **values: object) -> "SamplingParams":
        """These parameters with other values, which nothing checks: they have to be valid, and as they are kept. To
        check all of them, as `dataclasses.replace` does, takes as long as all else that is done for a short request."""
        other = object.__new__(type(self))  # as copy.copy, which takes five times as long
        other.__dict__.update(self.__dict__, **values)
        return other

    def several(self, count: int) -> "list[SamplingParams]":
        """Those of `count` answers to one prompt: the first are these with a seed, each later one has the next seed."""
        first = self.with_seed()
        assert first.seed is not None
        return [first, *(self.changed(seed=(first.seed + i) % (1 << 64)) for i in range(1, count))]


class SamplingOverrides(TypedDict, total=False):
    """The fields of `SamplingParams`, as keywords of a call."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None
    max_new_tokens: int | None
    stop: str | Iterable[str] | None
    stop_token_ids: Iterable[int] | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: LogitBias | None
    min_tokens: int
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    grammar: Grammar | None
    overflow: Overflow
    thinking: bool | None


def read_stop(stop: object) -> tuple[str, ...]:
    """Stop strings: one, several, or none. Raises RequestError for anything else, and for an empty one."""
    if stop is None:
        return ()
    if isinstance(stop, str):
        stop = (stop,)
    if isinstance(stop, bytes | bytearray | memoryview | Mapping) or not isinstance(stop, Iterable):
        raise RequestError(f"stop must be a string or a list of strings, not {shown(stop)}")
    stops = []
    try:
        texts = iter(stop)
    except TypeError:  # an array without dimensions
        raise RequestError(f"stop must be a string or a list of strings, not {shown(stop)}") from None
    for text in texts:
        if not isinstance(text, str) or not text:
            raise RequestError(f"a stop string must be a non-empty string, not {shown(text)}")
        stops.append(str(text))
    return tuple(stops)


def _read_stop_token_ids(given: object) -> tuple[int, ...]:
    """Different token ids in rising order. Raises RequestError for anything else."""
    if given is None:
        return ()
    if isinstance(given, str | bytes | bytearray | memoryview | Mapping) or not isinstance(given, Iterable):
        raise RequestError(f"stop_token_ids must be a list of token ids, not {shown(given)}")
    ids = set()
    for token in given:
        ids.add(_read_integer("a stop token id", token, "0 or more", 0, math.inf))
        check_stop_tokens(len(ids))
    return tuple(sorted(ids))


def check_stop_tokens(count: int) -> None:
    """Raises RequestError if these are too many tokens that end an answer."""
    if count > MAX_STOP_TOKENS:
        raise RequestError(f"stop_token_ids may be at most {MAX_STOP_TOKENS}", option="stop_token_ids")


def _read_logit_bias(given: object) -> tuple[tuple[int, float], ...]:
    """(token id, bias) by rising ids; keys may be strings, as in JSON. Raises RequestError for anything else."""
    if given is None:
        return ()
    pairs = given.items() if isinstance(given, Mapping) else given
    if isinstance(pairs, str | bytes | bytearray | memoryview) or not isinstance(pairs, Iterable):
        raise RequestError(f"logit_bias must give a number for each token id, not {shown(given)}")
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise RequestError(f"logit_bias must give a number for each token id, not {shown(pair)}")
        token, bias = pair
        if isinstance(token, str) and token.isdecimal() and len(token) < 10:
            token = int(token)
        token = _read_integer("a token id of logit_bias", token, "0 or more", 0, math.inf)
        if token in biases:
            raise RequestError(f"logit_bias has token {shown(token)} twice")
        biases[token] = _read_float("a value of logit_bias", bias, "between -100 and 100", -100.0, 100.0)
        if len(biases) > MAX_LOGIT_BIAS:
            raise RequestError(f"logit_bias may have at most {MAX_LOGIT_BIAS} tokens")
    return tuple(sorted(biases.items()))


def _read_float(name: str, given: object, rule: str, low: float, high: float) -> float:
    value = as_float(given)
    if value is None:
        raise RequestError(f"{name} must be a number, not {shown(given)}")
    if not low <= value <= high:
        raise RequestError(f"{name} must be {rule}, not {shown(given)}")
    return value


def _read_integer(name: str, given: object, rule: str, least: int, limit: float) -> int:
    if type(given) is not int and (not isinstance(given, Integral) or isinstance(given, bool)):
        raise RequestError(f"{name} must be an integer, not {shown(given)}")
    if not least <= int(given) < limit:
        raise RequestError(f"{name} must be {rule}, not {shown(given)}")
    return int(given)


def as_float(value: object) -> float | None:
    """A real number of any type as a float, infinite if it is too large for one; None if it is none (bools are not)."""
    if type(value) is float:  # as nearly always; what follows takes ten times as long
        return value
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer or a fraction: their sizes have no limit
        return math.inf
