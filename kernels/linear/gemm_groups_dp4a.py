"""The W2A8 GEMM with group scales before sm_75: `dp4a`, eight tokens at a time.

The scheme of gemm_dp4a.py; same arguments and results as gemm_groups_mma.py.

    CTA (x, y): tokens 8 x .. 8 x + 7;  row-block y (for "gated" also that of the up rows)
    warp: every k_warps-th group. A round's products acc * (scale * d) meet in shared memory, [k_warps, HALVES, 16
    rows, 8], and a thread for each result adds them up in the order of the groups.
"""

from collections.abc import Callable

from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.epilogue import make_group_epilogue
from bitnet_numba.kernels.linear.gemm_dp4a import STEP, TOKENS
from bitnet_numba.kernels.linear.gemm_groups_mma import GROUP_SCALES
from bitnet_numba.kernels.linear.signed import WEIGHT, signed
from bitnet_numba.kernels.ptx.base import WARP, float32, int32
from bitnet_numba.packing import BLOCK_ROWS


def make_gemm_groups_dp4a(
    arch: int, k_warps: int, epilogue: str = "store", activation: str = "relu2"
) -> Callable[..., None]:
    """The kernel for CTAs of `k_warps` warps; epilogues as of `make_group_epilogue`."""
    load, wait, release = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    finish = make_group_epilogue(epilogue, activation)
    GATED, RESIDUAL = epilogue == "gated", epilogue == "residual"
    T, WK = TOKENS, k_warps
    HALVES = 2 if GATED else 1
    THREADS = WK * WARP
    ACC_REGS = HALVES * 4 * T
    RESULTS = BLOCK_ROWS * T
    WARP_PRODUCTS = HALVES * RESULTS
    PRODUCTS = WK * WARP_PRODUCTS
    OUTS = -(-RESULTS // THREADS)
    Y_REGS = HALVES * OUTS
    ZERO, PER_WEIGHT = float32(0), float32(1 / WEIGHT)

    def gemm(words, q, steps, count, scales, bias, out, M, steps_row, rows, KP, groups, k_iters, row_blocks, up_offset):
        product_s = ptx.pointer(cuda.shared.array(PRODUCTS, float32))
        acc_r = cuda.local.array(ACC_REGS, int32)
        q_rd = cuda.local.array(T, int32)
        y_r = cuda.local.array(Y_REGS, float32)
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
        for n in range(Y_REGS):
            y_r[n] = ZERO
        for k_iter in range(k_iters):
            for n in range(ACC_REGS):
                acc_r[n] = int32(0)
            group = int32(k_iter * WK + warp)
            start = int32(group * STEP)
            if start + lane_column < KP:
                for half in range(HALVES):
                    w0, w1, w2, w3 = load(words, int32(block + half * up_offset) * KP + start + lane * 4)
                    for t in range(T):
                        x0, x1, x2, x3 = ptx.load4(q, q_rd[t] + ((start + lane_column) >> 2))
                        for r in range(4):
                            w = w0 if r == 0 else (w1 if r == 1 else (w2 if r == 2 else w3))
                            a = ptx.dp4a(signed(w, 1), x1, ptx.dp4a(signed(w, 0), x0, int32(0)))
                            a = ptx.dp4a(signed(w, 3), x3, ptx.dp4a(signed(w, 2), x2, a))
                            acc_r[(half * 4 + r) * T + t] = a
            # The eight lanes that share rows differ in bits 1, 3 and 4.
            for n in range(ACC_REGS):
                a = acc_r[n]
                a = int32(a + ptx.shuffle_xor(a, 2))
                a = int32(a + ptx.shuffle_xor(a, 8))
                acc_r[n] = int32(a + ptx.shuffle_xor(a, 16))
            if lane & 26 == 0 and group < groups:
                row = int32((lane & 1) * 4 + (lane >> 2 & 1) * 8)
                to = int32(warp * WARP_PRODUCTS + row * T)
                for t in range(T):
                    d = float32(steps[group * steps_row + min(int32(first + t), int32(limit - 1))] * PER_WEIGHT)
                    for half in range(HALVES):
                        scales_rd = int32(
                            (int32(block + half * up_offset) * groups + group) * GROUP_SCALES + (row >> 1)
                        )
                        for r in range(4):
                            pair = scales[scales_rd + (r >> 1)]
                            m = ptx.f16_high(pair) if r & 1 else ptx.f16_low(pair)
                            acc = ptx.int_to_float(acc_r[(half * 4 + r) * T + t])
                            product_s[to + half * RESULTS + r * T + t] = ptx.mul_rn(acc, ptx.mul_rn(m, d))
            cuda.syncthreads()
            for i in range(OUTS):
                at = int32(tid + i * THREADS)
                if at < RESULTS:
                    for k in range(WK):
                        if k_iter * WK + k < groups:
                            rd = int32(at + k * WARP_PRODUCTS)
                            y_r[HALVES * i] = ptx.add_rn(y_r[HALVES * i], product_s[rd])
                            if GATED:
                                y_r[HALVES * i + 1] = ptx.add_rn(y_r[HALVES * i + 1], product_s[rd + RESULTS])
            cuda.syncthreads()
        for i in range(OUTS):
            at = int32(tid + i * THREADS)
            n, m = int32(block * BLOCK_ROWS + at // T), int32(first + at % T)
            if at < RESULTS and n < rows and m < limit:
                to = m * rows + n
                old = out[to] if RESIDUAL else ZERO
                z = y_r[HALVES * i + 1] if GATED else ZERO
                out[to] = finish(y_r[HALVES * i], z, bias, n, rows, old)

    return gemm
