"""exp, log, silu, gelu and relu2 of vectors against float64."""

from collections.abc import Callable

import numpy as np
import pytest
from numba import njit

from bitnet_numba.kernels.cpu import math, vec

MILLIONS = 1 << 21


def over_arrays(f: Callable) -> Callable[[np.ndarray], np.ndarray]:
    """f of 16 lanes as a function of float32 arrays."""

    @njit(error_model="numpy")
    def loop(x, y):
        for i in range(0, len(x) * 4, 64):
            vec.store(vec.address_of(y), i, f(vec.load_f32x16(vec.address_of(x), i)))

    def apply(x: np.ndarray) -> np.ndarray:
        padded = np.zeros(-(-len(x) // 16) * 16, np.float32)
        padded[: len(x)] = x
        y = np.empty_like(padded)
        loop(padded, y)
        return y[: len(x)]

    return apply


exp, log, silu, gelu, relu2 = (over_arrays(f) for f in (math.exp, math.log, math.silu, math.gelu, math.relu2))


def ulps(got: np.ndarray, exact: np.ndarray) -> float:
    """The largest distance from float64 values, in units in the last place of float32, subnormal ones included."""
    unit = np.spacing(np.maximum(np.abs(exact), np.finfo(np.float32).tiny).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(got - exact) / unit))


def test_exp_is_within_two_ulps() -> None:
    x = np.linspace(-104, 88.7, MILLIONS, dtype=np.float32)
    assert ulps(exp(x), np.exp(x.astype(np.float64))) < 2


def test_exp_near_zero() -> None:
    x = np.float32(2.0) ** np.arange(-149, 0, dtype=np.float32)
    x = np.concatenate([x, -x])
    assert ulps(exp(x), np.exp(x.astype(np.float64))) < 1


def test_exp_of_special_values() -> None:
    x = np.array([0, -0.0, -104.5, -1e30, -np.inf, 88.8, 1e30, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(exp(x), np.array([1, 1, 0, 0, 0, np.inf, np.inf, np.inf, np.nan], np.float32))


@pytest.mark.parametrize("low, high", [(2.0**-126, 1e-30), (1e-8, 1.0), (0.5, 2.0), (1.0, 3e38)])
def test_log_is_within_two_ulps(low: float, high: float) -> None:
    x = np.geomspace(low, high, MILLIONS // 4).astype(np.float32)
    assert ulps(log(x), np.log(x.astype(np.float64))) < 2


def test_log_next_to_one() -> None:
    x = np.float32(1) + np.arange(-1000, 1001, dtype=np.float32) * np.float32(2.0**-24)
    assert ulps(log(x), np.log(x.astype(np.float64))) < 2
    assert log(np.ones(1, np.float32))[0] == 0


def test_silu() -> None:
    x = np.linspace(-87, 100, MILLIONS, dtype=np.float32)
    wide = x.astype(np.float64)
    assert ulps(silu(x), wide / (1 + np.exp(-wide))) < 4  # exp's 2, and an addition's and a division's halves
    special = np.array([0, -0.0, -100, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(silu(special), np.array([0, -0.0, -0.0, np.inf, np.nan], np.float32))


def test_gelu() -> None:
    """Its exponent, up to 100 here, is rounded a few times, each by 2^-24 of it: what e^x makes of that."""
    x = np.linspace(-9, 100, MILLIONS, dtype=np.float32)
    wide = x.astype(np.float64)
    z = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    exact = wide / (1 + np.exp(-2 * z))
    bound = (4 + 4 * np.minimum(np.abs(2 * z), 100)) * 2.0**-24 * np.abs(exact)
    assert (np.abs(gelu(x) - exact) <= bound).all()
    special = np.array([0, -0.0, -100, 1e30, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(gelu(special), np.array([0, -0.0, -0.0, 1e30, np.inf, np.nan], np.float32))


def test_relu2() -> None:
    x = np.array([-3, -0.0, 0, 1.5, 1e30, np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(relu2(x), np.array([0, 0, 0, 2.25, np.inf, np.inf, 0, np.nan], np.float32))
