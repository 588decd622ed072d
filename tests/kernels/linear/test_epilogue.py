"""The division without divisions of the GEMM by `wgmma`: the same float32 as a division, also where that is close to
halfway between two. And the mean of squares, likewise."""

import numpy as np
import pytest
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.epilogue import LARGEST, make_mean_square, quotient, reciprocal
from bitnet_numba.kernels.ptx.base import float32
from bitnet_numba.kernels.runtime.spec import KernelSpec
from tests.kernels.harness import SIMULATED, Out, needs_gpu, run, simulated

BITS = 24  # of a float32's mantissa
COLUMNS = 6912
MEAN = make_mean_square(COLUMNS)


def quotients(a, s, out, count):  # type: ignore[no-untyped-def]
    """out[i] = a[i] / s[i], a thread each."""
    i = cuda.grid(1)
    if i < count:
        out[i] = quotient(a[i], (s[i], float32(reciprocal(s[i]))))


def hard_cases(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """a and s, integers of 24 bits, whose quotients are as close to halfway as they can be: a 2^25 = s m + d, where m
    has 25 bits and is odd, and d is small."""
    cases: list[tuple[int, int]] = []
    while len(cases) < count:
        s = int(rng.integers(1 << BITS - 1, 1 << BITS)) | 1
        d = int(rng.integers(-6, 7))
        a = d * pow(1 << BITS + 1, -1, s) % s
        m = ((a << BITS + 1) - d) // s
        if a >> BITS - 1 == 1 and m >> BITS == 1 and m % 2:
            cases.append((a, s))
    a, s = np.array(cases, np.float32).T
    return a, s


def check_quotients(count: int, seed: int) -> None:
    """Hard cases, arbitrary ones, and the ends of the range."""
    rng = np.random.default_rng(seed)
    hard_a, hard_s = hard_cases(rng, count // 4)
    scale = np.exp2(rng.integers(-40, 41, len(hard_a))).astype(np.float32)
    a = np.concatenate([hard_a * scale, rng.standard_normal(count).astype(np.float32) * np.float32(1e4)])
    s = np.concatenate([hard_s, np.float32(127) / np.exp(rng.uniform(-11, 80, count)).astype(np.float32)])
    a[-8:] = 0, -0.0, 1, -1, 2.0**-99, 3, 2.0**24 - 1, 127
    s[-8:] = 3, 3, 2.0**23 + 1, 2.0**24 - 1, 1.27e7, 2.0**-125, 2.0**24 - 1, 127
    a[-16:-8] = LARGEST, -LARGEST, 1e4, -1e4, np.inf, -np.inf, LARGEST, np.nan  # large and infinite quotients
    s[-16:-8] = 1, 1 - 2.0**-24, 1e-36, 1e-36, 3, 1e-36, 2, 3
    with np.errstate(over="ignore"):
        expected = a / s
    assert np.isinf(expected).sum() >= 5
    out = Out(len(a), np.float32)
    signature = (*(types.CPointer(types.float32),) * 3, types.int32)
    run(KernelSpec("quotients", quotients, signature, 128), -(-len(a) // 128), [a, s, out, len(a)])
    np.testing.assert_array_equal(out.array, expected)


@simulated
def test_simulated_quotients() -> None:
    check_quotients(400, 1)


@needs_gpu
@pytest.mark.skipif(SIMULATED, reason="a million of them")
def test_quotients_on_gpu() -> None:
    check_quotients(1_000_000, 2)


def mean_squares(squares, out, count):  # type: ignore[no-untyped-def]
    """The mean of 6912 numbers of which one is not 0, for each."""
    i = cuda.grid(1)
    if i < count:
        out[i] = MEAN(ptx.widen_positive(squares[i]))


def check_mean_squares(count: int, seed: int) -> None:
    squares = (10.0 ** np.random.default_rng(seed).uniform(-34, 38, count)).astype(np.float32)
    squares[-4:] = LARGEST, np.inf, np.nan, 0
    out = Out(count, np.float32)
    pointer = types.CPointer(types.float32)
    spec = KernelSpec("mean_squares", mean_squares, (pointer, pointer, types.int32), 128)
    run(spec, -(-count // 128), [squares, out, count])
    expected = (squares[:-3].astype(np.float64) / COLUMNS).astype(np.float32)
    assert np.array_equal(out.array[:-3], expected)
    assert np.isinf(out.array[-3:-1]).all() and 0 <= out.array[-1] < 2.0**-126


@simulated
def test_simulated_mean_squares() -> None:
    check_mean_squares(400, 1)


@needs_gpu
def test_mean_squares_on_gpu() -> None:
    check_mean_squares(1_000_000, 2)
