"""The W2A8 matrix product on the CPU: integer sums equal those of NumPy for every instruction set."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from bitnet_numba.kernels.cpu import isa
from bitnet_numba.kernels.cpu.gemm import SCRATCH_ROWS, gemm
from bitnet_numba.kernels.cpu.vec import address_of
from bitnet_numba.packing import pack_ternary
from tests.kernels.cpu.memory import end_of_memory

POISON = np.int32(-(2**31))
GUARD = 64  # bytes around what is written


@njit
def run(isa, words, K, q, q_sums, acc, first, last, scratch):
    gemm(
        isa, address_of(words), K, address_of(q), q.shape[1], address_of(q_sums), len(q),
        address_of(acc), acc.shape[1], first, last, address_of(scratch) + GUARD,
    )  # fmt: skip


def product(name: str, w: np.ndarray, q: np.ndarray, first: int, last: int, spare: int = 0) -> np.ndarray:
    """Row-blocks first .. last of q w^T; rows of activations and of results are `spare` numbers longer than needed."""
    K, M = w.shape[1], len(q)
    padded_K, rows = -(-K // 32) * 32, 16 * (last - first)
    padded = np.full((M, padded_K + spare), 77, np.int8)  # beyond padded_K, nothing may be read
    padded[:, :K], padded[:, K:padded_K] = q, 0
    acc = np.full((M + 1, rows + spare), POISON)
    scratch = np.full(SCRATCH_ROWS * padded_K + 2 * GUARD, 0xEE, np.uint8)
    before = padded.tobytes()
    run(isa.choose(name), pack_ternary(w), padded_K, padded, q.sum(1, dtype=np.int32), acc[:M], first, last, scratch)
    assert padded.tobytes() == before
    assert (acc[:, rows:] == POISON).all() and (acc[M] == POISON).all(), "wrote beyond the rows or tokens asked for"
    assert (scratch[:GUARD] == 0xEE).all() and (scratch[-GUARD:] == 0xEE).all(), "wrote beyond the scratch"
    return acc[:M, :rows]


@pytest.mark.parametrize("name", isa.available())
@given(
    st.integers(1, 20),
    st.integers(1, 100),
    st.integers(1, 300),
    st.integers(0, 40),
    st.integers(0, 2**32 - 1),
    st.data(),
)
@settings(max_examples=30)
def test_sums_equal_those_of_integers(name, M, N, K, spare, seed, data):
    rng = np.random.default_rng(seed)
    w, q = rng.integers(-1, 2, (N, K), dtype=np.int8), rng.integers(-128, 128, (M, K), dtype=np.int8)
    blocks = -(-N // 16)
    first = data.draw(st.integers(0, blocks - 1))
    last = data.draw(st.integers(first + 1, blocks))
    expected = np.zeros((M, blocks * 16), np.int32)
    expected[:, :N] = q.astype(np.int32) @ w.T.astype(np.int32)
    result = product(name, w, q, first, last, spare)
    np.testing.assert_array_equal(result, expected[:, 16 * first : 16 * last])


@pytest.mark.parametrize("name", isa.available())
@pytest.mark.parametrize("K", [14016, 192, 160])  # AVX2 widens its sums after 160 columns
@pytest.mark.parametrize("q_value, w_value", [(-128, 1), (-128, -1), (127, 1), (127, 0)])
def test_the_largest_sums_do_not_overflow(name, K, q_value, w_value):
    w, q = np.full((48, K), w_value, np.int8), np.full((9, K), q_value, np.int8)
    assert (product(name, w, q, 0, 3) == K * q_value * w_value).all()


@pytest.mark.skipif(sys.platform == "win32", reason="protects memory as POSIX does")
@pytest.mark.parametrize("name", isa.available())
@pytest.mark.parametrize("blocks", [1, 3])
def test_nothing_is_read_beyond_the_words(name, blocks):
    w, q = np.ones((16 * blocks, 96), np.int8), np.full((3, 96), 2, np.int8)
    words = end_of_memory(pack_ternary(w))
    acc, scratch = np.full((3, 16 * blocks), POISON), np.empty(SCRATCH_ROWS * 96 + 2 * GUARD, np.uint8)
    run(isa.choose(name), words, 96, q, q.sum(1, dtype=np.int32), acc, 0, blocks, scratch)
    assert (acc == 192).all()


@pytest.mark.parametrize("name", isa.available())
def test_a_token_has_the_same_sums_in_any_company(name):
    rng = np.random.default_rng(5)
    w, q = rng.integers(-1, 2, (80, 96), dtype=np.int8), rng.integers(-128, 128, (15, 96), dtype=np.int8)
    together = product(name, w, q, 0, 5)
    for m in range(15):
        np.testing.assert_array_equal(product(name, w, q[m : m + 1], 0, 5)[0], together[m])
