"""Attention of tokens of any sequences in float32 multiply-adds: for every architecture and head size.

It serves where tensor cores for 16-bit numbers are missing (below sm_80), and what the other kernels do not take. A
pass's tokens may belong to any slots, at any positions; each attends to positions 0 .. its own of its slot, which are
in the cache already (see `kv_cache`).

    grid      x: tokens      y: key-value heads (times the parts of a group's query heads)
    block     a token and up to four query heads that share a key-value head; keys and values are read once for them

    +- warp 0 ------------------+- warp 1 ---+- ...        a lane group (LANES lanes) holds one token, a lane 8 of
    | lanes 0-15  | lanes 16-31 |            |             its dimensions (head_dim 128: 16 lanes); UNROLL tokens at a
    | token 0, G  | token 1,    | token 2,   |             time
    | 2G, ..      | G + 1, ..   | ...        |             G = lane groups of a block
    +---------------------------+------------+

Lane group i keeps a running maximum, a sum of weights and weighted values of tokens i, i + G, i + 2G, ...; the groups
meet in shared memory, in order. So a token's result depends on its slot and position alone, to the bit. One block walks
over a whole context, so few tokens with long contexts leave most SMs idle.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.kv_cache import (
    PAGE,
    PAGE_BITS,
    PASS_SIGNATURE,
    LayerCache,
    pass_arguments,
    token_words,
)
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype, lane_functions
from bitnet_numba.kernels.attention.parts import (
    LANE_DIMS,
    LOWEST,
    HeadShape,
    RopeTables,
    check_head,
    finite_or_inf,
    heads_per_block,
    load4_into,
    make_rotated_query,
    padded_head_dim,
    power_of_two,
)
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, float32, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec

THREADS = 256
UNROLL = (
    2  # tokens that a lane group takes at a time, so that their loads overlap; the softmax below is written for two
)


def make_paged_simt(
    arch: int, head_dim: int, group: int, heads: int, threads: int, dtype: KVDtype
) -> Callable[..., None]:
    """The kernel for a head size and `group` query heads a key-value head, of which a block serves `heads`."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    LANE_WORDS, load_lane, number = lane_functions(dtype)
    SCALED = dtype == "float8"
    rotated = make_rotated_query(head_dim)
    D, DP, HALF = head_dim, padded_head_dim(head_dim), head_dim // 2
    WORDS, HEADS, HEAD_BLOCKS = token_words(D, dtype), heads, group // heads
    CHUNKS = DP // LANE_DIMS  # lanes of a group that hold dimensions
    LANES = power_of_two(CHUNKS)
    LANE_STEPS, LANE_GROUPS = LANES.bit_length() - 1, threads // LANES
    Q_FLOATS, HEAD_REGS, SCORES, TOKEN_REGS = HEADS * DP, HEADS * LANE_DIMS, UNROLL * HEADS, UNROLL * LANE_WORDS
    ACC_FLOATS, STATS = LANE_GROUPS * HEADS * DP, LANE_GROUPS * HEADS
    QUERIES, ITEMS, STRIDE = np.int32(HEADS * DP), np.int32(HEADS * D), np.int32(threads)  # int32 bounds: int32 loops
    TILE = np.int32(UNROLL * LANE_GROUPS)
    ZERO = float32(0)

    def paged_attention_simt(
        qkv, cos, sin, slot_positions, block_table, block_table_stride, keys, values, page_words, head_words, out,
        num_kv_heads,
    ):  # fmt: skip
        q_s = ptx.pointer(cuda.shared.array(Q_FLOATS, float32, SHARED_ALIGN))  # [HEADS, DP] rotated and scaled
        acc_s = ptx.pointer(cuda.shared.array(ACC_FLOATS, float32, SHARED_ALIGN))  # [LANE_GROUPS, HEADS, DP]
        max_s = ptx.pointer(cuda.shared.array(STATS, float32))  # [LANE_GROUPS, HEADS]
        sum_s = ptx.pointer(cuda.shared.array(STATS, float32))
        q_r = cuda.local.array(HEAD_REGS, float32)
        acc_r = cuda.local.array(HEAD_REGS, float32)
        max_r = cuda.local.array(HEADS, float32)
        sum_r = cuda.local.array(HEADS, float32)
        k_r = cuda.local.array(TOKEN_REGS, int32)
        v_r = cuda.local.array(TOKEN_REGS, int32)
        k_scale_r = cuda.local.array(UNROLL, float32)
        v_scale_r = cuda.local.array(UNROLL, float32)
        s_r = cuda.local.array(SCORES, float32)

        release()
        tid = int32(cuda.threadIdx.x)
        lane_group, lane = int32(tid // LANES), int32(tid % LANES)
        token, head_block = int32(cuda.blockIdx.x), int32(cuda.blockIdx.y)
        kv = head_block if HEAD_BLOCKS == 1 else ptx.udiv(head_block, int32(HEAD_BLOCKS))
        first_head = int32(head_block * HEADS)
        num_heads = int32(num_kv_heads * (HEAD_BLOCKS * HEADS))
        wait()
        slot, position = int32(slot_positions[int32(2 * token)]), int32(slot_positions[int32(2 * token + 1)])
        if slot < 0:
            return
        context = int32(position + 1)  # tokens

        # Queries: rotated into shared memory, then each lane's dimensions into its registers.
        q_rd = int64(token) * int32((num_heads + 2 * num_kv_heads) * D) + int32(first_head * D)
        angle = int64(position) * HALF
        for i in range(tid, QUERIES, STRIDE):
            h = ptx.udiv(i, int32(DP))
            q_s[i] = rotated(qkv, cos, sin, q_rd + h * D, angle, int32(i - h * DP))
        cuda.syncthreads()
        has_dims = lane < CHUNKS
        for h in range(HEADS):
            for j in range(0, LANE_DIMS, 4):
                i = h * LANE_DIMS + j
                q_r[i] = q_r[i + 1] = q_r[i + 2] = q_r[i + 3] = ZERO
                if has_dims:
                    load4_into(q_r, i, q_s, h * DP + lane * LANE_DIMS + j)
        for i in range(HEAD_REGS):
            acc_r[i] = ZERO
        for h in range(HEADS):
            max_r[h], sum_r[h] = LOWEST, ZERO

        pages = int64(slot) * block_table_stride
        head_rd = int64(kv) * head_words + lane * LANE_WORDS
        for tile in range(int32(0), context, TILE):
            for n in range(UNROLL):
                t = int32(tile + n * LANE_GROUPS + lane_group)
                for j in range(LANE_WORDS):
                    k_r[LANE_WORDS * n + j] = v_r[LANE_WORDS * n + j] = int32(0)
                k_scale_r[n] = v_scale_r[n] = ZERO
                if t < context:
                    page_rd = int64(block_table[pages + (t >> PAGE_BITS)]) * page_words
                    if has_dims:
                        rd = page_rd + head_rd + int32((t & (PAGE - 1)) * WORDS)
                        load_lane(k_r, LANE_WORDS * n, keys, rd)
                        load_lane(v_r, LANE_WORDS * n, values, rd)
                    if SCALED:
                        rd = page_rd + int64(kv) * head_words + int32(PAGE * WORDS + (t & (PAGE - 1)))
                        k_scale_r[n] = ptx.bits_to_float(uint32(keys[rd]))
                        v_scale_r[n] = ptx.bits_to_float(uint32(values[rd]))
            for n in range(UNROLL):
                for h in range(HEADS):
                    score = ZERO
                    for j in range(LANE_DIMS):
                        score += number(k_r, LANE_WORDS * n, j) * q_r[h * LANE_DIMS + j]
                    for step in range(LANE_STEPS):
                        score += ptx.shuffle_xor(score, 1 << step)
                    if SCALED:
                        score *= k_scale_r[n]
                    s_r[n * HEADS + h] = score if tile + n * LANE_GROUPS + lane_group < context else LOWEST
            for h in range(HEADS):
                before, score0, score1 = max_r[h], s_r[h], s_r[HEADS + h]
                row_max = max(before, max(score0, score1))
                alpha = ptx.exp2_approx(before - row_max)
                weight0, weight1 = ptx.exp2_approx(score0 - row_max), ptx.exp2_approx(score1 - row_max)
                max_r[h], sum_r[h] = row_max, sum_r[h] * alpha + (weight0 + weight1)
                for j in range(LANE_DIMS):
                    acc_r[h * LANE_DIMS + j] *= alpha
                if SCALED:
                    weight0, weight1 = weight0 * v_scale_r[0], weight1 * v_scale_r[1]
                for j in range(LANE_DIMS):
                    value0, value1 = number(v_r, 0, j), number(v_r, LANE_WORDS, j)
                    acc_r[h * LANE_DIMS + j] += weight0 * value0 + weight1 * value1

        # The lane groups meet; one without tokens has the lowest maximum, and so no weight.
        for h in range(HEADS):
            if has_dims:
                i = h * LANE_DIMS
                wr = (lane_group * HEADS + h) * DP + lane * LANE_DIMS
                ptx.store4(acc_s, wr, acc_r[i], acc_r[i + 1], acc_r[i + 2], acc_r[i + 3])
                ptx.store4(acc_s, wr + 4, acc_r[i + 4], acc_r[i + 5], acc_r[i + 6], acc_r[i + 7])
            if lane == 0:
                max_s[lane_group * HEADS + h], sum_s[lane_group * HEADS + h] = max_r[h], sum_r[h]
        cuda.syncthreads()
        for i in range(tid, ITEMS, STRIDE):
            h = ptx.udiv(i, int32(D))
            d = int32(i - h * D)
            largest = LOWEST
            for t in range(LANE_GROUPS):
                largest = max(largest, max_s[t * HEADS + h])
            x = weights = ZERO
            for t in range(LANE_GROUPS):
                weight = ptx.exp2_approx(max_s[t * HEADS + h] - largest)
                weights += weight * sum_s[t * HEADS + h]
                x += weight * acc_s[(t * HEADS + h) * DP + d]
            out[int64(token) * int32(num_heads * D) + int32(first_head * D + i)] = finite_or_inf(ptx.div_rn(x, weights))

    return paged_attention_simt


@cache
def paged_simt_spec(
    arch: int, head_dim: int, group: int, dtype: KVDtype = DEFAULT, threads: int = THREADS
) -> KernelSpec:
    """The variant for a head size, a number of query heads per key-value head and a type of the cache.

    `threads` a block: other than THREADS only in tests. Raises ValueError for a head size that is odd or over
    MAX_HEAD_DIM.
    """
    check_head("paged_attention_simt", head_dim, group)
    heads = heads_per_block(group)
    kernel = make_paged_simt(arch, head_dim, group, heads, threads, dtype)
    name = f"paged_attention_simt[{head_dim}, {group}, {dtype}, {heads}, {threads}]"
    signature = (*PASS_SIGNATURE, types.CPointer(types.float32), types.int32)
    return KernelSpec(name, kernel, signature, threads, wide_loads=lane_functions(dtype).words // 4 * 2 * UNROLL)


def paged_simt_grid(num_tokens: int, num_kv_heads: int, group: int) -> tuple[int, int]:
    """Blocks of a launch for `num_tokens` tokens."""
    return num_tokens, num_kv_heads * (group // heads_per_block(group))


def paged_attention_simt(
    device: Device,
    qkv: Any,
    rope: RopeTables,
    slot_positions: Any,
    cache: LayerCache,
    out: Any,
    num_tokens: int,
    shape: HeadShape,
    *,
    use_pdl: bool = True,
) -> Launch:
    """out = softmax(q . K / sqrt(head_dim)) . V over positions 0 .. its own of each token's slot.

    qkv float32 [num_tokens, shape.qkv_size]; rope: the angles of every position; slot_positions int32 [num_tokens, 2],
    slot -1 for tokens that are not used; cache: holds every token that is attended to; out float32
    [num_tokens, shape.out_size], which is not written for unused tokens.
    Raises ValueError if an operand is too small or of another dtype.
    """
    arguments, (out,) = pass_arguments(
        "paged_attention_simt", qkv, rope, slot_positions, cache, num_tokens, shape,
        out=(out, num_tokens * shape.out_size, "float32"),
    )  # fmt: skip
    spec = paged_simt_spec(device.arch, shape.head_dim, shape.group, cache.dtype)
    grid = paged_simt_grid(num_tokens, shape.num_kv_heads, shape.group)
    return device.launch(spec, grid, (*arguments, out, shape.num_kv_heads), use_pdl)
