"""Logits on the CPU: rows of floats and int8, every instruction set, against float64 within a bound that is derived.

A sum of products in float32 is off by at most n * 2^-24 * sum |w x|, where no product goes through more than n
roundings (Higham, 4.4). A row is summed in 32 lanes: n = K / 32 + 1 fused steps, 5 additions of lanes, and the scale.
In fixed point a column is off by 1.5 units at most (half of one, and one for the quotient's rounding), so the sum
is off by that times sum |w|, and three roundings follow.
"""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.kernels.cpu import isa, lm_head
from bitnet_numba.kernels.cpu.vec import address_of
from tests.kernels.cpu.memory import end_of_memory

POISON = np.float32(-7.25e33)
HALF_ULP = 2.0**-24


@njit
def prepare_all(prepare, x, prepared):
    for m in range(len(x)):
        prepare(address_of(x) + 4 * x.shape[1] * m, x.shape[1], address_of(prepared[m]))


@njit
def run_floats(isa, product, rows, x, prepared, y, first, last):
    product(
        isa, address_of(rows), rows.shape[1], 0, 0, address_of(prepared), prepared.shape[1], len(x),
        address_of(y), y.shape[1], first, last,
    )  # fmt: skip


@njit
def run_int8(isa, rows, scales, sums, x, prepared, y, first, last):
    K = x.shape[1]
    for m in range(len(x)):
        lm_head.prepare_int8(isa, address_of(x) + 4 * K * m, K, address_of(prepared[m]))
    lm_head.row_sums(isa, address_of(rows), rows.shape[1], address_of(sums), 0, len(rows))
    lm_head.head_int8(
        isa, address_of(rows), rows.shape[1], address_of(scales), address_of(sums), address_of(prepared),
        prepared.shape[1], len(x), address_of(y), y.shape[1], first, last,
    )  # fmt: skip


def logits(name: str, rows: np.ndarray, scales: np.ndarray | None, x: np.ndarray, first: int, last: int) -> np.ndarray:
    """float32 [M, last - first] of rows [N, K] (floats, bfloat16 as bit patterns, or int8) and x [M, K]."""
    N, M = len(rows), len(x)
    # What is not written must not be used: NaN as float32, and the largest of planes.
    prepared = np.full((M + 1, lm_head.prepared_bytes(x.shape[1])), 0xFF, np.uint8)
    y = np.full((M + 1, N + 3), POISON)
    chosen = isa.choose(name)
    if scales is None:
        name = {2: "bf16", 4: "f32"}[rows.itemsize] if rows.dtype != np.float16 else "f16"
        prepare = lm_head.prepare_bf16 if name == "bf16" else lm_head.prepare_float
        prepare_all(prepare, x, prepared[:M])
        stored = rows.view(np.uint16) if name == "f16" else rows
        run_floats(chosen, lm_head.FLOAT_ROWS[name], stored, x, prepared[:M], y[:M], first, last)
    else:
        sums = np.full(N, -77, np.int32)
        run_int8(chosen, rows, scales, sums, x, prepared[:M], y[:M], first, last)
        np.testing.assert_array_equal(sums, rows.sum(1, dtype=np.int32))
    assert (prepared[M] == 0xFF).all(), "prepared activations are longer than said"
    written = y[:M, first:last].copy()
    y[:M, first:last] = POISON
    assert (y == POISON).all(), "wrote rows or tokens that were not asked for"
    return written


def check(name: str, w: np.ndarray, scales: np.ndarray | None, x: np.ndarray, result: np.ndarray) -> None:
    """Compares with float64; w [N, K] are the values of the rows."""
    K = x.shape[1]
    w64, x64 = w.astype(np.float64), x.astype(np.float64)
    expected, size = x64 @ w64.T, np.abs(x64) @ np.abs(w64).T
    if scales is not None and name in lm_head.FIXED:
        unit = np.abs(x64).max(axis=1, keepdims=True) / lm_head.LARGEST
        bound = 1.5 * unit * np.abs(w64).sum(axis=1) + 4 * HALF_ULP * np.abs(expected)
    else:
        bound = (K / 32 + 8) * HALF_ULP * size
    if scales is not None:
        expected, bound = expected * scales, bound * scales
    worst = np.unravel_index(np.argmax(np.abs(result - expected) - bound), result.shape)
    assert abs(result[worst] - expected[worst]) <= bound[worst] + 1e-37, (
        f"{name}, token and row {worst}: {result[worst]}, not {expected[worst]} within {bound[worst]}"
    )


@st.composite
def products(draw):
    """Sizes, a seed and a range of rows."""
    M, N, K = draw(st.integers(1, 6)), draw(st.integers(1, 40)), draw(st.integers(lm_head.MIN_COLUMNS, 400))
    first = draw(st.integers(0, N - 1))
    return M, N, K, draw(st.integers(0, 2**32 - 1)), first, draw(st.integers(first + 1, N))


