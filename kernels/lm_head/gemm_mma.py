"""The LM head of many tokens by `mma.m16n8k16`: x in layout "mma" of `split_norm`, which defines unit, tile and lane.

    logits[m, n] = sum_k x[m, k] * w[n, k]   (* scale[n] for int8 rows)       two bfloat16 terms of x, float32 sums

The table is what there is to read, so it takes the shortest way: the registers of a lane's 16-byte load of a row are
the 8-column operand of the instructions. int8 is made bfloat16 first, exactly. float16 and float32 become two terms,
too (float16 exactly, float32 with a relative error of 2^-17), and of the four products of terms, that of the low ones
is left out. Instructions for float16 would take such rows as they are; but x may be out of range. Tokens are the 16
rows.

    block (b, y)   group y of tokens; tiles of 8 rows of the table, ROW_TILES to a warp, then those `grid` further on
    lane 4 g + c   row g of each of its warp's tiles; logits of tokens g and g + 8 of each tile of tokens and of rows
                   2 c and 2 c + 1
    k_iter         DEPTH units of K; a unit's registers are loaded again, for the next k_iter, once it is multiplied
    chunk          CHUNK units of x for all of the block's tokens. Three buffers in shared memory: one is multiplied,
                   the next has been asked for, the third is being asked for (`cp.async`), round and round K

        buffers    | chunk i  |  chunk i + 1  |  chunk i + 2  |
                    x_rd        arriving        free: copies go here

    Without chunks (one tile of tokens, few columns) x comes from L1 instead, so that warps never meet.

A logit has the same bits for every number of tokens: no sum is split, and all of K is added in the same order.

Rows as the 16-row operand would halve the work for 8 tokens; but that operand's registers alternate between two rows,
and each load would have to be copied.
"""

from collections.abc import Callable
from functools import cache

from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.lm_head.parts import HIGH_PAIR, LOW_PAIR, WORD_COLUMNS, check_columns, int8_pair_to_bf16, put4
from bitnet_numba.kernels.lm_head.split_norm import (
    GROUP_TOKENS,
    HALF_WORDS,
    TILE_TOKENS,
    TILE_WORDS,
    UNIT,
    UNIT_MULTIPLE,
    group_tokens,
    padded_columns,
    padded_tokens,
    x_words,
)
from bitnet_numba.kernels.operands import RowDtype
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32, int64
from bitnet_numba.kernels.runtime.spec import KernelSpec, sm_memory

