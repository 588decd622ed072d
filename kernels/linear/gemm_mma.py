"""The W2A8 GEMM on tensor cores, from sm_75 on: ternary weights [N, K] as packed words, M tokens' q as int8.

    y[m, n] = (sum_k q[m, k] * w[n, k]) * scale[segment of n] / s[m]  (+ bias[n])

The int32 sums are exact and what follows them is epilogue.py's, so a token's row has the same bits whatever M and the
tile, and the same as by gemv.py.

`mma.m16n8k32` (on sm_75 four `mma.m8n8k16`) multiplies 16 x 32 codes (w + 2, unsigned) with 32 x 8 activations. Its
columns may come in any order if both operands agree, and its rows may be any 16: so each lane takes what lies together
in memory, and no value ever changes lanes. Of a row-block's 64 columns (two blocks of `packing`, 256 bytes in a row),
with g = lane / 4 and i = lane % 4:

    words    8 bytes: columns 16 i .. 16 i + 15 of rows r and r + 1, r = 8 (g / 4) + 2 (g % 4)
    q       16 bytes: columns 16 i .. 16 i + 15 of token g
    mma p = 0, 1 takes columns 8 p .. 8 p + 7 of every lane's sixteen:
             a0, a2 = (word >> 4 p), (word >> 4 p + 2) & mask;  a1, a3 the same of the other word;  b0, b1 = q's words
    sums     rows r, r + 1 of tokens 2 i, 2 i + 1

Work split:

    CTA (x, y): tokens T x .. T x + T - 1;  row-blocks of the y-th tile: row_warps groups of `row_blocks` each
    warp: one group of row-blocks ("gated": pairs, gate and up rows at once), all T tokens, every k_warps-th panel of
    64 columns:
        columns      0    64   128   192
        warp 0       |====|    |====|    ...      (k_warps = 2; a k_iter is k_warps panels)
        warp 1       |    |====|    |====...
    The warps' int32 sums are combined in shared memory.

Weights go from global memory straight to registers, `reg_stages` k_iters ahead, since only one warp uses them; the
first are loaded before `pdl_wait`, while earlier kernels still run. Activations come through shared memory by
`cp.async`, `stages` - 1 k_iters ahead (64 bytes of a token after the other: a quarter warp's 16-byte loads touch every
bank once), or, where no two warps want the same, straight from global memory (`stages` = 0).

The output stays in the kernel: any part of it as a device function changes machine code.
"""

from collections.abc import Callable

import numpy as np
from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.epilogue import make_epilogue
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32
from bitnet_numba.kernels.runtime.spec import RESERVED_BYTES, sm_memory
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, CODE_BITS, CODE_MASK

PANEL = 64  # columns that a warp multiplies in a K iteration: two blocks
PANEL_INTS = PANEL // 4  # of a token's activations
TOKENS = 8  # of one mma
FRAGMENT = 4 * WARP  # int32 sums of one mma
STATIC_BYTES = 48 * 1024  # of shared memory that a CTA can have without asking
TOKEN_BYTES = 2048  # of it, at most, for the tokens' scales and sums


