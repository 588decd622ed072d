"""Arithmetic and conversions on registers: integer dot products, bfloat16, exactly rounded and approximate float32."""

from typing import Any

import numpy as np

from bitnet_numba.kernels.ptx.base import device_function, instruction, int32, uint32

# ---- Dot products of bytes -----------------------------------------------------------------------------------------


def _bytes(word: Any, signed: bool) -> list[int]:
    data = (int(word) & 0xFFFFFFFF).to_bytes(4, "little")
    return list(memoryview(data).cast("b")) if signed else list(data)


@instruction("dp4a.s32.s32 $0, $1, $2, $3;", "r", "rrr")
def dp4a(a: Any, b: Any, c: Any) -> Any:
    """c + the dot product of four int8 pairs, int32. sm_61."""
    return int32(int(c) + sum(x * y for x, y in zip(_bytes(a, True), _bytes(b, True), strict=True)))


@instruction("dp4a.u32.s32 $0, $1, $2, $3;", "r", "rrr")
def dp4a_us(a: Any, b: Any, c: Any) -> Any:
    """c + the dot product of four uint8 (a) and int8 (b) pairs, int32. sm_61."""
    return int32(int(c) + sum(x * y for x, y in zip(_bytes(a, False), _bytes(b, True), strict=True)))


# ---- Conversions ----------------------------------------------------------------------------------------------------


@instruction("cvt.rni.s32.f32 $0, $1;", "r", "f")
def round_to_int(x: Any) -> Any:
    """The nearest int32, half to even; saturates, NaN gives 0. Any architecture."""
    return np.int32(0) if x != x else np.int32(min(max(np.rint(np.float64(x)), -(2**31)), 2**31 - 1))


@instruction("cvt.rn.f32.s32 $0, $1;", "f", "r")
def int_to_float(x: Any) -> Any:
    """An int32 as the nearest float32. Any architecture."""
    return np.float32(np.int32(x))


@instruction(
    "{ .reg .b32 x, low, high; mov.b32 x, $1; shl.b32 low, x, 29; shr.u32 high, x, 3; "
    "add.u32 high, high, 0x38000000; mov.b64 $0, {low, high}; }",
    "d",
    "f",
)  # fmt: skip
def widen_positive(x: Any) -> Any:
    """A float32 from 2^-126 on as float64, by integer instructions, of which an SM does four times as many as of
    conversions. What is less, 0 too, becomes 2^-127 to 2^-126; infinity and NaN become a number from 2^128 on. Any
    architecture."""
    bits = int(np.float32(x).view(np.uint32))
    return np.uint64((bits << 29) + (0x380 << 52)).view(np.float64)


@instruction("mov.b32 $0, $1;", "f", "u")
def bits_to_float(word: Any) -> Any:
    """The float32 that a 32-bit pattern stands for. Any architecture."""
    return np.uint32(int(word) & 0xFFFFFFFF).view(np.float32)


@instruction("mov.b32 $0, $1;", "u", "f")
def float_to_bits(x: Any) -> Any:
    """A float32's bit pattern, uint32. Any architecture."""
    return np.float32(x).view(np.uint32)


@instruction("prmt.b32 $0, $1, $2, $3;", "u", "uuu")
def byte_permute(a: Any, b: Any, selector: Any) -> Any:
    """The word whose byte k is byte (selector >> 4k) & 7 of the eight in a (0-3) and b (4-7). Any architecture."""
    source = _bytes(a, False) + _bytes(b, False)
    selector = int(selector)
    return np.uint32(int.from_bytes([source[selector >> 4 * k & 7] for k in range(4)], "little"))


# ---- float16; of a word's two, the first in memory is in the lower half ---------------------------------------------


@instruction("{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, low; }", "f", "r")
def f16_low(word: Any) -> Any:
    """The float16 in a word's lower half, as float32. Any architecture."""
    return np.float32(np.uint16(int(word) & 0xFFFF).view(np.float16))


@instruction("{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, high; }", "f", "r")
def f16_high(word: Any) -> Any:
    """The float16 in a word's upper half, as float32. Any architecture."""
    return np.float32(np.uint16(int(word) >> 16 & 0xFFFF).view(np.float16))


