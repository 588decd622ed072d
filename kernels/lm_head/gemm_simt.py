"""TODO docstring."""

from collections.abc import Callable

from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.lm_head.gemv import BIAS, OFFSET, SIGNS
from bitnet_numba.kernels.lm_head.split_norm import ROWS_TILE
from bitnet_numba.kernels.ptx.base import WARP, float32, int32, int64

ROWS_THREADS = 256  # of the kernel without tensor cores


def make_head_rows(arch: int, K: int, int8: bool, threads: int = ROWS_THREADS) -> Callable[..., None]:
    """The kernel without tensor cores: a warp a row of the vocabulary, eight tokens (blockIdx.y) at a time."""
    load, wait, release = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    INT8, WARPS = int8, threads // WARP
    PER_LOAD, PER_WORD = (16, 4) if int8 else (8, 2)
    ROW_WORDS = K // PER_WORD
    LOADS = -(-ROW_WORDS // (4 * WARP))
    COLUMN_WORDS = 2 * WARP * 4  # of x: eight tokens, a column for every lane
    ZERO = float32(0)

    def head_rows(weight, scale, x, logits, rows, tokens):
        sum_r = cuda.local.array(8, float32)
        w_r = cuda.local.array(4, int32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        stride = int32(cuda.gridDim.x * WARPS)
        row = int32(warp * cuda.gridDim.x + cuda.blockIdx.x)
        first = int32(cuda.blockIdx.y * ROWS_TILE)
        release()
        wait()
        while row < rows:
            for j in range(8):
                sum_r[j] = ZERO
            for u in range(LOADS):
                word = int32((u * WARP + lane) * 4)
                w_r[0], w_r[1], w_r[2], w_r[3] = int32(0), int32(0), int32(0), int32(0)
                if word < ROW_WORDS:
                    w_r[0], w_r[1], w_r[2], w_r[3] = load(weight, row * int64(ROW_WORDS) + word)
                x_rd = int64(cuda.blockIdx.y * LOADS + u) * (PER_LOAD * COLUMN_WORDS) + lane * 4
                for i in range(PER_LOAD):
                    word = w_r[i // PER_WORD]
                    if INT8:
                        bits = ptx.byte_permute(int32(word ^ SIGNS), BIAS, 0x7540 + i % 4)
                        w = float32(ptx.bits_to_float(bits) - OFFSET)
                    else:
                        w = ptx.bf16_low(word) if i % 2 == 0 else ptx.bf16_high(word)
                    for j in range(2):
                        x0, x1, x2, x3 = ptx.load4(x, x_rd + (2 * i + j) * (WARP * 4))
                        sum_r[4 * j] = float32(sum_r[4 * j] + w * ptx.bits_to_float(x0))
                        sum_r[4 * j + 1] = float32(sum_r[4 * j + 1] + w * ptx.bits_to_float(x1))
                        sum_r[4 * j + 2] = float32(sum_r[4 * j + 2] + w * ptx.bits_to_float(x2))
                        sum_r[4 * j + 3] = float32(sum_r[4 * j + 3] + w * ptx.bits_to_float(x3))
            for j in range(8):
                total = ptx.warp_sum(sum_r[j])
                if lane == 0 and first + j < tokens:
                    logits[int64(first + j) * rows + row] = ptx.mul_rn(total, scale[row]) if INT8 else total
            row = int32(row + stride)

    return head_rows
