"""Elementary functions of 16 float32 lanes: a few multiplications and additions in a fixed order, so that every CPU
gives the same bits (a C library's differ from machine to machine). Coefficients: weighted minimax fits.
"""

import numpy as np
from numba import njit

from bitnet_numba.kernels.cpu.vec import (
    OPTIONS,
    add,
    as_floats,
    as_ints,
    ashr,
    div,
    fma,
    maximum,
    minimum,
    mul,
    shl,
    splat_f32x16,
    splat_i32x16,
    sub,
    to_floats,
    zero_f32x16,
)

LOG2_E = 1 / np.log(2.0)
LN2_HIGH = float(np.float32(np.log(2.0)))  # the product with a small integer goes into an fma, which keeps all its bits
LN2_LOW = -1.904654299957768e-09  # log(2) - LN2_HIGH
ROUND = 1.5 * 2.0**23  # in x + ROUND the last bit counts ones: the sum is rounded to an integer, held in its low bits
ROUND_BITS = int(np.float32(ROUND).view(np.int32))
HIGHEST, LOWEST = 89.0, -105.0  # exp is infinite, or 0, from there on
GELU_SLOPE = float(-2 * np.sqrt(2 / np.pi))
SQRT_HALF_BITS = int(np.float32(np.sqrt(0.5)).view(np.int32))


@njit(**OPTIONS)
def exp(v):
    """e^v within 2 units in the last place, subnormal results included; exp(0) is 1, and NaN stays NaN.

    e^v = 2^n e^r with n = round(v / log 2), and e^r = 1 + r + r^2 P(r).
    """
    x = minimum(splat_f32x16(HIGHEST), maximum(splat_f32x16(LOWEST), v))  # in this order NaN passes
    rounded = fma(x, splat_f32x16(LOG2_E), splat_f32x16(ROUND))
    n = sub(rounded, splat_f32x16(ROUND))
    r = fma(n, splat_f32x16(-LN2_LOW), fma(n, splat_f32x16(-LN2_HIGH), x))
    p = fma(r, splat_f32x16(0.001381446490995586), splat_f32x16(0.008368780836462975))
    p = fma(p, r, splat_f32x16(0.04166839271783829))
    p = fma(p, r, splat_f32x16(0.1666651964187622))
    p = fma(p, r, splat_f32x16(0.4999999403953552))
    p = add(fma(p, mul(r, r), r), splat_f32x16(1.0))
    # 2^n in two factors: n may lie beyond the exponents of float32, and only the second product may be rounded.
    exponent = sub(as_ints(rounded), splat_i32x16(ROUND_BITS))
    half = ashr(exponent, 1)
    return mul(mul(p, power_of_two(half)), power_of_two(sub(exponent, half)))


@njit(**OPTIONS)
def power_of_two(n):
    """2^n for int32 lanes from -126 to 127."""
    return as_floats(shl(add(n, splat_i32x16(127)), 23))


@njit(**OPTIONS)
def log(v):
    """The natural logarithm of positive normal numbers, within 2 units in the last place.

    v = 2^n (1 + f) with 1 + f between sqrt(1/2) and sqrt(2), and log(1 + f) = f - f^2 / 2 + f^3 P(f).
    """
    n = ashr(sub(as_ints(v), splat_i32x16(SQRT_HALF_BITS)), 23)
    f = sub(as_floats(sub(as_ints(v), shl(n, 23))), splat_f32x16(1.0))
    p = fma(f, splat_f32x16(-0.07634429633617401), splat_f32x16(0.12761549651622772))
    p = fma(p, f, splat_f32x16(-0.131601944565773))
    p = fma(p, f, splat_f32x16(0.14201761782169342))
    p = fma(p, f, splat_f32x16(-0.16623356938362122))
    p = fma(p, f, splat_f32x16(0.20001226663589478))
    p = fma(p, f, splat_f32x16(-0.250008225440979))
    p = fma(p, f, splat_f32x16(0.3333333134651184))
    square = mul(f, f)
    scale = to_floats(n)
    tail = fma(scale, splat_f32x16(LN2_LOW), fma(mul(square, f), p, mul(square, splat_f32x16(-0.5))))
    return fma(scale, splat_f32x16(LN2_HIGH), add(f, tail))


@njit(**OPTIONS)
def silu(v):
    """v * sigmoid(v); NaN at -infinity, as in NumPy."""
    return div(v, add(splat_f32x16(1.0), exp(sub(zero_f32x16(), v))))


@njit(**OPTIONS)
def gelu(v):
    """v / 2 * (1 + tanh(z)) as v / (1 + e^(-2 z)), with z = sqrt(2 / pi) * (v + 0.044715 v^3)."""
    cubed = mul(mul(v, v), mul(v, splat_f32x16(0.044715)))
    return div(v, add(splat_f32x16(1.0), exp(mul(add(v, cubed), splat_f32x16(GELU_SLOPE)))))


@njit(**OPTIONS)
def relu2(v):
    """max(v, 0)^2; NaN stays NaN."""
    positive = maximum(zero_f32x16(), v)
    return mul(positive, positive)
