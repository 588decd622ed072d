"""The LM head of many tokens without tensor cores (before sm_80): x in layout "simt" of `split_norm`, all in float32.

block (b, y)   tokens 8 y .. 8 y + 7
warp           a row of the table, then the row as many further on as the grid has warps
lane           16 bytes of the row at a time, times the same columns of eight tokens; sums meet by shuffles
"""

from collections.abc import Callable
from functools import cache

from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.lm_head.parts import (
    WORD_COLUMNS,
    check_columns,
    flip_signs,
    int8_to_float,
    load_columns,
    put4,
)
from bitnet_numba.kernels.lm_head.split_norm import padded_tokens
from bitnet_numba.kernels.operands import RowDtype
from bitnet_numba.kernels.ptx.base import WARP, float32, int32, int64
from bitnet_numba.kernels.runtime.spec import KernelSpec

THREADS = 256
BLOCKS_PER_SM = 4  # in the grid, for each group of tokens
TOKENS = 8  # of a block: layout "simt" has groups of 8


def make_lm_head_simt(arch: int, K: int, dtype: RowDtype, threads: int = THREADS) -> Callable[..., None]:
    """The kernel for rows of K columns."""
    load, wait, trigger = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    INT8, BF16, F32, WARPS = dtype == "int8", dtype == "bf16", dtype == "f32", threads // WARP
    LOAD_COLUMNS, IN_WORD = load_columns(dtype), WORD_COLUMNS[dtype]
    ROW_WORDS = K // IN_WORD
    LOADS = -(-ROW_WORDS // (4 * WARP))
    COLUMN_WORDS = 2 * WARP * 4  # of x: eight tokens, a column for every lane
    ZERO = float32(0)

    def lm_head_simt(weight, scale, x, logits, num_rows, num_tokens):
        sum_r = cuda.local.array(TOKENS, float32)
        w_r = cuda.local.array(4, int32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        stride = int32(cuda.gridDim.x * WARPS)
        row = int32(warp * cuda.gridDim.x + cuda.blockIdx.x)
        first = int32(cuda.blockIdx.y * TOKENS)
        trigger()
        wait()
        while row < num_rows:
            for j in range(TOKENS):
                sum_r[j] = ZERO
            for u in range(LOADS):
                word = int32((u * WARP + lane) * 4)
                w_r[0], w_r[1], w_r[2], w_r[3] = int32(0), int32(0), int32(0), int32(0)
                if word < ROW_WORDS:
                    put4(w_r, 0, load(weight, row * int64(ROW_WORDS) + word))
                x_rd = int64(cuda.blockIdx.y * LOADS + u) * (LOAD_COLUMNS * COLUMN_WORDS) + lane * 4
                for i in range(LOAD_COLUMNS):
                    word = w_r[i // IN_WORD]
                    if INT8:
                        w = int8_to_float(flip_signs(word), i % 4)
                    elif F32:
                        w = ptx.bits_to_float(word)
                    elif BF16:
                        w = ptx.bf16_low(word) if i % 2 == 0 else ptx.bf16_high(word)
                    else:
                        w = ptx.f16_low(word) if i % 2 == 0 else ptx.f16_high(word)
                    for j in range(2):
                        x0, x1, x2, x3 = ptx.load4(x, x_rd + (2 * i + j) * (WARP * 4))
                        sum_r[4 * j] = float32(sum_r[4 * j] + w * ptx.bits_to_float(x0))
                        sum_r[4 * j + 1] = float32(sum_r[4 * j + 1] + w * ptx.bits_to_float(x1))
                        sum_r[4 * j + 2] = float32(sum_r[4 * j + 2] + w * ptx.bits_to_float(x2))
                        sum_r[4 * j + 3] = float32(sum_r[4 * j + 3] + w * ptx.bits_to_float(x3))
            for j in range(TOKENS):
                total = ptx.warp_sum(sum_r[j])
                if lane == 0 and first + j < num_tokens:
                    logits[int64(first + j) * num_rows + row] = ptx.mul_rn(total, scale[row]) if INT8 else total
            row = int32(row + stride)

    return lm_head_simt


@cache
def spec(arch: int, K: int, dtype: RowDtype, threads: int = THREADS) -> KernelSpec:
    """The variant for rows of K columns; `threads` differs in tests only.

    Raises ValueError unless K is a multiple of 32. Arguments of a launch: rows of the table, their scales or None, x,
    logits float32 [num_tokens, num_rows], num_rows, num_tokens.
    """
    check_columns(K)
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    signature = (i32, f32 if dtype == "int8" else types.none, i32, f32, types.int32, types.int32)
    name = f"lm_head_simt[{K}, {dtype}, {threads}]"
    return KernelSpec(name, make_lm_head_simt(arch, K, dtype, threads), signature, threads, wide_loads=1)


def grid(num_sms: int, num_tokens: int) -> tuple[int, int]:
    """Blocks of a launch: for rows of the table, and for groups of tokens."""
    return BLOCKS_PER_SM * num_sms, padded_tokens("simt", num_tokens) // TOKENS
