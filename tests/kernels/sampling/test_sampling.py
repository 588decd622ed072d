"""The sampling kernels, for one sequence and for a batch, choose the token that `sampling.sample` chooses.

The penalty, the temperature and the cuts are the same float32 operations in the same order, so what is kept is equal,
but for two things that the kernel computes otherwise: probabilities are float32 exponentials (relative error 2^-23)
in units of 2^-39 against float64, so that top-p's cut may move by a token whose running sum is within V * 2^-39 +
2^-22 of top_p; and the noise is two logarithms of up to 1 ulp each, about 2^-19 at its largest, 17. So where the
tokens differ, the definition itself must be that close to a tie; for greedy choice they never differ.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bitnet_numba import sampling
from bitnet_numba.kernels.operands import SequenceArrays
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.kernels.sampling import batched, parts, single
from bitnet_numba.kernels.sampling.batched import sample_batch
from bitnet_numba.kernels.sampling.single import SamplerScratch
from bitnet_numba.sampling import SamplingParams, sample
from tests.kernels.harness import SIMULATED, Out, arch, needs_gpu, run, simulated

Case = tuple[np.ndarray, list[int], SamplingParams]  # logits, history, parameters
RING = 8
NOISE_ERROR = 2.0**-18


def choose(
    logits: np.ndarray, history: list[int], params: SamplingParams, spec: KernelSpec, grid: int, repeat: int = 2
) -> int:
    """The kernel's token; checks everything else that the launch stores."""
    vocab, pos = len(logits), len(history) - 1
    seen = np.zeros(-(-vocab // 32), np.uint32)
    for token in history:
        seen[token // 32] |= np.uint32(1 << token % 32)
    position = Out(1, np.int32, np.array([pos], np.int32))
    tokens = Out(len(history) + 1, np.int32, np.array([*history, -7], np.int32))
    scratch = Out(single.SCRATCH_WORDS, np.int64, np.zeros(single.SCRATCH_WORDS, np.int64))
    counters = Out(single.COUNTERS, np.int32, np.zeros(single.COUNTERS, np.int32))
    ring = Out(RING, np.int64, np.full(RING, -1, np.int64))
    arguments = [logits, vocab, parts.pack_settings(params), position, tokens, seen.view(np.int32), scratch, counters]
    run(spec, grid, [*arguments, ring, RING], repeat)
    assert not scratch.array.any() and not counters.array.any(), "the scratch is not zero again"
    assert position.array[0] == pos + 1
    entry = int(ring.array[(pos + 1) % RING])
    assert entry >> 32 == pos + 1 and (np.delete(ring.array, (pos + 1) % RING) == -1).all()
    token = entry & 0xFFFFFFFF
    assert list(tokens.array) == [*history, 0 if token == 0xFFFFFFFF else token]
    return -1 if token == 0xFFFFFFFF else token


def check_sample(logits: np.ndarray, history: list[int], params: SamplingParams, spec: KernelSpec, grid: int) -> None:
    """The kernel chooses what the definition chooses."""
    assert_choice(choose(logits, history, params, spec, grid), logits, history, params)


def assert_choice(token: int, logits: np.ndarray, history: list[int], params: SamplingParams) -> None:
    """The token is what the definition chooses, or the definition is too close to a tie to tell."""
    expected = sample(logits, history, params)
    if token == expected:
        return
    assert params.temperature > 0, f"greedy choice {token}, expected {expected}"
    assert params.seed is not None
    z = sampling.scale(sampling.penalize(logits, history, params.repetition_penalty), params.temperature)
    margin = len(z) * 2.0**-39 + 2.0**-22  # of top-p's running sum
    at_least, at_most = (
        set(sampling.kept_tokens(z, dataclasses.replace(params, top_p=top_p)).tolist())
        for top_p in (max(params.top_p - margin, 1e-9), min(params.top_p + margin, 1.0))
    )
    assert token in at_most, f"token {token} is not kept; expected {expected}"
    if token in at_least and expected in at_least:
        noisy = z[[token, expected]] + sampling.gumbel_noise(params.seed, len(history), np.array([token, expected]))
        assert abs(noisy[0] - noisy[1]) <= NOISE_ERROR, f"token {token}: {noisy[0]}, expected {expected}: {noisy[1]}"


def choose_batch(rows: list[Case | None], spec: KernelSpec, repeat: int = 2, ring_size: int = 0) -> list[int | None]:
    """The kernel's tokens for rows of one vocabulary (None: a row to skip); checks everything else that it stores.
    ring_size: of one row."""
    vocab = max(len(row[0]) for row in rows if row is not None)
    slots = len(rows) + 1
    stride = max(len(row[1]) for row in rows if row is not None) + 1
    logits = np.full((len(rows), vocab), np.nan, np.float32)
    setting = np.full((slots, parts.SETTINGS), np.nan)
    seen = np.zeros((slots, -(-vocab // 32)), np.uint32)
    slot_positions = np.full((len(rows), 2), -1, np.int32)
    tokens, position = np.full((slots, stride), -7, np.int32), np.full(slots, -5, np.int32)
    for i, row in enumerate(rows):
        if row is None:
            continue
        slot = slots - 1 - i
        logits[i], history, setting[slot] = row[0], row[1], parts.pack_settings(row[2])
        for token in history:
            seen[slot, token // 32] |= np.uint32(1 << token % 32)
        slot_positions[i] = slot, len(history) - 1
    tokens_out, position_out = Out(tokens.size, np.int32, tokens), Out(slots, np.int32, position)
    out = Out(ring_size or len(rows), np.int64, np.full(ring_size or len(rows), -1, np.int64))
    arguments = [
        logits,
        vocab,
        setting,
        slot_positions,
        tokens_out,
        stride,
        seen.view(np.int32),
        seen.shape[1],
        position_out,
    ]
    run(spec, len(rows), [*arguments, out, ring_size], repeat)
    chosen: list[int | None] = []
    for i, row in enumerate(rows):
        entry = int(out.array[len(row[1]) % ring_size if ring_size and row else i])
        if row is None:
            assert entry == -1
            chosen.append(None)
            continue
        slot, new = slots - 1 - i, len(row[1])
        assert entry >> 32 == new
        token = entry & 0xFFFFFFFF
        position[slot], tokens[slot, new] = new, 0 if token == 0xFFFFFFFF else token
        chosen.append(parts.NAN_TOKEN if token == 0xFFFFFFFF else token)
    assert np.array_equal(position_out.array, position)
    assert np.array_equal(tokens_out.array, tokens.reshape(-1))
    return chosen


@st.composite
def batches(draw: st.DrawFn, max_vocab: int, rows: int) -> list[Case | None]:
    """Rows of one vocabulary with settings of their own; some are to be skipped."""
    vocab = draw(st.integers(1, max_vocab) | st.just(max_vocab))
    first = draw(cases(max_vocab, vocab))
    return [first, *draw(st.lists(st.none() | cases(max_vocab, vocab), max_size=rows - 1))]


def check_sample_batch(rows: list[Case | None], spec: KernelSpec) -> list[int | None]:
    """Each row's choice is the definition's; returns them."""
    chosen = choose_batch(rows, spec)
    for token, row in zip(chosen, rows, strict=True):
        if row is not None:
            assert token is not None
            assert_choice(token, *row)
    return chosen


@st.composite
def cases(draw: st.DrawFn, max_vocab: int, vocab: int = 0) -> Case:
    """Logits with many equal values, a history and parameters."""
    vocab = vocab or draw(st.integers(1, max_vocab) | st.just(max_vocab))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = (rng.standard_normal(vocab) * draw(st.sampled_from([0.01, 1.0, 4.0]))).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)  # ties, and zeros of both signs
    if draw(st.booleans()):
        logits[rng.random(vocab) < 0.3] = -np.inf
        logits[rng.integers(vocab)] = 1.5
    history = rng.integers(0, vocab, draw(st.integers(1, 20))).tolist()
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 5, 40, 10**6])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.9, 0.999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )
    return logits, history, params


@simulated
@settings(max_examples=15)
@given(case=cases(max_vocab=70))
def test_simulated_sample(case: Case) -> None:
    check_sample(*case, single.spec(arch(), 32, 128), 1)


@simulated
@settings(max_examples=12)
@given(
    rows=batches(max_vocab=70, rows=2),
    max_candidates=st.sampled_from([2, 20, 128]),
    threads=st.sampled_from([32, 96]),  # of 96, some have no bins of a histogram
)
def test_simulated_sample_batch(rows: list[Case | None], max_candidates: int, threads: int) -> None:
    check_sample_batch(rows, batched.spec(arch(), threads, max_candidates))


@simulated
@settings(max_examples=4)
@given(case=cases(max_vocab=70))
def test_simulated_batch_of_one_in_a_ring(case: Case) -> None:
    """As sequences get their tokens on cards of few SMs; `single` and the definition agree."""
    (token,) = choose_batch([case], batched.spec(arch(), 32, 128), ring_size=RING)
    assert token is not None
    assert_choice(token, *case)


@simulated
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.1, 1.0, 3.0]), top_p=st.sampled_from([0.3, 0.9, 0.99]))
def test_simulated_top_p_of_flat_logits(seed: int, spread: float, top_p: float) -> None:
    """More tokens are kept than can be listed: the cut is found in a window of z."""
    logits = (np.random.default_rng(seed).standard_normal(500) * spread).astype(np.float32)
    params = SamplingParams(temperature=0.8, top_p=top_p, seed=seed)
    check_sample_batch([(logits, [5, 7], params)], batched.spec(arch(), 32, 20))


