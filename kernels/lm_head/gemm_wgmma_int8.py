"""The LM head of many tokens on sm_90 with int8 rows, by `wgmma`. Read gemm_wgmma.py first.

    logits[m, n] = (sum_k x[m, k] * w[n, k]) * scale[n]       two bfloat16 terms of x, float32 sums

Rows are the instruction's operand in registers: a lane takes 16 columns of a row from shared memory with one load, and
int8 become bfloat16 there, exactly. These 16 are not the columns of the instruction; but the order of columns is free
as long as x has the same, see layout "wgmma" of `split_norm`.

    block (b, y)   group y of T tokens; tiles of ROWS rows of the table: the b-th, then those `grid` further on
    warpgroup      128 of a tile's rows, all T tokens, as two products of 64 rows; one more warp loads
    lane 4 g + c   of each of its warp's 16 rows of a product, g and g + 8; columns 16 c .. 16 c + 15 of a panel; tokens
                   8 t + 2 c and the next
    panel          64 columns: of the table 64 bytes a row, of x 128 bytes a token, in 128-byte swizzle
    k_iter         a panel of the table's rows, a panel of each term of x: one stage

    shared memory  | stage 0: rows, high, low | stage 1: rows, high, low | ...

A stage has an mbarrier for what TMA brings, and one at which each warp arrives when it has multiplied the stage. While
one of a warpgroup's products runs, the rows of its other one become bfloat16.

A logit has the same bits for every number of tokens: columns are always added 16 at a time, those of the high term and
then those of the low one, and no sum is split.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.lm_head.gemm_wgmma import PANEL_ROW_BYTES, SHARED_BYTES, TILE_ROWS, WARPGROUP
from bitnet_numba.kernels.lm_head.parts import HIGH_PAIR, LOW_PAIR, int8_pair_to_bf16
from bitnet_numba.kernels.lm_head.split_norm import GROUP_TOKENS, PANEL_COLUMNS, group_tokens, padded_tokens
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32, int64
from bitnet_numba.kernels.ptx.tma import PANEL_ALIGN, SPAN_INTS
from bitnet_numba.kernels.runtime.spec import RESERVED_BYTES, KernelSpec, sm_memory

PRODUCTS = 2  # of 64 rows, of a warpgroup
BOX_ROWS = PRODUCTS * TILE_ROWS  # of a TMA load
ROW_INTS = PANEL_COLUMNS // 4  # of a row's panel
PRODUCT_INTS = TILE_ROWS * ROW_INTS
WORDS = 16  # registers of a product's rows: 64 x 64 bfloat16 in 128 threads
STATIC_BYTES = 1024  # at most, of mbarriers


class Tile(NamedTuple):
    """How the work of a block is cut up."""

    tokens: int  # of a group
    warpgroups: int
    stages: int
    blocks: int = 1  # of an SM

    @property
    def unequal(self) -> bool:
        """Whether the warps that multiply need the registers of a whole warpgroup that loads."""
        return self.tokens >= 64

    @property
    def rows(self) -> int:
        """Rows of the table that a block multiplies at a time."""
        return BOX_ROWS * self.warpgroups

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage."""
        return self.rows * PANEL_COLUMNS + PANEL_ROW_BYTES * 2 * self.tokens

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory. It may start anywhere: the kernel skips what lies before the first aligned byte."""
        return self.stages * self.stage_bytes + PANEL_ALIGN


def plan(num_tokens: int) -> Tile:
    """The tile of a launch: 256 rows, and as many stages as fit."""
    tile = Tile(group_tokens("wgmma", num_tokens), 2, 1)
    return tile._replace(stages=(SHARED_BYTES - PANEL_ALIGN - STATIC_BYTES) // tile.stage_bytes)


def make_lm_head_wgmma_int8(arch: int, tile: Tile) -> Callable[..., None]:
    """The kernel of a tile. Raises ValueError for a tile that does not fit the instructions or the shared memory."""
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    T, WARPGROUPS, STAGES, BLOCKS = tile
    ROWS, STAGE = tile.rows, tile.stage_bytes
    X_OFFSET, BOX_BYTES = ROWS * PANEL_COLUMNS, BOX_ROWS * PANEL_COLUMNS
    THREADS, WARPS = WARPGROUPS * WARPGROUP, WARPGROUPS * WARPGROUP // WARP  # that multiply
    SUMS, SCALES, MBARRIERS = T // 2, 2 * PRODUCTS, 2 * STAGES
    UNEQUAL = tile.unequal
    fits = T in GROUP_TOKENS["wgmma"] and STAGES > 1
    if not fits or BLOCKS * (tile.shared_bytes + 16 * STAGES + RESERVED_BYTES) > sm_memory(arch).shared:
        raise ValueError(f"lm_head_wgmma_int8: no kernel for {tile}")
    multiply, wait_all_but_latest, wait_all = ptx.wgmma_bf16_split_rs(T)

    @device_function
    def next_load(row, column, k_iters, stride):
        """(first row of the tile, panel) of the k_iter after this one."""
        panel = int32(column + 1)
        if panel == k_iters:
            row, panel = int32(row + stride), int32(0)
        return row, panel

    @device_function
    def next_stage(state):
        """The stage after this one: its number, its distance in bytes from the first, the parity of its mbarriers."""
        stage, offset, parity = state
        stage, offset = int32(stage + 1), int32(offset + STAGE)
        if stage == STAGES:
            stage, offset, parity = int32(0), int32(0), int32(1 - parity)
        return stage, offset, parity

    @device_function
    def load_rows(weight, shared, to, mbarrier, row, panel):
        """Starts loading a panel of the tile's rows."""
        for n in range(WARPGROUPS):
            ptx.tma_load_2d(weight, 0, shared, to + n * BOX_BYTES, mbarrier, panel * ROW_INTS, row + n * BOX_ROWS)

    @device_function
    def row_operand(words_r, low, high):
        """The bfloat16 of a lane's columns: of its row g (16 int8 in four words), and of row g + 8."""
        for step in range(4):
            words_r[4 * step] = int8_pair_to_bf16(low[step], LOW_PAIR)
            words_r[4 * step + 1] = int8_pair_to_bf16(high[step], LOW_PAIR)
            words_r[4 * step + 2] = int8_pair_to_bf16(low[step], HIGH_PAIR)
            words_r[4 * step + 3] = int8_pair_to_bf16(high[step], HIGH_PAIR)

    def lm_head_wgmma_int8(weight, x, scale, logits, num_rows, num_tokens, k_iters):
        shared = ptx.pointer(cuda.shared.array(0, int32))
        mbarrier_s = ptx.pointer(cuda.shared.array(MBARRIERS, int64))
        a_r = cuda.local.array(WORDS, int32)  # of the first product
        b_r = cuda.local.array(WORDS, int32)  # of the second
        sum_r = cuda.local.array(SUMS, float32)  # of the first product: [8 tokens, row g or g + 8, token]
        more_r = cuda.local.array(SUMS, float32)  # of the second
        scale_r = cuda.local.array(SCALES, float32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = tid >> 5, tid & 31
        stride = int32(cuda.gridDim.x * ROWS)
        first = int32(cuda.blockIdx.x * ROWS)
        group = int32(cuda.blockIdx.y * (2 * T))  # its first row of x
        # Addresses in shared memory, in bytes.
        unaligned, mbarriers = ptx.shared_address(shared, 0), ptx.shared_address(mbarrier_s, 0)
        base = int32((unaligned + (PANEL_ALIGN - 1)) & -PANEL_ALIGN)
        if tid == THREADS:
            for n in range(STAGES):
                ptx.mbarrier_init(mbarriers + 8 * n)
                ptx.mbarrier_init_warps(mbarriers + 8 * (STAGES + n), int32(WARPS))
        cuda.syncthreads()
        trigger()

        now = int32(0), int32(0), int32(0)
        if warp >= WARPS:
            if UNEQUAL:
                ptx.release_registers()
            # 1. The warp that loads: the first stages' rows while the launches before this one still run, then their x,
            # then the rest.
            if tid == THREADS:
                ptx.prefetch_tensor_map(x, 0)
                row, panel = first, int32(0)
                for n in range(STAGES):
                    if row < num_rows:
                        ptx.mbarrier_expect_tx(mbarriers + 8 * n, STAGE)
                        load_rows(weight, shared, base + n * STAGE, mbarriers + 8 * n, row, panel)
                    row, panel = next_load(row, panel, k_iters, stride)
                wait()
                row, panel = first, int32(0)
                for n in range(STAGES):
                    if row < num_rows:
                        to = base + (n * STAGE + X_OFFSET)
                        ptx.tma_load_2d(x, 0, shared, to, mbarriers + 8 * n, panel * SPAN_INTS, group)
                    row, panel = next_load(row, panel, k_iters, stride)
                while row < num_rows:
                    stage, offset, parity = now
                    mbarrier, to = int32(mbarriers + 8 * stage), int32(base + offset)
                    ptx.mbarrier_wait(int32(mbarrier + 8 * STAGES), parity)
                    ptx.mbarrier_expect_tx(mbarrier, STAGE)
                    ptx.tma_load_2d(x, 0, shared, to + X_OFFSET, mbarrier, panel * SPAN_INTS, group)
                    load_rows(weight, shared, to, mbarrier, row, panel)
                    now = next_stage(now)
                    row, panel = next_load(row, panel, k_iters, stride)
        else:
            if UNEQUAL:
                ptx.take_registers()
            wait()
            x_base = int32(base + X_OFFSET)
            # The lane's first row of a tile, its first token; the int32 where its part of a stage's rows begins.
            lane_row = int32((warp >> 2) * BOX_ROWS + (warp & 3) * 16 + (lane >> 2))
            lane_rd = int32(((base - unaligned) >> 2) + lane_row * ROW_INTS + 4 * (lane & 3))
            token = int32((group >> 1) + 2 * (lane & 3))
            tokens_left = int32(num_tokens - token)
            while first < num_rows:
                # 2. Products: while one runs, the operand of the other is made.
                n = int32(first + lane_row)
                for i in range(SCALES):
                    scale_r[i] = scale[min(int32(n + (i // 2 * TILE_ROWS + i % 2 * 8)), int32(num_rows - 1))]
                stage, offset, parity = now
                ptx.mbarrier_wait(int32(mbarriers + 8 * stage), parity)
                rd = int32(lane_rd + (offset >> 2))
                row_operand(a_r, ptx.load4(shared, rd), ptx.load4(shared, rd + 8 * ROW_INTS))
                multiply(sum_r, a_r, shared, int32(x_base + offset), int32(0))
                rd = int32(rd + PRODUCT_INTS)
                row_operand(b_r, ptx.load4(shared, rd), ptx.load4(shared, rd + 8 * ROW_INTS))
                multiply(more_r, b_r, shared, int32(x_base + offset), int32(0))
                k_iter = int32(1)
                while k_iter < k_iters:
                    before, _, _ = now
                    now = next_stage(now)
                    stage, offset, parity = now
                    ptx.mbarrier_wait(int32(mbarriers + 8 * stage), parity)
                    rd = int32(lane_rd + (offset >> 2))
                    low, high = ptx.load4(shared, rd), ptx.load4(shared, rd + 8 * ROW_INTS)
                    wait_all_but_latest()
                    row_operand(a_r, low, high)
                    multiply(sum_r, a_r, shared, int32(x_base + offset), int32(1))
                    rd = int32(rd + PRODUCT_INTS)
                    low, high = ptx.load4(shared, rd), ptx.load4(shared, rd + 8 * ROW_INTS)
                    wait_all_but_latest()
                    ptx.mbarrier_arrive_warp(int32(mbarriers + 8 * (STAGES + before)))
                    row_operand(b_r, low, high)
                    multiply(more_r, b_r, shared, int32(x_base + offset), int32(1))
                    k_iter = int32(k_iter + 1)
                wait_all(sum_r)
                wait_all(more_r)
                stage, _, _ = now
                ptx.mbarrier_arrive_warp(int32(mbarriers + 8 * (STAGES + stage)))
                now = next_stage(now)

                # 3. Output: a warp's store is 32 bytes of each of four tokens.
                rows_left, wr = int32(num_rows - n), int64(token) * num_rows + n
                for t in range(T // 8):
                    for odd in range(2):
                        if tokens_left > 8 * t + odd:
                            for half in range(2):
                                i = 4 * t + 2 * half + odd
                                if rows_left > half * 8:
                                    logits[wr + half * 8] = ptx.mul_rn(sum_r[i], scale_r[half])
                                if rows_left > TILE_ROWS + half * 8:
                                    logits[wr + (TILE_ROWS + half * 8)] = ptx.mul_rn(more_r[i], scale_r[2 + half])
                        wr += int64(num_rows) if odd == 0 else int64(num_rows) * 7
                first = int32(first + stride)

    return lm_head_wgmma_int8


@cache
def spec(arch: int, tile: Tile) -> KernelSpec:
    """The variant of a tile. Raises ValueError as `make_lm_head_wgmma_int8`.

    Arguments of a launch: tensor maps of the table and of x (see `map_shapes`), scale float32 [num_rows], logits
    float32 [num_tokens, num_rows], num_rows, num_tokens, k_iters (see `gemm_wgmma.num_k_iters`).
    """
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    return KernelSpec(
        name=f"lm_head_wgmma_int8[sm_{arch} {' '.join(map(str, tile))}]",
        kernel=make_lm_head_wgmma_int8(arch, tile),
        signature=(i32, i32, f32, f32, *(types.int32,) * 3),
        threads=WARPGROUP * tile.warpgroups + (WARPGROUP if tile.unequal else WARP),
        blocks_per_sm=tile.blocks,
        shared=tile.shared_bytes,
        carveout=100,
    )


def map_shapes(tile: Tile, num_rows: int, num_tokens: int, K: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(rows, row_ints, box_rows, box_ints) of the tensor maps of the table and of x."""
    x_rows, columns = 2 * padded_tokens("wgmma", num_tokens), -(-K // PANEL_COLUMNS) * PANEL_COLUMNS
    return (num_rows, K // 4, BOX_ROWS, ROW_INTS), (x_rows, columns // 2, 2 * tile.tokens, SPAN_INTS)


def grid(num_sms: int, tile: Tile, num_rows: int, num_tokens: int) -> tuple[int, int]:
    """Blocks of a launch: for rows of the table, and for groups of tokens."""
    return min(num_sms * tile.blocks, -(-num_rows // tile.rows)), padded_tokens("wgmma", num_tokens) // tile.tokens
