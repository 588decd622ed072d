"""The W2A8 GEMM on sm_90 by `wgmma`, which four warps (a warpgroup) issue together.

Operands, results and their bits are those of gemm_mma.py, whose `mma.sync` reaches half of this unit's rate here. TMA
loads weights and activations to shared memory, `stages` - 1 k_iters ahead; registers hold only codes and sums.

    CTA (x, y)     tokens T x .. T x + T - 1;  `row_warps` row-blocks, one a warp, of tile y / cluster ("gated": gate
                   rows by the first half of the warps, up rows by the second); `k_warps` such sets of warps, each with
                   its own parts of a K iteration
    cluster        CTAs of one tile, each with its own k_iters: CTA y % cluster takes that share of the columns
    part           128 columns.  activations: a panel, int8 [T, 128], in 128-byte swizzle
                                 weights: 512 bytes a row-block, as they lie in memory
    k_iter         k_warps parts, loaded as one box of activations and one of weights ("gated": two), where a row-block
                   has its parts side by side; one mbarrier a stage.  Few tokens have a stage for every k_iter (`refill`
                   is not set): everything is loaded at once, and no barrier is needed until the end

    shared memory  | stage 0: panels, words | stage 1: panels, words | ...
                   at the end, in the same place: int32 sums [k_warps, T, rows + 4]

A warp's 16 rows x 32 columns of an instruction are the register operand. With g = lane / 4, i = lane % 4, a lane takes
the words of rows r and r + 1, r = 8 (g / 4) + 2 (g % 4), and of each word the four columns 4 i .. 4 i + 3:
(word >> 2 i) & mask. So columns come in their natural order, and the four lanes of a row read the same words.

Few tokens cost latency, not throughput. So weights, scales and tensor maps, which no earlier kernel writes, are loaded
before `pdl_wait`, old values of a residual right after it, and few but long rows are cut along K for a cluster.

Sums leave through shared memory (in a cluster each CTA adds up its tokens' from all), so that neighbouring threads
write neighbouring rows of a token, 128 bytes a warp, and what depends on the row alone is computed once a thread.

A thread takes about 120 cycles to start a load. So a k_iter takes few of them, of large boxes, and each is started by
another warp.

Loads of old values and the filling of the first stages stay in the kernel: as device functions they change machine
code. docs/performance-notes.md has what was tried and measured.
"""

from collections.abc import Callable

from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.epilogue import make_epilogue, reciprocal
from bitnet_numba.kernels.linear.gemm_mma import TOKENS
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.ptx.tma import PANEL_ALIGN
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, CODE_BITS

ARCH = 90  # wgmma is this architecture's alone
PART = 128  # columns of a part, and the words of its row-block
CODES = 16  # registers of a warp's part
PADDING = 4  # sums between a token's rows and the next token's: 8-byte stores then touch every bank once
SHARED_BYTES = 227 * 1024  # of an SM that one CTA can have
MAX_TOKENS = 256  # of one instruction
BATCH = 8  # results that a thread computes side by side
MAX_EARLY_LOADS = 32  # old values of a residual that a thread loads before its products
OTHER_REGISTERS = 44  # of a thread, beside sums, codes and old values


def stage_bytes(tile: Tile) -> int:
    """Shared memory of a stage, in bytes."""
    return tile.k_warps * (tile.tokens * PART + tile.row_warps * PART * 4)


def shared_bytes(tile: Tile) -> int:
    """Dynamic shared memory of a CTA in bytes, with room to align its start, which the kernel does."""
    sums = 4 * tile.k_warps * tile.tokens * (tile.row_warps * BLOCK_ROWS + PADDING)
    return max(tile.stages * stage_bytes(tile), sums) + PANEL_ALIGN


def cta_bytes(tile: Tile) -> int:
    """All shared memory of a CTA in bytes: mbarriers and what results take of each token too."""
    return shared_bytes(tile) + 8 * tile.stages + 16 * tile.tokens


