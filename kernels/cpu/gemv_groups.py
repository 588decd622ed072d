"""Matrix-vector product of packed words with group scales: y[n] = sum over groups g of acc[n, g] * (m[n, g] * d[g]).

acc[n, g] is the exact sum of q[k] * w[n, k] over the 128 columns of group g; m are the weights' float16 scales and d
the steps of the activations. Products and sums are float32, from the first group on, so that all kernels and the
reference agree to the bit. The words are read as in `gemv`: once, in storage order, 16 rows at a time.

A group takes 32 dot products of 16 rows with 16 lanes, and what is done once for it takes about 16 instructions more:
the four sums of fields joined, offset, conversion, scales, a product and a sum.
"""

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic, overload

from bitnet_numba.kernels.cpu import vec
from bitnet_numba.kernels.cpu.dot import dot4, widen16
from bitnet_numba.kernels.cpu.gemv import (
    AHEAD,
    BLOCK_BYTES,
    FIELD0,
    FIELD1,
    FIELD2,
    FIELD3,
    dot_tokens,
    one_sum,
    sixteen_columns,
    zero_tokens,
)
from bitnet_numba.kernels.cpu.memory import load_at, prefetch
from bitnet_numba.kernels.cpu.vec import (
    OPTIONS,
    add,
    and_,
    ashr,
    broadcast_f32x16,
    broadcast_i32x4,
    broadcast_i32x8,
    broadcast_i32x16,
    join,
    load_f16x16,
    load_i32x4,
    load_i32x8,
    lshr,
    mul,
    store,
    to_floats,
    zero_f32x16,
    zero_i32x4,
    zero_i32x8,
    zero_i32x16,
)
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, GROUP_COLS