def activations(rng: np.random.Generator, M: int, K: int) -> np.ndarray:
    """Tokens of very different sizes, each with one column that stands out."""
    x = rng.standard_normal((M, K)) * 10.0 ** rng.integers(-6, 7, (M, 1))
    x[:, rng.integers(K)] *= 50
    return x.astype(np.float32)


@pytest.mark.parametrize("name", isa.available())
@given(products())
@settings(max_examples=30)
def test_float_rows(name, sizes):
    M, N, K, seed, first, last = sizes
    rng = np.random.default_rng(seed)
    values, x = rng.standard_normal((N, K)).astype(np.float32), activations(rng, M, K)
    values *= 2.0 ** rng.integers(-20, 3, (N, 1)).astype(np.float32)  # some are subnormal in float16
    for rows in (from_float32(values), values.astype(np.float16), values):
        result = logits(name, rows, None, x, first, last)
        exact = to_float32(rows) if rows.dtype == np.uint16 else rows.astype(np.float32)
        check(name, exact[first:last], None, x, result)
        for m in range(M):
            np.testing.assert_array_equal(logits(name, rows, None, x[m : m + 1], first, last)[0], result[m])


@pytest.mark.parametrize("name", isa.available())
@given(products())
@settings(max_examples=30)
def test_int8_rows(name, sizes):
    M, N, K, seed, first, last = sizes
    rng = np.random.default_rng(seed)
    rows, x = rng.integers(-128, 128, (N, K), dtype=np.int8), activations(rng, M, K)
    scales = rng.uniform(0.001, 0.1, N).astype(np.float32)
    result = logits(name, rows, scales, x, first, last)
    check(name, rows[first:last], scales[first:last], x, result)
    for m in range(M):
        np.testing.assert_array_equal(logits(name, rows, scales, x[m : m + 1], first, last)[0], result[m])


def test_floats_have_the_same_bits_for_every_instruction_set():
    rng = np.random.default_rng(3)
    values, x = rng.standard_normal((24, 321)).astype(np.float32), activations(rng, 5, 321)
    for rows in (from_float32(values), values.astype(np.float16), values):
        results = [logits(name, rows, None, x, 0, 24) for name in isa.available() if name != "portable"]
        for result in results[1:]:
            np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("name", isa.available())
@pytest.mark.parametrize("w, sign", [(127, 1), (-128, 1), (-128, -1)])
def test_the_largest_sums_do_not_overflow(name, w, sign):
    rows, scales = np.full((3, 70_001), w, np.int8), np.array([0.5, 1, 2], np.float32)
    x = np.full((1, 70_001), sign * 3e4, np.float32)
    check(name, rows, scales, x, logits(name, rows, scales, x, 0, 3))


@pytest.mark.parametrize("name", isa.available())
def test_hidden_states_of_zero_and_beyond_float32(name):
    rng = np.random.default_rng(4)
    int8, bf16 = rng.integers(-128, 128, (9, 96), dtype=np.int8), from_float32(rng.standard_normal((9, 96), np.float32))
    scales = np.ones(9, np.float32)
    x = np.zeros((4, 96), np.float32)
    x[1, 5], x[2, 95], x[3] = np.nan, np.inf, 1e-36
    for result in (logits(name, int8, scales, x, 0, 9), logits(name, bf16, None, x, 0, 9)):
        assert (result[0] == 0).all(), "no activations, no logits"
        assert not np.isfinite(result[1]).any() and not np.isfinite(result[2]).any(), "NaN and infinity must show"
        assert (np.abs(result[3]) < 1e-30).all()


@pytest.mark.parametrize("name", isa.available())
@pytest.mark.parametrize("K", [1, 31, 63])
def test_short_rows_are_padded(name, K):
    rng = np.random.default_rng(K)
    rows, x = np.zeros((9, lm_head.MIN_COLUMNS), np.int8), activations(rng, 3, K)
    rows[:, :K] = rng.integers(-128, 128, (9, K))
    scales = np.full(9, 0.25, np.float32)
    check(name, rows[:, :K], scales, x, logits(name, rows, scales, x, 0, 9))
    bf16 = from_float32(rows.astype(np.float32))
    check(name, rows[:, :K], None, x, logits(name, bf16, None, x, 0, 9))


@pytest.mark.skipif(sys.platform == "win32", reason="protects memory as POSIX does")
@pytest.mark.parametrize("name", isa.available())
@pytest.mark.parametrize("K", [64, 65, 95, 127, 128, 2049])
def test_nothing_is_read_beyond_the_last_row(name, K):
    rng = np.random.default_rng(K)
    x, scales = activations(rng, 3, K), np.full(5, 0.5, np.float32)
    rows = end_of_memory(rng.integers(-128, 128, (5, K), dtype=np.int8))
    check(name, rows, scales, x, logits(name, rows, scales, x, 0, 5))
    values = rng.standard_normal((5, K)).astype(np.float32)
    rows = end_of_memory(from_float32(values))
    check(name, to_float32(rows), None, x, logits(name, rows, None, x, 0, 5))
    for rows in (end_of_memory(values), end_of_memory(values.astype(np.float16))):
        check(name, rows.astype(np.float32), None, x, logits(name, rows, None, x, 0, 5))