MIN_ARCH = 80  # the first architecture with this instruction
TOKEN_TILES = tuple(tokens // TILE_TOKENS for tokens in GROUP_TOKENS["mma"])  # of a group
MAX_TOKEN_TILES = TOKEN_TILES[-1]
CHUNK_BYTES = 16384  # three buffers of this size fill the 48 KB of static shared memory
BUFFERS = 3
SHARED_BYTES = 64 * 1024  # of an SM: the buffers fit, L1 has the rest
ROWS_BYTES = 32 * 1024  # of L1, for the rows that stream through; in the rest x of 16 tokens stays, if it fits


def make_lm_head_mma(
    arch: int, K: int, dtype: RowDtype, token_tiles: int, threads: int, row_tiles: int, chunk_units: int, depth: int
) -> Callable[..., None]:
    """The kernel for groups of `token_tiles` tiles of 16 tokens.

    row_tiles: tiles of 8 rows of a warp; chunk_units: units of a chunk, or 0 to read x by L1; depth: units of a k_iter.
    """
    load, wait, trigger = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    THREADS, WARPS, TOKEN_TILES, ROW_TILES = threads, threads // WARP, token_tiles, row_tiles
    INT8, F16, F32 = dtype == "int8", dtype == "f16", dtype == "f32"
    SPLIT = F16 or F32  # rows are two terms
    DEPTH = depth
    LOAD_UNITS, UNIT_LOADS = 2 if INT8 else 1, 2 if F32 else 1
    LOADS = DEPTH * UNIT_LOADS // LOAD_UNITS
    ROW_WORDS = K // WORD_COLUMNS[dtype]
    UNITS = padded_columns("mma", K, dtype) // UNIT
    K_ITERS = UNITS // DEPTH
    EXACT = UNITS * UNIT == K
    W_REGS, B_REGS, SUMS = LOADS * row_tiles * 4, 4 * row_tiles, row_tiles * token_tiles * 4
    LOW_REGS = B_REGS if SPLIT else 1
    BLOCK_ROWS = WARPS * row_tiles * 8
    UNIT_WORDS = token_tiles * TILE_WORDS
    CHUNKED, CHUNK = chunk_units > 0, max(chunk_units, 1)
    CHUNK_WORDS = CHUNK * UNIT_WORDS
    X_WORDS = BUFFERS * CHUNK_WORDS if chunk_units else 4
    CHUNKS = UNITS // CHUNK
    GROUP_WORDS = UNITS * UNIT_WORDS
    COPIES = CHUNK_WORDS // (4 * threads)  # of 16 bytes, of a thread and a chunk
    assert not chunk_units or CHUNK_WORDS % (4 * threads) == 0
    CHUNK_K_ITERS = max(1, CHUNK // DEPTH)
    wait_all_but_latest, wait_all = ptx.cp_async_wait(1), ptx.cp_async_wait(0)
    ZERO = float32(0)

    @device_function
    def copy_chunk(x_s, wr, x, rd):
        """Starts this thread's copies of a chunk, from word rd of x to byte wr of shared memory."""
        for i in range(COPIES):
            ptx.cp_async_16_at(x_s, int32(wr + 16 * THREADS * i), x, rd + 4 * THREADS * i, 16)
        ptx.cp_async_commit()

    @device_function
    def row_operand(b_r, low_r, w_r, u, half):
        """The lane's columns of a unit, as bfloat16 terms: load u, of int8 loads its first or second half, of float32
        the next load, too."""
        for j in range(ROW_TILES):
            w = (u * ROW_TILES + j) * 4
            if F32:
                for i in range(4):
                    rd = w + (i // 2 * ROW_TILES * 4 + i % 2 * 2)
                    v, v2 = ptx.bits_to_float(w_r[rd]), ptx.bits_to_float(w_r[rd + 1])
                    b_r[4 * j + i], low_r[4 * j + i] = ptx.split_bf16x2(v, v2)
            elif F16:
                for i in range(4):
                    v, v2 = ptx.f16_low(w_r[w + i]), ptx.f16_high(w_r[w + i])
                    b_r[4 * j + i], low_r[4 * j + i] = ptx.split_bf16x2(v, v2)
            elif INT8:
                for i in range(2):
                    b_r[4 * j + 2 * i] = int8_pair_to_bf16(w_r[w + 2 * half + i], LOW_PAIR)
                    b_r[4 * j + 2 * i + 1] = int8_pair_to_bf16(w_r[w + 2 * half + i], HIGH_PAIR)
            else:
                for i in range(4):
                    b_r[4 * j + i] = w_r[w + i]

    def lm_head_mma(weight, scale, x, logits, num_rows, num_tokens):
        x_s = ptx.pointer(cuda.shared.array(X_WORDS, int32, SHARED_ALIGN))
        w_r = cuda.local.array(W_REGS, int32)  # [LOADS, ROW_TILES, 4]
        b_r = cuda.local.array(B_REGS, int32)  # [ROW_TILES, 4]: the unit that is multiplied, two columns a word
        low_r = cuda.local.array(LOW_REGS, int32)  # its low terms
        sum_r = cuda.local.array(SUMS, float32)  # [ROW_TILES, TOKEN_TILES, 4]
        row_r = cuda.local.array(ROW_TILES, int32)  # the lane's rows
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        g, c = int32(lane // 4), int32(lane % 4)
        stride = int32(cuda.gridDim.x * BLOCK_ROWS)
        first = int32(cuda.blockIdx.x * BLOCK_ROWS)
        row = int32(first + warp * (ROW_TILES * 8) + g)

        # 1. The first rows, while the launches before this one still run. Rows beyond the last are read as the last.
        for j in range(ROW_TILES):
            row_r[j] = min(int32(row + 8 * j), int32(num_rows - 1))
        for u in range(LOADS):
            word = int32(min(int32((u * 4 + c) * 4), int32(ROW_WORDS - 4)))
            for j in range(ROW_TILES):
                put4(w_r, (u * ROW_TILES + j) * 4, load(weight, row_r[j] * int64(ROW_WORDS) + word))
        trigger()
        wait()

        # 2. The first two chunks. Buffers are counted in words of x_s, copy_wr in bytes of shared memory.
        group_rd = int32(cuda.blockIdx.y * GROUP_WORDS)
        x_rd = int32(0)
        buffer, free_buffer, next_chunk = int32(0), int32(2 * CHUNK_WORDS), int32(2 % CHUNKS)
        copy_wr, copy_rd = int32(0), int32(group_rd + 4 * tid)  # of this thread's first copy
        if CHUNKED:
            copy_wr = ptx.shared_address(x_s, 4 * tid)
            for j in range(2):
                for i in range(COPIES):
                    rd = int32(j % CHUNKS * CHUNK_WORDS + 4 * THREADS * i)
                    wr = int32(copy_wr + 4 * (j * CHUNK_WORDS + 4 * THREADS * i))
                    ptx.cp_async_16_at(x_s, wr, x, copy_rd + rd, 16)
                ptx.cp_async_commit()

        while first < num_rows:
            # 3. Products.
            for i in range(SUMS):
                sum_r[i] = ZERO
            if not CHUNKED:
                x_rd = group_rd
            for k_iter in range(K_ITERS):
                ptx.no_unroll()
                next_k_iter = int32(k_iter + 1)
                if next_k_iter == K_ITERS:
                    next_k_iter = int32(0)
                    for j in range(ROW_TILES):
                        row_r[j] = min(int32(row + stride + 8 * j), int32(num_rows - 1))
                for d in range(DEPTH):
                    if CHUNKED and d % CHUNK == 0 and k_iter % CHUNK_K_ITERS == 0:
                        # This chunk has arrived, and no warp reads the one before it any more.
                        wait_all_but_latest()
                        cuda.syncthreads()
                        wr = int32(copy_wr + 4 * free_buffer)
                        rd = int32(copy_rd + next_chunk * CHUNK_WORDS)
                        copy_chunk(x_s, wr, x, rd)
                        x_rd = buffer
                        next_chunk = int32(next_chunk + 1) if next_chunk + 1 < CHUNKS else int32(0)
                        free_buffer = buffer
                        buffer = int32(buffer + CHUNK_WORDS) if buffer < 2 * CHUNK_WORDS else int32(0)
                    u, half = d * UNIT_LOADS // LOAD_UNITS, d % LOAD_UNITS
                    row_operand(b_r, low_r, w_r, u, half)
                    for t in range(TOKEN_TILES):
                        rd = x_rd + (t * TILE_WORDS + lane * 4)
                        if CHUNKED:
                            h0, h1, h2, h3 = ptx.load4(x_s, rd)
                            l0, l1, l2, l3 = ptx.load4(x_s, rd + HALF_WORDS)
                            h4, h5, h6, h7 = ptx.load4(x_s, rd + 2 * HALF_WORDS)
                            l4, l5, l6, l7 = ptx.load4(x_s, rd + 3 * HALF_WORDS)
                        else:
                            h0, h1, h2, h3 = ptx.load4(x, rd)
                            l0, l1, l2, l3 = ptx.load4(x, rd + HALF_WORDS)
                            h4, h5, h6, h7 = ptx.load4(x, rd + 2 * HALF_WORDS)
                            l4, l5, l6, l7 = ptx.load4(x, rd + 3 * HALF_WORDS)
                        for j in range(ROW_TILES):
                            b, s = 4 * j, (j * TOKEN_TILES + t) * 4
                            if SPLIT:
                                sums = ptx.mma_bf16_split_both(
                                    h0, h1, h2, h3, l0, l1, l2, l3, h4, h5, h6, h7, l4, l5, l6, l7,
                                    b_r[b], b_r[b + 1], b_r[b + 2], b_r[b + 3],
                                    low_r[b], low_r[b + 1], low_r[b + 2], low_r[b + 3],
                                    sum_r[s], sum_r[s + 1], sum_r[s + 2], sum_r[s + 3],
                                )  # fmt: skip
                            else:
                                sums = ptx.mma_bf16_split(
                                    h0, h1, h2, h3, l0, l1, l2, l3, h4, h5, h6, h7, l4, l5, l6, l7,
                                    b_r[b], b_r[b + 1], b_r[b + 2], b_r[b + 3],
                                    sum_r[s], sum_r[s + 1], sum_r[s + 2], sum_r[s + 3],
                                )  # fmt: skip
                            put4(sum_r, s, sums)
                    x_rd = int32(x_rd + UNIT_WORDS)
                    for i in range(UNIT_LOADS if half == LOAD_UNITS - 1 else 0):
                        word = int32(((next_k_iter * LOADS + (u + i)) * 4 + c) * 4)
                        if not EXACT:
                            word = min(word, int32(ROW_WORDS - 4))
                        for j in range(ROW_TILES):
                            wr = ((u + i) * ROW_TILES + j) * 4
                            put4(w_r, wr, load(weight, row_r[j] * int64(ROW_WORDS) + word))

            # 4. Output.
            for j in range(ROW_TILES):
                for i in range(2):
                    n = int32(row - g + (8 * j + 2 * c + i))
                    if n < num_rows:
                        factor = scale[n] if INT8 else float32(1)
                        for t in range(TOKEN_TILES):
                            for half in range(2):
                                token = int32((cuda.blockIdx.y * TOKEN_TILES + t) * TILE_TOKENS + half * 8 + g)
                                if token < num_tokens:
                                    value = sum_r[(j * TOKEN_TILES + t) * 4 + half * 2 + i]
                                    logits[int64(token) * num_rows + n] = ptx.mul_rn(value, factor) if INT8 else value
            first, row = int32(first + stride), int32(row + stride)
        if CHUNKED:
            wait_all()

    return lm_head_mma


@cache
def spec(
    arch: int,
    K: int,
    dtype: RowDtype,
    token_tiles: int,
    threads: int = 0,
    row_tiles: int = 0,
    chunk_units: int = -1,
    depth: int = 0,
) -> KernelSpec:
    """The variant for rows of K columns and groups of `token_tiles` (of TOKEN_TILES) tiles of 16 tokens.

    What follows is given in tests and measurements only. Raises ValueError unless K is a multiple of 32. Arguments of a
    launch: as of `gemm_simt.spec`.
    """
    check_columns(K)
    l1 = sm_memory(arch).l1
    from_l1 = token_tiles == 1 and x_words("mma", TILE_TOKENS, K, dtype) * 4 <= l1 - SHARED_BYTES - ROWS_BYTES
    most, split = token_tiles == MAX_TOKEN_TILES, dtype in ("f16", "f32")
    threads = threads or (512 if from_l1 else 256)
    row_tiles = row_tiles or (2 if from_l1 or (most and split) else 4)  # as registers allow
    if chunk_units < 0:
        chunk_units = 0 if from_l1 else min(UNIT_MULTIPLE, CHUNK_BYTES // (token_tiles * TILE_WORDS * 4))
    depth = depth or (2 if most or (split and not from_l1) else 4)
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    signature = (i32, f32 if dtype == "int8" else types.none, i32, f32, types.int32, types.int32)
    kernel = make_lm_head_mma(arch, K, dtype, token_tiles, threads, row_tiles, chunk_units, depth)
    name = f"lm_head_mma[{K}, {dtype}, {token_tiles}, {threads}, {row_tiles}, {chunk_units}, {depth}]"
    return KernelSpec(name, kernel, signature, threads, wide_loads=2, carveout=-(-100 * SHARED_BYTES // l1))


def token_tiles(num_tokens: int) -> int:
    """Tiles of 16 tokens in each group of a launch for so many tokens."""
    return group_tokens("mma", num_tokens) // TILE_TOKENS


def grid(num_sms: int, num_tokens: int) -> tuple[int, int]:
    """Blocks of a launch: for rows of the table, and for groups of tokens."""
    return num_sms, padded_tokens("mma", num_tokens) // group_tokens("mma", num_tokens)