def make_gemm_wgmma(arch: int, tile: Tile, epilogue: str = "store", activation: str = "relu2") -> Callable[..., None]:
    """The kernel for a tile with scheme "wgmma"; epilogues as of `make_epilogue`.

    Raises ValueError unless row_blocks is 1, row_warps a multiple of 4, tokens 8, 24 or a multiple of 16 up to 256, and
    shared memory and results a thread are within their limits.
    """
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    GATED, RESIDUAL, ACC = epilogue == "gated", epilogue == "residual", epilogue == "acc"
    finish = make_epilogue(epilogue, activation, inverse=True)
    T, U, WR, WK, REG_STAGES, STAGES = tile[:6]
    CLUSTER, REFILL = tile.cluster, tile.refill
    HALVES = 2 if GATED else 1
    UNITS = WR // HALVES  # row-blocks of the output
    ROWS = UNITS * BLOCK_ROWS
    THREADS, WARPS = tile.threads, tile.threads // WARP
    # Bytes: of a stage, of a part's activations, of a stage's gate or up rows; where its weights begin.
    STAGE, PANEL, HALF = stage_bytes(tile), T * PART, WK * UNITS * PART * 4
    WORDS_AT = WK * PANEL
    WIDTH = WR * BLOCK_ROWS + PADDING
    SUMS = T * WIDTH
    PIECES = SUMS // 4
    ACC_REGS = T // 2
    STEP = THREADS // ROWS  # tokens that are written side by side
    JUMP = STEP * CLUSTER  # from one of a thread's tokens to its next
    OUT_ROUNDS = -(-T // JUMP)
    EXACT = T % JUMP == 0
    registers = min(255, 65536 // (THREADS * tile.ctas_per_sm))
    fits = ACC_REGS + 2 * CODES + OUT_ROUNDS + OTHER_REGISTERS <= registers
    EARLY = RESIDUAL and OUT_ROUNDS <= MAX_EARLY_LOADS and fits
    whole_batches = max(n for n in range(1, BATCH + 1) if OUT_ROUNDS % n == 0)
    EACH = OUT_ROUNDS if CLUSTER > 1 or EARLY else whole_batches
    SCALE_ROUNDS = -(-T // THREADS)
    TOKEN_VALUES = 4 * T  # of each token: sum of q, scale, the scale's reciprocal
    Y, ZERO = int32 if ACC else float32, float32(0)
    whole = (not T % 16 or T in (8, 24)) and T <= MAX_TOKENS and not WR % 4
    many = cta_bytes(tile) > SHARED_BYTES or CLUSTER > 1 and OUT_ROUNDS > 2 * BATCH
    if U != 1 or REG_STAGES or STAGES < 2 - (not REFILL) or not whole or many:
        raise ValueError(f"no wgmma GEMM is made of {tile}")
    start, all_but_one, finished = ptx.wgmma_s8(T)

    @device_function
    def load_words(words, shared, stage, mbarrier, part, unit, half):
        """Starts the load of a k_iter's weights from row-block `unit` on, half 1: of up rows."""
        at = int32(stage + WORDS_AT + half * HALF)
        ptx.tma_load_3d(words, 0, shared, at, mbarrier, 0, part * (PART // BLOCK_COLS), unit)

    @device_function
    def load_codes(code_r, shared, at, shift):
        word = ptx.load_row_pair(shared, at)
        for n in range(CODES):
            code_r[n] = ptx.shifted_codes(word[n], shift)

    @device_function
    def k_iteration(code_r, acc_r, block, addresses, state, k_iter):
        """A k_iter but the first: starts its products, and refills the stage before it. Returns its stage: number,
        offset in bytes, and the mbarrier's phase."""
        words, panels, shared, warp, lane, first, unit0, part0, up_offset, k_iters = block
        base, mbarrier, own_panel, own_words, shift = addresses
        slot, stage, parity = state
        before, stage_before = slot, stage
        slot, stage = int32(slot + 1), int32(stage + STAGE)
        if REFILL and slot == STAGES:
            slot, stage, parity = int32(0), int32(0), int32(1 - parity)
        ptx.mbarrier_wait(int32(mbarrier + 8 * slot), parity)
        load_codes(code_r, shared, int32(own_words + stage), shift)
        start(acc_r, code_r, shared, int32(own_panel + stage))
        all_but_one()
        if REFILL:
            cuda.syncthreads()  # all warps have multiplied the stage before
            ahead = int32(k_iter + (STAGES - 1))
            if lane == 0 and warp <= HALVES and ahead < k_iters:
                full, to, part = int32(mbarrier + 8 * before), int32(base + stage_before), int32(part0 + ahead * WK)
                if warp == 0:
                    ptx.mbarrier_expect_tx(full, STAGE)
                    ptx.tma_load_3d(panels, 0, shared, to, full, 0, first, part)
                else:
                    half = int32(warp - 1)
                    load_words(words, shared, to, full, part, int32(unit0 + half * up_offset), half)
        return slot, stage, parity

    @device_function
    def read_results(y_r, old_r, shared, address, sums, token_s, token, row_values):
        """EACH results of a thread, from `token` on; without branches, so that their latencies overlap. sums: index of
        its row's sum for the first token, in int32."""
        m_row, m_up, bias, row, rows = row_values
        for n in range(EACH):
            t = token + n * JUMP if EXACT else min(int32(token + n * JUMP), int32(T - 1))
            rd = int32(sums + t * WIDTH)
            e = int32(0)
            if CLUSTER > 1:
                c = ptx.cluster_load(shared, address + 4 * rd, 0)
                if GATED:
                    e = ptx.cluster_load(shared, address + 4 * (rd + ROWS), 0)
                for other in range(1, CLUSTER):
                    c += ptx.cluster_load(shared, address + 4 * rd, other)
                    if GATED:
                        e += ptx.cluster_load(shared, address + 4 * (rd + ROWS), other)
            else:
                c = shared[rd]
                if GATED:
                    e = shared[rd + ROWS]
                for k in range(1, WK):
                    c += shared[rd + k * SUMS]
                    if GATED:
                        e += shared[rd + (k * SUMS + ROWS)]
            old = old_r[n] if RESIDUAL else ZERO
            q_sum, s, r, _ = ptx.load4(token_s, 4 * t)
            divisor = ptx.bits_to_float(uint32(s)), ptx.bits_to_float(uint32(r))
            y_r[n] = finish(int32(c), int32(e), q_sum, m_row, m_up, divisor, bias, row, rows, old)

    @device_function
    def store_results(out, y_r, wr, jump, last, token):
        """Stores EACH results of a thread except those beyond the last token; returns the next one's index."""
        for n in range(EACH):
            if wr <= last and (EXACT or token + n * JUMP < T):
                out[wr] = y_r[n]
            wr = int32(wr + jump)
        return wr

    @device_function
    def add_warps(shared, sums, tid):
        """The sums of a CTA's k_warps sets of warps become one."""
        for piece in range(tid, PIECES, THREADS):
            at = sums + 4 * piece
            c0, c1, c2, c3 = ptx.load4(shared, at)
            for part in range(1, WK):
                d0, d1, d2, d3 = ptx.load4(shared, at + part * SUMS)
                c0, c1, c2, c3 = int32(c0 + d0), int32(c1 + d1), int32(c2 + d2), int32(c3 + d3)
            ptx.store4(shared, at, c0, c1, c2, c3)

    def gemm(
        words, panels, s, q_sum, count, scales, bias, out, M, rows, KP, k_iters, row_blocks, up_offset, bound1, bound2
    ):  # fmt: skip
        shared = ptx.pointer(cuda.shared.array(0, int32))
        mbarrier_s = ptx.pointer(cuda.shared.array(STAGES, int64))
        token_s = ptx.pointer(cuda.shared.array(TOKEN_VALUES, int32, SHARED_ALIGN))
        a_r = cuda.local.array(CODES, int32)
        b_r = cuda.local.array(CODES, int32)
        acc_r = cuda.local.array(ACC_REGS, int32)
        old_r = cuda.local.array(EACH, float32)
        y_r = cuda.local.array(EACH, Y)

        tid = int32(cuda.threadIdx.x)
        warp, lane = tid >> 5, tid & 31
        g, i = lane >> 2, lane & 3
        k = int32(warp // WR) if WK > 1 else int32(0)  # which parts
        w = int32(warp - k * WR)
        first = int32(cuda.blockIdx.x) * T
        limit = min(int32(M), int32(count[0]))  # no kernel writes it: it may be read before the wait
        if first >= limit:
            if first == 0:
                wait()  # so that the launch does not end before those it follows
            return
        y = int32(cuda.blockIdx.y)
        rank = int32(y % CLUSTER) if CLUSTER > 1 else int32(0)
        unit0 = int32(y // CLUSTER) * UNITS
        part0 = int32(rank * k_iters * WK)
        filled = min(int32(k_iters), int32(STAGES))  # k_iters that have a stage from the beginning
        # Addresses in shared memory, in bytes.
        unaligned, mbarrier = ptx.shared_address(shared, 0), ptx.shared_address(mbarrier_s, 0)
        base = int32((unaligned + (PANEL_ALIGN - 1)) & -PANEL_ALIGN)

        # 1. The first stages' weights, while the launches before this one still run. Warps take k_iters round-robin.
        if tid == 0:
            for n in range(STAGES):
                ptx.mbarrier_init(mbarrier + 8 * n)
                if n < k_iters:
                    ptx.mbarrier_expect_tx(mbarrier + 8 * n, STAGE)
            ptx.prefetch_tensor_map(panels, 0)
        cuda.syncthreads()
        if lane == 0:
            for n in range(warp, filled, WARPS):
                to, part = int32(base + n * STAGE), int32(part0 + n * WK)
                for half in range(HALVES):
                    load_words(words, shared, to, mbarrier + 8 * n, part, int32(unit0 + half * up_offset), half)
        for n in range(ACC_REGS):
            acc_r[n] = int32(0)
        # A thread's results: one row of every JUMP-th token.
        own = int32(tid % ROWS)
        row = int32(unit0 * BLOCK_ROWS + own)
        token = int32(tid // ROWS + rank * STEP)
        if tid >= STEP * ROWS or row >= rows:
            token, row = int32(T), int32(rows - 1)
        m_row = m_up = ZERO
        if not ACC:
            segment = int32(0) if row < bound1 else (int32(1) if row < bound2 else int32(2))
            m_row = scales[segment]
            if GATED:
                m_up = scales[1]
        wr, jump, last = int32((first + token) * rows + row), int32(JUMP * rows), int32((limit - 1) * rows + row)
        trigger()
        wait()

        # 2. The first stages' activations; those of a ring by one warp, so that they come in order.
        if lane == 0 and (not REFILL or warp == 0):
            for n in range(warp, filled, 1 if REFILL else WARPS):
                ptx.tma_load_3d(
                    panels, 0, shared, int32(base + n * STAGE), mbarrier + 8 * n, 0, first, int32(part0 + n * WK)
                )
        if EARLY:
            for n in range(EACH):  # beyond the last token: of that one, and not used
                old_r[n] = out[min(int32(wr + n * jump), last)]
        for n in range(SCALE_ROUNDS):
            t = int32(tid + n * THREADS)
            if t < T and first + t < limit:
                scale = s[first + t]
                bits, inverse_bits = ptx.float_to_bits(scale), ptx.float_to_bits(float32(reciprocal(scale)))
                ptx.store4(token_s, 4 * t, q_sum[first + t], int32(bits), int32(inverse_bits), int32(0))

        # 3. Products. While those of one stage run, the next one's words are decoded: the tensor cores never idle.
        own_panel = int32(base + k * PANEL)
        own_words = int32(base + WORDS_AT + (((w * WK + k) * PART + (g >> 2) * 16 + (g & 3) * 2) << 2))
        shift = int32(CODE_BITS * i)
        ptx.mbarrier_wait(mbarrier, 0)
        load_codes(a_r, shared, own_words, shift)
        start(acc_r, a_r, shared, own_panel)
        block = words, panels, shared, warp, lane, first, unit0, part0, int32(up_offset), int32(k_iters)
        addresses = base, mbarrier, own_panel, own_words, shift
        state = int32(0), int32(0), int32(0)
        # In pairs, for the two sets of codes: with a condition between, the assembler would run one product at a time.
        k_iter = int32(1)
        while k_iter + 1 < k_iters:
            state = k_iteration(b_r, acc_r, block, addresses, state, k_iter)
            state = k_iteration(a_r, acc_r, block, addresses, state, int32(k_iter + 1))
            k_iter = int32(k_iter + 2)
        if k_iter < k_iters:
            k_iteration(b_r, acc_r, block, addresses, state, k_iter)
        finished(acc_r)
        cuda.syncthreads()

        # 4. Output. Sums c0 .. c3 of a lane: rows r, r, r + 1, r + 1 of tokens 2 i, 2 i + 1, 2 i, 2 i + 1.
        sums = (base - unaligned) >> 2
        to = sums + k * SUMS + 2 * i * WIDTH + w * BLOCK_ROWS + (g >> 2) * 8 + (g & 3) * 2
        for t in range(T // TOKENS):
            ptx.store2(shared, to + t * (TOKENS * WIDTH), acc_r[4 * t], acc_r[4 * t + 2])
            ptx.store2(shared, to + (t * TOKENS + 1) * WIDTH, acc_r[4 * t + 1], acc_r[4 * t + 3])
        row_values = m_row, m_up, bias, row, int32(rows)
        if CLUSTER > 1:
            # The CTA's own sums become one, then each CTA reads its tokens' from all.
            if WK > 1:
                cuda.syncthreads()
                add_warps(shared, sums, tid)
            ptx.cluster_arrive()
            ptx.cluster_wait()
            writes = token < T and first + token < limit
            if writes:
                if RESIDUAL and not EARLY:
                    for n in range(EACH):
                        old_r[n] = out[min(int32(wr + n * jump), last)]
                read_results(y_r, old_r, shared, unaligned, sums + own, token_s, token, row_values)
            ptx.cluster_arrive()  # a CTA may exit once no other reads its sums
            if writes:
                wr = store_results(out, y_r, wr, jump, last, token)
            ptx.cluster_wait()
        else:
            cuda.syncthreads()
            while token < T and first + token < limit:
                if RESIDUAL and not EARLY:
                    for n in range(EACH):
                        old_r[n] = out[min(int32(wr + n * jump), last)]
                read_results(y_r, old_r, shared, unaligned, sums + own, token_s, token, row_values)
                wr = store_results(out, y_r, wr, jump, last, token)
                token = int32(token + JUMP * EACH)

    return gemm
