"""The embedding look-up is exact: bfloat16 rows are widened, int8 rows take one float32 product."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.bfloat16 import to_float32
from bitnet_numba.kernels.embedding import embed_grid, embed_many_spec, embed_spec, finish_prompt_spec
from bitnet_numba.kernels.runtime.spec import KernelSpec
from tests.kernels.harness import Out, arch, needs_gpu, run, simulated


def embedding(
    rng: np.random.Generator, int8: bool, vocab: int, columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random rows, their scales, and what they stand for, float32."""
    scale = rng.uniform(0.001, 3.0, vocab).astype(np.float32)
    if int8:
        rows = rng.integers(-128, 128, (vocab, columns)).astype(np.int8)
        return rows, scale, rows.astype(np.float32) * scale[:, None]
    bits = rng.integers(0, 1 << 16, (vocab, columns)).astype(np.uint16)
    bits[np.isnan(to_float32(bits))] = 0
    return bits, scale, to_float32(bits)


def check_embed(spec: KernelSpec, threads: int, int8: bool, vocab: int, columns: int, seed: int) -> None:
    """One look-up among random rows; the token's bit is added to those that were set."""
    rng = np.random.default_rng(seed)
    rows, scale, table = embedding(rng, int8, vocab, columns)
    tokens = rng.integers(0, vocab, 9).astype(np.int32)
    pos = int(rng.integers(9))
    token = int(tokens[pos])
    before = rng.integers(-(2**31), 2**31, -(-vocab // 32)).astype(np.int32)
    seen, h = Out(len(before), np.int32, before), Out(columns, np.float32)
    position = np.array([pos], np.int32)
    run(spec, embed_grid(columns, threads), [rows, scale, tokens, position, seen, h, columns])
    assert h.array.tobytes() == table[token].tobytes()
    after = before.view(np.uint32).copy()
    after[token // 32] |= np.uint32(1 << token % 32)
    assert np.array_equal(seen.array.view(np.uint32), after)


def check_embed_many(
    spec: KernelSpec, threads: int, int8: bool, prompt: bool, size: int, vocab: int, columns: int, seed: int
) -> None:
    """A pass of `size` rows of which some are to spare: h, where and the tokens' bits."""
    rng = np.random.default_rng(seed)
    rows, scale, table = embedding(rng, int8, vocab, columns)
    sequences, stride, words = size + 2, size + 7, -(-vocab // 32)
    tokens = rng.integers(0, vocab, (sequences, stride)).astype(np.int32)
    position = rng.integers(0, 8, sequences).astype(np.int32)
    slots = rng.permutation(sequences)[:size].astype(np.int32)
    count = int(rng.integers(1, size + 1))
    if prompt:
        slots[1:] = -9  # nobody may read these
        expected = [(int(slots[0]), int(position[slots[0]]) + m) if m < count else (-1, 0) for m in range(size)]
    else:
        slots[rng.random(size) < 0.3] = -1
        expected = [(int(slot), int(position[slot])) if slot >= 0 else (-1, 0) for slot in slots]
    before = (rng.integers(-(2**31), 2**31, (sequences, words)) & rng.integers(-(2**31), 2**31)).astype(np.int32)
    seen, h, where = Out(before.size, np.int32, before), Out(size * columns, np.float32), Out(2 * size, np.int32)
    arguments = [rows, scale, tokens, stride, position, slots, np.array([count], np.int32), seen, words, h, where]
    run(spec, (embed_grid(columns, threads), size), [*arguments, columns])
    after = before.view(np.uint32).copy()
    rows_of_h = np.zeros((size, columns), np.float32)
    for m, (slot, pos) in enumerate(expected):
        if slot >= 0:
            token = tokens[slot, pos]
            rows_of_h[m] = table[token]
            after[slot, token // 32] |= np.uint32(1 << int(token) % 32)
    assert np.array_equal(where.array.reshape(size, 2), expected)
    assert h.array.tobytes() == rows_of_h.tobytes()
    assert np.array_equal(seen.array.view(np.uint32), after.reshape(-1))


def check_finish_prompt(spec: KernelSpec, threads: int, size: int, columns: int, keep: int, seed: int) -> None:
    """The last real row is handed on, and one position moves."""
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((size, columns)).astype(np.float32)
    start = rng.integers(0, 100, 5).astype(np.int32)
    count, slot = int(rng.integers(1, size + 1)), int(rng.integers(5))
    position, last, where = Out(5, np.int32, start), Out(columns, np.float32), Out(2, np.int32)
    arguments = [np.array([count], np.int32), np.array([slot, -1], np.int32), position, keep, h, last, where, columns]
    run(spec, embed_grid(columns, threads), arguments)
    start[slot] += count - keep
    assert np.array_equal(position.array, start)
    assert last.array.tobytes() == h[count - 1].tobytes()
    assert where.array.tolist() == [slot, start[slot]]


@simulated
@settings(max_examples=10)
@given(int8=st.booleans(), vocab=st.integers(1, 100), columns=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_simulated_embed(int8: bool, vocab: int, columns: int, seed: int) -> None:
    check_embed(embed_spec(arch(), int8, 32), 32, int8, vocab, columns, seed)


@simulated
@settings(max_examples=10)
@given(
    int8=st.booleans(), prompt=st.booleans(), size=st.integers(1, 5), vocab=st.integers(1, 70),
    columns=st.integers(1, 40), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_simulated_embed_many(int8: bool, prompt: bool, size: int, vocab: int, columns: int, seed: int) -> None:
    check_embed_many(embed_many_spec(arch(), int8, prompt, 32), 32, int8, prompt, size, vocab, columns, seed)
    check_finish_prompt(finish_prompt_spec(arch(), 32), 32, size, columns, seed % 2, seed)


@needs_gpu
@given(int8=st.booleans(), vocab=st.integers(1, 5000), columns=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1))
def test_embed_on_gpu(int8: bool, vocab: int, columns: int, seed: int) -> None:
    check_embed(embed_spec(arch(), int8), 256, int8, vocab, columns, seed)


@needs_gpu
@settings(max_examples=30)
@given(
    int8=st.booleans(), prompt=st.booleans(), size=st.integers(1, 300), vocab=st.integers(1, 5000),
    columns=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_embed_many_on_gpu(int8: bool, prompt: bool, size: int, vocab: int, columns: int, seed: int) -> None:
    check_embed_many(embed_many_spec(arch(), int8, prompt), 256, int8, prompt, size, vocab, columns, seed)
    check_finish_prompt(finish_prompt_spec(arch()), 256, size, columns, seed % 2, seed)
