"""Logits: rows of floats or scaled int8 times float32 activations. Also linears that are not quantised.

A thread reads its rows one after the other, as one stream, and multiplies each by all tokens. `prepare_...` brings a
token's activations into the order in which rows are read, so that no row has to be shuffled:

    bfloat16      32 columns a step: an int32 lane holds two columns, of which << 16 makes the even one a float32 and
                  & 0xffff0000 the odd one. Activations: 16 even columns, then 16 odd ones. Two sums of 16 lanes.
    float16, 32   32 columns a step: two loads of 16, converted to float32. Two sums of 16 lanes.
    int8, float   32 columns a step, converted to float32. Two sums of 16 lanes.
    int8, fixed   64 columns a step, where a dot product takes unsigned bytes (vnni512, vnni256, i8mm). Activations of
                  24 bits, x = unit * (65536 * high + 256 * middle + low - 2^23): three dot products with the row as it
                  lies, three sums. Converting the row to float32 would take twice as many instructions.

If the columns are not whole steps, one more step covers the last columns of the row; those of them that an earlier step
has had meet activations of 0. So no byte beyond a row is read (rows lie in a mapped file), and any number of columns
will do from MIN_COLUMNS on.

A token's logits have the same bits whatever the other tokens are: a tile of rows and tokens (`row_tiles`) only lets
several sums share what is loaded.

Precision: bfloat16, float16 and int8 are exact in float32, so the errors are those of sums of float32. In fixed point
a column is off by unit / 2 at most, 2^-24 of the largest, as float32's rounding of that column is; the sum is exact.
"""

import numpy as np
from numba import njit
from numba.extending import overload

from bitnet_numba.kernels.cpu import vec
from bitnet_numba.kernels.cpu.dot import dot4
from bitnet_numba.kernels.cpu.memory import load_f32, load_i8, store_f32, store_i8, store_i32
from bitnet_numba.kernels.cpu.row_tiles import BF16, F16, F32_ROWS, INT8, INT8_FIXED, PLANES, ZERO, row_product
from bitnet_numba.kernels.cpu.vec import OPTIONS

MIN_COLUMNS = 64  # rows with fewer columns are padded with zeros when they are loaded
FIXED = ("vnni512", "vnni256", "i8mm")  # instruction sets that multiply int8 rows in fixed point
# What the largest activation becomes in fixed point: below 2^23 by more than the rounding of the quotient.
LARGEST = 2.0**23 - 8
rows_int8, rows_int8_fixed = row_product(INT8), row_product(INT8_FIXED)
FLOAT_ROWS = {"bf16": row_product(BF16), "f16": row_product(F16), "f32": row_product(F32_ROWS)}


def prepared_bytes(K: int) -> int:
    """Bytes of a token's prepared activations, of any kind; a multiple of 64, to which they are best aligned."""
    return 256 * -(-max(K, MIN_COLUMNS) // 64) + PLANES


@njit(**OPTIONS)
def prepare_bf16(x, K, prepared):
    """Brings float32 [K] at address x into the order of bfloat16 rows, at `prepared`."""
    for step in range(steps_of(K, 32)):
        first = min(32 * step, max(K, MIN_COLUMNS) - 32)
        for i in range(32):
            column = first + 2 * (i % 16) + i // 16
            store_f32(prepared, 4 * (32 * step + i), column_of(x, K, column, 32 * step))


def prepare_int8(isa, x, K, prepared):
    """Brings float32 [K] at address x into the order of `head_int8`, at `prepared`."""
    raise NotImplementedError("only compiled functions can call this")


@overload(prepare_int8)
def _prepare_int8(isa, x, K, prepared):
    kernel = prepare_fixed if isa.isa in FIXED else prepare_float
    return lambda isa, x, K, prepared: kernel(x, K, prepared)


@njit(**OPTIONS)
def prepare_float(x, K, prepared):
    """For rows of float16, float32, or int8: blocks of 32 columns in order; the last one ends at the last column."""
    for step in range(steps_of(K, 32)):
        first = min(32 * step, max(K, MIN_COLUMNS) - 32)
        for i in range(32):
            store_f32(prepared, 4 * (32 * step + i), column_of(x, K, first + i, 32 * step))


@njit(**OPTIONS)
def prepare_fixed(x, K, prepared):
    """The unit, then blocks of 64 columns: high, middle and low bytes. NaN or infinity makes the unit NaN."""
    largest, nan = np.float32(0), np.float32(0)
    for k in range(K):
        v = load_f32(x, 4 * k)
        largest = max(largest, abs(v))
        nan += v * np.float32(0)
    unit = largest / np.float32(LARGEST)
    store_f32(prepared, 0, unit + nan)
    for step in range(steps_of(K, 64)):
        first = min(64 * step, max(K, MIN_COLUMNS) - 64)
        for i in range(64):
            fixed = 0  # of a column that another step has
            if first + i >= 64 * step:
                quotient = np.rint(column_of(x, K, first + i, 0) / unit)  # NaN if all activations are 0
                fixed = ZERO + (int(quotient) if abs(quotient) < ZERO else 0)
            at = prepared + PLANES + 192 * step + i
            store_i8(at, 0, fixed >> 16)
            store_i8(at, 64, fixed >> 8)
            store_i8(at, 128, fixed)


@njit(**OPTIONS)
def steps_of(K, columns):
    """Steps of so many columns over a row."""
    return (max(K, MIN_COLUMNS) + columns - 1) // columns


@njit(**OPTIONS)
def column_of(x, K, column, first):
    """A column of float32 [K], or 0 where it is before `first` or beyond K."""
    return load_f32(x, 4 * column) if first <= column < K else np.float32(0)


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
            total += load_i8(p, k)
        store_i32(sums, 4 * n, total)


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

    product = rows_int8_fixed if isa.isa in FIXED else rows_int8
    return kernel
