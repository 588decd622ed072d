"""The sampler: each parameter as a property, frequencies against the distribution, and Philox known answers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.errors import RequestError, shown
from bitnet_numba.sampling import (
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    PHILOX_WEYL,
    edit,
    gumbel_noise,
    kept_tokens,
    logit_edits,
    most_likely,
    penalize,
    philox,
    sample,
    scale,
    token_logprobs,
)
from bitnet_numba.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams
from tests.strategies import edited, logit_vectors, seeds


def softmax(z: np.ndarray) -> np.ndarray:
    weights = np.exp(z.astype(np.float64) - z.max())
    return weights / weights.sum()


@given(logit_vectors(), seeds)
def test_neutral_values_keep_everything(logits: np.ndarray, seed: int) -> None:
    kept = kept_tokens(scale(logits, 0.7), SamplingParams(temperature=0.7, top_p=1.0, top_k=0, min_p=0.0))
    np.testing.assert_array_equal(kept, np.arange(len(logits)))
    history = [0] * 5
    plain = sample(logits, history, SamplingParams(temperature=0.7, seed=seed))
    spelled = SamplingParams(temperature=0.7, top_p=1.0, top_k=len(logits), repetition_penalty=1.0, seed=seed)
    assert sample(logits, history, spelled) == plain


@given(logit_vectors(), seeds, st.floats(0.01, 10))
def test_top_k_of_one_is_greedy(logits: np.ndarray, seed: int, temperature: float) -> None:
    greedy = sample(logits, [1], SamplingParams())
    assert greedy == int(np.flatnonzero(logits == logits.max())[0])
    assert sample(logits, [1], SamplingParams(temperature=temperature, top_k=1, seed=seed)) == greedy


@given(logit_vectors(), st.integers(1, 250))
def test_top_k_keeps_the_k_largest(logits: np.ndarray, k: int) -> None:
    kept = kept_tokens(logits, SamplingParams(temperature=1.0, top_k=k))
    assert len(kept) == min(k, len(logits))
    dropped = np.setdiff1d(np.arange(len(logits)), kept)
    assert len(dropped) == 0 or logits[kept].min() >= logits[dropped].max()


@given(logit_vectors(), st.floats(0.001, 0.999), st.sampled_from([0, 3, 20]))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: np.ndarray, p: float, k: int) -> None:
    kept = kept_tokens(logits, SamplingParams(temperature=1.0, top_p=p, top_k=k))
    candidates = kept_tokens(logits, SamplingParams(temperature=1.0, top_k=k))
    probabilities = np.zeros(len(logits))
    probabilities[candidates] = softmax(logits[candidates])
    # float64 sums of 200 terms are exact to 1e-13; a p nearer than that to a border decides nothing.
    assert probabilities[kept].sum() >= p - 1e-12
    assert probabilities[kept].sum() - probabilities[kept].min() < p + 1e-12
    dropped = np.setdiff1d(candidates, kept)
    assert len(dropped) == 0 or logits[kept].min() >= logits[dropped].max()


@given(logit_vectors(), st.floats(0.0, 1.0))
def test_min_p_keeps_what_reaches_a_share_of_the_largest(logits: np.ndarray, share: float) -> None:
    kept = set(kept_tokens(logits, SamplingParams(temperature=1.0, min_p=share)).tolist())
    ratios = softmax(logits) / softmax(logits).max()
    # z and log(min_p) are float32: their difference is good to some 1e-6 of the largest |z|, here below 200.
    slack = 1 + 1e-4
    assert set(np.flatnonzero(ratios > share * slack).tolist()) <= kept
    assert kept <= set(np.flatnonzero(ratios >= share / slack).tolist())
    assert int(logits.argmax()) in kept


@given(logit_vectors(), st.lists(st.integers(0, 10_000), max_size=30), st.floats(0.1, 4.0))
def test_repetition_penalty_touches_seen_tokens_only(logits: np.ndarray, seen: list[int], penalty: float) -> None:
    history = [i % len(logits) for i in seen]
    before = logits.copy()
    z = penalize(logits, history, penalty)
    np.testing.assert_array_equal(logits, before)
    for i in range(len(logits)):
        factor = np.float32(penalty)
        expected = logits[i] if i not in history else logits[i] / factor if logits[i] > 0 else logits[i] * factor
        assert z[i] == expected


def test_repetition_penalty_steers_a_greedy_choice() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    assert sample(logits, [0], SamplingParams()) == 0
    assert sample(logits, [0], SamplingParams(repetition_penalty=1.2)) == 1
    assert sample(logits, [], SamplingParams(repetition_penalty=1.2)) == 0


@given(data=st.data(), logits=logit_vectors())
def test_edits_are_those_of_a_plain_loop(data: st.DataObject, logits: np.ndarray) -> None:
    """Over the answer alone, whatever the prompt has."""
    params, history, prompt_length = data.draw(edited(SamplingParams(), len(logits)))
    answer = history[prompt_length:]
    before = logits.copy()
    z = edit(logits, *logit_edits(params, answer))
    np.testing.assert_array_equal(logits, before)
    for token in range(len(logits)):
        delta = np.float32(dict(params.biases).get(token, 0.0))
        if token in answer:
            delta = delta - np.float32(params.presence_penalty)
            delta = delta - np.float32(params.frequency_penalty) * np.float32(answer.count(token))
        if len(answer) < params.min_tokens and token in params.ends:
            delta = np.float32(-np.inf)
        assert z[token] == logits[token] + delta
    assert sample(logits, history, params, prompt_length) == int(penalize(z, history, 1.0).argmax())


@given(logits=logit_vectors(), history=st.lists(st.integers(0, 10_000), min_size=1, max_size=30), seed=seeds)
def test_neutral_values_edit_nothing(logits: np.ndarray, history: list[int], seed: int) -> None:
    history = [token % len(logits) for token in history]
    plain = SamplingParams(0.9, seed=seed)
    neutral = SamplingParams(
        0.9,
        seed=seed,
        presence_penalty=0,
        frequency_penalty=0,
        logit_bias={0: 0.0},
        stop_token_ids=[0],
        min_tokens=len(history) - 1,
        ignore_eos=True,
        logprobs=20,
        prompt_logprobs=0,
    )
    assert sample(logits, history, neutral, 1) == sample(logits, history, plain, 1) == sample(logits, history, plain)


def test_penalties_and_bias_steer_a_greedy_choice() -> None:
    logits = np.array([2.0, 1.9, 1.0], np.float32)
    for params, history, prompt_length, token in (
        (SamplingParams(presence_penalty=0.5), [1, 0], 1, 1),
        (SamplingParams(presence_penalty=0.5), [1, 0], 2, 0),  # it is the prompt's
        (SamplingParams(presence_penalty=-0.5), [1, 1], 1, 1),
        (SamplingParams(frequency_penalty=0.5), [1, 0, 0, 1], 1, 1),
        (SamplingParams(frequency_penalty=0.5), [1, 0, 0, 0, 1, 1], 1, 2),
        (SamplingParams(logit_bias={2: 1.5}), [1], 1, 2),
        (SamplingParams(logit_bias={0: -100, 1: -100}), [1], 1, 2),
        (SamplingParams(logit_bias={0: 1.0}, repetition_penalty=2.0), [0], 1, 1),  # the bias comes first
        (SamplingParams(stop_token_ids=[0], min_tokens=2), [1, 1], 1, 1),
        (SamplingParams(stop_token_ids=[0], min_tokens=2), [1, 1, 1], 1, 0),
    ):
        assert sample(logits, history, params, prompt_length) == token, params


@given(logits=logit_vectors(), data=st.data())
def test_log_probabilities_are_log_softmax(logits: np.ndarray, data: st.DataObject) -> None:
    token, top = data.draw(st.integers(0, len(logits) - 1)), data.draw(st.integers(0, 20))
    (told,) = token_logprobs(logits[None], [token], top)
    expected = np.log(softmax(logits), where=softmax(logits) > 0, out=np.full(len(logits), -np.inf))
    # float32 differences of up to 400, to 2^-24 of that; probabilities below 1e-300 have no logarithm here.
    assert told.logprob == pytest.approx(expected[token], abs=1e-4)
    assert told.token_id == token and len(told.top) == min(top, len(logits))
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top]
    assert [i for i, _ in told.top] == ranked == (most_likely(logits, top).tolist() if top else [])
    np.testing.assert_allclose([value for _, value in told.top], expected[ranked], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.5, seed=2),
        SamplingParams(temperature=2.0, seed=2**63 + 5),
        SamplingParams(temperature=1.0, top_k=5, seed=3),
        SamplingParams(temperature=1.0, top_p=0.8, seed=4),
        SamplingParams(temperature=1.3, top_p=0.9, top_k=12, min_p=0.05, seed=5),
    ],
    ids=str,
)
def test_sampled_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    logits = np.random.default_rng(9).normal(0, 1.5, 24).astype(np.float32)
    z = scale(logits, params.temperature)
    kept = kept_tokens(z, params)
    expected = np.zeros(len(z))
    expected[kept] = softmax(z[kept])
    draws = 6_000
    # Noise depends on the position alone, so a sequence of positions is a sequence of independent draws.
    history: list[int] = []
    counts = np.zeros(len(z))
    for _ in range(draws):
        counts[sample(logits, history, params)] += 1
        history.append(0)
    assert counts[expected == 0].sum() == 0
    common = expected * draws >= 5  # the usual least expectation of a chi-square cell
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    # Wilson and Hilferty (1931): (chi^2 / n)^(1/3) is nearly normal. 3.7 deviations: one in 10^4.
    n = len(wanted) - 1
    assert chi_square < n * (1 - 2 / (9 * n) + 3.7 * math.sqrt(2 / (9 * n))) ** 3


@given(logit_vectors(), seeds, st.integers(0, 5000))
def test_the_same_seed_draws_the_same_token(logits: np.ndarray, seed: int, position: int) -> None:
    params = SamplingParams(temperature=1.0, seed=seed)
    assert sample(logits, [0] * position, params) == sample(logits.copy(), [0] * position, params)


def test_seeds_and_positions_draw_differently() -> None:
    flat = np.zeros(1000, np.float32)
    drawn = {sample(flat, [0] * n, SamplingParams(temperature=1.0, seed=s)) for n in range(8) for s in range(8)}
    assert len(drawn) > 50  # 64 draws of 1000; by chance some 2 meet
    assert SamplingParams().with_seed().seed != SamplingParams().with_seed().seed
    assert SamplingParams(seed=7).with_seed().seed == 7


def test_noise_of_a_token_does_not_depend_on_the_others() -> None:
    every = gumbel_noise(11, 42, np.arange(1000))
    some = np.array([3, 4, 500, 999])
    np.testing.assert_array_equal(gumbel_noise(11, 42, some), every[some])
    assert np.isfinite(every).all()


def philox_by_definition(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it, in Python's integers."""
    counter, key = list(counter), list(key)
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = divmod(PHILOX_MULTIPLIERS[0] * counter[0], 1 << 32)
        high1, low1 = divmod(PHILOX_MULTIPLIERS[1] * counter[2], 1 << 32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(k + weyl) % (1 << 32) for k, weyl in zip(key, PHILOX_WEYL, strict=True)]
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_definition_gives_the_authors_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    assert philox_by_definition(counter, key) == answer


