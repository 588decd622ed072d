"""The W2A8 GEMM with group scales on tensor cores, from sm_75 on. Read gemm_mma.py first.

    y[m, n] = sum over groups g of acc[m, n, g] * (scales[n, g] * d[g, m])  (+ bias[n])

Fragments are gemm_mma.py's: a lane's 16 columns of 64, rows r and r + 1, tokens 2 i and 2 i + 1. A k_iter is a group of
128 columns of each of `k_warps` warps. Four mma make the exact sum of a group, of weights times 64 (see `signed`). It
starts at MAGIC: its bits, taken as float32, are then 1.5 * 2^23 plus the sum, and one subtraction makes it a float. The
products acc * (scale * d) are added up from the first group on, so a token's row has the reference's bits, whatever M
and the tile:

    k_warps = 1    in registers, group after group
    k_warps > 1    a k_iter's products meet in shared memory; while the next are made, warp k adds up those of every
                   k_warps-th fragment (4 x 32 of a row-block and eight tokens), in the order of the groups

    shared memory  | stage 0: q, steps | stage 1: q, steps | ... | products of even k_iters | of odd k_iters |
                   q: [k_warps * 2 panels of 64 columns, T, 64 bytes]; steps: [k_warps, T]

Weights and scales go straight to registers, `reg_stages` k_iters ahead and the first before `pdl_wait`; activations
through shared memory, `stages` - 1 k_iters ahead: by cp.async from sm_80 on, before that by loads and stores.
"""

from collections.abc import Callable

import numpy as np
from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.epilogue import make_group_epilogue
from bitnet_numba.kernels.linear.gemm_mma import FRAGMENT, PANEL_INTS, TOKENS
from bitnet_numba.kernels.linear.signed import WEIGHT, signed
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.kernels.ptx.base import device_function, float32, int32, uint32
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, GROUP_COLS

STAGED_ARCH = 80  # asynchronous copies to shared memory
GROUP_INTS = GROUP_COLS // 4  # of a token's activations
GROUP_SCALES = BLOCK_ROWS // 2  # int32 words of a row-block's scales of a group
MAGIC = np.float32(1.5 * 2**23)  # whole numbers up to 2^22 added to its bits are added to it


def stage_ints(tile: Tile) -> int:
    """Shared memory of a stage, in int32: activations, and a step for each token and group."""
    return tile.k_warps * tile.tokens * (GROUP_INTS + 1)


def products_of(tile: Tile) -> int:
    """Floats of a k_iter's products that meet in shared memory."""
    return tile.tokens * tile.rows * tile.k_warps if tile.k_warps > 1 else 0


def shared_bytes(tile: Tile) -> int:
    """Dynamic shared memory of a CTA, in bytes."""
    return 4 * (tile.stages * stage_ints(tile) + 2 * products_of(tile))


