"""W2A8 matrix-vector product on packed words: acc[n] = sum_k q[k] * w[n, k], exact in int32.

Eight consecutive words of a block are 8 rows of 16 columns: 32 bytes, one row a lane. So the packed layout is what a
vector CPU wants: no sums across lanes, one accumulator lane a row, and q broadcast four bytes at a time. Nor are the
codes shifted: the four of a byte are taken where they lie, by the masks 0x03, 0x0c, 0x30 and 0xc0, that is as code * 1,
4, 16 and 64 (unsigned bytes up to 192), each into an accumulator of its own, which is shifted once at the end.

    words of a row-block      [rows 0-7, columns 0-15] [rows 0-7, columns 16-31] [rows 8-15, 0-15] [rows 8-15, 16-31]
    byte b of a row's word    columns b, 4 + b, 8 + b, 12 + b, from the lowest bits up
    field i of all bytes      columns 4i .. 4i + 3: one dot product with q[4i : 4i + 4]

The weights are read once, in storage order: a thread that reads four rows at a time as four streams gets half the
bandwidth. Sums stay exact: |acc| of the last field is at most K / 4 * 192 * 128, below 2^31 up to K = 349,000.

Measured with one thread of a Zen 4 server that reads 33 GB/s: see docs/benchmarks-cpu.md.
"""

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic, overload

from bitnet_numba.kernels.cpu.dot import add16, dot4, emit_dot4, pairs_avx2, widen16
from bitnet_numba.kernels.cpu.memory import load_i32, prefetch
from bitnet_numba.kernels.cpu.vec import (
    I32,
    OPTIONS,
    Vec,
    add,
    and_,
    ashr,
    broadcast_i32x4,
    broadcast_i32x8,
    broadcast_i32x16,
    join,
    load_i32x4,
    load_i32x8,
    lshr,
    splat_i32x4,
    splat_i32x8,
    splat_i32x16,
    splat_of,
    store,
    sub,
    zero_i32x4,
    zero_i32x8,
    zero_i32x16,
)
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, CODE_MASK, CODE_OFFSET

