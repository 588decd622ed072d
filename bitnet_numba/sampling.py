"""Sampling of the next token: its definition, and the parameters that callers give for an answer.

The steps, in order, as in transformers: repetition penalty, temperature, top-k, top-p, min-p, then one draw: the argmax
of z + g over the kept tokens, with z = logit / temperature and g independent Gumbel noise. That is distributed as
softmax(z) (the Gumbel-max trick, Gumbel 1954) and needs neither a sort nor a prefix sum, so a GPU can do it in any
order. The noise is a pure function of (seed, position in the sequence, token id): the same seed gives the same tokens,
whatever else is in the batch.
"""

import logging
import math
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.errors import CheckpointError, RequestError, shown
from bitnet_numba.json_file import read_json
from bitnet_numba.model_folder import ModelFolder

_log = logging.getLogger("bitnet_numba")

# Philox4x32-10: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
# Temperatures outside are taken as these: float32 would make them 0 or infinity.
MIN_TEMPERATURE, MAX_TEMPERATURE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
DEFAULT_MAX_NEW_TOKENS = 512


@dataclass(frozen=True, repr=False)
class SamplingParams:
    """How an answer is generated. Raises RequestError, naming the value, if one is invalid.

    temperature 0 takes the most likely token (of equally likely ones, the lowest id). top_k 0, top_p 1, min_p 0 and
    repetition_penalty 1 have no effect. seed None: a new random seed for each request. They are applied in this order:
    repetition_penalty, temperature, top_k, top_p, min_p.

    max_new_tokens: maximum tokens of the answer, 512 unless given; None: until the model stops. A full context ends
    every answer.
    stop: one string or several; the answer ends before the first to appear. Kept as a tuple.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS
    stop: str | Iterable[str] | None = ()

    def __post_init__(self) -> None:
        # As Python's own numbers: NumPy's integers overflow in the generator, and a Fraction has no logarithm.
        for name, rule, low, high in (
            ("temperature", "a finite number of at least 0", 0.0, sys.float_info.max),
            ("top_p", "above 0 and at most 1", math.ulp(0.0), 1.0),
            ("min_p", "between 0 and 1", 0.0, 1.0),
            ("repetition_penalty", "between 0.001 and 1000", 1e-3, 1e3),
        ):
            given = getattr(self, name)
            value = as_float(given)
            if value is None:
                raise RequestError(f"{name} must be a number, not {shown(given)}")
            if not low <= value <= high:
                raise RequestError(f"{name} must be {rule}, not {shown(given)}")
            object.__setattr__(self, name, value)
        for name, rule, least, limit in (
            ("top_k", "0 or more", 0, math.inf),
            ("seed", "between 0 and 2^64 - 1", 0, 1 << 64),
            ("max_new_tokens", "1 or more", 1, math.inf),
        ):
            given = getattr(self, name)
            if name != "top_k" and given is None:
                continue
            if not isinstance(given, Integral) or isinstance(given, bool):
                raise RequestError(f"{name} must be an integer, not {shown(given)}")
            if not least <= int(given) < limit:
                raise RequestError(f"{name} must be {rule}, not {shown(given)}")
            object.__setattr__(self, name, int(given))
        object.__setattr__(self, "stop", read_stop(self.stop))

    def __repr__(self) -> str:
        """As Python writes it, without what has its default value."""
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return f"SamplingParams({', '.join(f'{name}={v!r}' for name, v, default in values if v != default)})"

    def with_seed(self) -> "SamplingParams":
        """These parameters with a seed: their own, or a new random one."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(64))


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


