"""The head for many tokens on sm_90 with bfloat16 rows: warpgroups multiply what the copy engine brings, `wgmma`.

There `mma.sync`, which head_many.py uses, runs at half the unit's rate. What is computed is as there: the normed
activations are a sum of two bfloat16 terms, sums are float32.

    logits[m, n] = sum_k norm(h[m])[k] * w[n, k]

    block (x, y)   T tokens from T y on; tiles of ROWS rows of the vocabulary: the x-th, then those `grid` further on
    warpgroup      64 TILES of a tile's rows, all T tokens; its warp w the rows 16 w .. 16 w + 15 of each 64
    lane 4 g + c   rows g and g + 8 of these, tokens 8 t + 2 c and the next
    turn           64 columns, 128 bytes: a panel of the rows, a panel of each term

    shared memory  | stage 0: rows, high, low | stage 1: rows, high, low | ...      all in 128-byte swizzle
    x              [group of T tokens, term, token, K columns], so that one copy brings both terms

A tile's turns follow each other, and so do tiles: while the logits of one are stored, the next one's first turns are on
their way. One thread starts the copies of a stage when all have multiplied what it held. Rows, tokens and columns that
are not there arrive as zeros.

A logit has the same bits for every number of tokens: columns are always added 16 at a time, those of the high term and
then those of the low one, and no sum is split.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.gemm_wgmma import ARCH, SHARED_BYTES
from bitnet_numba.kernels.lm_head.split_norm import check_columns, check_sizes, norm_split_spec
from bitnet_numba.kernels.ptx.base import device_function, float32, int32, int64
from bitnet_numba.kernels.ptx.tma import PANEL_ALIGN, SPAN_INTS
from bitnet_numba.kernels.ptx.wgmma import TILE_BYTES
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec

TOKENS = (8, 16, 32, 64, 128)  # of a group; more tokens are several groups
SPAN = 64  # columns of a turn
ROW_BYTES = 4 * SPAN_INTS  # of a panel
WARPGROUP = 128  # threads
TILE_ROWS = 64  # of an instruction


class Tile(NamedTuple):
    """How a form is cut up."""

    tokens: int
    warpgroups: int
    tiles: int  # of 64 rows, of a warpgroup
    stages: int

    @property
    def rows(self) -> int:
        """Rows of the vocabulary that a block has in hand."""
        return TILE_ROWS * self.warpgroups * self.tiles

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a turn."""
        return ROW_BYTES * (self.rows + 2 * self.tokens)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory, which may start anywhere: the kernel leaves out what comes before a panel's place."""
        return self.stages * self.stage_bytes + PANEL_ALIGN


