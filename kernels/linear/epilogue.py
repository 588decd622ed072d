"""What the GEMMs do with a finished int32 sum: one definition for all their kernels.

The float operations and their order are those of gemv.py, so that results are equal to the bit.

A float32 division is a subroutine for the assembler, and around its call it does not let `wgmma` run ahead. So
gemm_wgmma.py multiplies with reciprocals in float64. That gives the same float32: with a, s and a float32's
midpoint m (25 bits), a and m s are different integers of at most 49 bits, but for a power of two, so a / s is further
than 2^-50 of m from m; reciprocal and product are off by less than 2^-51 together. Only quotients below 2^-126, which
have fewer bits, may differ in the last.
"""

import math
from collections.abc import Callable
from typing import Any

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import device_function, float32, float64, int32
from bitnet_numba.packing import CODE_OFFSET

LARGEST = float32(3.4028234663852886e38)
EPILOGUES = ("acc", "store", "residual", "gated")


@device_function
def reciprocal(x):
    """1 / x as float64, off by less than 2^-51.5 of it, for positive float32 from 2^-126 on; of infinity 0,
    of 0 NaN (a token's scale is 0 only if the token holds an infinity)."""
    if x > LARGEST:
        return float64(0)
    wide, r = float64(x), float64(ptx.rcp_approx(x))
    r = r * (float64(2) - wide * r)
    return r * (float64(2) - wide * r)


@device_function
def times(x, inverse):
    """x / y, rounded once, from y's reciprocal."""
    return float32(float64(x) * inverse)


@device_function
def _over(x, y):
    return times(x, reciprocal(y))


def make_epilogue(epilogue: str, activation: str, inverse: bool = False) -> Callable[..., Any]:
    """`finish(sum, sum_up, q_sum, m, m_up, s, bias, n, rows, old)`: what is written for row n of one token.

    sum: of codes times activations, int32; sum_up: that of row n + rows, for "gated"; q_sum: the activations' sum; s:
    the token's scale, or with `inverse` its reciprocal, float64; old: what the output held, for "residual". "acc": the
    int32 sum of weights times activations.
    """
    by_s, over = (times, _over) if inverse else (ptx.div_rn, ptx.div_rn)
    GATED, RESIDUAL, ACC, RELU2 = epilogue == "gated", epilogue == "residual", epilogue == "acc", activation == "relu2"
    ZERO, ONE = float32(0), float32(1)

    @device_function
    def finish(sum_, sum_up, q_sum, m, m_up, s, bias, n, rows, old):
        offset = int32(CODE_OFFSET * q_sum)
        if ACC:
            return int32(sum_ - offset)
        y = by_s(ptx.mul_rn(ptx.int_to_float(int32(sum_ - offset)), m), s)
        if bias is not None:
            y = ptx.add_rn(y, bias[n])
        if GATED:
            z = by_s(ptx.mul_rn(ptx.int_to_float(int32(sum_up - offset)), m_up), s)
            if bias is not None:
                z = ptx.add_rn(z, bias[rows + n])
            if RELU2:
                y = max(y, ZERO)
                y = ptx.mul_rn(ptx.mul_rn(y, y), z)
            else:
                y = ptx.mul_rn(over(y, ptx.add_rn(ONE, math.exp(-y))), z)
        if RESIDUAL:
            y = ptx.add_rn(old, y)
        return y

    return finish
