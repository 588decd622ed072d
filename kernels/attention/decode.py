"""Attention of one token over its context: rotary embedding, append to the key-value cache, grouped-query attention.

One launch does all of it. The cache is bfloat16 (round to nearest even), everything else float32. What it reads is the
cache: 2 * kv_heads * position * head_dim * 2 bytes a layer (10.5 MB at 4096 tokens of 2B4T, 2.5 us at 4.27 TB/s).

    cache   [kv_heads, capacity, DP] twice (keys, values), DP = head_dim rounded up to 8, so that a lane loads 16 bytes
    grid    x: splits of the context        y: key-value heads (times the parts of a group's query heads)

    one block: a range of tokens of one key-value head, for one to four of the query heads that share it
    +- warp 0 ------------------+- warp 1 ---+- ...            a row of LANES lanes holds one token,
    | lanes 0-15  | lanes 16-31 |            |                 a lane 8 of its dimensions (DP = 128: 16 lanes)
    | token row 0 | token row 1 | row 2, 3   |
    | token row R | row R + 1   | ...        |                 R = ROWS, PASSES times: a tile of ROWS * PASSES tokens
    +---------------------------+------------+- ...

    1. loads of the first tile's keys and values are issued (before the previous kernel has ended: see below)
    2. q and the new k, v are rotated into shared memory; the block with the last token stores k, v to the cache
    3. each warp for itself: scores, which the lanes of a row add up by trading scores for lanes (until a lane has
       one), the warp's running maximum, exponentials, p * v into registers; next tile
    4. rows meet in shared memory; with one split this is the output, else
    5. the partial result is stored and the last block of the head to arrive (an integer counter) adds the splits up
       in their order: the same bits every time

How many splits work is decided by the position, read from device memory, so that a captured graph serves every step:
a split has at least `least` tokens, and blocks without tokens leave at once.

Order between kernels: cached tokens and `position` are read before `pdl_wait`. That is safe because the end of a step
(of a graph) is waited for in full, and within a step nothing writes `position` or this layer's earlier tokens.

A warp's instructions are the cost, not the bytes: at 4 heads a block, with every score added up in every lane, 4,000 of
them took 4.5 us for 60 tokens; now they are 700 and take 1.9 us. So SHORT contexts have a block a query head, and read
the cache (from L2) once for each; for LONG ones that costs more than it saves. Splitting costs 2.2 us (the arrival, the
partial results' way through L2), so a split has up to 256 tokens. Tried as well: a barrier for each of maximum,
exponentials and products over the whole block (5.8 us), 128 threads a block (slower everywhere).
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention import decode_mma as attention_long
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, float32, int32, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec

# Query heads a block, threads, tokens that a row of lanes holds at a time, blocks a SM: see above.
SHORT = (1, 512, 4, 1)
LONG = (4, 256, 4, 1)
LONG_CONTEXT = 256  # tokens from which the long form is the faster
LANE_DIMS = 8  # bfloat16 numbers in a 16-byte load
MAX_HEAD_DIM = 256  # a row of 32 lanes
MAX_SPLITS = 128
MIN_SPLIT_TOKENS, LEAST_TOKENS_LONG = 256, 64  # of a split, in a form for short contexts and in one for long
AHEAD = 32  # partial results in flight when splits are added up
LOG2_E = np.log2(np.e)
LOWEST = float32(-1e30)  # below every score, and finite: a difference of two is no NaN


def padded_head_dim(head_dim: int) -> int:
    """Dimensions of a token in the cache: head_dim rounded up to 16-byte loads."""
    return -(-head_dim // LANE_DIMS) * LANE_DIMS


def heads_per_block(group: int, long: bool) -> int:
    """Query heads that one block serves: the largest divisor of the group within the limit."""
    most = (LONG if long else SHORT)[0]
    return max(heads for heads in range(1, most + 1) if group % heads == 0)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def make_attention(arch: int, head_dim: int, group: int, heads: int, threads: int, passes: int) -> Callable[..., None]:
    """The kernel for a head size and a number of query heads per key-value head, `heads` of them a block; a row of
    lanes holds `passes` tokens, a power of two."""
    stream, wait, release = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    D, DP, HALF = head_dim, padded_head_dim(head_dim), head_dim // 2
    WORDS = DP // 2
    HEADS = heads
    PARTS = group // HEADS
    SLOTS = _power_of_two(HEADS)
    PASSES, SCORES = passes, passes * SLOTS
    CHUNKS = DP // LANE_DIMS  # lanes of a row that hold dimensions
    LANES = max(_power_of_two(CHUNKS), SCORES)
    ROWS, WARPS = threads // LANES, threads // WARP
    TILE = ROWS * PASSES
    TRADES = SCORES.bit_length() - 1
    PASS_STEPS, LANE_STEPS = PASSES.bit_length() - 1, LANES.bit_length() - 1
    SLOT_LANES = SCORES - PASSES  # bits of the lane that tell the head whose score it ends up with
    SCALE = float32(D**-0.5 * LOG2_E)  # exponentials are taken to base 2
    KV_REGS, HEAD_REGS = PASSES * 4, HEADS * LANE_DIMS
    Q_FLOATS, NEW_FLOATS, SUM_FLOATS = HEADS * DP, 2 * DP, ROWS * HEADS * DP
    STATS = SLOTS * WARPS
    WEIGHT_FLOATS = MAX_SPLITS * HEADS
    PAIRS = (HEADS + 2) * HALF  # of dimensions that are half a head apart: queries, key, value
    TURNS = -(-PAIRS // threads)
    ZERO = float32(0)
    ITEMS, STRIDE, TILE_STEP, ROW_STEP = (
        np.int32(HEADS * D),
        np.int32(threads),
        np.int32(TILE),
        np.int32(ROWS),
    )  # int32 bounds make an int32 loop

    def attention(
        qkv, cos, sin, position, keys, values, partials, stats, arrivals, out, kv_heads, capacity, least
    ):  # fmt: skip
        q_s = ptx.pointer(cuda.shared.array(Q_FLOATS, float32, SHARED_ALIGN))  # [HEADS, DP] rotated and scaled
        new_s = ptx.pointer(
            cuda.shared.array(NEW_FLOATS, float32, SHARED_ALIGN)
        )  # [2, DP] this token's key and value, as stored
        sum_s = ptx.pointer(cuda.shared.array(SUM_FLOATS, float32, SHARED_ALIGN))  # [ROWS, HEADS, DP]
        max_s = ptx.pointer(cuda.shared.array(STATS, float32))  # [SLOTS, WARPS]
        total_s = ptx.pointer(cuda.shared.array(STATS, float32))
        weight_s = ptx.pointer(cuda.shared.array(WEIGHT_FLOATS, float32))
        arrived_s = ptx.pointer(cuda.shared.array(1, uint32))
        q_r = cuda.local.array(HEAD_REGS, float32)
        k_r = cuda.local.array(KV_REGS, int32)
        v_r = cuda.local.array(KV_REGS, int32)
        s_r = cuda.local.array(SCORES, float32)
        acc_r = cuda.local.array(HEAD_REGS, float32)
        cos_r = cuda.local.array(TURNS, float32)
        sin_r = cuda.local.array(TURNS, float32)
        ahead_r = cuda.local.array(AHEAD, float32)

        tid = int32(cuda.threadIdx.x)
        warp, warp_lane = int32(tid // WARP), int32(tid % WARP)
        row, lane = int32(tid // LANES), int32(tid % LANES)
        split, splits, part = int32(cuda.blockIdx.x), int32(cuda.gridDim.x), int32(cuda.blockIdx.y)
        kv = int32(part // PARTS)
        pos = int32(position[0])
        tokens = int32(pos + 1)
        chunk = max(least, ptx.udiv(int32(pos + splits), splits))
        start = int32(split * chunk)
        end = min(int32(start + chunk), tokens)
        release()
        if start >= tokens:
            return

        # 1. Keys and values of the first tile, others on their way to L2; this position's angles.
        holds = lane < CHUNKS
        cached = min(end, pos)  # tokens from here on are not in the cache
        at = int32(int32(kv * capacity + start + row) * WORDS + lane * 4)
        for n in range(PASSES):
            for j in range(4):
                k_r[4 * n + j] = int32(0)
                v_r[4 * n + j] = int32(0)
            if holds and start + n * ROWS + row < cached:
                k_r[4 * n], k_r[4 * n + 1], k_r[4 * n + 2], k_r[4 * n + 3] = stream(keys, at + n * ROWS * WORDS)
                v_r[4 * n], v_r[4 * n + 1], v_r[4 * n + 2], v_r[4 * n + 3] = stream(values, at + n * ROWS * WORDS)
        if lane % 8 == 0:
            for token in range(int32(start + TILE + row), cached, ROW_STEP):
                ptx.prefetch_l2(keys, int32(int32(kv * capacity + token) * WORDS + lane * 4))
                ptx.prefetch_l2(values, int32(int32(kv * capacity + token) * WORDS + lane * 4))
        for t in range(TURNS):
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

        # 2. Queries, rotated and scaled; the new key, rotated, and the new value, both as bfloat16.
        for t in range(TURNS):
            i = int32(tid + t * threads)
            kind, j = int32(i // HALF), int32(i % HALF)
            if i < PAIRS:
                head = int32(part * HEADS + kind)
                if kind >= HEADS:
                    head = int32(kv_heads * (PARTS * HEADS) + (kind - HEADS) * kv_heads + kv)
                x, y = qkv[int32(head * D + j)], qkv[int32(head * D + j + HALF)]
                a = ptx.add_rn(ptx.mul_rn(x, cos_r[t]), -ptx.mul_rn(y, sin_r[t]))
                b = ptx.add_rn(ptx.mul_rn(y, cos_r[t]), ptx.mul_rn(x, sin_r[t]))
                if kind < HEADS:
                    q_s[kind * DP + j], q_s[kind * DP + j + HALF] = a * SCALE, b * SCALE
                else:
                    if kind > HEADS:
                        a, b = x, y
                    wr = int32((kind - HEADS) * DP + j)
                    new_s[wr], new_s[wr + HALF] = ptx.to_bf16(a), ptx.to_bf16(b)
        cuda.syncthreads()
        for h in range(HEADS):
            for j in range(0, LANE_DIMS, 4):
                i = h * LANE_DIMS + j
                q_r[i] = q_r[i + 1] = q_r[i + 2] = q_r[i + 3] = ZERO
                if holds:
                    q_r[i], q_r[i + 1], q_r[i + 2], q_r[i + 3] = ptx.load4(q_s, h * DP + lane * LANE_DIMS + j)

        # 3. Tile by tile, every warp for itself: scores, their exponentials, and the values they weigh.
        top, total = LOWEST, ZERO  # of the head whose scores this lane ends up with
        for i in range(HEAD_REGS):
            acc_r[i] = ZERO
        for tile in range(start, end, TILE_STEP):
            first = int32(tile + row)
            at = int32(at + TILE * WORDS)
            if pos < tile + TILE and end == tokens and holds:
                for n in range(PASSES):
                    if first + n * ROWS == pos:
                        for half in range(2):
                            a, b, c, d = ptx.load4(new_s, lane * LANE_DIMS + half * 4)
                            k_r[4 * n + 2 * half], k_r[4 * n + 2 * half + 1] = ptx.join_bf16(a, b), ptx.join_bf16(c, d)
                            a, b, c, d = ptx.load4(new_s, DP + lane * LANE_DIMS + half * 4)
                            v_r[4 * n + 2 * half], v_r[4 * n + 2 * half + 1] = ptx.join_bf16(a, b), ptx.join_bf16(c, d)
                        wr = int32(int32(kv * capacity + pos) * WORDS + lane * 4)
                        ptx.store4(keys, wr, k_r[4 * n], k_r[4 * n + 1], k_r[4 * n + 2], k_r[4 * n + 3])
                        ptx.store4(values, wr, v_r[4 * n], v_r[4 * n + 1], v_r[4 * n + 2], v_r[4 * n + 3])
            for i in range(SCORES):
                s_r[i] = ZERO
            for n in range(PASSES):
                for j in range(4):
                    low, high = ptx.bf16_low(k_r[4 * n + j]), ptx.bf16_high(k_r[4 * n + j])
                    for h in range(HEADS):
                        i = n * SLOTS + h
                        s_r[i] = float32(s_r[i] + low * q_r[h * LANE_DIMS + 2 * j])
                        s_r[i] = float32(s_r[i] + high * q_r[h * LANE_DIMS + 2 * j + 1])
                if tile + TILE < end:
                    for j in range(4):
                        k_r[4 * n + j] = int32(0)
                    if holds and first + TILE + n * ROWS < cached:
                        k_r[4 * n], k_r[4 * n + 1], k_r[4 * n + 2], k_r[4 * n + 3] = stream(keys, at + n * ROWS * WORDS)
            # The lanes of a row add up, trading scores for lanes: bit k of the lane is bit TRADES - 1 - k of the score.
            for step in range(TRADES):
                upper = (lane >> step) & 1
                for i in range(SCORES // 2):
                    if i < SCORES >> (step + 1):
                        j = i + (SCORES >> (step + 1))
                        send = s_r[i] if upper else s_r[j]
                        keep = s_r[j] if upper else s_r[i]
                        s_r[i] = float32(keep + ptx.shuffle_xor(send, 1 << step))
            score = s_r[0]
            for step in range(TRADES, LANE_STEPS):
                score = float32(score + ptx.shuffle_xor(score, 1 << step))
            mine = int32(0)
            for step in range(PASS_STEPS):
                mine = int32(mine | ((lane >> step) & 1) << (PASS_STEPS - 1 - step))
            if first + mine * ROWS >= end:
                score = LOWEST
            highest = max(top, score)
            for step in range(PASS_STEPS):
                highest = max(highest, ptx.shuffle_xor(highest, 1 << step))
            for step in range(LANE_STEPS, 5):
                highest = max(highest, ptx.shuffle_xor(highest, 1 << step))
            alpha = ptx.exp2_approx(top - highest)
            top = highest
            weight = ptx.exp2_approx(score - highest)
            total = float32(total * alpha + weight)
            home = int32(warp_lane & ~(LANES - 1))
            for h in range(HEADS):
                if tile != start:
                    source = int32(0)
                    for step in range(TRADES):
                        source = int32(source | ((h >> (TRADES - 1 - step)) & 1) << step)
                    factor = ptx.shuffle(alpha, home + source)
                    for j in range(LANE_DIMS):
                        acc_r[h * LANE_DIMS + j] *= factor
            for n in range(PASSES):
                for h in range(HEADS):
                    source = int32(0)
                    for step in range(TRADES):
                        source = int32(source | (((n * SLOTS + h) >> (TRADES - 1 - step)) & 1) << step)
                    s_r[n * SLOTS + h] = ptx.shuffle(weight, home + source)
                for j in range(4):
                    low, high = ptx.bf16_low(v_r[4 * n + j]), ptx.bf16_high(v_r[4 * n + j])
                    for h in range(HEADS):
                        i = h * LANE_DIMS + 2 * j
                        acc_r[i] = float32(acc_r[i] + low * s_r[n * SLOTS + h])
                        acc_r[i + 1] = float32(acc_r[i + 1] + high * s_r[n * SLOTS + h])
                if tile + TILE < end:
                    for j in range(4):
                        v_r[4 * n + j] = int32(0)
                    if holds and first + TILE + n * ROWS < cached:
                        v_r[4 * n], v_r[4 * n + 1], v_r[4 * n + 2], v_r[4 * n + 3] = stream(
                            values, at + n * ROWS * WORDS
                        )

        # 4. Rows and warps meet.
        for h in range(HEADS):
            if holds:
                i = h * LANE_DIMS
                wr = (row * HEADS + h) * DP + lane * LANE_DIMS
                ptx.store4(sum_s, wr, acc_r[i], acc_r[i + 1], acc_r[i + 2], acc_r[i + 3])
                ptx.store4(sum_s, wr + 4, acc_r[i + 4], acc_r[i + 5], acc_r[i + 6], acc_r[i + 7])
        for step in range(PASS_STEPS):
            total = float32(total + ptx.shuffle_xor(total, 1 << step))
        for step in range(LANE_STEPS, 5):
            total = float32(total + ptx.shuffle_xor(total, 1 << step))
        slot = int32(0)
        for step in range(PASS_STEPS, TRADES):
            slot = int32(slot | ((lane >> step) & 1) << (TRADES - 1 - step))
        if warp_lane & ~SLOT_LANES == 0:  # one of the lanes that hold this head's
            max_s[slot * WARPS + warp] = top
            total_s[slot * WARPS + warp] = total
        cuda.syncthreads()
        part_wr = int32((part * splits + split) * HEADS)
        used = chunk >= tokens
        for i in range(tid, ITEMS, STRIDE):
            h = int32(i // D)
            d = int32(i % D)
            highest = LOWEST
            for w in range(WARPS):
                highest = max(highest, max_s[h * WARPS + w])
            x, sums = ZERO, ZERO
            for w in range(WARPS):
                weight = ptx.exp2_approx(max_s[h * WARPS + w] - highest)
                sums = float32(sums + weight * total_s[h * WARPS + w])
                y = ZERO
                for r in range(ROWS // WARPS):
                    y = float32(y + sum_s[((w * (ROWS // WARPS) + r) * HEADS + h) * DP + d])
                x = float32(x + weight * y)
            if used:
                out[int32(part * HEADS * D + i)] = x / sums
            else:
                partials[int32(part_wr * D + i)] = x
                if d == 0:
                    stats[int32((part_wr + h) * 2)] = highest
                    stats[int32((part_wr + h) * 2 + 1)] = sums
        if used:
            return

        # 5. The last block of these heads to arrive adds up the splits, in their order.
        ptx.threadfence()
        cuda.syncthreads()
        used = ptx.udiv(int32(pos + chunk), chunk)
        if tid == 0:
            arrived_s[0] = ptx.atomic_fetch_add(arrivals, part, uint32(1))
            ptx.threadfence()
        cuda.syncthreads()
        if arrived_s[0] != uint32(used - 1):
            return
        part_rd = int32(part * splits * HEADS)
        for j in range(AHEAD):  # asked for before their weights are known
            ahead_r[j] = ZERO
            if j < used and tid < ITEMS:
                ahead_r[j] = partials[int32((part_rd + j * HEADS) * D + tid)]
        for h in range(warp, HEADS, WARPS):
            highest = LOWEST
            for i in range(warp_lane, used, WARP):
                highest = max(highest, stats[int32((part_rd + i * HEADS + h) * 2)])
            highest = ptx.warp_max(highest)
            total = ZERO
            for i in range(warp_lane, used, WARP):
                weight = ptx.exp2_approx(stats[int32((part_rd + i * HEADS + h) * 2)] - highest)
                weight_s[i * HEADS + h] = weight
                total = float32(total + weight * stats[int32((part_rd + i * HEADS + h) * 2 + 1)])
            total = ptx.warp_sum(total)
            if warp_lane == 0:
                total_s[h] = total
        cuda.syncthreads()
        for i in range(tid, ITEMS, STRIDE):
            h = int32(i // D)
            x = ZERO
            for first in range(0, used, AHEAD):
                if i != tid or first > 0:
                    for j in range(AHEAD):
                        ahead_r[j] = ZERO
                        if first + j < used:
                            ahead_r[j] = partials[int32((part_rd + (first + j) * HEADS) * D + i)]
                for j in range(AHEAD):
                    if first + j < used:
                        x = float32(x + ahead_r[j] * weight_s[(first + j) * HEADS + h])
            out[int32(part * HEADS * D + i)] = x / total_s[h]
        if tid == 0:
            arrivals[part] = 0

    return attention


_FLOATS, _WORDS = types.CPointer(types.float32), types.CPointer(types.int32)
SIGNATURE = (
    *(_FLOATS, _FLOATS, _FLOATS, _WORDS, _WORDS, _WORDS),  # qkv, cos, sin, position, keys, values
    *(_FLOATS, _FLOATS, _WORDS, _FLOATS),  # partials, stats, arrivals, out
    *(types.int32, types.int32, types.int32),  # kv_heads, capacity, least
)


@cache
def attention_spec(
    arch: int, head_dim: int, group: int, long: bool = False, threads: int = 0, passes: int = 0
) -> KernelSpec:
    """The compiled form for a head size and group, for short or long contexts (any length works with either).

    `threads` and `passes` only for tests (0: this module's choice). Raises ValueError for an odd head size or one over
    256.
    """
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"attention takes even head sizes up to {MAX_HEAD_DIM}, not {head_dim}")
    if group < 1:
        raise ValueError(f"a key-value head serves at least one query head, not {group}")
    if long and arch >= attention_long.MIN_ARCH and head_dim <= attention_long.MAX_HEAD_DIM:
        heads, threads = heads_per_block(group, long), threads or attention_long.THREADS
        kernel = attention_long.make_long_attention(arch, head_dim, group, heads, threads)
        wide = 4 * -(-head_dim // attention_long.KEY_DIMS) + 8 * -(-head_dim // attention_long.VALUE_DIMS)
        return KernelSpec(
            f"attention_long[{head_dim}, {group}, {threads}]", kernel, SIGNATURE, threads, wide_loads=wide
        )
    _, default_threads, default_passes, blocks = LONG if long else SHORT
    heads, threads, passes = heads_per_block(group, long), threads or default_threads, passes or default_passes
    kernel = make_attention(arch, head_dim, group, heads, threads, passes)
    name = f"attention[{head_dim}, {group}, {heads}, {threads}, {passes}]"
    return KernelSpec(name, kernel, SIGNATURE, threads, blocks, wide_loads=4 * passes)


def attention_grid(num_sms: int, num_heads: int, kv_heads: int, long: bool = False) -> tuple[int, int]:
    """(splits, parts) of a launch: about one block for each SM."""
    parts = num_heads // heads_per_block(num_heads // kv_heads, long)
    return max(1, min(MAX_SPLITS, num_sms // parts)), parts


def attention_scratch(grid: tuple[int, int], num_heads: int, head_dim: int) -> tuple[int, int, int]:
    """Elements of (partials float32, stats float32, arrivals int32: zeroed once, the kernel leaves zeros)."""
    return grid[0] * num_heads * attention_long.partial_dims(head_dim), grid[0] * num_heads * 2, grid[1]


def attention(
    device: Device,
    qkv: DeviceArray,
    cos: DeviceArray,
    sin: DeviceArray,
    position: DeviceArray,
    keys: DeviceArray,
    values: DeviceArray,
    scratch: tuple[DeviceArray, DeviceArray, DeviceArray],
    out: DeviceArray,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    long: bool = False,
    least: int = 0,
    use_pdl: bool = True,
) -> Launch:
    """The launch for one layer's token: out = softmax(q . K / sqrt(head_dim)) . V over positions 0 .. position[0].

    qkv float32 [(num_heads + 2 * kv_heads) * head_dim]; cos, sin float32 [capacity, head_dim / 2]; position int32 [1];
    keys, values int32 [kv_heads, capacity, padded_head_dim / 2]: pairs of bfloat16, written at position[0]; scratch as
    `attention_scratch` says; out float32 [num_heads * head_dim]. `long` chooses the form for long contexts. A split has
    at least `least` tokens (0: this module's choice).
    Raises ValueError with the sizes if they do not fit together.
    """
    if num_heads % kv_heads:
        raise ValueError(f"{num_heads} heads cannot share {kv_heads} key-value heads evenly")
    spec = attention_spec(device.arch, head_dim, num_heads // kv_heads, long)
    grid = attention_grid(device.num_sms, num_heads, kv_heads, long)
    cache_words = kv_heads * capacity * padded_head_dim(head_dim) // 2
    sizes = {
        "qkv": (qkv, (num_heads + 2 * kv_heads) * head_dim),
        "cos": (cos, capacity * head_dim // 2),
        "sin": (sin, capacity * head_dim // 2),
        "keys": (keys, cache_words),
        "values": (values, cache_words),
        "out": (out, num_heads * head_dim),
    }
    for name, (array, size) in sizes.items():
        if array.size < size:
            raise ValueError(f"attention: {name} holds {array.size} elements, {size} are needed")
    for array, size in zip(scratch, attention_scratch(grid, num_heads, head_dim), strict=True):
        if array.size < size:
            raise ValueError(f"attention: scratch holds {array.size} elements, {size} are needed")
    if capacity < 1 or least < 0:
        raise ValueError(f"attention: a capacity of {capacity} tokens, or at least {least} a split, is none")
    least = least or (LEAST_TOKENS_LONG if long else MIN_SPLIT_TOKENS)
    arguments = (qkv, cos, sin, position, keys, values, *scratch, out, kv_heads, capacity, least)
    return device.launch(spec, grid, arguments, use_pdl)
