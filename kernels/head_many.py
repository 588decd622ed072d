"""The head for many tokens: final RMSNorm and the product with every row of the vocabulary, on tensor cores.

    logits[m, n] = sum_k norm(h[m])[k] * w[n, k]   (* scale[n] for int8 rows)          bfloat16 x 2 terms, float32 sums

The normed activations are float32. `norm_split` writes them as a sum of two bfloat16, high and low (relative error
about 2^-17 in all), and `mma.m16n8k16` multiplies each with the same weights. int8 rows become bfloat16 exactly.

The weights, 657 MB for 2B4T, are what there is to read, so they take the shortest way: a lane loads 16 bytes of a row
straight into the registers that are the 8-column operand of two instructions. The k's of an instruction may be any, as
long as both operands agree: a lane's k's are the columns it happens to hold. (Rows as the 16-row operand would do, with
half the work for 8 tokens; but its registers alternate between two rows, and putting them side by side doubles them.)

    lane = 4 g + c     a unit of K: 32 columns, 8 a lane      a load of weights: 1 unit (bfloat16) or 2 (int8)
        of vocabulary row g:   columns 8 c .. 8 c + 7 of the unit
                               (int8: of the load's 64 columns 16 c .. 16 c + 7, then 16 c + 8 .. 16 c + 15)
        of tokens g, g + 8:    the same columns, two terms
    warp: ROW_TILES tiles of 8 rows at a time, all tokens, all of K. No sum is split, so that a logit has the same
        order of additions for every number of tokens.
    block: its warps' tiles, then those `grid` further on. Tokens come through shared memory, three chunks of K in turn,
        by asynchronous copies; or, for 16 tokens of few columns, from L1, so that warps never meet.

x, the two terms, lies in the order that lanes read it in; the four words are tokens g, g + 8, g, g + 8, two columns
each:

    [group of 16 TILES tokens, unit, tile of 16 tokens, half of a lane's columns, term, lane, 4 words]

docs/performance-notes.md has what was tried and measured.

On sm_90 bfloat16 rows have a kernel of their own, head_warpgroup.py, whose x is written here too.

Architectures before sm_80 have no such instruction: there a warp multiplies one row of the vocabulary with eight tokens
(`make_head_rows`), on normed activations that stay float32.
"""

from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels.device import Device, DeviceArray, Launch
from bitnet_numba.kernels.forms import KernelForm
from bitnet_numba.kernels.head import BIAS, OFFSET, SIGNS
from bitnet_numba.kernels.intrinsics import (
    SHARED_ALIGN,
    WARP,
    add_rn,
    bf16_high,
    bf16_low,
    bits_to_float,
    byte_permute,
    device_function,
    div_rn,
    divide,
    float32,
    float_to_bits,
    grid_release,
    grid_wait,
    int32,
    int64,
    keep_loop,
    load4,
    mul_rn,
    pointer,
    sqrt_rn,
    store2,
    stream_load,
    warp_sum,
)
from bitnet_numba.kernels.tensor_cores import (
    async_commit,
    async_fill4,
    async_wait,
    fma_bf16,
    mma_bf16_terms,
    pack_bf16,
    shared_address,
)
from bitnet_numba.packing import BLOCK_COLS

TENSOR_CORES = 80  # the first architecture with this mma
TILE = 16  # tokens of an instruction
TILES = (1, 2, 4, 8)  # of tokens in one launch; more tokens are several groups of 128
ROWS_TILE = 8  # tokens at a time without tensor cores
UNIT = 32  # columns
TERM_WORDS = 128  # of x: half a unit, a tile, a term
TILE_WORDS = 4 * TERM_WORDS
UNITS_OF = 8  # K is padded to so many units, with zeros: a turn of the loop has 4 (bfloat16) or 8 (int8)
PADDED_COLUMNS = 512  # what either kernel pads K to, at most
CHUNK_BYTES = 16384  # of x in shared memory; three chunks fill the 48 KB
CHUNKS = 3
L1_CARVEOUT = 25  # percent of L1 and shared memory together: 64 KB are enough
BY_L1 = 2560  # columns up to which x of 16 tokens, 160 KB, stays in L1 beside what streams through
NORM_THREADS = 512  # as the head of one token has, so that the sums of its norm are the same
ROWS_THREADS = 256  # of the kernel without tensor cores
POSITIVE, NEGATIVE, BF16_ONE = 0x43004300, int(np.uint32(0xC300C300).astype(np.int32)), 0x3F803F80


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


