"""The types that keys and values can have in the cache, and the device functions that depend on them.

    float16     11 bits of mantissa; a key or value beyond 65504 is stored as NaN
    bfloat16    8 bits, float32's range
    float32     as they are; for checking: only `paged_simt` multiplies them
    float8      4 bits (e4m3) and a power of two for each token and head, of its largest number; a vector with a number
                beyond 57344 gets NaN for its power

NaN in the cache makes every output of attention that it goes into infinite or NaN (see `parts.finite_or_inf`), and from
there on all that the token computes, up to its logits: the sampler then gives NAN_TOKEN in place of a token. So a value
that does not fit is noticed without anybody looking for it.

float8, byte by byte: sign, 4 bits of exponent e, 3 of mantissa m; (1 + m / 8) 2^(e - 7), and m / 8 2^-6 where e is 0. A
vector x is scaled by the power of two s that brings its largest number between 224 and 448; then each number is rounded
to float16 and from there to 3 bits of mantissa, half to even. What is stored is s in float32, by which numbers are
multiplied when they are read: that is exact, also in float16.

Tensor cores multiply 16-bit numbers, but queries and the softmax's weights are float32: each goes in as a sum of terms
of the cache's type, each the rounded rest of those before it. Three of bfloat16 hold all 24 bits; two of float16 hold
22, of numbers under 2^-3 down to a step of 2^-25. A query beyond 65504 becomes infinite, then NaN.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import device_function, float32, int32, uint32

KVDtype = Literal["float16", "bfloat16", "float8", "float32"]
KV_BYTES: dict[KVDtype, int] = {"float16": 2, "bfloat16": 2, "float8": 1, "float32": 4}  # of a number
KV_DTYPES: tuple[KVDtype, ...] = tuple(KV_BYTES)
HALVES: tuple[KVDtype, ...] = ("float16", "bfloat16")
DEFAULT: KVDtype = "float16"
F16_LIMIT = float32(65520)  # from here on rounding to float16 gives infinity
F8_ARCH = 89  # conversions of e4m3
F8_SHIFT = 8  # a float8's bits, moved to where float16 has such, stand for 2^-8 of it
F8_LIMIT_BITS = int(np.float32(448 * 2.0**7).view(np.int32))  # a vector's largest number: float16 holds it scaled back
SIGNS = 0x80008000 - 2**32  # of two float16, as int32
NAN_BITS = 0x7FC00000
NAN = float32(np.nan)


class HalfFunctions(NamedTuple):
    """Device functions of a 16-bit type. A word holds two numbers, the first in its lower half."""

    name: Literal["bf16", "f16"]  # as instructions call it
    terms: int  # of which a float32 is a sum in the kernels of one token
    pack: Callable[..., Any]  # (x0, x1): two float32, rounded, as a word; sm_80
    low: Callable[..., Any]  # (word): its lower number as float32
    high: Callable[..., Any]
    rounded: Callable[..., Any]  # (x): float32 as the cache will have it
    join: Callable[..., Any]  # (x0, x1): two `rounded` as a word
    stored: Callable[..., Any]  # (x0, x1): two float32 as a word of the cache
    mma: Callable[..., Any]  # see `ptx.mma_bf16`
    mma_into: Callable[..., Any]  # (acc_r, n, a0 .. a3, b0, b1): acc_r[n .. n + 3] += A . B


@device_function
def _fitting_f16(x):
    """NaN for what float16 cannot hold."""
    return x if abs(x) < F16_LIMIT else NAN


@device_function
def _rounded_f16(x):
    return ptx.f16_low(ptx.join_f16(_fitting_f16(x), float32(0)))


@device_function
def _stored_f16(x0, x1):
    return ptx.join_f16(_fitting_f16(x0), _fitting_f16(x1))


@device_function
def _stored_bf16(x0, x1):
    return ptx.join_bf16(ptx.to_bf16(x0), ptx.to_bf16(x1))


def _mma_into(mma: Callable[..., Any]) -> Callable[..., Any]:
    @device_function
    def mma_into(acc_r, n, a0, a1, a2, a3, b0, b1):
        acc_r[n], acc_r[n + 1], acc_r[n + 2], acc_r[n + 3] = mma(
            a0, a1, a2, a3, b0, b1, acc_r[n], acc_r[n + 1], acc_r[n + 2], acc_r[n + 3]
        )

    return mma_into


@cache
def half_functions(dtype: KVDtype) -> HalfFunctions:
    """Those of a type of two bytes."""
    if dtype not in HALVES:
        raise ValueError(f"{dtype} has no two bytes")
    if dtype == "float16":
        return HalfFunctions(
            "f16", 2, ptx.pack_f16x2, ptx.f16_low, ptx.f16_high, _rounded_f16, ptx.join_f16, _stored_f16,
            ptx.mma_f16, _mma_into(ptx.mma_f16),
        )  # fmt: skip
    return HalfFunctions(
        "bf16", 3, ptx.pack_bf16x2, ptx.bf16_low, ptx.bf16_high, ptx.to_bf16, ptx.join_bf16, _stored_bf16,
        ptx.mma_bf16, _mma_into(ptx.mma_bf16),
    )  # fmt: skip


@device_function
def _stored_f32(x0, _):
    return int32(ptx.float_to_bits(x0))


def stored_function(dtype: KVDtype) -> Callable[..., Any]:
    """The device function `stored(x0, x1)`: a word of the cache, of two numbers, or of one float32."""
    return _stored_f32 if dtype == "float32" else half_functions(dtype).stored


# ---- float8 ----------------------------------------------------------------------------------------------------------


@device_function
def magnitude_bits(x):
    """|x| as an integer that orders as |x| does, NaN above all."""
    return int32(ptx.float_to_bits(x) & uint32(0x7FFFFFFF))


@device_function
def float8_scale(largest):
    """The power of two of a vector whose largest number has these `magnitude_bits`: float32, or NaN."""
    power = int32((largest >> 23) - F8_SHIFT)  # 1.75 * 2^8 is the largest float8
    if (largest & 0x7FFFFF) > 0x600000:
        power = int32(power + 1)
    bits = int32(max(power, int32(27)) << 23)
    return ptx.bits_to_float(uint32(bits if largest <= F8_LIMIT_BITS else int32(NAN_BITS)))


@device_function
def float8_inverse(scale):
    """1 / scale, times what `to_float8` takes: a power of two."""
    return ptx.bits_to_float(uint32(int32((254 - F8_SHIFT) << 23) - int32(ptx.float_to_bits(scale))))


@device_function
def to_float8(x):
    """The byte of 2^8 x, |x| at most 1.75."""
    half = ptx.join_f16(x, float32(0)) & 0xFFFF
    magnitude = half & 0x7FFF
    return int32((half >> 8 & 0x80) | (magnitude + 0x3F + (magnitude >> 7 & 1)) >> 7)


@device_function
def float8_word(x0, x1, x2, x3, inverse):
    """Four neighbouring numbers as a word. inverse: see `float8_inverse`."""
    low = to_float8(x0 * inverse) | to_float8(x1 * inverse) << 8
    return int32(low | to_float8(x2 * inverse) << 16 | to_float8(x3 * inverse) << 24)


@device_function
def float8_low(word):
    """The lower two numbers of a word as a word of float16, each times 2^-8."""
    spread = int32(ptx.byte_permute(uint32(word), uint32(0), uint32(0x1404)))
    return int32((spread >> 1 & 0x3F803F80) | (spread & SIGNS))


@device_function
def float8_high(word):
    """The upper two."""
    spread = int32(ptx.byte_permute(uint32(word), uint32(0), uint32(0x3424)))
    return int32((spread >> 1 & 0x3F803F80) | (spread & SIGNS))


def float8_pairs(arch: int) -> tuple[Callable[..., Any], Callable[..., Any], float]:
    """(low, high, factor): device functions of a word of float8, each two numbers as a word of float16, which times
    `factor` are the float8's."""
    if arch >= F8_ARCH:
        return ptx.e4m3_low, ptx.e4m3_high, 1.0
    return float8_low, float8_high, float(1 << F8_SHIFT)