def as_float(value: object) -> float | None:
    """A real number of any type as a float, infinite if it is too large for one; None if it is none (bools are not)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer or a fraction: their sizes have no limit
        return math.inf


def sample(logits: NDArray[np.float32], history: Sequence[int], params: SamplingParams) -> int:
    """Samples the next token after `history` (all tokens so far, including the prompt) from logits, float32 [vocab].

    `params.seed` must be set unless temperature is 0. Raises ValueError if a logit is NaN or the largest is infinite.
    """
    z = penalize(logits, history, params.repetition_penalty)
    if not np.isfinite(z.max()):  # NaN if any of them is
        raise ValueError("logits hold NaN or infinity")
    if params.temperature == 0.0:
        return int(z.argmax())
    if params.seed is None:
        raise ValueError("sampling needs a seed")
    z = scale(z, params.temperature)
    ids = kept_tokens(z, params)
    return int(ids[(z[ids] + gumbel_noise(params.seed, len(history), ids)).argmax()])


def penalize(logits: NDArray[np.float32], history: Sequence[int], penalty: float) -> NDArray[np.float32]:
    """Repetition penalty (Keskar et al., "CTRL", 2019): divides the logits of tokens in `history` by it if positive,
    otherwise multiplies. float32 [vocab] -> float32 [vocab]."""
    if penalty == 1.0 or len(history) == 0:
        return logits
    seen = np.unique(np.asarray(history, np.int64))
    z = logits.copy()
    factor = np.float32(penalty)
    z[seen] = np.where(z[seen] > 0, z[seen] / factor, z[seen] * factor)
    return z


def scale(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """(logit - max) / temperature, float32 [vocab]: subtracting the maximum changes no probability and avoids inf."""
    with np.errstate(over="ignore"):  # a tiny temperature sends all others to -inf, as it should
        return (logits - logits.max()) / np.float32(min(max(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE))


def kept_tokens(z: NDArray[np.float32], params: SamplingParams) -> NDArray[np.int64]:
    """The ids that top-k, top-p and min-p keep, in ascending order; at least one.

    Tokens are ranked by descending z, then by ascending id. top-p keeps the smallest set of the highest ranks whose
    probabilities (softmax over what top-k kept) sum to at least top_p; min-p keeps those of at least min_p times the
    largest.
    """
    keep: NDArray[Any] = np.arange(len(z))
    if params.top_k or params.top_p < 1.0:
        keep = np.argsort(-z, kind="stable")
        if params.top_k:
            keep = keep[: params.top_k]
        if params.top_p < 1.0:
            sums = np.cumsum(np.exp(z[keep].astype(np.float64)))
            # The last of the sums is the total: one added up in another order could be more than any top_p reaches.
            reached = sums >= params.top_p * sums[-1]
            keep = keep[: int(reached.argmax()) + 1]
        keep = np.sort(keep)
    if params.min_p > 0.0:
        keep = keep[z[keep] >= z.max() + np.float32(math.log(params.min_p))]
    return keep


def gumbel_noise(seed: int, position: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Standard Gumbel noise -log(-log(u)) for token ids [n] at a position, float32 [n].

    u = (word // 2^9 + 1/2) / 2^23 for word id % 4 of Philox(key = seed, counter = (id // 4, position, 0, 0)): with 23
    bits the half is exact in float32 and u < 1; with 24 the largest word would round to u = 1 and draw +inf.
    """
    words = philox(seed, ids // 4, position)
    word = np.take_along_axis(words, (ids % 4)[None, :], axis=0)[0]
    u = ((word >> np.uint64(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    return -np.log(-np.log(u))


def philox(seed: int, counter0: NDArray[np.int64], counter1: int) -> NDArray[np.uint64]:
    """Philox4x32-10 with key (seed low, seed high) and counter (counter0, counter1, 0, 0): uint32 values [4, n]."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0 = counter0.astype(np.uint64) & mask
    c1 = np.full_like(c0, counter1)
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * np.uint64(PHILOX_MULTIPLIERS[0]), c2 * np.uint64(PHILOX_MULTIPLIERS[1])
        c0 = (product1 >> half) ^ c1 ^ np.uint64(key0)
        c2 = (product0 >> half) ^ c3 ^ np.uint64(key1)
        c1, c3 = product1 & mask, product0 & mask
        key0 = (key0 + PHILOX_WEYL[0]) & 0xFFFFFFFF
        key1 = (key1 + PHILOX_WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


GENERATION_CONFIG_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


def read_sampling(folder: Path | ModelFolder) -> SamplingParams | None:
    """The parameters that a model folder's generation_config.json recommends; None if it names none.

    As in transformers, decoding is greedy unless do_sample is true (without it, temperature, top_k, top_p and min_p
    mean nothing), and the default temperature is 1. A missing key has no effect (top_k, too, which is 50 in
    transformers). What is damaged does not make the model unusable: it is ignored with a warning.
    """
    path = ModelFolder.of(folder) / "generation_config.json"
    try:
        config = read_json(path) if path.exists() else {}
    except CheckpointError as error:
        _log.warning("%s; ignored", error)
        config = {}
    values: dict[str, Any] = {}
    for key in ("do_sample", *GENERATION_CONFIG_KEYS):
        value = config.get(key)
        if value is None:
            continue
        try:
            if key != "do_sample":
                SamplingParams(**{key: value})
            elif not isinstance(value, bool):
                raise RequestError(f"do_sample must be true or false, not {shown(value)}")
        except RequestError as error:
            _log.warning("%s: %s; ignored", path, error)
            continue
        values[key] = value
    if not values:
        return None
    if values.pop("do_sample", False):
        return SamplingParams(**{"temperature": 1.0} | values)
    return SamplingParams(**{key: values[key] for key in ("repetition_penalty", "max_new_tokens") if key in values})
