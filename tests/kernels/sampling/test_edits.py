"""The kernel that edits logits does, bit for bit, what `sampling.logit_edits` says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.operands import SequenceArrays
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.kernels.sampling import edits
from bitnet_numba.sampling import edit, logit_edits
from bitnet_numba.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams
from tests.kernels.harness import Out, arch, needs_gpu, run, simulated
from tests.strategies import edited

Row = tuple[SamplingParams, list[int], int]  # parameters, history, how much of it is the prompt


@st.composite
def batches(draw: st.DrawFn, max_vocab: int, max_rows: int) -> tuple[np.ndarray, list[Row | None]]:
    """Logits, and rows of which some are to be skipped, or are not edited."""
    vocab = draw(st.integers(1, max_vocab) | st.just(max_vocab))
    plain = st.just((SamplingParams(), [0], 1))
    rows = draw(st.lists(st.none() | plain | edited(SamplingParams(), vocab), min_size=1, max_size=max_rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return (rng.standard_normal((len(rows), vocab)) * 4).astype(np.float32), rows


def check_edits(logits: np.ndarray, rows: list[Row | None], spec: KernelSpec, seed: int = 0) -> None:
    """Each row's copy is what the definition makes of it; rows to be skipped stay as they are.

    seed: which rows have a mask, of which tokens, and which logit is NaN.
    """
    vocab, slots = logits.shape[1], len(rows) + 1
    stride = 1 + max((len(row[1]) for row in rows if row is not None), default=0)
    tokens = np.full((slots, stride), -7, np.int32)
    setting = np.full((slots, edits.SETTINGS), np.nan)
    listed = np.full((slots, edits.MAX_LISTED), -7, np.int32)
    biases = np.full((slots, MAX_LOGIT_BIAS), np.nan, np.float32)
    slot_positions = np.full((len(rows), 2), -1, np.int32)
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, 1 << 32, (len(rows) + 1, -(-vocab // 32)), np.uint32)
    masks &= rng.integers(0, 1 << 32, masks.shape, np.uint32)
    mask_ids = rng.permutation(len(rows) + 1).astype(np.int32)[: len(rows)]
    masked = rng.random(len(rows)) < 0.5
    logits[rng.integers(len(rows)), rng.integers(vocab)] = np.nan
    out = Out(logits.size, np.float32)
    expected = out.array.copy().reshape(logits.shape)
    for i, row in enumerate(rows):
        if row is None:
            continue
        params, history, prompt_length = row
        slot = slots - 1 - i
        slot_positions[i] = slot, len(history) - 1
        tokens[slot, : len(history)] = history
        setting[slot], listed[slot], biases[slot] = edits.pack_edits(params, prompt_length, bool(masked[i]))
        expected[i] = edit(logits[i], *logit_edits(params, history[prompt_length:]))
        if masked[i]:
            allowed = np.unpackbits(masks[mask_ids[i]].view(np.uint8), bitorder="little")[:vocab]
            expected[i, (allowed == 0) & ~np.isnan(expected[i])] = -np.inf
        else:
            mask_ids[i] = -(1 << 20)  # which is not to be read
    where = [logits, vocab, slot_positions, tokens, stride]
    run(spec, len(rows), [*where, setting, listed, biases, masks.view(np.int32), mask_ids, out])
    assert out.array.tobytes() == expected.tobytes()


@simulated
@settings(max_examples=15)
@given(batch=batches(max_vocab=70, max_rows=3), seed=st.integers(0, 99))
def test_simulated_edits(batch: tuple[np.ndarray, list[Row | None]], seed: int) -> None:
    check_edits(*batch, edits.spec(arch(), 32), seed)


def full_row(vocab: int, seed: int) -> Row:
    """A row with as much of everything as there may be."""
    rng = np.random.default_rng(seed)
    biased = rng.choice(vocab, MAX_LOGIT_BIAS, replace=False).tolist()
    history = [*rng.integers(0, vocab, 3000), *rng.choice(biased, 900), *rng.choice(50, 5000)]
    params = SamplingParams(
        logit_bias=zip(biased, rng.uniform(-100, 100, len(biased)), strict=True),
        presence_penalty=0.7,
        frequency_penalty=-0.3,
        stop_token_ids=rng.choice(vocab, MAX_STOP_TOKENS, replace=False).tolist(),
        min_tokens=10000,
        max_new_tokens=None,
    )
    return params, [int(token) for token in history], 100


@needs_gpu
@settings(max_examples=25)
@given(batch=batches(max_vocab=128256, max_rows=8), seed=st.integers(0, 99))
def test_edits_on_gpu(batch: tuple[np.ndarray, list[Row | None]], seed: int) -> None:
    check_edits(*batch, edits.spec(arch()), seed)


@needs_gpu
def test_as_many_edits_as_there_may_be() -> None:
    logits = np.random.default_rng(3).standard_normal((3, 262144)).astype(np.float32)
    check_edits(logits, [full_row(262144, 1), None, full_row(262144, 2)], edits.spec(arch()))


def test_launcher_refuses_operands() -> None:
    device = DryRunDevice(90, 132)
    tokens, position = device.empty(3 * 9, np.int32), device.empty(3, np.int32)
    sequences = SequenceArrays(tokens, 9, position, None, 0, None)
    logits, where = device.empty(600, np.float32), device.empty(4, np.int32)
    arrays = edits.EditArrays(
        device.empty(3 * edits.SETTINGS, np.float64),
        device.empty(3 * edits.MAX_LISTED, np.int32),
        device.empty(3 * MAX_LOGIT_BIAS, np.float32),
        device.empty(10, np.int32),
        device.empty(2, np.int32),
    )
    launch = edits.edit_logits(device, logits, 300, sequences, where, arrays, logits, 2)
    assert launch.name == edits.spec(90).name
    for rows, vocab, message in (
        (0, 300, "not 0 x 300"),
        (1, 2**18 + 1, "not 1 x 262145"),
        (3, 300, "logits holds 600 elements, a batch of 3 rows of 300 takes 900"),
    ):
        with pytest.raises(ValueError, match=f"edit_logits: .*{message}"):
            edits.edit_logits(device, logits, vocab, sequences, where, arrays, logits, rows)
    with pytest.raises(ValueError, match="edit_logits: edited must be float32"):
        edits.edit_logits(device, logits, 300, sequences, where, arrays, where, 2)
