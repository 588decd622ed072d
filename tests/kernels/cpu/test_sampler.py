"""The CPU's sampler against the definition, `bitnet_numba.sampling.sample`."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from bitnet_numba.kernels.cpu import gumbel, sampler, vec
from bitnet_numba.sampling import edit, gumbel_noise, kept_tokens, logit_edits, penalize, philox, scale
from bitnet_numba.sampling_params import SamplingParams
from tests.strategies import edited, logit_vectors, seeds


@njit(error_model="numpy")
def _sample(logits, history, settings, edits, scratch):
    return sampler.sample(
        *(vec.address_of(logits), len(logits), vec.address_of(history), len(history)),
        *(vec.address_of(settings), vec.address_of(edits), len(edits) // sampler.EDIT, vec.address_of(scratch)),
    )


@njit(error_model="numpy")
def _noise(position, key0, key1, words, noise):
    for i in range(0, len(words) // 4, 16):
        counters = vec.load_i32x16(vec.address_of(words), 4 * i)
        for word, lanes in enumerate(gumbel.random_words(counters, position, key0, key1)):
            at = 4 * (word * (len(words) // 4) + i)
            vec.store(vec.address_of(words), at, lanes)
            vec.store(vec.address_of(noise), at, gumbel.gumbel(lanes))


def sampled(logits: np.ndarray, history: list[int], params: SamplingParams, prompt_length: int = 0) -> int:
    """The token; scratch is poisoned and guarded, and the logits must stay as they are."""
    edits = sampler.pack_edits(params, history[prompt_length:]).reshape(-1)
    scratch = np.full(sampler.scratch_bytes(len(logits)) + 64, 0xFF, np.uint8)
    before = logits.copy()
    token = _sample(logits, np.array(history, np.int64), sampler.pack_settings(params), edits, scratch)
    np.testing.assert_array_equal(logits, before)
    assert (scratch[-64:] == 0xFF).all()
    return int(token)


def allowed(logits: np.ndarray, history: list[int], params: SamplingParams, prompt_length: int = 0) -> set[int]:
    """The tokens that the definition lets win: its own, and such as rounding may put in its place.

    log and exp may differ in the last bits: scores within 1e-5 of the best are as good, and where a probability within
    1e-6 of top_p decides what is kept, the token may be drawn from either set.
    """
    z = edit(logits, *logit_edits(params, history[prompt_length:]))
    z = penalize(z, history, np.float32(params.repetition_penalty))
    if params.temperature == 0:
        return {int(z.argmax())}
    z = scale(z, params.temperature)
    found = set()
    for top_p in {params.top_p, *(min(1.0, params.top_p * (1 + e)) for e in (-1e-6, 1e-6) if params.top_p < 1)}:
        ids = kept_tokens(z, replace(params, top_p=top_p))
        assert params.seed is not None
        scores = z[ids] + gumbel_noise(params.seed, len(history), ids)
        best = scores.max()
        found |= set(ids[scores >= best - 1e-5 * max(1, abs(best))].tolist())
    return found


parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0]),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1.0)),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 50, 1000]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    seed=seeds,
)


@given(logits=logit_vectors(), history=st.lists(st.integers(0, 10_000), max_size=40), params=parameters)
def test_chooses_as_the_definition_does(logits: np.ndarray, history: list[int], params: SamplingParams) -> None:
    history = [token % len(logits) for token in history]
    assert sampled(logits, history, params) in allowed(logits, history, params)


@given(data=st.data(), logits=logit_vectors(), params=parameters)
def test_edits_are_the_definition_s(data: st.DataObject, logits: np.ndarray, params: SamplingParams) -> None:
    params, history, prompt_length = data.draw(edited(params, len(logits)))
    assert sampled(logits, history, params, prompt_length) in allowed(logits, history, params, prompt_length)


@pytest.mark.parametrize("params", [
    SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_p=0.95), SamplingParams(0.7, top_k=50),
    SamplingParams(2.0, top_k=500, top_p=0.9), SamplingParams(1.0, min_p=0.1), SamplingParams(1.0, top_p=1e-9),
    SamplingParams(1.0, top_p=0.9, repetition_penalty=1.2),
])  # fmt: skip
@pytest.mark.parametrize("spread", [0.01, 1.0, 20.0])
def test_a_large_vocabulary(params: SamplingParams, spread: float) -> None:
    """Flat, ordinary and peaked logits, rounded to steps of 1/8 so that thousands are equal at each cut."""
    rng = np.random.default_rng(5)
    logits = (np.round(rng.standard_normal(32_002) * spread * 8) / 8).astype(np.float32)
    history = rng.integers(0, len(logits), 300).tolist()
    for seed in range(3):
        seeded = replace(params, seed=seed * 0x123456789ABCDEF)
        assert sampled(logits, history, seeded) in allowed(logits, history, seeded)


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 64, 65, 200])
def test_every_place_can_win_and_nan_is_seen_everywhere(vocab: int) -> None:
    params = SamplingParams(0.8, top_p=0.9, top_k=3, seed=1)
    for token in range(vocab):
        logits = np.linspace(-1, 1, vocab, dtype=np.float32)
        logits[token] = 50
        assert sampled(logits, [], params) == sampled(logits, [], SamplingParams()) == token
        logits[token] = np.nan
        assert sampled(logits, [], params) == sampled(logits, [], SamplingParams()) == sampler.NO_TOKEN


def test_infinite_logits() -> None:
    logits = np.array([-np.inf, 1, -np.inf, 1.5], np.float32)
    assert {sampled(logits, [], SamplingParams(1.0, seed=seed)) for seed in range(30)} == {1, 3}
    logits[2] = np.inf
    for temperature in (0.0, 1.0):  # as in the definition, no token where the largest is infinite
        assert sampled(logits, [], SamplingParams(temperature, top_p=0.5, seed=1)) == sampler.NO_TOKEN
        assert sampled(np.full(40, -np.inf, np.float32), [], SamplingParams(temperature, seed=1)) == sampler.NO_TOKEN


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 3e38, 1e39, 1e300])
def test_temperatures_beyond_float32(temperature: float) -> None:
    logits = np.array([-np.inf, 0, 5, 3, -np.inf, 4, *[-100.0] * 30], np.float32)
    for top_k in (0, 3):
        for seed in range(20):
            params = SamplingParams(temperature, top_k=top_k, seed=seed)
            assert sampled(logits, [], params) in allowed(logits, [], params)


def test_equal_logits_rank_by_id() -> None:
    logits = np.zeros(100, np.float32)
    assert sampled(logits, [], SamplingParams()) == 0
    assert {sampled(logits, [], SamplingParams(1.0, top_k=3, seed=seed)) for seed in range(60)} == {0, 1, 2}
    assert {sampled(logits, [], SamplingParams(1.0, top_p=0.02, seed=seed)) for seed in range(60)} == {0, 1}


@given(seed=seeds, position=st.integers(0, 2**31 - 1), first=st.integers(0, 2**16))
def test_noise_is_the_definition_s(seed: int, position: int, first: int) -> None:
    words = np.zeros((4, 64), np.int32)
    words[0] = first + np.arange(64)
    noise = np.empty((4, 64), np.float32)
    _noise(position, seed & 0xFFFFFFFF, seed >> 32, words.reshape(-1), noise.reshape(-1))
    np.testing.assert_array_equal(words.view(np.uint32), philox(seed, first + np.arange(64), position))
    expected = gumbel_noise(seed, position, 4 * first + np.arange(256)).reshape(64, 4).T
    np.testing.assert_allclose(noise, expected, rtol=1e-6, atol=1e-6)


def test_no_noise_is_larger_than_the_bound() -> None:
    u = np.float32((2**23 - 0.5) * 2.0**-23)
    assert -np.log(-np.log(u)) < gumbel.LARGEST_NOISE - 0.1
