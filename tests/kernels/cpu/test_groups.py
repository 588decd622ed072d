"""Products with group scales on the CPU: the reference's bits, for every instruction set."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from bitnet_numba.kernels.cpu import isa
from bitnet_numba.kernels.cpu.gemm import SCRATCH_ROWS
from bitnet_numba.kernels.cpu.gemm_groups import gemm_groups
from bitnet_numba.kernels.cpu.gemv_groups import gemv_groups_tokens
from bitnet_numba.kernels.cpu.vec import address_of
from bitnet_numba.packing import CODE_OFFSET, num_groups, pack_scales, pack_ternary
from tests.kernels.cpu.memory import end_of_memory

GUARD = 64  # bytes around what is written
POISON = np.float32(-1e30)


@njit
def run_gemv(isa, words, scales, K, q, d, offsets, y, first, last, scratch):
    gemv_groups_tokens(
        isa, address_of(words), address_of(scales), K, address_of(q), q.shape[1], address_of(d), address_of(offsets),
        d.shape[1], len(q), address_of(y), y.shape[1], first, last,
    )  # fmt: skip


@njit
def run_gemm(isa, words, scales, K, q, d, offsets, y, first, last, scratch):
    gemm_groups(
        isa, address_of(words), address_of(scales), K, address_of(q), q.shape[1], address_of(d), address_of(offsets),
        d.shape[1], len(q), address_of(y), y.shape[1], first, last, address_of(scratch) + GUARD,
    )  # fmt: skip


KERNELS = {"gemv": run_gemv, "gemm": run_gemm}


def random_operands(M: int, N: int, K: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """w int8 [N, K], m float16 [N, groups], q int8 [M, K], d float32 [M, groups]."""
    rng = np.random.default_rng(seed)
    w, q = rng.integers(-1, 2, (N, K), dtype=np.int8), rng.integers(-128, 128, (M, K), dtype=np.int8)
    m = (2.0 ** rng.uniform(-26, 15, (N, num_groups(K)))).astype(np.float16)  # subnormal ones, too
    return w, m, q, (2.0 ** rng.uniform(-20, 20, (M, num_groups(K)))).astype(np.float32)


def expected_of(w: np.ndarray, m: np.ndarray, q: np.ndarray, d: np.ndarray) -> np.ndarray:
    """By the formula, float32 [M, N]: exact sums of each group, added from the first on."""
    y = np.zeros((len(q), len(w)), np.float32)
    for g in range(m.shape[1]):
        columns = slice(128 * g, 128 * (g + 1))
        acc = q[:, columns].astype(np.int32) @ w[:, columns].T.astype(np.int32)
        y += acc.astype(np.float32) * (m[:, g].astype(np.float32) * d[:, g, None])
    return y


def product(
    kernel: str, name: str, operands: tuple[np.ndarray, ...], first: int, last: int, spare: int = 0
) -> np.ndarray:
    """Row-blocks first .. last of the product; rows of activations, steps and results are longer than needed."""
    w, m, q, d = operands
    K, M = w.shape[1], len(q)
    padded_K, rows, groups = -(-K // 32) * 32, 16 * (last - first), num_groups(K)
    padded = np.full((M, padded_K + spare), 77, np.int8)  # beyond padded_K, nothing may be read
    padded[:, :K], padded[:, K:padded_K] = q, 0
    steps, offsets = np.full((M, groups + spare), np.nan, np.float32), np.full((M, groups + spare), 1 << 30, np.int32)
    steps[:, :groups] = d
    for g in range(groups):
        offsets[:, g] = -CODE_OFFSET * q[:, 128 * g : 128 * (g + 1)].sum(1, dtype=np.int32)
    y = np.full((M + 1, rows + spare), POISON)
    scratch = np.full(SCRATCH_ROWS * padded_K + 2 * GUARD, 0xEE, np.uint8)
    KERNELS[kernel](
        isa.choose(name),
        pack_ternary(w),
        pack_scales(m).view(np.uint16),
        padded_K,
        padded,
        steps,
        offsets,
        y[:M],
        first,
        last,
        scratch,
    )
    assert (y[:, rows:] == POISON).all() and (y[M] == POISON).all(), "wrote beyond the rows or tokens asked for"
    assert (scratch[:GUARD] == 0xEE).all() and (scratch[-GUARD:] == 0xEE).all(), "wrote beyond the scratch"
    return y[:M, :rows]


@pytest.mark.parametrize("name", isa.available())
@pytest.mark.parametrize("kernel", KERNELS)
@given(
    st.integers(1, 20),
    st.integers(1, 100),
    st.integers(1, 400),
    st.integers(0, 40),
    st.integers(0, 2**32 - 1),
    st.data(),
)
@settings(max_examples=30)
def test_the_bits_of_the_formula(kernel, name, M, N, K, spare, seed, data):
    operands = random_operands(M, N, K, seed)
    blocks = -(-N // 16)
    first = data.draw(st.integers(0, blocks - 1))
    last = data.draw(st.integers(first + 1, blocks))
    expected = np.zeros((M, blocks * 16), np.float32)
    expected[:, :N] = expected_of(*operands)
    result = product(kernel, name, operands, first, last, spare)
    np.testing.assert_array_equal(result, expected[:, 16 * first : 16 * last])


@pytest.mark.parametrize("name", isa.available())
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("q_value, w_value", [(-128, 1), (-128, -1), (127, 1), (127, 0)])
def test_the_largest_sums_do_not_overflow(kernel, name, q_value, w_value):
    w, q = np.full((48, 256), w_value, np.int8), np.full((9, 256), q_value, np.int8)
    ones = np.ones((48, 2), np.float16), q, np.ones((9, 2), np.float32)
    assert (product(kernel, name, (w, *ones), 0, 3) == 256 * q_value * w_value).all()


@pytest.mark.skipif(sys.platform == "win32", reason="protects memory as POSIX does")
@pytest.mark.parametrize("name", isa.available())
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_nothing_is_read_beyond_words_and_scales(kernel, name, blocks):
    w, m, q, d = random_operands(3, 16 * blocks, 160, 1)
    words, scales = end_of_memory(pack_ternary(w)), end_of_memory(pack_scales(m).view(np.uint16))
    y, scratch = np.full((3, 16 * blocks), POISON), np.empty(SCRATCH_ROWS * 160 + 2 * GUARD, np.uint8)
    offsets = -CODE_OFFSET * np.stack([q[:, :128].sum(1, dtype=np.int32), q[:, 128:].sum(1, dtype=np.int32)], 1)
    KERNELS[kernel](isa.choose(name), words, scales, 160, q, d, offsets, y, 0, blocks, scratch)
    np.testing.assert_array_equal(y, expected_of(w, m, q, d))