def near_cut(vocab: int, seed: int, spread: float, distance: float) -> Case | None:
    """A case in which the token with the best noise of all is the last that is kept, or (distance below 0) the first
    that is not: so much of all probability lies between top_p and what comes before it."""
    logits = (np.random.default_rng(seed).standard_normal(vocab) * spread).astype(np.float32)
    z = sampling.scale(logits, 0.8)
    ranks = np.argsort(-z, kind="stable")
    shares = np.exp(z[ranks].astype(np.float64))
    noisy = z[ranks] + sampling.gumbel_noise(seed, 2, ranks)
    best = int(noisy.argmax())
    top_p = float(shares[:best].sum() / shares.sum()) + distance
    return (logits, [5, 7], SamplingParams(temperature=0.8, top_p=top_p, seed=seed)) if 0 < top_p < 1 else None


@simulated
@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    distance=st.sampled_from([-(2.0**-12), -(2.0**-15), -(2.0**-20), 2.0**-20, 2.0**-15, 2.0**-12]),
)
def test_simulated_best_token_near_the_cut(seed: int, spread: float, distance: float) -> None:
    """What the histogram cannot tell, the exact sums do."""
    case = near_cut(500, seed, spread, distance)
    assume(case is not None)
    check_sample_batch([case], batched.spec(arch(), 32, 20))


