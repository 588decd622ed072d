"""A token's row of the embedding, in any of `layout.ROW_FORMATS`, as float32."""

import numpy as np
from numba import njit

from bitnet_numba.kernels.cpu.gemv import BLOCK_BYTES
from bitnet_numba.kernels.cpu.gemv_groups import SCALE_BYTES
from bitnet_numba.kernels.cpu.layout import BF16, F16, INT8, TERNARY
from bitnet_numba.kernels.cpu.memory import load_f32, load_i8, load_i32, load_u16, store_f32, store_i32
from bitnet_numba.kernels.cpu.vec import HALF_UNIT, OPTIONS
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, CODE_OFFSET, GROUP_COLS, WORD_CODES

UNIT = np.float32(HALF_UNIT)


@njit(**OPTIONS)
def row(model, token, x):
    """A token's row, float32 [hidden] to address x."""
    K = model.hidden
    if model.embed_format == TERNARY:
        ternary_row(model.embed, model.embed_scale, token, K, x)
    elif model.embed_format == INT8:
        at, scale = model.embed + token * K, load_f32(model.embed_scale, 4 * token)
        for i in range(K):
            store_f32(x, 4 * i, np.float32(load_i8(at, i)) * scale)
    elif model.embed_format == BF16:
        at = model.embed + token * K * 2
        for i in range(K):
            store_i32(x, 4 * i, load_u16(at, 2 * i) << 16)
    elif model.embed_format == F16:
        at = model.embed + token * K * 2
        for i in range(K):
            half(load_u16(at, 2 * i), x + 4 * i)
    else:
        at = model.embed + token * K * 4
        for i in range(K):
            store_f32(x, 4 * i, load_f32(at, 4 * i))


@njit(**OPTIONS)
def half(bits, x):
    """The bits of a finite float16 number as float32 to address x; see `vec.emit_halves`. Returns it, too."""
    store_i32(x, 0, (bits & 0x7FFF) << 13 | (bits & 0x8000) << 16)
    value = load_f32(x, 0) * UNIT
    store_f32(x, 0, value)
    return value


@njit(**OPTIONS)
def ternary_row(words, scales, n, K, x):
    """Row n of a packed matrix with group scales, float32 [K] to address x; see `packing` for where it is."""
    row_block, r = n // BLOCK_ROWS, n % BLOCK_ROWS
    groups, blocks = (K + GROUP_COLS - 1) // GROUP_COLS, (K + BLOCK_COLS - 1) // BLOCK_COLS
    words += row_block * blocks * BLOCK_BYTES + 4 * (WORD_CODES * (r // 8) + r % 8)
    scales += row_block * groups * SCALE_BYTES + 2 * r
    for k in range(K):
        at = k // BLOCK_COLS * BLOCK_BYTES + 32 * (k % BLOCK_COLS // WORD_CODES)
        pair = k % 4 * 4 + k % WORD_CODES // 4
        code = load_i32(words, at) >> (2 * pair) & 3
        scale = half(load_u16(scales, k // GROUP_COLS * SCALE_BYTES), x + 4 * k)
        store_f32(x, 4 * k, np.float32(code - CODE_OFFSET) * scale)
