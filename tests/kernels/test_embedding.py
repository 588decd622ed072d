"""The embedding look-up and what ends a pass are exact: floats are widened, int8 and ternary rows take one product."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.bfloat16 import to_float32
from bitnet_numba.kernels.embedding import (
    ELEMENTS,
    THREADS,
    advance,
    advance_spec,
    column_blocks,
    embed_token,
    embed_token_spec,
    embed_tokens,
    embed_tokens_spec,
    gather_last,
    gather_last_spec,
    scale,
    scale_spec,
)
from bitnet_numba.kernels.operands import ROW_DTYPES, EmbeddingTable, RowFormat, SequenceArrays
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import GROUP_COLS, num_groups, pack_scales, pack_ternary
from tests.kernels.harness import Out, arch, needs_gpu, run, simulated

FORMATS = list(ELEMENTS)


def embedding(
    rng: np.random.Generator, row_format: RowFormat, vocab: int, columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random rows, their scales, and what they stand for, float32."""
    scale = rng.uniform(0.001, 3.0, vocab).astype(np.float32)
    if row_format == "ternary":
        t = rng.integers(-1, 2, (vocab, columns)).astype(np.int8)
        groups = rng.uniform(0.001, 3.0, (vocab, num_groups(columns))).astype(np.float16)
        table = t * np.repeat(groups, GROUP_COLS, axis=1)[:, :columns].astype(np.float32)
        return pack_ternary(t), pack_scales(groups).view(np.uint16), table
    if row_format == "int8":
        rows = rng.integers(-128, 128, (vocab, columns)).astype(np.int8)
        return rows, scale, rows.astype(np.float32) * scale[:, None]
    if row_format == "f32":
        floats = rng.standard_normal((vocab, columns), np.float32)
        return floats, scale, floats
    bits = rng.integers(0, 1 << 16, (vocab, columns)).astype(np.uint16)
    table = to_float32(bits) if row_format == "bf16" else bits.view(np.float16).astype(np.float32)
    bits[np.isnan(table)] = 0
    return bits, scale, np.where(np.isnan(table), np.float32(0), table)


