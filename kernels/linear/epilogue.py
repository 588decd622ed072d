"""From an int32 sum to the result: the epilogue of every GEMM, one float32 operation at a time and in gemv.py's order.

    acc        sum_k q * w, int32                       y = (sum_k q * w) * m / s  (+ bias)
    store      y
    residual   old + y
    gated      activation(y) * y_up                     m: the row's scale; s: the token's

ptxas makes a float32 division a call, and serialises `wgmma` around calls. So gemm_wgmma.py makes r, the float32
nearest to 1 / s, once a token, and divides by Markstein's theorem (1990): if y is a / s or next to it, then
y + (a - s y) r, rounded once, is a / s rounded once. Here y is a r. Where the mantissa of a is below that of s, that
may be the number after next; the quotients that could then be wrong, those next to halfway, are 15 million but for
powers of two, and trying them all has found none. r itself comes by float64: with s and a float32 midpoint m
(25 bits), m s and a power of two are different integers of at most 49 bits, so 1 / s is further than 2^-50 m from m,
and the float64 is off by less than 2^-51. The remainder a - s y must not underflow: quotients below 2^-126, and any of
|a| < 2^-100, may differ in the last bit. Where a r is infinite, y is the largest float32, from which the last step
gets to infinity, as a division does; from an infinite y it would get to NaN.

Float64 would do with one product for each result, but converting to it and back takes eight times as long as this.
"""

import math
from collections.abc import Callable
from typing import Any

from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import device_function, float32, float64, int32
from bitnet_numba.packing import CODE_OFFSET

LARGEST = float32(3.4028234663852886e38)
INFINITY, NOT_FINITE = float32(math.inf), 2.0**128  # what `ptx.widen_positive` makes of infinity at least
GELU_CUBE, GELU_SLOPE = float32(0.044715), float32(-2 * math.sqrt(2 / math.pi))
EPILOGUES = ("acc", "store", "residual", "gated")
GROUP_EPILOGUES = EPILOGUES[1:]  # of products with group scales


@device_function
def reciprocal(x):
    """1 / x as float64 with a relative error below 2^-51.5, for float32 x >= 2^-126; 0 for infinity, NaN for 0 (a
    token's scale is 0 only if the token holds an infinity)."""
    if x > LARGEST:
        return float64(0)
    wide, r = float64(x), float64(ptx.rcp_approx(x))
    r = r * (float64(2) - wide * r)
    return r * (float64(2) - wide * r)


@device_function
def quotient(a, divisor):
    """a / s rounded once to float32; divisor: (s, the nearest float32 of 1 / s)."""
    s, r = divisor
    y = ptx.clamp(ptx.mul_rn(a, r), -LARGEST, LARGEST)
    return ptx.fma_rn(ptx.fma_rn(-s, y, a), r, y)


def make_mean_square(count: int) -> Callable[..., Any]:
    """The device function `mean(total)`: the mean of `count` squares, rounded to float32, from their float64 sum by
    `ptx.widen_positive`; infinity from 2^128 on, which is no float32 sum (one is infinite or NaN, or they are large).
    By Markstein's theorem, as `quotient`: a float64 division is a call of 100 instructions."""
    COUNT, RECIPROCAL = float(count), 1 / count

    @device_function
    def mean(total):
        y = total * RECIPROCAL
        y = cuda.fma(cuda.fma(-y, COUNT, total), RECIPROCAL, y)
        return float32(y) if total < NOT_FINITE else INFINITY

    return mean


@device_function
def _over(x, y):
    return float32(float64(x) * reciprocal(y))


def make_scaled(inverse: bool = False) -> Callable[..., Any]:
    """The device function `scaled(acc, m, s)`: y of a row without bias, from its int32 sum of weights times q.

    m, s: the scales of weights and token, float32, or with `inverse` the latter as `quotient` takes it.
    """
    by_s = quotient if inverse else ptx.div_rn

    @device_function
    def scaled(acc, m, s):
        return by_s(ptx.mul_rn(ptx.int_to_float(acc), m), s)

    return scaled


def make_gated(activation: str, inverse: bool = False) -> Callable[..., Any]:
    """The device function `gated(gate, up)`: activation(gate) * up, float32; activation "relu2", "silu" or "gelu".

    GELU by tanh (Hendrycks and Gimpel, 2016): x / 2 * (1 + tanh(z)), which is x / (1 + exp(-2 z)), with
    z = sqrt(2 / pi) * (x + 0.044715 x^3).
    """
    over, RELU2, GELU = _over if inverse else ptx.div_rn, activation == "relu2", activation == "gelu"
    ZERO, ONE = float32(0), float32(1)

    @device_function
    def gated(gate, up):
        if RELU2:
            gate = max(gate, ZERO)
            return ptx.mul_rn(ptx.mul_rn(gate, gate), up)
        exponent = -gate
        if GELU:
            cube = ptx.mul_rn(ptx.mul_rn(gate, gate), ptx.mul_rn(gate, GELU_CUBE))
            exponent = ptx.mul_rn(ptx.add_rn(gate, cube), GELU_SLOPE)
        return ptx.mul_rn(over(gate, ptx.add_rn(ONE, math.exp(exponent))), up)

    return gated


def make_epilogue(epilogue: str, activation: str, inverse: bool = False) -> Callable[..., Any]:
    """The device function `finish(sum_, sum_up, q_sum, m, m_up, s, bias, n, rows, old)`, the result of row n and a
    token.

    epilogue: one of EPILOGUES; activation: "relu2" or "silu", for "gated"; inverse: divide without divisions.
    sum_: int32, of codes times q (codes are w + CODE_OFFSET, which comes off here); sum_up: that of row n + rows, for
    "gated"; q_sum: int32, of the token's q; m, m_up: float32 scales of both rows; s: the token's scale, float32, or
    with `inverse` as `quotient` takes it; bias: float32 [N] or None; rows: of the output; old: float32, for "residual".
    Operands that an epilogue does not use may be anything. Returns float32, or int32 for "acc".
    """
    scaled, gated = make_scaled(inverse), make_gated(activation, inverse)
    GATED, RESIDUAL, ACC = epilogue == "gated", epilogue == "residual", epilogue == "acc"

    @device_function
    def finish(sum_, sum_up, q_sum, m, m_up, s, bias, n, rows, old):
        offset = int32(CODE_OFFSET * q_sum)
        if ACC:
            return int32(sum_ - offset)
        y = scaled(int32(sum_ - offset), m, s)
        if bias is not None:
            y = ptx.add_rn(y, bias[n])
        if GATED:
            z = scaled(int32(sum_up - offset), m_up, s)
            if bias is not None:
                z = ptx.add_rn(z, bias[rows + n])
            y = gated(y, z)
        if RESIDUAL:
            y = ptx.add_rn(old, y)
        return y

    return finish


def make_group_epilogue(epilogue: str, activation: str, inverse: bool = False) -> Callable[..., Any]:
    """The device function `finish(y, z, bias, n, rows, old)`, the result of row n and a token of a product with group
    scales; there is no "acc".

    y: float32, the sum of row n's groups; z: that of row n + rows, for "gated"; the rest as of `make_epilogue`.
    """
    gated = make_gated(activation, inverse)
    GATED, RESIDUAL = epilogue == "gated", epilogue == "residual"

    @device_function
    def finish(y, z, bias, n, rows, old):
        if bias is not None:
            y = ptx.add_rn(y, bias[n])
        if GATED:
            if bias is not None:
                z = ptx.add_rn(z, bias[rows + n])
            y = gated(y, z)
        if RESIDUAL:
            y = ptx.add_rn(old, y)
        return y

    return finish
