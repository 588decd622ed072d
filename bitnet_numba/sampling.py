"""Sampling of the next token: its definition.

The steps, in order, as in transformers and vLLM: logit bias, presence and frequency penalty, repetition penalty,
temperature, top-k, top-p, min-p, then one draw: the argmax of z + g over the kept tokens, with z = logit / temperature
and g independent Gumbel noise. That is distributed as softmax(z) (the Gumbel-max trick, Gumbel 1954) and needs neither
a sort nor a prefix sum, so a GPU can do it in any order. The noise is a pure function of (seed, position in the
sequence, token id): the same seed gives the same tokens, whatever else is in the batch.

Log probabilities are of the model itself: log-softmax of its logits before any of these steps.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.errors import CheckpointError, RequestError, shown
from bitnet_numba.json_file import read_json
from bitnet_numba.model_folder import ModelFolder
from bitnet_numba.sampling_params import SamplingParams

_log = logging.getLogger("bitnet_numba")

# Philox4x32-10: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
# Temperatures outside are taken as these: float32 would make them 0 or infinity.
MIN_TEMPERATURE, MAX_TEMPERATURE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class TokenLogprob(NamedTuple):
    """The log probability of a token, given those before it, and what was most likely in its place."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # (id, log probability), the most likely first, of equally likely ones the lowest id


def sample(
    logits: NDArray[np.float32], history: Sequence[int], params: SamplingParams, prompt_length: int | None = None
) -> int:
    """Samples the next token after `history` (all tokens so far, including the prompt) from logits, float32 [vocab].

    prompt_length: how many tokens of the history are the prompt; the others are the answer so far. None: all are.
    `params.seed` must be set unless temperature is 0. Raises ValueError if a logit is NaN or the largest is infinite.
    """
    generated = () if prompt_length is None else history[prompt_length:]
    z = penalize(edit(logits, *logit_edits(params, generated)), history, params.repetition_penalty)
    if not np.isfinite(z.max()):  # NaN if any of them is
        raise ValueError("logits hold NaN or infinity")
    if params.temperature == 0.0:
        return int(z.argmax())
    if params.seed is None:
        raise ValueError("sampling needs a seed")
    z = scale(z, params.temperature)
    ids = kept_tokens(z, params)
    return int(ids[(z[ids] + gumbel_noise(params.seed, len(history), ids)).argmax()])


def logit_edits(params: SamplingParams, generated: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What is added to the logits of which tokens, given the answer so far: ids [n], all different, and float32 [n].

    For a token that the answer has c times: (bias - presence_penalty) - frequency_penalty * c, each operation rounded
    to float32; the penalties only if c > 0. Of an answer with fewer than min_tokens, the tokens of stop_token_ids,
    which are all those that would end it, get -inf.
    """
    if not params.edits_logits:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    biased = np.array([token for token, _ in params.biases], np.int64)
    counted = generated if params.presence_penalty or params.frequency_penalty else ()
    repeated, counts = np.unique(np.asarray(counted, np.int64), return_counts=True)
    ids = np.union1d(biased, repeated)
    deltas = np.zeros(len(ids), np.float32)
    deltas[np.searchsorted(ids, biased)] = [bias for _, bias in params.biases]
    at = np.searchsorted(ids, repeated)
    deltas[at] -= np.float32(params.presence_penalty)
    deltas[at] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
    if len(generated) < params.min_tokens:
        ends = np.array(params.ends, np.int64)
        others = ~np.isin(ids, ends)
        ids = np.concatenate([ids[others], ends])
        deltas = np.concatenate([deltas[others], np.full(len(ends), -np.inf, np.float32)])
    return ids, deltas


def edit(logits: NDArray[np.float32], ids: NDArray[np.int64], deltas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Adds deltas [n] to the logits of different tokens [n]: float32 [vocab] -> float32 [vocab]."""
    if len(ids) == 0:
        return logits
    z = logits.copy()
    z[ids] += deltas
    return z


def token_logprobs(logits: NDArray[np.float32], tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log probabilities of a token after each row of logits, float32 [M, vocab], and of the `top` most likely ones."""
    largest = logits.max(axis=1, keepdims=True)
    sums = np.exp(logits - largest).sum(axis=1, dtype=np.float64)
    shift = largest[:, 0] + np.log(sums)
    result = []
    for row, token, less in zip(logits, tokens, shift, strict=True):
        best: list[tuple[int, float]] = []
        if top:
            ids = most_likely(row, top)
            best = list(zip(ids.tolist(), (row[ids] - less).tolist(), strict=True))
        result.append(TokenLogprob(int(token), float(row[token] - less), best))
    return result


def most_likely(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The ids of the largest logits [vocab], the largest first; of equal ones the lowest id."""
    least = np.partition(logits, max(0, len(logits) - count))[max(0, len(logits) - count)]
    ids = np.flatnonzero(logits >= least)  # more than `count` if some are equal
    return ids[np.argsort(-logits[ids], kind="stable")[:count]]


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