def _f16_word(low: Any, high: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.array([low, high], np.float32).astype(np.float16).view(np.int32)[0]


@instruction("cvt.rn.f16x2.f32 $0, $2, $1;", "r", "ff")
def pack_f16x2(low: Any, high: Any) -> Any:
    """Two float32 rounded to the nearest float16, ties to even, as a word; infinity beyond its range. sm_80."""
    return _f16_word(low, high)


@instruction(
    "{ .reg .b16 low, high; cvt.rn.f16.f32 low, $1; cvt.rn.f16.f32 high, $2; mov.b32 $0, {low, high}; }", "r", "ff"
)
def join_f16(low: Any, high: Any) -> Any:
    """As `pack_f16x2`, of two instructions. Any architecture."""
    return _f16_word(low, high)


def _two_e4m3(half: int) -> Any:
    bits = np.array([half & 0xFF, half >> 8], np.uint16)
    halves = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).view(np.float16) * np.float16(256)
    return np.where(bits & 0x7F == 0x7F, np.float16(np.nan), halves).view(np.int32)[0]


@instruction("{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.rn.f16x2.e4m3x2 $0, low; }", "r", "r")
def e4m3_low(word: Any) -> Any:
    """The two e4m3 numbers in a word's lower half as a word of float16, exactly. sm_89."""
    return _two_e4m3(int(word) & 0xFFFF)


@instruction("{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.rn.f16x2.e4m3x2 $0, high; }", "r", "r")
def e4m3_high(word: Any) -> Any:
    """Those in its upper half. sm_89."""
    return _two_e4m3(int(word) >> 16 & 0xFFFF)


# ---- bfloat16; of a word's two, the first in memory is in the lower half --------------------------------------------


@instruction("shl.b32 $0, $1, 16;", "f", "r")
def bf16_low(word: Any) -> Any:
    """The bfloat16 in a word's lower half, as float32. Any architecture."""
    return bits_to_float(int(word) << 16)


@instruction("and.b32 $0, $1, 0xffff0000;", "f", "r")
def bf16_high(word: Any) -> Any:
    """The bfloat16 in a word's upper half, as float32. Any architecture."""
    return bits_to_float(int(word) & 0xFFFF0000)


@device_function
def split_bf16x2(x: Any, y: Any) -> Any:
    """Two float32 as sums of two bfloat16 terms, a word each: the values rounded, and what that left out, rounded.
    Relative error of a sum: at most 2^-17. sm_80."""
    high = pack_bf16x2(x, y)
    return high, pack_bf16x2(add_rn(x, -bf16_low(high)), add_rn(y, -bf16_high(high)))


@device_function
def to_bf16(x: Any) -> Any:
    """float32 rounded to the nearest bfloat16, ties to even, as a float32; NaN stays NaN. Any architecture."""
    bits = float_to_bits(x)
    rounded = uint32(uint32(bits + uint32(0x7FFF) + (uint32(bits >> uint32(16)) & uint32(1))) & uint32(0xFFFF0000))
    return bits_to_float(rounded) if x == x else x


@device_function
def join_bf16(low: Any, high: Any) -> Any:
    """Two float32 whose values bfloat16 holds exactly, as a word; others are truncated. Any architecture."""
    return int32(byte_permute(float_to_bits(low), float_to_bits(high), 0x7632))


@instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "r", "ff")
def pack_bf16x2(low: Any, high: Any) -> Any:
    """Two float32 rounded to the nearest bfloat16, ties to even, as a word. sm_80."""

    def rounded(x: Any) -> int:
        bits = int(float_to_bits(x))
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if x == x else 0x7FFF

    return int32(rounded(high) << 16 | rounded(low))


@instruction("fma.rn.bf16x2 $0, $1, $2, $3;", "r", "rrr")
def fma_bf16x2(a: Any, b: Any, c: Any) -> Any:
    """a * b + c of the two bfloat16 in each word, rounded once. sm_80."""
    low = bf16_low(a) * np.float64(bf16_low(b)) + bf16_low(c)
    high = bf16_high(a) * np.float64(bf16_high(b)) + bf16_high(c)
    return pack_bf16x2(np.float32(low), np.float32(high))