def low_behind_masked(vocab: int, masked: int, seed: int) -> Case:
    """All that is not masked comes behind, and is so low that 2^(logit / temperature) is hardly a float32."""
    logits = np.full(vocab, -np.inf, np.float32)
    logits[masked:] = -8.9
    logits[(masked + vocab) // 2] = -8.5
    return logits, [5, 7], SamplingParams(temperature=0.1, top_p=0.9, seed=seed)


@simulated
def test_simulated_low_logits_behind_masked_ones() -> None:
    """A row's mass counts them all, though a thread's first tokens tell it nothing of how low they are."""
    check_sample_batch([low_behind_masked(600, 512, seed) for seed in range(4)], batched.spec(arch(), 32, 20))


@simulated
@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-36, 1e38, 1.7e308])
@pytest.mark.parametrize("kept", [{"top_p": 0.7}, {"top_k": 2}, {"top_k": 3, "top_p": 0.6}], ids=str)
def test_simulated_temperatures_that_float32_lacks(temperature: float, kept: dict[str, float]) -> None:
    """They are taken as the nearest that it has: masked tokens stay masked."""
    logits = np.full(40, -np.inf, np.float32)
    logits[[3, 17, 30, 39]] = -8.5, -8.6, -8.5, -8.9
    given = [SamplingParams(temperature=temperature, seed=seed, **kept) for seed in range(3)]  # type: ignore[arg-type]
    rows = [(logits, [5, 7], params) for params in given]
    check_sample_batch(rows, batched.spec(arch(), 32, 20))
    for row in rows:
        check_sample(*row, single.spec(arch(), 32, 128), 1)