BLOCK_BYTES = BLOCK_ROWS * BLOCK_COLS // 4
# Bytes from the words in use to those that are asked for, a block at a time: without that, 10 to 25 % less is read with
# one thread, and 10 % with two, when other programs run; see docs/performance-notes.md.
AHEAD = 8192
LINES = (0,) * (BLOCK_BYTES // 64)
# Up to so many tokens `gemv_tokens` is as fast as the GEMM or faster: unpacking a row costs the GEMM as much as several
# tokens. With 32 registers of 16 lanes, eight tokens share a reading of the codes, which is all that the GEMM gains.
FEW = {"vnni512": 64, "vnni256": 24, "avx2": 12, "i8mm": 4, "dotprod": 4, "portable": 64}
# The codes of a byte where they lie, and how far the sum over each field is shifted at the end.
FIELD0, FIELD1, FIELD2, FIELD3 = (CODE_MASK << 2 * i for i in range(4))


def gemv(isa, words, K, q, q_sum, acc, first, last):
    """Row-blocks first .. last - 1 of a packed matrix times one token's activations.

    isa: InstructionSet. words: address of int32 words. K: columns, a multiple of 32. q: address of int8 [K], 0 in
    padded columns. q_sum: their sum. acc: address of int32 [16 * (last - first)], written.
    """
    raise NotImplementedError("only compiled functions can call this")


@overload(gemv)
def _gemv(isa, words, K, q, q_sum, acc, first, last):
    kernel = {
        "vnni512": gemv_16_lanes,
        "vnni256": gemv_8_lanes,
        "avx2": gemv_avx2,
        "i8mm": gemv_4_lanes,
        "dotprod": gemv_4_lanes,
        "portable": gemv_16_lanes,
    }[isa.isa]
    return lambda isa, words, K, q, q_sum, acc, first, last: kernel(isa, words, K, q, q_sum, acc, first, last)


@njit(**OPTIONS)
def one_sum(a0, a1, a2, a3):
    """a0 + a1 / 4 + a2 / 16 + a3 / 64: exact, since every product in a1 is a multiple of 4, and so on."""
    return add(add(a0, ashr(a1, 2)), add(ashr(a2, 4), ashr(a3, 6)))


@njit(**OPTIONS)
def gemv_16_lanes(isa, words, K, q, q_sum, acc, first, last):
    """All 16 rows of a row-block in one register (zmm)."""
    offset = splat_i32x16(CODE_OFFSET * q_sum)
    p = words + first * (K // BLOCK_COLS) * BLOCK_BYTES
    for _row_block in range(first, last):
        a0, a1, a2, a3 = zero_i32x16(), zero_i32x16(), zero_i32x16(), zero_i32x16()
        b0, b1, b2, b3 = zero_i32x16(), zero_i32x16(), zero_i32x16(), zero_i32x16()
        for k in range(q, q + K, BLOCK_COLS):
            prefetch(p + AHEAD, LINES)
            left = join(load_i32x8(p, 0), load_i32x8(p, 64))  # columns 0-15
            a0 = dot4(isa, a0, and_(left, FIELD0), broadcast_i32x16(k, 0))
            a1 = dot4(isa, a1, and_(left, FIELD1), broadcast_i32x16(k, 4))
            a2 = dot4(isa, a2, and_(left, FIELD2), broadcast_i32x16(k, 8))
            a3 = dot4(isa, a3, and_(left, FIELD3), broadcast_i32x16(k, 12))
            right = join(load_i32x8(p, 32), load_i32x8(p, 96))  # columns 16-31
            b0 = dot4(isa, b0, and_(right, FIELD0), broadcast_i32x16(k, 16))
            b1 = dot4(isa, b1, and_(right, FIELD1), broadcast_i32x16(k, 20))
            b2 = dot4(isa, b2, and_(right, FIELD2), broadcast_i32x16(k, 24))
            b3 = dot4(isa, b3, and_(right, FIELD3), broadcast_i32x16(k, 28))
            p += BLOCK_BYTES
        store(acc, 0, sub(one_sum(add(a0, b0), add(a1, b1), add(a2, b2), add(a3, b3)), offset))
        acc += 4 * BLOCK_ROWS


@njit(**OPTIONS)
def gemv_8_lanes(isa, words, K, q, q_sum, acc, first, last):
    """Rows 0-7 and 8-15 in a register each (ymm)."""
    offset = splat_i32x8(CODE_OFFSET * q_sum)
    p = words + first * (K // BLOCK_COLS) * BLOCK_BYTES
    for _row_block in range(first, last):
        a0, a1, a2, a3 = zero_i32x8(), zero_i32x8(), zero_i32x8(), zero_i32x8()  # rows 0-7
        b0, b1, b2, b3 = zero_i32x8(), zero_i32x8(), zero_i32x8(), zero_i32x8()  # rows 8-15
        for k in range(q, q + K, BLOCK_COLS):
            prefetch(p + AHEAD, LINES)
            for half in range(2):
                w, v, x = load_i32x8(p, 32 * half), load_i32x8(p, 64 + 32 * half), k + 16 * half
                q0, q1 = broadcast_i32x8(x, 0), broadcast_i32x8(x, 4)
                a0, b0 = dot4(isa, a0, and_(w, FIELD0), q0), dot4(isa, b0, and_(v, FIELD0), q0)
                a1, b1 = dot4(isa, a1, and_(w, FIELD1), q1), dot4(isa, b1, and_(v, FIELD1), q1)
                q2, q3 = broadcast_i32x8(x, 8), broadcast_i32x8(x, 12)
                a2, b2 = dot4(isa, a2, and_(w, FIELD2), q2), dot4(isa, b2, and_(v, FIELD2), q2)
                a3, b3 = dot4(isa, a3, and_(w, FIELD3), q3), dot4(isa, b3, and_(v, FIELD3), q3)
            p += BLOCK_BYTES
        store(acc, 0, sub(one_sum(a0, a1, a2, a3), offset))
        store(acc, 32, sub(one_sum(b0, b1, b2, b3), offset))
        acc += 4 * BLOCK_ROWS


@njit(**OPTIONS)
def gemv_4_lanes(isa, words, K, q, q_sum, acc, first, last):
    """Four rows in a register (NEON). The last field is shifted down first: sdot takes signed bytes, below 128."""
    offset = splat_i32x4(CODE_OFFSET * q_sum)
    p = words + first * (K // BLOCK_COLS) * BLOCK_BYTES
    for _row_block in range(first, last):
        for rows in range(0, 4 * BLOCK_ROWS, 16):  # rows 0-3, 4-7, then 8-11 and 12-15, 64 bytes on
            at = p + (rows & 16) + 2 * (rows & 32)
            a0, a1, a2, a3 = zero_i32x4(), zero_i32x4(), zero_i32x4(), zero_i32x4()
            b0, b1, b2, b3 = zero_i32x4(), zero_i32x4(), zero_i32x4(), zero_i32x4()
            for k in range(q, q + K, BLOCK_COLS):
                w = load_i32x4(at, 0)  # columns 0-15
                a0 = dot4(isa, a0, and_(w, FIELD0), broadcast_i32x4(k, 0))
                a1 = dot4(isa, a1, and_(w, FIELD1), broadcast_i32x4(k, 4))
                a2 = dot4(isa, a2, and_(w, FIELD2), broadcast_i32x4(k, 8))
                a3 = dot4(isa, a3, and_(lshr(w, 2), FIELD2), broadcast_i32x4(k, 12))
                w = load_i32x4(at, 32)  # columns 16-31
                b0 = dot4(isa, b0, and_(w, FIELD0), broadcast_i32x4(k, 16))
                b1 = dot4(isa, b1, and_(w, FIELD1), broadcast_i32x4(k, 20))
                b2 = dot4(isa, b2, and_(w, FIELD2), broadcast_i32x4(k, 24))
                b3 = dot4(isa, b3, and_(lshr(w, 2), FIELD2), broadcast_i32x4(k, 28))
                at += BLOCK_BYTES
            low = add(add(a0, b0), ashr(add(a1, b1), 2))
            high = ashr(add(add(a2, b2), add(a3, b3)), 4)
            store(acc, rows, sub(add(low, high), offset))
        p += K // BLOCK_COLS * BLOCK_BYTES
        acc += 4 * BLOCK_ROWS


@njit(**OPTIONS)
def sixteen_columns(low, high, w, k, offset):
    """8 rows x 16 columns into 16-bit sums: codes * 1 into `low`, codes * 4 into `high`, at most 6144 more a call."""
    up = lshr(w, 4)
    pairs0, pairs2 = pairs_avx2(and_(w, FIELD0), broadcast_i32x8(k, offset)), broadcast_i32x8(k, offset + 8)
    pairs1, pairs3 = pairs_avx2(and_(w, FIELD1), broadcast_i32x8(k, offset + 4)), broadcast_i32x8(k, offset + 12)
    low = add16(low, add16(pairs0, pairs_avx2(and_(up, FIELD0), pairs2)))
    high = add16(high, add16(pairs1, pairs_avx2(and_(up, FIELD1), pairs3)))
    return low, high


@njit(**OPTIONS)
def gemv_avx2(isa, words, K, q, q_sum, acc, first, last):
    """Sums of 16 bits, widened every 64 columns, in which `high` reaches 4 * 6144 = 24,576 at most."""
    offset = splat_i32x8(CODE_OFFSET * q_sum)
    col_blocks = K // BLOCK_COLS
    p = words + first * col_blocks * BLOCK_BYTES
    for _row_block in range(first, last):
        a, a4, b, b4 = zero_i32x8(), zero_i32x8(), zero_i32x8(), zero_i32x8()
        k = q
        for start in range(0, col_blocks, 2):
            low, high, low2, high2 = zero_i32x8(), zero_i32x8(), zero_i32x8(), zero_i32x8()
            for _block in range(min(2, col_blocks - start)):
                prefetch(p + AHEAD, LINES)
                low, high = sixteen_columns(low, high, load_i32x8(p, 0), k, 0)
                low2, high2 = sixteen_columns(low2, high2, load_i32x8(p, 64), k, 0)
                low, high = sixteen_columns(low, high, load_i32x8(p, 32), k, 16)
                low2, high2 = sixteen_columns(low2, high2, load_i32x8(p, 96), k, 16)
                p += BLOCK_BYTES
                k += BLOCK_COLS
            a, a4 = widen16(a, low), widen16(a4, high)
            b, b4 = widen16(b, low2), widen16(b4, high2)
        store(acc, 0, sub(add(a, ashr(a4, 2)), offset))
        store(acc, 32, sub(add(b, ashr(b4, 2)), offset))
        acc += 4 * BLOCK_ROWS


# ---- A few tokens ---------------------------------------------------------------------------------------------------


@intrinsic
def dot_tokens(typingctx, isa, sums, codes, q, q_stride):
    """sums[t] + the products of four columns of all rows with four bytes of token t, q_stride bytes apart."""

    def codegen(context, builder, sig, args):
        _isa, out, codes, q, q_stride = args
        for t in range(sums.count):
            four = splat_of(builder, builder.load(builder.inttoptr(q, I32.as_pointer()), align=1), 16)
            new = emit_dot4(builder, isa.isa, builder.extract_value(out, t), codes, four)
            out = builder.insert_value(out, new, t)
            q = builder.add(q, q_stride)
        return out

    return sums(isa, sums, codes, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def zero_tokens(typingctx, tokens):
    """Sums of so many tokens, all 0."""
    zero = types.UniTuple(Vec(16, "i32"), tokens.literal_value)

    def codegen(context, builder, sig, args):
        return ir.Constant(context.get_value_type(zero), None)

    return zero(tokens), codegen


@njit(**OPTIONS)
def _tile(isa, zero, words, K, q, q_stride, q_sums, acc, acc_stride, first, last):
    """All row-blocks times as many tokens as `zero` has sums. Codes are shifted down here, once for all tokens: so one
    sum a token is enough, and as many tokens as possible share a reading of the weights."""
    p = words + first * (K // BLOCK_COLS) * BLOCK_BYTES
    for _row_block in range(first, last):
        sums = zero
        for k in range(q, q + K, BLOCK_COLS):
            for half in range(2):
                w = join(load_i32x8(p, 32 * half), load_i32x8(p, 64 + 32 * half))
                at = k + 16 * half
                sums = dot_tokens(isa, sums, and_(w, FIELD0), at, q_stride)
                sums = dot_tokens(isa, sums, and_(lshr(w, 2), FIELD0), at + 4, q_stride)
                sums = dot_tokens(isa, sums, and_(lshr(w, 4), FIELD0), at + 8, q_stride)
                sums = dot_tokens(isa, sums, and_(lshr(w, 6), FIELD0), at + 12, q_stride)
            p += BLOCK_BYTES
        for t in range(len(sums)):
            store(acc, 4 * t * acc_stride, sub(sums[t], splat_i32x16(CODE_OFFSET * load_i32(q_sums, 4 * t))))
        acc += 4 * BLOCK_ROWS


def gemv_tokens(isa, words, K, q, q_stride, q_sums, M, acc, acc_stride, first, last):
    """As `gemv`, for M tokens; fast for a few, see FEW.

    q: address of int8 [M, q_stride]. q_sums: address of int32 [M]. acc: address of int32 [M, acc_stride].
    """
    raise NotImplementedError("only compiled functions can call this")


@overload(gemv_tokens)
def _gemv_tokens(isa, words, K, q, q_stride, q_sums, M, acc, acc_stride, first, last):
    def in_tiles(isa, words, K, q, q_stride, q_sums, M, acc, acc_stride, first, last):
        m = 0
        while M - m >= 4:
            at, sums, out = q + m * q_stride, q_sums + 4 * m, acc + 4 * m * acc_stride
            if M - m >= 8:
                _tile(isa, zero_tokens(8), words, K, at, q_stride, sums, out, acc_stride, first, last)
                m += 8
            else:
                _tile(isa, zero_tokens(4), words, K, at, q_stride, sums, out, acc_stride, first, last)
                m += 4
        while m < M:
            at, sums, out = q + m * q_stride, q_sums + 4 * m, acc + 4 * m * acc_stride
            if M - m >= 2:
                _tile(isa, zero_tokens(2), words, K, at, q_stride, sums, out, acc_stride, first, last)
                m += 2
            else:
                gemv(isa, words, K, at, load_i32(sums, 0), out, first, last)
                m += 1

    def one_by_one(isa, words, K, q, q_stride, q_sums, M, acc, acc_stride, first, last):
        for m in range(M):  # the second token finds the weights in the cache
            at, out = q + m * q_stride, acc + 4 * m * acc_stride
            gemv(isa, words, K, at, load_i32(q_sums, 4 * m), out, first, last)

    return in_tiles if isa.isa == "vnni512" else one_by_one
