"""RMSNorm and quantisation of one token's activations, as `reference.model.rms_norm` and `quantize` define them.

Reductions run in 16 lanes and four sums of each, added up in a fixed order: a token's numbers depend on nothing else.
"""

import numpy as np
from numba import njit

from bitnet_numba.kernels.cpu.memory import load_f32, store_f32, store_i8, store_i32
from bitnet_numba.kernels.cpu.vec import (
    OPTIONS,
    absolute,
    add,
    div,
    fma,
    load_f32x16,
    load_i32x16,
    max_lanes,
    maximum,
    mul,
    rint,
    splat_f32x16,
    store,
    sub,
    sum_lanes,
    to_bytes,
    to_floats,
    to_ints,
    zero_f32x16,
    zero_i32x16,
)
from bitnet_numba.packing import BLOCK_COLS, CODE_OFFSET, GROUP_COLS
from bitnet_numba.quantize import EPSILON, FINER, INT8_MAX, SECOND_STEP

LANES = 16
ONE = np.float32(1)
NAN = np.float32(np.nan)


@njit(**OPTIONS)
def mean_square(x, n):
    """The mean of the squares of float32 [n] at an address."""
    a, b, c, d = zero_f32x16(), zero_f32x16(), zero_f32x16(), zero_f32x16()
    at, end = x, x + 4 * n
    while at + 16 * LANES <= end:
        u, v, w, z = load_f32x16(at, 0), load_f32x16(at, 64), load_f32x16(at, 128), load_f32x16(at, 192)
        a, b, c, d = fma(u, u, a), fma(v, v, b), fma(w, w, c), fma(z, z, d)
        at += 16 * LANES
    while at + 4 * LANES <= end:
        u = load_f32x16(at, 0)
        a = fma(u, u, a)
        at += 4 * LANES
    total = sum_lanes(add(add(a, b), add(c, d)))
    while at < end:
        total += load_f32(at, 0) * load_f32(at, 0)
        at += 4
    return total / np.float32(n)


@njit(**OPTIONS)
def rms_norm(x, weight, n, eps, out):
    """weight * (x / sqrt(mean(x^2) + eps)): float32 [n] -> float32 [n], all by address. `out` may be `x`."""
    r = ONE / np.sqrt(mean_square(x, n) + eps)
    every = splat_f32x16(r)
    whole = n // LANES * LANES
    for i in range(0, 4 * whole, 4 * LANES):
        store(out, i, mul(load_f32x16(weight, i), mul(load_f32x16(x, i), every)))
    for i in range(4 * whole, 4 * n, 4):
        store_f32(out, i, load_f32(weight, i) * (load_f32(x, i) * r))


@njit(**OPTIONS)
def quantize(x, n, q):
    """s = 127 / max(max|x|, 1e-5), q = rint(x * s): float32 [n] -> int8 [n padded to 32 with zeros], by address.

    Returns (s, sum of q). If x holds NaN or infinity, s is NaN, and so is all that is computed of q.
    """
    largest, zeros = zero_f32x16(), zero_f32x16()
    whole = n // LANES * LANES
    for i in range(0, 4 * whole, 4 * LANES):
        v = load_f32x16(x, i)
        largest = maximum(absolute(v), largest)
        zeros = fma(v, zero_f32x16(), zeros)  # NaN as soon as one is not finite
    absmax, zero = max_lanes(largest), sum_lanes(zeros)
    for i in range(4 * whole, 4 * n, 4):
        v = load_f32(x, i)
        absmax = max(absmax, abs(v))
        zero += v * np.float32(0)
    if zero != np.float32(0):
        return NAN, np.int32(0)
    s = (ONE / max(absmax, EPSILON)) * INT8_MAX  # reciprocal first, as the definition does
    every, sums = splat_f32x16(s), zero_i32x16()
    for i in range(0, whole, LANES):
        v = to_ints(rint(mul(load_f32x16(x, 4 * i), every)))
        sums = add(sums, v)
        store(q, i, to_bytes(v))
    q_sum = sum_lanes(sums)
    for i in range(whole, n):
        v = np.int32(np.rint(load_f32(x, 4 * i) * s))
        q_sum = np.int32(q_sum + v)
        store_i8(q, i, v)
    for i in range(n, -(-n // BLOCK_COLS) * BLOCK_COLS):
        store_i8(q, i, 0)
    return s, q_sum


@njit(**OPTIONS)
def quantize_groups(x, n, q, d, offsets):
    """`quantize` of each 128 columns: steps d = 1 / s, float32 [groups], and -CODE_OFFSET * the sums of q, int32."""
    for g in range(-(-n // GROUP_COLS)):
        start = g * GROUP_COLS
        s, q_sum = quantize(x + 4 * start, min(GROUP_COLS, n - start), q + start)
        store_f32(d, 4 * g, ONE / s)
        store_i32(offsets, 4 * g, -CODE_OFFSET * q_sum)


@njit(**OPTIONS)
def quantize_rest(x, s, n, q2):
    """q2 = rint((x * s - rint(x * s)) * 254), what `quantize` rounds off: float32 [n] -> int8 [n padded to 32 with
    zeros], by address. Returns the sum of q2."""
    every, finer, sums = splat_f32x16(s), splat_f32x16(FINER), zero_i32x16()
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        scaled = mul(load_f32x16(x, 4 * i), every)
        v = to_ints(rint(mul(sub(scaled, rint(scaled)), finer)))
        sums = add(sums, v)
        store(q2, i, to_bytes(v))
    q_sum = sum_lanes(sums)
    for i in range(whole, n):
        scaled = load_f32(x, 4 * i) * s
        v = np.int32(np.rint((scaled - np.rint(scaled)) * FINER))
        q_sum = np.int32(q_sum + v)
        store_i8(q2, i, v)
    for i in range(n, -(-n // BLOCK_COLS) * BLOCK_COLS):
        store_i8(q2, i, 0)
    return q_sum


@njit(**OPTIONS)
def quantize_groups_twice(x, n, q, q2, d, d2, offsets, offsets2):
    """`quantize_groups`, and the same of a second plane q2, whose steps d2 are d / 254."""
    for g in range(-(-n // GROUP_COLS)):
        start = g * GROUP_COLS
        size = min(GROUP_COLS, n - start)
        s, q_sum = quantize(x + 4 * start, size, q + start)
        rest_sum = quantize_rest(x + 4 * start, s, size, q2 + start) if s == s else np.int32(0)
        step = ONE / s
        store_f32(d, 4 * g, step)
        store_f32(d2, 4 * g, step * SECOND_STEP)
        store_i32(offsets, 4 * g, -CODE_OFFSET * q_sum)
        store_i32(offsets2, 4 * g, -CODE_OFFSET * rest_sum)


@njit(**OPTIONS)
def dequantize_rows(acc, n, m, s, bias, y):
    """y = acc * m / s + bias: int32 [n] -> float32 [n]. Both have room for whole lanes; bias is an address or 0."""
    weight_scale, scale = splat_f32x16(m), splat_f32x16(s)
    for i in range(0, 4 * n, 4 * LANES):
        store(y, i, div(mul(to_floats(load_i32x16(acc, i)), weight_scale), scale))
    if bias != 0:
        for i in range(0, 4 * n, 4):
            store_f32(y, i, load_f32(y, i) + load_f32(bias, i))
