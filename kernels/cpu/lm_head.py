"""Logits: rows of bfloat16 or scaled int8 times float32 activations. Also linears that are not quantised.

A thread reads its rows one after the other, as one stream, and multiplies each by all tokens. `prepare_...` brings a
token's activations into the order in which rows are read, so that no row has to be shuffled:

    bfloat16      32 columns a step: an int32 lane holds two columns, of which << 16 makes the even one a float32 and
                  & 0xffff0000 the odd one. Activations: 16 even columns, then 16 odd ones. Two sums of 16 lanes.
    int8, float   32 columns a step, converted to float32. Two sums of 16 lanes.
    int8, fixed   64 columns a step, where a dot product takes unsigned bytes (vnni512, vnni256, i8mm). Activations of
                  24 bits, x = unit * (65536 * high + 256 * middle + low - 2^23): three dot products with the row as it
                  lies, three sums. Converting the row to float32 would take twice as many instructions.

If the columns are not whole steps, one more step covers the last columns of the row; those of them that an earlier step
has had meet activations of 0. So no byte beyond a row is read (rows lie in a mapped file), and any number of columns
will do from MIN_COLUMNS on.

A token's logits have the same bits whatever the other tokens are: a tile of rows and tokens only lets several sums
share what is loaded. It is used where there are tokens enough; until then a row is read from memory for the first
token, and from the first-level cache for the others.

Precision: bfloat16 and int8 are exact in float32, so the errors are those of sums of float32. In fixed point a column
is off by unit / 2 at most, 2^-24 of the largest, as float32's rounding of that column is; the sum is exact.
"""

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from bitnet_numba.kernels.cpu import vec
from bitnet_numba.kernels.cpu.dot import dot4, emit_dot4
from bitnet_numba.kernels.cpu.gemm import TILES
from bitnet_numba.kernels.cpu.vec import OPTIONS

MIN_COLUMNS = 64  # rows with fewer columns are padded with zeros when they are loaded
CHUNK = 8  # rows that are multiplied by all tokens before the next ones are read
FIXED = ("vnni512", "vnni256", "i8mm")  # instruction sets that multiply int8 rows in fixed point
ZERO = 1 << 23  # what stands for 0 in fixed point
# The largest activation in fixed point: below 2^23 by more than the quotient's rounding.
LARGEST = 2.0**23 - 8
PLANES = 64  # offset of the planes in prepared activations; the unit stands before them
# Rows and tokens of a tile: 16 registers of sums of 32 with AVX-512 and NEON, 8 of 16 with AVX2.
TILE_TOKENS = 2


