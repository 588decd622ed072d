"""RMSNorm and quantisation on the CPU, against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from bitnet_numba.kernels.cpu import norm
from bitnet_numba.kernels.cpu.vec import address_of
from bitnet_numba.packing import CODE_OFFSET
from bitnet_numba.quantize import SECOND_STEP, quantize_activations, quantize_groups_twice
from bitnet_numba.reference.model import rms_norm

sizes = st.integers(1, 700)


@njit
def run_quantize(x, q):
    return norm.quantize(address_of(x), len(x), address_of(q))


@njit
def run_quantize_twice(x, q, steps, offsets):
    norm.quantize_groups_twice(
        address_of(x), len(x), address_of(q[0]), address_of(q[1]), address_of(steps[0]), address_of(steps[1]),
        address_of(offsets[0]), address_of(offsets[1]),
    )  # fmt: skip


@njit
def run_rms_norm(x, weight, eps, out):
    norm.rms_norm(address_of(x), address_of(weight), len(x), eps, address_of(out))


@njit
def run_dequantize(acc, n, m, s, bias, y):
    norm.dequantize_rows(address_of(acc), n, m, s, address_of(bias) if len(bias) else 0, address_of(y))


def activations(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * 10.0 ** rng.integers(-8, 8)).astype(np.float32)


@given(sizes, st.integers(0, 2**32 - 1))
def test_quantised_activations_equal_the_definition(n, seed):
    x = activations(seed, n)
    expected_q, expected_s = quantize_activations(x)
    padded = -(-n // 32) * 32
    q = np.full(padded + 32, 99, np.int8)
    s, q_sum = run_quantize(x, q)
    assert s == expected_s[0] and q_sum == expected_q.sum(dtype=np.int32)
    np.testing.assert_array_equal(q[:n], expected_q)
    assert (q[n:padded] == 0).all() and (q[padded:] == 99).all()


@given(sizes, st.integers(0, 2**32 - 1))
def test_two_planes_equal_the_definition(n, seed):
    x = activations(seed, n)
    first, second, d = quantize_groups_twice(x[None])
    padded, groups = -(-n // 32) * 32, -(-n // 128)
    q, steps = np.full((2, padded + 32), 99, np.int8), np.zeros((2, groups), np.float32)
    offsets = np.zeros((2, groups), np.int32)
    run_quantize_twice(x, q, steps, offsets)
    np.testing.assert_array_equal(q[:, :n], np.concatenate([first, second]))
    assert (q[:, n:padded] == 0).all() and (q[:, padded:] == 99).all()
    np.testing.assert_array_equal(steps, np.concatenate([d, d * SECOND_STEP]))
    for g in range(groups):
        sums = q[:, 128 * g : min(128 * g + 128, n)].sum(axis=1, dtype=np.int32)
        np.testing.assert_array_equal(offsets[:, g], -CODE_OFFSET * sums)
    x[n // 2] = np.nan
    run_quantize_twice(x, q, steps, offsets)
    assert np.isnan(steps[:, n // 2 // 128]).all()


@pytest.mark.parametrize("n", [1, 16, 37, 2560])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_gives_nan(n, value):
    for place in {0, n // 2, n - 1}:
        x = np.ones(n, np.float32)
        x[place] = value
        assert np.isnan(run_quantize(x, np.zeros(n + 32, np.int8))[0])
        out = np.zeros(n, np.float32)
        run_rms_norm(x, np.ones(n, np.float32), np.float32(1e-5), out)
        assert np.isnan(run_quantize(out, np.zeros(n + 32, np.int8))[0])


@given(sizes, st.integers(0, 2**32 - 1), st.sampled_from([1e-5, 1e-6]))
def test_rms_norm_is_the_reference_s(n, seed, eps):
    x, weight = activations(seed, n), activations(seed + 1, n)
    out = np.full(n + 16, 99, np.float32)
    run_rms_norm(x, weight, np.float32(eps), out)
    assert (out[n:] == 99).all()
    # Of n squares, summed in another order: 2^-24 each for the at most n / 64 + 8 roundings, halved by the square root.
    np.testing.assert_allclose(out[:n], rms_norm(x, weight, eps), rtol=2.0**-24 * (n / 64 + 16), atol=1e-38)


@given(st.integers(1, 100), st.integers(0, 2**32 - 1), st.booleans())
def test_rows_are_scaled_as_the_reference_does(n, seed, biased):
    rng = np.random.default_rng(seed)
    acc = rng.integers(-(2**24), 2**24, -(-n // 16) * 16, dtype=np.int32)
    m, s = np.float32(rng.uniform(1e-3, 1)), np.float32(rng.uniform(1e-3, 1e5))
    bias = rng.standard_normal(n if biased else 0).astype(np.float32)
    y = np.zeros(len(acc), np.float32)
    run_dequantize(acc, n, m, s, bias, y)
    expected = acc[:n].astype(np.float32) * m / s
    np.testing.assert_array_equal(y[:n], expected + bias if biased else expected)
