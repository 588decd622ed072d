"""The head: final RMSNorm, then one row of bfloat16 or scaled int8 weights per token of the vocabulary.

    logits[n] = sum_k norm(h)[k] * w[n, k]   (* scale[n] for int8 rows)          float32 throughout

It is the largest read of a step (657 MB of 1.18 GB for 2B4T), and nothing else: 4 lane operations a byte, against a
budget of 28. So the layout is the plain one, a warp a row, and what matters is loads in flight: each warp asks for its
next row as it multiplies the one it has, and asks for its first before `pdl_wait`. The vector stays in shared memory
as float32. Rows go to warps round robin, so that all blocks end together. Measured on an H200: 161 us for bfloat16 rows
of 2B4T, 4.07 TB/s of 4.23; 81 us for int8. 256 to 1024 threads and 3 to 10 loads in flight all come within 3 %.

    warp      row r           row r + all warps       ...
    lane l    16 bytes l, l + 32, l + 64, ... of the row: 8 (bfloat16) or 16 (int8) columns each
"""

from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, float32, int32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import BLOCK_COLS

THREADS = 512
BLOCKS_PER_SM = 1  # the whole register file: 10 loads in flight for each of 512 threads
SIGNS = np.int32(-0x7F7F7F80)  # flips the sign bit of four int8: b -> b + 128 as uint8
BIAS = 0x4B000000  # the float32 2^23, whose low bits count ones
OFFSET = np.float32(2**23 + 128)
MAX_LOADS = 10  # of 16 bytes that a lane has in flight; longer rows go piece by piece