def make_gemm_mma(arch: int, tile: Tile, epilogue: str = "store", activation: str = "relu2") -> Callable[..., None]:
    """The kernel for a tile with scheme "mma"; epilogues as of `make_epilogue`. Raises ValueError if the tile's tokens
    are no multiple of 8, its shared memory is more than 48 KB or its part of an SM's, or "gated" row-blocks come in no
    pairs."""
    load, wait, trigger = ptx.stream_load2(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    multiply = ptx.mma_s8(arch)
    GATED, RESIDUAL, ACC = epilogue == "gated", epilogue == "residual", epilogue == "acc"
    finish = make_epilogue(epilogue, activation)
    T, U, WR, WK, REG_STAGES, STAGES = tile[:6]
    HALVES = 2 if GATED else 1
    UNITS = U // HALVES  # row-blocks of the output
    THREADS = tile.threads
    NT = T // TOKENS
    STAGED = STAGES > 0
    arrived, all_arrived = ptx.cp_async_wait(max(STAGES - 2, 0)), ptx.cp_async_wait(0)
    STAGE = WK * T * PANEL_INTS
    COPIES = -(-STAGE // 4 // THREADS)
    COPIES_EXACT = STAGE % (4 * THREADS) == 0
    B_AHEAD = (
        0 if STAGED else max(n for n in (8, 7, 6, 5, 4, 3, 2, 1) if REG_STAGES % n == 0 and (n == 1 or n * NT <= 8))
    )
    W_REGS, A_REGS, B_REGS, ACC_REGS = 2 * U * REG_STAGES, 8 * U, max(4 * NT * B_AHEAD, 1), 4 * U * NT
    # Sums are combined in passes of as many n-tiles as fit the CTA's part of an SM's shared memory.
    shared_bytes = min(STATIC_BYTES, sm_memory(arch).shared // tile.ctas_per_sm - RESERVED_BYTES) - TOKEN_BYTES
    N_PASS = next((n for n in range(NT, 0, -1) if NT % n == 0 and 4 * n * U * WR * WK * FRAGMENT <= shared_bytes), 1)
    PASSES = NT // N_PASS
    SHARED = max(STAGES * STAGE, N_PASS * U * WR * WK * FRAGMENT)
    PASS = N_PASS * U * FRAGMENT  # sums of a warp in a pass
    SCALE_ROUNDS = -(-T // THREADS)
    MASK = np.int32(CODE_MASK)
    ZERO = float32(0)
    if GATED and U % 2 or T % TOKENS or 4 * SHARED > shared_bytes:
        raise ValueError(f"no GEMM is made of {tile}")

    @device_function
    def copy_stage(shared, stage_wr, q, copies, tid, stride):
        """Starts this thread's copies of the next k_iter's activations into a stage. Beyond the last column or token
        nothing is read, and zeros are written."""
        column_r, from_r, bytes_r = copies
        for n in range(COPIES):
            chunk = int32(tid + n * THREADS)
            size = bytes_r[n] if column_r[n] < stride else int32(0)
            at = from_r[n] + min(column_r[n], int32(stride - 4))
            if COPIES_EXACT or chunk < STAGE // 4:
                ptx.cp_async_16(shared, stage_wr + chunk * 4, q, at, size)
            column_r[n] += WK * PANEL_INTS
        ptx.cp_async_commit()

    @device_function
    def load_activations(b_r, q, q_rd, slot, q_column, stride):
        """A k_iter's activations straight from global memory; zeros beyond the last column."""
        at = min(q_column, int32(stride - 4))
        for t in range(NT):
            n = 4 * (slot * NT + t)
            b_r[n], b_r[n + 1], b_r[n + 2], b_r[n + 3] = ptx.load4(q, q_rd[t] + at)
            if q_column >= stride:
                b_r[n] = b_r[n + 1] = b_r[n + 2] = b_r[n + 3] = int32(0)

    @device_function
    def load_words(w_r, words, words_rd, j, column, KP):
        """The words of one k_iter into its registers, the j-th of REG_STAGES. Beyond the last column any words do: the
        activations are zero there."""
        at = min(column, int32(KP - BLOCK_COLS))
        for u in range(U):
            n = 2 * (j * U + u)
            w_r[n], w_r[n + 1] = load(words, words_rd[u] + at)

    @device_function
    def multiply_stage(acc_r, a_r, w_r, shared, stage_rd, b_rd, j):
        """One k_iter's products with activations from shared memory."""
        for u in range(U):
            for r in range(2):
                w = w_r[2 * (j * U + u) + r]
                for p in range(4):
                    a_r[8 * u + 4 * (p >> 1) + 2 * (p & 1) + r] = (w >> (CODE_BITS * p)) & MASK
        for t in range(NT):
            b0, b1, b2, b3 = ptx.load4(shared, stage_rd + b_rd + t * TOKENS * PANEL_INTS)
            for p in range(2):
                for u in range(U):
                    n, a = 4 * (t * U + u), 8 * u + 4 * p
                    c0, c1, c2, c3 = acc_r[n], acc_r[n + 1], acc_r[n + 2], acc_r[n + 3]
                    a0, a1, a2, a3 = a_r[a], a_r[a + 1], a_r[a + 2], a_r[a + 3]
                    x0, x1 = (b2, b3) if p else (b0, b1)
                    c0, c1, c2, c3 = multiply(a0, a1, a2, a3, x0, x1, c0, c1, c2, c3)
                    acc_r[n], acc_r[n + 1], acc_r[n + 2], acc_r[n + 3] = c0, c1, c2, c3

    @device_function
    def multiply_registers(acc_r, w_r, b_r, j):
        """One k_iter's products with activations from registers."""
        for u in range(U):
            for p in range(2):
                w0, w1 = w_r[2 * (j * U + u)], w_r[2 * (j * U + u) + 1]
                low, high = 2 * CODE_BITS * p, 2 * CODE_BITS * p + CODE_BITS
                a0, a2 = (w0 >> low) & MASK, (w0 >> high) & MASK
                a1, a3 = (w1 >> low) & MASK, (w1 >> high) & MASK
                for t in range(NT):
                    n, b = 4 * (t * U + u), 4 * (j % B_AHEAD * NT + t) + 2 * p
                    c0, c1, c2, c3 = acc_r[n], acc_r[n + 1], acc_r[n + 2], acc_r[n + 3]
                    c0, c1, c2, c3 = multiply(a0, a1, a2, a3, b_r[b], b_r[b + 1], c0, c1, c2, c3)
                    acc_r[n], acc_r[n + 1], acc_r[n + 2], acc_r[n + 3] = c0, c1, c2, c3

    def gemm(words, q, s, q_sum, count, scales, bias, out, M, rows, KP, k_iters, row_blocks, up_offset, bound1, bound2):
        shared = ptx.pointer(cuda.shared.array(SHARED, int32, SHARED_ALIGN))  # activations, then sums
        s_s = ptx.pointer(cuda.shared.array(T, float32))
        q_sum_s = ptx.pointer(cuda.shared.array(T, int32))
        w_r = cuda.local.array(W_REGS, int32)
        a_r = cuda.local.array(A_REGS, int32)
        b_r = cuda.local.array(B_REGS, int32)
        acc_r = cuda.local.array(ACC_REGS, int32)
        old_r = cuda.local.array(4, float32)
        words_rd = cuda.local.array(U, int32)
        q_rd = cuda.local.array(NT, int32)
        column_r = cuda.local.array(COPIES, int32)
        from_r = cuda.local.array(COPIES, int32)
        bytes_r = cuda.local.array(COPIES, int32)

        tid = int32(cuda.threadIdx.x)
        warp, lane = tid >> 5, tid & 31
        g, i = lane >> 2, lane & 3
        k_warp = int32(warp % WK)
        row_warp = int32(warp // WK)
        first = int32(cuda.blockIdx.x) * T
        limit = min(int32(M), int32(count[0]))  # no kernel writes it: it may be read before the wait
        if first >= limit:
            if first == 0:
                wait()  # so that the launch does not end before those it follows
            return
        unit0 = int32((int32(cuda.blockIdx.y) * WR + row_warp) * UNITS)

        # 1. The first k_iters' weights.
        for u in range(U):
            unit = min(int32(unit0 + u // HALVES), int32(row_blocks - 1))
            lane_rd = int32((g >> 2) * 16 + (i & 1) * 8 + (g & 3) * 2)
            words_rd[u] = int32(int32(unit + u % HALVES * up_offset) * KP + lane_rd)
        column = int32(k_warp * PANEL + (i >> 1) * BLOCK_COLS)  # of the words loaded next: a word a column
        for j in range(REG_STAGES):
            load_words(w_r, words, words_rd, j, column, KP)
            column += WK * PANEL
        for n in range(ACC_REGS):
            acc_r[n] = int32(0)
        m0 = m1 = m2 = ZERO
        if not ACC:
            m0 = scales[0]
            m1 = scales[1] if bound1 < rows or GATED else ZERO
            m2 = scales[2] if bound2 < rows else ZERO
        trigger()
        wait()

        # 2. The first k_iters' activations.
        stride = int32(KP >> 2)  # int32 words of a token
        q_column = int32(k_warp * PANEL_INTS + i * 4)  # of what is loaded next, in int32 words
        if STAGED:
            for n in range(COPIES):  # of columns or tokens beyond the last none are read
                chunk = int32(tid + n * THREADS)
                token = int32((chunk >> 2) % T)
                column_r[n] = int32(chunk // (4 * T) * PANEL_INTS + (chunk & 3) * 4)
                from_r[n] = int32(min(int32(first + token), int32(limit - 1)) * stride)
                bytes_r[n] = int32(16) if first + token < limit else int32(0)
            copies = column_r, from_r, bytes_r
            for t in range(STAGES - 1):
                copy_stage(shared, int32(t * STAGE), q, copies, tid, stride)
        else:
            for t in range(NT):
                q_rd[t] = int32(min(int32(first + t * TOKENS + g), int32(limit - 1)) * stride)
            for j in range(B_AHEAD):
                load_activations(b_r, q, q_rd, j, q_column, stride)
                q_column += WK * PANEL_INTS
        for n in range(SCALE_ROUNDS):
            token = int32(tid + n * THREADS)
            if token < T and first + token < limit:
                s_s[token] = s[first + token]
                q_sum_s[token] = q_sum[first + token]

        # 3. Products.
        b_rd = int32((k_warp * T + g) * PANEL_INTS + i * 4)
        stage_rd, stage_wr = int32(0), int32((STAGES - 1) * STAGE)
        k_iter = int32(0)
        while k_iter < k_iters:
            for j in range(REG_STAGES):
                if k_iter + j < k_iters:
                    if STAGED:
                        arrived()
                        cuda.syncthreads()  # all threads' copies have arrived, and the stage before has been read
                        copy_stage(shared, stage_wr, q, copies, tid, stride)
                        multiply_stage(acc_r, a_r, w_r, shared, stage_rd, b_rd, j)
                    else:
                        multiply_registers(acc_r, w_r, b_r, j)
                        load_activations(b_r, q, q_rd, j % B_AHEAD, q_column, stride)
                        q_column += WK * PANEL_INTS
                    load_words(w_r, words, words_rd, j, column, KP)
                    column += WK * PANEL
                    if STAGED:
                        stage_rd = int32(stage_rd + STAGE if stage_rd < (STAGES - 1) * STAGE else 0)
                        stage_wr = int32(stage_wr + STAGE if stage_wr < (STAGES - 1) * STAGE else 0)
            k_iter += REG_STAGES

        # 4. Output. A fragment's 4 x 32 sums keep their order in shared memory; k_warps warps divide its row group's
        # fragments among them.
        if STAGED:
            all_arrived()  # zeros of k_iters beyond the last, which would overwrite sums
        row_sums = int32(row_warp * (WK * PASS))
        lane_row = int32((g >> 2) * 8 + (g & 3) * 2)
        for pass_ in range(PASSES):
            t0 = pass_ * N_PASS
            cuda.syncthreads()
            for n in range(N_PASS * U):
                at, c = int32(row_sums + k_warp * PASS + n * FRAGMENT + lane * 4), 4 * (t0 * U + n)
                ptx.store4(shared, at, acc_r[c], acc_r[c + 1], acc_r[c + 2], acc_r[c + 3])
            fragment = int32(k_warp)
            if RESIDUAL:
                for k in range(4):  # beyond the last row or token: of that one, and not used
                    m = min(int32(first + (t0 + fragment // UNITS) * TOKENS + 2 * i + k % 2), int32(limit - 1))
                    r = min(int32((unit0 + fragment % UNITS) * BLOCK_ROWS + lane_row + k // 2), int32(rows - 1))
                    old_r[k] = out[m * rows + r]
            cuda.syncthreads()
            while fragment < N_PASS * UNITS:
                unit, t = int32(fragment % UNITS), int32(fragment // UNITS)
                row = int32((unit0 + unit) * BLOCK_ROWS + lane_row)
                token = int32((t0 + t) * TOKENS + 2 * i)
                at = int32(row_sums + (t * U + unit * HALVES) * FRAGMENT + lane * 4)
                fragment += WK
                old0, old1, old2, old3 = old_r[0], old_r[1], old_r[2], old_r[3]
                if RESIDUAL:  # the next fragment's
                    for k in range(4):
                        m = min(int32(first + (t0 + fragment // UNITS) * TOKENS + 2 * i + k % 2), int32(limit - 1))
                        r = min(int32((unit0 + fragment % UNITS) * BLOCK_ROWS + lane_row + k // 2), int32(rows - 1))
                        old_r[k] = out[m * rows + r]
                c0, c1, c2, c3 = ptx.load4(shared, at)
                for k in range(1, WK):
                    d0, d1, d2, d3 = ptx.load4(shared, at + k * PASS)
                    c0, c1, c2, c3 = int32(c0 + d0), int32(c1 + d1), int32(c2 + d2), int32(c3 + d3)
                e0 = e1 = e2 = e3 = int32(0)
                if GATED:
                    e0, e1, e2, e3 = ptx.load4(shared, at + FRAGMENT)
                    for k in range(1, WK):
                        d0, d1, d2, d3 = ptx.load4(shared, at + FRAGMENT + k * PASS)
                        e0, e1, e2, e3 = int32(e0 + d0), int32(e1 + d1), int32(e2 + d2), int32(e3 + d3)
                for k in range(4):
                    m, r = int32(token + k % 2), int32(row + k // 2)
                    if first + m < limit and r < rows:
                        c = c0 if k == 0 else (c1 if k == 1 else (c2 if k == 2 else c3))
                        e = e0 if k == 0 else (e1 if k == 1 else (e2 if k == 2 else e3))
                        old = old0 if k == 0 else (old1 if k == 1 else (old2 if k == 2 else old3))
                        m_row = m0 if r < bound1 else (m1 if r < bound2 else m2)
                        y = finish(c, e, q_sum_s[m], m_row, m1, s_s[m], bias, r, rows, old)
                        out[int32(first + m) * rows + r] = y

    return gemm