@device_function
def _bf16_pair(word, selector):
    """Two of a word's int8 (selector 0x4140: the first two, 0x4342: the last two) as bfloat16."""
    pair = int32(byte_permute(word, 0, selector))
    # 128 + the low seven bits, minus 128, or minus 256 if the sign bit is set: all of them are bfloat16 numbers.
    return fma_bf16(int32(pair & 0x7F007F | POSITIVE), BF16_ONE, int32(pair & 0x800080 | NEGATIVE))


def make_norm_split(
    arch: int, K: int, int8: bool, threads: int = NORM_THREADS, plain: bool = False
) -> Callable[..., None]:
    """The kernel that norms rows of K columns and writes x; a block a row. `int8`: of the weights that x will meet.

    `plain`: x is for `head_warpgroup`, [group of `tiles` tokens, term, token, K columns].
    """
    wait, release = grid_wait(arch), grid_release(arch)
    WARPS, CHUNKS_OF_4, PER_LOAD, TERMS = threads // WARP, K // 4, 16 if int8 else 8, arch >= TENSOR_CORES
    LOAD_UNITS, UNITS = PER_LOAD // 8, _units(K)
    FILL = UNITS * (UNIT // 4) if TERMS else -(-K // (WARP * PER_LOAD)) * WARP * PER_LOAD // 4
    PLAIN, ROW_WORDS = plain, K // 2
    if plain:
        FILL = CHUNKS_OF_4
    COLUMNS, ZERO, ONE = float32(K), float32(0), float32(1)

    def norm_split(h, norm, eps, x, tokens, tiles):
        square_s = pointer(cuda.shared.array(WARPS, float32))
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        m = int32(cuda.blockIdx.x)
        h_rd = int64(m) * K
        columns = int32(CHUNKS_OF_4) if m < tokens else int32(0)
        tile = int32(m // TILE)
        group = divide(tile, tiles)
        tile_wr = (int64(group * UNITS) * tiles + int32(tile - group * tiles)) * TILE_WORDS
        row_wr = int64(m + divide(m, tiles) * tiles) * ROW_WORDS
        release()
        wait()

        # The operations of `head`, in its order.
        squares = ZERO
        for chunk in range(tid, columns, threads):
            v0, v1, v2, v3 = load4(h, h_rd + chunk * 4)
            squares = float32(squares + v0 * v0)
            squares = float32(squares + v1 * v1)
            squares = float32(squares + v2 * v2)
            squares = float32(squares + v3 * v3)
        squares = warp_sum(squares)
        if lane == 0:
            square_s[warp] = squares
        cuda.syncthreads()
        squares = warp_sum(square_s[lane] if lane < WARPS else ZERO)
        inverse = div_rn(ONE, sqrt_rn(add_rn(div_rn(squares, COLUMNS), eps)))

        for chunk in range(tid, FILL, threads):
            v0, v1, v2, v3 = ZERO, ZERO, ZERO, ZERO
            if chunk < columns:
                v0, v1, v2, v3 = load4(h, h_rd + chunk * 4)
                n0, n1, n2, n3 = load4(norm, chunk * 4)
                v0, v1 = mul_rn(n0, mul_rn(v0, inverse)), mul_rn(n1, mul_rn(v1, inverse))
                v2, v3 = mul_rn(n2, mul_rn(v2, inverse)), mul_rn(n3, mul_rn(v3, inverse))
            k = int32(chunk * 4)
            if PLAIN:
                high, high2 = pack_bf16(v0, v1), pack_bf16(v2, v3)
                low = pack_bf16(add_rn(v0, -bf16_low(high)), add_rn(v1, -bf16_high(high)))
                low2 = pack_bf16(add_rn(v2, -bf16_low(high2)), add_rn(v3, -bf16_high(high2)))
                wr = row_wr + chunk * 2
                store2(x, wr, high, high2)
                store2(x, wr + int64(tiles) * ROW_WORDS, low, low2)
            elif TERMS:
                unit = int32(k // (4 * PER_LOAD) * LOAD_UNITS + k % PER_LOAD // 8)
                lane_wr = int32((m % 8 * 4 + k // PER_LOAD % 4) * 4 + m % TILE // 8)
                wr = tile_wr + int64(unit * tiles) * TILE_WORDS + (k % 8 // 4 * (2 * TERM_WORDS) + lane_wr)
                high = pack_bf16(v0, v1)
                x[wr] = high
                x[wr + TERM_WORDS] = pack_bf16(add_rn(v0, -bf16_low(high)), add_rn(v1, -bf16_high(high)))
                high = pack_bf16(v2, v3)
                x[wr + 2] = high
                x[wr + TERM_WORDS + 2] = pack_bf16(add_rn(v2, -bf16_low(high)), add_rn(v3, -bf16_high(high)))
            else:
                load_of, lane_of = int32(k // (PER_LOAD * WARP)), int32(k // PER_LOAD % WARP)
                column = int64(m // ROWS_TILE) * (FILL * 4 // WARP) + load_of * PER_LOAD + k % PER_LOAD
                wr = (column * 2 + m % ROWS_TILE // 4) * (4 * WARP) + lane_of * 4 + m % 4
                x[wr] = int32(float_to_bits(v0))
                x[wr + 8 * WARP] = int32(float_to_bits(v1))
                x[wr + 16 * WARP] = int32(float_to_bits(v2))
                x[wr + 24 * WARP] = int32(float_to_bits(v3))

    return norm_split


def make_head_many(
    arch: int, K: int, int8: bool, tiles: int, threads: int, row_tiles: int, chunk_units: int, ahead: int
) -> Callable[..., None]:
    """The kernel for `tiles` tiles of tokens (a group); `chunk_units`: units of a chunk of x, or 0 to read it by L1."""
    load, wait, release = stream_load(arch), grid_wait(arch), grid_release(arch)
    INT8, THREADS, WARPS, TILES, ROW_TILES = int8, threads, threads // WARP, tiles, row_tiles
    AHEAD = ahead  # units of weights in flight
    LOAD_UNITS = 2 if int8 else 1
    LOADS = AHEAD // LOAD_UNITS
    ROW_WORDS = K // (4 if int8 else 2)
    UNITS = _units(K)
    TURNS = UNITS // AHEAD
    EXACT = UNITS * UNIT == K
    W_REGS, B_REGS, SUMS = LOADS * row_tiles * 4, 4 * row_tiles, row_tiles * tiles * 4
    BLOCK_ROWS = WARPS * row_tiles * 8
    UNIT_WORDS = tiles * TILE_WORDS
    STAGED, CHUNK = chunk_units > 0, max(chunk_units, 1)
    CHUNK_WORDS = CHUNK * UNIT_WORDS
    X_WORDS = CHUNKS * CHUNK_WORDS if chunk_units else 4
    X_CHUNKS = UNITS // CHUNK
    GROUP_WORDS = UNITS * UNIT_WORDS
    COPIES = CHUNK_WORDS // (4 * threads)  # of 16 bytes, of a thread and a chunk
    assert not chunk_units or CHUNK_WORDS % (4 * threads) == 0
    TURNS_A_CHUNK = max(1, CHUNK // AHEAD)
    arrived, all_arrived = async_wait(1), async_wait(0)
    ZERO = float32(0)

    def head_many(weight, scale, x, logits, rows, tokens):
        x_s = pointer(cuda.shared.array(X_WORDS, int32, SHARED_ALIGN))
        w_r = cuda.local.array(W_REGS, int32)  # [LOADS, ROW_TILES, 4]
        b_r = cuda.local.array(B_REGS, int32)  # [ROW_TILES, 4]: the unit at hand, two columns a word
        sum_r = cuda.local.array(SUMS, float32)  # [ROW_TILES, TILES, 4]
        row_r = cuda.local.array(ROW_TILES, int32)  # the lane's rows
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        g, c = int32(lane // 4), int32(lane % 4)
        stride = int32(cuda.gridDim.x * BLOCK_ROWS)
        first = int32(cuda.blockIdx.x * BLOCK_ROWS)
        row = int32(first + warp * (ROW_TILES * 8) + g)

        # Rows beyond the last are read as the last, and not stored.
        for j in range(ROW_TILES):
            row_r[j] = min(int32(row + 8 * j), int32(rows - 1))
        for u in range(LOADS):
            word = int32(min(int32((u * 4 + c) * 4), int32(ROW_WORDS - 4)))
            for j in range(ROW_TILES):
                w = (u * ROW_TILES + j) * 4
                w_r[w], w_r[w + 1], w_r[w + 2], w_r[w + 3] = load(weight, row_r[j] * int64(ROW_WORDS) + word)
        release()
        wait()

        group_rd = int32(cuda.blockIdx.y * GROUP_WORDS)
        x_at = int32(0)
        now, free, chunk = int32(0), int32(2 * CHUNK_WORDS), int32(2 % X_CHUNKS)
        # Where this thread's copies go and come from.
        copy_wr, copy_rd = int32(0), int32(group_rd + 4 * tid)
        if STAGED:
            copy_wr = shared_address(x_s, 4 * tid)
            for j in range(2):
                for i in range(COPIES):
                    at = int32(j % X_CHUNKS * CHUNK_WORDS + 4 * THREADS * i)
                    async_fill4(x_s, int32(copy_wr + 4 * (j * CHUNK_WORDS + 4 * THREADS * i)), x, copy_rd + at, 16)
                async_commit()

        while first < rows:
            for i in range(SUMS):
                sum_r[i] = ZERO
            if not STAGED:
                x_at = group_rd
            for turn in range(TURNS):
                keep_loop()
                next_turn = int32(turn + 1)
                if next_turn == TURNS:
                    next_turn = int32(0)
                    for j in range(ROW_TILES):
                        row_r[j] = min(int32(row + stride + 8 * j), int32(rows - 1))
                for d in range(AHEAD):
                    if STAGED and d % CHUNK == 0 and turn % TURNS_A_CHUNK == 0:
                        # This chunk has arrived, and nobody reads the one before it any more.
                        arrived()
                        cuda.syncthreads()
                        to = int32(copy_wr + 4 * free)
                        source = int32(copy_rd + chunk * CHUNK_WORDS)
                        for i in range(COPIES):
                            async_fill4(x_s, int32(to + 16 * THREADS * i), x, source + 4 * THREADS * i, 16)
                        async_commit()
                        x_at = now
                        chunk = int32(chunk + 1) if chunk + 1 < X_CHUNKS else int32(0)
                        free = now
                        now = int32(now + CHUNK_WORDS) if now < 2 * CHUNK_WORDS else int32(0)
                    u, half = d // LOAD_UNITS, d % LOAD_UNITS
                    for j in range(ROW_TILES):
                        w = (u * ROW_TILES + j) * 4
                        if INT8:
                            for i in range(2):
                                b_r[4 * j + 2 * i] = _bf16_pair(w_r[w + 2 * half + i], 0x4140)
                                b_r[4 * j + 2 * i + 1] = _bf16_pair(w_r[w + 2 * half + i], 0x4342)
                        else:
                            for i in range(4):
                                b_r[4 * j + i] = w_r[w + i]
                    for t in range(TILES):
                        at = x_at + (t * TILE_WORDS + lane * 4)
                        if STAGED:
                            h0, h1, h2, h3 = load4(x_s, at)
                            l0, l1, l2, l3 = load4(x_s, at + TERM_WORDS)
                            h4, h5, h6, h7 = load4(x_s, at + 2 * TERM_WORDS)
                            l4, l5, l6, l7 = load4(x_s, at + 3 * TERM_WORDS)
                        else:
                            h0, h1, h2, h3 = load4(x, at)
                            l0, l1, l2, l3 = load4(x, at + TERM_WORDS)
                            h4, h5, h6, h7 = load4(x, at + 2 * TERM_WORDS)
                            l4, l5, l6, l7 = load4(x, at + 3 * TERM_WORDS)
                        for j in range(ROW_TILES):
                            b, s = 4 * j, (j * TILES + t) * 4
                            c0, c1, c2, c3 = mma_bf16_terms(
                                h0, h1, h2, h3, l0, l1, l2, l3, h4, h5, h6, h7, l4, l5, l6, l7,
                                b_r[b], b_r[b + 1], b_r[b + 2], b_r[b + 3],
                                sum_r[s], sum_r[s + 1], sum_r[s + 2], sum_r[s + 3],
                            )  # fmt: skip
                            sum_r[s], sum_r[s + 1], sum_r[s + 2], sum_r[s + 3] = c0, c1, c2, c3
                    x_at = int32(x_at + UNIT_WORDS)
                    if half == LOAD_UNITS - 1:
                        word = int32(((next_turn * LOADS + u) * 4 + c) * 4)
                        if not EXACT:
                            word = min(word, int32(ROW_WORDS - 4))
                        for j in range(ROW_TILES):
                            w = (u * ROW_TILES + j) * 4
                            w_r[w], w_r[w + 1], w_r[w + 2], w_r[w + 3] = load(
                                weight, row_r[j] * int64(ROW_WORDS) + word
                            )
            for j in range(ROW_TILES):
                for i in range(2):
                    n = int32(row - g + (8 * j + 2 * c + i))
                    if n < rows:
                        factor = scale[n] if INT8 else float32(1)
                        for t in range(TILES):
                            for half in range(2):
                                token = int32((cuda.blockIdx.y * TILES + t) * TILE + half * 8 + g)
                                if token < tokens:
                                    value = sum_r[(j * TILES + t) * 4 + half * 2 + i]
                                    logits[int64(token) * rows + n] = mul_rn(value, factor) if INT8 else value
            first, row = int32(first + stride), int32(row + stride)
        if STAGED:
            all_arrived()

    return head_many


def make_head_rows(arch: int, K: int, int8: bool, threads: int = ROWS_THREADS) -> Callable[..., None]:
    """The kernel without tensor cores: a warp a row of the vocabulary, eight tokens (blockIdx.y) at a time."""
    load, wait, release = stream_load(arch), grid_wait(arch), grid_release(arch)
    INT8, WARPS = int8, threads // WARP
    PER_LOAD, PER_WORD = (16, 4) if int8 else (8, 2)
    ROW_WORDS = K // PER_WORD
    LOADS = -(-ROW_WORDS // (4 * WARP))
    COLUMN_WORDS = 2 * WARP * 4  # of x: eight tokens, a column for every lane
    ZERO = float32(0)

    def head_rows(weight, scale, x, logits, rows, tokens):
        sum_r = cuda.local.array(8, float32)
        w_r = cuda.local.array(4, int32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        stride = int32(cuda.gridDim.x * WARPS)
        row = int32(warp * cuda.gridDim.x + cuda.blockIdx.x)
        first = int32(cuda.blockIdx.y * ROWS_TILE)
        release()
        wait()
        while row < rows:
            for j in range(8):
                sum_r[j] = ZERO
            for u in range(LOADS):
                word = int32((u * WARP + lane) * 4)
                w_r[0], w_r[1], w_r[2], w_r[3] = int32(0), int32(0), int32(0), int32(0)
                if word < ROW_WORDS:
                    w_r[0], w_r[1], w_r[2], w_r[3] = load(weight, row * int64(ROW_WORDS) + word)
                x_rd = int64(cuda.blockIdx.y * LOADS + u) * (PER_LOAD * COLUMN_WORDS) + lane * 4
                for i in range(PER_LOAD):
                    word = w_r[i // PER_WORD]
                    if INT8:
                        bits = byte_permute(int32(word ^ SIGNS), BIAS, 0x7540 + i % 4)
                        w = float32(bits_to_float(bits) - OFFSET)
                    else:
                        w = bf16_low(word) if i % 2 == 0 else bf16_high(word)
                    for j in range(2):
                        x0, x1, x2, x3 = load4(x, x_rd + (2 * i + j) * (WARP * 4))
                        sum_r[4 * j] = float32(sum_r[4 * j] + w * bits_to_float(x0))
                        sum_r[4 * j + 1] = float32(sum_r[4 * j + 1] + w * bits_to_float(x1))
                        sum_r[4 * j + 2] = float32(sum_r[4 * j + 2] + w * bits_to_float(x2))
                        sum_r[4 * j + 3] = float32(sum_r[4 * j + 3] + w * bits_to_float(x3))
            for j in range(8):
                total = warp_sum(sum_r[j])
                if lane == 0 and first + j < tokens:
                    logits[int64(first + j) * rows + row] = mul_rn(total, scale[row]) if INT8 else total
            row = int32(row + stride)

    return head_rows


_P = types.CPointer


def norm_split_form(arch: int, K: int, int8: bool, threads: int = NORM_THREADS, plain: bool = False) -> KernelForm:
    """The compiled form; `threads` only for tests. Raises ValueError unless K is a multiple of 32."""
    check_columns(K)
    f32, i32 = types.float32, types.int32
    kind = "plain" if plain else "int8" if int8 else "bf16"
    name = f"norm_{'split' if arch >= TENSOR_CORES else 'rows'}[{K}, {kind}, {threads}]"
    signature = (_P(f32), _P(f32), f32, _P(i32), i32, i32)
    return KernelForm(name, make_norm_split(arch, K, int8, threads, plain), signature, threads)


def head_many_form(
    arch: int,
    K: int,
    int8: bool,
    tiles: int,
    threads: int = 0,
    row_tiles: int = 0,
    chunk_units: int = -1,
    ahead: int = 0,
) -> KernelForm:
    """The compiled form; what follows `tiles` is for tests and measurements (this module's choice without).

    Raises ValueError unless K is a multiple of 32.
    """
    check_columns(K)
    kind = "int8" if int8 else "bf16"
    f32, i32 = types.float32, types.int32
    signature = (_P(i32), _P(f32) if int8 else types.none, _P(i32), _P(f32), i32, i32)
    if arch < TENSOR_CORES:
        threads = threads or ROWS_THREADS
        kernel = make_head_rows(arch, K, int8, threads)
        return KernelForm(f"head_rows[{K}, {kind}, {threads}]", kernel, signature, threads, wide_loads=1)
    by_l1 = tiles == 1 and K <= BY_L1
    threads, row_tiles = threads or (512 if by_l1 else 256), row_tiles or (2 if by_l1 else 4)
    if chunk_units < 0:
        chunk_units = 0 if by_l1 else min(UNITS_OF, CHUNK_BYTES // (tiles * TILE_WORDS * 4))
    ahead = ahead or (2 if tiles == TILES[-1] else 4)  # as registers allow
    kernel = make_head_many(arch, K, int8, tiles, threads, row_tiles, chunk_units, ahead)
    name = f"head_many[{K}, {kind}, {tiles}, {threads}, {row_tiles}, {chunk_units}, {ahead}]"
    return KernelForm(name, kernel, signature, threads, wide_loads=2, carveout=L1_CARVEOUT)


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
    overlap: bool = True,
) -> Launch:
    """The launch that prepares x for `head_many`: normed activations as two terms, in the order that it reads.

    h float32 [tokens, K]; norm float32 [K]; x int32 [split_words(tokens, K)]; `int8`: whether the head's rows are int8.
    Raises ValueError with the sizes if they do not fit together.
    """
    sizes = {"h": (h, tokens * K), "norm": (norm, K), "x": (x, split_words(tokens, K))}
    check_sizes("norm_split", tokens, sizes)
    form = norm_split_form(device.arch, K, int8)
    return Launch(
        form, padded_tokens(device.arch, tokens), (h, norm, eps, x, tokens, tiles_of(tokens)), device, overlap
    )


def head_many(
    device: Device,
    weight: DeviceArray,
    scale: DeviceArray | None,
    x: DeviceArray,
    logits: DeviceArray,
    rows: int,
    tokens: int,
    K: int,
    overlap: bool = True,
) -> Launch:
    """The launch that scores every token of the vocabulary for `tokens` rows of activations.

    weight uint16 (bfloat16 bits) or int8 [rows, K]; scale float32 [rows] for int8 rows, else None; x int32 from
    `norm_split` for as many tokens; logits float32 [tokens, rows]. Raises ValueError with the sizes if they do not fit.
    """
    int8 = weight.dtype == np.int8
    if int8 == (scale is None):
        raise ValueError(f"head_many: {weight.dtype} rows {'need' if int8 else 'take no'} scales")
    sizes = {"weight": (weight, rows * K), "x": (x, split_words(tokens, K)), "logits": (logits, tokens * rows)}
    check_sizes("head_many", tokens, sizes)
    form = head_many_form(device.arch, K, int8, tiles_of(tokens))
    arguments = (weight, scale, x, logits, rows, tokens)
    return Launch(form, head_many_grid(device.arch, device.multiprocessors, tokens), arguments, device, overlap)


def head_many_grid(arch: int, multiprocessors: int, tokens: int) -> tuple[int, int]:
    """Blocks of a launch: for the rows of the vocabulary, and for groups of tokens."""
    if arch < TENSOR_CORES:
        return 4 * multiprocessors, -(-tokens // ROWS_TILE)
    return multiprocessors, -(-tokens // (TILE * tiles_of(tokens)))


def check_sizes(what: str, tokens: int, sizes: dict[str, tuple[DeviceArray, int]]) -> None:
    if tokens < 1:
        raise ValueError(f"{what}: {tokens} tokens; at least one is needed")
    for name, (array, size) in sizes.items():
        if array.size < size:
            raise ValueError(f"{what}: {name} holds {array.size} elements, {size} are needed")


def forms(arch: int) -> list[KernelForm]:
    """Forms of 2B4T's rows for every number of tokens, and of rows that are padded."""
    kinds = (False, True)
    tiles = TILES if arch >= TENSOR_CORES else TILES[:1]
    many = [head_many_form(arch, 2560, int8, t) for t in tiles for int8 in kinds]
    padded = [head_many_form(arch, 2080, int8, tiles[-1]) for int8 in kinds]
    return [*many, *(norm_split_form(arch, K, int8) for K in (2560, 2080) for int8 in kinds), *padded]
