"""The W2A8 product of many tokens with group scales (GEMM): the launcher, which chooses kernel and tile.

    y[m, n] = sum over groups g of (sum_k q[m, k] * w[n, k]) * (scales[n, g] * d[g, m])  (+ bias[n])

gemm_groups_wgmma.py has the kernel for many tokens on sm_90, gemm_groups_mma.py the one for tensor cores from sm_75 on,
gemm_groups_dp4a.py the one without them; heuristics.py chooses the tile. All variants give the reference's bits: sums
of a group are exact, and the groups are added in float32 from the first on.
"""

from functools import cache
from typing import Any

from numba.cuda import types

from bitnet_numba.kernels.linear import gemm_groups_wgmma
from bitnet_numba.kernels.linear.epilogue import GROUP_EPILOGUES
from bitnet_numba.kernels.linear.gemm_groups_dp4a import make_gemm_groups_dp4a
from bitnet_numba.kernels.linear.gemm_groups_mma import GROUP_SCALES, make_gemm_groups_mma, shared_bytes
from bitnet_numba.kernels.linear.gemm_groups_wgmma import make_gemm_groups_wgmma
from bitnet_numba.kernels.linear.gemm_wgmma import PART
from bitnet_numba.kernels.linear.heuristics import choose_group_tile
from bitnet_numba.kernels.linear.operands import GroupedActivations, GroupedLinear, check_segments, steps_stride
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.kernels.operands import checked
from bitnet_numba.kernels.ptx.tma import SPAN_INTS, Boxes
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import CARVEOUT, CARVEOUT_BYTES, RESERVED_BYTES, KernelSpec
from bitnet_numba.packing import BLOCK_ROWS, num_groups, padded_shape


@cache
def spec(arch: int, tile: Tile, epilogue: str = "store", activation: str = "relu2", bias: bool = False) -> KernelSpec:
    """The variant for a tile; K, N and M are arguments of the launch."""
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    dp4a = tile.scheme == "dp4a"
    signature = (
        *(i32, i32, f32 if dp4a else i32, i32, i32),  # words, q, steps, count, scales
        *(f32 if bias else types.none, f32),  # bias, out
        *(types.int32,) * 8,  # M, steps_row, rows, KP, groups, k_iters, row_blocks, up_offset
    )
    kind = f"gated {activation}" if epilogue == "gated" else epilogue
    if dp4a:
        kernel, shared = make_gemm_groups_dp4a(arch, tile.k_warps, epilogue, activation), 0
    elif tile.scheme == "wgmma":
        # All but `count` are tensor maps.
        signature = (*(i32,) * 5, *signature[5:])  # words, q, steps, scales, count
        kernel, shared = make_gemm_groups_wgmma(arch, tile, epilogue, activation), gemm_groups_wgmma.shared_bytes(tile)
    else:
        kernel, shared = make_gemm_groups_mma(arch, tile, epilogue, activation), shared_bytes(tile)
    return KernelSpec(
        # With the architecture: the disk cache is keyed by name, and tests run variants made for another one.
        name=f"gemm_groups[sm_{arch} {kind} {'bias ' if bias else ''}{' '.join(map(str, tile))}]",
        kernel=kernel,
        signature=signature,
        threads=tile.threads + (gemm_groups_wgmma.EXTRA_THREADS if tile.scheme == "wgmma" else 0),
        blocks_per_sm=tile.ctas_per_sm,
        dp4a=16 * tile.tokens if dp4a else 0,
        shared=shared,
        carveout=100 if tile.ctas_per_sm * (shared + RESERVED_BYTES) > CARVEOUT_BYTES else CARVEOUT,
    )


def map_boxes(tile: Tile, M: int, N: int, K: int, gated: bool) -> tuple[Boxes, ...]:
    """The boxes that words, q, steps and scales are loaded in."""
    (padded_N, padded_K), groups = padded_shape(N, K), num_groups(K)
    blocks, box_rows = padded_N // BLOCK_ROWS, tile.row_warps // (2 if gated else 1)
    return (
        Boxes.of_matrix(blocks, padded_K, box_rows, PART),
        Boxes.of_matrix(M, padded_K // 4, tile.tokens, SPAN_INTS),
        Boxes.of_matrix(groups, steps_stride(M), 1, tile.tokens),
        Boxes.of_matrix(blocks, groups * GROUP_SCALES, box_rows, GROUP_SCALES),
    )


def launch_sizes(tile: Tile, M: int, N: int, K: int, gated: bool) -> tuple:
    """The grid and the int32 arguments: (x, y), (M, steps_row, rows, KP, groups, k_iters, row_blocks, up_offset)."""
    rows, halves = (N // 2, 2) if gated else (N, 1)
    padded_rows, padded_K = padded_shape(rows, K)
    blocks, groups = padded_rows // BLOCK_ROWS, num_groups(K)
    grid = (-(-M // tile.tokens), -(-blocks // (tile.row_blocks * tile.row_warps // halves)))
    k_iters = -(-groups // tile.k_warps)
    return grid, (M, steps_stride(M), rows, padded_K, groups, k_iters, blocks, blocks if gated else 0)


def gemm_groups(
    device: Device,
    linear: GroupedLinear,
    x: GroupedActivations,
    count: Any,
    out: Any,
    num_tokens: int,
    *,
    epilogue: str = "store",
    activation: str = "relu2",
    use_pdl: bool = True,
) -> Launch:
    """The launch of a product with up to `num_tokens` tokens' activations, as many as `quantize_groups` made.

    count, out and epilogues as of `gemm`, without "acc". Raises ValueError with the sizes if operands do not fit
    together.
    """
    N, K, gated = linear.N, linear.K, epilogue == "gated"
    if num_tokens < 1:
        raise ValueError(f"gemm_groups: a product needs at least one token, not {num_tokens}")
    if epilogue not in GROUP_EPILOGUES:
        raise ValueError(f"gemm_groups: no epilogue {epilogue!r}, only {', '.join(GROUP_EPILOGUES)}")
    check_segments("gemm_groups", linear.segments, gated)
    operands = linear.sizes() | x.sizes(num_tokens, K)
    operands["count"] = (count, 1, "int32")
    operands["out"] = (out, num_tokens * (N // 2 if gated else N), "float32")
    problem = f"a {N} x {K} product of {num_tokens} tokens"
    words, scales, bias, q, steps, count, out = checked("gemm_groups", problem, **operands)
    tile = choose_group_tile(num_tokens, N, K, device.arch, device.num_sms, gated)
    grid, integers = launch_sizes(tile, num_tokens, N, K, gated)
    if tile.scheme == "wgmma":
        boxes = map_boxes(tile, num_tokens, N, K, gated)
        maps = (device.tensor_map(array, of) for array, of in zip((words, q, steps, scales), boxes, strict=True))
        arguments = (*maps, count, bias, out, *integers)
    else:
        arguments = (words, q, steps, count, scales, bias, out, *integers)
    return device.launch(spec(device.arch, tile, epilogue, activation, bias is not None), grid, arguments, use_pdl)
