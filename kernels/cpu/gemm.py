"""W2A8 matrix product on packed words, for prompts and batches: acc[m, n] = sum_k q[m, k] * w[n, k], exact in int32.

Some rows at a time are unpacked, once for all tokens, into bytes in the order of the dot product: four columns of all
these rows, then the next four columns. This scratch (32 rows of 2560 columns are 80 KiB) stays in the second-level
cache. A tile of tokens then goes over it with all its sums in registers:

                          rows of a scratch line, four bytes each
                     | w0: rows 0-15 | w1: rows 16-31 |            vnni512: 16 sums, 2 registers of weights,
    token 0, q[k:k+4]|    acc 0      |    acc 1       |            1 broadcast: 16 dot products for 10 loads
    ...              |    ...        |    ...         |
    token 7          |    acc 14     |    acc 15      |

    tile        rows                 tokens       registers of sums, and of all
    vnni512     32 = 2 registers     8, 4, 2, 1   16 of 32
    vnni256     16 = 2 registers     4, 2, 1       8 of 16
    avx2        16 = 2 registers     4, 2, 1       8 of 16, sums of 16 bits
    NEON        16 = 4 registers     4, 2, 1      16 of 32
    portable    16 = 4 registers     2, 1          8 of 16 or more

The last tokens take smaller tiles. Sums of int32 hold K * 3 * 128 up to K = 5,500,000. A step of AVX2 adds at most
2 * 3 * 128 = 768 to a sum of 16 bits, so that 42 steps fit (32,256); they are widened every 40.
"""

from typing import NamedTuple

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic, overload

from bitnet_numba.kernels.cpu import dot, vec
from bitnet_numba.kernels.cpu.memory import load_at, pointer_at
from bitnet_numba.kernels.cpu.vec import OPTIONS, and_, join, load_i32x8, lshr, store
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, CODE_MASK, CODE_OFFSET

BLOCK_BYTES = BLOCK_ROWS * BLOCK_COLS // 4
LINE = 4 * BLOCK_ROWS  # bytes of four columns of a row-block, unpacked
SCRATCH_ROWS = 32  # bytes of scratch that a thread needs for each column
COLUMNS_16_BITS = 4 * 40  # columns after which AVX2's sums are widened


class Tile(NamedTuple):
    """How many rows and tokens an instruction set multiplies at a time."""

    lanes: int  # rows of a register
    registers: int  # registers of rows
    tokens: int


TILES = {
    "vnni512": Tile(16, 2, 8),
    "vnni256": Tile(8, 2, 4),
    "avx2": Tile(8, 2, 4),
    "i8mm": Tile(4, 4, 4),
    "dotprod": Tile(4, 4, 4),
    "portable": Tile(4, 4, 2),
}


