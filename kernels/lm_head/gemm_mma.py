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

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.lm_head.gemm_simt import ROWS_THREADS, make_head_rows
from bitnet_numba.kernels.lm_head.split_norm import (
    ROWS_TILE,
    TENSOR_CORES,
    TERM_WORDS,
    TILE,
    TILE_WORDS,
    TILES,
    UNIT,
    UNITS_OF,
    _bf16_pair,
    _units,
    check_columns,
    check_sizes,
    split_words,
    tiles_of,
)
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, float32, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec

CHUNK_BYTES = 16384  # of x in shared memory; three chunks fill the 48 KB
CHUNKS = 3
L1_CARVEOUT = 25  # percent of L1 and shared memory together: 64 KB are enough
BY_L1 = 2560  # columns up to which x of 16 tokens, 160 KB, stays in L1 beside what streams through


def make_head_many(
    arch: int, K: int, int8: bool, tiles: int, threads: int, row_tiles: int, chunk_units: int, ahead: int
) -> Callable[..., None]:
    """The kernel for `tiles` tiles of tokens (a group); `chunk_units`: units of a chunk of x, or 0 to read it by L1."""
    load, wait, release = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
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
    arrived, all_arrived = ptx.cp_async_wait(1), ptx.cp_async_wait(0)
    ZERO = float32(0)

    def head_many(weight, scale, x, logits, rows, tokens):
        x_s = ptx.pointer(cuda.shared.array(X_WORDS, int32, SHARED_ALIGN))
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
            copy_wr = ptx.shared_address(x_s, 4 * tid)
            for j in range(2):
                for i in range(COPIES):
                    at = int32(j % X_CHUNKS * CHUNK_WORDS + 4 * THREADS * i)
                    ptx.cp_async_16_at(
                        x_s, int32(copy_wr + 4 * (j * CHUNK_WORDS + 4 * THREADS * i)), x, copy_rd + at, 16
                    )
                ptx.cp_async_commit()

        while first < rows:
            for i in range(SUMS):
                sum_r[i] = ZERO
            if not STAGED:
                x_at = group_rd
            for turn in range(TURNS):
                ptx.no_unroll()
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
                            ptx.cp_async_16_at(x_s, int32(to + 16 * THREADS * i), x, source + 4 * THREADS * i, 16)
                        ptx.cp_async_commit()
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
                            h0, h1, h2, h3 = ptx.load4(x_s, at)
                            l0, l1, l2, l3 = ptx.load4(x_s, at + TERM_WORDS)
                            h4, h5, h6, h7 = ptx.load4(x_s, at + 2 * TERM_WORDS)
                            l4, l5, l6, l7 = ptx.load4(x_s, at + 3 * TERM_WORDS)
                        else:
                            h0, h1, h2, h3 = ptx.load4(x, at)
                            l0, l1, l2, l3 = ptx.load4(x, at + TERM_WORDS)
                            h4, h5, h6, h7 = ptx.load4(x, at + 2 * TERM_WORDS)
                            l4, l5, l6, l7 = ptx.load4(x, at + 3 * TERM_WORDS)
                        for j in range(ROW_TILES):
                            b, s = 4 * j, (j * TILES + t) * 4
                            c0, c1, c2, c3 = ptx.mma_bf16_split(
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
                                    logits[int64(token) * rows + n] = ptx.mul_rn(value, factor) if INT8 else value
            first, row = int32(first + stride), int32(row + stride)
        if STAGED:
            all_arrived()

    return head_many


_P = types.CPointer


def head_many_spec(
    arch: int,
    K: int,
    int8: bool,
    tiles: int,
    threads: int = 0,
    row_tiles: int = 0,
    chunk_units: int = -1,
    ahead: int = 0,
) -> KernelSpec:
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
        return KernelSpec(f"head_rows[{K}, {kind}, {threads}]", kernel, signature, threads, wide_loads=1)
    by_l1 = tiles == 1 and K <= BY_L1
    threads, row_tiles = threads or (512 if by_l1 else 256), row_tiles or (2 if by_l1 else 4)
    if chunk_units < 0:
        chunk_units = 0 if by_l1 else min(UNITS_OF, CHUNK_BYTES // (tiles * TILE_WORDS * 4))
    ahead = ahead or (2 if tiles == TILES[-1] else 4)  # as registers allow
    kernel = make_head_many(arch, K, int8, tiles, threads, row_tiles, chunk_units, ahead)
    name = f"head_many[{K}, {kind}, {tiles}, {threads}, {row_tiles}, {chunk_units}, {ahead}]"
    return KernelSpec(name, kernel, signature, threads, wide_loads=2, carveout=L1_CARVEOUT)


def head_many(
    device: Device,
    weight: DeviceArray,
    scale: DeviceArray | None,
    x: DeviceArray,
    logits: DeviceArray,
    rows: int,
    tokens: int,
    K: int,
    use_pdl: bool = True,
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
    spec = head_many_spec(device.arch, K, int8, tiles_of(tokens))
    arguments = (weight, scale, x, logits, rows, tokens)
    return device.launch(spec, head_many_grid(device.arch, device.num_sms, tokens), arguments, use_pdl)


def head_many_grid(arch: int, num_sms: int, tokens: int) -> tuple[int, int]:
    """Blocks of a launch: for the rows of the vocabulary, and for groups of tokens."""
    if arch < TENSOR_CORES:
        return 4 * num_sms, -(-tokens // ROWS_TILE)
    return num_sms, -(-tokens // (TILE * tiles_of(tokens)))
