"""Attention of one token over its context: rotary embedding, append to the key-value cache, grouped-query attention.

One launch does all of it. The cache has one of the types in `kv_dtype`, everything else is float32.

    cache   [num_kv_heads, capacity, DP] twice (keys, values), DP = head_dim rounded up to 8: a lane loads 16 bytes
    grid    x: splits of the context        y: key-value heads (times the parts of a group's query heads)

    one block: a split, tokens of one key-value head, for one to four of the query heads that share it
    +- warp 0 ------------------+- warp 1 ---+- ...            a lane group, LANES lanes, holds one token, a lane 8 of
    | lanes 0-15  | lanes 16-31 |            |                 its dimensions (DP = 128: 16 lanes)
    | token 0     | token 1     | token 2, 3 |
    | token G     | token G + 1 | ...        |                 G = lane groups; a tile is G * UNROLL tokens
    +---------------------------+------------+- ...

    1. loads of the first tile's keys and values are issued (before the previous kernel has ended: see below)
    2. q and the new k, v are rotated into shared memory; the block with the last token stores k, v to the cache
    3. each warp for itself: scores, which a lane group reduce-scatters until a lane has one, the warp's running
       maximum, exponentials, p * v into registers; next tile
    4. lane groups meet in shared memory; with one split this is the output, else
    5. the partial result is stored and the last block of the head to arrive (an integer counter) adds the splits up
       in their order: the same bits every time

How many splits work is decided by the position, read from device memory, so that a captured graph serves every step:
a split has at least `min_split_tokens`, and blocks without tokens leave at once.

Order between kernels: cached tokens and `position` are read before `pdl_wait`. That is safe because the end of a step
(of a graph) is waited for in full, and within a step nothing writes `position` or this layer's earlier tokens.

Two variants. SHORT contexts have a block a query head, which takes fewest instructions a warp, and read the cache (from
L2) once for each; LONG ones, from LONG_CONTEXT tokens, share keys and values between query heads, on tensor cores where
`decode_mma` fits. Both give right results for any length.

The kernel is longer than its phases ask for: rotation and the two combinations stand in its body, since as functions
they change the machine code of the whole kernel.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention import decode_mma
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, HALVES, KVDtype, half_functions
from bitnet_numba.kernels.attention.parts import (
    KEY_DIMS,
    LANE_DIMS,
    LOWEST,
    VALUE_DIMS,
    HeadShape,
    RopeTables,
    SplitScratch,
    check_head,
    finite_or_inf,
    heads_per_block,
    padded_head_dim,
    partial_dims,
    power_of_two,
    score_scale,
    split_arrays,
)
from bitnet_numba.kernels.operands import checked
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec


class BlockShape(NamedTuple):
    """What a block does."""

    heads: int  # query heads, at most
    threads: int
    unroll: int  # tokens that a lane group holds at a time, a power of two
    blocks_per_sm: int
    registers: int = 0  # of a thread at most, see `KernelSpec`


SHORT = BlockShape(heads=1, threads=512, unroll=4, blocks_per_sm=1, registers=80)
LONG = BlockShape(heads=4, threads=256, unroll=4, blocks_per_sm=1)
NARROW_HEAD_DIM = 128
LONG_CONTEXT = 256  # tokens from which the variant for long contexts is the faster
MAX_SPLITS = decode_mma.MAX_SPLITS
SHORT_SPLIT_TOKENS, LONG_SPLIT_TOKENS = 256, 64  # of a split at least: splitting costs about 2 us
PREFETCH = 32  # partial results in flight when splits are added up


def takes(dtype: KVDtype) -> bool:
    """Whether these kernels serve a type of the cache; `append` and `paged_simt` serve those that they do not."""
    return dtype in HALVES


def make_decode(
    arch: int, head_dim: int, group: int, heads: int, threads: int, unroll: int, dtype: KVDtype
) -> Callable[..., None]:
    """The float32 kernel for a head size and a number of query heads per key-value head, `heads` of them a block; a
    lane group holds `unroll` tokens at a time, a power of two."""
    half = half_functions(dtype)
    low_of, high_of, rounded, join = half.low, half.high, half.rounded, half.join
    stream, wait, release = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    D, DP, HALF = head_dim, padded_head_dim(head_dim), head_dim // 2
    WORDS = DP // 2
    HEADS, HEAD_BLOCKS = heads, group // heads
    PADDED_HEADS = power_of_two(HEADS)
    UNROLL, SCORES = unroll, unroll * PADDED_HEADS
    CHUNKS = DP // LANE_DIMS  # lanes of a group that hold dimensions
    LANES = max(power_of_two(CHUNKS), SCORES)
    LANE_GROUPS, WARPS = threads // LANES, threads // WARP
    TILE = LANE_GROUPS * UNROLL
    SCATTER_STEPS = SCORES.bit_length() - 1
    UNROLL_STEPS, LANE_STEPS = UNROLL.bit_length() - 1, LANES.bit_length() - 1
    HEAD_LANE_BITS = SCORES - UNROLL  # bits of the lane that say which head's score it ends up with
    KV_REGS, HEAD_REGS = UNROLL * 4, HEADS * LANE_DIMS
    Q_FLOATS, NEW_FLOATS, ACC_FLOATS = HEADS * DP, 2 * DP, LANE_GROUPS * HEADS * DP
    STATS = PADDED_HEADS * WARPS
    WEIGHT_FLOATS = MAX_SPLITS * HEADS
    PAIRS = (HEADS + 2) * HALF  # of dimensions that are half a head apart: queries, key, value
    ROTATIONS = -(-PAIRS // threads)
    SCALE, ZERO = score_scale(D), float32(0)
    ITEMS, STRIDE, TILE_STEP, GROUP_STEP = (
        np.int32(HEADS * D),
        np.int32(threads),
        np.int32(TILE),
        np.int32(LANE_GROUPS),
    )  # int32 bounds make an int32 loop

    @device_function
    def reduce_scatter(s_r, lane):
        """Adds up the scores over a lane group: each lane returns one sum, that of the score whose index has the lane's
        lowest SCATTER_STEPS bits in reverse order."""
        for step in range(SCATTER_STEPS):
            upper = (lane >> step) & 1
            for i in range(SCORES // 2):
                if i < SCORES >> (step + 1):
                    j = i + (SCORES >> (step + 1))
                    send = s_r[i] if upper else s_r[j]
                    keep = s_r[j] if upper else s_r[i]
                    s_r[i] = float32(keep + ptx.shuffle_xor(send, 1 << step))
        score = s_r[0]
        for step in range(SCATTER_STEPS, LANE_STEPS):
            score = float32(score + ptx.shuffle_xor(score, 1 << step))
        return score

    @device_function
    def lane_of(score):
        """The first lane of a group that has this score after `reduce_scatter`."""
        source = int32(0)
        for step in range(SCATTER_STEPS):
            source = int32(source | ((score >> (SCATTER_STEPS - 1 - step)) & 1) << step)
        return source

    @device_function
    def store_accumulators(acc_s, acc_r, has_dims, lane_group, lane):
        """A lane group's weighted values."""
        for h in range(HEADS):
            if has_dims:
                i = h * LANE_DIMS
                wr = (lane_group * HEADS + h) * DP + lane * LANE_DIMS
                ptx.store4(acc_s, wr, acc_r[i], acc_r[i + 1], acc_r[i + 2], acc_r[i + 3])
                ptx.store4(acc_s, wr + 4, acc_r[i + 4], acc_r[i + 5], acc_r[i + 6], acc_r[i + 7])

    def decode_attention(
        qkv, cos, sin, position, keys, values, partials, stats, arrivals, out, num_kv_heads, capacity, min_split_tokens
    ):  # fmt: skip
        q_s = ptx.pointer(cuda.shared.array(Q_FLOATS, float32, SHARED_ALIGN))  # [HEADS, DP] rotated and scaled
        new_s = ptx.pointer(
            cuda.shared.array(NEW_FLOATS, float32, SHARED_ALIGN)
        )  # [2, DP] new key and value, as stored
        acc_s = ptx.pointer(cuda.shared.array(ACC_FLOATS, float32, SHARED_ALIGN))  # [LANE_GROUPS, HEADS, DP]
        max_s = ptx.pointer(cuda.shared.array(STATS, float32))  # [PADDED_HEADS, WARPS]
        sum_s = ptx.pointer(cuda.shared.array(STATS, float32))
        weight_s = ptx.pointer(cuda.shared.array(WEIGHT_FLOATS, float32))
        arrived_s = ptx.pointer(cuda.shared.array(1, uint32))
        q_r = cuda.local.array(HEAD_REGS, float32)
        k_r = cuda.local.array(KV_REGS, int32)
        v_r = cuda.local.array(KV_REGS, int32)
        s_r = cuda.local.array(SCORES, float32)
        acc_r = cuda.local.array(HEAD_REGS, float32)
        cos_r = cuda.local.array(ROTATIONS, float32)
        sin_r = cuda.local.array(ROTATIONS, float32)
        prefetch_r = cuda.local.array(PREFETCH, float32)

        tid = int32(cuda.threadIdx.x)
        warp, warp_lane = int32(tid // WARP), int32(tid % WARP)
        lane_group, lane = int32(tid // LANES), int32(tid % LANES)
        split, grid_splits, head_block = int32(cuda.blockIdx.x), int32(cuda.gridDim.x), int32(cuda.blockIdx.y)
        kv = int32(head_block // HEAD_BLOCKS)
        pos = int32(position[0])
        tokens = int32(pos + 1)
        split_tokens = max(min_split_tokens, ptx.udiv(int32(pos + grid_splits), grid_splits))
        start = int32(split * split_tokens)
        end = min(int32(start + split_tokens), tokens)
        release()
        if start >= tokens:
            return

        # 1. Keys and values of the first tile, others on their way to L2; this position's angles.
        has_dims = lane < CHUNKS
        cached = min(end, pos)  # tokens from here on are not in the cache
        at = int32(int32(kv * capacity + start + lane_group) * WORDS + lane * 4)
        for n in range(UNROLL):
            for j in range(4):
                k_r[4 * n + j] = int32(0)
                v_r[4 * n + j] = int32(0)
            if has_dims and start + n * LANE_GROUPS + lane_group < cached:
                k_r[4 * n], k_r[4 * n + 1], k_r[4 * n + 2], k_r[4 * n + 3] = stream(keys, at + n * LANE_GROUPS * WORDS)
                v_r[4 * n], v_r[4 * n + 1], v_r[4 * n + 2], v_r[4 * n + 3] = stream(
                    values, at + n * LANE_GROUPS * WORDS
                )
        if lane % 8 == 0:
            for token in range(int32(start + TILE + lane_group), cached, GROUP_STEP):
                ptx.prefetch_l2(keys, int32(int32(kv * capacity + token) * WORDS + lane * 4))
                ptx.prefetch_l2(values, int32(int32(kv * capacity + token) * WORDS + lane * 4))
        for t in range(ROTATIONS):
            j = int32((tid + t * threads) % HALF)
            cos_r[t] = cos[int32(pos * HALF + j)]
            sin_r[t] = sin[int32(pos * HALF + j)]
        if DP != D:
            for i in range(tid, Q_FLOATS, threads):
                q_s[i] = ZERO
            for i in range(tid, NEW_FLOATS, threads):
                new_s[i] = ZERO
            cuda.syncthreads()
        wait()

        # 2. Queries, rotated and scaled; the new key, rotated, and the new value, both as the cache has them.
        for t in range(ROTATIONS):
            i = int32(tid + t * threads)
            kind, j = int32(i // HALF), int32(i % HALF)
            if i < PAIRS:
                head = int32(head_block * HEADS + kind)
                if kind >= HEADS:
                    head = int32(num_kv_heads * (HEAD_BLOCKS * HEADS) + (kind - HEADS) * num_kv_heads + kv)
                x, y = qkv[int32(head * D + j)], qkv[int32(head * D + j + HALF)]
                a = ptx.add_rn(ptx.mul_rn(x, cos_r[t]), -ptx.mul_rn(y, sin_r[t]))
                b = ptx.add_rn(ptx.mul_rn(y, cos_r[t]), ptx.mul_rn(x, sin_r[t]))
                if kind < HEADS:
                    q_s[kind * DP + j], q_s[kind * DP + j + HALF] = a * SCALE, b * SCALE
                else:
                    if kind > HEADS:
                        a, b = x, y
                    wr = int32((kind - HEADS) * DP + j)
                    new_s[wr], new_s[wr + HALF] = rounded(a), rounded(b)
        cuda.syncthreads()
        for h in range(HEADS):
            for j in range(0, LANE_DIMS, 4):
                i = h * LANE_DIMS + j
                q_r[i] = q_r[i + 1] = q_r[i + 2] = q_r[i + 3] = ZERO
                if has_dims:
                    q_r[i], q_r[i + 1], q_r[i + 2], q_r[i + 3] = ptx.load4(q_s, h * DP + lane * LANE_DIMS + j)

        # 3. Tile by tile, every warp for itself: scores, their exponentials, and the values they weigh.
        row_max, row_sum = LOWEST, ZERO  # of the head whose scores this lane ends up with
        for i in range(HEAD_REGS):
            acc_r[i] = ZERO
        for tile in range(start, end, TILE_STEP):
            first = int32(tile + lane_group)
            at = int32(at + TILE * WORDS)
            if pos < tile + TILE and end == tokens and has_dims:
                for n in range(UNROLL):
                    if first + n * LANE_GROUPS == pos:
                        for part in range(2):
                            a, b, c, d = ptx.load4(new_s, lane * LANE_DIMS + part * 4)
                            k_r[4 * n + 2 * part], k_r[4 * n + 2 * part + 1] = join(a, b), join(c, d)
                            a, b, c, d = ptx.load4(new_s, DP + lane * LANE_DIMS + part * 4)
                            v_r[4 * n + 2 * part], v_r[4 * n + 2 * part + 1] = join(a, b), join(c, d)
                        wr = int32(int32(kv * capacity + pos) * WORDS + lane * 4)
                        ptx.store4(keys, wr, k_r[4 * n], k_r[4 * n + 1], k_r[4 * n + 2], k_r[4 * n + 3])
                        ptx.store4(values, wr, v_r[4 * n], v_r[4 * n + 1], v_r[4 * n + 2], v_r[4 * n + 3])
            for i in range(SCORES):
                s_r[i] = ZERO
            for n in range(UNROLL):
                for j in range(4):
                    low, high = low_of(k_r[4 * n + j]), high_of(k_r[4 * n + j])
                    for h in range(HEADS):
                        i = n * PADDED_HEADS + h
                        s_r[i] = float32(s_r[i] + low * q_r[h * LANE_DIMS + 2 * j])
                        s_r[i] = float32(s_r[i] + high * q_r[h * LANE_DIMS + 2 * j + 1])
                if tile + TILE < end:
                    for j in range(4):
                        k_r[4 * n + j] = int32(0)
                    if has_dims and first + TILE + n * LANE_GROUPS < cached:
                        k_r[4 * n], k_r[4 * n + 1], k_r[4 * n + 2], k_r[4 * n + 3] = stream(
                            keys, at + n * LANE_GROUPS * WORDS
                        )
            score = reduce_scatter(s_r, lane)
            mine = int32(0)
            for step in range(UNROLL_STEPS):
                mine = int32(mine | ((lane >> step) & 1) << (UNROLL_STEPS - 1 - step))
            if first + mine * LANE_GROUPS >= end:
                score = LOWEST
            largest = max(row_max, score)
            for step in range(UNROLL_STEPS):
                largest = max(largest, ptx.shuffle_xor(largest, 1 << step))
            for step in range(LANE_STEPS, 5):
                largest = max(largest, ptx.shuffle_xor(largest, 1 << step))
            alpha = ptx.exp2_approx(row_max - largest)
            row_max = largest
            weight = ptx.exp2_approx(score - largest)
            row_sum = float32(row_sum * alpha + weight)
            home = int32(warp_lane & ~(LANES - 1))
            for h in range(HEADS):
                if tile != start:
                    factor = ptx.shuffle(alpha, home + lane_of(h))
                    for j in range(LANE_DIMS):
                        acc_r[h * LANE_DIMS + j] *= factor
            for n in range(UNROLL):
                for h in range(HEADS):
                    s_r[n * PADDED_HEADS + h] = ptx.shuffle(weight, home + lane_of(n * PADDED_HEADS + h))
                for j in range(4):
                    low, high = low_of(v_r[4 * n + j]), high_of(v_r[4 * n + j])
                    for h in range(HEADS):
                        i = h * LANE_DIMS + 2 * j
                        acc_r[i] = float32(acc_r[i] + low * s_r[n * PADDED_HEADS + h])
                        acc_r[i + 1] = float32(acc_r[i + 1] + high * s_r[n * PADDED_HEADS + h])
                if tile + TILE < end:
                    for j in range(4):
                        v_r[4 * n + j] = int32(0)
                    if has_dims and first + TILE + n * LANE_GROUPS < cached:
                        v_r[4 * n], v_r[4 * n + 1], v_r[4 * n + 2], v_r[4 * n + 3] = stream(
                            values, at + n * LANE_GROUPS * WORDS
                        )

        # 4. Lane groups and warps meet.
        store_accumulators(acc_s, acc_r, has_dims, lane_group, lane)
        for step in range(UNROLL_STEPS):
            row_sum = float32(row_sum + ptx.shuffle_xor(row_sum, 1 << step))
        for step in range(LANE_STEPS, 5):
            row_sum = float32(row_sum + ptx.shuffle_xor(row_sum, 1 << step))
        head = int32(0)
        for step in range(UNROLL_STEPS, SCATTER_STEPS):
            head = int32(head | ((lane >> step) & 1) << (SCATTER_STEPS - 1 - step))
        if warp_lane & ~HEAD_LANE_BITS == 0:  # one of the lanes that hold this head's
            max_s[head * WARPS + warp] = row_max
            sum_s[head * WARPS + warp] = row_sum
        cuda.syncthreads()
        partial_wr = int32((head_block * grid_splits + split) * HEADS)
        whole = split_tokens >= tokens  # one split
        for i in range(tid, ITEMS, STRIDE):
            h = int32(i // D)
            d = int32(i % D)
            largest = LOWEST
            for w in range(WARPS):
                largest = max(largest, max_s[h * WARPS + w])
            x, weights = ZERO, ZERO
            for w in range(WARPS):
                weight = ptx.exp2_approx(max_s[h * WARPS + w] - largest)
                weights = float32(weights + weight * sum_s[h * WARPS + w])
                y = ZERO
                for r in range(LANE_GROUPS // WARPS):
                    y = float32(y + acc_s[((w * (LANE_GROUPS // WARPS) + r) * HEADS + h) * DP + d])
                x = float32(x + weight * y)
            if whole:
                out[int32(head_block * HEADS * D + i)] = finite_or_inf(x / weights)
            else:
                partials[int32(partial_wr * D + i)] = x
                if d == 0:
                    stats[int32((partial_wr + h) * 2)] = largest
                    stats[int32((partial_wr + h) * 2 + 1)] = weights
        if whole:
            return

        # 5. The last block of these heads to arrive adds up the splits, in their order.
        ptx.threadfence()
        cuda.syncthreads()
        num_splits = ptx.udiv(int32(pos + split_tokens), split_tokens)
        if tid == 0:
            arrived_s[0] = ptx.atomic_fetch_add(arrivals, head_block, uint32(1))
            ptx.threadfence()
        cuda.syncthreads()
        if arrived_s[0] != uint32(num_splits - 1):
            return
        partial_rd = int32(head_block * grid_splits * HEADS)
        for j in range(PREFETCH):  # asked for before their weights are known
            prefetch_r[j] = ZERO
            if j < num_splits and tid < ITEMS:
                prefetch_r[j] = partials[int32((partial_rd + j * HEADS) * D + tid)]
        for h in range(warp, HEADS, WARPS):
            largest = LOWEST
            for i in range(warp_lane, num_splits, WARP):
                largest = max(largest, stats[int32((partial_rd + i * HEADS + h) * 2)])
            largest = ptx.warp_max(largest)
            row_sum = ZERO
            for i in range(warp_lane, num_splits, WARP):
                weight = ptx.exp2_approx(stats[int32((partial_rd + i * HEADS + h) * 2)] - largest)
                weight_s[i * HEADS + h] = weight
                row_sum = float32(row_sum + weight * stats[int32((partial_rd + i * HEADS + h) * 2 + 1)])
            row_sum = ptx.warp_sum(row_sum)
            if warp_lane == 0:
                sum_s[h] = row_sum
        cuda.syncthreads()
        for i in range(tid, ITEMS, STRIDE):
            h = int32(i // D)
            x = ZERO
            for first in range(0, num_splits, PREFETCH):
                if i != tid or first > 0:
                    for j in range(PREFETCH):
                        prefetch_r[j] = ZERO
                        if first + j < num_splits:
                            prefetch_r[j] = partials[int32((partial_rd + (first + j) * HEADS) * D + i)]
                for j in range(PREFETCH):
                    if first + j < num_splits:
                        x = float32(x + prefetch_r[j] * weight_s[(first + j) * HEADS + h])
            out[int32(head_block * HEADS * D + i)] = finite_or_inf(x / sum_s[h])
        if tid == 0:
            arrivals[head_block] = 0

    return decode_attention


_FLOATS, _WORDS = types.CPointer(types.float32), types.CPointer(types.int32)
SIGNATURE = (
    *(_FLOATS, _FLOATS, _FLOATS, _WORDS, _WORDS, _WORDS),  # qkv, cos, sin, position, keys, values
    *(_FLOATS, _FLOATS, _WORDS, _FLOATS),  # partials, stats, arrivals, out
    *(types.int32, types.int32, types.int32),  # num_kv_heads, capacity, min_split_tokens
)


@cache
def decode_spec(
    arch: int,
    head_dim: int,
    group: int,
    long: bool = False,
    dtype: KVDtype = DEFAULT,
    threads: int = 0,
    unroll: int = 0,
) -> KernelSpec:
    """The variant for a head size, group and type of the cache, for short or long contexts (any length works with
    either).

    `threads` and `unroll` only for tests (0: this module's choice). Raises ValueError for a head size that is odd or
    over MAX_HEAD_DIM.
    """
    check_head("decode_attention", head_dim, group)
    block = LONG if long else SHORT
    heads = heads_per_block(group, block.heads)
    if long and decode_mma.fits(arch, head_dim):
        threads, registers = (threads, 0) if threads else decode_mma.bounds(arch)
        kernel = decode_mma.make_decode_mma(arch, head_dim, group, heads, threads, dtype)
        wide = 4 * -(-head_dim // KEY_DIMS) + 8 * -(-head_dim // VALUE_DIMS)
        name = f"decode_attention_mma[{head_dim}, {group}, {dtype}, {threads}]"
        return KernelSpec(name, kernel, SIGNATURE, threads, wide_loads=wide, registers=registers)
    threads, unroll = threads or block.threads, unroll or block.unroll
    kernel = make_decode(arch, head_dim, group, heads, threads, unroll, dtype)
    name = f"decode_attention[{head_dim}, {group}, {dtype}, {heads}, {threads}, {unroll}]"
    # Few enough for blocks of the launches before and after to fit beside it; larger heads would spill.
    registers = block.registers if head_dim <= NARROW_HEAD_DIM else 0
    return KernelSpec(name, kernel, SIGNATURE, threads, block.blocks_per_sm, wide_loads=4 * unroll, registers=registers)


def decode_grid(num_sms: int, shape: HeadShape, long: bool = False) -> tuple[int, int]:
    """(splits, head blocks) of a launch: about one block for each SM."""
    head_blocks = shape.num_heads // heads_per_block(shape.group, (LONG if long else SHORT).heads)
    return max(1, min(MAX_SPLITS, num_sms // head_blocks)), head_blocks


class DecodeScratch(SplitScratch):
    """partials and stats [head blocks, splits, heads of a block, ...], arrivals [head blocks]."""

    @staticmethod
    def sizes(num_sms: int, shape: HeadShape) -> tuple[int, int, int]:
        """Elements of (partials, stats, arrivals) that both variants, for short and long contexts, do with."""
        grids = [decode_grid(num_sms, shape, long) for long in (False, True)]
        splits, head_blocks = (max(sizes) for sizes in zip(*grids, strict=True))
        rows = splits * shape.num_heads
        return rows * partial_dims(shape.head_dim), rows * 2, head_blocks

    @staticmethod
    def allocate(device: Device, shape: HeadShape) -> "DecodeScratch":
        """For the launches of layers of this shape. Raises BackendError when memory is short."""
        return DecodeScratch(*split_arrays(device, *DecodeScratch.sizes(device.num_sms, shape)))


def decode_attention(
    device: Device,
    qkv: Any,
    rope: RopeTables,
    position: Any,
    keys: Any,
    values: Any,
    capacity: int,
    scratch: DecodeScratch,
    out: Any,
    shape: HeadShape,
    *,
    dtype: KVDtype = DEFAULT,
    long: bool = False,
    use_pdl: bool = True,
) -> Launch:
    """One layer's attention of one token: out = softmax(q . K / sqrt(head_dim)) . V over positions 0 .. position[0].

    qkv float32 [shape.qkv_size]; rope: the angles of `capacity` positions; position int32 [1]; keys, values int32
    [num_kv_heads, capacity, padded_head_dim / 2]: pairs of `dtype` (see `kv_cache`), written at position[0]; out
    float32 [shape.out_size]. `long` chooses the variant for long contexts.
    Raises ValueError if an operand is too small or of another dtype.
    """
    shape.check("decode_attention")
    if capacity < 1:
        raise ValueError(f"decode_attention: a capacity of {capacity} tokens; at least one is needed")
    spec = decode_spec(device.arch, shape.head_dim, shape.group, long, dtype)
    splits, head_blocks = grid = decode_grid(device.num_sms, shape, long)
    cache_words = shape.num_kv_heads * capacity * padded_head_dim(shape.head_dim) // 2
    rows = splits * shape.num_heads
    arrays = checked(
        "decode_attention",
        f"{shape.num_heads} heads of {shape.head_dim}, {shape.num_kv_heads} key-value heads and {capacity} tokens",
        qkv=(qkv, shape.qkv_size, "float32"),
        cos=(rope.cos, capacity * shape.head_dim // 2, "float32"),
        sin=(rope.sin, capacity * shape.head_dim // 2, "float32"),
        position=(position, 1, "int32"),
        keys=(keys, cache_words, "int32"),
        values=(values, cache_words, "int32"),
        partials=(scratch.partials, rows * partial_dims(shape.head_dim), "float32"),
        stats=(scratch.stats, rows * 2, "float32"),
        arrivals=(scratch.arrivals, head_blocks, "int32"),
        out=(out, shape.out_size, "float32"),
    )
    min_split_tokens = LONG_SPLIT_TOKENS if long else SHORT_SPLIT_TOKENS
    return device.launch(spec, grid, (*arrays, shape.num_kv_heads, capacity, min_split_tokens), use_pdl)
