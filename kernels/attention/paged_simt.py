"""Attention of any rows over their own sequences, in float32 multiply-adds: for every architecture and head size.

It serves where tensor cores with bfloat16 are missing (below sm_80), and what the other kernels do not take. Rows may
belong to any slots, at any positions; each attends to tokens 0 .. position of its slot, itself included, which are in
the cache already (see kv_cache).

    grid      x: rows        y: key-value heads (times the parts of a group's query heads)
    block     a row and up to four query heads that share a key-value head; keys and values are read once for them

    +- warp 0 ------------------+- warp 1 ---+- ...        a team of LANES lanes holds one token, a lane 8 of its
    | lanes 0-15  | lanes 16-31 |            |             dimensions (head_dim 128: 16 lanes); two tokens at a time
    | token 0, T  | token 1,    | token 2,   |
    | 2T, ..      | T + 1, ..   | ...        |             T = teams of a block
    +---------------------------+------------+

Every team keeps a running maximum, a sum of weights and weighted values for its tokens T * i + team; the teams meet in
shared memory, in order. So a row's sums depend on its position alone. One block does a whole context: with few rows of
long contexts most SMs idle, which kernels/attention.py is for.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.decode import (
    LANE_DIMS,
    LOG2_E,
    LOWEST,
    MAX_HEAD_DIM,
    heads_per_block,
    padded_head_dim,
)
from bitnet_numba.kernels.attention.kv_cache import CACHE_SIGNATURE, PAGE, LayerCache, cache_arguments, check_sizes
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, float32, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec

THREADS = 256
AHEAD = 2  # tokens that a team takes at a time, so that their loads overlap; the softmax below is written for two


def make_attention_rows(arch: int, head_dim: int, group: int, heads: int, threads: int) -> Callable[..., None]:
    """The kernel for a head size and `group` query heads a key-value head, of which a block serves `heads`."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    D, DP, HALF = head_dim, padded_head_dim(head_dim), head_dim // 2
    WORDS, HEADS, PARTS = DP // 2, heads, group // heads
    CHUNKS = DP // LANE_DIMS  # lanes of a team that hold dimensions
    LANES = 1 << (CHUNKS - 1).bit_length()
    LANE_STEPS, TEAMS = LANES.bit_length() - 1, threads // LANES
    Q_FLOATS, HEAD_REGS, SCORES, TOKEN_REGS = HEADS * DP, HEADS * LANE_DIMS, AHEAD * HEADS, AHEAD * 4
    SUM_FLOATS, STATS = TEAMS * HEADS * DP, TEAMS * HEADS
    QUERIES, ITEMS, STEP = np.int32(HEADS * DP), np.int32(HEADS * D), np.int32(threads)
    TILE = np.int32(AHEAD * TEAMS)
    PAGE_BITS = PAGE.bit_length() - 1
    SCALE = float32(D**-0.5 * LOG2_E)  # exponentials are taken to base 2
    ZERO = float32(0)

    def attention_rows(
        qkv, cos, sin, where, table, table_stride, keys, values, page_words, head_words, out, kv_heads
    ):  # fmt: skip
        q_s = ptx.pointer(cuda.shared.array(Q_FLOATS, float32, SHARED_ALIGN))  # [HEADS, DP] rotated and scaled
        sum_s = ptx.pointer(cuda.shared.array(SUM_FLOATS, float32, SHARED_ALIGN))  # [TEAMS, HEADS, DP]
        top_s = ptx.pointer(cuda.shared.array(STATS, float32))  # [TEAMS, HEADS]
        total_s = ptx.pointer(cuda.shared.array(STATS, float32))
        q_r = cuda.local.array(HEAD_REGS, float32)
        acc_r = cuda.local.array(HEAD_REGS, float32)
        top_r = cuda.local.array(HEADS, float32)
        total_r = cuda.local.array(HEADS, float32)
        k_r = cuda.local.array(TOKEN_REGS, int32)
        v_r = cuda.local.array(TOKEN_REGS, int32)
        s_r = cuda.local.array(SCORES, float32)

        release()
        tid = int32(cuda.threadIdx.x)
        team, lane = int32(tid // LANES), int32(tid % LANES)
        row, part = int32(cuda.blockIdx.x), int32(cuda.blockIdx.y)
        kv = part if PARTS == 1 else ptx.udiv(part, int32(PARTS))
        first_head = int32(part * HEADS)
        heads_in_all = int32(kv_heads * (PARTS * HEADS))
        wait()
        slot, position = int32(where[int32(2 * row)]), int32(where[int32(2 * row + 1)])
        if slot < 0:
            return
        tokens = int32(position + 1)

        q_rd = int64(row) * int32((heads_in_all + 2 * kv_heads) * D) + int32(first_head * D)
        angles = int64(position) * HALF
        for i in range(tid, QUERIES, STEP):
            h = ptx.udiv(i, int32(DP))
            d = int32(i - h * DP)
            value = ZERO
            if d < D:
                upper = d >= HALF
                j = int32(d - HALF) if upper else d
                turned = ptx.mul_rn(qkv[q_rd + h * D + (j if upper else int32(d + HALF))], sin[angles + j])
                value = (
                    ptx.add_rn(ptx.mul_rn(qkv[q_rd + h * D + d], cos[angles + j]), turned if upper else -turned) * SCALE
                )
            q_s[i] = value
        cuda.syncthreads()
        holds = lane < CHUNKS
        for h in range(HEADS):
            for j in range(0, LANE_DIMS, 4):
                i = h * LANE_DIMS + j
                q_r[i] = q_r[i + 1] = q_r[i + 2] = q_r[i + 3] = ZERO
                if holds:
                    q_r[i], q_r[i + 1], q_r[i + 2], q_r[i + 3] = ptx.load4(q_s, h * DP + lane * LANE_DIMS + j)
        for i in range(HEAD_REGS):
            acc_r[i] = ZERO
        for h in range(HEADS):
            top_r[h], total_r[h] = LOWEST, ZERO

        pages = int64(slot) * table_stride
        head_rd = int64(kv) * head_words + lane * 4
        for tile in range(int32(0), tokens, TILE):
            for n in range(AHEAD):
                token = int32(tile + n * TEAMS + team)
                for j in range(4):
                    k_r[4 * n + j] = v_r[4 * n + j] = int32(0)
                if holds and token < tokens:
                    rd = int64(table[pages + (token >> PAGE_BITS)]) * page_words
                    rd += head_rd + int32((token & (PAGE - 1)) * WORDS)
                    k_r[4 * n], k_r[4 * n + 1], k_r[4 * n + 2], k_r[4 * n + 3] = ptx.load4(keys, rd)
                    v_r[4 * n], v_r[4 * n + 1], v_r[4 * n + 2], v_r[4 * n + 3] = ptx.load4(values, rd)
            for n in range(AHEAD):
                for h in range(HEADS):
                    score = ZERO
                    for j in range(4):
                        score += ptx.bf16_low(k_r[4 * n + j]) * q_r[h * LANE_DIMS + 2 * j]
                        score += ptx.bf16_high(k_r[4 * n + j]) * q_r[h * LANE_DIMS + 2 * j + 1]
                    for step in range(LANE_STEPS):
                        score += ptx.shuffle_xor(score, 1 << step)
                    s_r[n * HEADS + h] = score if tile + n * TEAMS + team < tokens else LOWEST
            for h in range(HEADS):
                before, score0, score1 = top_r[h], s_r[h], s_r[HEADS + h]
                top = max(before, max(score0, score1))
                alpha = ptx.exp2_approx(before - top)
                weight0, weight1 = ptx.exp2_approx(score0 - top), ptx.exp2_approx(score1 - top)
                top_r[h], total_r[h] = top, total_r[h] * alpha + (weight0 + weight1)
                for j in range(LANE_DIMS):
                    acc_r[h * LANE_DIMS + j] *= alpha
                for j in range(4):
                    i = h * LANE_DIMS + 2 * j
                    acc_r[i] += weight0 * ptx.bf16_low(v_r[j]) + weight1 * ptx.bf16_low(v_r[4 + j])
                    acc_r[i + 1] += weight0 * ptx.bf16_high(v_r[j]) + weight1 * ptx.bf16_high(v_r[4 + j])

        # The teams meet; one without tokens has the lowest maximum, and so no weight.
        for h in range(HEADS):
            if holds:
                i = h * LANE_DIMS
                wr = (team * HEADS + h) * DP + lane * LANE_DIMS
                ptx.store4(sum_s, wr, acc_r[i], acc_r[i + 1], acc_r[i + 2], acc_r[i + 3])
                ptx.store4(sum_s, wr + 4, acc_r[i + 4], acc_r[i + 5], acc_r[i + 6], acc_r[i + 7])
            if lane == 0:
                top_s[team * HEADS + h], total_s[team * HEADS + h] = top_r[h], total_r[h]
        cuda.syncthreads()
        for i in range(tid, ITEMS, STEP):
            h = ptx.udiv(i, int32(D))
            d = int32(i - h * D)
            highest = LOWEST
            for t in range(TEAMS):
                highest = max(highest, top_s[t * HEADS + h])
            x = sums = ZERO
            for t in range(TEAMS):
                weight = ptx.exp2_approx(top_s[t * HEADS + h] - highest)
                sums += weight * total_s[t * HEADS + h]
                x += weight * sum_s[(t * HEADS + h) * DP + d]
            out[int64(row) * int32(heads_in_all * D) + int32(first_head * D + i)] = ptx.div_rn(x, sums)

    return attention_rows


_FLOATS = types.CPointer(types.float32)
SIGNATURE = (
    *(_FLOATS, _FLOATS, _FLOATS, types.CPointer(types.int32), *CACHE_SIGNATURE),  # qkv, cos, sin, where, the cache
    *(_FLOATS, types.int32),  # out, kv_heads
)


@cache
def attention_rows_spec(arch: int, head_dim: int, group: int, threads: int = THREADS) -> KernelSpec:
    """The compiled form for a head size and a number of query heads per key-value head.

    Raises ValueError for an odd head size or one over 256.
    """
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"attention_rows takes even head sizes up to {MAX_HEAD_DIM}, not {head_dim}")
    if group < 1:
        raise ValueError(f"a key-value head serves at least one query head, not {group}")
    heads = heads_per_block(group, True)
    kernel = make_attention_rows(arch, head_dim, group, heads, threads)
    name = f"attention_rows[{head_dim}, {group}, {heads}, {threads}]"
    return KernelSpec(name, kernel, SIGNATURE, threads, wide_loads=2 * AHEAD)


