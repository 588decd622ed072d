"""RMSNorm and absmax quantisation of whole rows, before a GEMM.

    n = w * (x / sqrt(mean(x^2) + eps)), or x itself        (Zhang and Sennrich, 2019)
    s = 127 / max(max|n|, 1e-5), q = rint(n * s), half to even          as in `bitnet_numba.quantize`

A GEMV quantises its input itself (gemv.py), because a launch costs more than the vector. For many tokens a CTA owns a
row; its values stay in registers between the two reductions, so that each is read once: 4 M K bytes in, M K out.

    CTA = token     thread t: columns 4 t .. 4 t + 3, 4 (t + T) .., ...    16 bytes in, one word of four q out
                    (rows that are no multiple of 4 long: columns t, t + T, ...)

T is chosen so that a thread has 16 values, or more if 1024 threads are not enough. The kernel is one body: each of its
phases as a device function changes machine code on some architecture.

The squares are summed in float64 and the mean is rounded once: the result does not depend on how the work is split, so
a row gives the same q whatever the number of threads. Every other operation is the definition's, in its order. Products
and sums of q are exact, so the activations' sum is carried as int32 for the `+2` correction of `packing`. A row that
holds NaN gets s = NaN, so that all that is made of it is NaN; its q may be anything.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.epilogue import make_mean_square
from bitnet_numba.kernels.linear.operands import QuantizedActivations
from bitnet_numba.kernels.operands import Norm, checked
from bitnet_numba.kernels.ptx.base import WARP, float32, float64, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import BLOCK_COLS
from bitnet_numba.quantize import EPSILON, INT8_MAX

MAX_COLUMNS = 28 * 1024  # of a row: what the registers of a CTA hold
MAX_THREADS = 1024
VALUES = 16  # of a thread, if the row is not too long
MAX_EARLY_LOADS = 16  # norm weights of a thread that are loaded before `pdl_wait`, into registers of their own
SPREAD_ARCH, SPREAD_TOKENS = 90, range(17, 33)  # whose CTAs go to an SM each: 32 measured as better, 64 and 128 not
ROUNDER = float32(1.5 * 2**23)  # added to a small number, leaves it rounded, half to even, in the low bits
ALL_ONES = 0x01010101
MAGNITUDE = 0x7FFFFFFF  # of a float32's bits: all but the sign


def make_quantize(arch: int, K: int, norm: bool, threads: int) -> Callable[..., None]:
    """The kernel for rows of K columns. q is int32 words of four where K is a multiple of 4, else int8."""
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    warp_max, warp_sum = ptx.warp_max_int(arch), ptx.redux_sum_int(arch)
    WIDE = K % 4 == 0
    EACH = 4 if WIDE else 1  # columns of a piece
    PIECES, PADDED = K // EACH, -(-K // BLOCK_COLS) * BLOCK_COLS // EACH
    ROUNDS, WARPS = -(-PIECES // threads), threads // WARP
    VALUES_EACH = ROUNDS * EACH  # values of a thread
    EARLY = norm and VALUES_EACH <= MAX_EARLY_LOADS
    W_REGS = VALUES_EACH if EARLY else EACH
    NORM, COLUMNS, STEP = norm, K, np.int32(threads)
    ZERO, MIN_ABSMAX, Q_MAX = float32(0), float32(EPSILON), float32(INT8_MAX)
    mean_of = make_mean_square(K)

    def quantize_rows(x, weight, eps, q, s, q_sum):
        square_s = ptx.pointer(cuda.shared.array(WARPS, float64))
        max_s = ptx.pointer(cuda.shared.array(WARPS, int32))
        sum_s = ptx.pointer(cuda.shared.array(WARPS, int32))
        v_r = cuda.local.array(VALUES_EACH, float32)
        w_r = cuda.local.array(W_REGS, float32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        row = int64(cuda.blockIdx.x)
        x_rd, q_wr = row * COLUMNS, row * PADDED
        if EARLY:
            for t in range(ROUNDS):
                piece = int32(tid + t * threads)
                for j in range(EACH):
                    w_r[t * EACH + j] = ZERO
                if piece < PIECES:
                    if WIDE:
                        i = 4 * t
                        w_r[i], w_r[i + 1], w_r[i + 2], w_r[i + 3] = ptx.load4(weight, 4 * piece)
                    else:
                        w_r[t] = weight[piece]
        trigger()
        wait()

        for t in range(ROUNDS):
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
            squares = others = float64(0)  # two sums, since an addition waits for the one before
            for i in range(0, VALUES_EACH - 1, 2):
                squares += ptx.widen_positive(ptx.mul_rn(v_r[i], v_r[i]))
                others += ptx.widen_positive(ptx.mul_rn(v_r[i + 1], v_r[i + 1]))
            if VALUES_EACH % 2:
                squares += ptx.widen_positive(ptx.mul_rn(v_r[VALUES_EACH - 1], v_r[VALUES_EACH - 1]))
            squares += others
            for step in range(5):
                squares += ptx.shuffle_xor(squares, 1 << step)
            if lane == 0:
                square_s[warp] = squares
            cuda.syncthreads()
            squares = float64(0)
            for i in range(WARPS):
                squares += square_s[i]
            inverse = ptx.rcp_rn(ptx.sqrt_rn(ptx.add_rn(mean_of(squares), eps)))
            for t in range(ROUNDS):
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
        for i in range(VALUES_EACH):
            most = max(most, int32(ptx.float_to_bits(v_r[i]) & MAGNITUDE))
        most = warp_max(most)
        if lane == 0:
            max_s[warp] = most
        cuda.syncthreads()
        for i in range(WARPS):
            most = max(most, max_s[i])
        largest = ptx.bits_to_float(uint32(most))
        scale = ptx.mul_rn(ptx.rcp_rn(MIN_ABSMAX if largest < MIN_ABSMAX else largest), Q_MAX)
        added = int32(0)
        # No clamp: |v| * scale is at most 127 (1 + 2^-22), which rounds to 127. Padding holds zeros.
        for t in range(ROUNDS):
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
        for piece in range(int32(tid + ROUNDS * threads), PADDED, STEP):
            q[q_wr + piece] = int32(0)
        added = warp_sum(added)
        if lane == 0:
            sum_s[warp] = added
        cuda.syncthreads()
        if tid == 0:
            added = int32(0)
            for i in range(WARPS):
                added = int32(added + sum_s[i])
            s[row] = scale
            q_sum[row] = added

    return quantize_rows


@cache
def quantize_spec(arch: int, K: int, norm: bool = True, threads: int = 0, one_per_sm: bool = False) -> KernelSpec:
    """The variant for rows of K columns; `threads` only for tests (0: this module's choice).

    Raises ValueError for more columns than a CTA can hold.
    """
    if not 1 <= K <= MAX_COLUMNS:
        raise ValueError(f"rows to quantise have 1 to {MAX_COLUMNS} columns, not {K}")
    wide = K % 4 == 0
    if not threads:
        pieces = K // 4 if wide else K
        rounds = max(VALUES // (4 if wide else 1), -(-pieces // MAX_THREADS))
        threads = -(-pieces // (rounds * WARP)) * WARP
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    signature = (f32, f32, types.float32, i32 if wide else types.CPointer(types.int8), f32, i32)
    kernel = make_quantize(arch, K, norm, threads)
    name = f"quantize[{K}, {norm}, {threads}]"
    return KernelSpec(name, kernel, signature, threads, wide_loads=int(wide), one_per_sm=one_per_sm)


def quantize(
    device: Device,
    x: Any,
    out: QuantizedActivations,
    num_tokens: int,
    K: int,
    *,
    norm: Norm | None = None,
    use_pdl: bool = True,
) -> Launch:
    """The launch that quantises `num_tokens` rows of K columns, after an RMSNorm where `norm` is given.

    x: float32 [num_tokens, K]. Raises ValueError with the sizes if operands do not fit together, or for rows that no
    CTA can hold.
    """
    if num_tokens < 1:
        raise ValueError(f"quantize: {num_tokens} tokens; at least one is needed")
    spread = device.arch == SPREAD_ARCH and num_tokens in SPREAD_TOKENS
    kernel = quantize_spec(device.arch, K, norm is not None, one_per_sm=spread)
    operands = out.sizes(num_tokens, K)
    operands["x"] = (x, num_tokens * K, "float32")
    operands["norm"] = (norm.weight if norm is not None else None, K, "float32")
    q, s, q_sum, x, weight = checked("quantize", f"{num_tokens} rows of {K} columns", **operands)
    # Without a norm the weight is not read; any address serves.
    eps = np.float32(norm.eps if norm is not None else 0)
    return device.launch(kernel, num_tokens, (x, x if weight is None else weight, eps, q, s, q_sum), use_pdl)
