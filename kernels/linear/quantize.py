"""RMSNorm and absmax quantisation of whole rows, for products of many tokens.

    n = w * (x / sqrt(mean(x^2) + eps)), or x itself        (Zhang and Sennrich, 2019)
    s = 127 / max(max|n|, 1e-5), q = rint(n * s), half to even          as in `bitnet_numba.quantize`

A step of one token does not use it: there the matrix-vector product quantises its input itself (see w2a8_gemv),
because a launch costs more than the vector. For M tokens a block owns a row; its values stay in registers between the
two reductions, so that each is read once: 4 M K bytes in, M K out.

    block = token     thread t: columns 4 t .. 4 t + 3, 4 (t + T) .., ...    16 bytes in, one word of four q out
                      (rows that are no multiple of 4 long: columns t, t + T, ...)

T is chosen so that a thread has 16 values, or more if 1024 threads are not enough. Measured on an H200 for 8, 512 and
1024 rows, us: of 2560 columns 1.6, 3.2, 4.3 with 160 threads and 2.0, 5.6, 10.5 with 640; of 6912 columns 2.2, 6.3,
11.5 with 448, 2.9, 11.7, 22.7 with 896, and 2.3, 6.1, 9.2 with 288.

The squares are summed in float64 and the mean is rounded once: the result does not depend on how the work is split, so
that a row gives the same q whatever the block size. Every other operation is the definition's, in its order.
Products and sums of q are exact, so the activations' sum is carried as int32 for the `+2` correction of `packing`.
A row that holds NaN gets s = NaN, so that all that is made of it is NaN; its q may be anything.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import WARP, float32, float64, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import BLOCK_COLS
from bitnet_numba.quantize import EPSILON, INT8_MAX

MAX_COLUMNS = 28 * 1024  # that the registers of a block hold
MAX_THREADS = 1024
VALUES = 16  # that a thread has at best
MAX_EARLY_LOADS = 16  # weights in a thread's registers beside the row, loaded before that is there
ROUNDER = float32(1.5 * 2**23)  # added to a small number, leaves it rounded, half to even, in the low bits
ALL_ONES = 0x01010101
MAGNITUDE = 0x7FFFFFFF  # of a float32's bits: all but the sign


def make_norm_quant(arch: int, K: int, norm: bool, threads: int) -> Callable[..., None]:
    """The kernel for rows of K columns. q is int32 words of four where K is a multiple of 4, else int8."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    WIDE = K % 4 == 0
    EACH = 4 if WIDE else 1  # columns of a piece
    PIECES, PADDED = K // EACH, -(-K // BLOCK_COLS) * BLOCK_COLS // EACH
    TURNS, WARPS = -(-PIECES // threads), threads // WARP
    HELD = TURNS * EACH  # values of a thread
    EARLY = norm and HELD <= MAX_EARLY_LOADS
    W_REGS = HELD if EARLY else EACH
    NORM, COLUMNS, STEP = norm, K, np.int32(threads)
    ZERO, ONE, LEAST, MOST = float32(0), float32(1), float32(EPSILON), float32(INT8_MAX)

    def norm_quant(x, weight, eps, q, s, total):
        square_s = ptx.pointer(cuda.shared.array(WARPS, float64))
        max_s = ptx.pointer(cuda.shared.array(WARPS, int32))
        sum_s = ptx.pointer(cuda.shared.array(WARPS, int32))
        v_r = cuda.local.array(HELD, float32)
        w_r = cuda.local.array(W_REGS, float32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        row = int64(cuda.blockIdx.x)
        x_rd, q_wr = row * COLUMNS, row * PADDED
        if EARLY:
            for t in range(TURNS):
                piece = int32(tid + t * threads)
                for j in range(EACH):
                    w_r[t * EACH + j] = ZERO
                if piece < PIECES:
                    if WIDE:
                        i = 4 * t
                        w_r[i], w_r[i + 1], w_r[i + 2], w_r[i + 3] = ptx.load4(weight, 4 * piece)
                    else:
                        w_r[t] = weight[piece]
        release()
        wait()

        for t in range(TURNS):
            piece = int32(tid + t * threads)
            for j in range(EACH):
                v_r[t * EACH + j] = ZERO
            if piece < PIECES:
                if WIDE:
                    i = 4 * t
                    v_r[i], v_r[i + 1], v_r[i + 2], v_r[i + 3] = ptx.load4(x, x_rd + 4 * piece)
                else:
                    v_r[t] = x[x_rd + piece]
        if NORM:
            squares = float64(0)
            for i in range(HELD):
                squares += float64(ptx.mul_rn(v_r[i], v_r[i]))
            for step in range(5):
                squares += ptx.shuffle_xor(squares, 1 << step)
            if lane == 0:
                square_s[warp] = squares
            cuda.syncthreads()
            squares = float64(0)
            for i in range(WARPS):
                squares += square_s[i]
            mean = float32(squares / float64(COLUMNS))
            inverse = ptx.div_rn(ONE, ptx.sqrt_rn(ptx.add_rn(mean, eps)))
            for t in range(TURNS):
                piece = int32(tid + t * threads)
                if EARLY:
                    for j in range(EACH):
                        i = t * EACH + j
                        v_r[i] = ptx.mul_rn(w_r[i], ptx.mul_rn(v_r[i], inverse))
                elif piece < PIECES:
                    if WIDE:
                        w_r[0], w_r[1], w_r[2], w_r[3] = ptx.load4(weight, 4 * piece)
                    else:
                        w_r[0] = weight[piece]
                    for j in range(EACH):
                        i = t * EACH + j
                        v_r[i] = ptx.mul_rn(w_r[j], ptx.mul_rn(v_r[i], inverse))
        # As bits, which order |v| as the numbers do and put NaN above all: a maximum of floats would drop it.
        most = int32(0)
        for i in range(HELD):
            most = max(most, int32(ptx.float_to_bits(v_r[i]) & MAGNITUDE))
        most = ptx.warp_max(most)
        if lane == 0:
            max_s[warp] = most
        cuda.syncthreads()
        for i in range(WARPS):
            most = max(most, max_s[i])
        largest = ptx.bits_to_float(uint32(most))
        scale = ptx.mul_rn(ptx.div_rn(ONE, LEAST if largest < LEAST else largest), MOST)
        added = int32(0)
        # No clamp: |v| * scale is at most 127 (1 + 2^-22), which rounds to 127. Padding holds zeros.
        for t in range(TURNS):
            piece = int32(tid + t * threads)
            if WIDE:
                q0 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(v_r[4 * t], scale), ROUNDER))
                q1 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(v_r[4 * t + 1], scale), ROUNDER))
                q2 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(v_r[4 * t + 2], scale), ROUNDER))
                q3 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(v_r[4 * t + 3], scale), ROUNDER))
                word = int32(ptx.byte_permute(ptx.byte_permute(q0, q1, 0x40), ptx.byte_permute(q2, q3, 0x40), 0x5410))
                added = ptx.dp4a(word, ALL_ONES, added)
                if piece < PADDED:
                    q[q_wr + piece] = word
            else:
                value = ptx.round_to_int(ptx.mul_rn(v_r[t], scale))
                added = int32(added + value)
                if piece < PADDED:
                    q[q_wr + piece] = value
        for piece in range(int32(tid + TURNS * threads), PADDED, STEP):
            q[q_wr + piece] = int32(0)
        added = ptx.warp_sum_int(added)
        if lane == 0:
            sum_s[warp] = added
        cuda.syncthreads()
        if tid == 0:
            added = int32(0)
            for i in range(WARPS):
                added = int32(added + sum_s[i])
            s[row] = scale
            total[row] = added

    return norm_quant