def prepared_bytes(K: int) -> int:
    """Bytes of a token's prepared activations, of any kind; a multiple of 64, to which they are best aligned."""
    return 256 * -(-max(K, MIN_COLUMNS) // 64) + PLANES


@njit(**OPTIONS)
def prepare_bf16(x, K, prepared):
    """Brings float32 [K] at address x into the order of `head_bf16`, at `prepared`."""
    for step in range(steps_of(K, 32)):
        first = min(32 * step, max(K, MIN_COLUMNS) - 32)
        for i in range(32):
            column = first + 2 * (i % 16) + i // 16
            vec.store_f32(prepared, 4 * (32 * step + i), column_of(x, K, column, 32 * step))


def prepare_int8(isa, x, K, prepared):
    """Brings float32 [K] at address x into the order of `head_int8`, at `prepared`."""
    raise NotImplementedError("only compiled functions can call this")


@overload(prepare_int8)
def _prepare_int8(isa, x, K, prepared):
    kernel = prepare_fixed if isa.isa in FIXED else prepare_float
    return lambda isa, x, K, prepared: kernel(x, K, prepared)


@njit(**OPTIONS)
def prepare_float(x, K, prepared):
    """Blocks of 32 columns in their order; the last one ends at the last column."""
    for step in range(steps_of(K, 32)):
        first = min(32 * step, max(K, MIN_COLUMNS) - 32)
        for i in range(32):
            vec.store_f32(prepared, 4 * (32 * step + i), column_of(x, K, first + i, 32 * step))


@njit(**OPTIONS)
def prepare_fixed(x, K, prepared):
    """The unit, then blocks of 64 columns: high, middle and low bytes. NaN or infinity makes the unit NaN."""
    largest = np.float32(1e-30)  # below this, all logits are as good as 0
    nan = np.float32(0)
    for k in range(K):
        v = vec.load_f32(x, 4 * k)
        largest = max(largest, abs(v))
        nan += v * np.float32(0)
    unit = largest / np.float32(LARGEST)
    vec.store_f32(prepared, 0, unit + nan)
    for step in range(steps_of(K, 64)):
        first = min(64 * step, max(K, MIN_COLUMNS) - 64)
        for i in range(64):
            fixed = 0  # of a column that another step has
            if first + i >= 64 * step:
                quotient = np.rint(column_of(x, K, first + i, 0) / unit)
                fixed = ZERO + (int(quotient) if abs(quotient) < ZERO else 0)
            at = prepared + PLANES + 192 * step + i
            vec.store_i8(at, 0, fixed >> 16)
            vec.store_i8(at, 64, fixed >> 8)
            vec.store_i8(at, 128, fixed)


@njit(**OPTIONS)
def steps_of(K, columns):
    """Steps of so many columns over a row."""
    return (max(K, MIN_COLUMNS) + columns - 1) // columns


@njit(**OPTIONS)
def column_of(x, K, column, first):
    """A column of float32 [K], or 0 where it is before `first` or beyond K."""
    return vec.load_f32(x, 4 * column) if first <= column < K else np.float32(0)


@njit(**OPTIONS)
def row_sums(isa, rows, K, sums, first, last):
    """The sums of rows first .. last - 1 of int8 [N, K] at address `rows`, to int32 [N] at address `sums`."""
    ones = vec.splat_i32x16(0x01010101)
    for n in range(first, last):
        p = rows + n * K
        lanes = vec.zero_i32x16()
        for k in range(0, K - 63, 64):
            lanes = dot4(isa, lanes, ones, vec.load_i32x16(p, k))
        total = vec.sum_lanes(lanes)
        for k in range(K // 64 * 64, K):
            total += vec.load_i8(p, k)
        vec.store_i32(sums, 4 * n, total)


def head_bf16(isa, rows, K, x, x_stride, M, y, y_stride, first, last):
    """Rows first .. last - 1 of a bfloat16 matrix times the activations of M tokens.

    isa: InstructionSet. rows: address of bfloat16 [N, K], K at least MIN_COLUMNS. x: address of the activations from
    `prepare_bf16`, x_stride bytes a token. y: address of float32 [M, y_stride]; columns first .. last - 1 are written.
    """
    raise NotImplementedError("only compiled functions can call this")


@overload(head_bf16)
def _head_bf16(isa, rows, K, x, x_stride, M, y, y_stride, first, last):
    def kernel(isa, rows, K, x, x_stride, M, y, y_stride, first, last):
        rows_bf16(isa, rows, K, 0, 0, x, x_stride, M, y, y_stride, first, last)

    return kernel


def head_int8(isa, rows, K, scales, sums, x, x_stride, M, y, y_stride, first, last):
    """Rows first .. last - 1 of a scaled int8 matrix times the activations of M tokens.

    isa: InstructionSet. rows: address of int8 [N, K], K at least MIN_COLUMNS. scales: address of float32 [N]. sums:
    address of int32 [N] from `row_sums`. x: address of the activations from `prepare_int8`, x_stride bytes a token. y:
    address of float32 [M, y_stride]; columns first .. last - 1 are written.
    """
    raise NotImplementedError("only compiled functions can call this")


@overload(head_int8)
def _head_int8(isa, rows, K, scales, sums, x, x_stride, M, y, y_stride, first, last):
    def kernel(isa, rows, K, scales, sums, x, x_stride, M, y, y_stride, first, last):
        product(isa, rows, K, scales, sums, x, x_stride, M, y, y_stride, first, last)

    product = rows_fixed if isa.isa in FIXED else rows_int8
    return kernel


def _zero_sums(shape):
    """zero(isa) -> the sums of a tile: rows x (tokens * sums of a row and token) registers, all 0."""

    @intrinsic
    def zero(typingctx, isa):
        rows, sums, lanes, lane = shape(isa.isa)
        result = types.UniTuple(types.UniTuple(vec.Vec(lanes, lane), sums), rows)

        def codegen(context, builder, sig, args):
            return ir.Constant(context.get_value_type(result), None)

        return result(isa), codegen

    return zero


def _each(builder, sums, per_token: int):
    """Row, token and the `per_token` registers of every pair of them in a tile."""
    rows, registers = sums.type.count, sums.type.element.count
    for r in range(rows):
        for t in range(registers // per_token):
            yield r, t, [builder.extract_value(sums, [r, t * per_token + i]) for i in range(per_token)]


def _load(builder, address, offset: int, pointee: ir.Type):
    at = builder.add(address, ir.Constant(address.type, offset))
    return builder.load(builder.inttoptr(at, pointee.as_pointer()), align=1)


def _shifted(builder, address, stride, count: int):
    """address, address + stride, ..."""
    for _ in range(count):
        yield address
        address = builder.add(address, stride)


BYTE = ir.IntType(8)
FLOATS, INTS, BYTES = vec.vector(16, "f32"), vec.vector(16, "i32"), vec.vector(16, "i8")


def _all_lanes(vector: ir.VectorType, value: int):
    return ir.Constant(vector, [value] * vector.count)


def _from_bf16(builder, row):
    """Even and odd columns of 32, as float32."""
    pairs = _load(builder, row, 0, INTS)
    even, odd = builder.shl(pairs, _all_lanes(INTS, 16)), builder.and_(pairs, _all_lanes(INTS, 0xFFFF0000))
    return [builder.bitcast(even, FLOATS), builder.bitcast(odd, FLOATS)]


def _from_int8(builder, row):
    """Columns 0-15 and 16-31, as float32."""
    return [builder.sitofp(_load(builder, row, offset, BYTES), FLOATS) for offset in (0, 16)]


@intrinsic
def prefetch(typingctx, sums, address):
    """Asks for the cache lines that a tile of several rows needs next, in the order in which they lie.

    Hardware follows one stream of whole rows by itself, but loses two that start anew every other row.
    """

    def codegen(context, builder, sig, args):
        for offset in range(0, 64 * sums.count if sums.count > 1 else 0, 64):
            at = builder.inttoptr(builder.add(args[1], ir.Constant(args[1].type, offset)), BYTE.as_pointer())
            signature = ir.FunctionType(ir.VoidType(), [at.type, *[vec.I32] * 3])
            function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
            builder.call(function, [at, vec.I32(0), vec.I32(2), vec.I32(1)])  # to read, into the second level, data
        return context.get_dummy_value()

    return types.void(sums, address), codegen


def _float_step(widen):
    """step(isa, sums, row, row_stride, x, x_stride): sums + 32 columns of the tile's rows times those of its tokens."""

    @intrinsic
    def step(typingctx, isa, sums, row, row_stride, x, x_stride):
        def codegen(context, builder, sig, args):
            _isa, out, row, row_stride, x, x_stride = args
            weights = [widen(builder, at) for at in _shifted(builder, row, row_stride, sums.count)]
            for t, at in enumerate(_shifted(builder, x, x_stride, sums.dtype.count // 2)):
                for half in range(2):
                    columns = _load(builder, at, 64 * half, FLOATS)
                    for r in range(sums.count):
                        where = [r, 2 * t + half]
                        operands = [weights[r][half], columns, builder.extract_value(out, where)]
                        new = vec.call(builder, "llvm.fma.v16f32", FLOATS, operands)
                        out = builder.insert_value(out, new, where)
            return out

        return sums(isa, sums, row, row_stride, x, x_stride), codegen

    return step


@intrinsic
def fixed_step(typingctx, isa, sums, row, row_stride, x, x_stride):
    """sums + 64 columns of the tile's rows times the three planes of its tokens."""

    def codegen(context, builder, sig, args):
        _isa, out, row, row_stride, x, x_stride = args
        register = sums.dtype.dtype.n * 4
        vector = vec.vector(sums.dtype.dtype.n, "i32")
        for offset in range(0, 64, register):
            rows = [_load(builder, at, offset, vector) for at in _shifted(builder, row, row_stride, sums.count)]
            for t, at in enumerate(_shifted(builder, x, x_stride, sums.dtype.count // 3)):
                for plane in range(3):
                    columns = _load(builder, at, 64 * plane + offset, vector)
                    for r in range(sums.count):
                        where = [r, 3 * t + plane]
                        new = emit_dot4(builder, isa.isa, builder.extract_value(out, where), columns, rows[r])
                        out = builder.insert_value(out, new, where)
        return out

    return sums(isa, sums, row, row_stride, x, x_stride), codegen


def _sum(builder, v):
    """The sum of all lanes, halves onto halves."""
    n = v.type.count
    while n > 1:
        n //= 2
        low, high = (vec.lanes_from(builder, v, v, first, n) for first in (0, n))
        v = builder.fadd(low, high) if v.type.element == ir.FloatType() else builder.add(low, high)
    return builder.extract_element(v, vec.I32(0))


def _float_result(builder, registers, r, scales, sums, unit):
    total = _sum(builder, builder.fadd(*registers))
    return total if scales is None else builder.fmul(total, _load(builder, scales, 4 * r, ir.FloatType()))


def _fixed_result(builder, registers, r, scales, sums, unit):
    """((65536 * high + 256 * middle + low) - 2^23 * sum of the row) * unit * scale: exact up to the conversion."""
    i64 = ir.IntType(64)
    total = None
    for plane in registers:
        wide = builder.sext(plane, ir.VectorType(i64, plane.type.count))
        total = wide if total is None else builder.add(builder.shl(total, _all_lanes(wide.type, 8)), wide)
    offset = builder.mul(builder.sext(_load(builder, sums, 4 * r, vec.I32), i64), i64(ZERO))
    value = builder.sitofp(builder.sub(_sum(builder, total), offset), ir.FloatType())
    value = builder.fmul(value, _load(builder, unit, 0, ir.FloatType()))
    return builder.fmul(value, _load(builder, scales, 4 * r, ir.FloatType()))


def _store(result, per_token: int, scaled: bool):
    """store(sums, scales, row_sums, x, x_stride, y, y_stride): the results of a tile. Strides in bytes."""

    @intrinsic
    def store(typingctx, tile, scales, sums, x, x_stride, y, y_stride):
        def codegen(context, builder, sig, args):
            out, scales, sums, x, x_stride, y, y_stride = args
            tokens = tile.dtype.count // per_token
            units, columns = (list(_shifted(builder, *pair, tokens)) for pair in ((x, x_stride), (y, y_stride)))
            for r, t, registers in _each(builder, out, per_token):
                value = result(builder, registers, r, scales if scaled else None, sums, units[t])
                at = builder.add(columns[t], ir.Constant(y.type, 4 * r))
                builder.store(value, builder.inttoptr(at, value.type.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(tile, scales, sums, x, x_stride, y, y_stride), codegen

    return store


def _product(zero, zero_one, step, columns, column_bytes, x_offset, x_bytes, store, per_token):
    """product(...): rows first .. last - 1 times M tokens, in tiles as large as `zero`, and by `zero_one` what is left.

    `step` covers so many columns of the rows, and x_bytes of the activations, which start at x_offset.
    """

    @njit(**OPTIONS)
    def tile(isa, sums, n, m, rows, K, scales, row_sums, x, x_stride, y, y_stride):
        row, token = rows + n * K * column_bytes, x + m * x_stride
        at, steps = token + x_offset, K // columns
        ahead = row + len(sums) * K * column_bytes
        for _part in range(2):  # whole steps, then the last columns
            for _step in range(steps):
                sums = step(isa, sums, row, K * column_bytes, at, x_stride)
                prefetch(sums, ahead)
                row += columns * column_bytes
                ahead += columns * column_bytes * len(sums)
                at += x_bytes
            row, steps = rows + ((n + 1) * K - columns) * column_bytes, min(K % columns, 1)
        to = y + 4 * (m * y_stride + n)
        store(sums, scales + 4 * n, row_sums + 4 * n, token, x_stride, to, 4 * y_stride)

    @njit(**OPTIONS)
    def product(isa, rows, K, scales, row_sums, x, x_stride, M, y, y_stride, first, last):
        tile_rows, tokens = len(zero(isa)), len(zero(isa)[0]) // per_token
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            tiled_rows, tiled_tokens = stop - (stop - start) % tile_rows, M - M % tokens
            for m in range(0, tiled_tokens, tokens):
                for n in range(start, tiled_rows, tile_rows):
                    tile(isa, zero(isa), n, m, rows, K, scales, row_sums, x, x_stride, y, y_stride)
            for n in range(start, stop):
                for m in range(tiled_tokens if n < tiled_rows else 0, M):
                    tile(isa, zero_one(isa), n, m, rows, K, scales, row_sums, x, x_stride, y, y_stride)

    return product


def _float_sums(isa):
    return 2 if isa == "vnni512" else 1, 2 * TILE_TOKENS, 16, "f32"


def _fixed_sums(isa):
    return 2, 3 * TILE_TOKENS, TILES[isa].lanes, "i32"


_floats = (_zero_sums(_float_sums), _zero_sums(lambda isa: (1, 2, 16, "f32")))
_fixed = (_zero_sums(_fixed_sums), _zero_sums(lambda isa: (1, 3, 16, "i32")))
rows_bf16 = _product(*_floats, _float_step(_from_bf16), 32, 2, 0, 128, _store(_float_result, 2, False), 2)
rows_int8 = _product(*_floats, _float_step(_from_int8), 32, 1, 0, 128, _store(_float_result, 2, True), 2)
rows_fixed = _product(*_fixed, fixed_step, 64, 1, PLANES, 192, _store(_fixed_result, 3, True), 3)
