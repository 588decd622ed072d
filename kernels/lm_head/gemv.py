"""The LM head of one token: final RMSNorm, then the product with every row of the embedding table.

    logits[n] = sum_k norm(h)[k] * w[n, k]   (* scale[n] for int8 rows)          float32 throughout

It is the largest read of a decode step and little arithmetic, so the layout is the plain one, a warp a row, and what
counts is loads in flight: a warp loads its next row while it multiplies the present one, and its first row before
`pdl_wait`. Rows go to warps round robin, so that all blocks end together.

    warp      row r           row r + number of warps in the grid       ...
    lane l    16-byte loads l, l + 32, l + 64, ... of the row: 4 (float32), 8 (16 bits) or 16 (int8) columns each
    part      LOADS loads of each lane. A row of more than MAX_LOADS loads a lane is PARTS parts, one after the other

    x_s       norm(h), float32: the columns of a lane's load, 4 at a time ("quad"), lie 32 quads apart, so that
              neighbouring lanes read neighbouring banks: [part, load, quad of the load, lane, 4 columns]
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
from bitnet_numba.kernels.operands import EmbeddingTable, Norm, RowDtype, checked
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, float32, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec

THREADS = 512
BLOCKS_PER_SM = 1  # the whole register file: MAX_LOADS loads in flight for each of 512 threads
MAX_LOADS = 10  # 16-byte loads of a lane in flight


def make_lm_head_gemv(
    arch: int, K: int, dtype: RowDtype, threads: int = THREADS, max_loads: int = MAX_LOADS
) -> Callable[..., None]:
    """The kernel for rows of K columns (a multiple of 32)."""
    load, wait, trigger = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    INT8, BF16, F32, THREADS, WARPS = dtype == "int8", dtype == "bf16", dtype == "f32", threads, threads // WARP
    LOAD_COLUMNS = load_columns(dtype)
    ROW_WORDS = K // WORD_COLUMNS[dtype]
    ROW_LOADS = -(-ROW_WORDS // (4 * WARP))
    PARTS = -(-ROW_LOADS // max_loads)
    LOADS = -(-ROW_LOADS // PARTS)
    W_REGS = 4 * LOADS
    H_QUADS = K // 4
    X_FLOATS = PARTS * LOADS * WARP * LOAD_COLUMNS  # K and zeros
    LOAD_QUADS = LOAD_COLUMNS // 4
    X_QUADS = X_FLOATS // 4
    THREAD_QUADS = -(-X_QUADS // THREADS)
    X_REGS = 4 * THREAD_QUADS
    EXACT = ROW_WORDS == PARTS * LOADS * WARP * 4
    COLUMNS, ZERO = float32(K), float32(0)

    def lm_head_gemv(weight, scale, h, norm, eps, logits, num_rows):
        x_s = ptx.pointer(cuda.shared.array(X_FLOATS, float32, SHARED_ALIGN))
        square_s = ptx.pointer(cuda.shared.array(WARPS, float32))
        w_r = cuda.local.array(W_REGS, int32)  # [LOADS, 4]
        x_r = cuda.local.array(X_REGS, float32)
        n_r = cuda.local.array(X_REGS, float32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        stride = int32(cuda.gridDim.x * WARPS)
        row = int32(warp * cuda.gridDim.x + cuda.blockIdx.x)

        # 1. The first row and the norm's weights, which no launch before this one changes.
        for u in range(LOADS):
            word = int32((u * WARP + lane) * 4)
            if row < num_rows and word < ROW_WORDS:
                put4(w_r, 4 * u, load(weight, row * int64(ROW_WORDS) + word))
            else:
                for i in range(4):
                    w_r[4 * u + i] = int32(0)
        for j in range(THREAD_QUADS):
            quad = int32(tid + j * THREADS)
            for i in range(4):
                n_r[4 * j + i] = ZERO
                x_r[4 * j + i] = ZERO
            if quad < H_QUADS:
                put4(n_r, 4 * j, ptx.load4(norm, quad * 4))
        trigger()
        wait()

        # 2. norm(h), to shared memory.
        squares = ZERO
        for j in range(THREAD_QUADS):
            quad = int32(tid + j * THREADS)
            if quad < H_QUADS:
                put4(x_r, 4 * j, ptx.load4(h, quad * 4))
        for i in range(X_REGS):
            squares = float32(squares + x_r[i] * x_r[i])
        squares = ptx.warp_sum(squares)
        if lane == 0:
            square_s[warp] = squares
        cuda.syncthreads()
        squares = ptx.warp_sum(square_s[lane] if lane < WARPS else ZERO)
        inverse = ptx.div_rn(float32(1), ptx.sqrt_rn(ptx.add_rn(ptx.div_rn(squares, COLUMNS), eps)))
        for j in range(THREAD_QUADS):
            quad = int32(tid + j * THREADS)
            if quad < X_QUADS:
                for i in range(4):
                    x_r[4 * j + i] = ptx.mul_rn(n_r[4 * j + i], ptx.mul_rn(x_r[4 * j + i], inverse))
                wr = int32(
                    (quad // (LOAD_QUADS * WARP) * LOAD_QUADS + quad % LOAD_QUADS) * WARP + quad // LOAD_QUADS % WARP
                )
                ptx.store4(x_s, wr * 4, x_r[4 * j], x_r[4 * j + 1], x_r[4 * j + 2], x_r[4 * j + 3])
        cuda.syncthreads()

        # 3. Products: as soon as a load's words are multiplied, the same load of the next part is under way.
        part = int32(0)
        total = total2 = ZERO
        while row < num_rows:
            next_row, next_part = row, int32(part + 1)
            if next_part == PARTS:
                next_row, next_part = int32(row + stride), int32(0)
            next_word = int32((next_part * (LOADS * WARP) + lane) * 4)
            next_rd = next_row * int64(ROW_WORDS) + next_word
            for u in range(LOADS):
                if F32:
                    x0, x1, x2, x3 = ptx.load4(x_s, ((part * LOADS + u) * WARP + lane) * 4)
                    total = float32(total + ptx.bits_to_float(w_r[4 * u]) * x0)
                    total2 = float32(total2 + ptx.bits_to_float(w_r[4 * u + 1]) * x1)
                    total = float32(total + ptx.bits_to_float(w_r[4 * u + 2]) * x2)
                    total2 = float32(total2 + ptx.bits_to_float(w_r[4 * u + 3]) * x3)
                for i in range(0 if F32 else 4):
                    word = w_r[4 * u + i]
                    if INT8:
                        x0, x1, x2, x3 = ptx.load4(x_s, (((part * LOADS + u) * LOAD_QUADS + i) * WARP + lane) * 4)
                        word = flip_signs(word)
                        total = float32(total + int8_to_float(word, 0) * x0)
                        total2 = float32(total2 + int8_to_float(word, 1) * x1)
                        total = float32(total + int8_to_float(word, 2) * x2)
                        total2 = float32(total2 + int8_to_float(word, 3) * x3)
                    elif i % 2 == 0:
                        x0, x1, x2, x3 = ptx.load4(x_s, (((part * LOADS + u) * LOAD_QUADS + i // 2) * WARP + lane) * 4)
                        total = float32(total + (ptx.bf16_low(word) if BF16 else ptx.f16_low(word)) * x0)
                        total2 = float32(total2 + (ptx.bf16_high(word) if BF16 else ptx.f16_high(word)) * x1)
                    else:
                        total = float32(total + (ptx.bf16_low(word) if BF16 else ptx.f16_low(word)) * x2)
                        total2 = float32(total2 + (ptx.bf16_high(word) if BF16 else ptx.f16_high(word)) * x3)
                word = int32(next_word + u * (WARP * 4))
                if next_row < num_rows and (EXACT or word < ROW_WORDS):
                    put4(w_r, 4 * u, load(weight, next_rd + u * (WARP * 4)))
                elif PARTS > 1:
                    for i in range(4):
                        w_r[4 * u + i] = int32(0)
            if next_part == 0:
                total = ptx.warp_sum(float32(total + total2))
                if lane == 0:
                    logits[row] = ptx.mul_rn(total, scale[row]) if INT8 else total
                total = total2 = ZERO
            row, part = next_row, next_part

    return lm_head_gemv


@cache
def spec(arch: int, K: int, dtype: RowDtype, threads: int = THREADS, max_loads: int = MAX_LOADS) -> KernelSpec:
    """The variant for rows of K columns; `threads` and `max_loads` differ in tests only.

    Raises ValueError unless K is a multiple of 32.
    """
    check_columns(K)
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    signature = (i32, f32 if dtype == "int8" else types.none, f32, f32, types.float32, f32, types.int32)
    kernel = make_lm_head_gemv(arch, K, dtype, threads, max_loads)
    name = f"lm_head_gemv[{K} {dtype} {threads} {max_loads}]"
    return KernelSpec(name, kernel, signature, threads, BLOCKS_PER_SM, wide_loads=2)


def lm_head_gemv(
    device: Device, table: EmbeddingTable, h: DeviceArray, norm: Norm, logits: DeviceArray, *, use_pdl: bool = True
) -> Launch:
    """The launch that computes the logits of one token: norm(h) times every row of the table.

    h float32 [columns]; norm.weight float32 [columns]; logits float32 [vocab_size]. Raises ValueError in one line
    unless columns are a multiple of 32, rows are not ternary, and the operands have these types and at least these
    sizes.
    """
    K, vocab_size = table.columns, table.vocab_size
    problem = f"an LM head of {vocab_size} rows of {K}"
    rows, scale, h, weight, logits = checked(
        "lm_head_gemv",
        problem,
        **table.sizes(),
        h=(h, K, "float32"),
        norm=(norm.weight, K, "float32"),
        logits=(logits, vocab_size, "float32"),
    )
    arguments = (rows, scale, h, weight, norm.eps, logits, vocab_size)
    return device.launch(spec(device.arch, K, table.dtype), device.num_sms * BLOCKS_PER_SM, arguments, use_pdl)