@cache
def norm_quant_spec(arch: int, K: int, norm: bool = True, threads: int = 0) -> KernelSpec:
    """The compiled form for rows of K columns; `threads` only for tests (0: this module's choice).

    Raises ValueError for a row that no block can hold.
    """
    if not 1 <= K <= MAX_COLUMNS:
        raise ValueError(f"rows to quantise have 1 to {MAX_COLUMNS} columns, not {K}")
    wide = K % 4 == 0
    if not threads:
        pieces = K // 4 if wide else K
        turns = max(VALUES // (4 if wide else 1), -(-pieces // MAX_THREADS))
        threads = -(-pieces // (turns * WARP)) * WARP
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    signature = (f32, f32, types.float32, i32 if wide else types.CPointer(types.int8), f32, i32)
    kernel = make_norm_quant(arch, K, norm, threads)
    return KernelSpec(f"norm_quant[{K}, {norm}, {threads}]", kernel, signature, threads, wide_loads=int(wide))


def norm_quant(
    device: Device,
    x: DeviceArray,
    weight: DeviceArray | None,
    eps: float,
    q: DeviceArray,
    s: DeviceArray,
    total: DeviceArray,
    tokens: int,
    K: int,
    use_pdl: bool = True,
) -> Launch:
    """The launch that norms (with a weight) and quantises `tokens` rows.

    x float32 [tokens, K]; weight float32 [K] or None; q int8 [tokens, K rounded up to 32], padded with zeros; s float32
    [tokens]; total int32 [tokens]: sums of q. Raises ValueError with the sizes if they do not fit together.
    """
    spec = norm_quant_spec(device.arch, K, weight is not None)
    padded = -(-K // BLOCK_COLS) * BLOCK_COLS
    sizes = {"x": (x, tokens * K), "q": (q, tokens * padded), "s": (s, tokens), "total": (total, tokens)}
    if weight is not None:
        sizes["weight"] = (weight, K)
    for name, (array, size) in sizes.items():
        if array.size < size:
            raise ValueError(f"norm_quant: {name} holds {array.size} elements, {size} are needed")
    if tokens < 1:
        raise ValueError(f"norm_quant: {tokens} tokens; at least one is needed")
    # Without a norm the weight is not read; any address serves.
    arguments = (x, weight if weight is not None else x, np.float32(eps), q, s, total)
    return device.launch(spec, tokens, arguments, use_pdl)
