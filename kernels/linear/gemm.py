"""The W2A8 product of many tokens (GEMM): the launcher, which chooses kernel and tile.

    y[m, n] = (sum_k q[m, k] * w[n, k]) * scale[segment of n] / s[m]  (+ bias[n])

gemm_wgmma.py has the kernel for sm_90, gemm_few.py another one there for up to four tokens, gemm_mma.py the one for
tensor cores from sm_75 on, gemm_dp4a.py the one without them; heuristics.py chooses. All variants give the same bits:
sums are exact, and what follows them is the same sequence of operations as in gemv.py.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from numba.cuda import types

from bitnet_numba.kernels.linear import gemm_few
from bitnet_numba.kernels.linear.epilogue import EPILOGUES
from bitnet_numba.kernels.linear.gemm_dp4a import STEP, make_gemm_dp4a
from bitnet_numba.kernels.linear.gemm_mma import PANEL, make_gemm_mma
from bitnet_numba.kernels.linear.gemm_wgmma import PART, cta_bytes, make_gemm_wgmma, shared_bytes
from bitnet_numba.kernels.linear.heuristics import choose_few, choose_tile
from bitnet_numba.kernels.linear.operands import PackedLinear, QuantizedActivations, check_segments
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.kernels.operands import checked
from bitnet_numba.kernels.ptx.tma import SPAN_INTS, Boxes
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import CARVEOUT, CARVEOUT_BYTES, RESERVED_BYTES, KernelSpec
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, padded_shape


def _carveout(tile: Tile) -> int:
    """All of L1 as shared memory for tiles whose CTAs take more than the usual share."""
    large = tile.scheme == "wgmma" and tile.ctas_per_sm * (cta_bytes(tile) + RESERVED_BYTES) > CARVEOUT_BYTES
    return 100 if large else CARVEOUT


@cache
def spec(arch: int, tile: Tile, epilogue: str = "store", activation: str = "relu2", bias: bool = False) -> KernelSpec:
    """The variant for a tile; K, N and M are arguments of the launch."""
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    out = i32 if epilogue == "acc" else f32
    # With wgmma, words and q are tensor maps.
    signature = (i32, i32, f32, i32, i32, f32, f32 if bias else types.none, out, *(types.int32,) * 8)
    kind = f"gated {activation}" if epilogue == "gated" else epilogue
    if tile.scheme == "dp4a":
        kernel, dp4a = make_gemm_dp4a(arch, tile.k_warps, epilogue, activation), 16 * tile.tokens
    else:
        make = make_gemm_wgmma if tile.scheme == "wgmma" else make_gemm_mma
        kernel, dp4a = make(arch, tile, epilogue, activation), 0
    return KernelSpec(
        # With the architecture: the disk cache is keyed by name, and tests run variants made for another one.
        name=f"gemm[sm_{arch} {kind} {'bias ' if bias else ''}{' '.join(map(str, tile))}]",
        kernel=kernel,
        signature=signature,
        threads=tile.threads,
        blocks_per_sm=tile.ctas_per_sm,
        dp4a=dp4a,
        shared=shared_bytes(tile) if tile.scheme == "wgmma" else 0,
        cluster=tile.cluster,
        carveout=_carveout(tile),
    )


def map_boxes(tile: Tile, M: int, N: int, K: int, gated: bool) -> tuple[Boxes, Boxes]:
    """The boxes that words and q are loaded in, the parts of a k_iter in one.

    Where columns are no multiple of PART, the last part of a token runs on into the next one, and that of the last
    beyond the array: there, words are zeros.
    """
    (padded_N, padded_K), units = padded_shape(N, K), tile.row_warps // (2 if gated else 1)
    words = (padded_N // BLOCK_ROWS, padded_K // BLOCK_COLS, BLOCK_COLS)
    q = (-(-padded_K // PART), M, SPAN_INTS)
    return (
        Boxes(words, (padded_K, BLOCK_COLS), (units, tile.k_warps * PART // BLOCK_COLS, BLOCK_COLS), swizzled=False),
        Boxes(q, (SPAN_INTS, padded_K // 4), (tile.k_warps, tile.tokens, SPAN_INTS), swizzled=True),
    )


def launch_sizes(tile: Tile, M: int, N: int, K: int, ends: Sequence[int], gated: bool) -> tuple:
    """The grid and the int32 arguments: (x, y), (M, rows, KP, k_iters, row_blocks, up_offset, bound1, bound2)."""
    rows, halves = (N // 2, 2) if gated else (N, 1)
    padded_rows, padded_K = padded_shape(rows, K)
    blocks = padded_rows // BLOCK_ROWS
    columns = {"dp4a": STEP, "mma": PANEL, "wgmma": PART}[tile.scheme]
    k_iters = -(-padded_K // (columns * tile.k_warps * tile.cluster))
    if not tile.refill and k_iters > tile.stages:
        raise ValueError(f"gemm: {tile} has no stages for {K} columns")
    grid = (-(-M // tile.tokens), -(-blocks // (tile.row_blocks * tile.row_warps // halves)) * tile.cluster)
    return grid, (M, rows, padded_K, k_iters, blocks, blocks if gated else 0, *(*ends, N, N)[:2])


def gemm(
    device: Device,
    linear: PackedLinear,
    x: QuantizedActivations,
    count: Any,
    out: Any,
    num_tokens: int,
    *,
    epilogue: str = "store",
    activation: str = "relu2",
    use_pdl: bool = True,
) -> Launch:
    """The launch of a product with up to `num_tokens` tokens' activations.

    count: int32 [1], how many of the tokens are real when it runs (no kernel still running may write it); rows of `out`
    beyond keep what they hold, or get anything. x: with room for `QuantizedActivations.q_size`. out: float32
    [num_tokens, N] ("gated": [num_tokens, N / 2]), or int32 for epilogue "acc". Epilogues as of `gemv`. Raises
    ValueError with the sizes if operands do not fit together.
    """
    N, K, gated = linear.N, linear.K, epilogue == "gated"
    if num_tokens < 1:
        raise ValueError(f"gemm: a product needs at least one token, not {num_tokens}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"gemm: no epilogue {epilogue!r}, only {', '.join(EPILOGUES)}")
    check_segments("gemm", linear.segments, gated)
    operands = linear.sizes() | x.sizes(num_tokens, K)
    split = choose_few(num_tokens, N, K, device.arch, device.num_sms, gated)
    tile = choose_tile(num_tokens, N, K, device.arch, device.num_sms, gated)
    if split is None and tile.scheme == "wgmma":
        of_words, of_q = map_boxes(tile, num_tokens, N, K, gated)
        operands["q"] = (x.q, 4 * of_q.size, "int8")
    operands["count"] = (count, 1, "int32")
    operands["out"] = (out, num_tokens * (N // 2 if gated else N), "int32" if epilogue == "acc" else "float32")
    problem = f"a {N} x {K} product of {num_tokens} tokens"
    words, scales, bias, q, s, q_sum, count, out = checked("gemm", problem, **operands)
    if split is not None:
        few = gemm_few.gemm_few_spec(device.arch, K, split, epilogue, activation, bias is not None)
        few_grid, integers = gemm_few.launch_sizes(split, num_tokens, N, K, linear.segment_ends, gated)
        arguments = (words, q, s, q_sum, count, scales, bias, out, *integers)
        return device.launch(few, few_grid, arguments, use_pdl)
    grid, integers = launch_sizes(tile, num_tokens, N, K, linear.segment_ends, gated)
    if tile.scheme == "wgmma":
        words, q = device.tensor_map(words, of_words), device.tensor_map(q, of_q)
    arguments = (words, q, s, q_sum, count, scales, bias, out, *integers)
    return device.launch(spec(device.arch, tile, epilogue, activation, bias is not None), grid, arguments, use_pdl)
