"""The kernel of log probabilities ranks tokens as `sampling.token_logprobs` does, and agrees with it but for rounding.

A logit less the largest and the logarithm of the sum are float32: for logits that differ by up to 200, rounding is
below 200 * 2^-24 each; the sum of 2^18 float32 exponentials, added up in some 2^8 steps a thread, is off by less than
2^-16.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.operands import SequenceArrays
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.kernels.sampling import logprobs
from bitnet_numba.kernels.sampling.logprobs import NONE, RECORD
from bitnet_numba.sampling import token_logprobs
from bitnet_numba.sampling_params import MAX_LOGPROBS
from tests.kernels.harness import Out, arch, needs_gpu, run, simulated

TOLERANCE = 2 * 200 * 2.0**-24 + 2.0**-16
Batch = tuple[np.ndarray, list[int | None], list[int], list[int]]  # logits, wanted (None: skipped), tokens, positions


@st.composite
def batches(draw: st.DrawFn, max_vocab: int, max_rows: int) -> Batch:
    """Rows with ties, ranges of logits from flat to peaked, and every number of most likely tokens."""
    vocab, rows = draw(st.integers(1, max_vocab) | st.just(max_vocab)), draw(st.integers(1, max_rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = (rng.standard_normal((rows, vocab)) * draw(st.sampled_from([0.01, 1.0, 20.0]))).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)
    if draw(st.booleans()):
        logits[:, ::32] += np.float32(30)  # the most likely ones belong to one thread
    many = st.none() | st.just(NONE) | st.integers(0, MAX_LOGPROBS) | st.just(MAX_LOGPROBS)
    wanted = draw(st.lists(many, min_size=rows, max_size=rows))
    return logits, wanted, rng.integers(0, vocab, rows).tolist(), rng.integers(0, 20, rows).tolist()


def check_logprobs(batch: Batch, spec: KernelSpec, ahead: int, ring_size: int = 0) -> None:
    """Each record is the definition's; those that nobody wants stay as they are."""
    logits, wanted, tokens, positions = batch
    slots, stride = len(wanted) + 1, 24
    held = np.full((slots, stride), -7, np.int32)
    slot_positions = np.full((len(wanted), 2), -1, np.int32)
    counts = np.full(slots, NONE, np.int32)
    for i, k in enumerate(wanted):
        if k is not None:
            slot = slots - 1 - i
            slot_positions[i], counts[slot] = (slot, positions[i]), k
            held[slot, positions[i] + ahead] = tokens[i]
    size = (ring_size or len(wanted)) * RECORD
    ids, values = Out(size, np.int32, np.full(size, -9)), Out(size, np.float32, np.full(size, -9.0))
    arguments = [logits, logits.shape[1], slot_positions, ahead, held, stride, counts, ids, values, ring_size]
    run(spec, len(wanted), arguments)
    untouched = np.ones((ring_size or len(wanted), RECORD), bool)
    for i, k in enumerate(wanted):
        if k is None or k == NONE:
            continue
        position = positions[i] + ahead
        record = position % ring_size if ring_size else i
        ((_, own, top),) = token_logprobs(logits[i : i + 1], [tokens[i]], k)
        found = slice(record * RECORD, record * RECORD + 1 + len(top))
        assert ids.array[found].tolist() == [position, *(token for token, _ in top)]
        expected = np.array([own, *(value for _, value in top)])
        np.testing.assert_allclose(values.array[found], expected, rtol=0, atol=TOLERANCE)
        untouched[record, : 1 + len(top)] = False
    assert (ids.array.reshape(-1, RECORD)[untouched] == -9).all()
    assert (values.array.reshape(-1, RECORD)[untouched] == -9).all()


@simulated
@settings(max_examples=15)
@given(batch=batches(max_vocab=70, max_rows=2), ahead=st.integers(0, 1))
def test_simulated_logprobs(batch: Batch, ahead: int) -> None:
    check_logprobs(batch, logprobs.spec(arch(), 32), ahead)


@simulated
@settings(max_examples=3)
@given(batch=batches(max_vocab=70, max_rows=1))
def test_simulated_ring(batch: Batch) -> None:
    check_logprobs(batch, logprobs.spec(arch(), 32), 0, ring_size=7)


@needs_gpu
@settings(max_examples=40)
@given(batch=batches(max_vocab=128256, max_rows=8), ahead=st.integers(0, 1))
def test_logprobs_on_gpu(batch: Batch, ahead: int) -> None:
    check_logprobs(batch, logprobs.spec(arch()), ahead)


@needs_gpu
@pytest.mark.parametrize("same_thread", [False, True])
def test_the_largest_vocabulary(same_thread: bool) -> None:
    logits = np.random.default_rng(7).standard_normal((2, 262144)).astype(np.float32)
    if same_thread:  # the longest list that there can be: the tokens of as many threads as tokens are wanted
        for thread in range(MAX_LOGPROBS):
            logits[:, thread :: logprobs.THREADS] += np.float32(40)
    check_logprobs((logits, [MAX_LOGPROBS, 5], [3, 262143], [0, 1]), logprobs.spec(arch()), 1)


def test_launcher_refuses_operands() -> None:
    device = DryRunDevice(90, 132)
    tokens, position = device.empty(3 * 9, np.int32), device.empty(3, np.int32)
    sequences = SequenceArrays(tokens, 9, position, None, 0, None)
    logits, where, wanted = device.empty(600, np.float32), device.empty(4, np.int32), device.empty(3, np.int32)
    ids, values = device.empty(2 * RECORD, np.int32), device.empty(2 * RECORD, np.float32)

    def launch(vocab: int = 300, rows: int = 2, ids: object = ids, wanted: object = wanted) -> str:
        return logprobs.logprobs(
            device, logits, vocab, sequences, where, 1, wanted, ids, values, rows  # type: ignore[arg-type]
        ).name  # fmt: skip

    assert launch() == logprobs.spec(90).name
    with pytest.raises(ValueError, match="logprobs: .*not 0 x 300"):
        launch(rows=0)
    with pytest.raises(ValueError, match="logprobs: .*not 2 x 262145"):
        launch(vocab=2**18 + 1)
    with pytest.raises(ValueError, match=r"logprobs: ids must be int32 \[42\], not float32 \[42\]"):
        launch(ids=values)
    with pytest.raises(ValueError, match="logprobs: wanted must be int32"):
        launch(wanted=values)