def attention_rows_grid(rows: int, kv_heads: int, group: int) -> tuple[int, int]:
    """Blocks of a launch for `rows` rows."""
    return rows, kv_heads * (group // heads_per_block(group, True))


def attention_rows(
    device: Device,
    qkv: DeviceArray,
    cos: DeviceArray,
    sin: DeviceArray,
    where: DeviceArray,
    cache: LayerCache,
    out: DeviceArray,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    use_pdl: bool = True,
) -> Launch:
    """The launch for rows of any slots: out = softmax(q . K / sqrt(head_dim)) . V over tokens 0 .. position of each.

    qkv float32 [rows, (heads + 2 * kv_heads) * head_dim]; cos, sin float32 [positions, head_dim / 2]; where int32
    [rows, 2]: (slot, position), slot -1 for rows that are not used; cache: holds every row's tokens; out float32
    [rows, heads * head_dim], of which unused rows are not written.
    Raises ValueError with the sizes if they do not fit together.
    """
    size = rows * heads * head_dim
    check_sizes("attention_rows", qkv, cos, sin, where, cache, rows, heads, kv_heads, head_dim, out=(out, size))
    group = heads // kv_heads
    spec = attention_rows_spec(device.arch, head_dim, group)
    arguments = (qkv, cos, sin, where, *cache_arguments(cache), out, kv_heads)
    return device.launch(spec, attention_rows_grid(rows, kv_heads, group), arguments, use_pdl)