# ---- Lanes that hold eight numbers of a token, in float32 multiply-adds ----------------------------------------------


class LaneFunctions(NamedTuple):
    """Device functions for a lane's eight neighbouring numbers of a token."""

    words: int  # that hold them
    load: Callable[..., Any]  # (r, n, source, i): r[n ..] = source[i ..]
    number: Callable[..., Any]  # (r, n, d): number d of those in r[n ..], float32, but for a float8's scale


@device_function
def _load2(r, n, source, i):
    r[n], r[n + 1] = source[i], source[i + 1]


@device_function
def _load4(r, n, source, i):
    r[n], r[n + 1], r[n + 2], r[n + 3] = ptx.load4(source, i)


@device_function
def _load8(r, n, source, i):
    r[n], r[n + 1], r[n + 2], r[n + 3] = ptx.load4(source, i)
    r[n + 4], r[n + 5], r[n + 6], r[n + 7] = ptx.load4(source, i + 4)


@device_function
def _float8_number(r, n, d):
    pair = float8_high(r[n + (d >> 2)]) if d & 2 else float8_low(r[n + (d >> 2)])
    return ptx.mul_rn(ptx.f16_high(pair) if d & 1 else ptx.f16_low(pair), float32(1 << F8_SHIFT))


@device_function
def _float32_number(r, n, d):
    return ptx.bits_to_float(uint32(r[n + d]))


def _half_number(half: HalfFunctions) -> Callable[..., Any]:
    low, high = half.low, half.high

    @device_function
    def number(r, n, d):
        return high(r[n + (d >> 1)]) if d & 1 else low(r[n + (d >> 1)])

    return number


@cache
def lane_functions(dtype: KVDtype) -> LaneFunctions:
    """Those of a type."""
    if dtype == "float8":
        return LaneFunctions(2, _load2, _float8_number)
    if dtype == "float32":
        return LaneFunctions(8, _load8, _float32_number)
    return LaneFunctions(4, _load4, _half_number(half_functions(dtype)))