def check_embed_token(
    spec: KernelSpec, threads: int, row_format: RowFormat, vocab: int, columns: int, seed: int
) -> None:
    """One look-up among random rows; the token's bit is added to those that were set."""
    rng = np.random.default_rng(seed)
    rows, scale, table = embedding(rng, row_format, vocab, columns)
    tokens = rng.integers(0, vocab, 9).astype(np.int32)
    pos = int(rng.integers(9))
    token = int(tokens[pos])
    before = rng.integers(-(2**31), 2**31, -(-vocab // 32)).astype(np.int32)
    seen, h = Out(len(before), np.int32, before), Out(columns, np.float32)
    position = np.array([pos], np.int32)
    run(spec, column_blocks(columns, threads), [rows, scale, tokens, position, seen, h, columns])
    assert h.array.tobytes() == table[token].tobytes()
    after = before.view(np.uint32).copy()
    after[token // 32] |= np.uint32(1 << token % 32)
    assert np.array_equal(seen.array.view(np.uint32), after)


def check_embed_tokens(
    spec: KernelSpec,
    threads: int,
    row_format: RowFormat,
    prompt: bool,
    num_tokens: int,
    vocab: int,
    columns: int,
    seed: int,
) -> None:
    """A pass of `num_tokens` of which some are to spare: h, slots and positions, and the tokens' bits."""
    rng = np.random.default_rng(seed)
    rows, scale, table = embedding(rng, row_format, vocab, columns)
    sequences, stride, words = num_tokens + 2, num_tokens + 7, -(-vocab // 32)
    tokens = rng.integers(0, vocab, (sequences, stride)).astype(np.int32)
    position = rng.integers(0, 8, sequences).astype(np.int32)
    slot_ids = rng.permutation(sequences)[:num_tokens].astype(np.int32)
    slot_ids[rng.random(num_tokens) < 0.3] = -1
    expected = [(int(slot), int(position[slot])) if slot >= 0 else (-1, 0) for slot in slot_ids]
    given_positions = np.array(expected, np.int32).reshape(-1) if prompt else None
    if prompt:
        slot_ids[:], position[:] = -9, -9  # nobody may read these
    before = (rng.integers(-(2**31), 2**31, (sequences, words)) & rng.integers(-(2**31), 2**31)).astype(np.int32)
    seen, h = Out(before.size, np.int32, before), Out(num_tokens * columns, np.float32)
    slot_positions = Out(2 * num_tokens, np.int32, given_positions)
    arguments = [rows, scale, tokens, stride, position, slot_ids, seen, words, h, slot_positions, columns]
    run(spec, (column_blocks(columns, threads), num_tokens), arguments)
    after = before.view(np.uint32).copy()
    rows_of_h = np.zeros((num_tokens, columns), np.float32)
    for m, (slot, pos) in enumerate(expected):
        if slot >= 0:
            token = tokens[slot, pos]
            rows_of_h[m] = table[token]
            after[slot, token // 32] |= np.uint32(1 << int(token) % 32)
    assert np.array_equal(slot_positions.array.reshape(num_tokens, 2), expected)
    assert h.array.tobytes() == rows_of_h.tobytes()
    assert np.array_equal(seen.array.view(np.uint32), after.reshape(-1))


def check_gather_last(spec: KernelSpec, threads: int, num_tokens: int, num_rows: int, columns: int, seed: int) -> None:
    """Rows are copied with their slots and positions; of row -1 nothing is."""
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((num_tokens, columns)).astype(np.float32)
    slot_positions = rng.integers(0, 100, (num_tokens, 2)).astype(np.int32)
    row_ids = rng.integers(-1, num_tokens, num_rows).astype(np.int32)
    before = rng.standard_normal((num_rows, columns)).astype(np.float32)
    last, last_slot_positions = Out(before.size, np.float32, before), Out(2 * num_rows, np.int32)
    arguments = [row_ids, h, slot_positions, last, last_slot_positions, columns]
    run(spec, (column_blocks(columns, threads), num_rows), arguments)
    taken = row_ids >= 0
    assert last.array.tobytes() == np.where(taken[:, None], h[row_ids], before).tobytes()
    expected = np.where(taken[:, None], slot_positions[row_ids], np.array([-1, 0]))
    assert np.array_equal(last_slot_positions.array.reshape(num_rows, 2), expected)


def check_advance(spec: KernelSpec, start: int) -> None:
    """The position moves on by one, and nothing else does."""
    position = Out(3, np.int32, np.array([start, -5, 7], np.int32))
    run(spec, 1, [position])
    assert position.array.tolist() == [start + 1, -5, 7]


def check_scale(spec: KernelSpec, threads: int, size: int) -> None:
    """Each element times the factor, rounded once."""
    x = np.random.default_rng(size).standard_normal(size, np.float32)
    h = Out(size, np.float32, x)
    run(spec, column_blocks(size, threads), [h, size, np.float32(25.298222)])
    assert np.array_equal(h.array, x * np.float32(25.298222))


@simulated
@settings(max_examples=10)
@given(
    row_format=st.sampled_from(FORMATS),
    vocab=st.integers(1, 100),
    columns=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_embed_token(row_format: RowFormat, vocab: int, columns: int, seed: int) -> None:
    check_embed_token(embed_token_spec(arch(), row_format, 32), 32, row_format, vocab, columns, seed)


@simulated
@settings(max_examples=10)
@given(
    row_format=st.sampled_from(FORMATS), prompt=st.booleans(), num_tokens=st.integers(1, 5), vocab=st.integers(1, 70),
    columns=st.integers(1, 40), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_simulated_embed_tokens(
    row_format: RowFormat, prompt: bool, num_tokens: int, vocab: int, columns: int, seed: int
) -> None:
    check_embed_tokens(
        embed_tokens_spec(arch(), row_format, prompt, 32), 32, row_format, prompt, num_tokens, vocab, columns, seed
    )
    check_gather_last(gather_last_spec(arch(), 32), 32, num_tokens, 1 + seed % 3, columns, seed)


@simulated
@settings(max_examples=5)
@given(start=st.integers(0, 2**31 - 2))
def test_simulated_advance(start: int) -> None:
    check_advance(advance_spec(arch()), start)


@simulated
@settings(max_examples=5)
@given(size=st.integers(1, 100))
def test_simulated_scale(size: int) -> None:
    check_scale(scale_spec(arch(), 32), 32, size)


@needs_gpu
@settings(max_examples=5)
@given(size=st.integers(1, 100_000))
def test_scale_on_gpu(size: int) -> None:
    check_scale(scale_spec(arch()), THREADS, size)


@needs_gpu
@given(
    row_format=st.sampled_from(FORMATS),
    vocab=st.integers(1, 5000),
    columns=st.integers(1, 3000),
    seed=st.integers(0, 2**32 - 1),
)
def test_embed_token_on_gpu(row_format: RowFormat, vocab: int, columns: int, seed: int) -> None:
    check_embed_token(embed_token_spec(arch(), row_format), THREADS, row_format, vocab, columns, seed)


@needs_gpu
@settings(max_examples=30)
@given(
    row_format=st.sampled_from(FORMATS), prompt=st.booleans(), num_tokens=st.integers(1, 300),
    vocab=st.integers(1, 5000), columns=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_embed_tokens_on_gpu(
    row_format: RowFormat, prompt: bool, num_tokens: int, vocab: int, columns: int, seed: int
) -> None:
    check_embed_tokens(
        embed_tokens_spec(arch(), row_format, prompt), THREADS, row_format, prompt, num_tokens, vocab, columns, seed
    )
    check_gather_last(gather_last_spec(arch()), THREADS, num_tokens, 1 + seed % 130, columns, seed)


@needs_gpu
@settings(max_examples=5)
@given(start=st.integers(0, 2**31 - 2))
def test_advance_on_gpu(start: int) -> None:
    check_advance(advance_spec(arch()), start)


@pytest.mark.parametrize("row_format", FORMATS)
def test_launchers_refuse_operands(row_format: RowFormat) -> None:
    device = DryRunDevice(90, 132)
    scale = device.empty(64, np.float16 if row_format == "ternary" else np.float32)
    scaled = row_format in ("int8", "ternary")
    table = EmbeddingTable(device.empty(50 * 64, ROW_DTYPES[row_format]), scale if scaled else None, 50, 64, row_format)
    words, slots = device.empty(2 * 9, np.int32), device.empty(2, np.int32)
    sequences = SequenceArrays(words, 9, slots, device.empty(4, np.int32), 2, None)
    h, positions = device.empty(2 * 64, np.float32), device.empty(4, np.int32)

    assert embed_token(device, table, sequences, h).name == f"embed_token[{row_format}, 256]"
    assert (
        embed_tokens(device, table, sequences, slots, h, positions, 2).name
        == f"embed_tokens[{row_format}, decode, 256]"
    )
    assert embed_tokens(device, table, sequences, None, h, positions, 2).name.endswith("prompt, 256]")
    short = device.empty(0, np.int32)
    for name in ("tokens", "position", "seen"):
        wrong = dataclasses.replace(sequences, **{name: short})
        with pytest.raises(ValueError, match=f"embed_token: {name} holds 0 elements, a table of 50 rows of 64 takes"):
            embed_token(device, table, wrong, h)
        with pytest.raises(ValueError, match=f"embed_tokens: {name} holds 0 elements, a pass of 2 tokens"):
            embed_tokens(device, table, wrong, slots, h, positions, 2)
    for arguments, message in (
        ((slots, h, positions, 0), "at least one token is needed, not 0"),
        ((slots, h, positions, 3), "slot_ids holds 2 elements, .* takes 3"),
        ((None, h, positions, 3), "h holds 128 elements, .* takes 192"),
        ((None, h, slots, 2), "slot_positions holds 2 elements, .* takes 4"),
    ):
        with pytest.raises(ValueError, match=f"embed_tokens: {message}"):
            embed_tokens(device, table, sequences, *arguments)
    with pytest.raises(ValueError, match="embed_tokens: seen has 1 words a slot, 2 are needed"):
        embed_tokens(device, table, dataclasses.replace(sequences, seen_stride=1), slots, h, positions, 2)
    with pytest.raises(ValueError, match="embed_token: rows must be"):
        embed_token(device, dataclasses.replace(table, rows=device.empty(50 * 64, np.float64)), sequences, h)
    few = 64 * 64 // 16 if row_format == "ternary" else 50 * 64
    with pytest.raises(ValueError, match=f"embed_token: rows holds {few - 1} elements"):
        embed_token(
            device, dataclasses.replace(table, rows=device.empty(few - 1, ROW_DTYPES[row_format])), sequences, h
        )
    with pytest.raises(ValueError, match=f"table of {row_format} rows takes {'scales' if scaled else 'no scales'}"):
        dataclasses.replace(table, scale=None if scaled else scale)


def test_ends_of_a_pass_refuse_operands() -> None:
    device = DryRunDevice(90, 132)
    sizes = ((1, "int32"), (2, "int32"), (192, "float32"), (64, "float32"))
    one, two, h, last = (device.empty(n, t) for n, t in sizes)
    assert gather_last(device, one, h, two, last, two, 1, 64).name == "gather_last[256]"
    assert advance(device, one).name == "advance"
    for arguments, message in (
        ((one, h, two, last, two, 0, 64), "at least one row is needed, not 0"),
        ((one, h, two, last, two, 2, 64), "row_ids holds 1 elements, 2 rows of 64 takes 2"),
        ((one, h, two, last, one, 1, 64), "last_slot_positions holds 1 elements"),
        ((one, h, two, one, two, 1, 64), "last must be float32, not int32"),
        ((one, h, two, last, two, 1, 96), "last holds 64 elements, 1 rows of 96 takes 96"),
    ):
        with pytest.raises(ValueError, match=f"gather_last: {message}"):
            gather_last(device, *arguments)
    with pytest.raises(ValueError, match="advance: position must be int32, not float32"):
        advance(device, last)
    assert scale(device, h, 192, 16.0).name == "scale[256]"
    with pytest.raises(ValueError, match="scale: h holds 192 elements, 193 elements takes 193"):
        scale(device, h, 193, 16.0)