@given(seeds, st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9), st.integers(0, 2**32 - 1))
def test_philox_equals_its_definition(seed: int, counters: list[int], position: int) -> None:
    words = philox(seed, np.array(counters, np.int64), position)
    for column, counter in enumerate(counters):
        expected = philox_by_definition([counter, position, 0, 0], [seed % 2**32, seed >> 32])
        assert words[:, column].tolist() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": "x"}, "temperature must be a number, not"),
        ({"top_p": True}, "top_p must be a number, not True"),
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0, not -0.1"),
        ({"temperature": 10**400}, "temperature must be a finite number of at least 0, not 1000000"),
        ({"temperature": -(10**400)}, "temperature must be a finite"),
        ({"temperature": 10**5000}, "temperature must be a finite number of at least 0, not a value of type int"),
        ({"temperature": "\x1b[2J" + "x" * 10**6}, r"temperature must be a number, not '\\x1b"),
        ({"min_p": 1j}, "min_p must be a number"),
        ({"min_p": Fraction(3, 2)}, r"min_p must be between 0 and 1, not Fraction\(3, 2\)"),
        ({"top_p": Fraction(1, 10**400)}, "top_p must be above 0"),
        ({"top_p": np.array(0.5)}, "top_p must be a number"),
        ({"top_k": np.bool_(True)}, "top_k must be an integer"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"top_k": 2.5}, "top_k must be an integer"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be between 0.001 and 1000"),
        ({"repetition_penalty": 1e300}, "repetition_penalty must be between 0.001 and 1000"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"seed": -1}, "seed must be between"),
        ({"seed": 2**64}, "seed must be between"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"presence_penalty": 2.1}, "presence_penalty must be between -2 and 2, not 2.1"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be between -2 and 2"),
        ({"frequency_penalty": None}, "frequency_penalty must be a number"),
        ({"logit_bias": 5}, "logit_bias must give a number for each token id, not 5"),
        ({"logit_bias": "ab"}, "logit_bias must give a number for each token id, not 'ab'"),
        ({"logit_bias": [5]}, "logit_bias must give a number for each token id, not 5"),
        ({"logit_bias": {"x": 1}}, "a token id of logit_bias must be an integer, not 'x'"),
        ({"logit_bias": {-1: 1}}, "a token id of logit_bias must be 0 or more, not -1"),
        ({"logit_bias": {1: 101}}, "a value of logit_bias must be between -100 and 100, not 101"),
        ({"logit_bias": {1: "x"}}, "a value of logit_bias must be a number, not 'x'"),
        ({"logit_bias": {1: 1, "1": 1}}, "logit_bias has token 1 twice"),
        ({"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1)}, "logit_bias may have at most 1024 tokens"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, not 5"),
        ({"stop_token_ids": "5"}, "stop_token_ids must be a list of token ids, not '5'"),
        ({"stop_token_ids": [1.5]}, "a stop token id must be an integer, not 1.5"),
        ({"stop_token_ids": [-1]}, "a stop token id must be 0 or more, not -1"),
        ({"stop_token_ids": range(MAX_STOP_TOKENS + 1)}, "stop_token_ids may be at most 256"),
        ({"min_tokens": -1}, "min_tokens must be 0 or more"),
        ({"min_tokens": 600}, "min_tokens is 600, but max_new_tokens is 512"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, not 1"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20, not 21"),
        ({"logprobs": True}, "logprobs must be an integer, not True"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be between 0 and 20, not -1"),
    ],
    ids=shown,
)
def test_impossible_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 150 and str(caught.value).isprintable()


