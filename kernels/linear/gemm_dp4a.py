"""The W2A8 GEMM before sm_75: `dp4a`, eight tokens at a time.

The GEMV's scheme (see gemv.py for which lane owns which words) with eight activation columns: a word is decoded once,
in seven instructions, and multiplied with every token's sixteen activations, which every CTA reads for itself through
the caches. Same arguments and results as gemm_mma.py.

    CTA (x, y): tokens 8 x .. 8 x + 7;  row-block y (for "gated" also that of the up rows)
    warp: every k_warps-th step of 128 columns; the warps' sums are combined in shared memory.
"""

from collections.abc import Callable

import numpy as np
from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.epilogue import make_epilogue
from bitnet_numba.kernels.ptx.base import WARP, float32, int32
from bitnet_numba.packing import BLOCK_ROWS, CODE_BITS, CODE_MASK

TOKENS = 8
STEP = 128  # columns that one 16-byte load of each lane covers, and words of a row-block


def make_gemm_dp4a(arch: int, k_warps: int, epilogue: str = "store", activation: str = "relu2") -> Callable[..., None]:
    """The kernel for CTAs of `k_warps` warps; epilogues as of `make_gemm_mma`."""
    load, wait, release = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    finish = make_epilogue(epilogue, activation)
    GATED, RESIDUAL, ACC = epilogue == "gated", epilogue == "residual", epilogue == "acc"
    T, WK = TOKENS, k_warps
    HALVES = 2 if GATED else 1
    THREADS = WK * WARP
    ACC_REGS = HALVES * 4 * T
    WARP_SUMS = HALVES * BLOCK_ROWS * T
    SUMS = WK * WARP_SUMS
    OUTS = -(-BLOCK_ROWS * T // THREADS)
    MASK = np.int32(CODE_MASK)
    SHIFT1, SHIFT2, SHIFT3 = CODE_BITS, 2 * CODE_BITS, 3 * CODE_BITS
    ZERO = float32(0)

    def gemm(words, q, s, q_sum, count, scales, bias, out, M, rows, KP, k_iters, row_blocks, up_offset, bound1, bound2):
        sum_s = ptx.pointer(cuda.shared.array(SUMS, int32))  # [WK, HALVES, 16 rows, T]
        acc_r = cuda.local.array(ACC_REGS, int32)
        q_rd = cuda.local.array(T, int32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = tid >> 5, tid & 31
        first = int32(cuda.blockIdx.x) * T
        block = int32(cuda.blockIdx.y)
        limit = min(int32(M), int32(count[0]))
        release()
        wait()
        if first >= limit:
            return
        stride = int32(KP >> 2)
        lane_column = int32((lane >> 3) * 32 + (lane >> 1 & 1) * 16)
        for t in range(T):
            q_rd[t] = int32(min(int32(first + t), int32(limit - 1)) * stride)
        for n in range(ACC_REGS):
            acc_r[n] = int32(0)
        for k_iter in range(k_iters):
            start = int32((k_iter * WK + warp) * STEP)
            if start + lane_column < KP:
                for half in range(HALVES):
                    w0, w1, w2, w3 = load(words, int32(block + half * up_offset) * KP + start + lane * 4)
                    for t in range(T):
                        x0, x1, x2, x3 = ptx.load4(q, q_rd[t] + ((start + lane_column) >> 2))
                        for r in range(4):
                            w = w0 if r == 0 else (w1 if r == 1 else (w2 if r == 2 else w3))
                            n = (half * 4 + r) * T + t
                            a = ptx.dp4a_us(w & MASK, x0, acc_r[n])
                            a = ptx.dp4a_us((w >> SHIFT1) & MASK, x1, a)
                            a = ptx.dp4a_us((w >> SHIFT2) & MASK, x2, a)
                            acc_r[n] = ptx.dp4a_us((w >> SHIFT3) & MASK, x3, a)
        # The eight lanes that share rows differ in bits 1, 3 and 4.
        for n in range(ACC_REGS):
            a = acc_r[n]
            a = int32(a + ptx.shuffle_xor(a, 2))
            a = int32(a + ptx.shuffle_xor(a, 8))
            acc_r[n] = int32(a + ptx.shuffle_xor(a, 16))
        if lane & 26 == 0:
            sums_wr = int32(warp * WARP_SUMS + ((lane & 1) * 4 + (lane >> 2 & 1) * 8) * T)
            for half in range(HALVES):
                for n in range(4 * T):
                    sum_s[sums_wr + half * (BLOCK_ROWS * T) + n] = acc_r[half * 4 * T + n]
        cuda.syncthreads()
        for i in range(OUTS):
            at = int32(tid + i * THREADS)
            n, m = int32(block * BLOCK_ROWS + at // T), int32(first + at % T)
            if at < BLOCK_ROWS * T and n < rows and m < limit:
                a, b = int32(0), int32(0)
                for k in range(WK):
                    a = int32(a + sum_s[at + k * WARP_SUMS])
                    if GATED:
                        b = int32(b + sum_s[at + k * WARP_SUMS + BLOCK_ROWS * T])
                m_row = m_up = old = ZERO
                if not ACC:
                    m_row = scales[0] if n < bound1 else (scales[1] if n < bound2 else scales[2])
                if GATED:
                    m_up = scales[1]
                to = m * rows + n
                if RESIDUAL:
                    old = out[to]
                out[to] = finish(a, b, q_sum[m], m_row, m_up, s[m], bias, n, rows, old)

    return gemm
