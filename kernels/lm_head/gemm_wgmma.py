"""The LM head of many tokens on sm_90 with bfloat16 or int8 rows: TMA loads, warpgroups multiply (`wgmma`), which has
twice the rate of `mma.sync` there. x is in layout "wgmma" or "wgmma int8" of `split_norm`.

    bfloat16    logits[m, n] = sum_k x[m, k] * w[n, k]       two bfloat16 terms of x, float32 sums, as in `gemm_mma`
    int8        logits[m, n] = sum_k q[m, k] * w[n, k] * (unit[m] * scale[n])       x = q * unit, three int8 terms of q,
                               an int32 sum of each, and so exact until their sum becomes a float32

    block (b, y)   group y of T tokens; tiles of ROWS rows of the table: the b-th, then those `grid` further on
    warpgroup      64 ROW_TILES of a tile's rows, all T tokens; its warp w the rows 16 w .. 16 w + 15 of each 64
    lane 4 g + c   rows g and g + 8 of these, tokens 8 t + 2 c and the next
    panel          64 columns of some rows (int8: 128), 128 bytes each, in 128-byte swizzle
    k_iter         a panel of the table's rows, a panel of each term of x: one stage

    shared memory  | stage 0: rows, terms | stage 1: rows, terms | ...

The k_iters of a tile follow each other, and so do tiles: while the logits of one are stored, the first loads of the
next are on their way. Once all have multiplied a stage, one thread starts the loads of the k_iter that takes it next.
Rows, tokens and columns that are not there arrive as zeros.

A logit has the same bits for every number of tokens: bfloat16 columns are always added 16 at a time, those of the high
term and then those of the low one, and no sum is split. Sums of int8 are exact.

int8 rows could also become bfloat16 in registers, the left operand: docs/performance-notes.md has what that took.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.lm_head.parts import WORD_COLUMNS
from bitnet_numba.kernels.lm_head.split_norm import (
    GROUP_TOKENS,
    INT8_TERMS,
    Layout,
    group_tokens,
    padded_tokens,
)
from bitnet_numba.kernels.operands import RowDtype
from bitnet_numba.kernels.ptx.base import device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.ptx.tma import PANEL_ALIGN, SPAN_INTS, Boxes
from bitnet_numba.kernels.ptx.wgmma import TILE_BYTES
from bitnet_numba.kernels.runtime.spec import KernelSpec

ARCH = 90  # the only architecture with wgmma
SHARED_BYTES = 227 * 1024  # of an SM that one block can have
LAYOUTS: dict[RowDtype, Layout] = {"bf16": "wgmma", "int8": "wgmma int8"}  # of x, by the rows' dtype
TERMS: dict[RowDtype, int] = {"bf16": 2, "int8": INT8_TERMS}  # of x
PANEL_ROW_BYTES = 4 * SPAN_INTS
WARPGROUP = 128  # threads
TILE_ROWS = 64  # of an instruction
MAX_BOX_ROWS = 256  # of a TMA load


class Tile(NamedTuple):
    """How the work of a block is cut up."""

    tokens: int  # of a group
    warpgroups: int
    row_tiles: int  # of 64 rows, of a warpgroup
    stages: int
    dtype: RowDtype = "bf16"  # of the table's rows

    @property
    def x_rows(self) -> int:
        """Rows of x that a block multiplies: all terms of its tokens."""
        return TERMS[self.dtype] * self.tokens

    @property
    def rows(self) -> int:
        """Rows of the table that a block multiplies at a time."""
        return TILE_ROWS * self.warpgroups * self.row_tiles

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage."""
        return PANEL_ROW_BYTES * (self.rows + self.x_rows)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory. It may start anywhere: the kernel skips what lies before the first aligned byte."""
        return self.stages * self.stage_bytes + PANEL_ALIGN


def plan(num_tokens: int, dtype: RowDtype) -> Tile:
    """The tile of a launch: 256 rows, and as many stages as fit."""
    tile = Tile(group_tokens(LAYOUTS[dtype], num_tokens), 2, 2, 1, dtype)
    return tile._replace(stages=(SHARED_BYTES - PANEL_ALIGN - PANEL_ROW_BYTES) // tile.stage_bytes)


def make_lm_head_wgmma(arch: int, tile: Tile) -> Callable[..., None]:
    """The kernel of a tile. Raises ValueError for a tile that does not fit the instructions or the shared memory."""
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    T, _, ROW_TILES, STAGES, dtype = tile
    INT8, X_ROWS = dtype == "int8", tile.x_rows
    Sum = int32 if INT8 else float32
    TERM = T // 2  # sums of a term of a product of 64 rows
    PRODUCT = X_ROWS // 2 if INT8 else TERM
    ROWS, STAGE = tile.rows, tile.stage_bytes
    X_OFFSET, WARPGROUP_BYTES = PANEL_ROW_BYTES * ROWS, ROW_TILES * TILE_BYTES
    SUMS = ROW_TILES * PRODUCT
    SCALES = 2 * ROW_TILES
    known = T in GROUP_TOKENS[LAYOUTS[dtype]] or not (INT8 or T % 8 or T > GROUP_TOKENS["wgmma"][-1])
    fits = known and ROWS <= MAX_BOX_ROWS and STAGES > 1
    if not fits or tile.shared_bytes + 8 * STAGES > SHARED_BYTES:
        raise ValueError(f"lm_head_wgmma: no kernel for {tile}")
    products = ptx.wgmma_s8_shared(X_ROWS, ROW_TILES) if INT8 else ptx.wgmma_bf16_split(T, ROW_TILES)
    multiply, wait_all_but_latest, wait_all = products

    @device_function
    def next_load(row, column, k_iters, stride):
        """(first row of the tile, column in int32) of the k_iter after this one."""
        column = int32(column + SPAN_INTS)
        if column == k_iters * SPAN_INTS:
            row, column = int32(row + stride), int32(0)
        return row, column

    @device_function
    def next_stage(stage, offset, parity):
        """The stage after this one: its number, its distance in bytes from the first, the parity of its mbarrier."""
        stage, offset = int32(stage + 1), int32(offset + STAGE)
        if stage == STAGES:
            stage, offset, parity = int32(0), int32(0), int32(1 - parity)
        return stage, offset, parity

    @device_function
    def load_stage(weight, x, shared, block, stage, offset, row, column):
        """Starts the loads of a k_iter into a stage; nothing beyond the last row."""
        base, mbarriers, group, num_rows = block
        if cuda.threadIdx.x == 0 and row < num_rows:
            mbarrier, to = int32(mbarriers + 8 * stage), int32(base + offset)
            ptx.mbarrier_expect_tx(mbarrier, STAGE)
            ptx.tma_load_2d(weight, 0, shared, to, mbarrier, column, row)
            ptx.tma_load_2d(x, 0, shared, to + X_OFFSET, mbarrier, column, group)

    @device_function
    def whole_sum(sum_r, i, factor):
        """A logit of int8 rows: sum i of the three terms as one, rounded once; `factor`: unit and scale."""
        lower = int64(sum_r[i + TERM]) * 256 + sum_r[i + 2 * TERM]
        return ptx.mul_rn(float32(int64(sum_r[i]) * 65536 + lower), factor)

    def lm_head_wgmma(weight, x, scale, split, logits, num_rows, num_tokens, k_iters, row_ints):
        shared = ptx.pointer(cuda.shared.array(0, int32))
        mbarrier_s = ptx.pointer(cuda.shared.array(STAGES, int64))
        sum_r = cuda.local.array(SUMS, Sum)  # [ROW_TILES, (int8: term,) 8 tokens, row g or g + 8, token]
        scale_r = cuda.local.array(SCALES, float32)  # [ROW_TILES, row g or g + 8]
        tid = int32(cuda.threadIdx.x)
        warp, lane = tid >> 5, tid & 31
        stride = int32(cuda.gridDim.x * ROWS)
        first = int32(cuda.blockIdx.x * ROWS)
        group = int32(cuda.blockIdx.y * X_ROWS)  # its first row of x
        # Addresses in shared memory, in bytes.
        unaligned, mbarriers = ptx.shared_address(shared, 0), ptx.shared_address(mbarrier_s, 0)
        base = int32((unaligned + (PANEL_ALIGN - 1)) & -PANEL_ALIGN)

        # 1. The first stages: the table's rows while the launches before this one still run, then x.
        if tid == 0:
            ptx.prefetch_tensor_map(x, 0)
            for stage in range(STAGES):
                ptx.mbarrier_init(mbarriers + 8 * stage)
        row, column = first, int32(0)
        for stage in range(STAGES):
            if tid == 0 and row < num_rows:
                ptx.mbarrier_expect_tx(mbarriers + 8 * stage, STAGE)
                ptx.tma_load_2d(weight, 0, shared, base + stage * STAGE, mbarriers + 8 * stage, column, row)
            row, column = next_load(row, column, k_iters, stride)
        trigger()
        wait()
        row, column = first, int32(0)
        for stage in range(STAGES):
            if tid == 0 and row < num_rows:
                ptx.tma_load_2d(x, 0, shared, base + (stage * STAGE + X_OFFSET), mbarriers + 8 * stage, column, group)
            row, column = next_load(row, column, k_iters, stride)
        cuda.syncthreads()

        rows_base = int32(base + (warp >> 2) * WARPGROUP_BYTES)
        x_base = int32(base + X_OFFSET)
        block = base, mbarriers, group, int32(num_rows)
        # The lane's first row of a tile, and its first token.
        lane_row = int32((warp >> 2) * (ROW_TILES * TILE_ROWS) + (warp & 3) * 16 + (lane >> 2))
        token = int32((cuda.blockIdx.y * T if INT8 else group >> 1) + 2 * (lane & 3))
        tokens_left = int32(num_tokens - token)
        units = int64(cuda.gridDim.y * X_ROWS) * row_ints + token  # where those of the lane's tokens begin
        stage, offset, parity = int32(0), int32(0), int32(0)
        while first < num_rows:
            # 2. Products: while those of one k_iter run, those of the next are started.
            ptx.mbarrier_wait(int32(mbarriers + 8 * stage), parity)
            multiply(sum_r, shared, int32(rows_base + offset), int32(x_base + offset), int32(0))
            k_iter = int32(1)
            while k_iter < k_iters:
                before, offset_before = stage, offset
                stage, offset, parity = next_stage(stage, offset, parity)
                ptx.mbarrier_wait(int32(mbarriers + 8 * stage), parity)
                multiply(sum_r, shared, int32(rows_base + offset), int32(x_base + offset), int32(1))
                wait_all_but_latest()
                cuda.syncthreads()  # all have multiplied the stage before
                load_stage(weight, x, shared, block, before, offset_before, row, column)
                row, column = next_load(row, column, k_iters, stride)
                k_iter = int32(k_iter + 1)
            wait_all(sum_r)
            cuda.syncthreads()
            load_stage(weight, x, shared, block, stage, offset, row, column)
            row, column = next_load(row, column, k_iters, stride)
            stage, offset, parity = next_stage(stage, offset, parity)

            # 3. Output: a warp's store is 32 bytes of each of four tokens.
            n = int32(first + lane_row)
            rows_left, wr = int32(num_rows - n), int64(token) * num_rows + n
            if INT8:
                for i in range(SCALES):
                    scale_r[i] = scale[min(int32(n + (i // 2 * TILE_ROWS + i % 2 * 8)), int32(num_rows - 1))]
            for t in range(T // 8):
                for odd in range(2):
                    if tokens_left > 8 * t + odd:
                        unit = ptx.bits_to_float(uint32(split[units + (8 * t + odd)])) if INT8 else float32(1)
                        for j in range(ROW_TILES):
                            for half in range(2):
                                if rows_left > j * TILE_ROWS + half * 8:
                                    i = j * PRODUCT + 4 * t + 2 * half + odd
                                    if INT8:
                                        value = whole_sum(sum_r, i, ptx.mul_rn(unit, scale_r[2 * j + half]))
                                    else:
                                        value = sum_r[i]
                                    logits[wr + (j * TILE_ROWS + half * 8)] = value
                    wr += int64(num_rows) if odd == 0 else int64(num_rows) * 7
            first = int32(first + stride)

    return lm_head_wgmma


@cache
def spec(arch: int, tile: Tile) -> KernelSpec:
    """The variant of a tile. Raises ValueError as `make_lm_head_wgmma`.

    Arguments of a launch: tensor maps of the table and of x (see `map_boxes`), scale float32 [num_rows] and x itself
    (None twice if rows are bfloat16), logits float32 [num_tokens, num_rows], num_rows, num_tokens, k_iters (see
    `num_k_iters`), row_ints (see there).
    """
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    return KernelSpec(
        name=f"lm_head_wgmma[sm_{arch} {' '.join(map(str, tile))}]",
        kernel=make_lm_head_wgmma(arch, tile),
        signature=(i32, i32, *((f32, i32) if tile.dtype == "int8" else (types.none,) * 2), f32, *(types.int32,) * 4),
        threads=WARPGROUP * tile.warpgroups,
        shared=tile.shared_bytes,
        carveout=100,
    )


def map_boxes(tile: Tile, num_rows: int, num_tokens: int, K: int) -> tuple[Boxes, Boxes]:
    """The boxes that the table and x are loaded in."""
    x_rows, ints = TERMS[tile.dtype] * padded_tokens(LAYOUTS[tile.dtype], num_tokens), row_ints(tile, K)
    of_rows = Boxes.of_matrix(num_rows, ints, tile.rows, SPAN_INTS)
    return of_rows, Boxes.of_matrix(x_rows, ints, tile.x_rows, SPAN_INTS)


def row_ints(tile: Tile, K: int) -> int:
    """int32 of a row of the table, or of a term of x."""
    return K // WORD_COLUMNS[tile.dtype]


def num_k_iters(tile: Tile, K: int) -> int:
    """k_iters of a tile of rows."""
    return -(-row_ints(tile, K) // SPAN_INTS)


def grid(num_sms: int, tile: Tile, num_rows: int, num_tokens: int) -> tuple[int, int]:
    """Blocks of a launch: for rows of the table, and for groups of tokens. All groups run side by side, so that a row
    comes from memory once."""
    groups = padded_tokens(LAYOUTS[tile.dtype], num_tokens) // tile.tokens
    return min(max(num_sms // groups, 1), -(-num_rows // tile.rows)), groups
