"""The W2A8 product of many tokens: which kernel, cut up how, and the prepared launch.

    y[m, n] = (sum_k q[m, k] * w[n, k]) * scale[segment of n] / s[m]  (+ bias[n])

w2a8_tensor.py holds the kernel for tensor cores (sm_75 and later), w2a8_warpgroup.py the one for sm_90,
w2a8_columns.py the one without. All forms give the same bits: sums are exact, and w2a8_epilogue.py does the rest as
w2a8_gemv.py does.
"""

from collections.abc import Sequence
from functools import cache

from numba.cuda import types

from bitnet_numba.kernels.linear.epilogue import EPILOGUES
from bitnet_numba.kernels.linear.gemm_dp4a import STEP, make_columns
from bitnet_numba.kernels.linear.gemm_mma import PANEL, make_matmul
from bitnet_numba.kernels.linear.gemm_wgmma import SPAN, block_bytes, make_warpgroup, shared_bytes
from bitnet_numba.kernels.linear.heuristics import plan
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.kernels.ptx.tma import SPAN_INTS
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import CARVEOUT, CARVEOUT_BYTES, RESERVED_BYTES, KernelSpec
from bitnet_numba.packing import BLOCK_ROWS, packed_words, padded_shape

MAX_SEGMENTS = 3  # q, k and v


def _carveout(tile: Tile) -> int:
    """All of it as shared memory for tiles whose blocks take more than the usual share."""
    return (
        100
        if tile.scheme == "wgmma" and tile.per_sm * (block_bytes(tile) + RESERVED_BYTES) > CARVEOUT_BYTES
        else CARVEOUT
    )


@cache
def spec(arch: int, tile: Tile, epilogue: str = "store", activation: str = "relu2", bias: bool = False) -> KernelSpec:
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
    return KernelSpec(
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
    use_pdl: bool = True,
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
    if not 1 <= len(ends) <= MAX_SEGMENTS or ends[-1] != N or list(ends) != sorted(ends):
        raise ValueError(f"w2a8_matmul: segments that end at {ends} do not divide {N} rows into up to {MAX_SEGMENTS}")
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
    tile = plan(M, N, K, device.arch, device.num_sms, gated)
    grid, integers = launch_sizes(tile, M, N, K, ends, gated)
    if tile.scheme == "wgmma":
        of_words, of_q = map_sizes(tile, M, N, K, gated)
        words, q = device.tensor_map(words, *of_words), device.tensor_map(q, *of_q)
    arguments = (words, q, s, total, count, scales, bias, out, *integers)
    return device.launch(spec(device.arch, tile, epilogue, activation, bias is not None), grid, arguments, use_pdl)