@simulated
@pytest.mark.parametrize("top_p", [1e-300, 1e-8, 2.0**-13, 0.5, 1 - 2.0**-13, 1 - 1e-8, 1 - 2.0**-53])
def test_simulated_extreme_top_p(top_p: float) -> None:
    """Of logits that differ, are all equal, or give one token all mass: also where the histogram tells nothing."""
    given = SamplingParams(temperature=1.0, top_p=top_p, seed=9)
    logits = np.random.default_rng(3).standard_normal(300).astype(np.float32)
    one = np.where(np.arange(300) == 77, 200, logits).astype(np.float32)
    rows: list[Case | None] = [(row, [5, 7], given) for row in (logits, np.zeros(300, np.float32), one)]
    check_sample_batch(rows, batched.spec(arch(), 32, 20))


@simulated
@settings(max_examples=3)
@given(vocab=st.integers(1, 40), at=st.integers(0, 39), temperature=st.sampled_from([0.0, 0.7]))
def test_simulated_logits_that_are_not_finite(vocab: int, at: int, temperature: float) -> None:
    check_not_finite(vocab, at % vocab, temperature, single.spec(arch(), 32, 128), 1)


def check_not_finite(vocab: int, at: int, temperature: float, spec: KernelSpec, grid: int) -> None:
    """The host can tell that a logit is NaN or the largest infinite, and the next step still reads a token of the
    vocabulary."""
    params = SamplingParams(temperature=temperature, top_k=3, top_p=0.9, seed=1)
    many = batched.spec(arch(), 32 if SIMULATED else batched.THREADS)
    other = np.zeros(vocab, np.float32), [0], SamplingParams()
    spoilt = [np.linspace(-1, 1, vocab, dtype=np.float32) for _ in range(3)]
    spoilt[0][at], spoilt[1][at], spoilt[2][:] = np.nan, np.inf, -np.inf
    for logits in spoilt:
        with pytest.raises(ValueError, match="logits hold NaN or infinity"):
            sample(logits, [0, 0], params)
        assert choose(logits, [0, 0], params, spec, grid) == parts.NAN_TOKEN
        assert choose_batch([(logits, [0, 0], params), other], many) == [parts.NAN_TOKEN, 0]


FULL = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=5)


@needs_gpu
@example(case=(np.random.default_rng(0).standard_normal(128256).astype(np.float32), [5, 7], FULL))
@example(case=(np.random.default_rng(1).standard_normal(262144).astype(np.float32), [5, 7], FULL))
@example(case=(np.zeros(128256, np.float32), [5, 7], SamplingParams(temperature=1.0, top_p=0.5, seed=6)))
@given(case=cases(max_vocab=128256))
def test_sample_on_gpu(case: Case) -> None:
    from bitnet_numba.kernels.runtime.device import usable_device

    logits, history, params = case
    assume(single.fits(usable_device().num_sms, len(logits)))
    grid = single.num_blocks(usable_device().num_sms, len(logits))
    check_sample(logits, history, params, single.spec(arch()), grid)


@needs_gpu
@settings(max_examples=25)
@example(rows=[(np.random.default_rng(2).standard_normal(262144).astype(np.float32), [5, 7], FULL)])
@example(rows=[(np.zeros(128256, np.float32), [5, 7], SamplingParams(temperature=1.0, top_p=0.5, top_k=9000, seed=6))])
@given(rows=batches(max_vocab=128256, rows=8))
def test_sample_batch_on_gpu(rows: list[Case | None]) -> None:
    """Rows in company get the token that `single` chooses, ties and all."""
    from bitnet_numba.kernels.runtime.device import usable_device

    chosen = check_sample_batch(rows, batched.spec(arch()))
    for token, row in zip(chosen, rows, strict=True):
        if row is not None and single.fits(usable_device().num_sms, len(row[0])):
            grid = single.num_blocks(usable_device().num_sms, len(row[0]))
            assert token == choose(*row, single.spec(arch()), grid, repeat=1)


