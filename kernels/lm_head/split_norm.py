"""The final RMSNorm of many tokens, written as the LM-head GEMM kernels read it: "x", and the layouts of x.

    norm(h)[m] = h[m] / sqrt(mean(h[m]^2) + eps) * weight          a block a token; float32, the operations of
                                                                   `lm_head_gemv` in its order, so the same bits
    v = high + low          on tensor cores v is the sum of two bfloat16 terms: high is v rounded, low what that left
                            out, rounded. Relative error of the sum: about 2^-17.
    v = unit * (65536 * high + 256 * middle + low)
                            for int8 rows by `wgmma`: three int8 terms of a whole number of 24 bits. Its error is at
                            most 3/4 unit, less than 2^-23 of the token's largest v. NaN or infinity make unit so.

Tokens are cut into groups of equal size, a group to a block of the GEMM; tokens and columns that x has beyond the real
ones are zeros. With G the tokens of a group:

layout "wgmma"  [group, term, G tokens, K columns]          bfloat16: one TMA box brings both terms of 64 columns

layout "wgmma int8"  [group, term, G tokens, K columns]     int8: one TMA box brings the three terms of 128 columns;
                then [token]                                float32: units

layout "mma"    [group, unit, tile of 16 tokens, half, term, lane, 4 words]          int32, two bfloat16 a word
    unit        32 columns: what one `mma_bf16_split` multiplies. A row of the table comes in 16-byte loads, four
                neighbouring lanes 4 g .. 4 g + 3 to a row, so a lane holds columns that lie together:
                    16 bits   a load is one unit, lane c of the four has its columns 8 c .. 8 c + 7
                    int8      a load is two units: of its 64 columns lane c has 16 c .. 16 c + 7 in the first,
                              16 c + 8 .. 16 c + 15 in the second
                    float32   two loads are one unit: lane c has columns 4 c .. 4 c + 3 and 16 + 4 c .. 16 + 4 c + 3
                The k's of an instruction may come in any order, so long as both operands agree on it.
    half        the first or last four of these eight columns
    lane 4g+c   the columns of lane c, of tokens g and g + 8 of the tile
    4 words     columns 0-1 of token g, of token g + 8; columns 2-3 of token g, of token g + 8

layout "simt"   [group of 8, load, column of a lane's 16 bytes, token / 4, lane, token % 4]          float32
    load        16 bytes of a row for each of a warp's 32 lanes: 4 (float32), 8 (16 bits) or 16 (int8) columns a lane
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.lm_head.parts import check_columns, load_columns
from bitnet_numba.kernels.operands import RowDtype
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.runtime.spec import KernelSpec

Layout = Literal["wgmma", "wgmma int8", "mma", "simt"]
TILE_TOKENS = 16  # of layout "mma"
GROUP_TOKENS: dict[Layout, tuple[int, ...]] = {  # tokens of a group that holds all; of several, see `group_tokens`
    "wgmma": (8, 16, 32, 64, 128),
    "wgmma int8": (8, 16, 32, 64),
    "mma": (16, 32, 64, 128),
    "simt": (8,),
}
THREADS = 512  # as `lm_head_gemv` has, so that the sums of its norm are the same

INT8_TERMS = 3
MAX_INT8_COLUMNS = (2**31 - 1) // 128**2  # an int32 sum holds the products of so many
# What a token's largest value becomes: below 0x7f7f7f, the largest sum of three int8 terms, by more than the rounding
# of the quotient.
LARGEST = np.float32(0x7F7F7F - 7)
LEAST = int(np.float32(2.0**-100).view(np.int32))  # as which a smaller largest value counts: its unit is no denormal

UNIT = 32  # columns
UNIT_MULTIPLE = 8  # layout "mma" has a multiple of 8 units: an iteration of its GEMM takes 2, 4 or 8
HALF_WORDS = 128  # int32 of x for half a unit, a tile, a term: 4 words of each lane
TILE_WORDS = 4 * HALF_WORDS  # of a unit and a tile: two halves, two terms


def group_tokens(layout: Layout, num_tokens: int) -> int:
    """Tokens of a group: the smallest that holds all, or several of the largest. Of "wgmma" the several may be smaller,
    by multiples of 8: as small as so many groups can be."""
    sizes = GROUP_TOKENS[layout]
    groups = -(-num_tokens // sizes[-1])
    if groups > 1 and layout == "wgmma":
        return -(-num_tokens // (8 * groups)) * 8
    return next((size for size in sizes if size >= num_tokens), sizes[-1])


def padded_tokens(layout: Layout, num_tokens: int) -> int:
    """Tokens that x has room for: whole groups."""
    group = group_tokens(layout, num_tokens)
    return -(-num_tokens // group) * group


def padded_columns(layout: Layout, K: int, dtype: RowDtype) -> int:
    """Columns that x has room for; `dtype`: of the rows that x will meet."""
    multiple = {"wgmma": 1, "wgmma int8": 1, "mma": UNIT * UNIT_MULTIPLE, "simt": WARP * load_columns(dtype)}[layout]
    return -(-K // multiple) * multiple


def x_words(layout: Layout, num_tokens: int, K: int, dtype: RowDtype) -> int:
    """int32 words of x: one a token and column, but for layout "wgmma int8"."""
    if layout == "wgmma int8":
        return padded_tokens(layout, num_tokens) * (INT8_TERMS * K // 4 + 1)
    return padded_tokens(layout, num_tokens) * padded_columns(layout, K, dtype)


def make_split_norm(arch: int, K: int, layout: Layout, dtype: RowDtype, threads: int = THREADS) -> Callable[..., None]:
    """The kernel that norms rows of K columns and writes x; a block a token of x.

    `dtype`: of the rows that x will meet (of no account to layouts "wgmma" and "wgmma int8").
    """
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    LAYOUT, WARPS, LOAD_COLUMNS = layout, threads // WARP, load_columns(dtype)
    QUADS, X_QUADS = K // 4, padded_columns(layout, K, dtype) // 4  # four neighbouring columns each
    LOAD_HALVES, UNITS = LOAD_COLUMNS // 4, padded_columns(layout, K, dtype) // UNIT
    INT8 = layout == "wgmma int8"
    LARGEST_WARPS = WARPS if INT8 else 1
    TERMS, ROW_WORDS = (INT8_TERMS, K // 4) if INT8 else (2, K // 2)  # int32 of a term's row in the layouts of `wgmma`
    warp_max = ptx.warp_max_int(arch)
    COLUMNS, ZERO, ONE = float32(K), float32(0), float32(1)

    @device_function
    def normed(h, norm, h_rd, quad, inverse):
        """Four neighbouring columns of norm(h)."""
        v0, v1, v2, v3 = ptx.load4(h, h_rd + quad * 4)
        n0, n1, n2, n3 = ptx.load4(norm, quad * 4)
        v0, v1 = ptx.mul_rn(n0, ptx.mul_rn(v0, inverse)), ptx.mul_rn(n1, ptx.mul_rn(v1, inverse))
        v2, v3 = ptx.mul_rn(n2, ptx.mul_rn(v2, inverse)), ptx.mul_rn(n3, ptx.mul_rn(v3, inverse))
        return v0, v1, v2, v3

    @device_function
    def magnitude(v):
        """The bits of |v|, which are in the order of the numbers, NaN behind infinity."""
        return int32(int32(ptx.float_to_bits(v)) & 0x7FFFFFFF)

    @device_function
    def terms(v, unit):
        """The nearest multiple of `unit`, as three int8 in the lower bytes of a word, which sum up to it."""
        return uint32(ptx.round_to_int(ptx.div_rn(v, unit)) + 0x808080) ^ uint32(0x808080)

    @device_function
    def gather(t0, t1, t2, t3, term):
        """Byte `term` of four words."""
        low, high = ptx.byte_permute(t0, t1, 0x40 + 0x11 * term), ptx.byte_permute(t2, t3, 0x40 + 0x11 * term)
        return int32(ptx.byte_permute(low, high, 0x5410))

    def split_norm(h, norm, eps, x, num_tokens, group_size):
        square_s = ptx.pointer(cuda.shared.array(WARPS, float32))
        largest_s = ptx.pointer(cuda.shared.array(LARGEST_WARPS, int32))
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        m = int32(cuda.blockIdx.x)
        h_rd = int64(m) * K
        quads = int32(QUADS) if m < num_tokens else int32(0)
        # Where this token's part of x begins: layout "mma", its tile's; of `wgmma`, its row of the high term.
        tile = int32(m // TILE_TOKENS)
        group = ptx.udiv(tile, group_size)
        tile_wr = (int64(group * UNITS) * group_size + int32(tile - group * group_size)) * TILE_WORDS
        row_wr = int64(m + ptx.udiv(m, group_size) * group_size * (TERMS - 1)) * ROW_WORDS
        trigger()
        wait()

        squares = ZERO
        for quad in range(tid, quads, threads):
            v0, v1, v2, v3 = ptx.load4(h, h_rd + quad * 4)
            squares = float32(squares + v0 * v0)
            squares = float32(squares + v1 * v1)
            squares = float32(squares + v2 * v2)
            squares = float32(squares + v3 * v3)
        squares = ptx.warp_sum(squares)
        if lane == 0:
            square_s[warp] = squares
        cuda.syncthreads()
        squares = ptx.warp_sum(square_s[lane] if lane < WARPS else ZERO)
        inverse = ptx.div_rn(ONE, ptx.sqrt_rn(ptx.add_rn(ptx.div_rn(squares, COLUMNS), eps)))

        unit = ONE
        if INT8:
            largest = int32(LEAST)
            for quad in range(tid, quads, threads):
                v0, v1, v2, v3 = normed(h, norm, h_rd, quad, inverse)
                largest = max(largest, magnitude(v0), magnitude(v1), magnitude(v2), magnitude(v3))
            largest = warp_max(largest)
            if lane == 0:
                largest_s[warp] = largest
            cuda.syncthreads()
            largest = warp_max(largest_s[lane] if lane < WARPS else int32(0))
            unit = ptx.div_rn(ptx.bits_to_float(uint32(largest)), LARGEST)
            if tid == 0:
                x[int64(cuda.gridDim.x) * (INT8_TERMS * ROW_WORDS) + m] = int32(ptx.float_to_bits(unit))
        for quad in range(tid, X_QUADS, threads):
            v0, v1, v2, v3 = ZERO, ZERO, ZERO, ZERO
            if quad < quads:
                v0, v1, v2, v3 = normed(h, norm, h_rd, quad, inverse)
            k = int32(quad * 4)
            if LAYOUT == "wgmma int8":
                t0, t1, t2, t3 = terms(v0, unit), terms(v1, unit), terms(v2, unit), terms(v3, unit)
                for term in range(INT8_TERMS):
                    wr = row_wr + int64(term * group_size) * ROW_WORDS + quad
                    x[wr] = gather(t0, t1, t2, t3, INT8_TERMS - 1 - term)
            elif LAYOUT == "wgmma":
                high, low = ptx.split_bf16x2(v0, v1)
                high2, low2 = ptx.split_bf16x2(v2, v3)
                wr = row_wr + quad * 2
                ptx.store2(x, wr, high, high2)
                ptx.store2(x, wr + int64(group_size) * ROW_WORDS, low, low2)
            elif LAYOUT == "mma":
                half = int32(k // (4 * LOAD_COLUMNS) * LOAD_HALVES + k % LOAD_COLUMNS // 4)  # of all units
                lane_wr = int32((m % 8 * 4 + k // LOAD_COLUMNS % 4) * 4 + m % TILE_TOKENS // 8)
                wr = tile_wr + int64(half // 2 * group_size) * TILE_WORDS + (half % 2 * (2 * HALF_WORDS) + lane_wr)
                x[wr], x[wr + HALF_WORDS] = ptx.split_bf16x2(v0, v1)
                x[wr + 2], x[wr + HALF_WORDS + 2] = ptx.split_bf16x2(v2, v3)
            else:
                load_of, lane_of = int32(k // (LOAD_COLUMNS * WARP)), int32(k // LOAD_COLUMNS % WARP)
                column = int64(m // 8) * (X_QUADS * 4 // WARP) + load_of * LOAD_COLUMNS + k % LOAD_COLUMNS
                wr = (column * 2 + m % 8 // 4) * (4 * WARP) + lane_of * 4 + m % 4
                x[wr] = int32(ptx.float_to_bits(v0))
                x[wr + 8 * WARP] = int32(ptx.float_to_bits(v1))
                x[wr + 16 * WARP] = int32(ptx.float_to_bits(v2))
                x[wr + 24 * WARP] = int32(ptx.float_to_bits(v3))

    return split_norm


@cache
def spec(arch: int, K: int, layout: Layout, dtype: RowDtype, threads: int = THREADS) -> KernelSpec:
    """The variant for rows of K columns; `threads` differs in tests only.

    Raises ValueError unless K is a multiple of 32, and at most MAX_INT8_COLUMNS for layout "wgmma int8". Arguments of a
    launch, of padded_tokens blocks: h float32 [num_tokens, K], norm weight float32 [K], eps, x int32 [x_words],
    num_tokens, `group_size_argument`.
    """
    check_columns(K)
    if layout == "wgmma int8" and K > MAX_INT8_COLUMNS:
        raise ValueError(f"int8 LM head rows can have {MAX_INT8_COLUMNS} columns, not {K}")
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    kind = layout if layout.startswith("wgmma") else f"{layout} {dtype}"
    kernel = make_split_norm(arch, K, layout, dtype, threads)
    signature = (f32, f32, types.float32, i32, types.int32, types.int32)
    return KernelSpec(f"split_norm[{K}, {kind}, {threads}]", kernel, signature, threads)


def group_size_argument(layout: Layout, num_tokens: int) -> int:
    """The kernel's argument `group_size`: a group's tokens, or its tiles of 16 for layout "mma"."""
    return group_tokens(layout, num_tokens) // (TILE_TOKENS if layout == "mma" else 1)
