"""Gumbel noise of 16 lanes, a function of (seed, position, token id), as `bitnet_numba.sampling` defines it."""

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from bitnet_numba.kernels.cpu import math, vec
from bitnet_numba.sampling import PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL

LARGEST_NOISE = 17.0  # more than -log(-log(1 - 2^-24)) = 16.64
MULTIPLIER_0, MULTIPLIER_1 = PHILOX_MULTIPLIERS
WEYL_0, WEYL_1 = PHILOX_WEYL


@intrinsic(prefer_literal=True)
def multiply_wide(typingctx, v, literal):
    """Unsigned lanes times a literal: the upper and the lower 32 bits of the products."""
    if not isinstance(literal, types.IntegerLiteral):
        return None
    factor = literal.literal_value

    def codegen(context, builder, sig, args):
        wide, narrow = ir.VectorType(ir.IntType(64), 16), vec.vector(16, "i32")
        factors, halves = (wide([ir.IntType(64)(x)] * 16) for x in (factor, 32))
        product = builder.mul(builder.zext(args[0], wide), factors)
        high, low = builder.trunc(builder.lshr(product, halves), narrow), builder.trunc(product, narrow)
        return context.make_tuple(builder, sig.return_type, [high, low])

    return types.UniTuple(v, 2)(v, literal), codegen


@intrinsic
def exclusive_or(typingctx, a, b):
    """a ^ b of integer lanes."""

    def codegen(context, builder, sig, args):
        return builder.xor(args[0], args[1])

    return a(a, b), codegen


@njit(**vec.OPTIONS)
def random_words(c0, position, key0, key1):
    """Philox4x32-10 of 16 counters (c0, position, 0, 0): four words each."""
    c1, c2, c3 = vec.splat_i32x16(position), vec.zero_i32x16(), vec.zero_i32x16()
    k0, k1 = vec.splat_i32x16(key0), vec.splat_i32x16(key1)
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = multiply_wide(c0, MULTIPLIER_0)
        high1, low1 = multiply_wide(c2, MULTIPLIER_1)
        c0, c2 = exclusive_or(exclusive_or(high1, c1), k0), exclusive_or(exclusive_or(high0, c3), k1)
        c1, c3 = low1, low0
        k0, k1 = vec.add(k0, vec.splat_i32x16(WEYL_0)), vec.add(k1, vec.splat_i32x16(WEYL_1))
    return c0, c1, c2, c3


@njit(**vec.OPTIONS)
def gumbel(words):
    """-log(-log(u)) with u of 23 random bits, as in `sampling.gumbel_noise`."""
    half = vec.splat_f32x16(0.5)
    u = vec.mul(vec.add(vec.to_floats(vec.lshr(words, 9)), half), vec.splat_f32x16(2.0**-23))
    inner = vec.sub(vec.zero_f32x16(), math.log(u))
    return vec.sub(vec.zero_f32x16(), math.log(inner))