@needs_gpu
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    distance=st.floats(-(2.0**-10), 2.0**-10).filter(lambda distance: abs(distance) > 2.0**-20),
)
def test_best_token_near_the_cut_on_gpu(seed: int, spread: float, distance: float) -> None:
    case = near_cut(128256, seed, spread, distance)
    assume(case is not None)
    check_sample_batch([case], batched.spec(arch()))


@needs_gpu
def test_low_logits_behind_masked_ones_on_gpu() -> None:
    check_sample_batch([low_behind_masked(128256, 120000, seed) for seed in range(16)], batched.spec(arch()))


@needs_gpu
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_on_gpu(temperature: float) -> None:
    from bitnet_numba.kernels.runtime.device import usable_device

    grid = single.num_blocks(usable_device().num_sms, 30000)
    check_not_finite(30000, 29999, temperature, single.spec(arch()), grid)


def test_grid_owns_every_token_and_refuses_more() -> None:
    assert single.num_blocks(132, 128256) == 64
    assert single.num_blocks(40, 128256) == 40  # all must be resident: a block an SM
    for num_sms, vocab in ((132, 0), (132, 262145), (31, 128256)):
        with pytest.raises(ValueError, match=f"not {vocab}"):
            single.num_blocks(num_sms, vocab)
    assert single.fits(132, 262144) and single.fits(32, 128256)
    assert not single.fits(31, 128256) and not single.fits(132, 262145)


def dry_sequences(device: DryRunDevice, slots: int, vocab: int) -> SequenceArrays:
    """Arrays of sequences of up to 8 tokens that just suffice."""
    words = -(-vocab // 32)
    tokens, position = device.empty(slots * 9, np.int32), device.empty(slots, np.int32)
    seen, settings_ = device.empty(slots * words, np.int32), device.empty(slots * parts.SETTINGS, np.float64)
    return SequenceArrays(tokens, 9, position, seen, words, settings_)


def test_launchers_refuse_operands() -> None:
    device = DryRunDevice(90, 132)
    one, three = dry_sequences(device, 1, 300), dry_sequences(device, 3, 300)
    scratch, ring = SamplerScratch.allocate(device), device.empty(4, np.int64)
    logits, where, chosen = device.empty(600, np.float32), device.empty(4, np.int32), device.empty(2, np.int64)
    assert single.sample(device, logits, 300, one, scratch, ring).name == single.spec(90).name
    assert sample_batch(device, logits, 300, three, where, chosen, 2).name == batched.spec(90).name
    short = device.empty(0, np.int32)
    for name in ("settings", "tokens", "seen", "position"):
        message = f"{name} must be float64" if name == "settings" else f"{name} holds 0 elements"
        with pytest.raises(ValueError, match=f"sample: {message}"):
            single.sample(device, logits, 300, dataclasses.replace(one, **{name: short}), scratch, ring)
        with pytest.raises(ValueError, match=f"sample_batch: {message}"):
            sample_batch(device, logits, 300, dataclasses.replace(three, **{name: short}), where, chosen, 2)
    with pytest.raises(ValueError, match="ring must be int64 with at least one element, not int32"):
        single.sample(device, logits, 300, one, scratch, short)
    with pytest.raises(ValueError, match="sample: words holds 1 elements"):
        single.sample(device, logits, 300, one, SamplerScratch(device.empty(1, np.int64), scratch.counters), ring)
    with pytest.raises(ValueError, match="sample_batch: seen has 10 words a slot, a batch of 2 rows of 321 takes 11"):
        sample_batch(device, device.empty(642, np.float32), 321, three, where, chosen, 2)
    for array, size, message in ((chosen, 4, r"\[4\], not int64 \[2\]"), (short, 0, r"\[1\], not int32 \[0\]")):
        with pytest.raises(ValueError, match="sample_batch: chosen must be int64 " + message):
            sample_batch(device, logits, 300, three, where, array, 1, size)
    for rows, message in ((0, "not 0 x 300"), (3, "logits holds 600 elements, a batch of 3 rows of 300 takes 900")):
        with pytest.raises(ValueError, match=message):
            sample_batch(device, logits, 300, three, where, device.empty(3, np.int64), rows)
