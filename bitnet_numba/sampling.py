"""Sampling of the next token: its parameters and its definition.

The steps, in order: repetition penalty, temperature, top-k, top-p, min-p, then one draw: the argmax of z + g over the
kept tokens, with z = logit / temperature and g independent Gumbel noise. That is distributed as softmax(z) (the
Gumbel-max trick, Gumbel 1954) and needs neither a sort nor a prefix sum, so a GPU can do it in any order. The noise is
a pure function of (seed, position in the sequence, token id): the same seed gives the same tokens, whatever else is in
the batch.
"""

import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.errors import RequestError
from bitnet_numba.json_file import read_json
from bitnet_numba.model_folder import ModelFolder

_log = logging.getLogger("bitnet_numba")

# Philox4x32-10: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled. Raises RequestError, naming the value, if one is invalid.

    temperature 0 takes the most likely token (of equally likely ones, the lowest id). top_k 0, top_p 1, min_p 0 and
    repetition_penalty 1 have no effect. seed None: a new random seed for each request.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise RequestError(f"{name} must be a number, not {value!r}")
        self._check("temperature", 0.0 <= self.temperature < math.inf, "a number of at least 0")
        self._check("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        self._check("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1")
        self._check("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "between 0.001 and 1000")
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise RequestError(f"{name} must be an integer, not {value!r}")
            object.__setattr__(self, name, int(value))  # NumPy's integers would overflow in the generator
        self._check("top_k", self.top_k >= 0, "0 or more")
        self._check("seed", self.seed is None or 0 <= self.seed < 1 << 64, "between 0 and 2^64 - 1")

    def _check(self, name: str, good: bool, rule: str) -> None:
        if not good:
            raise RequestError(f"{name} must be {rule}, not {getattr(self, name)!r}")

    def with_seed(self) -> "SamplingParams":
        """These parameters with a seed: their own, or a new random one."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(64))


def sample(logits: NDArray[np.float32], history: Sequence[int], params: SamplingParams) -> int:
    """Samples the next token after `history` (all tokens so far, including the prompt) from logits, float32 [vocab].

    `params.seed` must be set unless temperature is 0. Raises ValueError if logits are NaN.
    """
    if np.isnan(logits).any():
        raise ValueError("logits hold NaN")
    z = penalize(logits, history, params.repetition_penalty)
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
        return (logits - logits.max()) / np.maximum(np.float32(temperature), np.finfo(np.float32).tiny)


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
            weights = np.exp(z[keep].astype(np.float64))
            reached = np.cumsum(weights) >= params.top_p * weights.sum()
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


GENERATION_CONFIG_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_sampling(folder: Path | ModelFolder) -> SamplingParams | None:
    """The sampling parameters that a model folder recommends; None if the file is missing or has none.

    Keys are those of Hugging Face: with do_sample false, decoding is greedy whatever temperature is. A missing key has
    no effect (top_k, too, which defaults to 50 in transformers). An invalid value is ignored with a warning. Raises
    CheckpointError if the file is not a JSON object.
    """
    path = ModelFolder.of(folder) / "generation_config.json"
    config = read_json(path) if path.exists() else {}
    # As in transformers, the default temperature is 1.
    values: dict[str, Any] = {"temperature": 1.0} if config.get("do_sample") is True else {}
    for key in GENERATION_CONFIG_KEYS:
        value = config.get(key)
        if value is None:
            continue
        try:
            SamplingParams(**{key: value})
        except RequestError as error:
            _log.warning("%s: %s; ignored", path, error)
            continue
        values[key] = value
    if config.get("do_sample") is False:
        values["temperature"] = 0.0
    elif values:
        values.setdefault("temperature", 1.0)
    return SamplingParams(**values) if values else None
