"""Attention of one token over its context: rotary embedding, append to the key-value cache, grouped-query attention.

One launch does all of it. The cache is bfloat16 (round to nearest even), everything else float32. What it reads is the
cache: 2 * kv_heads * position * head_dim * 2 bytes a layer (10.5 MB at 4096 tokens of 2B4T, 2.5 us at 4.27 TB/s).

    cache   [kv_heads, capacity, DP] twice (keys, values), DP = head_dim rounded up to 8, so that a lane loads 16 bytes
    grid    x: splits of the context        y: key-value heads (times parts of a group of more than 8 query heads)

    one block: a range of tokens of one key-value head, for all query heads that share it
    +- warp 0 ------------------+- warp 1 ---+- ...            a row of LANES lanes holds one token,
    | lanes 0-15  | lanes 16-31 |            |                 a lane 8 of its dimensions (DP = 128: 16 lanes)
    | token row 0 | token row 1 | row 2, 3   |
    | token row R | row R + 1   | ...        |                 R = ROWS, PASSES times: a tile of ROWS * PASSES tokens
    +---------------------------+------------+- ...

    1. loads of the first tile's keys and values are issued (before the previous kernel has ended: see below)
    2. q (and in split 0 the new k, v) are rotated into shared memory; split 0 stores k, v to the cache
    3. scores: each lane multiplies 8 dimensions for every head, then the lanes of a row add up, trading heads for
       lanes on the way (HEADS + 2 shuffles instead of 4 * HEADS for 16 lanes)
    4. a warp per head: maximum, exponentials, sum;  5. p * v into registers; next tile
    6. rows meet in shared memory; with one split this is the output, else the partial result is stored and the last
       block of the head to arrive (an integer counter) adds the splits up in their order: the same bits every time

How many splits work is decided by the position, read from device memory, so that one captured graph serves every step:
a split has at least `least` tokens, and blocks without tokens leave at once. The new token is handled by split 0 from
shared memory, not from the cache, so nothing waits for the store.

Order between kernels: cached tokens and `position` are read before `grid_wait`. That is safe because the end of a step
(of a graph) is waited for in full, and within a step nothing writes `position` or this layer's earlier tokens.

Tried: one block per (head, split) reads the cache once for each query head of a group, 4 times the bytes for 2B4T.
Separate kernels for rotation, attention and combination cost a launch gap each, about 1 us with early launch.
"""

from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels.device import Device, DeviceArray, Launch
from bitnet_numba.kernels.forms import KernelForm
from bitnet_numba.kernels.intrinsics import (
    SHARED_ALIGN,
    WARP,
    add_rn,
    atomic_fetch_add,
    bf16_high,
    bf16_low,
    bits_to_float,
    device_function,
    exp2_approx,
    fence,
    float32,
    float_to_bits,
    grid_release,
    grid_wait,
    int32,
    load4,
    mul_rn,
    prefetch_l2,
    shuffle_xor,
    store4,
    stream_load,
    uint32,
    warp_max,
    warp_sum,
)

# Threads, and tokens that each row of lanes holds at a time, for up to so many heads a block: one block fills a
# multiprocessor's registers (168 a thread at 384 threads). 7 * 24 rows = 168 tokens: 26 splits hold 4096 in one tile.
SHAPES = {4: (384, 7), 8: (256, 3)}
LANE_DIMS = 8  # bfloat16 numbers in a 16-byte load
MAX_HEADS = 8  # query heads of one block: 8 registers each for q, then for the output
MAX_HEAD_DIM = 256  # a row of 32 lanes
MAX_SPLITS = 128
LEAST_TOKENS = 128  # of a split: fewer do not pay for the combination, about 1 us
REDUCE_FLOATS = 8192  # shared memory in which the warps' outputs meet: 32 KB
AHEAD = 16  # partial results in flight when splits are added up
LOG2_E = np.log2(np.e)


