"""The W2A8 product of many tokens: which kernel, cut up how, and the prepared launch.

    y[m, n] = (sum_k q[m, k] * w[n, k]) * scale[segment of n] / s[m]  (+ bias[n])

w2a8_tensor.py holds the kernel for tensor cores (sm_75 and later), w2a8_warpgroup.py the one for sm_90,
w2a8_columns.py the one without. All forms give the same bits: sums are exact, and w2a8_epilogue.py does the rest as
w2a8_gemv.py does.
"""

import math
from collections.abc import Sequence
from functools import cache

from numba.cuda import types

from bitnet_numba.kernels.device import Device, DeviceArray, Launch
from bitnet_numba.kernels.forms import CARVED_BYTES, CARVEOUT, SYSTEM_BYTES, KernelForm
from bitnet_numba.kernels.tensor_cores import SPAN_INTS
from bitnet_numba.kernels.w2a8_columns import STEP, TOKENS, make_columns
from bitnet_numba.kernels.w2a8_epilogue import EPILOGUES
from bitnet_numba.kernels.w2a8_tensor import PANEL, Tile, make_matmul
from bitnet_numba.kernels.w2a8_warpgroup import ARCH as WARPGROUP_ARCH
from bitnet_numba.kernels.w2a8_warpgroup import (
    SHARED_BYTES,
    SPAN,
    block_bytes,
    make_warpgroup,
    shared_bytes,
    tensor_map,
)
from bitnet_numba.packing import BLOCK_ROWS, packed_words, padded_shape

LEAST_ARCH = 75  # mma of 8-bit integers
STAGED_ARCH = 80  # asynchronous copies to shared memory
MOST_SEGMENTS = 3  # q, k and v


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
    return tile if tile.per_sm * (block_bytes(tile) + SYSTEM_BYTES) <= SHARED_BYTES + SYSTEM_BYTES else None


def _narrow(tile: Tile) -> bool:
    """Whether gate and up rows would have two warps each, where that was slow."""
    return tile.row_warps < 8 and (tile.tokens > 16 or tile.per_sm == 1)


