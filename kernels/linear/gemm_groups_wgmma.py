"""The W2A8 GEMM with group scales on sm_90 by `wgmma`. Read gemm_wgmma.py first.

Operands, results and their bits are those of gemm_groups_mma.py. A part of 128 columns is a group, so every product is
waited for, and its sums become floats, times scale and step, before they are added. What a k_iter needs comes by TMA to
one stage of a ring:

    CTA (x, y)     tokens T x .. T x + T - 1;  `row_warps` row-blocks, one a warp, of tile y ("gated": gate rows by the
                   first half of the warps, up rows by the second); `k_warps` such sets of warps, each with its own
                   group of a k_iter; and a warp that loads
    stage          for each k_warp | panel: int8 [T, 128], swizzled | words: 512 bytes a row-block | steps: T floats |
                   scales: 32 bytes a row-block |     each aligned as TMA wants it
    behind stages  with k_warps > 1, twice: a k_iter's products [k_warps, T, rows]
    at the end     in the same place: y [T, rows + 4], from which threads write neighbouring rows of a token

A stage has an mbarrier for what TMA brings, and one at which each warp arrives when it has read the stage. Adding a
group's sums takes more instructions than its product takes cycles, so both must go on side by side:

    k_warps > 1        few tokens and rows: a k_iter's products meet in shared memory, and each k_warp adds up those of
                       its tokens, in the order of the groups, while the next ones are made
    reg_stages 2       up to 32 tokens: a warpgroup has two sets of codes and sums, and adds those of a group while the
                       next one's product runs
    else               with several warpgroups, they take turns at multiplying

The left operand is signed, 64 w (see `signed`): the sums need no sum of q taken off, only 1 / 64 in the scales.
docs/performance-notes.md has what was tried and measured.
"""

from collections.abc import Callable

from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.epilogue import make_group_epilogue
from bitnet_numba.kernels.linear.gemm_groups_mma import GROUP_SCALES
from bitnet_numba.kernels.linear.gemm_mma import TOKENS
from bitnet_numba.kernels.linear.gemm_wgmma import CODES, PADDING, PART
from bitnet_numba.kernels.linear.signed import SHIFT, WEIGHT
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.ptx.tma import PANEL_ALIGN, SPAN_INTS
from bitnet_numba.packing import BLOCK_ROWS, CODE_BITS

