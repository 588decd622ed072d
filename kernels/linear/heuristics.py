"""The tile of a GEMM, by architecture, number of SMs, tokens and shape. All times are us on an H200 (132 SMs)."""

import math
from functools import cache
from typing import NamedTuple

from bitnet_numba.kernels.linear import gemm_few
from bitnet_numba.kernels.linear.gemm_dp4a import TOKENS
from bitnet_numba.kernels.linear.gemm_wgmma import ARCH as WGMMA_ARCH
from bitnet_numba.kernels.linear.gemm_wgmma import PART, SHARED_BYTES, cta_bytes
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.packing import BLOCK_ROWS, num_groups

MIN_ARCH = 75  # mma of 8-bit integers
STAGED_ARCH = 80  # asynchronous copies to shared memory
SPILLING_ARCH = 100  # from here on, 128 registers do not hold as much as before


class MeasuredTile(NamedTuple):
    """A tile and its cost: a CTA takes cta_us + k_iter_us * k_iters."""

    tile: Tile
    cta_us: float
    k_iter_us: float


def _tile(tokens: int, row_warps: int, k_warps: int, stages: int, ctas_per_sm: int = 1, cluster: int = 1) -> Tile:
    """A tile of `gemm_wgmma`; `stages` 0: one for every k_iter."""
    return Tile(tokens, 1, row_warps, k_warps, 0, stages, ctas_per_sm, "wgmma", cluster, stages > 0)


WGMMA_TILES = (  # for up to FEW_ROUNDS_TOKENS tokens
    MeasuredTile(_tile(8, 4, 4, 0), 1.45, 0.30),
    MeasuredTile(_tile(8, 4, 4, 0, cluster=2), 2.45, 0.33),
    MeasuredTile(_tile(8, 4, 2, 0, 2), 2.3, 0.30),
    MeasuredTile(_tile(8, 4, 4, 6), 0.94, 0.48),
    MeasuredTile(_tile(8, 8, 2, 6), 2.0, 0.45),
    MeasuredTile(_tile(16, 4, 4, 0), 1.75, 0.30),
    MeasuredTile(_tile(16, 4, 4, 0, cluster=2), 2.5, 0.37),
    MeasuredTile(_tile(16, 4, 2, 0, 2), 2.6, 0.32),
    MeasuredTile(_tile(16, 4, 4, 6), 1.1, 0.48),
    MeasuredTile(_tile(16, 8, 2, 6), 2.1, 0.45),
    MeasuredTile(_tile(32, 4, 2, 0), 1.2, 0.25),
    MeasuredTile(_tile(32, 4, 4, 0), 1.95, 0.36),
    MeasuredTile(_tile(32, 4, 4, 0, cluster=2), 3.0, 0.43),
    MeasuredTile(_tile(32, 8, 2, 0), 2.5, 0.45),
    MeasuredTile(_tile(32, 4, 4, 6), 1.7, 0.50),
    MeasuredTile(_tile(32, 8, 2, 6), 2.7, 0.45),
    MeasuredTile(_tile(64, 4, 2, 6), 2.3, 0.29),
    MeasuredTile(_tile(64, 4, 4, 5), 2.9, 0.48),
    MeasuredTile(_tile(64, 4, 4, 3, cluster=2), 4.1, 0.55),
    MeasuredTile(_tile(64, 8, 2, 4), 3.6, 0.46),
    MeasuredTile(_tile(64, 8, 1, 8), 2.9, 0.32),
    MeasuredTile(_tile(64, 4, 2, 5, 2), 3.3, 0.47),
    MeasuredTile(_tile(64, 8, 1, 8, 2), 4.7, 0.40),
    MeasuredTile(_tile(96, 4, 2, 6), 2.2, 0.40),
    MeasuredTile(_tile(96, 8, 2, 5), 5.0, 0.52),
    MeasuredTile(_tile(96, 8, 1, 6, 2), 5.7, 0.50),
    MeasuredTile(_tile(128, 4, 2, 5), 3.1, 0.36),
    MeasuredTile(_tile(128, 8, 1, 6), 4.8, 0.34),
    MeasuredTile(_tile(192, 4, 2, 4), 4.0, 0.56),
    MeasuredTile(_tile(192, 8, 1, 6), 7.0, 0.44),
    MeasuredTile(_tile(256, 8, 1, 5), 8.0, 0.57),
)
FEW_ROUNDS_TOKENS = 256
# For more: how well the CTAs fill the last round decides, so there are tiles of many sizes. Costs were fitted to the
# times of 2B4T's four products for 320 to 4096 tokens; the tile chosen is the best for 43 of the 52, within 3 % for 50.
WGMMA_LARGE_TILES = (
    MeasuredTile(_tile(64, 4, 2, 5, 2), 3.16, 0.52),
    MeasuredTile(_tile(64, 4, 2, 6), 2.25, 0.26),
    MeasuredTile(_tile(96, 4, 2, 6), 3.08, 0.31),
    MeasuredTile(_tile(96, 8, 1, 6, 2), 6.01, 0.45),
    MeasuredTile(_tile(112, 4, 2, 5), 3.25, 0.32),
    MeasuredTile(_tile(128, 4, 2, 5), 3.80, 0.34),
    MeasuredTile(_tile(128, 8, 1, 6), 3.81, 0.36),
    MeasuredTile(_tile(144, 4, 2, 5), 3.45, 0.53),
    MeasuredTile(_tile(160, 4, 2, 4), 3.83, 0.52),
    MeasuredTile(_tile(160, 8, 1, 6), 4.58, 0.45),
    MeasuredTile(_tile(176, 8, 1, 6), 4.80, 0.45),
    MeasuredTile(_tile(192, 4, 2, 4), 2.91, 0.71),
    MeasuredTile(_tile(192, 8, 1, 6), 5.45, 0.46),
    MeasuredTile(_tile(208, 8, 1, 5), 4.80, 0.58),
    MeasuredTile(_tile(224, 8, 1, 5), 5.99, 0.58),
    MeasuredTile(_tile(240, 8, 1, 5), 5.52, 0.62),
    MeasuredTile(_tile(256, 8, 1, 5), 5.48, 0.63),
)

