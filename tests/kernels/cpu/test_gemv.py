"""The W2A8 matrix-vector product on the CPU: integer sums equal the reference for every instruction set."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from bitnet_numba.kernels.cpu import isa
from bitnet_numba.kernels.cpu.gemv import FEW, gemv, gemv_tokens
from bitnet_numba.kernels.cpu.vec import address_of
from bitnet_numba.packing import pack_ternary

POISON = np.int32(-(2**31))


@njit
def run(isa, words, q, q_sum, acc, first, last):
    gemv(isa, address_of(words), len(q), address_of(q), q_sum, address_of(acc) + 64, first, last)


def product(name: str, w: np.ndarray, q: np.ndarray, first: int, last: int) -> np.ndarray:
    """Row-blocks first .. last of w q, with 16 guard words before and after the result."""
    N, K = w.shape
    padded = np.zeros(-(-K // 32) * 32, np.int8)
    padded[:K] = q
    acc = np.full(16 * (last - first) + 32, POISON)
    run(isa.choose(name), pack_ternary(w), padded, np.int32(q.sum(dtype=np.int32)), acc, first, last)
    assert (acc[:16] == POISON).all() and (acc[-16:] == POISON).all()
    return acc[16:-16]


@pytest.mark.parametrize("name", isa.available())
@given(st.integers(1, 70), st.integers(1, 400), st.integers(0, 2**32 - 1), st.data())
def test_sums_equal_those_of_integers(name, N, K, seed, data):
    rng = np.random.default_rng(seed)
    w, q = rng.integers(-1, 2, (N, K), dtype=np.int8), rng.integers(-128, 128, K, dtype=np.int8)
    blocks = -(-N // 16)
    first = data.draw(st.integers(0, blocks - 1))
    last = data.draw(st.integers(first + 1, blocks))
    expected = np.zeros(blocks * 16, np.int32)
    expected[:N] = w.astype(np.int32) @ q.astype(np.int32)
    np.testing.assert_array_equal(product(name, w, q, first, last), expected[16 * first : 16 * last])


@pytest.mark.parametrize("name", isa.available())
@pytest.mark.parametrize("q_value", [-128, 127])
@pytest.mark.parametrize("w_value", [-1, 0, 1])
def test_the_largest_sums_do_not_overflow(name, q_value, w_value):
    w, q = np.full((32, 13824), w_value, np.int8), np.full(13824, q_value, np.int8)
    assert (product(name, w, q, 0, 2) == 13824 * q_value * w_value).all()


@njit
def run_tokens(isa, words, K, q, q_sums, acc, first, last):
    at = address_of(acc) + 4 * acc.shape[1] + 64  # a row and 16 words for guards
    M, stride = len(q_sums), q.shape[1]
    gemv_tokens(isa, address_of(words), K, address_of(q), stride, address_of(q_sums), M, at, acc.shape[1], first, last)


@pytest.mark.parametrize("name", isa.available())
@given(st.integers(1, 27), st.integers(1, 70), st.integers(1, 200), st.integers(0, 2**32 - 1), st.data())
def test_a_few_tokens_equal_those_of_integers(name, M, N, K, seed, data):
    """Every tail of the tiles, row-blocks from anywhere, extreme values among them; nothing else is written."""
    rng = np.random.default_rng(seed)
    w, q = rng.integers(-1, 2, (N, K), dtype=np.int8), rng.integers(-128, 128, (M, K), dtype=np.int8)
    q[rng.integers(M)] = data.draw(st.sampled_from([-128, 127, 0]))
    blocks, padded_K = -(-N // 16), -(-K // 32) * 32
    first = data.draw(st.integers(0, blocks - 1))
    last = data.draw(st.integers(first + 1, blocks))
    padded = np.zeros((M, padded_K + data.draw(st.sampled_from([0, 32]))), np.int8)
    padded[:, :K] = q
    acc = np.full((M + 2, 16 * (last - first) + 32), POISON)
    run_tokens(isa.choose(name), pack_ternary(w), padded_K, padded, q.sum(1, dtype=np.int32), acc, first, last)
    expected = np.full_like(acc, POISON)
    products = np.zeros((M, 16 * blocks), np.int32)
    products[:, :N] = q.astype(np.int32) @ w.T.astype(np.int32)
    expected[1:-1, 16:-16] = products[:, 16 * first : 16 * last]
    np.testing.assert_array_equal(acc, expected)


def test_every_instruction_set_has_a_limit():
    assert set(FEW) == set(isa.NAMES)
