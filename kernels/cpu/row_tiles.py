"""Tiles of rows and tokens: what the LM head does with registers, for rows of bfloat16 and of int8.

A tile keeps its sums in registers while it goes along its rows: a tuple for each row of a tuple of registers, those of
the first token, then those of the second. `RowFormat` says how rows of a kind are read, multiplied and summed, and
`row_product` makes the kernel of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from bitnet_numba.kernels.cpu import vec
from bitnet_numba.kernels.cpu.dot import emit_dot4
from bitnet_numba.kernels.cpu.gemm import TILES
from bitnet_numba.kernels.cpu.memory import emit_prefetch, load_at, pointer_at
from bitnet_numba.kernels.cpu.vec import OPTIONS

TILE_TOKENS = 2  # two tokens by two rows: 4 loads of activations and 2 of rows for 8 products (bfloat16)
CHUNK = 8  # rows that are multiplied by all tokens before the next ones are read
ZERO = 1 << 23  # what stands for 0 in fixed point
PLANES = 64  # offset of the planes in activations of fixed point; the unit stands before them
F32, I64 = ir.FloatType(), ir.IntType(64)
FLOATS, INTS, BYTES = vec.vector(16, "f32"), vec.vector(16, "i32"), vec.vector(16, "i8")


@dataclass(frozen=True)
class RowFormat:
    """How rows are read and multiplied."""

    column_bytes: int
    columns: int  # of a step
    x_offset: int  # of the first step's activations in a token's
    x_bytes: int  # of a step's activations
    registers: int  # of sums for a row and a token
    zero_tile: Any  # (isa) -> the sums of a tile, all 0
    zero_single: Any  # (isa) -> the sums of one row and one token
    step: Any  # (isa, sums, row, row_stride, x, x_stride) -> sums with those of a step's columns
    store: Any  # (sums, scales, row_sums, x, x_stride, y, y_stride): writes a tile's results; strides in bytes


def row_product(rows_format: RowFormat) -> Any:
    """The kernel (isa, rows, K, scales, row_sums, x, x_stride, M, y, y_stride, first, last) for a format of rows.

    It multiplies rows first .. last - 1 by M tokens, in tiles as far as there are rows and tokens enough.
    """
    column_bytes, columns = rows_format.column_bytes, rows_format.columns
    x_offset, x_bytes, registers = rows_format.x_offset, rows_format.x_bytes, rows_format.registers
    zero_tile, zero_single = rows_format.zero_tile, rows_format.zero_single
    step, store = rows_format.step, rows_format.store

    @njit(**OPTIONS)
    def tile(isa, sums, n, m, rows, K, scales, row_sums, x, x_stride, y, y_stride):
        row, token = rows + n * K * column_bytes, x + m * x_stride
        at, steps = token + x_offset, K // columns
        ahead = row + len(sums) * K * column_bytes
        for _part in range(2):  # whole steps, then the last columns
            for _step in range(steps):
                sums = step(isa, sums, row, K * column_bytes, at, x_stride)
                if len(sums[0]) > registers:
                    prefetch(sums, ahead)
                row += columns * column_bytes
                ahead += columns * column_bytes * len(sums)
                at += x_bytes
            row, steps = rows + ((n + 1) * K - columns) * column_bytes, min(K % columns, 1)
        to = y + 4 * (m * y_stride + n)
        store(sums, scales + 4 * n, row_sums + 4 * n, token, x_stride, to, 4 * y_stride)

    @njit(**OPTIONS)
    def product(isa, rows, K, scales, row_sums, x, x_stride, M, y, y_stride, first, last):
        tile_rows, tokens = len(zero_tile(isa)), len(zero_tile(isa)[0]) // registers
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            tiled_rows, tiled_tokens = stop - (stop - start) % tile_rows, M - M % tokens
            for m in range(0, tiled_tokens, tokens):
                for n in range(start, tiled_rows, tile_rows):
                    tile(isa, zero_tile(isa), n, m, rows, K, scales, row_sums, x, x_stride, y, y_stride)
            for n in range(start, stop):
                for m in range(tiled_tokens if n < tiled_rows else 0, M):
                    tile(isa, zero_single(isa), n, m, rows, K, scales, row_sums, x, x_stride, y, y_stride)

    return product


def _zero_sums(shape: Callable[[str], tuple[int, int, int, str]]) -> Any:
    """zero(isa) -> sums of 0. `shape` gives rows, registers of a row, lanes of a register, and what a lane is."""

    @intrinsic
    def zero(typingctx, isa):
        rows, registers, lanes, lane = shape(isa.isa)
        result = types.UniTuple(types.UniTuple(vec.Vec(lanes, lane), registers), rows)

        def codegen(context, builder, sig, args):
            return ir.Constant(context.get_value_type(result), None)

        return result(isa), codegen

    return zero


def _shifted(builder, address, stride, count: int):
    """address, address + stride, ..."""
    for _ in range(count):
        yield address
        address = builder.add(address, stride)


def _all_lanes(vector: ir.VectorType, value: int):
    return ir.Constant(vector, [value] * vector.count)


@intrinsic
def prefetch(typingctx, sums, address):
    """Asks for the cache lines that a tile of several rows or tokens needs for its next rows, in the order of memory.

    Hardware follows one row after the other for one token, but neither two rows at a time nor slower readers.
    """

    def codegen(context, builder, sig, args):
        emit_prefetch(builder, args[1], sums.count)
        return context.get_dummy_value()

    return types.void(sums, address), codegen


def _from_bf16(builder, row):
    """Even and odd columns of 32, as float32."""
    pairs = load_at(builder, row, 0, INTS)
    even, odd = builder.shl(pairs, _all_lanes(INTS, 16)), builder.and_(pairs, _all_lanes(INTS, 0xFFFF0000))
    return [builder.bitcast(even, FLOATS), builder.bitcast(odd, FLOATS)]


def _from_int8(builder, row):
    """Columns 0-15 and 16-31, as float32."""
    return [builder.sitofp(load_at(builder, row, offset, BYTES), FLOATS) for offset in (0, 16)]


def _float_step(widen):
    """step(isa, sums, row, row_stride, x, x_stride): sums + 32 columns of the tile's rows times those of its tokens."""

    @intrinsic
    def step(typingctx, isa, sums, row, row_stride, x, x_stride):
        def codegen(context, builder, sig, args):
            _isa, out, row, row_stride, x, x_stride = args
            weights = [widen(builder, at) for at in _shifted(builder, row, row_stride, sums.count)]
            for t, at in enumerate(_shifted(builder, x, x_stride, sums.dtype.count // 2)):
                for half in range(2):
                    columns = load_at(builder, at, 64 * half, FLOATS)
                    for r in range(sums.count):
                        where = [r, 2 * t + half]
                        operands = [weights[r][half], columns, builder.extract_value(out, where)]
                        new = vec.call(builder, "llvm.fma.v16f32", FLOATS, operands)
                        out = builder.insert_value(out, new, where)
            return out

        return sums(isa, sums, row, row_stride, x, x_stride), codegen

    return step


@intrinsic
def _fixed_step(typingctx, isa, sums, row, row_stride, x, x_stride):
    """sums + 64 columns of the tile's rows times the three planes of its tokens."""

    def codegen(context, builder, sig, args):
        _isa, out, row, row_stride, x, x_stride = args
        register = sums.dtype.dtype.n * 4
        vector = vec.vector(sums.dtype.dtype.n, "i32")
        for offset in range(0, 64, register):
            rows = [load_at(builder, at, offset, vector) for at in _shifted(builder, row, row_stride, sums.count)]
            for t, at in enumerate(_shifted(builder, x, x_stride, sums.dtype.count // 3)):
                for plane in range(3):
                    columns = load_at(builder, at, 64 * plane + offset, vector)
                    for r in range(sums.count):
                        where = [r, 3 * t + plane]
                        new = emit_dot4(builder, isa.isa, builder.extract_value(out, where), columns, rows[r])
                        out = builder.insert_value(out, new, where)
        return out

    return sums(isa, sums, row, row_stride, x, x_stride), codegen


def _from_f16(builder, row):
    """Columns 0-15 and 16-31, as float32."""
    return [vec.emit_halves(builder, row, offset, 16) for offset in (0, 32)]


def _from_f32(builder, row):
    """Columns 0-15 and 16-31."""
    return [load_at(builder, row, offset, FLOATS) for offset in (0, 64)]


def _sum(builder, v):
    """The sum of all lanes, halves onto halves."""
    n = v.type.count
    while n > 1:
        n //= 2
        low, high = (vec.lanes_from(builder, v, v, first, n) for first in (0, n))
        v = builder.fadd(low, high) if v.type.element == F32 else builder.add(low, high)
    return builder.extract_element(v, vec.I32(0))


def _float_result(builder, sums, r, scales, row_sums, x):
    return builder.fmul(_float_sum(builder, sums), load_at(builder, scales, 4 * r, F32))


def _float_sum(builder, sums, *_unused):
    return _sum(builder, builder.fadd(*sums))


def _fixed_result(builder, sums, r, scales, row_sums, x):
    """((65536 * high + 256 * middle + low) - 2^23 * sum of the row) * unit * scale: exact up to the conversion."""
    total = None
    for plane in sums:
        wide = builder.sext(plane, ir.VectorType(I64, plane.type.count))
        total = wide if total is None else builder.add(builder.shl(total, _all_lanes(wide.type, 8)), wide)
    offset = builder.mul(builder.sext(load_at(builder, row_sums, 4 * r, vec.I32), I64), I64(ZERO))
    value = builder.sitofp(builder.sub(_sum(builder, total), offset), F32)
    value = builder.fmul(value, load_at(builder, x, 0, F32))
    return builder.fmul(value, load_at(builder, scales, 4 * r, F32))


def _store(result: Any, registers: int) -> Any:
    """`RowFormat.store`, of what `result` makes of the registers of a row and token: row r, token t to y[t][r]."""

    @intrinsic
    def store(typingctx, sums, scales, row_sums, x, x_stride, y, y_stride):
        def codegen(context, builder, sig, args):
            tile, scales, row_sums, x, x_stride, y, y_stride = args
            tokens = sums.dtype.count // registers
            ends = zip(_shifted(builder, x, x_stride, tokens), _shifted(builder, y, y_stride, tokens), strict=True)
            for t, (token, to) in enumerate(ends):
                for r in range(sums.count):
                    own = [builder.extract_value(tile, [r, t * registers + i]) for i in range(registers)]
                    value = result(builder, own, r, scales, row_sums, token)
                    builder.store(value, pointer_at(builder, to, 4 * r, F32), align=1)
            return context.get_dummy_value()

        return types.void(sums, scales, row_sums, x, x_stride, y, y_stride), codegen

    return store


def _float_format(column_bytes: int, widen: Any, result: Any) -> RowFormat:
    """Rows that are converted to float32. Two rows at a time only where 32 registers of 16 lanes hold their sums."""
    tile = _zero_sums(lambda isa: (2 if isa == "vnni512" else 1, 2 * TILE_TOKENS, 16, "f32"))
    single = _zero_sums(lambda isa: (1, 2, 16, "f32"))
    return RowFormat(column_bytes, 32, 0, 128, 2, tile, single, _float_step(widen), _store(result, 2))


BF16 = _float_format(2, _from_bf16, _float_sum)
F16 = _float_format(2, _from_f16, _float_sum)
F32_ROWS = _float_format(4, _from_f32, _float_sum)
INT8 = _float_format(1, _from_int8, _float_result)
INT8_FIXED = RowFormat(
    column_bytes=1,
    columns=64,
    x_offset=PLANES,
    x_bytes=3 * 64,
    registers=3,
    zero_tile=_zero_sums(lambda isa: (2, 3 * TILE_TOKENS, TILES[isa].lanes, "i32")),
    # 16 lanes also where registers are smaller: so many sums that no product waits for the one before.
    zero_single=_zero_sums(lambda isa: (1, 3, 16, "i32")),
    step=_fixed_step,
    store=_store(_fixed_result, 3),
)