# ---- Approximate float32; the bounds are the PTX manual's ----------------------------------------------------------


@instruction("ex2.approx.ftz.f32 $0, $1;", "f", "f")
def exp2_approx(x: Any) -> Any:
    """2^x within 2 ulp (relative error 2^-22), results under 2^-126 flushed to 0. Any architecture."""
    y = np.exp2(np.float32(x))
    return np.float32(0) if y < np.finfo(np.float32).tiny else y


@instruction("rcp.approx.f32 $0, $1;", "f", "f")
def rcp_approx(x: Any) -> Any:
    """1 / x, to within 1 ulp. Any architecture."""
    return np.float32(1) / np.float32(x)


@instruction("rsqrt.approx.f32 $0, $1;", "f", "f")
def rsqrt_approx(x: Any) -> Any:
    """1 / sqrt(x), relative error at most 2^-22.9. Any architecture."""
    return np.float32(1) / np.sqrt(np.float32(x))


# ---- Exactly rounded float32, as NumPy's: the compiler would fuse a * b + c ------------------------------------------


@instruction("mul.rn.f32 $0, $1, $2;", "f", "ff")
def mul_rn(a: Any, b: Any) -> Any:
    """a * b rounded to float32, never fused into a multiply-add. Any architecture."""
    return np.float32(a) * np.float32(b)


@instruction("fma.rn.f32 $0, $1, $2, $3;", "f", "fff")
def fma_rn(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once to float32. Any architecture."""
    product, c = np.float64(a) * np.float64(b), np.float64(c)  # exactly
    total = product + c
    if np.isfinite(total):
        moved = total - product
        left = (product - (total - moved)) + (c - moved)  # what rounding to float64 has left out
        if left and not total.view(np.uint64) & np.uint64(1):  # rounded to odd, so that the next rounding is right
            total = np.nextafter(total, np.copysign(np.inf, left))
    return np.float32(total)


@instruction("{ .reg .f32 x; max.f32 x, $1, $2; min.f32 $0, x, $3; }", "f", "fff")
def clamp(x: Any, least: Any, most: Any) -> Any:
    """x, but at least `least` and at most `most`, float32; NaN becomes `least`. Any architecture."""
    return np.fmin(np.fmax(np.float32(x), np.float32(least)), np.float32(most))


@instruction("add.rn.f32 $0, $1, $2;", "f", "ff")
def add_rn(a: Any, b: Any) -> Any:
    """a + b rounded to float32, never fused into a multiply-add. Any architecture."""
    return np.float32(a) + np.float32(b)


@instruction("div.rn.f32 $0, $1, $2;", "f", "ff")
def div_rn(a: Any, b: Any) -> Any:
    """a / b, correctly rounded. Any architecture."""
    return np.float32(a) / np.float32(b)


@instruction("rcp.rn.f32 $0, $1;", "f", "f")
def rcp_rn(x: Any) -> Any:
    """1 / x, correctly rounded. Any architecture."""
    return np.float32(1) / np.float32(x)


@instruction("sqrt.rn.f32 $0, $1;", "f", "f")
def sqrt_rn(x: Any) -> Any:
    """The square root, correctly rounded. Any architecture."""
    return np.sqrt(np.float32(x))


# ---- Integers ------------------------------------------------------------------------------------------------------


@instruction("mul.hi.u32 $0, $1, $2;", "u", "uu")
def mul_hi(a: Any, b: Any) -> Any:
    """The upper 32 bits of the product of two uint32. Any architecture."""
    return uint32(int(a) * int(b) >> 32)


@instruction("mul.lo.u32 $0, $1, $2;", "u", "uu")
def mul_lo(a: Any, b: Any) -> Any:
    """The lower 32 bits of the product of two uint32. Any architecture."""
    return uint32(int(a) * int(b))


@instruction("div.u32 $0, $1, $2;", "r", "rr")
def udiv(a: Any, b: Any) -> Any:
    """a // b, int32, for a >= 0 and b > 0. Numba's own `//` divides 64 bits: ten times the instructions. Any
    architecture."""
    return int32(int(a) // int(b))