GATED_SHARE = 0.7  # of cta_us, for "gated" from 64 tokens on: half as many results are written
ROUND_WAIT = 1.4  # for each wave of CTAs but the first, of tiles with a stage for every k_iter: waits for weights
WEIGHTS_AGAIN = 0.4 / (2560 * 2560)  # for each weight and time but the first that tiles of up to 32 tokens load it


def with_all_stages(tile: Tile, K: int) -> Tile | None:
    """The tile with its number of stages for K columns; None if a stage for every k_iter does not fit."""
    if tile.refill:
        return tile
    tile = tile._replace(stages=-(-K // (PART * tile.k_warps * tile.cluster)))
    return tile if tile.ctas_per_sm * cta_bytes(tile) <= SHARED_BYTES else None


def _is_narrow(tile: Tile) -> bool:
    """Whether gate and up rows would have too few warps each: measured slow."""
    return tile.row_warps < 8 and (tile.tokens > 16 or tile.ctas_per_sm == 1)


def _choose_wgmma_tile(M: int, N: int, K: int, num_sms: int, gated: bool) -> Tile:
    """The tile with the least estimated time. CTAs run in waves of as many as are resident; of two on an SM the last
    may be alone, hence halves of a wave."""

    def time(measured: MeasuredTile, tile: Tile) -> float:
        ctas = -(-M // tile.tokens) * -(-N // tile.rows) * tile.cluster
        rounds = -(-ctas // num_sms) / tile.ctas_per_sm
        k_iters = -(-K // (PART * tile.k_warps * tile.cluster))
        waiting = 0 if tile.refill else ROUND_WAIT * max(0, math.ceil(rounds) - 1)
        fetching = WEIGHTS_AGAIN * N * K * (-(-M // tile.tokens) - 1) if tile.tokens <= 32 else 0
        cta_us = measured.cta_us * (GATED_SHARE if gated and tile.tokens >= 64 else 1)
        return max(1, rounds) * (cta_us + measured.k_iter_us * k_iters) + fetching + waiting

    tiles = WGMMA_TILES if M <= FEW_ROUNDS_TOKENS else WGMMA_LARGE_TILES
    candidates = [m for m in tiles if not (gated and _is_narrow(m.tile))]
    timed = [(m, with_all_stages(m.tile, K)) for m in candidates]
    return min((time(m, tile), tile) for m, tile in timed if tile is not None)[1]


@cache
def choose_tile(M: int, N: int, K: int, arch: int, num_sms: int, gated: bool = False) -> Tile:
    """The tile for M tokens and N rows, gate and up rows counted each.

        before sm_75   dp4a: 8 tokens
        sm_75          mma: the tiles for up to 32 tokens, since it has no `cp.async`
        sm_90          wgmma: see `_choose_wgmma_tile`
        others         mma: up to 64 tokens loading weights is what takes time, so activations go straight to registers
                       and a matrix of few rows is split over 8 or 16 warps along K; one of many (more than four
                       row-blocks an SM) over fewer. Beyond, activations come through shared memory, and from 129
                       tokens on few rows take the tile that leaves the busiest SM less to do

    The mma tiles were measured on an H200 with 2B4T's shapes; but for up to 16 tokens of many rows, where the measured
    tile spills registers from sm_100 on and does not fit twice the shared memory of sm_75.
    """
    if arch < MIN_ARCH:
        return Tile(TOKENS, 2 if gated else 1, 1, 8, 0, 0, scheme="dp4a")
    if arch < STAGED_ARCH:
        M = min(M, 32)
    if arch == WGMMA_ARCH:
        return _choose_wgmma_tile(M, N, K, num_sms, gated)
    many, long = -(-N // BLOCK_ROWS) > 4 * num_sms, K > 4096
    if M <= 8:
        if many:
            return Tile(8, 2, 2, 4, 5, 0, 2)
        return Tile(8, 2, 1, 16, 5, 0, 1) if long else Tile(8, 4, 1, 8, 5, 0, 1)
    if M <= 16:
        if not many:
            return Tile(16, 2, 1, 16, 4, 0, 1)
        return Tile(16, 4, 1, 8, 2, 0, 2) if STAGED_ARCH <= arch < SPILLING_ARCH else Tile(16, 2, 2, 4, 4, 0, 2)
    if M <= 32:
        if many:
            return Tile(32, 4, 1, 4, 2, 0, 1)
        return Tile(32, 4, 1, 8, 2, 0, 1) if long or gated else Tile(32, 1, 1, 8, 4, 0, 2)
    if M <= 64:
        return Tile(32, 2, 4, 2, 4, 4, 2) if many else Tile(32, 2, 1, 8, 2, 0, 2)
    if M <= 128:
        return Tile(64, 4, 2, 2, 2, 3, 2) if many else Tile(32, 2, 2, 4, 4, 3, 2)
    if many:
        return Tile(64, 2, 4, 1, 2, 4, 3)

    def busiest(tile: Tile) -> int:
        ctas = -(-M // tile.tokens) * -(-N // tile.rows)
        return -(-ctas // num_sms) * tile.tokens * tile.rows

    return min((Tile(64, 4, 2, 2, 2, 3, 2), Tile(64, 2, 5, 2, 2, 2, 1)), key=busiest)


FEW_ARCH = 90  # where `gemm_few` was measured
FEW_TOKENS = 4  # of 8 it multiplies as fast, but a whole step is shorter with `gemm_wgmma`


def choose_few(M: int, N: int, K: int, arch: int, num_sms: int, gated: bool = False) -> gemm_few.Plan | None:
    """How `gemm_few` multiplies M tokens; None if a tile of `choose_tile` does, since M or the matrix is too large, or
    the architecture another."""
    return gemm_few.plan(N, K, num_sms, gated) if arch == FEW_ARCH and M <= FEW_TOKENS else None


GROUP_TILES = (  # of `gemm_groups_mma` and `gemm_groups_wgmma`
    MeasuredTile(Tile(8, 2, 1, 8, 3, 3, 1), 1.44, 0.705),
    MeasuredTile(Tile(8, 2, 1, 16, 2, 2, 1), 1.87, 1.105),
    MeasuredTile(Tile(8, 2, 2, 8, 2, 2, 1), 1.47, 0.876),
    MeasuredTile(Tile(8, 4, 1, 4, 2, 3, 2), 1.49, 0.734),
    MeasuredTile(Tile(8, 1, 4, 1, 2, 8, 3, "wgmma"), 1.70, 0.248),
    MeasuredTile(Tile(16, 2, 1, 8, 2, 2, 1), 1.20, 0.994),
    MeasuredTile(Tile(16, 2, 1, 8, 2, 2, 2), 1.78, 1.245),
    MeasuredTile(Tile(16, 1, 4, 1, 2, 8, 3, "wgmma"), 2.33, 0.285),
    MeasuredTile(Tile(32, 1, 4, 1, 2, 6, 3, "wgmma"), 3.43, 0.350),
    MeasuredTile(Tile(32, 1, 4, 2, 0, 4, 2, "wgmma"), 2.13, 0.707),
    MeasuredTile(Tile(32, 1, 4, 4, 0, 3, 1, "wgmma"), 1.47, 0.936),
    MeasuredTile(Tile(64, 1, 4, 1, 0, 5, 3, "wgmma"), 4.46, 0.559),
    MeasuredTile(Tile(64, 1, 4, 2, 0, 4, 1, "wgmma"), 2.11, 0.686),
    MeasuredTile(Tile(64, 1, 4, 4, 0, 2, 1, "wgmma"), 2.31, 1.353),
    MeasuredTile(Tile(128, 1, 8, 1, 0, 6, 1, "wgmma"), 3.38, 0.745),
)


_NOT_GATED = (Tile(8, 2, 1, 16, 2, 2, 1), Tile(16, 2, 1, 8, 2, 2, 2))  # would spill registers


def group_tiles(gated: bool) -> list[MeasuredTile]:
    """Those of GROUP_TILES that serve a kind of product."""
    return [m for m in GROUP_TILES if not (gated and m.tile in _NOT_GATED)]


def _choose_group_tile(M: int, N: int, K: int, num_sms: int, gated: bool) -> Tile:
    """The tile with the least estimated time, as of `_choose_wgmma_tile`. Tiles of 8, 16, 32 and 64 tokens were
    measured for up to 1, 2, 4 and 8 times as many, and are not chosen beyond."""

    def time(measured: MeasuredTile) -> float:
        tile = measured.tile
        ctas = -(-M // tile.tokens) * -(-N // tile.rows)
        rounds = max(1, -(-ctas // num_sms) / tile.ctas_per_sm)
        return rounds * (measured.cta_us + measured.k_iter_us * -(-num_groups(K) // tile.k_warps))

    measured = [m for m in group_tiles(gated) if -(-M // m.tile.tokens) <= m.tile.tokens // 8 or m.tile.tokens == 128]
    return min(measured, key=time).tile


@cache
def choose_group_tile(M: int, N: int, K: int, arch: int, num_sms: int, gated: bool = False) -> Tile:
    """The tile of a product with group scales, for M tokens and N rows, gate and up rows counted each.

        before sm_75   dp4a: 8 tokens
        sm_90          mma or wgmma: see `_choose_group_tile`
        others         mma. Up to 32 tokens loading weights is what takes time, so warps share rows, each with its own
                       groups; beyond, a warp goes through all groups, and its sums stay in registers, unless up to 128
                       tokens of so few rows would leave SMs idle

    Those of sm_90 were measured on an H200 with Bonsai's shapes, the others nowhere. Shared memory is at most 64 KB on
    sm_75, 99 KB on others.
    """
    if arch < MIN_ARCH:
        return Tile(TOKENS, 2 if gated else 1, 1, 8, 0, 0, scheme="dp4a")
    if arch == WGMMA_ARCH:
        return _choose_group_tile(M, N, K, num_sms, gated)
    staged = arch >= STAGED_ARCH
    if M <= 8:
        return Tile(8, 2, 1, 8, 3 if staged else 2, 3, 1)
    if M <= 16 or M <= 32 and not staged:
        return Tile(16, 2, 1, 8 if staged else 4, 2, 2, 1)
    few_rows = Tile(32, 2, 1, 4, 2, 2, 1)
    if M <= 32:
        return few_rows
    tile = Tile(32, 2, 4, 1, 1, 4 if staged else 2, 3) if M <= 64 else Tile(64, 2, 4, 1, 1, 3 if staged else 2, 3)
    if M <= 128 and staged and -(-M // tile.tokens) * -(-N // tile.rows) < num_sms:
        return few_rows
    return tile