def plan(tokens: int) -> Tile:
    """The launch rule: groups of as many tokens as there are, up to 128, and as many stages as fit."""
    group = next((T for T in TOKENS if T >= tokens), TOKENS[-1])
    tile = Tile(group, 2, 2, 1)
    return tile._replace(stages=(SHARED_BYTES - PANEL_ALIGN - ROW_BYTES) // tile.stage_bytes)


def serves(arch: int, int8: bool) -> bool:
    """Whether this kernel is the head for many tokens, for every number of them; else `head_many` is."""
    return arch == ARCH and not int8


def padded_tokens(tokens: int) -> int:
    """Tokens that x has room for: whole groups."""
    group = plan(tokens).tokens
    return -(-tokens // group) * group


def split_words(tokens: int, K: int) -> int:
    """int32 words of x for so many tokens of K columns."""
    return padded_tokens(tokens) * K


def make_head_warpgroup(arch: int, tile: Tile) -> Callable[..., None]:
    """The kernel for groups of tile.tokens tokens."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    T, _, TILES, STAGES = tile
    ROWS, STAGE = tile.rows, tile.stage_bytes
    TERMS_AT, OWN_BYTES = ROW_BYTES * ROWS, TILES * TILE_BYTES
    SUMS = TILES * T // 2
    fits = T in TOKENS and ROWS <= 256 and STAGES > 1
    if not fits or tile.shared_bytes + 8 * STAGES > SHARED_BYTES:
        raise ValueError(f"no head of warpgroups is made of {tile}")
    start, all_but_one, finished = ptx.wgmma_bf16_split(T, TILES)

    @device_function
    def onward(row, column, turns, stride):
        """The turn after that of a tile (its first row) and a column, counted in int32."""
        column = int32(column + SPAN_INTS)
        if column == turns * SPAN_INTS:
            row, column = int32(row + stride), int32(0)
        return row, column

    @device_function
    def after(slot, stage, parity):
        """The stage after a stage: its number, its distance from the first, its phase."""
        slot, stage = int32(slot + 1), int32(stage + STAGE)
        if slot == STAGES:
            slot, stage, parity = int32(0), int32(0), int32(1 - parity)
        return slot, stage, parity

    @device_function
    def refill(weight, x, shared, places, slot, stage, row, column):
        """Starts the copies of a turn to a stage."""
        base, arrival, group, rows = places
        if cuda.threadIdx.x == 0 and row < rows:
            arrived, to = int32(arrival + 8 * slot), int32(base + stage)
            ptx.mbarrier_expect_tx(arrived, STAGE)
            ptx.tma_load_2d(weight, 0, shared, to, arrived, column, row)
            ptx.tma_load_2d(x, 0, shared, to + TERMS_AT, arrived, column, group)

    def head_warpgroup(weight, x, logits, rows, tokens, turns):
        shared = ptx.pointer(cuda.shared.array(0, int32))
        arrival_s = ptx.pointer(cuda.shared.array(STAGES, int64))
        sum_r = cuda.local.array(SUMS, float32)  # [TILES, 8 tokens, row g or g + 8, token]
        tid = int32(cuda.threadIdx.x)
        warp, lane = tid >> 5, tid & 31
        stride = int32(cuda.gridDim.x * ROWS)
        first = int32(cuda.blockIdx.x * ROWS)
        group = int32(cuda.blockIdx.y * (2 * T))  # its first row of x
        # Places in shared memory, in bytes.
        unaligned, arrival = ptx.shared_address(shared, 0), ptx.shared_address(arrival_s, 0)
        base = int32((unaligned + (PANEL_ALIGN - 1)) & -PANEL_ALIGN)

        # 1. The first turns' rows, while the launches before this one still run; then their terms.
        if tid == 0:
            ptx.prefetch_tensor_map(x, 0)
            for slot in range(STAGES):
                ptx.mbarrier_init(arrival + 8 * slot)
        row, column = first, int32(0)
        for slot in range(STAGES):
            if tid == 0 and row < rows:
                ptx.mbarrier_expect_tx(arrival + 8 * slot, STAGE)
                ptx.tma_load_2d(weight, 0, shared, base + slot * STAGE, arrival + 8 * slot, column, row)
            row, column = onward(row, column, turns, stride)
        release()
        wait()
        row, column = first, int32(0)
        for slot in range(STAGES):
            if tid == 0 and row < rows:
                ptx.tma_load_2d(x, 0, shared, base + (slot * STAGE + TERMS_AT), arrival + 8 * slot, column, group)
            row, column = onward(row, column, turns, stride)
        cuda.syncthreads()

        own = int32(base + (warp >> 2) * OWN_BYTES)
        terms = int32(base + TERMS_AT)
        places = base, arrival, group, int32(rows)
        # The lane's first row of a tile, and its first token.
        lane_row = int32((warp >> 2) * (TILES * TILE_ROWS) + (warp & 3) * 16 + (lane >> 2))
        token = int32((group >> 1) + 2 * (lane & 3))
        tokens_left = int32(tokens - token)
        slot, stage, parity = int32(0), int32(0), int32(0)
        while first < rows:
            # 2. Products: while those of one turn run, those of the next are started.
            ptx.mbarrier_wait(int32(arrival + 8 * slot), parity)
            start(sum_r, shared, int32(own + stage), int32(terms + stage), int32(0))
            turn = int32(1)
            while turn < turns:
                before, stage_before = slot, stage
                slot, stage, parity = after(slot, stage, parity)
                ptx.mbarrier_wait(int32(arrival + 8 * slot), parity)
                start(sum_r, shared, int32(own + stage), int32(terms + stage), int32(1))
                all_but_one()
                cuda.syncthreads()  # the turn before has been multiplied by all
                refill(weight, x, shared, places, before, stage_before, row, column)
                row, column = onward(row, column, turns, stride)
                turn = int32(turn + 1)
            finished(sum_r)
            cuda.syncthreads()
            refill(weight, x, shared, places, slot, stage, row, column)
            row, column = onward(row, column, turns, stride)
            slot, stage, parity = after(slot, stage, parity)

            # 3. Output: a warp's store is 32 bytes of each of four tokens.
            n = int32(first + lane_row)
            rows_left, wr = int32(rows - n), int64(token) * rows + n
            for t in range(T // 8):
                for odd in range(2):
                    if tokens_left > 8 * t + odd:
                        for j in range(TILES):
                            for half in range(2):
                                if rows_left > j * TILE_ROWS + half * 8:
                                    value = sum_r[j * (T // 2) + 4 * t + 2 * half + odd]
                                    logits[wr + (j * TILE_ROWS + half * 8)] = value
                    wr += int64(rows) if odd == 0 else int64(rows) * 7
            first = int32(first + stride)

    return head_warpgroup


@cache
def spec(arch: int, tile: Tile) -> KernelSpec:
    """The compiled form of a tile; K, rows and tokens are arguments of the launch. Raises ValueError for a tile that
    cannot be."""
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    return KernelSpec(
        name=f"head_warpgroup[sm_{arch} {' '.join(map(str, tile))}]",
        kernel=make_head_warpgroup(arch, tile),
        signature=(i32, i32, f32, *(types.int32,) * 3),  # weight and x: tensor maps
        threads=WARPGROUP * tile.warpgroups,
        shared=tile.shared_bytes,
        carveout=100,
    )


def norm_spec(arch: int, K: int) -> KernelSpec:
    """The form of the kernel that writes x."""
    return norm_split_spec(arch, K, False, plain=True)


def map_sizes(tile: Tile, rows: int, tokens: int, K: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the maps of weights and x tell: rows and int32 of a row, of the matrix and of what is copied at a time."""
    x_rows = 2 * padded_tokens(tokens)
    return (rows, K // 2, tile.rows, SPAN_INTS), (x_rows, K // 2, 2 * tile.tokens, SPAN_INTS)


def turns_of(K: int) -> int:
    """Turns of a tile."""
    return -(-K // SPAN)


def norm_split(
    device: Device, h: DeviceArray, norm: DeviceArray, eps: float, x: DeviceArray, tokens: int, K: int,
    use_pdl: bool = True,
) -> Launch:  # fmt: skip
    """The launch that prepares x for `head_warpgroup`: normed activations as two terms.

    h float32 [tokens, K]; norm float32 [K]; x int32 [split_words(tokens, K)]. Raises ValueError with the sizes if they
    do not fit together.
    """
    sizes = {"h": (h, tokens * K), "norm": (norm, K), "x": (x, split_words(tokens, K))}
    check_sizes("norm_split", tokens, sizes)
    arguments = (h, norm, eps, x, tokens, plan(tokens).tokens)
    return device.launch(norm_spec(device.arch, K), padded_tokens(tokens), arguments, use_pdl)


def head_warpgroup(
    device: Device, weight: DeviceArray, x: DeviceArray, logits: DeviceArray, rows: int, tokens: int, K: int,
    use_pdl: bool = True,
) -> Launch:  # fmt: skip
    """The launch that scores every token of the vocabulary for `tokens` rows of activations.

    weight uint16 (bfloat16 bits) [rows, K]; x int32 from this module's `norm_split` for as many tokens; logits float32
    [tokens, rows]. Raises ValueError with the sizes if they do not fit.
    """
    if weight.dtype == np.int8:
        raise ValueError(f"head_warpgroup: rows are bfloat16, not {weight.dtype}")
    check_columns(K)
    sizes = {"weight": (weight, rows * K), "x": (x, split_words(tokens, K)), "logits": (logits, tokens * rows)}
    check_sizes("head_warpgroup", tokens, sizes)
    tile = plan(tokens)
    of_weight, of_x = map_sizes(tile, rows, tokens, K)
    maps = device.tensor_map(weight, *of_weight), device.tensor_map(x, *of_x)
    grid = min(device.num_sms, -(-rows // tile.rows)), -(-tokens // tile.tokens)
    return device.launch(spec(device.arch, tile), grid, (*maps, logits, rows, tokens, turns_of(K)), use_pdl)