def _plan_groups(M: int, N: int, K: int, multiprocessors: int, gated: bool) -> Tile:
    """The tile of warpgroups that takes least by what was measured. Blocks come in rounds of as many as are resident;
    of two on a multiprocessor one can be alone at last."""

    def time(tile: Tile, block: float, turn: float) -> float:
        blocks = -(-M // tile.tokens) * -(-N // tile.rows) * tile.cluster
        rounds = -(-blocks // multiprocessors) / tile.per_sm
        turns = -(-K // (SPAN * tile.k_warps * tile.cluster))
        later = 0 if tile.refill else LATER * max(0, math.ceil(rounds) - 1)
        again = AGAIN * (-(-M // tile.tokens) - 1) if tile.tokens <= 32 else 0
        return max(1, rounds) * (block * (0.7 if gated and tile.tokens >= 64 else 1) + turn * turns) + again + later

    fitted = [(_fitted(tile, K), block, turn) for tile, block, turn in _GROUPS if not (gated and _narrow(tile))]
    return min((time(tile, block, turn), tile) for tile, block, turn in fitted if tile is not None)[1]


@cache
def plan(M: int, N: int, K: int, arch: int, multiprocessors: int, gated: bool = False) -> Tile:
    """The launch rule, from measurements of 2B4T's products on 132 multiprocessors; N counts gate and up rows.

    On sm_90 warpgroups serve them all, see `_plan_groups`. What follows serves other cards, though it was measured on
    that one.
    Up to 64 tokens the time is that of getting the weights: activations go straight to registers, 8, 16 or 32 tokens a
    block (for 33 to 64 tokens and many rows through shared memory). A matrix of few rows is split over eight warps
    along K, or sixteen if K is long; one of many rows (more than four row-blocks a multiprocessor) over fewer. With
    more tokens activations come through shared memory, in blocks of 64 or 128 rows and 32 or 64 tokens; from 256 tokens
    on also 160 x 64, whichever leaves the busiest multiprocessor less to do. Before sm_80 (no such card was measured):
    the forms for 32 tokens, whatever M, or dp4a, 8 tokens a block, where there are no tensor cores.
    """
    if arch < LEAST_ARCH:
        return Tile(TOKENS, 2 if gated else 1, 1, 8, 0, 0, scheme="dp4a")
    if arch < STAGED_ARCH:
        M = min(M, 32)
    if arch == WARPGROUP_ARCH:
        return _plan_groups(M, N, K, multiprocessors, gated)
    many, long = -(-N // BLOCK_ROWS) > 4 * multiprocessors, K > 4096
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
        return -(-blocks // multiprocessors) * tile.tokens * tile.rows

    return min((Tile(64, 4, 2, 2, 2, 3, 2), Tile(64, 2, 5, 2, 2, 2, 1)), key=busiest)


def _carveout(tile: Tile) -> int:
    """All of it as shared memory for tiles whose blocks take more than the usual share."""
    return (
        100 if tile.scheme == "wgmma" and tile.per_sm * (block_bytes(tile) + SYSTEM_BYTES) > CARVED_BYTES else CARVEOUT
    )


@cache
def form(arch: int, tile: Tile, epilogue: str = "store", activation: str = "relu2", bias: bool = False) -> KernelForm:
    """The compiled form of a tile; K, N and M are arguments of the launch."""
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    out = i32 if epilogue == "acc" else f32
    # For warpgroups words and q are the tensor maps that tell the copy engine about them.
    signature = (i32, i32, f32, i32, i32, f32, f32 if bias else types.none, out, *(types.int32,) * 8)
    kind = f"gated {activation}" if epilogue == "gated" else epilogue
    if tile.scheme == "dp4a":
        kernel, dp4a = make_columns(arch, tile.k_warps, epilogue, activation), 16 * tile.tokens
    else:
        make = make_warpgroup if tile.scheme == "wgmma" else make_matmul
        kernel, dp4a = make(arch, tile, epilogue, activation), 0
    return KernelForm(
        # The architecture too: machine code is kept by names, and tests run forms made for others, which do not wait.
        name=f"w2a8_matmul[sm_{arch} {kind} {'bias ' if bias else ''}{' '.join(map(str, tile))}]",
        kernel=kernel,
        signature=signature,
        threads=tile.threads,
        blocks_per_sm=tile.per_sm,
        dp4a=dp4a,
        shared=shared_bytes(tile) if tile.scheme == "wgmma" else 0,
        cluster=tile.cluster,
        carveout=_carveout(tile),
    )


def map_sizes(tile: Tile, M: int, N: int, K: int, gated: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the maps of words and q tell: rows and int32 of a row, of the matrix and of what is copied at a time."""
    padded_N, padded_K = padded_shape(N, K)
    words = (padded_N // BLOCK_ROWS, padded_K, tile.row_warps // (2 if gated else 1), SPAN)
    return words, (M, padded_K // 4, tile.tokens, SPAN_INTS)


def launch_sizes(tile: Tile, M: int, N: int, K: int, ends: Sequence[int], gated: bool) -> tuple:
    """The grid and the int32 arguments of a product: (x, y), (M, rows, KP, turns, blocks, second, bound1, bound2)."""
    rows, halves = (N // 2, 2) if gated else (N, 1)
    padded_rows, padded_K = padded_shape(rows, K)
    blocks = padded_rows // BLOCK_ROWS
    columns = {"dp4a": STEP, "mma": PANEL, "wgmma": SPAN}[tile.scheme]
    turns = -(-padded_K // (columns * tile.k_warps * tile.cluster))
    if not tile.refill and turns > tile.stages:
        raise ValueError(f"w2a8_matmul: {tile} has no stages for {K} columns")
    grid = (-(-M // tile.tokens), -(-blocks // (tile.blocks * tile.row_warps // halves)) * tile.cluster)
    return grid, (M, rows, padded_K, turns, blocks, blocks if gated else 0, *(*ends, N, N)[:2])


def w2a8_matmul(
    device: Device,
    words: DeviceArray,
    q: DeviceArray,
    s: DeviceArray,
    total: DeviceArray,
    count: DeviceArray,
    scales: DeviceArray,
    out: DeviceArray,
    M: int,
    N: int,
    K: int,
    ends: Sequence[int] = (),
    bias: DeviceArray | None = None,
    epilogue: str = "store",
    activation: str = "relu2",
    overlap: bool = True,
) -> Launch:
    """The prepared launch of a product for up to M tokens.

    words int32 [packed_words(N, K)]; q int8 [M, KP], KP = K rounded up to 32, zeros at the end of each row; s float32
    [M], the scales of `quantize_activations`; total int32 [M], the sums of q's rows; count int32 [1], how many of the M
    tokens there are when it runs (no kernel still running may write it): rows of `out` for the others keep what they
    hold, or get anything. scales float32, one for each of up to three segments of rows that end at `ends` (by default
    one, N; "gated": two equal ones); bias float32 [N] or None; out float32 [M, N] ("gated" [M, N / 2]), or int32 for
    epilogue "acc". Epilogues as in `make_matmul`. Raises ValueError with the sizes if they do not fit together.
    """
    gated = epilogue == "gated"
    ends = tuple(ends) or ((N // 2, N) if gated else (N,))
    if M < 1:
        raise ValueError(f"w2a8_matmul: a product needs at least one token, not {M}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"w2a8_matmul: no epilogue {epilogue!r}, only {', '.join(EPILOGUES)}")
    if not 1 <= len(ends) <= MOST_SEGMENTS or ends[-1] != N or list(ends) != sorted(ends):
        raise ValueError(f"w2a8_matmul: segments that end at {ends} do not divide {N} rows into up to {MOST_SEGMENTS}")
    if gated and (N % (2 * BLOCK_ROWS) or ends != (N // 2, N)):
        raise ValueError(
            f"w2a8_matmul: {N} rows in segments to {ends} are no gate and up rows in blocks of {BLOCK_ROWS}"
        )
    _, padded_K = padded_shape(N, K)
    if out.dtype != ("int32" if epilogue == "acc" else "float32"):
        raise ValueError(f"w2a8_matmul: out must be {'int32' if epilogue == 'acc' else 'float32'}, not {out.dtype}")
    sizes = {"words": (words, packed_words(N, K)), "q": (q, M * padded_K), "s": (s, M), "total": (total, M)}
    sizes |= {"count": (count, 1), "scales": (scales, len(ends)), "out": (out, M * (N // 2 if gated else N))}
    sizes |= {"bias": (bias, N)} if bias is not None else {}
    for name, (array, size) in sizes.items():
        if array.size < size:
            raise ValueError(
                f"w2a8_matmul: {name} holds {array.size} elements, a {N} x {K} product of {M} tokens takes {size}"
            )
    tile = plan(M, N, K, device.arch, device.multiprocessors, gated)
    grid, integers = launch_sizes(tile, M, N, K, ends, gated)
    if tile.scheme == "wgmma":
        of_words, of_q = map_sizes(tile, M, N, K, gated)
        words, q = tensor_map(words.address, *of_words), tensor_map(q.address, *of_q)
    arguments = (words, q, s, total, count, scales, bias, out, *integers)
    return Launch(form(device.arch, tile, epilogue, activation, bias is not None), grid, arguments, device, overlap)


def forms(arch: int) -> list[KernelForm]:
    """Forms of 2B4T's products on 132 multiprocessors for every size of pass, and every other branch."""
    kinds = [(3840, 2560, "store"), (2560, 2560, "residual"), (13824, 2560, "gated"), (2560, 6912, "residual")]
    found = {
        (plan(M, N, K, arch, 132, epilogue == "gated"), epilogue): None
        for M in (256, 8, 16, 32, 64, 128, 512, 1024, 2048)
        for N, K, epilogue in kinds
    }
    if arch == WARPGROUP_ARCH:
        found |= {(tile, "store"): None for tile in (_fitted(tile, 2560) for tile, *_ in _GROUPS) if tile}
    few, many = plan(8, 512, 512, arch, 132, True), plan(256, 512, 512, arch, 132, True)
    return [form(arch, tile, epilogue) for tile, epilogue in found] + [
        form(arch, few, "acc"),
        form(arch, few, "gated", "silu", True),
        form(arch, many, "store", bias=True),
        form(arch, many, "gated", "silu", True),
    ]
