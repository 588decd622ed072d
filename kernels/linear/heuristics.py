"""TODO docstring."""

import math
from functools import cache

from bitnet_numba.kernels.linear.gemm_dp4a import TOKENS
from bitnet_numba.kernels.linear.gemm_wgmma import ARCH as WARPGROUP_ARCH
from bitnet_numba.kernels.linear.gemm_wgmma import SHARED_BYTES, SPAN, block_bytes
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.kernels.runtime.spec import RESERVED_BYTES
from bitnet_numba.packing import BLOCK_ROWS

MIN_ARCH = 75  # mma of 8-bit integers
STAGED_ARCH = 80  # asynchronous copies to shared memory


def _group(tokens: int, row_warps: int, k_warps: int, stages: int, per_sm: int = 1, cluster: int = 1) -> Tile:
    """A tile of warpgroups; `stages` 0: one for every turn."""
    return Tile(tokens, 1, row_warps, k_warps, 0, stages, per_sm, "wgmma", cluster, stages > 0)


# Tiles of warpgroups, and what they take on an H200, us: a block beside its turns, and a turn. From 64 tokens on the
# first is 0.7 of that with half as many results, gate and up.
_GROUPS = (
    (_group(8, 4, 4, 0), 1.45, 0.30),
    (_group(8, 4, 4, 0, cluster=2), 2.45, 0.33),
    (_group(8, 4, 2, 0, 2), 2.3, 0.30),
    (_group(8, 4, 4, 6), 0.94, 0.48),
    (_group(8, 8, 2, 6), 2.0, 0.45),
    (_group(16, 4, 4, 0), 1.75, 0.30),
    (_group(16, 4, 4, 0, cluster=2), 2.5, 0.37),
    (_group(16, 4, 2, 0, 2), 2.6, 0.32),
    (_group(16, 4, 4, 6), 1.1, 0.48),
    (_group(16, 8, 2, 6), 2.1, 0.45),
    (_group(32, 4, 2, 0), 1.2, 0.25),
    (_group(32, 4, 4, 0), 2.1, 0.37),
    (_group(32, 4, 4, 0, cluster=2), 3.0, 0.43),
    (_group(32, 8, 2, 0), 2.5, 0.45),
    (_group(32, 4, 4, 6), 1.7, 0.50),
    (_group(32, 8, 2, 6), 2.7, 0.45),
    (_group(64, 4, 2, 0), 2.2, 0.30),
    (_group(64, 4, 4, 5), 2.9, 0.56),
    (_group(64, 4, 4, 3, cluster=2), 4.1, 0.55),
    (_group(64, 8, 2, 6), 3.6, 0.46),
    (_group(64, 8, 1, 8), 2.9, 0.32),
    (_group(64, 4, 2, 5, 2), 3.3, 0.47),
    (_group(64, 8, 1, 8, 2), 4.7, 0.40),
    (_group(96, 8, 2, 5), 5.0, 0.56),
    (_group(96, 8, 1, 6, 2), 5.7, 0.50),
    (_group(128, 4, 2, 6), 3.5, 0.38),
    (_group(128, 8, 1, 8), 5.1, 0.34),
    (_group(192, 8, 1, 6), 7.0, 0.44),
    (_group(256, 8, 1, 6), 8.3, 0.57),
)

LATER = 1.4  # us that a round but the first waits for its weights, of tiles with a stage for each turn
AGAIN = 0.4  # us that fetching the same weights once more adds to tiles of up to 32 tokens


def _fitted(tile: Tile, K: int) -> Tile | None:
    """A tile with a stage for each of its turns, if that is how it is made, and if these fit."""
    if tile.refill:
        return tile
    tile = tile._replace(stages=-(-K // (SPAN * tile.k_warps * tile.cluster)))
    return tile if tile.per_sm * (block_bytes(tile) + RESERVED_BYTES) <= SHARED_BYTES + RESERVED_BYTES else None


def _narrow(tile: Tile) -> bool:
    """Whether gate and up rows would have two warps each, where that was slow."""
    return tile.row_warps < 8 and (tile.tokens > 16 or tile.per_sm == 1)


def _plan_groups(M: int, N: int, K: int, num_sms: int, gated: bool) -> Tile:
    """The tile of warpgroups that takes least by what was measured. Blocks come in rounds of as many as are resident;
    of two on a SM one can be alone at last."""

    def time(tile: Tile, block: float, turn: float) -> float:
        blocks = -(-M // tile.tokens) * -(-N // tile.rows) * tile.cluster
        rounds = -(-blocks // num_sms) / tile.per_sm
        turns = -(-K // (SPAN * tile.k_warps * tile.cluster))
        later = 0 if tile.refill else LATER * max(0, math.ceil(rounds) - 1)
        again = AGAIN * (-(-M // tile.tokens) - 1) if tile.tokens <= 32 else 0
        return max(1, rounds) * (block * (0.7 if gated and tile.tokens >= 64 else 1) + turn * turns) + again + later

    fitted = [(_fitted(tile, K), block, turn) for tile, block, turn in _GROUPS if not (gated and _narrow(tile))]
    return min((time(tile, block, turn), tile) for tile, block, turn in fitted if tile is not None)[1]


@cache
def plan(M: int, N: int, K: int, arch: int, num_sms: int, gated: bool = False) -> Tile:
    """The launch rule, from measurements of 2B4T's products on 132 SMs; N counts gate and up rows.

    On sm_90 warpgroups serve them all, see `_plan_groups`. What follows serves other cards, though it was measured on
    that one.
    Up to 64 tokens the time is that of getting the weights: activations go straight to registers, 8, 16 or 32 tokens a
    block (for 33 to 64 tokens and many rows through shared memory). A matrix of few rows is split over eight warps
    along K, or sixteen if K is long; one of many rows (more than four row-blocks a SM) over fewer. With
    more tokens activations come through shared memory, in blocks of 64 or 128 rows and 32 or 64 tokens; from 256 tokens
    on also 160 x 64, whichever leaves the busiest SM less to do. Before sm_80 (no such card was measured):
    the forms for 32 tokens, whatever M, or dp4a, 8 tokens a block, where there are no tensor cores.
    """
    if arch < MIN_ARCH:
        return Tile(TOKENS, 2 if gated else 1, 1, 8, 0, 0, scheme="dp4a")
    if arch < STAGED_ARCH:
        M = min(M, 32)
    if arch == WARPGROUP_ARCH:
        return _plan_groups(M, N, K, num_sms, gated)
    many, long = -(-N // BLOCK_ROWS) > 4 * num_sms, K > 4096
    if M <= 8:
        if many:
            return Tile(8, 2, 2, 4, 5, 0, 2)
        return Tile(8, 2, 1, 16, 5, 0, 1) if long else Tile(8, 4, 1, 8, 5, 0, 1)
    if M <= 16:
        return Tile(16, 4, 1, 8, 2, 0, 2) if many else Tile(16, 2, 1, 16, 4, 0, 1)
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
        blocks = -(-M // tile.tokens) * -(-N // tile.rows)
        return -(-blocks // num_sms) * tile.tokens * tile.rows

    return min((Tile(64, 4, 2, 2, 2, 3, 2), Tile(64, 2, 5, 2, 2, 2, 1)), key=busiest)