def test_broken_logits_and_missing_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        sample(np.array([0.0, math.nan], np.float32), [], SamplingParams())
    with pytest.raises(ValueError, match="seed"):
        sample(np.zeros(3, np.float32), [], SamplingParams(temperature=1.0))
    # Weights that overflow give infinite logits; min-p then kept no token at all.
    for logits in ([0.0, math.inf], [-math.inf, -math.inf], [math.inf, math.nan]):
        for params in (SamplingParams(), SamplingParams(1.0, min_p=0.1, seed=1), SamplingParams(1.0, seed=1)):
            with pytest.raises(ValueError, match="NaN or infinity"), np.errstate(all="ignore"):
                sample(np.array(logits, np.float32), [], params)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    assert sample(logits, [0], SamplingParams(temperature=temperature, seed=1)) == 1


def test_a_top_p_just_below_one_keeps_all() -> None:
    """Adding the probabilities up in another order can give a total that the running sum never reaches."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=1.0, top_p=math.nextafter(1.0, 0.0))
    for _ in range(20):  # two in five of these kept the first token alone
        z = scale(rng.normal(0, 1, 1000).astype(np.float32), 1.0)
        assert len(kept_tokens(z, params)) > 990


@pytest.mark.parametrize("temperature", [1e39, 1e300, 10**300])
def test_huge_temperatures_choose_evenly(temperature: float) -> None:
    logits = np.array([5.0, -math.inf, 3.0, -5.0], np.float32)
    drawn = [sample(logits, [0] * i, SamplingParams(temperature=temperature, seed=7)) for i in range(60)]
    assert set(drawn) == {0, 2, 3}  # an impossible token stays impossible


def filtered_as_transformers_does(logits: np.ndarray, history: list[int], params: SamplingParams) -> set[int]:
    """The tokens left by its logits processors, each with its own definition, in its order."""
    z = logits.astype(np.float64)
    for token in set(history):
        z[token] = z[token] * params.repetition_penalty if z[token] < 0 else z[token] / params.repetition_penalty
    z = z / params.temperature
    if params.top_k:
        z[z < np.sort(z)[::-1][min(params.top_k, len(z)) - 1]] = -np.inf
    if params.top_p < 1:
        order = np.argsort(z)
        removed = np.cumsum(softmax(z[order])) <= 1 - params.top_p
        removed[-1] = False
        z[order[removed]] = -np.inf
    if params.min_p > 0:
        z[softmax(z) < params.min_p * softmax(z).max()] = -np.inf
    return set(np.flatnonzero(z > -np.inf).tolist())


@pytest.mark.parametrize("seed", range(40))
def test_the_steps_come_in_the_order_of_transformers(seed: int) -> None:
    """With strong settings of all five, any other order keeps other tokens in some of these cases."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, 60).astype(np.float32)
    history = rng.integers(0, 60, 30).tolist()
    params = SamplingParams(
        temperature=float(rng.uniform(0.5, 2.5)),
        top_p=float(rng.uniform(0.5, 0.98)),
        top_k=int(rng.integers(3, 25)),
        min_p=float(rng.uniform(0.01, 0.2)),
        repetition_penalty=float(rng.uniform(1.1, 2.0)),
    )
    z = scale(penalize(logits, history, params.repetition_penalty), params.temperature)
    assert set(kept_tokens(z, params).tolist()) == filtered_as_transformers_does(logits, history, params)


def test_what_is_kept_can_be_given_again() -> None:
    params = SamplingParams(logit_bias={"7": 1, 3: -2.5}, stop_token_ids=np.array([5, 2, 5]))
    assert params.biases == ((3, -2.5), (7, 1.0)) and params.ends == (2, 5)
    assert SamplingParams(logit_bias=params.logit_bias, stop_token_ids=params.stop_token_ids) == params
    assert eval(repr(params)) == params and hash(params) == hash(eval(repr(params)))
    assert SamplingParams(logit_bias=None, stop_token_ids=None) == SamplingParams()


def test_numpy_numbers() -> None:
    """NumPy's integers and floats are numbers like any other, and so are fractions."""
    exact = SamplingParams(Fraction(1, 2), Fraction(3, 4), min_p=Fraction(1, 8))  # type: ignore[arg-type]
    assert exact == SamplingParams(0.5, 0.75, min_p=0.125) and type(exact.min_p) is float
    logits = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    plain = SamplingParams(temperature=0.5, top_k=7, seed=2**40 + 3)
    numpys = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(7), seed=np.int64(2**40 + 3))
    assert [sample(logits, [i], plain) for i in range(20)] == [sample(logits, [i], numpys) for i in range(20)]
