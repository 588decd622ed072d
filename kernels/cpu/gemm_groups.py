"""Matrix product of packed words with group scales, for prompts and batches; see `gemv_groups` for what is computed.

As in `gemm`, some rows are unpacked once for all tokens, and a tile of tokens goes over them with its sums in
registers; here it stops after each group, and adds its scaled sums to y, which stays in the first-level cache.
"""

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from bitnet_numba.kernels.cpu import vec
from bitnet_numba.kernels.cpu.gemm import (
    BLOCK_BYTES,
    LINE,
    TILES,
    tile_blocks,
    tile_registers,
    tile_sums,
    unpack,
    zero_tile,
)
from bitnet_numba.kernels.cpu.gemv_groups import SCALE_BYTES
from bitnet_numba.kernels.cpu.memory import load_at, pointer_at
from bitnet_numba.kernels.cpu.vec import OPTIONS, store, zero_f32x16
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, GROUP_COLS

F32 = ir.FloatType()


@njit(**OPTIONS)
def gemm_groups(isa, words, scales, K, q, q_stride, d, offsets, stride, M, y, y_stride, first, last, scratch):
    """Row-blocks first .. last - 1 of a packed matrix with group scales times the activations of M tokens.

    isa: InstructionSet. words: address of int32 words. scales: address of the float16 scales in storage order. K:
    columns, a multiple of 32. q: address of int8 [M, q_stride], of which K are read, 0 in padded columns. d, offsets:
    addresses of the groups' steps, float32 [M, stride], and of -CODE_OFFSET * their sums, int32 [M, stride]. y: address
    of float32 [M, y_stride], of which the first 16 * (last - first) of each token are written. scratch: address of
    SCRATCH_ROWS * K bytes, this thread's own.
    """
    blocks, groups = tile_blocks(isa), (K + GROUP_COLS - 1) // GROUP_COLS
    for row_block in range(first, last, blocks):
        count = min(blocks, last - row_block)
        for block in range(blocks):
            # Where the last row-block is alone, its weights take the other's place, too; that half is not stored.
            from_block = row_block + min(block, count - 1)
            unpack(words + from_block * (K // BLOCK_COLS) * BLOCK_BYTES, K, scratch + block * LINE, blocks * LINE)
        for m in range(M):
            for block in range(count):
                store(y + 4 * m * y_stride, 4 * BLOCK_ROWS * block, zero_f32x16())
        s = scales + row_block * groups * SCALE_BYTES
        m = tiles(isa, zero_tile(isa, 8), s, K, q, q_stride, d, offsets, stride, 0, M, y, y_stride, count, scratch)
        m = tiles(isa, zero_tile(isa, 4), s, K, q, q_stride, d, offsets, stride, m, M, y, y_stride, count, scratch)
        m = tiles(isa, zero_tile(isa, 2), s, K, q, q_stride, d, offsets, stride, m, M, y, y_stride, count, scratch)
        tiles(isa, zero_tile(isa, 1), s, K, q, q_stride, d, offsets, stride, m, M, y, y_stride, count, scratch)
        y += 4 * count * BLOCK_ROWS


@njit(**OPTIONS)
def tiles(isa, zero, scales, K, q, q_stride, d, offsets, stride, m, M, y, y_stride, blocks, scratch):
    """As many tiles as fit into tokens m .. M - 1, each as large as `zero`. Returns the first token left."""
    tokens, groups = len(zero) // tile_registers(isa), (K + GROUP_COLS - 1) // GROUP_COLS
    lines = GROUP_COLS // 4 * tile_blocks(isa) * LINE  # bytes of a group
    while m + tokens <= M:
        for g in range(groups):
            columns, at = min(GROUP_COLS, K - GROUP_COLS * g), 4 * (m * stride + g)
            sums = tile_sums(isa, zero, scratch + g * lines, q + m * q_stride + GROUP_COLS * g, q_stride, columns)
            s, to = scales + g * SCALE_BYTES, y + 4 * m * y_stride
            add_tile(isa, sums, s, groups * SCALE_BYTES, d + at, offsets + at, 4 * stride, to, 4 * y_stride, blocks)
        m += tokens
    return m


@intrinsic
def add_tile(typingctx, isa, sums, scales, scale_stride, d, offsets, stride, y, y_stride, blocks):
    """y += (sums + offsets) * (scales * d) of a group, for so many row-blocks; strides are in bytes."""

    def codegen(context, builder, sig, args):
        _isa, sums, scales, scale_stride, d, offsets, stride, y, y_stride, blocks = args
        tile, lanes = TILES[isa.isa], sums.type.element.count
        per_block = BLOCK_ROWS // tile.lanes

        def add_block(block):
            at, step, offset_at = y, d, offsets
            row_scales = builder.add(scales, builder.mul(scale_stride, ir.Constant(scale_stride.type, block)))
            halves = [vec.emit_halves(builder, row_scales, 2 * lanes * i, lanes) for i in range(per_block)]
            for t in range(sums.type.count // tile.registers):
                offset = vec.splat_of(builder, load_at(builder, offset_at, 0, vec.I32), lanes)
                every = vec.splat_of(builder, load_at(builder, step, 0, F32), lanes)
                for i in range(per_block):
                    r = block * per_block + i
                    acc = builder.add(builder.extract_value(sums, t * tile.registers + r), offset)
                    value = builder.sitofp(acc, every.type)
                    value = builder.fmul(value, builder.fmul(halves[i], every))
                    place = pointer_at(builder, at, 4 * lanes * r, every.type)
                    builder.store(builder.fadd(builder.load(place, align=1), value), place, align=1)
                at, step = builder.add(at, y_stride), builder.add(step, stride)
                offset_at = builder.add(offset_at, stride)

        add_block(0)
        for block in range(1, tile.registers // per_block):
            there = builder.icmp_signed(">", blocks, ir.Constant(blocks.type, block))
            with builder.if_then(there):
                add_block(block)
        return context.get_dummy_value()

    return types.void(isa, sums, scales, scale_stride, d, offsets, stride, y, y_stride, blocks), codegen