SCALE_BYTES = 2 * BLOCK_ROWS  # of a row-block and group
GROUP_BYTES = GROUP_COLS // BLOCK_COLS * BLOCK_BYTES  # of the words of a row-block and group
LINES = (0,) * (GROUP_BYTES // 64)  # as in `gemv`, but of a group


# Up to so many tokens `gemv_groups_tokens` is as fast as the GEMM or faster.
FEW = {"vnni512": 64, "vnni256": 24, "avx2": 4, "i8mm": 4, "dotprod": 4, "portable": 64}


@njit(**OPTIONS)
def gemv_groups(isa, words, scales, K, q, d, offsets, y, first, last):
    """Row-blocks first .. last - 1 of a packed matrix with group scales times one token's activations.

    isa: InstructionSet. words: address of int32 words. scales: address of the float16 scales in storage order. K:
    columns, a multiple of 32. q: address of int8 [K], 0 in padded columns. d, offsets: addresses of the groups' steps,
    float32 [groups], and of -CODE_OFFSET * their sums, int32 [groups]. y: address of float32 [16 * (last - first)],
    written.
    """
    groups, whole = (K + GROUP_COLS - 1) // GROUP_COLS, K // GROUP_COLS
    p, m = words + first * (K // BLOCK_COLS) * BLOCK_BYTES, scales + first * groups * SCALE_BYTES
    for _row_block in range(first, last):
        total = zero_f32x16()
        for g in range(whole):
            prefetch(p + AHEAD, LINES)
            total = scaled(total, group_sums(isa, p, q + g * GROUP_COLS, GROUP_COLS), m, d, offsets, g)
            p += GROUP_BYTES
            m += SCALE_BYTES
        if whole < groups:
            total = scaled(total, group_sums(isa, p, q + whole * GROUP_COLS, K % GROUP_COLS), m, d, offsets, whole)
            p += K % GROUP_COLS // BLOCK_COLS * BLOCK_BYTES
            m += SCALE_BYTES
        store(y, 0, total)
        y += 4 * BLOCK_ROWS


@njit(**OPTIONS)
def scaled(total, sums, m, d, offsets, g):
    """total + (sums + offset) * (m * d) of group g."""
    acc = add(sums, broadcast_i32x16(offsets, 4 * g))
    return add(total, mul(to_floats(acc), mul(load_f16x16(m, 0), broadcast_f32x16(d, 4 * g))))


def group_sums(isa, p, q, columns):
    """The sums of codes times activations over up to 128 columns, a multiple of 32, of 16 rows: words at address p."""
    raise NotImplementedError("only compiled functions can call this")


@overload(group_sums)
def _group_sums(isa, p, q, columns):
    kernel = {
        "vnni512": sums_16_lanes,
        "vnni256": sums_8_lanes,
        "avx2": sums_avx2,
        "i8mm": sums_4_lanes,
        "dotprod": sums_4_lanes,
        "portable": sums_16_lanes,
    }[isa.isa]
    return lambda isa, p, q, columns: kernel(isa, p, q, columns)


@njit(**OPTIONS)
def sums_16_lanes(isa, p, q, columns):
    """All 16 rows in one register (zmm)."""
    a0, a1, a2, a3 = zero_i32x16(), zero_i32x16(), zero_i32x16(), zero_i32x16()
    for k in range(q, q + columns, BLOCK_COLS):
        for half in range(2):
            w = join(load_i32x8(p, 32 * half), load_i32x8(p, 64 + 32 * half))
            x = k + 16 * half
            a0 = dot4(isa, a0, and_(w, FIELD0), broadcast_i32x16(x, 0))
            a1 = dot4(isa, a1, and_(w, FIELD1), broadcast_i32x16(x, 4))
            a2 = dot4(isa, a2, and_(w, FIELD2), broadcast_i32x16(x, 8))
            a3 = dot4(isa, a3, and_(w, FIELD3), broadcast_i32x16(x, 12))
        p += BLOCK_BYTES
    return one_sum(a0, a1, a2, a3)


@njit(**OPTIONS)
def sums_8_lanes(isa, p, q, columns):
    """Rows 0-7 and 8-15 in a register each (ymm)."""
    a0, a1, a2, a3 = zero_i32x8(), zero_i32x8(), zero_i32x8(), zero_i32x8()  # rows 0-7
    b0, b1, b2, b3 = zero_i32x8(), zero_i32x8(), zero_i32x8(), zero_i32x8()  # rows 8-15
    for k in range(q, q + columns, BLOCK_COLS):
        for half in range(2):
            w, v, x = load_i32x8(p, 32 * half), load_i32x8(p, 64 + 32 * half), k + 16 * half
            q0, q1 = broadcast_i32x8(x, 0), broadcast_i32x8(x, 4)
            a0, b0 = dot4(isa, a0, and_(w, FIELD0), q0), dot4(isa, b0, and_(v, FIELD0), q0)
            a1, b1 = dot4(isa, a1, and_(w, FIELD1), q1), dot4(isa, b1, and_(v, FIELD1), q1)
            q2, q3 = broadcast_i32x8(x, 8), broadcast_i32x8(x, 12)
            a2, b2 = dot4(isa, a2, and_(w, FIELD2), q2), dot4(isa, b2, and_(v, FIELD2), q2)
            a3, b3 = dot4(isa, a3, and_(w, FIELD3), q3), dot4(isa, b3, and_(v, FIELD3), q3)
        p += BLOCK_BYTES
    return join(one_sum(a0, a1, a2, a3), one_sum(b0, b1, b2, b3))


@njit(**OPTIONS)
def four_rows(isa, p, q, columns):
    """Four rows in a register (NEON), with the last field shifted down as in `gemv`."""
    a0, a1, a2, a3 = zero_i32x4(), zero_i32x4(), zero_i32x4(), zero_i32x4()
    for k in range(q, q + columns, BLOCK_COLS):
        for half in range(2):
            w, x = load_i32x4(p, 32 * half), k + 16 * half
            a0 = dot4(isa, a0, and_(w, FIELD0), broadcast_i32x4(x, 0))
            a1 = dot4(isa, a1, and_(w, FIELD1), broadcast_i32x4(x, 4))
            a2 = dot4(isa, a2, and_(w, FIELD2), broadcast_i32x4(x, 8))
            a3 = dot4(isa, a3, and_(lshr(w, 2), FIELD2), broadcast_i32x4(x, 12))
        p += BLOCK_BYTES
    return add(add(a0, ashr(a1, 2)), ashr(add(a2, a3), 4))


@njit(**OPTIONS)
def sums_4_lanes(isa, p, q, columns):
    """Rows 0-3, 4-7, then 8-11 and 12-15, 64 bytes on."""
    low = join(four_rows(isa, p, q, columns), four_rows(isa, p + 16, q, columns))
    return join(low, join(four_rows(isa, p + 64, q, columns), four_rows(isa, p + 80, q, columns)))


@njit(**OPTIONS)
def sums_avx2(isa, p, q, columns):
    """Sums of 16 bits, widened every 64 columns, as in `gemv`."""
    a, a4, b, b4 = zero_i32x8(), zero_i32x8(), zero_i32x8(), zero_i32x8()
    for start in range(0, columns, 2 * BLOCK_COLS):
        low, high, low2, high2 = zero_i32x8(), zero_i32x8(), zero_i32x8(), zero_i32x8()
        for k in range(q + start, q + min(start + 2 * BLOCK_COLS, columns), BLOCK_COLS):
            low, high = sixteen_columns(low, high, load_i32x8(p, 0), k, 0)
            low2, high2 = sixteen_columns(low2, high2, load_i32x8(p, 64), k, 0)
            low, high = sixteen_columns(low, high, load_i32x8(p, 32), k, 16)
            low2, high2 = sixteen_columns(low2, high2, load_i32x8(p, 96), k, 16)
            p += BLOCK_BYTES
        a, a4 = widen16(a, low), widen16(a4, high)
        b, b4 = widen16(b, low2), widen16(b4, high2)
    return join(add(a, ashr(a4, 2)), add(b, ashr(b4, 2)))


# ---- A few tokens ---------------------------------------------------------------------------------------------------


@intrinsic
def add_group(typingctx, totals, sums, m, d, offsets, stride):
    """totals[t] + (sums[t] + offset) * (m * d) of a group; d and offset of token t lie t * stride bytes on."""

    def codegen(context, builder, sig, args):
        out, sums, m, d, offsets, stride = args
        for t in range(totals.count):
            offset = vec.splat_of(builder, load_at(builder, offsets, 0, vec.I32), m.type.count)
            acc = builder.sitofp(builder.add(builder.extract_value(sums, t), offset), m.type)
            step = vec.splat_of(builder, load_at(builder, d, 0, m.type.element), m.type.count)
            value = builder.fmul(acc, builder.fmul(m, step))
            out = builder.insert_value(out, builder.fadd(builder.extract_value(out, t), value), t)
            d, offsets = builder.add(d, stride), builder.add(offsets, stride)
        return out

    return totals(totals, sums, m, types.intp, types.intp, types.intp), codegen


@intrinsic
def as_float_zeros(typingctx, zero):
    """As many zeros of float32 lanes."""
    floats = types.UniTuple(vec.Vec(16, "f32"), zero.count)

    def codegen(context, builder, sig, args):
        return ir.Constant(context.get_value_type(floats), None)

    return floats(zero), codegen


@njit(**OPTIONS)
def tile(isa, zero, words, scales, K, q, q_stride, d, offsets, stride, y, y_stride, first, last):
    """All row-blocks times as many tokens as `zero` has sums, which share a reading of the weights."""
    groups = (K + GROUP_COLS - 1) // GROUP_COLS
    p, m = words + first * (K // BLOCK_COLS) * BLOCK_BYTES, scales + first * groups * SCALE_BYTES
    for _row_block in range(first, last):
        totals = as_float_zeros(zero)
        for g in range(groups):
            sums = zero
            for k in range(q + g * GROUP_COLS, q + min((g + 1) * GROUP_COLS, K), BLOCK_COLS):
                for half in range(2):
                    w = join(load_i32x8(p, 32 * half), load_i32x8(p, 64 + 32 * half))
                    at = k + 16 * half
                    sums = dot_tokens(isa, sums, and_(w, FIELD0), at, q_stride)
                    sums = dot_tokens(isa, sums, and_(lshr(w, 2), FIELD0), at + 4, q_stride)
                    sums = dot_tokens(isa, sums, and_(lshr(w, 4), FIELD0), at + 8, q_stride)
                    sums = dot_tokens(isa, sums, and_(lshr(w, 6), FIELD0), at + 12, q_stride)
                p += BLOCK_BYTES
            totals = add_group(totals, sums, load_f16x16(m, 0), d + 4 * g, offsets + 4 * g, 4 * stride)
            m += SCALE_BYTES
        for t in range(len(totals)):
            store(y, 4 * t * y_stride, totals[t])
        y += 4 * BLOCK_ROWS


def gemv_groups_tokens(isa, words, scales, K, q, q_stride, d, offsets, stride, M, y, y_stride, first, last):
    """As `gemv_groups`, for M tokens; fast for a few, see FEW.

    q: address of int8 [M, q_stride]. d, offsets: addresses of [M, stride]. y: address of float32 [M, y_stride].
    """
    raise NotImplementedError("only compiled functions can call this")


@overload(gemv_groups_tokens)
def _gemv_groups_tokens(isa, words, scales, K, q, q_stride, d, offsets, stride, M, y, y_stride, first, last):
    def in_tiles(isa, words, scales, K, q, q_stride, d, offsets, stride, M, y, y_stride, first, last):
        m = 0
        while m < M:
            x, s, c, to = q + m * q_stride, d + 4 * m * stride, offsets + 4 * m * stride, y + 4 * m * y_stride
            if M - m >= 8:
                tile(isa, zero_tokens(8), words, scales, K, x, q_stride, s, c, stride, to, y_stride, first, last)
                m += 8
            elif M - m >= 4:
                tile(isa, zero_tokens(4), words, scales, K, x, q_stride, s, c, stride, to, y_stride, first, last)
                m += 4
            elif M - m >= 2:
                tile(isa, zero_tokens(2), words, scales, K, x, q_stride, s, c, stride, to, y_stride, first, last)
                m += 2
            else:
                gemv_groups(isa, words, scales, K, x, s, c, to, first, last)
                m += 1

    def one_by_one(isa, words, scales, K, q, q_stride, d, offsets, stride, M, y, y_stride, first, last):
        for m in range(M):  # the second token finds the weights in the cache
            at = 4 * m * stride
            gemv_groups(
                isa, words, scales, K, q + m * q_stride, d + at, offsets + at, y + 4 * m * y_stride, first, last
            )

    return in_tiles if isa.isa == "vnni512" else one_by_one