def make_head(
    arch: int, K: int, int8: bool, threads: int = THREADS, most_loads: int = MAX_LOADS
) -> Callable[..., None]:
    """The kernel for rows of K columns (a multiple of 32), bfloat16 or int8."""
    load, wait, release = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    INT8, THREADS, WARPS = int8, threads, threads // WARP
    PER_LOAD = 16 if int8 else 8  # columns
    ROW_WORDS = K // (4 if int8 else 2)
    ROW_LOADS = -(-ROW_WORDS // (4 * WARP))
    PIECES = -(-ROW_LOADS // most_loads)
    LOADS = -(-ROW_LOADS // PIECES)
    W_REGS = 4 * LOADS
    CHUNKS = K // 4
    X_FLOATS = PIECES * LOADS * WARP * PER_LOAD
    QUADS = PER_LOAD // 4  # 16-byte pieces of x that one load of weights meets
    FILL = X_FLOATS // 4
    FILLS = -(-FILL // THREADS)
    X_REGS = 4 * FILLS
    EXACT = ROW_WORDS == PIECES * LOADS * WARP * 4
    COLUMNS, ZERO, ONE = float32(K), float32(0), float32(1)

    def head(weight, scale, h, norm, eps, logits, rows):
        x_s = ptx.pointer(cuda.shared.array(X_FLOATS, float32, SHARED_ALIGN))
        square_s = ptx.pointer(cuda.shared.array(WARPS, float32))
        w_r = cuda.local.array(W_REGS, int32)
        x_r = cuda.local.array(X_REGS, float32)
        n_r = cuda.local.array(X_REGS, float32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        stride = int32(cuda.gridDim.x * WARPS)
        row = int32(warp * cuda.gridDim.x + cuda.blockIdx.x)

        for u in range(LOADS):
            word = int32((u * WARP + lane) * 4)
            if row < rows and word < ROW_WORDS:
                a, b, c, d = load(weight, row * types.int64(ROW_WORDS) + word)
                w_r[4 * u], w_r[4 * u + 1], w_r[4 * u + 2], w_r[4 * u + 3] = a, b, c, d
            else:
                for i in range(4):
                    w_r[4 * u + i] = int32(0)
        for j in range(FILLS):
            chunk = int32(tid + j * THREADS)
            for i in range(4):
                n_r[4 * j + i] = ZERO
                x_r[4 * j + i] = ZERO
            if chunk < CHUNKS:
                n_r[4 * j], n_r[4 * j + 1], n_r[4 * j + 2], n_r[4 * j + 3] = ptx.load4(norm, chunk * 4)
        release()
        wait()

        squares = ZERO
        for j in range(FILLS):
            chunk = int32(tid + j * THREADS)
            if chunk < CHUNKS:
                x_r[4 * j], x_r[4 * j + 1], x_r[4 * j + 2], x_r[4 * j + 3] = ptx.load4(h, chunk * 4)
        for i in range(X_REGS):
            squares = float32(squares + x_r[i] * x_r[i])
        squares = ptx.warp_sum(squares)
        if lane == 0:
            square_s[warp] = squares
        cuda.syncthreads()
        squares = ptx.warp_sum(square_s[lane] if lane < WARPS else ZERO)
        inverse = ptx.div_rn(ONE, ptx.sqrt_rn(ptx.add_rn(ptx.div_rn(squares, COLUMNS), eps)))
        for j in range(FILLS):
            chunk = int32(tid + j * THREADS)
            if chunk < FILL:
                for i in range(4):
                    x_r[4 * j + i] = ptx.mul_rn(n_r[4 * j + i], ptx.mul_rn(x_r[4 * j + i], inverse))
                # A lane's columns lie 32 pieces apart, so that neighbouring lanes read neighbouring banks.
                place = int32((chunk // (QUADS * WARP) * QUADS + chunk % QUADS) * WARP + chunk // QUADS % WARP)
                ptx.store4(x_s, place * 4, x_r[4 * j], x_r[4 * j + 1], x_r[4 * j + 2], x_r[4 * j + 3])
        cuda.syncthreads()

        piece = int32(0)
        total = total2 = ZERO
        while row < rows:
            next_row, next_piece = row, int32(piece + 1)
            if next_piece == PIECES:
                next_row, next_piece = int32(row + stride), int32(0)
            next_word = int32((next_piece * (LOADS * WARP) + lane) * 4)
            next_rd = next_row * types.int64(ROW_WORDS) + next_word
            for u in range(LOADS):
                for i in range(4):
                    word = w_r[4 * u + i]
                    if INT8:
                        x0, x1, x2, x3 = ptx.load4(x_s, (((piece * LOADS + u) * QUADS + i) * WARP + lane) * 4)
                        word = int32(word ^ SIGNS)
                        total = float32(
                            total + float32(ptx.bits_to_float(ptx.byte_permute(word, BIAS, 0x7540)) - OFFSET) * x0
                        )
                        total2 = float32(
                            total2 + float32(ptx.bits_to_float(ptx.byte_permute(word, BIAS, 0x7541)) - OFFSET) * x1
                        )
                        total = float32(
                            total + float32(ptx.bits_to_float(ptx.byte_permute(word, BIAS, 0x7542)) - OFFSET) * x2
                        )
                        total2 = float32(
                            total2 + float32(ptx.bits_to_float(ptx.byte_permute(word, BIAS, 0x7543)) - OFFSET) * x3
                        )
                    else:
                        if i % 2 == 0:
                            x0, x1, x2, x3 = ptx.load4(x_s, (((piece * LOADS + u) * QUADS + i // 2) * WARP + lane) * 4)
                            total = float32(total + ptx.bf16_low(word) * x0)
                            total2 = float32(total2 + ptx.bf16_high(word) * x1)
                        else:
                            total = float32(total + ptx.bf16_low(word) * x2)
                            total2 = float32(total2 + ptx.bf16_high(word) * x3)
                word = int32(next_word + u * (WARP * 4))
                if next_row < rows and (EXACT or word < ROW_WORDS):
                    a, b, c, d = load(weight, next_rd + u * (WARP * 4))
                    w_r[4 * u], w_r[4 * u + 1], w_r[4 * u + 2], w_r[4 * u + 3] = a, b, c, d
                elif PIECES > 1:
                    for i in range(4):
                        w_r[4 * u + i] = int32(0)
            if next_piece == 0:
                total = ptx.warp_sum(float32(total + total2))
                if lane == 0:
                    logits[row] = ptx.mul_rn(total, scale[row]) if INT8 else total
                total = total2 = ZERO
            row, piece = next_row, next_piece

    return head


def spec(arch: int, K: int, int8: bool, threads: int = THREADS, most_loads: int = MAX_LOADS) -> KernelSpec:
    """The compiled form for rows of K columns; `threads` and `most_loads` only for tests.

    Raises ValueError unless K is a multiple of 32.
    """
    if K < 1 or K % BLOCK_COLS:
        raise ValueError(f"head rows must have a multiple of {BLOCK_COLS} columns, not {K}")
    f32, i32 = types.float32, types.int32
    pointer_to = types.CPointer
    scale = pointer_to(f32) if int8 else types.none
    signature = (pointer_to(i32), scale, pointer_to(f32), pointer_to(f32), f32, pointer_to(f32), i32)
    kernel = make_head(arch, K, int8, threads, most_loads)
    name = f"head[{K} {'int8' if int8 else 'bf16'} {threads} {most_loads}]"
    return KernelSpec(name, kernel, signature, threads, BLOCKS_PER_SM, wide_loads=2)


def head(
    device: Device,
    weight: DeviceArray,
    scale: DeviceArray | None,
    h: DeviceArray,
    norm: DeviceArray,
    eps: float,
    logits: DeviceArray,
    rows: int,
    K: int,
    use_pdl: bool = True,
) -> Launch:
    """The launch that scores every token: logits = norm(h) . weight rows.

    weight uint16 (bfloat16 bits) or int8 [rows, K]; scale float32 [rows] for int8 rows, else None; h, norm float32 [K];
    logits float32 [rows]. Raises ValueError with the sizes if they do not fit together.
    """
    int8 = weight.dtype == np.int8
    if int8 == (scale is None):
        raise ValueError(f"head: {weight.dtype} rows {'need' if int8 else 'take no'} scales")
    sizes = {"weight": (weight, rows * K), "h": (h, K), "norm": (norm, K), "logits": (logits, rows)}
    for name, (array, size) in sizes.items():
        if array.size < size:
            raise ValueError(f"head: {name} holds {array.size} elements, {size} are needed")
    arguments = (weight, scale, h, norm, eps, logits, rows)
    return device.launch(spec(device.arch, K, int8), device.num_sms * BLOCKS_PER_SM, arguments, use_pdl)