MAX_TOKENS = 128  # of a tile
EXTRA_THREADS = WARP  # of a CTA: a warp that loads
GROUP_WARPS = 4  # of a warpgroup
MAX_EARLY = 64  # tokens of a tile
BATCH = 8  # results that a thread computes side by side
SCALE_BYTES = 4 * GROUP_SCALES  # of a row-block and group
ALIGN = 128  # bytes: of whatever TMA writes


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def part_bytes(tile: Tile) -> int:
    """Shared memory of a group in a stage, in bytes; gate and up rows' scales are aligned each."""
    scales = max(_aligned(tile.row_warps * SCALE_BYTES), 2 * _aligned(tile.row_warps // 2 * SCALE_BYTES))
    used = tile.tokens * PART + tile.row_warps * PART * 4 + _aligned(4 * tile.tokens) + scales
    return -(-used // PANEL_ALIGN) * PANEL_ALIGN


def products_bytes(tile: Tile) -> int:
    """Shared memory of a k_iter's products, in bytes; there are two of these."""
    return 4 * tile.tokens * tile.rows * tile.k_warps if tile.k_warps > 1 else 0


def shared_bytes(tile: Tile) -> int:
    """Dynamic shared memory of a CTA in bytes, with room to align its start, which the kernel does."""
    stages = tile.stages * tile.k_warps * part_bytes(tile)
    results = 4 * tile.tokens * (tile.rows + PADDING)
    return max(stages + 2 * products_bytes(tile), results) + PANEL_ALIGN


def make_gemm_groups_wgmma(
    arch: int, tile: Tile, epilogue: str = "store", activation: str = "relu2"
) -> Callable[..., None]:
    """The kernel for a tile with scheme "wgmma"; epilogues as of `make_group_epilogue`.

    Raises ValueError unless row_blocks is 1, row_warps a multiple of 4, tokens 8 or a multiple of 16 up to MAX_TOKENS
    and of 8 k_warps, reg_stages 0 or, with k_warps 1, 2, and there are two stages or more.
    """
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    GATED, RESIDUAL = epilogue == "gated", epilogue == "residual"
    finish = make_group_epilogue(epilogue, activation, inverse=True)
    T, U, WR, WK, REG_STAGES, STAGES = tile[:6]
    HALVES, PAIR = 2 if GATED else 1, REG_STAGES == 2
    UNITS = WR // HALVES  # row-blocks of the output
    ROWS = UNITS * BLOCK_ROWS
    THREADS, WARPS = tile.threads, tile.threads // WARP  # that multiply
    # Bytes: of a stage, a group's part of it, its panel and weights; of gate or up rows' words and scales; where things
    # lie in a part.
    PART_BYTES, PANEL, WORDS = part_bytes(tile), T * PART, WR * PART * 4
    STAGE = WK * PART_BYTES
    HALF, HALF_SCALES = WORDS // HALVES, _aligned(UNITS * SCALE_BYTES)
    STEPS_AT = PANEL + WORDS
    SCALES_AT = STEPS_AT + _aligned(4 * T)
    LOADED = WK * (PANEL + WORDS + 4 * T + WR * SCALE_BYTES)
    PRODUCTS_AT, PRODUCTS, FRAGMENT = STAGES * STAGE, products_bytes(tile), 4 * GROUP_WARPS * WARP
    FRAGMENTS = T // TOKENS  # of a warp's products
    OWN = FRAGMENTS // WK  # that a warp adds up
    WIDTH = WR * BLOCK_ROWS + PADDING
    GROUPS_OF_WARPS = WARPS // GROUP_WARPS
    TURNS = GROUPS_OF_WARPS > 1 and not PAIR and WK == 1
    SUMS, MBARRIERS, Y_REGS = T // 2, 2 * STAGES + GROUPS_OF_WARPS, 4 * OWN
    # Pairs of steps that are loaded while the product runs, where there are registers for them.
    EARLY = FRAGMENTS if T <= MAX_EARLY and T * WK <= 2 * MAX_EARLY else 0
    D_REGS = max(1, 2 * EARLY)
    STEP = THREADS // ROWS  # tokens that are written side by side
    OUT_ROUNDS = T // STEP
    EACH = max(n for n in range(1, BATCH + 1) if OUT_ROUNDS % n == 0)
    ZERO, PER_WEIGHT = float32(0), float32(1 / WEIGHT)
    whole = (T == TOKENS or not T % 16) and T <= MAX_TOKENS and WR > 0 and not WR % 4
    whole = whole and not FRAGMENTS % WK and not (PAIR and WK > 1)
    if U != 1 or REG_STAGES not in (0, 2) or STAGES < 2 or tile.cluster != 1 or not whole:
        raise ValueError(f"no wgmma GEMM with group scales is made of {tile}")
    start, older_finished, finished = ptx.wgmma_s8_pair(T)

    @device_function
    def load_weights(maps, shared, to, mbarrier, k_iter, unit0, up_offset):
        """Starts loading a k_iter's words and scales into the stage at an address."""
        words, scales, _, _ = maps
        for n in range(WK):
            group, part = int32(k_iter * WK + n), to + n * PART_BYTES
            for half in range(HALVES):
                unit = int32(unit0 + half * up_offset)
                ptx.tma_load_2d(words, 0, shared, part + (PANEL + half * HALF), mbarrier, group * PART, unit)
                ptx.tma_load_2d(
                    scales, 0, shared, part + (SCALES_AT + half * HALF_SCALES), mbarrier, group * GROUP_SCALES, unit
                )

    @device_function
    def load_activations(maps, shared, to, mbarrier, k_iter, first):
        """Starts loading a k_iter's activations and steps into the stage at an address."""
        _, _, panels, steps = maps
        for n in range(WK):
            group, part = int32(k_iter * WK + n), to + n * PART_BYTES
            ptx.tma_load_2d(panels, 0, shared, part, mbarrier, group * SPAN_INTS, first)
            ptx.tma_load_2d(steps, 0, shared, part + STEPS_AT, mbarrier, first, group)

    @device_function
    def next_stage(state):
        """The stage after this one: number, offset in bytes, the parity of its mbarriers' phase."""
        slot, stage, parity = state
        slot, stage = int32(slot + 1), int32(stage + STAGE)
        if slot == STAGES:
            slot, stage, parity = int32(0), int32(0), int32(1 - parity)
        return slot, stage, parity

    @device_function
    def multiply(a_r, acc_r, shared, addresses, state):
        """Waits for a stage and starts its product."""
        own_panel, full, own_words, _, _, shift, order, odd = addresses
        slot, stage, parity = state
        ptx.mbarrier_wait(int32(full + 8 * slot), parity)
        word = ptx.load_row_pair(shared, int32(own_words + stage))
        for n in range(CODES):
            a_r[n] = ptx.shifted_weights(word[n], shift)
        if TURNS:
            ptx.mbarrier_spin(order, odd)
        start(acc_r, a_r, shared, int32(own_panel + stage))

    @device_function
    def load_steps(m_r, d_r, shared, addresses, state):
        """The scales of a lane's two rows, and the steps of its tokens."""
        _, _, _, own_scales, own_steps, _, _, _ = addresses
        _, stage, _ = state
        pair = shared[own_scales + (stage >> 2)]
        m_r[0], m_r[1] = ptx.mul_rn(ptx.f16_low(pair), PER_WEIGHT), ptx.mul_rn(ptx.f16_high(pair), PER_WEIGHT)
        for t in range(EARLY):
            d0, d1 = ptx.load2(shared, int32(own_steps + (stage >> 2)) + t * TOKENS)
            d_r[2 * t], d_r[2 * t + 1] = ptx.bits_to_float(uint32(d0)), ptx.bits_to_float(uint32(d1))

    @device_function
    def add_products(y_r, acc_r, m_r, d_r, shared, addresses, state, products_wr):
        """Adds a stage's sums, times scale and step, or with k_warps > 1 stores them, and leaves the stage."""
        _, full, _, _, own_steps, _, _, _ = addresses
        slot, stage, _ = state
        m0, m1 = m_r[0], m_r[1]
        for t in range(T // TOKENS):
            if t < EARLY:
                d0, d1 = d_r[2 * t], d_r[2 * t + 1]
            else:
                e0, e1 = ptx.load2(shared, int32(own_steps + (stage >> 2)) + t * TOKENS)
                d0, d1 = ptx.bits_to_float(uint32(e0)), ptx.bits_to_float(uint32(e1))
            n = 4 * t
            c0 = ptx.mul_rn(ptx.int_to_float(acc_r[n]), ptx.mul_rn(m0, d0))
            c1 = ptx.mul_rn(ptx.int_to_float(acc_r[n + 1]), ptx.mul_rn(m0, d1))
            c2 = ptx.mul_rn(ptx.int_to_float(acc_r[n + 2]), ptx.mul_rn(m1, d0))
            c3 = ptx.mul_rn(ptx.int_to_float(acc_r[n + 3]), ptx.mul_rn(m1, d1))
            if WK > 1:
                ptx.store4(
                    shared, products_wr + t * FRAGMENT, int32(ptx.float_to_bits(c0)), int32(ptx.float_to_bits(c1)),
                    int32(ptx.float_to_bits(c2)), int32(ptx.float_to_bits(c3)),
                )  # fmt: skip
            else:
                y_r[n], y_r[n + 1] = ptx.add_rn(y_r[n], c0), ptx.add_rn(y_r[n + 1], c1)
                y_r[n + 2], y_r[n + 3] = ptx.add_rn(y_r[n + 2], c2), ptx.add_rn(y_r[n + 3], c3)
        ptx.mbarrier_arrive_warp(int32(full + 8 * (STAGES + slot)))

    @device_function
    def add_behind(a_r, acc_r, y_r, older_r, m_r, d_r, shared, addresses, state):
        """Starts the next stage's product, adds this one's meanwhile; returns the next stage."""
        later = next_stage(state)
        multiply(a_r, acc_r, shared, addresses, later)
        load_steps(m_r, d_r, shared, addresses, state)
        older_finished(older_r)
        add_products(y_r, older_r, m_r, d_r, shared, addresses, state, 0)
        return later

    @device_function
    def add_up(y_r, shared, products_rd):
        """Adds a k_iter's products of this warp's tokens, in the order of the groups."""
        for n in range(OWN):
            for k in range(WK):
                at = products_rd + (k * (PRODUCTS // (4 * WK)) + n * FRAGMENT)
                c0, c1, c2, c3 = ptx.load4(shared, at)
                y_r[4 * n] = ptx.add_rn(y_r[4 * n], ptx.bits_to_float(uint32(c0)))
                y_r[4 * n + 1] = ptx.add_rn(y_r[4 * n + 1], ptx.bits_to_float(uint32(c1)))
                y_r[4 * n + 2] = ptx.add_rn(y_r[4 * n + 2], ptx.bits_to_float(uint32(c2)))
                y_r[4 * n + 3] = ptx.add_rn(y_r[4 * n + 3], ptx.bits_to_float(uint32(c3)))

    def gemm(
        words, panels, steps, scales, count, bias, out, M, steps_row, rows, KP, groups, k_iters, row_blocks, up_offset
    ):  # fmt: skip
        shared = ptx.pointer(cuda.shared.array(0, int32))
        # What has come to a stage; what has been read of it; whose turn it is to multiply.
        mbarrier_s = ptx.pointer(cuda.shared.array(MBARRIERS, int64))
        a_r = cuda.local.array(CODES, int32)
        acc_r = cuda.local.array(SUMS, int32)
        b_r = cuda.local.array(CODES, int32)
        more_r = cuda.local.array(SUMS, int32)
        y_r = cuda.local.array(Y_REGS, float32)
        m_r = cuda.local.array(2, float32)
        d_r = cuda.local.array(D_REGS, float32)
        old_r = cuda.local.array(EACH, float32)

        tid = int32(cuda.threadIdx.x)
        w, lane = tid >> 5, tid & 31
        g, i = lane >> 2, lane & 3
        k = int32(w // WR) if WK > 1 else int32(0)  # which group of a k_iter
        row_warp = int32(w - k * WR)
        first = int32(cuda.blockIdx.x) * T
        limit = min(int32(M), int32(count[0]))  # no kernel writes it: it may be read before the wait
        if first >= limit:
            if first == 0:
                wait()  # so that the launch does not end before those it follows
            return
        unit0 = int32(cuda.blockIdx.y) * UNITS
        k_iters = int32(k_iters)
        unaligned, full = ptx.shared_address(shared, 0), ptx.shared_address(mbarrier_s, 0)
        base = int32((unaligned + (PANEL_ALIGN - 1)) & -PANEL_ALIGN)
        if tid == THREADS:
            for n in range(STAGES):
                ptx.mbarrier_init(full + 8 * n)
                ptx.mbarrier_init_warps(full + 8 * (STAGES + n), int32(WARPS))
            for n in range(GROUPS_OF_WARPS):
                ptx.mbarrier_init_warps(full + 8 * (2 * STAGES + n), int32(WARPS if WK > 1 else GROUP_WARPS))
        for n in range(Y_REGS):
            y_r[n] = ZERO
        cuda.syncthreads()
        trigger()

        now = int32(0), int32(0), int32(0)
        k_iter = int32(0)
        if w == WARPS:
            # 1. The warp that loads: the first stages' weights before the wait, then their activations, then the rest.
            if lane == 0:
                maps = words, scales, panels, steps
                filled = min(k_iters, int32(STAGES))
                ptx.prefetch_tensor_map(panels, 0)
                ptx.prefetch_tensor_map(steps, 0)
                for n in range(filled):
                    ptx.mbarrier_expect_tx(full + 8 * n, LOADED)
                    load_weights(maps, shared, int32(base + n * STAGE), full + 8 * n, int32(n), unit0, int32(up_offset))
                wait()
                for n in range(filled):
                    load_activations(maps, shared, int32(base + n * STAGE), full + 8 * n, int32(n), first)
                k_iter = filled
                while k_iter < k_iters:
                    slot, stage, parity = now
                    to, mbarrier = int32(base + stage), int32(full + 8 * slot)
                    ptx.mbarrier_wait(int32(mbarrier + 8 * STAGES), parity)
                    ptx.mbarrier_expect_tx(mbarrier, LOADED)
                    load_activations(maps, shared, to, mbarrier, k_iter, first)
                    load_weights(maps, shared, to, mbarrier, k_iter, unit0, int32(up_offset))
                    now, k_iter = next_stage(now), int32(k_iter + 1)
        else:
            # 2. Products, group by group.
            wait()
            own_panel = int32(base + k * PART_BYTES)
            own_words = int32(own_panel + PANEL + ((row_warp * PART + (g >> 2) * 16 + (g & 3) * 2) << 2))
            scales_at = SCALES_AT + row_warp // UNITS * HALF_SCALES + row_warp % UNITS * SCALE_BYTES
            own_scales = int32((own_panel - unaligned + scales_at) >> 2) + g
            own_steps = int32((own_panel - unaligned + STEPS_AT) >> 2) + 2 * i
            # A warpgroup's products lie one after another; where those of its rows and the first k_warp begin.
            products = int32((base - unaligned + PRODUCTS_AT) >> 2) + tid % (GROUP_WARPS * WARP) * 4
            products += row_warp // GROUP_WARPS * (FRAGMENTS * FRAGMENT)
            products_wr = int32(products + k * (PRODUCTS // (4 * WK)))
            products_rd = int32(products + k * (OWN * FRAGMENT))
            shift = int32(SHIFT - CODE_BITS * i)
            own_group = int32(w // GROUP_WARPS)
            order = int32(full + 8 * (2 * STAGES + own_group))
            after = int32(full + 8 * (2 * STAGES + (own_group + 1) % GROUPS_OF_WARPS))
            odd = int32(1) if own_group == 0 else int32(0)  # the first one's first turn needs nobody
            addresses = own_panel, full, own_words, own_scales, own_steps, shift, order, odd
            if WK > 1:
                # One k_iter's products are added up while the next one's are made.
                meet, parity, there = int32(full + 8 * 2 * STAGES), int32(0), int32(0)
                while k_iter < k_iters:
                    multiply(a_r, acc_r, shared, addresses, now)
                    load_steps(m_r, d_r, shared, addresses, now)
                    if k_iter > 0:
                        ptx.mbarrier_wait(meet, parity)
                        parity = int32(1 - parity)
                        add_up(y_r, shared, int32(products_rd + (PRODUCTS // 4 - there)))
                    finished(acc_r)
                    add_products(y_r, acc_r, m_r, d_r, shared, addresses, now, int32(products_wr + there))
                    ptx.mbarrier_arrive_warp(meet)
                    there = int32(PRODUCTS // 4 - there)
                    now, k_iter = next_stage(now), int32(k_iter + 1)
                ptx.mbarrier_wait(meet, parity)
                add_up(y_r, shared, int32(products_rd + (PRODUCTS // 4 - there)))
            elif not PAIR:
                while k_iter < k_iters:
                    multiply(a_r, acc_r, shared, addresses, now)
                    load_steps(m_r, d_r, shared, addresses, now)
                    finished(acc_r)
                    if TURNS:
                        ptx.mbarrier_arrive_warp(after)
                    add_products(y_r, acc_r, m_r, d_r, shared, addresses, now, 0)
                    now, k_iter = next_stage(now), int32(k_iter + 1)
                    odd = int32(1 - odd)
                    addresses = own_panel, full, own_words, own_scales, own_steps, shift, order, odd
            else:
                # In pairs, for the two sets; with conditions between, the assembler would run one product at a time.
                multiply(a_r, acc_r, shared, addresses, now)
                while k_iter + 2 < k_iters:
                    now = add_behind(b_r, more_r, y_r, acc_r, m_r, d_r, shared, addresses, now)
                    now = add_behind(a_r, acc_r, y_r, more_r, m_r, d_r, shared, addresses, now)
                    k_iter = int32(k_iter + 2)
                if k_iter + 1 < k_iters:
                    now = add_behind(b_r, more_r, y_r, acc_r, m_r, d_r, shared, addresses, now)
                    load_steps(m_r, d_r, shared, addresses, now)
                    finished(more_r)
                    add_products(y_r, more_r, m_r, d_r, shared, addresses, now, 0)
                else:
                    load_steps(m_r, d_r, shared, addresses, now)
                    finished(acc_r)
                    add_products(y_r, acc_r, m_r, d_r, shared, addresses, now, 0)
        cuda.syncthreads()

        # 3. Output. Values of a lane: rows r, r, r + 1, r + 1 of tokens 2 i, 2 i + 1, 2 i, 2 i + 1.
        if w < WARPS:
            to = ((base - unaligned) >> 2) + 2 * i * WIDTH + row_warp * BLOCK_ROWS + (g >> 2) * 8 + (g & 3) * 2
            to += k * (OWN * TOKENS * WIDTH)
            for n in range(OWN):
                y0, y1 = int32(ptx.float_to_bits(y_r[4 * n])), int32(ptx.float_to_bits(y_r[4 * n + 1]))
                y2, y3 = int32(ptx.float_to_bits(y_r[4 * n + 2])), int32(ptx.float_to_bits(y_r[4 * n + 3]))
                ptx.store2(shared, to + n * (TOKENS * WIDTH), y0, y2)
                ptx.store2(shared, to + (n * TOKENS + 1) * WIDTH, y1, y3)
        cuda.syncthreads()
        own, token = int32(tid % ROWS), int32(tid // ROWS)
        row = int32(unit0 * BLOCK_ROWS + own)
        if row < rows and w < WARPS:
            last = int32((limit - 1) * rows + row)
            rd = int32(((base - unaligned) >> 2) + token * WIDTH + own)
            wr = int32((first + token) * rows + row)
            jump = int32(STEP * rows)
            while token < T and first + token < limit:
                for n in range(EACH):  # beyond the last token: of that one, and not used
                    old_r[n] = out[min(int32(wr + n * jump), last)] if RESIDUAL else ZERO
                for n in range(EACH):
                    y = ptx.bits_to_float(uint32(shared[rd + n * (STEP * WIDTH)]))
                    z = ptx.bits_to_float(uint32(shared[rd + (n * (STEP * WIDTH) + ROWS)])) if GATED else ZERO
                    y = finish(y, z, bias, row, int32(rows), old_r[n])
                    if wr <= last:
                        out[wr] = y
                    wr = int32(wr + jump)
                rd = int32(rd + EACH * STEP * WIDTH)
                token = int32(token + EACH * STEP)

    return gemm
