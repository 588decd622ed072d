"""Attention of a batched decode pass: one new token in each of many sequences, over a cache of pages.

Row b is one token, of slot where[b, 0] at position where[b, 1]. Its key and value come with its query, and are put into
the cache here, to the bit as `append` in kv_cache.py would: that spares a launch a layer. One block serves a row and a
key-value head with all query heads that share it (in parts of four), so that the cache is read once. What is read is
the cache: 84 MB a layer for 128 rows of 256 tokens of 2B4T, 20 us at 4.2 TB/s.

    grid       x: one entry of `work`, a row and splits of its tokens        y: part of the query heads
    strand v   groups of 16 tokens v, v + 16, ... of a split, v = 0 .. 15; a warp takes strands w, w + W, ..., one
               after the other                   lane: g = lane / 4, c = lane % 4

    scores [16 rows, 8 tokens] += q [16, 16 dims] . k [16 dims, 8 tokens]      lane: token g, dims 8c .. 8c + 7 of 32
        as in attention_long.py: rows are the three bfloat16 terms of four heads; lanes g and g + 4 end up with the
        scores of head g % 4, tokens 2c and 2c + 1
    out [16 dims, 8 columns] += v [16 dims, 16 tokens] . p [16 tokens, 8 columns]      tokens 2c, 2c + 1, 2c + 8, 2c + 9
        columns 0 .. 3 are the first terms of four heads' p, 4 .. 7 the second; a second product adds the third to
        columns 0 .. 3. So the sums take 32 registers, half of what p as the left operand takes, and loads of the next
        keys and values have 64.

The row's own token t is in no cache yet when the cache is read. Every block of the row makes it in shared memory:

    qkv   q 0 | q 1 | ...            | k | v            loaded together, one trip to L2
          rotated, scaled            | rotated |
          q_s, left operands         | own_s [2, words]     bfloat16 --> cache, by the first block of a row's kv head
                                        |
                                     registers of the lanes that hold token t % 16 of the row's last group, whenever
                                     a warp comes to that group

Results do not depend on the batch, to the bit: a row of n tokens has splits of max(512, n / 32 rounded up to 64)
tokens, a split 16 strands, each with its own running maximum and sums, and these are added up in their order, whichever
warp had them. So the number of warps a block is free: many for few rows (each has one group of a short context: all
loads are under way at once), two for many rows (five blocks share a SM; loads of one hide behind the
products of another). So is the number of blocks that share a row's part: block x of n takes splits x, x + n, ..., and
the last of them to arrive (an integer counter, left zero) adds up the splits. `work` says which row and x and n a block
has, so that one long row among many short ones does not give blocks to all of them.

Order between kernels: `work`, `where`, the table and a row's earlier tokens are read before `pdl_wait`; afterwards
`where` is read again, past L1, and if it has changed all is loaded again. `qkv` is read afterwards. Then own tokens are
stored, each by one block, in places that no block of the launch reads for its result: whoever reads them is a later
launch, and waits for the end of this one. All that asks that earlier tokens were written by an earlier pass: a slot has
one row at most, pages that slots share are full, and passes are graphs, which wait for the end of what was enqueued
before; and that no launch of the pass writes the table or `work`.

Measured (H200, 2B4T, us a launch in a graph of a step's thirty, cold cache, rows of 257 tokens): 5.6 for 8 rows, 11.4
for 32, 25.5 for 128, which is 3.3 TB/s. Few rows: a chain of latencies (where, table, cache, products, strands).
docs/performance-notes.md has what was tried.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.decode import heads_per_block
from bitnet_numba.kernels.attention.decode_mma import (
    GROUP_TOKENS,
    KEY_DIMS,
    LOG2_E,
    LOWER,
    MAX_HEAD_DIM,
    MIN_ARCH,
    SLOTS,
    UPPER,
    VALUE_DIMS,
    partial_dims,
    store_query,
)
from bitnet_numba.kernels.attention.kv_cache import (
    CACHE_SIGNATURE,
    PAGE,
    LayerCache,
    cache_arguments,
    check_sizes,
    rotate_pair,
    stored_word,
    token_words,
)
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec

STRANDS = 16  # of a split: see above
MIN_SPLIT_TOKENS = 512  # of a split; splitting costs about 2 us
MAX_SPLITS = 32
SPLIT_STEP = 64  # tokens that a long row's splits are a multiple of
AHEAD = 8  # partial results that a thread has in flight
ROW_BITS = 12  # of an entry of `work`: the row; then 8 bits each for which block of the row it is, and of how many
MAX_ROWS = 1 << ROW_BITS


def fits(arch: int, head_dim: int) -> bool:
    """Whether this kernel takes the head size on the architecture; where not, there is attention_rows."""
    return arch >= MIN_ARCH and head_dim % 2 == 0 and 2 <= head_dim <= MAX_HEAD_DIM


def splits_needed(tokens: int) -> int:
    """Splits that a row of so many tokens (its own included) has."""
    chunk = max(MIN_SPLIT_TOKENS, -(-tokens // (MAX_SPLITS * SPLIT_STEP)) * SPLIT_STEP)
    return -(-tokens // chunk)


def most_splits(max_tokens: int) -> int:
    """Splits that rows of up to so many tokens have at most."""
    return min(MAX_SPLITS, -(-max_tokens // MIN_SPLIT_TOKENS))


def work_entries(blocks: Sequence[int]) -> list[int]:
    """`work` for a launch in which blocks[b] blocks (up to 255; 0: none) share each part of row b, int32. Rows of many
    come first, since they are likely to take longest."""
    order = sorted(range(len(blocks)), key=lambda row: -blocks[row])
    return [row | x << ROW_BITS | blocks[row] << ROW_BITS + 8 for row in order for x in range(blocks[row])]


@device_function
def _after(group: int, start: int, end: int, next_first: int, warps: int) -> int:
    """The group that a warp takes after `group` of the split start .. end - 1."""
    following = int32(group + STRANDS)
    if following >= end:
        strand = int32(((group - start) & (STRANDS - 1)) + warps)
        following = int32(start + strand)
        if strand >= STRANDS or following >= end:
            following = int32(next_first)
    return following


def make_attention_batch(
    arch: int, head_dim: int, group: int, heads: int, threads: int, least: int = MIN_SPLIT_TOKENS
) -> Callable[..., None]:
    """The kernel for a head size and a number of query heads per key-value head, `heads` (at most SLOTS, a divisor) of
    them a block. `least` tokens of a split (a multiple of 64) other than this module's only in tests."""
    stream, wait, release = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    mma, pack = ptx.mma_bf16, ptx.pack_bf16x2
    D, HALF = head_dim, head_dim // 2
    WORDS = token_words(D)
    HEADS = heads
    PARTS = group // HEADS
    WARPS = threads // WARP
    if STRANDS % WARPS:
        raise ValueError(f"{STRANDS} strands cannot be shared by {WARPS} warps evenly")
    L, Q = -(-D // KEY_DIMS), -(-D // VALUE_DIMS)  # 16-byte loads of each lane for a token's key, and for its value
    DP = VALUE_DIMS * Q  # dimensions with padding, in shared memory and in partial results
    WHOLE = 2 * WORDS == KEY_DIMS * L and 2 * WORDS == DP  # every lane of every load has dimensions
    K_REGS, V_REGS, O_REGS = 8 * L, 16 * Q, 16 * Q
    VECTORS = SLOTS + 2  # made before the scores: queries, the row's own key, its own value
    Q_WORDS, VECTOR_TURNS = 2 * L * WARP * 4, -(-VECTORS * DP // 2 // threads)
    ROTATIONS, PADS = -(-VECTORS * HALF // threads), VECTORS * (DP - D)
    ANGLES = 1 if threads % HALF == 0 else ROTATIONS  # that a thread meets
    STRIDE = DP + 4  # keeps the heads' sums in different banks
    SUMS, STATS = STRANDS * SLOTS * STRIDE, STRANDS * SLOTS
    AHEAD_REGS, X_REGS = 4 * AHEAD, 2 * ROTATIONS
    HEAD_TURNS, OUTPUTS = -(-HEADS // WARPS), -(-HEADS * DP // 4 // threads)
    LEAST_GROUPS, STEP_GROUPS = least // GROUP_TOKENS, SPLIT_STEP // GROUP_TOKENS
    STEP_SHIFT = (MAX_SPLITS * SPLIT_STEP).bit_length() - 1
    PAGE_GROUPS, PAGE_SHIFT = PAGE // GROUP_TOKENS, (PAGE // GROUP_TOKENS).bit_length() - 1
    SCALE = float32(D**-0.5 * LOG2_E)  # exponentials are taken to base 2
    LOWEST, ZERO, ONE = float32(-np.inf), float32(0), float32(1)

    @device_function
    def load_keys(k_r, keys, at, left, g, c):
        """A lane's keys of a group, the first at word `at`: of tokens g and g + 8, zeros from token `left` on."""
        for i in range(L):
            for t in range(2):
                n = 8 * i + 4 * t
                k_r[n] = k_r[n + 1] = k_r[n + 2] = k_r[n + 3] = int32(0)
                if int32(g + 8 * t) < left and (WHOLE or 16 * i + 4 * c < WORDS):
                    rd = at + (8 * t * WORDS + 16 * i)
                    k_r[n], k_r[n + 1], k_r[n + 2], k_r[n + 3] = stream(keys, rd)

    @device_function
    def load_values(v_r, values, at, left, g, c):
        """Values likewise: of tokens 2c, 2c + 1, 2c + 8 and 2c + 9."""
        for i in range(Q):
            for t in range(4):
                n = 16 * i + 4 * t
                to = (t & 1) + 4 * (t & 2)
                v_r[n] = v_r[n + 1] = v_r[n + 2] = v_r[n + 3] = int32(0)
                if int32(2 * c + to) < left and (WHOLE or 32 * i + 4 * g < WORDS):
                    rd = at + (to * WORDS + 32 * i)
                    v_r[n], v_r[n + 1], v_r[n + 2], v_r[n + 3] = stream(values, rd)

    @device_function
    def own_key(k_r, own_s, own, g, c):
        """Puts the row's own key, token `own` of its group, into its lanes' registers."""
        for i in range(L):
            for t in range(2):
                n = 8 * i + 4 * t
                if int32(g + 8 * t) == own:
                    k_r[n], k_r[n + 1], k_r[n + 2], k_r[n + 3] = ptx.load4(own_s, 16 * i + 4 * c)

    @device_function
    def own_value(v_r, own_s, own, g, c):
        """The row's own value likewise."""
        for i in range(Q):
            for t in range(4):
                n = 16 * i + 4 * t
                if int32(2 * c + (t & 1) + 4 * (t & 2)) == own:
                    v_r[n], v_r[n + 1], v_r[n + 2], v_r[n + 3] = ptx.load4(own_s, DP // 2 + 32 * i + 4 * g)

    def attention_batch(
        qkv, cos, sin, where, table, table_stride, keys, values, page_words, head_words, partials, stats, arrivals, out,
        work, kv_heads, room, slots, tokens_most, cache_words
    ):  # fmt: skip
        q_s = ptx.pointer(cuda.shared.array(Q_WORDS, int32, SHARED_ALIGN))  # left operands: [steps, lane, 4 registers]
        # [STRANDS, SLOTS, STRIDE]; at first queries and own vectors, at last the splits' weights
        sum_s = ptx.pointer(cuda.shared.array(SUMS, float32, SHARED_ALIGN))
        own_s = ptx.pointer(cuda.shared.array(DP, int32, SHARED_ALIGN))  # [2, DP / 2]: own key and value, as stored
        max_s = ptx.pointer(cuda.shared.array(STATS, float32))  # [STRANDS, SLOTS]; then the strands' weights
        total_s = ptx.pointer(cuda.shared.array(STATS, float32))
        whole_s = ptx.pointer(cuda.shared.array(SLOTS, float32))
        arrived_s = ptx.pointer(cuda.shared.array(1, int32))
        k_r = cuda.local.array(K_REGS, int32)
        v_r = cuda.local.array(V_REGS, int32)
        o_r = cuda.local.array(O_REGS, float32)
        ahead_r = cuda.local.array(AHEAD_REGS, float32)
        cos_r = cuda.local.array(ANGLES, float32)
        sin_r = cuda.local.array(ANGLES, float32)
        x_r = cuda.local.array(X_REGS, float32)

        release()
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid >> 5), int32(tid & 31)
        g, c = int32(lane >> 2), int32(lane & 3)
        entry = work[cuda.blockIdx.x]
        if entry < 0:
            return
        # How many blocks the row has is read again where it is used: no register is left to keep it in.
        row, split = int32(entry & MAX_ROWS - 1), int32(entry >> ROW_BITS & 255)
        part = int32(cuda.blockIdx.y)
        kv = part if PARTS == 1 else ptx.udiv(part, int32(PARTS))
        index = int32(row * kv_heads * PARTS + part)
        base = int32(kv * head_words)
        k_lane, v_lane = int32(g * WORDS + c * 4), int32(2 * c * WORDS + g * 4)

        # The first turn begins before the launches before this one have ended. It takes `where` as it is then, perhaps
        # of an earlier pass: any numbers that are in range do, for if they turn out otherwise there is a second turn.
        # Nobody writes tokens before the row's own, and that one is never loaded.
        while True:
            slot, pos = ptx.load2_l2(where, 2 * row)
            known = slot >= 0 and slot < slots and pos >= 0 and pos < tokens_most
            groups = int32((pos >> 4) + 1) if known else int32(0)
            chunk = max(int32(LEAST_GROUPS), int32(((pos >> STEP_SHIFT) + 1) * STEP_GROUPS))
            start = int32(split * chunk)
            end = min(int32(start + chunk), groups)
            current = int32(start + warp)
            pages = int32(slot * table_stride)
            if current < end:
                page = int64(table[pages + (current >> PAGE_SHIFT)])
                at = page * page_words + base
                if page < 0 or at + PAGE * WORDS > cache_words:
                    at = base
                at += (current & (PAGE_GROUPS - 1)) * (GROUP_TOKENS * WORDS)
                left = int32(pos - current * GROUP_TOKENS)  # tokens t < left exist, t counted from the group's first
                load_keys(k_r, keys, at + k_lane, left, g, c)
                load_values(v_r, values, at + v_lane, left, g, c)
            for n in range(ANGLES):
                i = int32(tid + n * threads)
                j = int32(i - ptx.udiv(i, int32(HALF)) * HALF)
                cos_r[n] = sin_r[n] = ZERO
                if start < end:
                    cos_r[n], sin_r[n] = cos[int64(pos) * HALF + j], sin[int64(pos) * HALF + j]
            wait()
            slot_now, pos_now = ptx.load2_l2(where, 2 * row)
            if start < end:
                row_rd = int32(row * kv_heads * (group + 2))
                q_rd, k_rd = int32((row_rd + part * HEADS) * D), int32((row_rd + kv_heads * group + kv) * D)
                for n in range(ROTATIONS):  # no branches: every load is under way before the first is waited for
                    i = int32(tid + n * threads)
                    h = ptx.udiv(i, int32(HALF))
                    rd = int32(q_rd + (h if HEADS == SLOTS else min(h, int32(HEADS - 1))) * D)
                    if h >= SLOTS:
                        rd = k_rd if h == SLOTS else int32(k_rd + kv_heads * D)
                    rd = int32(rd + i - h * HALF)
                    x_r[2 * n], x_r[2 * n + 1] = qkv[rd], qkv[rd + HALF]
                for n in range(ROTATIONS):  # queries, rotated and scaled; own key, rotated; own value
                    i = int32(tid + n * threads)
                    h = ptx.udiv(i, int32(HALF))
                    j = int32(i - h * HALF)
                    x0, x1 = x_r[2 * n], x_r[2 * n + 1]
                    y0, y1 = rotate_pair(x0, x1, cos_r[n % ANGLES], sin_r[n % ANGLES])
                    if h < SLOTS:
                        y0, y1 = ptx.mul_rn(y0, SCALE), ptx.mul_rn(y1, SCALE)
                    elif h > SLOTS:
                        y0, y1 = x0, x1
                    if h < VECTORS:
                        sum_s[h * DP + j], sum_s[h * DP + HALF + j] = y0, y1
            if slot == slot_now and pos == pos_now:
                break
        if start >= end:
            return
        used = ptx.udiv(int32(groups + chunk - 1), chunk)
        # Of the blocks that have this key and value, the row's first stores them.
        stores = split == 0 and (PARTS == 1 or part == kv * PARTS)
        own_page = int32(0)
        if stores:
            own_page = int32(table[pages + ((groups - 1) >> PAGE_SHIFT)])

        # The queries as left operands, the key and value as bfloat16.
        if DP > D:
            for i in range(tid, PADS, threads):
                h = int32(i // (DP - D))
                sum_s[h * DP + D + i - h * (DP - D)] = ZERO
        cuda.syncthreads()
        for n in range(VECTOR_TURNS):
            i = int32(tid + n * threads)
            h = ptx.udiv(i, int32(DP // 2))
            word = int32(i - h * (DP // 2))
            if h < SLOTS:
                if word < 16 * L:
                    store_query(q_s, h, word, sum_s[h * DP + 2 * word], sum_s[h * DP + 2 * word + 1])
            elif h < VECTORS:
                stored = stored_word(sum_s[h * DP + 2 * word], sum_s[h * DP + 2 * word + 1])
                own_s[(h - SLOTS) * (DP // 2) + word] = stored
                if stores and (WHOLE or word < WORDS):
                    wr = int64(own_page) * page_words + base + ((pos & (PAGE - 1)) * WORDS + word)
                    if h == SLOTS:
                        keys[wr] = stored
                    else:
                        values[wr] = stored
        cuda.syncthreads()

        while split < used:
            start = int32(split * chunk)
            end = min(int32(start + chunk), groups)
            split_after = int32(split + (work[cuda.blockIdx.x] >> ROW_BITS + 8))
            # A warp's first group of the next split; of splits, only a row's last can have warps without a group.
            next_first = int32(split_after * chunk + warp) if split_after < used else groups
            top, total, fresh = LOWEST, ZERO, True
            for i in range(O_REGS):
                o_r[i] = ZERO
            while current < end:
                # The group after this one: of the same strand; after its last, of this warp's next strand or split.
                following = _after(current, start, end, next_first, WARPS)
                page = int32(0)
                if following < groups:
                    page = int32(table[pages + (following >> PAGE_SHIFT)])
                ahead = int32(pos - following * GROUP_TOKENS)
                last, own = int32(current + 1) == groups, int32(pos & (GROUP_TOKENS - 1))
                if last:
                    own_key(k_r, own_s, own, g, c)
                s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = ZERO
                for i in range(L):
                    for j in range(2):
                        a0, a1, a2, a3 = ptx.load4(q_s, lane * 4 + (2 * i + j) * WARP * 4)
                        n = 8 * i + 2 * j
                        s0, s1, s2, s3 = mma(a0, a1, a2, a3, k_r[n], k_r[n + 1], s0, s1, s2, s3)
                        t0, t1, t2, t3 = mma(a0, a1, a2, a3, k_r[n + 4], k_r[n + 5], t0, t1, t2, t3)
                at = int64(page) * page_words + base + (following & (PAGE_GROUPS - 1)) * (GROUP_TOKENS * WORDS)
                if following < groups:
                    load_keys(k_r, keys, at + k_lane, ahead, g, c)
                # The three terms' rows add up to the scores of head g % 4: tokens 2c, 2c + 1, 2c + 8, 2c + 9.
                s0, s1, t0, t1 = s0 + s2, s1 + s3, t0 + t2, t1 + t3
                s0 += ptx.shuffle_xor(s0, 16)
                s1 += ptx.shuffle_xor(s1, 16)
                t0 += ptx.shuffle_xor(t0, 16)
                t1 += ptx.shuffle_xor(t1, 16)
                if last:
                    s0 = s0 if int32(2 * c) <= own else LOWEST
                    s1 = s1 if int32(2 * c + 1) <= own else LOWEST
                    t0 = t0 if int32(2 * c + 8) <= own else LOWEST
                    t1 = t1 if int32(2 * c + 9) <= own else LOWEST
                before = top
                top = max(top, max(max(s0, s1), max(t0, t1)))
                top = max(top, ptx.shuffle_xor(top, 1))
                top = max(top, ptx.shuffle_xor(top, 2))
                alpha = ptx.exp2_approx(before - top)
                s0, s1 = ptx.exp2_approx(s0 - top), ptx.exp2_approx(s1 - top)
                t0, t1 = ptx.exp2_approx(t0 - top), ptx.exp2_approx(t1 - top)
                total = total * alpha + ((s0 + s1) + (t0 + t1))
                p0, p1 = pack(s0, s1), pack(t0, t1)  # first terms
                s0, s1, t0, t1 = (
                    s0 - ptx.bf16_low(p0),
                    s1 - ptx.bf16_high(p0),
                    t0 - ptx.bf16_low(p1),
                    t1 - ptx.bf16_high(p1),
                )
                p2, p3 = pack(s0, s1), pack(t0, t1)  # second
                p4 = pack(s0 - ptx.bf16_low(p2), s1 - ptx.bf16_high(p2))  # third
                p5 = pack(t0 - ptx.bf16_low(p3), t1 - ptx.bf16_high(p3))
                if g >= SLOTS:
                    p0, p1, p4, p5 = p2, p3, int32(0), int32(0)
                if not fresh:  # columns 2c and 2c + 1 are heads 2c % 4 and 2c % 4 + 1
                    even, odd = ptx.shuffle(alpha, (c & 1) * 8), ptx.shuffle(alpha, (c & 1) * 8 + 4)
                    for i in range(0, O_REGS, 2):
                        o_r[i], o_r[i + 1] = o_r[i] * even, o_r[i + 1] * odd
                if last:
                    own_value(v_r, own_s, own, g, c)
                for i in range(Q):
                    for j in range(4):  # dimensions 64i + 8g + 2j and, in rows 8 .. 15, the one after
                        v, n = 16 * i + j, 4 * (4 * i + j)
                        a0 = int32(ptx.byte_permute(v_r[v], v_r[v + 4], LOWER))
                        a1 = int32(ptx.byte_permute(v_r[v], v_r[v + 4], UPPER))
                        a2 = int32(ptx.byte_permute(v_r[v + 8], v_r[v + 12], LOWER))
                        a3 = int32(ptx.byte_permute(v_r[v + 8], v_r[v + 12], UPPER))
                        o0, o1, o2, o3 = o_r[n], o_r[n + 1], o_r[n + 2], o_r[n + 3]
                        o0, o1, o2, o3 = mma(a0, a1, a2, a3, p0, p1, o0, o1, o2, o3)
                        o0, o1, o2, o3 = mma(a0, a1, a2, a3, p4, p5, o0, o1, o2, o3)
                        o_r[n], o_r[n + 1], o_r[n + 2], o_r[n + 3] = o0, o1, o2, o3
                if following < groups:
                    load_values(v_r, values, at + v_lane, ahead, g, c)
                fresh = int32(current + STRANDS) >= end
                if fresh:
                    strand = warp if WARPS == STRANDS else int32((current - start) & (STRANDS - 1))
                    # The strand's result. Lanes c and c + 2 have the terms of the same two heads: each adds up one.
                    total += ptx.shuffle_xor(total, 1)
                    total += ptx.shuffle_xor(total, 2)
                    if c == 0 and g < SLOTS:
                        max_s[strand * SLOTS + g] = top
                        total_s[strand * SLOTS + g] = total
                    to = (strand * SLOTS + (c & 1) * 2 + (c >> 1)) * STRIDE + 8 * g
                    upper = c >= 2
                    for i in range(4 * Q):  # two neighbouring dimensions
                        n = 4 * i
                        o0, o1, o2, o3 = o_r[n], o_r[n + 1], o_r[n + 2], o_r[n + 3]
                        o_r[2 * i] = (o1 if upper else o0) + ptx.shuffle_xor(o0 if upper else o1, 2)
                        o_r[2 * i + 1] = (o3 if upper else o2) + ptx.shuffle_xor(o2 if upper else o3, 2)
                    for i in range(2 * Q):
                        wr = to + (i // 2 * VALUE_DIMS + i % 2 * 4)
                        ptx.store4(sum_s, wr, o_r[4 * i], o_r[4 * i + 1], o_r[4 * i + 2], o_r[4 * i + 3])
                    top, total = LOWEST, ZERO
                    for i in range(O_REGS):
                        o_r[i] = ZERO
                current = following

            # The strands meet.
            cuda.syncthreads()
            strands = min(int32(end - start), int32(STRANDS))
            split_wr = (int64(index) * room + split) * HEADS
            for n in range(HEAD_TURNS):
                h = int32(warp + n * WARPS)
                if h < HEADS:
                    top = max_s[lane * SLOTS + h] if lane < strands else LOWEST
                    total = total_s[lane * SLOTS + h] if lane < strands else ZERO
                    largest = ptx.warp_max(top)
                    weight = ptx.exp2_approx(top - largest)
                    total = ptx.warp_sum(ptx.mul_rn(weight, total))
                    if lane < strands:
                        max_s[lane * SLOTS + h] = weight
                    if lane == 0:
                        whole_s[h] = total
                        if used > 1:
                            stats[(split_wr + h) * 2] = largest
                            stats[(split_wr + h) * 2 + 1] = total
            cuda.syncthreads()
            for n in range(OUTPUTS):
                i = int32(tid + n * threads)
                h = ptx.udiv(i, int32(DP // 4))
                d = int32((i - h * (DP // 4)) * 4)
                if h < HEADS:
                    b0 = b1 = b2 = b3 = ZERO
                    for s in range(strands):
                        weight = max_s[s * SLOTS + h]
                        x0, x1, x2, x3 = ptx.load4(sum_s, (s * SLOTS + h) * STRIDE + d)
                        b0, b1, b2, b3 = b0 + weight * x0, b1 + weight * x1, b2 + weight * x2, b3 + weight * x3
                    if used > 1:
                        ptx.store4(partials, (split_wr + h) * DP + d, b0, b1, b2, b3)
                    else:
                        inverse = ptx.div_rn(ONE, whole_s[h])
                        wr = (row * (kv_heads * group) + part * HEADS + h) * D + d
                        for k in range(4):
                            if d + k < D:
                                out[wr + k] = (b0 if k == 0 else b1 if k == 1 else b2 if k == 2 else b3) * inverse
            split = split_after
            if split < used:
                cuda.syncthreads()
        if used == 1:
            return

        cuda.syncthreads()
        if tid == 0:
            arrived_s[0] = int32(ptx.atomic_fetch_add_ordered(arrivals, index, uint32(1)))
        cuda.syncthreads()
        if arrived_s[0] != min(used, int32(work[cuda.blockIdx.x] >> ROW_BITS + 8)) - 1:
            return
        # The last block of this row's part: every split's partial result is there.
        part_rd = int64(index) * room * HEADS
        for n in range(HEAD_TURNS):
            h = int32(warp + n * WARPS)
            if h < HEADS:
                top, total = LOWEST, ZERO
                if lane < used:
                    top = stats[(part_rd + lane * HEADS + h) * 2]
                    total = stats[(part_rd + lane * HEADS + h) * 2 + 1]
                largest = ptx.warp_max(top)
                weight = ptx.exp2_approx(top - largest)
                sum_s[lane * SLOTS + h] = weight
                total = ptx.warp_sum(ptx.mul_rn(weight, total))
                if lane == 0:
                    whole_s[h] = total
        cuda.syncthreads()
        for n in range(OUTPUTS):
            i = int32(tid + n * threads)
            h = ptx.udiv(i, int32(DP // 4))
            d = int32((i - h * (DP // 4)) * 4)
            if h < HEADS:
                b0 = b1 = b2 = b3 = ZERO
                first = int32(0)
                while first < used:
                    for j in range(AHEAD):
                        if first + j < used:
                            x0, x1, x2, x3 = ptx.load4(partials, (part_rd + (first + j) * HEADS + h) * DP + d)
                            ahead_r[4 * j], ahead_r[4 * j + 1], ahead_r[4 * j + 2], ahead_r[4 * j + 3] = x0, x1, x2, x3
                    for j in range(AHEAD):
                        if first + j < used:
                            weight = sum_s[(first + j) * SLOTS + h]
                            b0 += weight * ahead_r[4 * j]
                            b1 += weight * ahead_r[4 * j + 1]
                            b2 += weight * ahead_r[4 * j + 2]
                            b3 += weight * ahead_r[4 * j + 3]
                    first = int32(first + AHEAD)
                inverse = ptx.div_rn(ONE, whole_s[h])
                wr = (row * (kv_heads * group) + part * HEADS + h) * D + d
                for k in range(4):
                    if d + k < D:
                        out[wr + k] = (b0 if k == 0 else b1 if k == 1 else b2 if k == 2 else b3) * inverse
        if tid == 0:
            arrivals[index] = 0

    return attention_batch


_FLOATS, _WORDS = types.CPointer(types.float32), types.CPointer(types.int32)
SIGNATURE = (
    *(_FLOATS, _FLOATS, _FLOATS, _WORDS, *CACHE_SIGNATURE),  # qkv, cos, sin, where, table ... head_words
    *(_FLOATS, _FLOATS, _WORDS, _FLOATS, _WORDS),  # partials, stats, arrivals, out, work
    *(types.int32, types.int32, types.int32, types.int32, types.int64),  # kv_heads, room ... cache_words
)
BLOCKS = {64: 5, 128: 3, 256: 2, 512: 1}  # resident blocks of so many threads


@cache
def attention_batch_spec(
    arch: int, head_dim: int, group: int, threads: int, least: int = MIN_SPLIT_TOKENS
) -> KernelSpec:
    """The compiled form for a head size, group and threads a block (32 * a power of two up to 512).

    `least` only for tests. Raises ValueError where the kernel does not fit.
    """
    if not fits(arch, head_dim):
        raise ValueError(
            f"batched attention takes even head sizes up to {MAX_HEAD_DIM} from sm_{MIN_ARCH} on, "
            f"not {head_dim} on sm_{arch}"
        )
    if group < 1:
        raise ValueError(f"a key-value head serves at least one query head, not {group}")
    heads = heads_per_block(group, True)
    kernel = make_attention_batch(arch, head_dim, group, heads, threads, least)
    wide = 4 * -(-head_dim // KEY_DIMS) + 8 * -(-head_dim // VALUE_DIMS)
    name = f"attention_batch[{head_dim}, {group}, {threads}, {least}]"
    return KernelSpec(name, kernel, SIGNATURE, threads, BLOCKS.get(threads, 1), wide_loads=wide)


def attention_batch_scratch(
    rows: int, max_tokens: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[int, int, int]:
    """Elements of (partials float32, stats float32, arrivals int32: zeroed once, the kernel leaves zeros) for up to
    `rows` rows of up to `max_tokens` tokens."""
    room = most_splits(max_tokens)
    parts = heads // heads_per_block(heads // kv_heads, True)
    return rows * heads * room * partial_dims(head_dim), rows * heads * room * 2, rows * parts


def threads_for(head_dim: int, blocks: int, num_sms: int) -> int:
    """Threads a block, by how many blocks have work: they should all be resident at once."""
    choice = next((t for t in (512, 256, 128) if blocks <= BLOCKS[t] * num_sms), 64)
    padded = head_dim % KEY_DIMS != 0  # takes registers that sixteen warps do not have
    return min(choice, 256) if padded else choice


def attention_batch(
    device: Device,
    qkv: DeviceArray,
    cos: DeviceArray,
    sin: DeviceArray,
    where: DeviceArray,
    cache: LayerCache,
    scratch: Sequence[DeviceArray],
    out: DeviceArray,
    work: DeviceArray,
    rows: int,
    blocks: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    threads: int = 0,
    use_pdl: bool = True,
) -> Launch:
    """The launch for one layer: out[b] = softmax(q_b . K / sqrt(head_dim)) . V over row b's tokens 0 .. where[b, 1], of
    which it stores the last.

    qkv float32 [rows, (heads + 2 * kv_heads) * head_dim], q and k not yet rotated; cos, sin float32 [max tokens,
    head_dim / 2]; where int32 [rows, 2]: slot (-1: the row is skipped) and position; cache: one layer's, the pages of
    the rows' own tokens in its table; scratch as `attention_batch_scratch` says for at least `rows` and max tokens; out
    float32 [rows, heads * head_dim]. Rows must be of different slots. work int32 [blocks]: the `work_entries` of all
    rows, `splits_needed` for each at best (any numbers give the same result, and so does any number of `threads`; 0:
    this module's choice), and -1 for blocks too many; it must be there before the launches that this one may overlap.
    Raises ValueError with the sizes if they do not fit together.
    """
    max_tokens = cos.size // (head_dim // 2)
    parts = heads // heads_per_block(max(1, heads // kv_heads), True)
    partials, stats, arrivals = attention_batch_scratch(rows, max_tokens, heads, kv_heads, head_dim)
    check_sizes(
        "attention_batch", qkv, cos, sin, where, cache, rows, heads, kv_heads, head_dim,
        partials=(scratch[0], partials), stats=(scratch[1], stats), arrivals=(scratch[2], arrivals),
        out=(out, rows * heads * head_dim),
    )  # fmt: skip
    if blocks < 1 or work.size < blocks or rows > MAX_ROWS:
        raise ValueError(f"attention_batch: {blocks} blocks for {rows} rows, and work for {work.size}")
    threads = threads or threads_for(head_dim, blocks * parts, device.num_sms)
    spec = attention_batch_spec(device.arch, head_dim, heads // kv_heads, threads)
    arguments = (
        qkv, cos, sin, where, *cache_arguments(cache), *scratch, out, work, kv_heads, most_splits(max_tokens),
        cache.table.size // cache.table_stride, min(max_tokens, cache.table_stride * PAGE), cache.keys.size,
    )  # fmt: skip
    return device.launch(spec, (blocks, parts), arguments, use_pdl)