def make_gemm_groups_mma(
    arch: int, tile: Tile, epilogue: str = "store", activation: str = "relu2"
) -> Callable[..., None]:
    """The kernel for a tile with scheme "mma"; epilogues as of `make_group_epilogue`. Raises ValueError if the tile's
    tokens are no multiple of 8, it has no two stages, or "gated" row-blocks come in no pairs."""
    load, wait, trigger = ptx.stream_load2(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    multiply = ptx.mma_s8(arch, signed=True)
    finish = make_group_epilogue(epilogue, activation)
    GATED, RESIDUAL = epilogue == "gated", epilogue == "residual"
    T, U, WR, WK, REG_STAGES, STAGES = tile[:6]
    HALVES = 2 if GATED else 1
    UNITS = U // HALVES  # row-blocks of the output
    THREADS = tile.threads
    NT = T // TOKENS
    ASYNC = arch >= STAGED_ARCH
    arrived = ptx.cp_async_wait(max(STAGES - 2, 0))
    STAGE, STEPS_AT = stage_ints(tile), WK * T * GROUP_INTS
    Q_CHUNKS, S_CHUNKS = STEPS_AT // 4, WK * T // 4  # of 16 bytes
    Q_COPIES, S_COPIES = -(-Q_CHUNKS // THREADS), -(-S_CHUNKS // THREADS)
    W_REGS, M_REGS, A_REGS = 4 * U * REG_STAGES, U * REG_STAGES, 16 * U
    FRAGMENTS = NT * U  # of a warp's products
    PRODUCTS = products_of(tile)
    PRODUCTS_AT = STAGES * STAGE
    OWN = -(-NT * UNITS // WK)  # fragments of the output that a warp adds up
    Y_REGS, OLD_REGS = 4 * OWN * HALVES, 4 * OWN
    START = int32(MAGIC.view(np.int32))
    ZERO, PER_WEIGHT, LESS = float32(0), float32(1 / WEIGHT), float32(-MAGIC)
    if GATED and U % 2 or T % TOKENS or STAGES < 2:
        raise ValueError(f"no GEMM with group scales is made of {tile}")

    @device_function
    def copy(shared, to, source, at, size):
        """Starts a copy of 16 bytes, or with size 0 writes zeros."""
        if ASYNC:
            ptx.cp_async_16(shared, to, source, at, size)
        else:
            x0, x1, x2, x3 = ptx.load4(source, at)
            if size == 0:
                x0 = x1 = x2 = x3 = int32(0)
            ptx.store4(shared, to, x0, x1, x2, x3)

    @device_function
    def copy_stage(shared, stage_wr, q, steps, ahead, first, limit, tid, sizes):
        """Starts this thread's copies of a k_iter's activations into a stage; zeros beyond the last column or token."""
        stride, steps_row, groups = sizes
        for n in range(Q_COPIES):
            chunk = int32(tid + n * THREADS)
            token = int32(first + (chunk >> 2) % T)
            column = int32((ahead * (2 * WK) + chunk // (4 * T)) * PANEL_INTS + (chunk & 3) * 4)
            size = int32(16) if token < limit and column < stride else int32(0)
            at = int32(min(token, int32(limit - 1)) * stride + min(column, int32(stride - 4)))
            if Q_CHUNKS % THREADS == 0 or chunk < Q_CHUNKS:
                copy(shared, stage_wr + chunk * 4, q, at, size)
        for n in range(S_COPIES):
            chunk = int32(tid + n * THREADS)
            token, group = int32(first + chunk % (T // 4) * 4), int32(ahead * WK + chunk // (T // 4))
            size = int32(16) if token < steps_row and group < groups else int32(0)
            at = int32(min(group, int32(groups - 1)) * steps_row + min(token, int32(steps_row - 4)))
            if S_CHUNKS % THREADS == 0 or chunk < S_CHUNKS:
                copy(shared, stage_wr + STEPS_AT + chunk * 4, steps, at, size)
        if ASYNC:
            ptx.cp_async_commit()

    @device_function
    def load_words(w_r, m_r, words, scales, words_rd, scales_rd, j, group, KP, groups, lane):
        """A warp's words and scales of a group into its registers, the j-th of REG_STAGES. Beyond the last column any
        words and scales do: the activations and steps are zero there."""
        at = min(group, int32(groups - 1))
        column = int32(group * GROUP_COLS + (lane >> 1 & 1) * BLOCK_COLS)
        for u in range(U):
            for panel in range(2):
                n = 4 * (j * U + u) + 2 * panel
                w_r[n], w_r[n + 1] = load(
                    words, words_rd[u] + min(int32(column + panel * (2 * BLOCK_COLS)), int32(KP - BLOCK_COLS))
                )
            m_r[j * U + u] = scales[scales_rd[u] + at * GROUP_SCALES]

    @device_function
    def decode(a_r, w_r, j):
        """Operands of both panels of each row-block."""
        for u in range(U):
            for n in range(4):
                w = w_r[4 * (j * U + u) + n]
                for p in range(4):
                    a_r[16 * u + 8 * (n >> 1) + 4 * (p >> 1) + 2 * (p & 1) + (n & 1)] = signed(w, p)

    @device_function
    def sums_of(a_r, a, b):
        """A fragment's sums of a group, from MAGIC on."""
        b0, b1, b2, b3, b4, b5, b6, b7 = b
        c0, c1, c2, c3 = multiply(a_r[a], a_r[a + 1], a_r[a + 2], a_r[a + 3], b0, b1, START, START, START, START)
        c0, c1, c2, c3 = multiply(a_r[a + 4], a_r[a + 5], a_r[a + 6], a_r[a + 7], b2, b3, c0, c1, c2, c3)
        c0, c1, c2, c3 = multiply(a_r[a + 8], a_r[a + 9], a_r[a + 10], a_r[a + 11], b4, b5, c0, c1, c2, c3)
        c0, c1, c2, c3 = multiply(a_r[a + 12], a_r[a + 13], a_r[a + 14], a_r[a + 15], b6, b7, c0, c1, c2, c3)
        return (
            ptx.bits_to_float(uint32(c0)), ptx.bits_to_float(uint32(c1)), ptx.bits_to_float(uint32(c2)),
            ptx.bits_to_float(uint32(c3)),
        )  # fmt: skip

    @device_function
    def store_products(shared, to, c0, c1, c2, c3):
        ptx.store4(
            shared, to, int32(ptx.float_to_bits(c0)), int32(ptx.float_to_bits(c1)), int32(ptx.float_to_bits(c2)),
            int32(ptx.float_to_bits(c3)),
        )  # fmt: skip

    @device_function
    def add_up(y_r, shared, products_rd, k_warp):
        """Adds a k_iter's products of this warp's fragments of the output, in the order of the groups."""
        for n in range(OWN):
            fragment = int32(k_warp + n * WK)
            if fragment < NT * UNITS:
                for half in range(HALVES):
                    at = int32(products_rd + (fragment * HALVES + half) * FRAGMENT)
                    y = 4 * (n * HALVES + half)
                    for k in range(WK):
                        c0, c1, c2, c3 = ptx.load4(shared, at + k * (FRAGMENTS * FRAGMENT))
                        y_r[y] = ptx.add_rn(y_r[y], ptx.bits_to_float(uint32(c0)))
                        y_r[y + 1] = ptx.add_rn(y_r[y + 1], ptx.bits_to_float(uint32(c1)))
                        y_r[y + 2] = ptx.add_rn(y_r[y + 2], ptx.bits_to_float(uint32(c2)))
                        y_r[y + 3] = ptx.add_rn(y_r[y + 3], ptx.bits_to_float(uint32(c3)))

    def gemm(words, q, steps, count, scales, bias, out, M, steps_row, rows, KP, groups, k_iters, row_blocks, up_offset):
        shared = ptx.pointer(cuda.shared.array(0, int32))
        w_r = cuda.local.array(W_REGS, int32)
        m_r = cuda.local.array(M_REGS, int32)
        a_r = cuda.local.array(A_REGS, int32)
        y_r = cuda.local.array(Y_REGS, float32)
        old_r = cuda.local.array(OLD_REGS, float32)
        words_rd = cuda.local.array(U, int32)
        scales_rd = cuda.local.array(U, int32)

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

        # 1. The first k_iters' weights and scales.
        for u in range(U):
            block = int32(min(int32(unit0 + u // HALVES), int32(row_blocks - 1)) + u % HALVES * up_offset)
            words_rd[u] = int32(block * KP + (g >> 2) * 16 + (i & 1) * 8 + (g & 3) * 2)
            scales_rd[u] = int32(block * (groups * GROUP_SCALES) + g)
        group = int32(k_warp)  # that is loaded next
        for j in range(REG_STAGES):
            load_words(w_r, m_r, words, scales, words_rd, scales_rd, j, group, int32(KP), int32(groups), lane)
            group += WK
        for n in range(Y_REGS):
            y_r[n] = ZERO
        trigger()
        wait()

        # 2. The first k_iters' activations.
        sizes = int32(KP >> 2), int32(steps_row), int32(groups)
        for t in range(STAGES - 1):
            copy_stage(shared, int32(t * STAGE), q, steps, int32(t), first, limit, tid, sizes)

        # 3. Products. One k_iter more than there are lets the last one's meet.
        b_rd = int32((2 * k_warp * T + g) * PANEL_INTS + i * 4)
        steps_rd = int32(STEPS_AT + k_warp * T + 2 * i)
        products_rd = int32(PRODUCTS_AT + row_warp * (WK * FRAGMENTS * FRAGMENT) + lane * 4)
        products_wr = int32(products_rd + k_warp * (FRAGMENTS * FRAGMENT))
        stage_rd, stage_wr, odd = int32(0), int32((STAGES - 1) * STAGE), int32(0)
        k_iter = int32(0)
        while k_iter < k_iters:
            for j in range(REG_STAGES):
                if k_iter + j < k_iters:
                    if ASYNC:
                        arrived()
                    cuda.syncthreads()  # all copies have arrived, and the stage before and its products have been read
                    ahead = int32(k_iter + j + (STAGES - 1))
                    copy_stage(shared, stage_wr, q, steps, ahead, first, limit, tid, sizes)
                    decode(a_r, w_r, j)
                    if WK > 1 and k_iter + j > 0:
                        add_up(y_r, shared, int32(products_rd + (PRODUCTS - odd)), k_warp)
                    for t in range(NT):
                        at = int32(stage_rd + b_rd + t * TOKENS * PANEL_INTS)
                        b0, b1, b2, b3 = ptx.load4(shared, at)
                        b4, b5, b6, b7 = ptx.load4(shared, at + T * PANEL_INTS)
                        at = int32(stage_rd + steps_rd + t * TOKENS)
                        d0, d1 = ptx.bits_to_float(uint32(shared[at])), ptx.bits_to_float(uint32(shared[at + 1]))
                        for u in range(U):
                            c0, c1, c2, c3 = sums_of(a_r, 16 * u, (b0, b1, b2, b3, b4, b5, b6, b7))
                            m0 = ptx.mul_rn(ptx.f16_low(m_r[j * U + u]), PER_WEIGHT)
                            m1 = ptx.mul_rn(ptx.f16_high(m_r[j * U + u]), PER_WEIGHT)
                            c0 = ptx.mul_rn(ptx.add_rn(c0, LESS), ptx.mul_rn(m0, d0))
                            c1 = ptx.mul_rn(ptx.add_rn(c1, LESS), ptx.mul_rn(m0, d1))
                            c2 = ptx.mul_rn(ptx.add_rn(c2, LESS), ptx.mul_rn(m1, d0))
                            c3 = ptx.mul_rn(ptx.add_rn(c3, LESS), ptx.mul_rn(m1, d1))
                            n = t * U + u
                            if WK > 1:
                                store_products(shared, products_wr + odd + n * FRAGMENT, c0, c1, c2, c3)
                            else:
                                y_r[4 * n], y_r[4 * n + 1] = ptx.add_rn(y_r[4 * n], c0), ptx.add_rn(y_r[4 * n + 1], c1)
                                y_r[4 * n + 2] = ptx.add_rn(y_r[4 * n + 2], c2)
                                y_r[4 * n + 3] = ptx.add_rn(y_r[4 * n + 3], c3)
                    load_words(w_r, m_r, words, scales, words_rd, scales_rd, j, group, int32(KP), int32(groups), lane)
                    group += WK
                    stage_rd = int32(stage_rd + STAGE if stage_rd < (STAGES - 1) * STAGE else 0)
                    stage_wr = int32(stage_wr + STAGE if stage_wr < (STAGES - 1) * STAGE else 0)
                    odd = int32(PRODUCTS - odd)
            k_iter += REG_STAGES
        if WK > 1:
            cuda.syncthreads()
            add_up(y_r, shared, int32(products_rd + (PRODUCTS - odd)), k_warp)

        # 4. Output.
        lane_row = int32((g >> 2) * 8 + (g & 3) * 2)
        for n in range(OWN):
            fragment = int32(k_warp + n * WK)
            for k in range(4):
                if RESIDUAL:  # beyond the last row or token: of that one, and not used
                    m = min(int32(first + fragment // UNITS * TOKENS + 2 * i + k % 2), int32(limit - 1))
                    r = min(int32((unit0 + fragment % UNITS) * BLOCK_ROWS + lane_row + k // 2), int32(rows - 1))
                    old_r[4 * n + k] = out[m * rows + r]
                else:
                    old_r[4 * n + k] = ZERO
        for n in range(OWN):
            fragment = int32(k_warp + n * WK)
            for k in range(4):
                m = int32(first + fragment // UNITS * TOKENS + 2 * i + k % 2)
                r = int32((unit0 + fragment % UNITS) * BLOCK_ROWS + lane_row + k // 2)
                if m < limit and r < rows and fragment < NT * UNITS:
                    z = y_r[4 * (n * HALVES + 1) + k] if GATED else ZERO
                    out[m * rows + r] = finish(y_r[4 * n * HALVES + k], z, bias, r, rows, old_r[4 * n + k])

    return gemm
