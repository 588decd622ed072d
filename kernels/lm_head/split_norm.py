"""TODO docstring."""

from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import BLOCK_COLS

POSITIVE, NEGATIVE, BF16_ONE = 0x43004300, int(np.uint32(0xC300C300).astype(np.int32)), 0x3F803F80

TENSOR_CORES = 80  # the first architecture with this mma
TILE = 16  # tokens of an instruction
TILES = (1, 2, 4, 8)  # of tokens in one launch; more tokens are several groups of 128
ROWS_TILE = 8  # tokens at a time without tensor cores
UNIT = 32  # columns
TERM_WORDS = 128  # of x: half a unit, a tile, a term
TILE_WORDS = 4 * TERM_WORDS
UNITS_OF = 8  # K is padded to so many units, with zeros: a turn of the loop has 4 (bfloat16) or 8 (int8)
PADDED_COLUMNS = 512  # what either kernel pads K to, at most


def tiles_of(tokens: int) -> int:
    """Tiles of 16 tokens in a launch for so many tokens."""
    return next((tiles for tiles in TILES if TILE * tiles >= tokens), TILES[-1])


def split_words(tokens: int, K: int) -> int:
    """int32 words of x for so many tokens of K columns."""
    return padded_tokens(TENSOR_CORES, tokens) * -(-K // PADDED_COLUMNS) * PADDED_COLUMNS


def padded_tokens(arch: int, tokens: int) -> int:
    """Tokens that x has room for: whole groups."""
    group = TILE * tiles_of(tokens) if arch >= TENSOR_CORES else ROWS_TILE
    return -(-tokens // group) * group


def _units(K: int) -> int:
    return -(-K // (UNIT * UNITS_OF)) * UNITS_OF


NORM_THREADS = 512  # as the head of one token has, so that the sums of its norm are the same


@device_function
def _bf16_pair(word, selector):
    """Two of a word's int8 (selector 0x4140: the first two, 0x4342: the last two) as bfloat16."""
    pair = int32(ptx.byte_permute(word, 0, selector))
    # 128 + the low seven bits, minus 128, or minus 256 if the sign bit is set: all of them are bfloat16 numbers.
    return ptx.fma_bf16x2(int32(pair & 0x7F007F | POSITIVE), BF16_ONE, int32(pair & 0x800080 | NEGATIVE))


def make_norm_split(
    arch: int, K: int, int8: bool, threads: int = NORM_THREADS, plain: bool = False
) -> Callable[..., None]:
    """The kernel that norms rows of K columns and writes x; a block a row. `int8`: of the weights that x will meet.

    `plain`: x is for `head_warpgroup`, [group of `tiles` tokens, term, token, K columns].
    """
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    WARPS, CHUNKS_OF_4, PER_LOAD, TERMS = threads // WARP, K // 4, 16 if int8 else 8, arch >= TENSOR_CORES
    LOAD_UNITS, UNITS = PER_LOAD // 8, _units(K)
    FILL = UNITS * (UNIT // 4) if TERMS else -(-K // (WARP * PER_LOAD)) * WARP * PER_LOAD // 4
    PLAIN, ROW_WORDS = plain, K // 2
    if plain:
        FILL = CHUNKS_OF_4
    COLUMNS, ZERO, ONE = float32(K), float32(0), float32(1)

    def norm_split(h, norm, eps, x, tokens, tiles):
        square_s = ptx.pointer(cuda.shared.array(WARPS, float32))
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        m = int32(cuda.blockIdx.x)
        h_rd = int64(m) * K
        columns = int32(CHUNKS_OF_4) if m < tokens else int32(0)
        tile = int32(m // TILE)
        group = ptx.udiv(tile, tiles)
        tile_wr = (int64(group * UNITS) * tiles + int32(tile - group * tiles)) * TILE_WORDS
        row_wr = int64(m + ptx.udiv(m, tiles) * tiles) * ROW_WORDS
        release()
        wait()

        # The operations of `head`, in its order.
        squares = ZERO
        for chunk in range(tid, columns, threads):
            v0, v1, v2, v3 = ptx.load4(h, h_rd + chunk * 4)
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

        for chunk in range(tid, FILL, threads):
            v0, v1, v2, v3 = ZERO, ZERO, ZERO, ZERO
            if chunk < columns:
                v0, v1, v2, v3 = ptx.load4(h, h_rd + chunk * 4)
                n0, n1, n2, n3 = ptx.load4(norm, chunk * 4)
                v0, v1 = ptx.mul_rn(n0, ptx.mul_rn(v0, inverse)), ptx.mul_rn(n1, ptx.mul_rn(v1, inverse))
                v2, v3 = ptx.mul_rn(n2, ptx.mul_rn(v2, inverse)), ptx.mul_rn(n3, ptx.mul_rn(v3, inverse))
            k = int32(chunk * 4)
            if PLAIN:
                high, high2 = ptx.pack_bf16x2(v0, v1), ptx.pack_bf16x2(v2, v3)
                low = ptx.pack_bf16x2(ptx.add_rn(v0, -ptx.bf16_low(high)), ptx.add_rn(v1, -ptx.bf16_high(high)))
                low2 = ptx.pack_bf16x2(ptx.add_rn(v2, -ptx.bf16_low(high2)), ptx.add_rn(v3, -ptx.bf16_high(high2)))
                wr = row_wr + chunk * 2
                ptx.store2(x, wr, high, high2)
                ptx.store2(x, wr + int64(tiles) * ROW_WORDS, low, low2)
            elif TERMS:
                unit = int32(k // (4 * PER_LOAD) * LOAD_UNITS + k % PER_LOAD // 8)
                lane_wr = int32((m % 8 * 4 + k // PER_LOAD % 4) * 4 + m % TILE // 8)
                wr = tile_wr + int64(unit * tiles) * TILE_WORDS + (k % 8 // 4 * (2 * TERM_WORDS) + lane_wr)
                high = ptx.pack_bf16x2(v0, v1)
                x[wr] = high
                x[wr + TERM_WORDS] = ptx.pack_bf16x2(
                    ptx.add_rn(v0, -ptx.bf16_low(high)), ptx.add_rn(v1, -ptx.bf16_high(high))
                )
                high = ptx.pack_bf16x2(v2, v3)
                x[wr + 2] = high
                x[wr + TERM_WORDS + 2] = ptx.pack_bf16x2(
                    ptx.add_rn(v2, -ptx.bf16_low(high)), ptx.add_rn(v3, -ptx.bf16_high(high))
                )
            else:
                load_of, lane_of = int32(k // (PER_LOAD * WARP)), int32(k // PER_LOAD % WARP)
                column = int64(m // ROWS_TILE) * (FILL * 4 // WARP) + load_of * PER_LOAD + k % PER_LOAD
                wr = (column * 2 + m % ROWS_TILE // 4) * (4 * WARP) + lane_of * 4 + m % 4
                x[wr] = int32(ptx.float_to_bits(v0))
                x[wr + 8 * WARP] = int32(ptx.float_to_bits(v1))
                x[wr + 16 * WARP] = int32(ptx.float_to_bits(v2))
                x[wr + 24 * WARP] = int32(ptx.float_to_bits(v3))

    return norm_split


def norm_split_spec(arch: int, K: int, int8: bool, threads: int = NORM_THREADS, plain: bool = False) -> KernelSpec:
    """The compiled form; `threads` only for tests. Raises ValueError unless K is a multiple of 32."""
    check_columns(K)
    f32, i32 = types.float32, types.int32
    kind = "plain" if plain else "int8" if int8 else "bf16"
    name = f"norm_{'split' if arch >= TENSOR_CORES else 'rows'}[{K}, {kind}, {threads}]"
    signature = (types.CPointer(f32), types.CPointer(f32), f32, types.CPointer(i32), i32, i32)
    return KernelSpec(name, make_norm_split(arch, K, int8, threads, plain), signature, threads)


def check_columns(K: int) -> None:
    if K < 1 or K % BLOCK_COLS:
        raise ValueError(f"head rows must have a multiple of {BLOCK_COLS} columns, not {K}")


def norm_split(
    device: Device,
    h: DeviceArray,
    norm: DeviceArray,
    eps: float,
    x: DeviceArray,
    tokens: int,
    K: int,
    int8: bool,
    use_pdl: bool = True,
) -> Launch:
    """The launch that prepares x for `head_many`: normed activations as two terms, in the order that it reads.

    h float32 [tokens, K]; norm float32 [K]; x int32 [split_words(tokens, K)]; `int8`: whether the head's rows are int8.
    Raises ValueError with the sizes if they do not fit together.
    """
    sizes = {"h": (h, tokens * K), "norm": (norm, K), "x": (x, split_words(tokens, K))}
    check_sizes("norm_split", tokens, sizes)
    spec = norm_split_spec(device.arch, K, int8)
    return device.launch(spec, padded_tokens(device.arch, tokens), (h, norm, eps, x, tokens, tiles_of(tokens)), use_pdl)


def check_sizes(what: str, tokens: int, sizes: dict[str, tuple[DeviceArray, int]]) -> None:
    if tokens < 1:
        raise ValueError(f"{what}: {tokens} tokens; at least one is needed")
    for name, (array, size) in sizes.items():
        if array.size < size:
            raise ValueError(f"{what}: {name} holds {array.size} elements, {size} are needed")