@njit(**OPTIONS)
def gemm(isa, words, K, q, q_stride, q_sums, M, acc, acc_stride, first, last, scratch):
    """Row-blocks first .. last - 1 of a packed matrix times the activations of M tokens.

    isa: InstructionSet. words: address of int32 words. K: columns, a multiple of 32. q: address of int8 [M, q_stride],
    of which K are read, 0 in padded columns. q_sums: address of their sums, int32 [M]. acc: address of int32 [M,
    acc_stride], of which the first 16 * (last - first) of each token are written. scratch: address of SCRATCH_ROWS * K
    bytes, this thread's own.
    """
    blocks = tile_blocks(isa)
    for row_block in range(first, last, blocks):
        count = min(blocks, last - row_block)
        for block in range(blocks):
            # Where the last row-block is alone, its weights take the other's place, too; that half is not stored.
            from_block = row_block + min(block, count - 1)
            unpack(words + from_block * (K // BLOCK_COLS) * BLOCK_BYTES, K, scratch + block * LINE, blocks * LINE)
        m = tiles(isa, zero_tile(isa, 8), K, q, q_stride, q_sums, 0, M, acc, acc_stride, count, scratch)
        m = tiles(isa, zero_tile(isa, 4), K, q, q_stride, q_sums, m, M, acc, acc_stride, count, scratch)
        m = tiles(isa, zero_tile(isa, 2), K, q, q_stride, q_sums, m, M, acc, acc_stride, count, scratch)
        tiles(isa, zero_tile(isa, 1), K, q, q_stride, q_sums, m, M, acc, acc_stride, count, scratch)
        acc += count * LINE


@njit(**OPTIONS)
def unpack(words, K, lines, stride):
    """A row-block as bytes: for each four columns a line of 16 rows, `stride` bytes apart."""
    for _col_block in range(K // BLOCK_COLS):
        for half in range(2):
            w = join(load_i32x8(words, 32 * half), load_i32x8(words, 64 + 32 * half))  # 16 rows x 16 columns
            store(lines, 0, and_(w, CODE_MASK))
            store(lines, stride, and_(lshr(w, 2), CODE_MASK))
            store(lines, 2 * stride, and_(lshr(w, 4), CODE_MASK))
            store(lines, 3 * stride, and_(lshr(w, 6), CODE_MASK))
            lines += 4 * stride
        words += BLOCK_BYTES


@njit(**OPTIONS)
def tiles(isa, zero, K, q, q_stride, q_sums, m, M, acc, acc_stride, blocks, scratch):
    """As many tiles as fit into tokens m .. M - 1, each as large as `zero`. Returns the first token left."""
    tokens = len(zero) // tile_registers(isa)
    while m + tokens <= M:
        sums = tile_sums(isa, zero, scratch, q + m * q_stride, q_stride, K)
        store_tile(isa, sums, q_sums + 4 * m, acc + 4 * m * acc_stride, 4 * acc_stride, blocks)
        m += tokens
    return m


def tile_sums(isa, zero, w, q, q_stride, K):
    """The sums over K columns of a tile: lines of weights at w, tokens at q."""
    raise NotImplementedError("only compiled functions can call this")


@overload(tile_sums)
def _tile_sums(isa, zero, w, q, q_stride, K):
    def exact(isa, zero, w, q, q_stride, K):
        sums = zero
        for k in range(q, q + K, 4):
            sums = dot_tile(isa, sums, w, k, q_stride)
            w += LINE * tile_blocks(isa)
        return sums

    def in_16_bits(isa, zero, w, q, q_stride, K):
        sums = zero
        for start in range(0, K, COLUMNS_16_BITS):
            pairs = zero
            for k in range(q + start, q + min(start + COLUMNS_16_BITS, K), 4):
                pairs = dot_tile(isa, pairs, w, k, q_stride)
                w += LINE
            sums = widen_tile(sums, pairs)
        return sums

    return in_16_bits if isa.isa == "avx2" else exact


def _constant_of(meaning, value):
    """An integer that depends on the instruction set, known to the compiler."""

    @intrinsic
    def constant(typingctx, isa):
        def codegen(context, builder, sig, args):
            return ir.Constant(ir.IntType(64), value(TILES[isa.isa]))

        return types.int64(isa), codegen

    constant.__doc__ = meaning
    return constant


tile_registers = _constant_of("Registers of rows in a tile.", lambda tile: tile.registers)
tile_blocks = _constant_of("Row-blocks in a tile.", lambda tile: tile.lanes * tile.registers // BLOCK_ROWS)


@intrinsic(prefer_literal=True)
def zero_tile(typingctx, isa, tokens):
    """Sums of so many tokens, or of as many as the instruction set's tile has if that is fewer, all 0.

    The sum of token t in register r of the rows is element t * registers + r of the tuple.
    """
    tile = TILES[isa.isa]
    zero = types.UniTuple(vec.Vec(tile.lanes, "i32"), min(tile.tokens, tokens.literal_value) * tile.registers)

    def codegen(context, builder, sig, args):
        return ir.Constant(context.get_value_type(zero), None)

    return zero(isa, tokens), codegen


@intrinsic
def dot_tile(typingctx, isa, sums, w, q, q_stride):
    """sums + four columns of weights, a line at w, times four columns of each token, q_stride bytes apart from q.

    With AVX2, sums of two products in 16 bits.
    """

    def codegen(context, builder, sig, args):
        _isa, out, w, q, q_stride = args
        register = out.type.element
        registers = TILES[isa.isa].registers
        weights = [load_at(builder, w, 4 * register.count * r, register) for r in range(registers)]
        for t in range(out.type.count // registers):
            columns = load_at(builder, q, 0, vec.I32)
            columns = vec.splat_of(builder, columns, register.count)
            for r in range(registers):
                i = t * registers + r
                old = builder.extract_value(out, i)
                if isa.isa == "avx2":
                    new = dot.emit_add16(builder, old, dot.emit_pairs_avx2(builder, weights[r], columns))
                else:
                    new = dot.emit_dot4(builder, isa.isa, old, weights[r], columns)
                out = builder.insert_value(out, new, i)
            q = builder.add(q, q_stride)
        return out

    return sums(isa, sums, w, q, q_stride), codegen


@intrinsic
def widen_tile(typingctx, sums, pairs):
    """sums + the 16-bit halves of the lanes of pairs."""

    def codegen(context, builder, sig, args):
        out = args[0]
        for i in range(sums.count):
            wide = dot.emit_widen16(builder, builder.extract_value(out, i), builder.extract_value(args[1], i))
            out = builder.insert_value(out, wide, i)
        return out

    return sums(sums, pairs), codegen


@intrinsic
def store_tile(typingctx, isa, sums, q_sums, acc, acc_stride, blocks):
    """Writes sums - CODE_OFFSET * q_sums, token t to acc + t * acc_stride (in bytes), of so many row-blocks."""

    def codegen(context, builder, sig, args):
        _isa, sums, q_sums, acc, acc_stride, blocks = args
        register = sums.type.element
        tile = TILES[isa.isa]
        per_block = BLOCK_ROWS // tile.lanes

        def store_block(first):
            at = acc
            for t in range(sums.type.count // tile.registers):
                q_sum = load_at(builder, q_sums, 4 * t, vec.I32)
                offset = vec.splat_of(builder, builder.mul(q_sum, vec.I32(CODE_OFFSET)), register.count)
                for r in range(first, first + per_block):
                    v = builder.sub(builder.extract_value(sums, t * tile.registers + r), offset)
                    builder.store(v, pointer_at(builder, at, 4 * register.count * r, register), align=1)
                at = builder.add(at, acc_stride)

        store_block(0)
        for block in range(1, tile.registers // per_block):
            there = builder.icmp_signed(">", blocks, ir.Constant(blocks.type, block))
            with builder.if_then(there):
                store_block(block * per_block)
        return context.get_dummy_value()

    return types.void(isa, sums, q_sums, acc, acc_stride, blocks), codegen
