"""The W2A8 GEMM with group scales on sm_90 by `wgmma`, for many tokens. Read gemm_wgmma.py first.

Operands, results and their bits are those of gemm_groups_mma.py. A part of 128 columns is a group, so every product is
waited for, and its sums become floats, times scale and step, before the next one's begin; meanwhile the other
warpgroups' products run. What a k_iter needs comes by TMA to one stage of a ring, with one mbarrier:

    CTA (x, y)     tokens T x .. T x + T - 1;  `row_warps` row-blocks, one a warp, of tile y ("gated": gate rows by the
                   first half of the warps, up rows by the second)
    stage          | panel: int8 [T, 128], swizzled | words: 512 bytes a row-block | steps: T floats | scales: 32 bytes
                   a row-block |     rounded up to PANEL_ALIGN
    at the end     in the same place: y [T, rows + 4], from which threads write neighbouring rows of a token

The left operand is signed, 64 w (see `signed`): the sums need no sum of q taken off, only 1 / 64 in the scales.
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
from bitnet_numba.kernels.ptx.base import device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.ptx.tma import PANEL_ALIGN, SPAN_INTS
from bitnet_numba.packing import BLOCK_ROWS, CODE_BITS

MIN_TOKENS, MAX_TOKENS = 32, 128  # of a tile
BATCH = 8  # results that a thread computes side by side
SCALE_BYTES = 4 * GROUP_SCALES  # of a row-block and group


def stage_bytes(tile: Tile) -> int:
    """Shared memory of a stage, in bytes."""
    used = tile.tokens * (PART + 4) + tile.row_warps * (PART * 4 + SCALE_BYTES)
    return -(-used // PANEL_ALIGN) * PANEL_ALIGN


def shared_bytes(tile: Tile) -> int:
    """Dynamic shared memory of a CTA in bytes, with room to align its start, which the kernel does."""
    results = 4 * tile.tokens * (tile.row_warps * BLOCK_ROWS + PADDING)
    return max(tile.stages * stage_bytes(tile), results) + PANEL_ALIGN


def make_gemm_groups_wgmma(
    arch: int, tile: Tile, epilogue: str = "store", activation: str = "relu2"
) -> Callable[..., None]:
    """The kernel for a tile with scheme "wgmma"; epilogues as of `make_group_epilogue`.

    Raises ValueError unless row_blocks and k_warps are 1, row_warps 4 or 8 ("gated": 8), tokens a multiple of 32 from
    MIN_TOKENS to MAX_TOKENS, and there are two stages or more.
    """
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    GATED, RESIDUAL = epilogue == "gated", epilogue == "residual"
    finish = make_group_epilogue(epilogue, activation, inverse=True)
    T, U, WR, WK, REG_STAGES, STAGES = tile[:6]
    HALVES = 2 if GATED else 1
    UNITS = WR // HALVES  # row-blocks of the output
    ROWS = UNITS * BLOCK_ROWS
    THREADS = tile.threads
    # Bytes: of a stage, of its panel and weights; of gate or up rows' words and scales; where things lie in a stage.
    STAGE, PANEL, WORDS = stage_bytes(tile), T * PART, WR * PART * 4
    HALF, HALF_SCALES = WORDS // HALVES, UNITS * SCALE_BYTES
    STEPS_AT, SCALES_AT = PANEL + WORDS, PANEL + WORDS + 4 * T
    LOADED = SCALES_AT + WR * SCALE_BYTES
    WIDTH = WR * BLOCK_ROWS + PADDING
    SUMS = T // 2
    STEP = THREADS // ROWS  # tokens that are written side by side
    OUT_ROUNDS = T // STEP
    EACH = max(n for n in range(1, BATCH + 1) if OUT_ROUNDS % n == 0)
    ZERO, PER_WEIGHT = float32(0), float32(1 / WEIGHT)
    whole = T % 32 == 0 and MIN_TOKENS <= T <= MAX_TOKENS and WR in ((8,) if GATED else (4, 8))
    if U != 1 or WK != 1 or REG_STAGES or STAGES < 2 or tile.cluster != 1 or not whole:
        raise ValueError(f"no wgmma GEMM with group scales is made of {tile}")
    start, _, finished = ptx.wgmma_s8(T, signed=True)

    @device_function
    def load_weights(maps, shared, to, mbarrier, group, unit0, up_offset):
        """Starts loading a group's words and scales into the stage at an address."""
        words, scales, _, _ = maps
        for half in range(HALVES):
            unit = int32(unit0 + half * up_offset)
            ptx.tma_load_2d(words, 0, shared, to + (PANEL + half * HALF), mbarrier, group * PART, unit)
            ptx.tma_load_2d(
                scales, 0, shared, to + (SCALES_AT + half * HALF_SCALES), mbarrier, group * GROUP_SCALES, unit
            )

    @device_function
    def load_activations(maps, shared, to, mbarrier, group, first):
        """Starts loading a group's activations and steps into the stage at an address."""
        _, _, panels, steps = maps
        ptx.tma_load_2d(panels, 0, shared, to, mbarrier, group * SPAN_INTS, first)
        ptx.tma_load_2d(steps, 0, shared, to + STEPS_AT, mbarrier, first, group)

    @device_function
    def load_operand(a_r, shared, at, shift):
        word = ptx.load_row_pair(shared, at)
        for n in range(CODES):
            a_r[n] = ptx.shifted_weights(word[n], shift)

    @device_function
    def add_products(y_r, acc_r, shared, steps_rd, m0, m1):
        """Adds a group's sums, times scale and step."""
        for t in range(T // TOKENS):
            d0 = ptx.bits_to_float(uint32(shared[steps_rd + t * TOKENS]))
            d1 = ptx.bits_to_float(uint32(shared[steps_rd + t * TOKENS + 1]))
            n = 4 * t
            y_r[n] = ptx.add_rn(y_r[n], ptx.mul_rn(ptx.int_to_float(acc_r[n]), ptx.mul_rn(m0, d0)))
            y_r[n + 1] = ptx.add_rn(y_r[n + 1], ptx.mul_rn(ptx.int_to_float(acc_r[n + 1]), ptx.mul_rn(m0, d1)))
            y_r[n + 2] = ptx.add_rn(y_r[n + 2], ptx.mul_rn(ptx.int_to_float(acc_r[n + 2]), ptx.mul_rn(m1, d0)))
            y_r[n + 3] = ptx.add_rn(y_r[n + 3], ptx.mul_rn(ptx.int_to_float(acc_r[n + 3]), ptx.mul_rn(m1, d1)))

    def gemm(
        words, panels, steps, scales, count, bias, out, M, steps_row, rows, KP, groups, k_iters, row_blocks, up_offset
    ):  # fmt: skip
        shared = ptx.pointer(cuda.shared.array(0, int32))
        mbarrier_s = ptx.pointer(cuda.shared.array(STAGES, int64))
        a_r = cuda.local.array(CODES, int32)
        acc_r = cuda.local.array(SUMS, int32)
        y_r = cuda.local.array(SUMS, float32)
        old_r = cuda.local.array(EACH, float32)

        tid = int32(cuda.threadIdx.x)
        w, lane = tid >> 5, tid & 31
        g, i = lane >> 2, lane & 3
        first = int32(cuda.blockIdx.x) * T
        limit = min(int32(M), int32(count[0]))  # no kernel writes it: it may be read before the wait
        if first >= limit:
            if first == 0:
                wait()  # so that the launch does not end before those it follows
            return
        unit0 = int32(cuda.blockIdx.y) * UNITS
        filled = min(int32(k_iters), int32(STAGES))
        unaligned, mbarrier = ptx.shared_address(shared, 0), ptx.shared_address(mbarrier_s, 0)
        base = int32((unaligned + (PANEL_ALIGN - 1)) & -PANEL_ALIGN)
        maps = words, scales, panels, steps

        # 1. The first stages' weights, before the wait, and their activations.
        if tid == 0:
            for n in range(STAGES):
                ptx.mbarrier_init(mbarrier + 8 * n)
                if n < k_iters:
                    ptx.mbarrier_expect_tx(mbarrier + 8 * n, LOADED)
            ptx.prefetch_tensor_map(panels, 0)
            ptx.prefetch_tensor_map(steps, 0)
            for n in range(filled):
                load_weights(maps, shared, int32(base + n * STAGE), mbarrier + 8 * n, int32(n), unit0, int32(up_offset))
        for n in range(SUMS):
            y_r[n] = ZERO
        trigger()
        wait()
        if tid == 0:
            for n in range(filled):
                load_activations(maps, shared, int32(base + n * STAGE), mbarrier + 8 * n, int32(n), first)
        cuda.syncthreads()

        # 2. Products, group by group.
        own_words = int32(base + PANEL + ((w * PART + (g >> 2) * 16 + (g & 3) * 2) << 2))
        own_scales = int32((base - unaligned + SCALES_AT + w * SCALE_BYTES) >> 2) + g
        own_steps = int32((base - unaligned + STEPS_AT) >> 2) + 2 * i
        shift = int32(SHIFT - CODE_BITS * i)
        slot, stage, parity = int32(0), int32(0), int32(0)
        for k_iter in range(int32(k_iters)):
            ptx.mbarrier_wait(int32(mbarrier + 8 * slot), parity)
            load_operand(a_r, shared, int32(own_words + stage), shift)
            start(acc_r, a_r, shared, int32(base + stage))
            pair = shared[own_scales + (stage >> 2)]
            m0, m1 = ptx.mul_rn(ptx.f16_low(pair), PER_WEIGHT), ptx.mul_rn(ptx.f16_high(pair), PER_WEIGHT)
            finished(acc_r)
            add_products(y_r, acc_r, shared, int32(own_steps + (stage >> 2)), m0, m1)
            cuda.syncthreads()  # all warps have read the stage
            if tid == 0 and k_iter + STAGES < k_iters:
                full, to, ahead = int32(mbarrier + 8 * slot), int32(base + stage), int32(k_iter + STAGES)
                ptx.mbarrier_expect_tx(full, LOADED)
                load_activations(maps, shared, to, full, ahead, first)
                load_weights(maps, shared, to, full, ahead, unit0, int32(up_offset))
            slot, stage = int32(slot + 1), int32(stage + STAGE)
            if slot == STAGES:
                slot, stage, parity = int32(0), int32(0), int32(1 - parity)

        # 3. Output. Values of a lane: rows r, r, r + 1, r + 1 of tokens 2 i, 2 i + 1, 2 i, 2 i + 1.
        to = ((base - unaligned) >> 2) + 2 * i * WIDTH + w * BLOCK_ROWS + (g >> 2) * 8 + (g & 3) * 2
        for t in range(T // TOKENS):
            wr = to + t * (TOKENS * WIDTH)
            ptx.store2(
                shared, wr, int32(ptx.float_to_bits(y_r[4 * t])), int32(ptx.float_to_bits(y_r[4 * t + 2]))
            )  # fmt: skip
            ptx.store2(
                shared, wr + WIDTH, int32(ptx.float_to_bits(y_r[4 * t + 1])), int32(ptx.float_to_bits(y_r[4 * t + 3]))
            )
        cuda.syncthreads()
        own, token = int32(tid % ROWS), int32(tid // ROWS)
        row = int32(unit0 * BLOCK_ROWS + own)
        if row < rows:
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