def padded_head_dim(head_dim: int) -> int:
    """Dimensions of a token in the cache: head_dim rounded up to 16-byte loads."""
    return -(-head_dim // LANE_DIMS) * LANE_DIMS


def heads_per_block(group: int) -> int:
    """Query heads that one block serves: the largest divisor of the group that fits the registers."""
    return max(heads for heads in range(1, MAX_HEADS + 1) if group % heads == 0)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@device_function
def to_bf16(x: float) -> float:
    """float32 rounded to the nearest bfloat16, ties to even, as a float32; NaN stays NaN."""
    bits = float_to_bits(x)
    rounded = uint32(uint32(bits + uint32(0x7FFF) + (uint32(bits >> uint32(16)) & uint32(1))) & uint32(0xFFFF0000))
    return bits_to_float(rounded) if x == x else x


def make_attention(arch: int, head_dim: int, group: int, threads: int, passes: int) -> Callable[..., None]:
    """The kernel for a head size and a number of query heads per key-value head; `passes` tokens per row of lanes."""
    stream, wait, release = stream_load(arch), grid_wait(arch), grid_release(arch)
    D, DP, HALF, WORDS = head_dim, padded_head_dim(head_dim), head_dim // 2, padded_head_dim(head_dim) // 2
    HEADS = heads_per_block(group)
    PARTS = group // HEADS
    SLOTS = _power_of_two(HEADS)
    CHUNKS = DP // LANE_DIMS  # lanes of a row that hold dimensions
    LANES = max(_power_of_two(CHUNKS), SLOTS)
    ROWS, WARPS = threads // LANES, threads // WARP
    PASSES, TILE = passes, ROWS * passes
    STEP1, STEP2, STEP3 = SLOTS // 2, SLOTS // 4, SLOTS // 8
    PLAIN_STEPS = (LANES // SLOTS).bit_length() - 1
    ROW_STEPS = (WARP // LANES).bit_length() - 1
    SCALE = float32(D**-0.5 * LOG2_E)  # exponentials are taken to base 2
    LOWEST = float32(-np.inf)
    ROUND = max(n for n in range(1, HEADS + 1) if HEADS % n == 0 and (n == 1 or WARPS * n * DP <= REDUCE_FLOATS))
    ROUNDS = HEADS // ROUND
    Q_PAIRS = HEADS * HALF
    Q_FLOATS, KV_REGS, HEAD_REGS = HEADS * DP, PASSES * 4, HEADS * LANE_DIMS
    P_FLOATS = max(TILE + 1, MAX_SPLITS) * SLOTS
    SCORE_REGS = (PASSES + 1) * SLOTS
    NEW_FLOATS, SUM_FLOATS = 2 * DP, WARPS * ROUND * DP

    def attention(
        qkv, cos, sin, position, keys, values, partials, stats, arrivals, out, kv_heads, capacity, least
    ):  # fmt: skip
        q_s = cuda.shared.array(Q_FLOATS, float32, SHARED_ALIGN)  # [HEADS, DP] rotated and scaled
        new_s = cuda.shared.array(NEW_FLOATS, float32, SHARED_ALIGN)  # [2, DP] this token's key and value, as stored
        p_s = cuda.shared.array(P_FLOATS, float32, SHARED_ALIGN)  # [TILE + 1, SLOTS] scores, then exp(score - max)
        sum_s = cuda.shared.array(SUM_FLOATS, float32, SHARED_ALIGN)  # [WARPS, ROUND, DP]
        max_s = cuda.shared.array(SLOTS, float32)
        total_s = cuda.shared.array(SLOTS, float32)
        alpha_s = cuda.shared.array(SLOTS, float32)  # factor for what earlier tiles added up
        arrived_s = cuda.shared.array(1, uint32)
        q_r = cuda.local.array(HEAD_REGS, float32)
        k_r = cuda.local.array(KV_REGS, int32)
        v_r = cuda.local.array(KV_REGS, int32)
        s_r = cuda.local.array(SCORE_REGS, float32)
        acc_r = cuda.local.array(HEAD_REGS, float32)
        ahead_r = cuda.local.array(AHEAD, float32)

        tid = int32(cuda.threadIdx.x)
        warp, warp_lane = int32(tid // WARP), int32(tid % WARP)
        row, lane = int32(tid // LANES), int32(tid % LANES)
        # The head whose score this lane ends with, if lane < SLOTS.
        head = (lane & 1) * STEP1 + ((lane >> 1) & 1) * STEP2 + ((lane >> 2) & 1) * STEP3
        split, splits, part = int32(cuda.blockIdx.x), int32(cuda.gridDim.x), int32(cuda.blockIdx.y)
        kv = int32(part // PARTS)
        pos = int32(position[0])
        chunk = max(least, int32((pos + splits - 1) // splits))
        used = max(int32(1), int32((pos + chunk - 1) // chunk))
        if split >= used:
            return
        start = int32(split * chunk)
        end = min(int32(start + chunk), pos)
        left = int32(end - start - row)  # token n of this row exists if n * ROWS < left
        mine = left if lane < CHUNKS else int32(0)  # and this lane has dimensions of it
        kv_gl_rd = (kv * capacity + start + row) * WORDS + lane * 4  # int64: a cache may hold more than 2^31 words
        for n in range(PASSES):
            for j in range(4):
                k_r[4 * n + j] = int32(0)
            if n * ROWS < mine:
                a, b, c, d = stream(keys, kv_gl_rd + n * ROWS * WORDS)
                k_r[4 * n], k_r[4 * n + 1], k_r[4 * n + 2], k_r[4 * n + 3] = a, b, c, d
        for n in range(PASSES):
            if n * ROWS < mine:
                prefetch_l2(values, kv_gl_rd + n * ROWS * WORDS)

        wait()
        release()
        # Rotation: pairs of every q head; in split 0 also the new key's pairs and the new value.
        work = int32(Q_PAIRS)
        if split == 0:
            work = int32(Q_PAIRS + HALF + D)
        k_gl_rd = int32(cuda.gridDim.y * HEADS * D + kv * D)
        for i in range(tid, work, threads):
            if i < Q_PAIRS + HALF:
                h = int32(i // HALF)
                j = int32(i - h * HALF)
                at = int32((part * HEADS + h) * D + j) if i < Q_PAIRS else int32(k_gl_rd + j)
                x0, x1 = qkv[at], qkv[at + HALF]
                c, s = cos[pos * HALF + j], sin[pos * HALF + j]
                y0 = add_rn(mul_rn(x0, c), mul_rn(-x1, s))
                y1 = add_rn(mul_rn(x1, c), mul_rn(x0, s))
                if i < Q_PAIRS:
                    q_s[h * DP + j] = y0 * SCALE
                    q_s[h * DP + j + HALF] = y1 * SCALE
                else:
                    new_s[j] = to_bf16(y0)
                    new_s[j + HALF] = to_bf16(y1)
            else:
                j = int32(i - Q_PAIRS - HALF)
                new_s[DP + j] = to_bf16(qkv[k_gl_rd + kv_heads * D + j])
        for i in range(tid, (HEADS + 2) * (DP - D), threads):  # the padding
            h = int32(i // (DP - D))
            j = int32(D + i - h * (DP - D))
            if h < HEADS:
                q_s[h * DP + j] = float32(0)
            else:
                new_s[(h - HEADS) * DP + j] = float32(0)
        if tid < SLOTS:
            max_s[tid] = LOWEST
            total_s[tid] = float32(0)
        cuda.syncthreads()
        if split == 0 and part % PARTS == 0:
            kv_gl_wr = (kv * capacity + pos) * WORDS
            for i in range(tid, 2 * WORDS, threads):
                word = int32(
                    (float_to_bits(new_s[2 * i]) >> uint32(16)) | (float_to_bits(new_s[2 * i + 1]) & uint32(0xFFFF0000))
                )
                if i < WORDS:
                    keys[kv_gl_wr + i] = word
                else:
                    values[kv_gl_wr + i - WORDS] = word

        for i in range(HEAD_REGS):
            acc_r[i] = float32(0)
        p_rd = int32(row * SLOTS)
        p_wr = int32(row * SLOTS + head)
        q_rd = int32(lane * LANE_DIMS)
        fresh = split == 0  # the new token is still to be counted
        tile = start
        while True:
            for i in range(HEAD_REGS):
                q_r[i] = float32(0)
            if lane < CHUNKS:
                for h in range(HEADS):
                    for half in range(2):
                        a, b, c, d = load4(q_s, q_rd + (h * DP + half * 4))
                        q_r[h * LANE_DIMS + half * 4] = a
                        q_r[h * LANE_DIMS + half * 4 + 1] = b
                        q_r[h * LANE_DIMS + half * 4 + 2] = c
                        q_r[h * LANE_DIMS + half * 4 + 3] = d
            for i in range(SCORE_REGS):
                s_r[i] = float32(0)
            for n in range(PASSES):
                for h in range(HEADS):
                    for j in range(4):
                        s_r[n * SLOTS + h] += q_r[h * LANE_DIMS + 2 * j] * bf16_low(k_r[4 * n + j])
                        s_r[n * SLOTS + h] += q_r[h * LANE_DIMS + 2 * j + 1] * bf16_high(k_r[4 * n + j])
            if fresh and row == 0 and lane < CHUNKS:
                for h in range(HEADS):
                    for j in range(LANE_DIMS):
                        s_r[PASSES * SLOTS + h] += q_r[h * LANE_DIMS + j] * new_s[q_rd + j]
            for n in range(PASSES):
                for j in range(4):
                    v_r[4 * n + j] = int32(0)
                if n * ROWS < mine:
                    a, b, c, d = stream(values, kv_gl_rd + n * ROWS * WORDS)
                    v_r[4 * n], v_r[4 * n + 1], v_r[4 * n + 2], v_r[4 * n + 3] = a, b, c, d
            # Sums over the lanes of a row: each step, half of the heads stays and half is traded away.
            for n in range(PASSES + 1):
                for i in range(STEP1):
                    a, b = s_r[n * SLOTS + i], s_r[n * SLOTS + i + STEP1]
                    s_r[n * SLOTS + i] = (b if lane & 1 else a) + shuffle_xor(a if lane & 1 else b, 1)
            for n in range(PASSES + 1):
                for i in range(STEP2):
                    a, b = s_r[n * SLOTS + i], s_r[n * SLOTS + i + STEP2]
                    s_r[n * SLOTS + i] = (b if lane & 2 else a) + shuffle_xor(a if lane & 2 else b, 2)
            for n in range(PASSES + 1):
                for i in range(STEP3):
                    a, b = s_r[n * SLOTS + i], s_r[n * SLOTS + i + STEP3]
                    s_r[n * SLOTS + i] = (b if lane & 4 else a) + shuffle_xor(a if lane & 4 else b, 4)
            for n in range(PASSES + 1):
                for i in range(PLAIN_STEPS):
                    s_r[n * SLOTS] += shuffle_xor(s_r[n * SLOTS], SLOTS << i)
            for n in range(PASSES + 1):
                known = n * ROWS < left if n < PASSES else fresh
                if lane < SLOTS and (n < PASSES or row == 0):
                    p_s[p_wr + n * ROWS * SLOTS] = s_r[n * SLOTS] if known else LOWEST
            cuda.syncthreads()
            for h in range(warp, HEADS, WARPS):
                top = LOWEST
                for i in range(warp_lane, TILE + 1, WARP):
                    top = max(top, p_s[i * SLOTS + h])
                before = max_s[h]
                top = max(warp_max(top), before)
                total = float32(0)
                for i in range(warp_lane, TILE + 1, WARP):
                    weight = exp2_approx(p_s[i * SLOTS + h] - top)
                    p_s[i * SLOTS + h] = weight
                    total += weight
                total = warp_sum(total)
                if warp_lane == 0:
                    alpha = exp2_approx(before - top)
                    alpha_s[h] = alpha
                    max_s[h] = top
                    total_s[h] = total_s[h] * alpha + total
            cuda.syncthreads()
            for h in range(HEADS):
                alpha = alpha_s[h]
                for j in range(LANE_DIMS):
                    acc_r[h * LANE_DIMS + j] *= alpha
            for n in range(PASSES):
                for h in range(HEADS):
                    weight = p_s[p_rd + (n * ROWS * SLOTS + h)]
                    for j in range(4):
                        acc_r[h * LANE_DIMS + 2 * j] += weight * bf16_low(v_r[4 * n + j])
                        acc_r[h * LANE_DIMS + 2 * j + 1] += weight * bf16_high(v_r[4 * n + j])
            if fresh and row == 0 and lane < CHUNKS:
                for h in range(HEADS):
                    weight = p_s[TILE * SLOTS + h]
                    for j in range(LANE_DIMS):
                        acc_r[h * LANE_DIMS + j] += weight * new_s[q_rd + (DP + j)]
            fresh = False
            tile = int32(tile + TILE)
            if tile >= end:
                break
            kv_gl_rd += TILE * WORDS
            left = int32(left - TILE)
            mine = int32(mine - TILE)
            for n in range(PASSES):
                for j in range(4):
                    k_r[4 * n + j] = int32(0)
                if n * ROWS < mine:
                    a, b, c, d = stream(keys, kv_gl_rd + n * ROWS * WORDS)
                    k_r[4 * n], k_r[4 * n + 1], k_r[4 * n + 2], k_r[4 * n + 3] = a, b, c, d
            for n in range(PASSES):
                if n * ROWS < mine:
                    prefetch_l2(values, kv_gl_rd + n * ROWS * WORDS)
            cuda.syncthreads()

        for step in range(ROW_STEPS):
            for i in range(HEAD_REGS):
                acc_r[i] += shuffle_xor(acc_r[i], LANES << step)
        sum_wr = int32(warp * (ROUND * DP) + warp_lane * LANE_DIMS)
        part_wr = (part * splits + split) * HEADS
        for r in range(ROUNDS):
            if warp_lane < CHUNKS:
                for h in range(ROUND):
                    for half in range(2):
                        i = (r * ROUND + h) * LANE_DIMS + half * 4
                        store4(sum_s, sum_wr + (h * DP + half * 4), acc_r[i], acc_r[i + 1], acc_r[i + 2], acc_r[i + 3])
            cuda.syncthreads()
            for i in range(tid, ROUND * D, threads):
                h = int32(i // D)
                d = int32(i - h * D)
                total = float32(0)
                for w in range(WARPS):
                    total += sum_s[(w * ROUND + h) * DP + d]
                h = int32(r * ROUND + h)
                if used == 1:
                    out[(part * HEADS + h) * D + d] = total / total_s[h]
                else:
                    partials[(part_wr + h) * D + d] = total
            cuda.syncthreads()
        if used == 1:
            return

        if tid < HEADS:
            stats[(part_wr + tid) * 2] = max_s[tid]
            stats[(part_wr + tid) * 2 + 1] = total_s[tid]
        cuda.syncthreads()
        if tid == 0:
            fence()
            arrived_s[0] = atomic_fetch_add(arrivals, part, uint32(1))
            fence()
        cuda.syncthreads()
        if arrived_s[0] != uint32(used - 1):
            return
        # The last block of this head: every split's partial result is there.
        part_rd = part * splits * HEADS
        for h in range(warp, HEADS, WARPS):
            top = LOWEST
            for i in range(warp_lane, used, WARP):
                top = max(top, stats[(part_rd + i * HEADS + h) * 2])
            top = warp_max(top)
            total = float32(0)
            for i in range(warp_lane, used, WARP):
                weight = exp2_approx(stats[(part_rd + i * HEADS + h) * 2] - top)
                p_s[i * SLOTS + h] = weight
                total += weight * stats[(part_rd + i * HEADS + h) * 2 + 1]
            total = warp_sum(total)
            if warp_lane == 0:
                total_s[h] = total
        cuda.syncthreads()
        for i in range(tid, HEADS * D, threads):
            h = int32(i // D)
            total = float32(0)
            for first in range(0, used, AHEAD):
                for j in range(AHEAD):
                    ahead_r[j] = float32(0)
                    if first + j < used:
                        ahead_r[j] = partials[part_rd * D + (first + j) * HEADS * D + i]
                for j in range(AHEAD):
                    if first + j < used:
                        total += ahead_r[j] * p_s[(first + j) * SLOTS + h]
            out[part * HEADS * D + i] = total / total_s[h]
        if tid == 0:
            arrivals[part] = 0

    return attention


_FLOATS, _WORDS = types.CPointer(types.float32), types.CPointer(types.int32)
SIGNATURE = (
    *(_FLOATS, _FLOATS, _FLOATS, _WORDS, _WORDS, _WORDS),  # qkv, cos, sin, position, keys, values
    *(_FLOATS, _FLOATS, _WORDS, _FLOATS),  # partials, stats, arrivals, out
    *(types.int32, types.int32, types.int32),  # kv_heads, capacity, least
)


def attention_form(arch: int, head_dim: int, group: int, threads: int = 0, passes: int = 0) -> KernelForm:
    """The compiled form for a head size and group; `threads` and `passes` only for tests (0: this module's choice).

    Raises ValueError for an odd head size or one over 256.
    """
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"attention takes even head sizes up to {MAX_HEAD_DIM}, not {head_dim}")
    if group < 1:
        raise ValueError(f"a key-value head serves at least one query head, not {group}")
    default_threads, default_passes = next(shape for heads, shape in SHAPES.items() if heads_per_block(group) <= heads)
    threads, passes = threads or default_threads, passes or default_passes
    kernel = make_attention(arch, head_dim, group, threads, passes)
    name = f"attention[{head_dim}, {group}, {threads}, {passes}]"
    return KernelForm(name, kernel, SIGNATURE, threads, wide_loads=3 * passes)


def attention_grid(multiprocessors: int, num_heads: int, kv_heads: int) -> tuple[int, int]:
    """(splits, parts) of a launch: about one block for each multiprocessor."""
    parts = num_heads // heads_per_block(num_heads // kv_heads)
    return max(1, min(MAX_SPLITS, multiprocessors // parts)), parts


def attention_scratch(grid: tuple[int, int], num_heads: int, head_dim: int) -> tuple[int, int, int]:
    """Elements of (partials float32, stats float32, arrivals int32: zeroed once, the kernel leaves zeros)."""
    return grid[0] * num_heads * head_dim, grid[0] * num_heads * 2, grid[1]


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
    least: int = LEAST_TOKENS,
    overlap: bool = True,
) -> Launch:
    """The launch for one layer's token: out = softmax(q . K / sqrt(head_dim)) . V over positions 0 .. position[0].

    qkv float32 [(num_heads + 2 * kv_heads) * head_dim]; cos, sin float32 [capacity, head_dim / 2]; position int32 [1];
    keys, values int32 [kv_heads, capacity, padded_head_dim / 2]: pairs of bfloat16, written at position[0]; scratch as
    `attention_scratch` says; out float32 [num_heads * head_dim]. `least` tokens are given to a split.
    Raises ValueError with the sizes if they do not fit together.
    """
    if num_heads % kv_heads:
        raise ValueError(f"{num_heads} heads cannot share {kv_heads} key-value heads evenly")
    form = attention_form(device.arch, head_dim, num_heads // kv_heads)
    grid = attention_grid(device.multiprocessors, num_heads, kv_heads)
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
    if capacity < 1 or least < 1:
        raise ValueError(f"attention: capacity {capacity} and least {least} must be at least 1")
    arguments = (qkv, cos, sin, position, keys, values, *scratch, out, kv_heads, capacity, least)
    return Launch(form, grid, arguments, device, overlap)


def forms(arch: int) -> list[KernelForm]:
    """Forms of 2B4T and of every other branch: padding, idle lanes, one head, many heads, a whole warp a row."""
    shapes = [(128, 4), (64, 4), (96, 1), (100, 1), (256, 2), (256, 3), (128, 8), (8, 4), (128, 16)]
    return [attention_form(arch, head_dim, group) for head_dim, group in shapes]
