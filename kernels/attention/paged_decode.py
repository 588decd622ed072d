"""Attention of a batched decode pass: one new token in each of many sequences, over a cache of pages.

Token b of the pass has slot slot_positions[b, 0] and position slot_positions[b, 1]. Its key and value come with its
query and are put into the cache here, the same bits as `append` in `kv_cache` would store: that spares a launch a
layer. A block serves a token and a key-value head with all query heads that share it (in parts of four), so the cache
is read once.

    grid       x: one entry of `work_list`, a token and splits of its context        y: part of the query heads
    stripe v   tiles of 16 cached tokens v, v + 16, ... of a split, v = 0 .. 15, with their own running maximum and
               sums; a warp takes stripes w, w + W, ..., one after the other     lane: g = lane / 4, c = lane % 4

    scores [16 rows, 8 tokens] += q [16, 16 dims] . k [16 dims, 8 tokens]      as drawn in `parts`
    out [16 dims, 8 columns] += v [16 dims, 16 tokens] . p [16 tokens, 8 columns]      tokens 2c, 2c + 1, 2c + 8, 2c + 9
        columns 0 .. 3 are the first terms of four heads' p, 4 .. 7 the second; of bfloat16, a second product adds the
        third to columns 0 .. 3. So the sums take 32 registers, half of what p as the left operand takes, and loads of
        the next keys and values have 64.

The new token is in no cache yet when the cache is read. Every block of the token makes its key and value in shared
memory:

    qkv   q 0 | q 1 | ...            | k | v            loaded together, one trip to L2
          rotated, scaled            | rotated |
          q_s, left operands         | new_s [2, words]     rounded --> cache, by the first block of its kv head
                                        |
                                     registers of the lanes that hold token t % 16 of the context's last tile, whenever
                                     a warp comes to that tile

A cache of float8: a lane's 16 bytes are 16 dimensions instead of 8, so keys take half the loads, and values, too. They
become float16 in registers, by the instruction or by moving bits; powers of two of the tokens go to scores and weights.

Results do not depend on the batch, to the bit: a context of n tokens has splits of max(512, n / 32 rounded up to 64)
tokens, a split 16 stripes, and stripes and splits are added up in their order, whichever warp had them. So the number
of warps a block is free: many for few tokens (each has one tile of a short context: all loads are under way at once),
two for many tokens (five blocks share a SM; loads of one hide behind the products of another). So is the number of
blocks that share a token's part: block x of n takes splits x, x + n, ..., and the last of them to arrive (an integer
counter, left zero) adds up the splits. `work_list` says which token and x and n a block has, so that one long context
among many short ones does not give blocks to all of them.

For up to four tokens a cluster of four blocks takes the place of a block of sixteen warps, which would need a whole SM:
each has four warps, and finds room while the launch before still runs. A stripe's result goes to the block that adds up
its head, through distributed shared memory; so the order stays, and so do the bits.

Order between kernels: `work_list`, `slot_positions`, the block table and earlier tokens are read before `pdl_wait`;
afterwards `slot_positions` is read again, past L1, and if it has changed all is loaded again. `qkv` is read afterwards.
Then new tokens are stored, each by one block, where no block of the launch reads for its result. All that asks that
earlier tokens were written by an earlier pass: a slot has one token at most, pages that slots share are full, and
passes are graphs, which wait for the end of what was enqueued before; and that no launch of the pass writes the block
table or `work_list`.

The kernel is longer than its phases ask for: storing the new vectors, the scores' products and a stripe's end stand in
its body, since as functions they change the machine code of the whole kernel; so do values that live through the tile
loop.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types
from numpy.typing import NDArray

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.kv_cache import (
    PAGE,
    PASS_SIGNATURE,
    LayerCache,
    head_page_words,
    pass_arguments,
    token_words,
)
from bitnet_numba.kernels.attention.kv_dtype import (
    DEFAULT,
    KV_BYTES,
    KVDtype,
    float8_inverse,
    float8_pairs,
    float8_scale,
    float8_word,
    half_functions,
    magnitude_bits,
)
from bitnet_numba.kernels.attention.parts import (
    HIGH_HALVES,
    KEY_DIMS,
    LOW_HALVES,
    MINUS_INF,
    MMA_ARCH,
    MMA_HEADS,
    MMA_MAX_HEAD_DIM,
    TILE_TOKENS,
    HeadShape,
    RopeTables,
    SplitScratch,
    check_head,
    finite_or_inf,
    heads_per_block,
    make_store_out,
    make_term_functions,
    make_tile_functions,
    online_softmax,
    partial_dims,
    rotate_pair,
    score_scale,
    split_arrays,
)
from bitnet_numba.kernels.operands import checked
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import RESERVED_BYTES, KernelSpec, sm_memory

MIN_ARCH = MMA_ARCH
STRIPES = 16  # of a split: see above
MIN_SPLIT_TOKENS = 512  # of a split; splitting costs about 2 us
MAX_SPLITS = 32
SPLIT_STEP = 64  # tokens that a long context's splits are a multiple of
PREFETCH = 8  # partial results that a thread has in flight
TOKEN_BITS = 12  # of a work list's entry: the token; then 8 bits each for which of its blocks this is, and of how many
MAX_TOKENS = 1 << TOKEN_BITS
CLUSTER, CLUSTER_ARCH, CLUSTER_TOKENS = 4, 90, 4  # blocks that share stripes, for so few tokens; measured on an H200
BLOCKS_PER_SM = {64: 5, 128: 3, 256: 2, 512: 1}  # resident blocks of so many threads that registers allow


def fits(arch: int, head_dim: int, dtype: KVDtype = DEFAULT) -> bool:
    """Whether this kernel serves a head size and a cache's type on an architecture; `append` and `paged_simt` serve
    those that it does not."""
    return dtype != "float32" and arch >= MIN_ARCH and head_dim % 2 == 0 and 2 <= head_dim <= MMA_MAX_HEAD_DIM


def splits_needed(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Splits of contexts of so many tokens (the new one included)."""
    split_tokens = np.maximum(MIN_SPLIT_TOKENS, -(-tokens // (MAX_SPLITS * SPLIT_STEP)) * SPLIT_STEP)
    return -(-tokens // split_tokens)


def max_splits_of(max_tokens: int) -> int:
    """Splits that contexts of up to so many tokens have at most."""
    return min(MAX_SPLITS, -(-max_tokens // MIN_SPLIT_TOKENS))


def work_entries(blocks: Sequence[int]) -> list[int]:
    """The `work_list`, int32, of a launch in which blocks[b] blocks (up to 255; 0: none) share each part of token b.

    Tokens of many blocks come first, since they are likely to take longest.
    """
    order = sorted(range(len(blocks)), key=lambda token: -blocks[token])
    return [token | x << TOKEN_BITS | blocks[token] << TOKEN_BITS + 8 for token in order for x in range(blocks[token])]


def shared_bytes(head_dim: int, dtype: KVDtype = DEFAULT) -> int:
    """Shared memory of a block, whatever its threads; the small arrays are rounded up to 1 KB."""
    lane_dims = 16 // KV_BYTES[dtype]
    dims = partial_dims(head_dim, lane_dims)
    queries = lane_dims // 4 * -(-head_dim // (4 * lane_dims)) * WARP * 4
    new = 2 * (4 * dims // lane_dims)
    return 4 * (queries + STRIPES * MMA_HEADS * (dims + 4) + new) + 1024


def resident_blocks(arch: int, head_dim: int, threads: int, dtype: KVDtype = DEFAULT) -> int:
    """Blocks of so many threads that an SM holds at once."""
    fit = sm_memory(arch).shared // (shared_bytes(head_dim, dtype) + RESERVED_BYTES)
    return max(1, min(BLOCKS_PER_SM.get(threads, 1), fit))


def threads_for(arch: int, head_dim: int, blocks: int, num_sms: int, dtype: KVDtype = DEFAULT) -> int:
    """Threads a block, by how many blocks have work: they should all be resident at once, or else as many as can be."""
    resident = {threads: resident_blocks(arch, head_dim, threads, dtype) for threads in (512, 256, 128, 64)}
    enough = (threads for threads, most in resident.items() if blocks <= most * num_sms)
    choice = next(enough, None) or max(resident, key=lambda threads: resident[threads])
    padded = head_dim % KEY_DIMS != 0  # takes registers that sixteen warps do not have
    return min(choice, 256) if padded else choice


def cluster_for(arch: int, num_tokens: int, blocks: int, num_sms: int) -> int:
    """Blocks of a cluster that share the stripes of a token's part, where `blocks` in all would leave SMs idle."""
    fits = num_tokens <= CLUSTER_TOKENS and CLUSTER * blocks <= BLOCKS_PER_SM[STRIPES * WARP // CLUSTER] * num_sms
    return CLUSTER if arch == CLUSTER_ARCH and fits else 1


@device_function
def _next_tile(tile: int, start: int, end: int, next_first: int, warps: int) -> int:
    """The tile that a warp takes after `tile` of the split start .. end - 1: the stripe's next, or its next stripe's
    first, or `next_first` of the block's next split."""
    following = int32(tile + STRIPES)
    if following >= end:
        stripe = int32(((tile - start) & (STRIPES - 1)) + warps)
        following = int32(start + stripe)
        if stripe >= STRIPES or following >= end:
            following = int32(next_first)
    return following


def make_paged_decode(
    arch: int, head_dim: int, group: int, heads: int, threads: int, dtype: KVDtype, min_split: int, cluster: int = 1
) -> Callable[..., None]:
    """The kernel for a head size and a number of query heads per key-value head, `heads` (at most MMA_HEADS, a divisor)
    of them a block. `min_split` tokens of a split (a multiple of 64) other than this module's only in tests. cluster:
    blocks that share the stripes, each with its warps."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    F8, LANE = dtype == "float8", 16 // KV_BYTES[dtype]  # dimensions in 16 bytes
    half = half_functions("float16" if F8 else dtype)
    mma, stored_word, THREE_TERMS = half.mma, half.stored, half.terms == 3
    store_query, weight_terms = make_term_functions(half, LANE)
    low_pair, high_pair, FACTOR = float8_pairs(arch)
    warp_max_int = ptx.warp_max_int(arch)
    # Of float8: what a score is times its token's scale; 2^6 keeps the weights, times a scale, in float16's range.
    SCORE_FACTOR, WEIGHT_FACTOR, OUT_FACTOR = float32(FACTOR), float32(2.0**6), float32(FACTOR * 2.0**-6)
    load_keys, load_values, mask_tile = make_tile_functions(arch, head_dim, int32, token_words(head_dim, dtype), LANE)
    store_out = make_store_out(head_dim)
    D, HALF = head_dim, head_dim // 2
    WORDS = token_words(D, dtype)
    HEADS = heads
    HEAD_BLOCKS = group // HEADS
    CLUSTER, BLOCK_WARPS = cluster, threads // WARP
    WARPS = CLUSTER * BLOCK_WARPS  # of a cluster
    if STRIPES % WARPS or CLUSTER > 1 and WARPS != STRIPES:
        raise ValueError(f"{STRIPES} stripes cannot be shared by {WARPS} warps evenly")
    L, Q = -(-D // (4 * LANE)), -(-D // (8 * LANE))  # 16-byte loads of each lane for a token's key, and for its value
    DP = partial_dims(D, LANE)  # dimensions with padding, in shared memory and in partial results
    VECTOR_WORDS = 4 * DP // LANE  # of a new key or value in shared memory
    NEW_WORDS = 2 * VECTOR_WORDS
    WHOLE = WORDS == 16 * L and WORDS == VECTOR_WORDS  # every lane of every load has dimensions
    SCALES, PAGE_WORDS = PAGE * WORDS, head_page_words(D, dtype)  # of float8: where a page's scales are
    K_REGS, V_REGS, O_REGS = 8 * L, 16 * Q, 2 * LANE * Q
    VECTORS = MMA_HEADS + 2  # made before the scores: queries, new key, new value
    Q_WORDS, VECTOR_ROUNDS = LANE // 4 * L * WARP * 4, -(-VECTORS * DP // 2 // threads)
    SCALE_ROUNDS, DIM_ROUNDS = -(-2 // BLOCK_WARPS), DP // WARP
    QUARTERS = LANE // 4  # of a lane's dimensions of a load: four neighbouring ones
    ROTATIONS, PADS = -(-VECTORS * HALF // threads), VECTORS * (DP - D)
    ANGLES = 1 if threads % HALF == 0 else ROTATIONS  # that a thread meets
    STRIDE = DP + 4  # keeps the heads' sums in different banks
    HEADS_KEPT = -(-MMA_HEADS // CLUSTER)  # whose stripes' sums a block holds
    ACC_FLOATS, STATS = max(STRIPES * HEADS_KEPT * STRIDE, VECTORS * DP), STRIPES * MMA_HEADS
    PREFETCH_REGS, X_REGS = 4 * PREFETCH, 2 * ROTATIONS
    HEAD_ROUNDS, OUTPUTS = -(-HEADS // BLOCK_WARPS), -(-HEADS * DP // 4 // threads)
    OWN_HEADS = -(-HEADS // CLUSTER)  # that a block of a cluster adds up
    OWN_ROUNDS, DIMS = -(-OWN_HEADS // BLOCK_WARPS), -(-OWN_HEADS * DP // threads)
    MIN_SPLIT_TILES, STEP_TILES = min_split // TILE_TOKENS, SPLIT_STEP // TILE_TOKENS
    STEP_SHIFT = (MAX_SPLITS * SPLIT_STEP).bit_length() - 1
    PAGE_TILES, PAGE_TILE_BITS = PAGE // TILE_TOKENS, (PAGE // TILE_TOKENS).bit_length() - 1
    SCALE, ZERO, ONE = score_scale(D), float32(0), float32(1)

    @device_function
    def insert_key(k_r, new_s, new, g, c):
        """Puts the new key, token `new` of the tile, into its lanes' registers."""
        for i in range(L):
            for t in range(2):
                n = 8 * i + 4 * t
                if int32(g + 8 * t) == new:
                    k_r[n], k_r[n + 1], k_r[n + 2], k_r[n + 3] = ptx.load4(new_s, 16 * i + 4 * c)

    @device_function
    def insert_value(v_r, new_s, new, g, c):
        """The new value likewise."""
        for i in range(Q):
            for t in range(4):
                n = 16 * i + 4 * t
                if int32(2 * c + (t & 1) + 4 * (t & 2)) == new:
                    v_r[n], v_r[n + 1], v_r[n + 2], v_r[n + 3] = ptx.load4(new_s, VECTOR_WORDS + 32 * i + 4 * g)

    @device_function
    def load_scales(scale_r, words, at, left, c):
        """Of float8: the scales of a lane's tokens 2c, 2c + 1, 2c + 8 and 2c + 9. at: of the tile's first."""
        for t in range(4):
            token = int32(2 * c + (t & 1) + 4 * (t & 2))
            scale_r[t] = ZERO
            if token < left:
                scale_r[t] = ptx.bits_to_float(uint32(words[at + token]))

    @device_function
    def insert_scale(scale_r, scale, new, c):
        """That of the new token, token `new` of the tile."""
        for t in range(4):
            if int32(2 * c + (t & 1) + 4 * (t & 2)) == new:
                scale_r[t] = scale

    @device_function
    def find_scales(new_scale_s, acc_s, warp, lane):
        """Of float8: the scales of the new key and value."""
        for n in range(SCALE_ROUNDS):
            h = int32(warp + n * BLOCK_WARPS)
            if h < 2:
                largest = int32(0)
                for i in range(DIM_ROUNDS):
                    largest = max(largest, magnitude_bits(acc_s[(MMA_HEADS + h) * DP + lane + i * WARP]))
                scale = float8_scale(warp_max_int(largest))
                if lane == 0:
                    new_scale_s[h] = scale

    @device_function
    def rotate_vectors(qkv, x_r, cos_r, sin_r, acc_s, q_rd, k_rd, num_kv_heads, tid):
        """[VECTORS, DP] into acc_s: queries, rotated and scaled; new key, rotated; new value."""
        for n in range(ROTATIONS):  # no branches: every load is under way before the first is waited for
            i = int32(tid + n * threads)
            h = ptx.udiv(i, int32(HALF))
            rd = int32(q_rd + (h if HEADS == MMA_HEADS else min(h, int32(HEADS - 1))) * D)
            if h >= MMA_HEADS:
                rd = k_rd if h == MMA_HEADS else int32(k_rd + num_kv_heads * D)
            rd = int32(rd + i - h * HALF)
            x_r[2 * n], x_r[2 * n + 1] = qkv[rd], qkv[rd + HALF]
        for n in range(ROTATIONS):  # queries, rotated and scaled; new key, rotated; new value
            i = int32(tid + n * threads)
            h = ptx.udiv(i, int32(HALF))
            j = int32(i - h * HALF)
            x0, x1 = x_r[2 * n], x_r[2 * n + 1]
            y0, y1 = rotate_pair(x0, x1, cos_r[n % ANGLES], sin_r[n % ANGLES])
            if h < MMA_HEADS:
                y0, y1 = ptx.mul_rn(y0, SCALE), ptx.mul_rn(y1, SCALE)
            elif h > MMA_HEADS:
                y0, y1 = x0, x1
            if h < VECTORS:
                acc_s[h * DP + j], acc_s[h * DP + HALF + j] = y0, y1

    @device_function
    def multiply_values(o_r, v_r, hi0, hi1, lo0, lo1):
        """o_r += v . p of a tile."""
        for i in range(Q if F8 else 0):
            for j in range(8):  # dimensions 128i + 16g + 2j and, in rows 8 .. 15, the one after
                v, n = 16 * i + j // 2, 4 * (8 * i + j)
                pairs = 0x7362 if j % 2 else 0x5140  # of one dimension of two tokens, then of the next
                near = int32(ptx.byte_permute(v_r[v], v_r[v + 4], pairs))
                far = int32(ptx.byte_permute(v_r[v + 8], v_r[v + 12], pairs))
                a0, a1, a2, a3 = low_pair(near), high_pair(near), low_pair(far), high_pair(far)
                o_r[n], o_r[n + 1], o_r[n + 2], o_r[n + 3] = mma(
                    a0, a1, a2, a3, hi0, hi1, o_r[n], o_r[n + 1], o_r[n + 2], o_r[n + 3]
                )
        for i in range(0 if F8 else Q):
            for j in range(4):  # dimensions 64i + 8g + 2j and, in rows 8 .. 15, the one after
                v, n = 16 * i + j, 4 * (4 * i + j)
                a0 = int32(ptx.byte_permute(v_r[v], v_r[v + 4], LOW_HALVES))
                a1 = int32(ptx.byte_permute(v_r[v], v_r[v + 4], HIGH_HALVES))
                a2 = int32(ptx.byte_permute(v_r[v + 8], v_r[v + 12], LOW_HALVES))
                a3 = int32(ptx.byte_permute(v_r[v + 8], v_r[v + 12], HIGH_HALVES))
                o0, o1, o2, o3 = o_r[n], o_r[n + 1], o_r[n + 2], o_r[n + 3]
                o0, o1, o2, o3 = mma(a0, a1, a2, a3, hi0, hi1, o0, o1, o2, o3)
                if THREE_TERMS:
                    o0, o1, o2, o3 = mma(a0, a1, a2, a3, lo0, lo1, o0, o1, o2, o3)
                o_r[n], o_r[n + 1], o_r[n + 2], o_r[n + 3] = o0, o1, o2, o3

    @device_function
    def weigh_stripes(max_s, sum_s, row_sum_s, stats, stripes, num_splits, split_wr, rank, warp, lane):
        """Each stripe's weight into max_s, each head's sum over the stripes into row_sum_s; maximum and sum to
        stats. Of a cluster, a block has every CLUSTER-th head."""
        for n in range(OWN_ROUNDS):
            own = int32(warp + n * BLOCK_WARPS)
            h = int32(rank + own * CLUSTER)
            if own < OWN_HEADS and h < HEADS:
                row_max = max_s[lane * MMA_HEADS + h] if lane < stripes else MINUS_INF
                row_sum = sum_s[lane * MMA_HEADS + h] if lane < stripes else ZERO
                largest = ptx.warp_max(row_max)
                weight = ptx.exp2_approx(row_max - largest)
                row_sum = ptx.warp_sum(ptx.mul_rn(weight, row_sum))
                if lane < stripes:
                    max_s[lane * MMA_HEADS + h] = weight
                if lane == 0:
                    row_sum_s[h] = row_sum
                    if num_splits > 1:
                        stats[(split_wr + h) * 2] = largest
                        stats[(split_wr + h) * 2 + 1] = row_sum

    @device_function
    def store_split(
        acc_s, max_s, row_sum_s, partials, out, stripes, num_splits, split_wr, token, head_block, num_kv_heads, tid
    ):
        """The split's result: the output, or one of several partial results."""
        for n in range(OUTPUTS):
            i = int32(tid + n * threads)
            h = ptx.udiv(i, int32(DP // 4))
            d = int32((i - h * (DP // 4)) * 4)
            if h < HEADS:
                b0 = b1 = b2 = b3 = ZERO
                for s in range(stripes):
                    weight = max_s[s * MMA_HEADS + h]
                    x0, x1, x2, x3 = ptx.load4(acc_s, (s * MMA_HEADS + h) * STRIDE + d)
                    b0, b1, b2, b3 = b0 + weight * x0, b1 + weight * x1, b2 + weight * x2, b3 + weight * x3
                if num_splits > 1:
                    ptx.store4(partials, (split_wr + h) * DP + d, b0, b1, b2, b3)
                else:
                    inverse = ptx.div_rn(ONE, row_sum_s[h])
                    wr = (token * (num_kv_heads * group) + head_block * HEADS + h) * D + d
                    store_out(out, wr, d, b0, b1, b2, b3, inverse)

    @device_function
    def store_heads(
        acc_s, max_s, row_sum_s, partials, out, stripes, num_splits, split_wr, token, head_block, num_kv_heads, rank,
        tid
    ):  # fmt: skip
        """As `store_split`, of this block's heads, a dimension a thread."""
        for n in range(DIMS):
            i = int32(tid + n * threads)
            own = ptx.udiv(i, int32(DP))
            d, h = int32(i - own * DP), int32(rank + own * CLUSTER)
            if own < OWN_HEADS and h < HEADS:
                b = ZERO
                for s in range(STRIPES):  # without branches, so that all loads are under way at once
                    stripe = min(int32(s), int32(stripes - 1))
                    x = acc_s[(stripe * HEADS_KEPT + own) * STRIDE + d]
                    added = b + max_s[stripe * MMA_HEADS + h] * x
                    b = added if s < stripes else b
                if num_splits > 1:
                    partials[(split_wr + h) * DP + d] = b
                elif d < D:
                    inverse = ptx.div_rn(ONE, row_sum_s[h])
                    wr = (token * (num_kv_heads * group) + head_block * HEADS + h) * D + d
                    out[wr] = finite_or_inf(b * inverse)

    @device_function
    def combine_splits(
        acc_s,
        row_sum_s,
        prefetch_r,
        partials,
        stats,
        out,
        num_splits,
        partial_rd,
        token,
        head_block,
        num_kv_heads,
        tid,
        warp,
        lane,
    ):
        """The output from every split's partial result."""
        for n in range(HEAD_ROUNDS):
            h = int32(warp + n * BLOCK_WARPS)
            if h < HEADS:
                row_max, row_sum = MINUS_INF, ZERO
                if lane < num_splits:
                    row_max = stats[(partial_rd + lane * HEADS + h) * 2]
                    row_sum = stats[(partial_rd + lane * HEADS + h) * 2 + 1]
                largest = ptx.warp_max(row_max)
                weight = ptx.exp2_approx(row_max - largest)
                acc_s[lane * MMA_HEADS + h] = weight
                row_sum = ptx.warp_sum(ptx.mul_rn(weight, row_sum))
                if lane == 0:
                    row_sum_s[h] = row_sum
        cuda.syncthreads()
        for n in range(OUTPUTS):
            i = int32(tid + n * threads)
            h = ptx.udiv(i, int32(DP // 4))
            d = int32((i - h * (DP // 4)) * 4)
            if h < HEADS:
                b0 = b1 = b2 = b3 = ZERO
                first = int32(0)
                while first < num_splits:
                    for j in range(PREFETCH):
                        if first + j < num_splits:
                            x0, x1, x2, x3 = ptx.load4(partials, (partial_rd + (first + j) * HEADS + h) * DP + d)
                            prefetch_r[4 * j], prefetch_r[4 * j + 1], prefetch_r[4 * j + 2], prefetch_r[4 * j + 3] = (
                                x0,
                                x1,
                                x2,
                                x3,
                            )
                    for j in range(PREFETCH):
                        if first + j < num_splits:
                            weight = acc_s[(first + j) * MMA_HEADS + h]
                            b0 += weight * prefetch_r[4 * j]
                            b1 += weight * prefetch_r[4 * j + 1]
                            b2 += weight * prefetch_r[4 * j + 2]
                            b3 += weight * prefetch_r[4 * j + 3]
                    first = int32(first + PREFETCH)
                inverse = ptx.div_rn(ONE, row_sum_s[h])
                wr = (token * (num_kv_heads * group) + head_block * HEADS + h) * D + d
                store_out(out, wr, d, b0, b1, b2, b3, inverse)

    def paged_decode_attention(
        qkv, cos, sin, slot_positions, block_table, block_table_stride, keys, values, page_words, head_words, partials,
        stats, arrivals, out, work_list, num_kv_heads, max_splits, num_slots, max_tokens, cache_words
    ):  # fmt: skip
        q_s = ptx.pointer(cuda.shared.array(Q_WORDS, int32, SHARED_ALIGN))  # left operands: [steps, lane, 4 registers]
        # [STRIPES, MMA_HEADS, STRIDE]; at first queries and new vectors, at last the splits' weights
        acc_s = ptx.pointer(cuda.shared.array(ACC_FLOATS, float32, SHARED_ALIGN))
        new_s = ptx.pointer(cuda.shared.array(NEW_WORDS, int32, SHARED_ALIGN))  # new key and value, as stored
        new_scale_s = ptx.pointer(cuda.shared.array(2, float32))
        max_s = ptx.pointer(cuda.shared.array(STATS, float32))  # [STRIPES, MMA_HEADS]; then the stripes' weights
        sum_s = ptx.pointer(cuda.shared.array(STATS, float32))
        row_sum_s = ptx.pointer(cuda.shared.array(MMA_HEADS, float32))
        arrived_s = ptx.pointer(cuda.shared.array(1, int32))
        k_r = cuda.local.array(K_REGS, int32)
        v_r = cuda.local.array(V_REGS, int32)
        o_r = cuda.local.array(O_REGS, float32)
        k_scale_r = cuda.local.array(4, float32)
        v_scale_r = cuda.local.array(4, float32)
        prefetch_r = cuda.local.array(PREFETCH_REGS, float32)
        cos_r = cuda.local.array(ANGLES, float32)
        sin_r = cuda.local.array(ANGLES, float32)
        x_r = cuda.local.array(X_REGS, float32)

        release()
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid >> 5), int32(tid & 31)
        head_block, rank, stripe_warp = int32(cuda.blockIdx.y), int32(0), warp
        if CLUSTER > 1:
            head_block, rank = int32(cuda.blockIdx.y // CLUSTER), int32(cuda.blockIdx.y % CLUSTER)
            stripe_warp = int32(rank * BLOCK_WARPS + warp)
        g, c = int32(lane >> 2), int32(lane & 3)
        entry = work_list[cuda.blockIdx.x]
        if entry < 0:
            return
        # How many blocks the token has is read again where it is used: no register is left to keep it in.
        token, split = int32(entry & MAX_TOKENS - 1), int32(entry >> TOKEN_BITS & 255)
        kv = head_block if HEAD_BLOCKS == 1 else ptx.udiv(head_block, int32(HEAD_BLOCKS))
        index = int32(token * num_kv_heads * HEAD_BLOCKS + head_block)
        base = int32(kv * head_words)
        k_lane, v_lane = int32(g * WORDS + c * 4), int32(2 * c * WORDS + g * 4)

        # The first round begins before the launches before this one have ended. It takes `slot_positions` as it is
        # then, perhaps of an earlier pass: any numbers that are in range do, for if they turn out otherwise there is a
        # second round. Nobody writes tokens before the new one, and that one is never loaded.
        while True:
            slot, pos = ptx.load2_l2(slot_positions, 2 * token)
            known = slot >= 0 and slot < num_slots and pos >= 0 and pos < max_tokens
            tiles = int32((pos >> 4) + 1) if known else int32(0)
            split_tiles = max(int32(MIN_SPLIT_TILES), int32(((pos >> STEP_SHIFT) + 1) * STEP_TILES))
            start = int32(split * split_tiles)
            end = min(int32(start + split_tiles), tiles)
            current = int32(start + stripe_warp)
            pages = int32(slot * block_table_stride)
            if current < end:
                page = int64(block_table[pages + (current >> PAGE_TILE_BITS)])
                at = page * page_words + base
                if page < 0 or at + PAGE_WORDS > cache_words:
                    at = base
                scales_at = at + (SCALES + (current & (PAGE_TILES - 1)) * TILE_TOKENS)
                at += (current & (PAGE_TILES - 1)) * (TILE_TOKENS * WORDS)
                left = int32(pos - current * TILE_TOKENS)  # tokens t < left exist, t counted from the tile's first
                load_keys(k_r, keys, at + k_lane, left, g, c)
                load_values(v_r, values, at + v_lane, left, g, c)
                if F8:
                    load_scales(k_scale_r, keys, scales_at, left, c)
                    load_scales(v_scale_r, values, scales_at, left, c)
            for n in range(ANGLES):
                i = int32(tid + n * threads)
                j = int32(i - ptx.udiv(i, int32(HALF)) * HALF)
                cos_r[n] = sin_r[n] = ZERO
                if start < end:
                    cos_r[n], sin_r[n] = cos[int64(pos) * HALF + j], sin[int64(pos) * HALF + j]
            wait()
            slot_now, pos_now = ptx.load2_l2(slot_positions, 2 * token)
            if start < end:
                token_rd = int32(token * num_kv_heads * (group + 2))
                q_rd = int32((token_rd + head_block * HEADS) * D)
                k_rd = int32((token_rd + num_kv_heads * group + kv) * D)
                rotate_vectors(qkv, x_r, cos_r, sin_r, acc_s, q_rd, k_rd, num_kv_heads, tid)
            if slot == slot_now and pos == pos_now:
                break
        if start >= end:
            return
        num_splits = ptx.udiv(int32(tiles + split_tiles - 1), split_tiles)
        # Of the blocks that have this key and value, the token's first stores them.
        stores = split == 0 and rank == 0 and (HEAD_BLOCKS == 1 or head_block == kv * HEAD_BLOCKS)
        new_page = int32(0)
        if stores:
            new_page = int32(block_table[pages + ((tiles - 1) >> PAGE_TILE_BITS)])

        # The queries as left operands, the key and value as the cache has them.
        if DP > D:
            for i in range(tid, PADS, threads):
                h = int32(i // (DP - D))
                acc_s[h * DP + D + i - h * (DP - D)] = ZERO
        cuda.syncthreads()
        if F8:
            find_scales(new_scale_s, acc_s, warp, lane)
            cuda.syncthreads()
            if stores and tid < 2:
                wr = int64(new_page) * page_words + base + (SCALES + (pos & (PAGE - 1)))
                if tid == 0:
                    keys[wr] = int32(ptx.float_to_bits(new_scale_s[0]))
                else:
                    values[wr] = int32(ptx.float_to_bits(new_scale_s[1]))
        for n in range(VECTOR_ROUNDS):
            i = int32(tid + n * threads)
            h = ptx.udiv(i, int32(DP // 2))
            word = int32(i - h * (DP // 2))
            if h < MMA_HEADS:
                if word < 2 * LANE * L:
                    store_query(q_s, h, word, acc_s[h * DP + 2 * word], acc_s[h * DP + 2 * word + 1])
            elif h < VECTORS and word < VECTOR_WORDS:
                if F8:
                    rd = h * DP + 4 * word
                    inverse = float8_inverse(new_scale_s[h - MMA_HEADS])
                    stored = float8_word(acc_s[rd], acc_s[rd + 1], acc_s[rd + 2], acc_s[rd + 3], inverse)
                else:
                    stored = stored_word(acc_s[h * DP + 2 * word], acc_s[h * DP + 2 * word + 1])
                new_s[(h - MMA_HEADS) * VECTOR_WORDS + word] = stored
                if stores and (WHOLE or word < WORDS):
                    wr = int64(new_page) * page_words + base + ((pos & (PAGE - 1)) * WORDS + word)
                    if h == MMA_HEADS:
                        keys[wr] = stored
                    else:
                        values[wr] = stored
        cuda.syncthreads()

        joined = CLUSTER == 1  # whether the cluster's other blocks are known not to use acc_s for vectors any more
        if CLUSTER > 1:
            ptx.cluster_arrive()
        while split < num_splits:
            start = int32(split * split_tiles)
            end = min(int32(start + split_tiles), tiles)
            split_after = int32(split + (work_list[cuda.blockIdx.x] >> TOKEN_BITS + 8))
            # A warp's first tile of the next split; of splits, only a context's last can have warps without a tile.
            next_first = int32(split_after * split_tiles + stripe_warp) if split_after < num_splits else tiles
            row_max, row_sum, fresh = MINUS_INF, ZERO, True
            for i in range(O_REGS):
                o_r[i] = ZERO
            while current < end:
                # The tile after this one: of the same stripe; after its last, of this warp's next stripe or split.
                following = _next_tile(current, start, end, next_first, WARPS)
                page = int32(0)
                if following < tiles:
                    page = int32(block_table[pages + (following >> PAGE_TILE_BITS)])
                ahead = int32(pos - following * TILE_TOKENS)
                last, new = int32(current + 1) == tiles, int32(pos & (TILE_TOKENS - 1))
                if last:
                    insert_key(k_r, new_s, new, g, c)
                    if F8:
                        insert_scale(k_scale_r, new_scale_s[0], new, c)
                        insert_scale(v_scale_r, new_scale_s[1], new, c)
                s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = ZERO
                for i in range(L if F8 else 0):
                    for j in range(4):
                        a0, a1, a2, a3 = ptx.load4(q_s, lane * 4 + (4 * i + j) * WARP * 4)
                        near, far = k_r[8 * i + j], k_r[8 * i + 4 + j]
                        s0, s1, s2, s3 = mma(a0, a1, a2, a3, low_pair(near), high_pair(near), s0, s1, s2, s3)
                        t0, t1, t2, t3 = mma(a0, a1, a2, a3, low_pair(far), high_pair(far), t0, t1, t2, t3)
                for i in range(0 if F8 else L):
                    for j in range(2):
                        a0, a1, a2, a3 = ptx.load4(q_s, lane * 4 + (2 * i + j) * WARP * 4)
                        n = 8 * i + 2 * j
                        s0, s1, s2, s3 = mma(a0, a1, a2, a3, k_r[n], k_r[n + 1], s0, s1, s2, s3)
                        t0, t1, t2, t3 = mma(a0, a1, a2, a3, k_r[n + 4], k_r[n + 5], t0, t1, t2, t3)
                at = int64(page) * page_words + base + (following & (PAGE_TILES - 1)) * (TILE_TOKENS * WORDS)
                if following < tiles:
                    load_keys(k_r, keys, at + k_lane, ahead, g, c)
                scales_at = at
                if F8:
                    scales_at = int64(page) * page_words + base
                    scales_at += SCALES + (following & (PAGE_TILES - 1)) * TILE_TOKENS
                # The three terms' rows add up to the scores of head g % 4: tokens 2c, 2c + 1, 2c + 8, 2c + 9.
                s0, s1, t0, t1 = s0 + s2, s1 + s3, t0 + t2, t1 + t3
                s0 += ptx.shuffle_xor(s0, 16)
                s1 += ptx.shuffle_xor(s1, 16)
                t0 += ptx.shuffle_xor(t0, 16)
                t1 += ptx.shuffle_xor(t1, 16)
                if F8:
                    s0, s1 = s0 * (k_scale_r[0] * SCORE_FACTOR), s1 * (k_scale_r[1] * SCORE_FACTOR)
                    t0, t1 = t0 * (k_scale_r[2] * SCORE_FACTOR), t1 * (k_scale_r[3] * SCORE_FACTOR)
                    if following < tiles:
                        load_scales(k_scale_r, keys, scales_at, ahead, c)
                if last:
                    s0, s1, t0, t1 = mask_tile(s0, s1, t0, t1, c, new)
                s0, s1, t0, t1, row_max, row_sum, alpha = online_softmax(s0, s1, t0, t1, row_max, row_sum)
                if F8:
                    s0, s1 = s0 * (v_scale_r[0] * WEIGHT_FACTOR), s1 * (v_scale_r[1] * WEIGHT_FACTOR)
                    t0, t1 = t0 * (v_scale_r[2] * WEIGHT_FACTOR), t1 * (v_scale_r[3] * WEIGHT_FACTOR)
                    if following < tiles:
                        load_scales(v_scale_r, values, scales_at, ahead, c)
                hi0, hi1, lo0, lo1 = weight_terms(s0, s1, t0, t1, g)
                if not fresh:  # columns 2c and 2c + 1 are heads 2c % 4 and 2c % 4 + 1
                    even, odd = ptx.shuffle(alpha, (c & 1) * 8), ptx.shuffle(alpha, (c & 1) * 8 + 4)
                    for i in range(0, O_REGS, 2):
                        o_r[i], o_r[i + 1] = o_r[i] * even, o_r[i + 1] * odd
                if last:
                    insert_value(v_r, new_s, new, g, c)
                multiply_values(o_r, v_r, hi0, hi1, lo0, lo1)
                if following < tiles:
                    load_values(v_r, values, at + v_lane, ahead, g, c)
                fresh = int32(current + STRIPES) >= end
                if fresh:
                    stripe = stripe_warp if WARPS == STRIPES else int32((current - start) & (STRIPES - 1))
                    # The stripe's result. Lanes c and c + 2 have the terms of the same two heads: each adds up one.
                    row_sum += ptx.shuffle_xor(row_sum, 1)
                    row_sum += ptx.shuffle_xor(row_sum, 2)
                    if CLUSTER > 1 and not joined:
                        ptx.cluster_wait()
                        joined = True
                    if c == 0 and g < MMA_HEADS:
                        at = stripe * MMA_HEADS + g
                        if CLUSTER > 1:
                            ptx.cluster_store_f32(max_s, ptx.shared_address(max_s, at), g % CLUSTER, row_max)
                            ptx.cluster_store_f32(sum_s, ptx.shared_address(sum_s, at), g % CLUSTER, row_sum)
                        else:
                            max_s[at] = row_max
                            sum_s[at] = row_sum
                    head = int32((c & 1) * 2 + (c >> 1))
                    to = (stripe * HEADS_KEPT + head // CLUSTER) * STRIDE + LANE * g
                    upper = c >= 2
                    for i in range(O_REGS // 4):  # two neighbouring dimensions
                        n = 4 * i
                        o0, o1, o2, o3 = o_r[n], o_r[n + 1], o_r[n + 2], o_r[n + 3]
                        o_r[2 * i] = (o1 if upper else o0) + ptx.shuffle_xor(o0 if upper else o1, 2)
                        o_r[2 * i + 1] = (o3 if upper else o2) + ptx.shuffle_xor(o2 if upper else o3, 2)
                        if F8:
                            o_r[2 * i], o_r[2 * i + 1] = o_r[2 * i] * OUT_FACTOR, o_r[2 * i + 1] * OUT_FACTOR
                    for i in range(O_REGS // 8):
                        wr = to + (i // QUARTERS * (8 * LANE) + i % QUARTERS * 4)
                        o0, o1, o2, o3 = o_r[4 * i], o_r[4 * i + 1], o_r[4 * i + 2], o_r[4 * i + 3]
                        if CLUSTER > 1:  # to the block that adds up this head
                            owner = int32(head % CLUSTER)
                            ptx.cluster_store4_f32(acc_s, ptx.shared_address(acc_s, wr), owner, o0, o1, o2, o3)
                        else:
                            ptx.store4(acc_s, wr, o0, o1, o2, o3)
                    row_max, row_sum = MINUS_INF, ZERO
                    for i in range(O_REGS):
                        o_r[i] = ZERO
                current = following

            # The stripes meet.
            stripes = min(int32(end - start), int32(STRIPES))
            split_wr = (int64(index) * max_splits + split) * HEADS
            if CLUSTER > 1:
                if not joined:
                    ptx.cluster_wait()
                    joined = True
                ptx.cluster_arrive()
                ptx.cluster_wait()
                weigh_stripes(max_s, sum_s, row_sum_s, stats, stripes, num_splits, split_wr, rank, warp, lane)
                cuda.syncthreads()
                store_heads(
                    acc_s, max_s, row_sum_s, partials, out, stripes, num_splits, split_wr, token, head_block,
                    num_kv_heads, rank, tid
                )  # fmt: skip
                if num_splits > 1:
                    ptx.cluster_arrive()
                    ptx.cluster_wait()
            else:
                cuda.syncthreads()
                weigh_stripes(max_s, sum_s, row_sum_s, stats, stripes, num_splits, split_wr, rank, warp, lane)
                cuda.syncthreads()
                store_split(
                    acc_s,
                    max_s,
                    row_sum_s,
                    partials,
                    out,
                    stripes,
                    num_splits,
                    split_wr,
                    token,
                    head_block,
                    num_kv_heads,
                    tid,
                )
            split = split_after
            if split < num_splits:
                cuda.syncthreads()
        if num_splits == 1 or rank > 0:
            return

        cuda.syncthreads()
        if tid == 0:
            arrived_s[0] = int32(ptx.atomic_fetch_add_ordered(arrivals, index, uint32(1)))
        cuda.syncthreads()
        if arrived_s[0] != min(num_splits, int32(work_list[cuda.blockIdx.x] >> TOKEN_BITS + 8)) - 1:
            return
        # The last block of this token's heads: every split's partial result is there.
        partial_rd = int64(index) * max_splits * HEADS
        combine_splits(
            acc_s,
            row_sum_s,
            prefetch_r,
            partials,
            stats,
            out,
            num_splits,
            partial_rd,
            token,
            head_block,
            num_kv_heads,
            tid,
            warp,
            lane,
        )
        if tid == 0:
            arrivals[index] = 0

    return paged_decode_attention


_FLOATS, _WORDS = types.CPointer(types.float32), types.CPointer(types.int32)
SIGNATURE = (
    *PASS_SIGNATURE,
    *(_FLOATS, _FLOATS, _WORDS, _FLOATS, _WORDS),  # partials, stats, arrivals, out, work_list
    *(types.int32, types.int32, types.int32, types.int32, types.int64),  # num_kv_heads, max_splits ... cache_words
)


@cache
def paged_decode_spec(
    arch: int,
    head_dim: int,
    group: int,
    threads: int,
    dtype: KVDtype = DEFAULT,
    min_split: int = MIN_SPLIT_TOKENS,
    cluster: int = 1,
) -> KernelSpec:
    """The variant for a head size, group, threads a block (32 * a power of two up to 512) and type of the cache.

    `min_split` tokens of a split: other than MIN_SPLIT_TOKENS only in tests. Raises ValueError where `fits` is False.
    """
    if not fits(arch, head_dim, dtype):
        raise ValueError(
            f"paged_decode_attention takes even head sizes up to {MMA_MAX_HEAD_DIM} from sm_{MIN_ARCH} on, "
            f"not {head_dim} on sm_{arch}"
        )
    check_head("paged_decode_attention", head_dim, group)
    kernel = make_paged_decode(arch, head_dim, group, heads_per_block(group), threads, dtype, min_split, cluster)
    lane_dims = 16 // KV_BYTES[dtype]
    wide = 4 * -(-head_dim // (4 * lane_dims)) + 8 * -(-head_dim // (8 * lane_dims))
    clustered = ", cluster" if cluster > 1 else ""
    name = f"paged_decode_attention[{head_dim}, {group}, {dtype}, {threads}, {min_split}{clustered}]"
    blocks_per_sm = resident_blocks(arch, head_dim, threads, dtype)
    return KernelSpec(name, kernel, SIGNATURE, threads, blocks_per_sm, wide_loads=wide, cluster=cluster)


class PagedScratch(SplitScratch):
    """partials and stats [tokens, head blocks, splits, heads of a block, ...], arrivals [tokens, head blocks]."""

    @staticmethod
    def sizes(num_tokens: int, max_tokens: int, shape: HeadShape, dtype: KVDtype = DEFAULT) -> tuple[int, int, int]:
        """Elements of (partials, stats, arrivals) for passes of up to `num_tokens` tokens, whose contexts have up to
        `max_tokens`, over caches of a type."""
        rows = num_tokens * shape.num_heads * max_splits_of(max_tokens)
        head_blocks = shape.num_heads // heads_per_block(shape.group)
        return rows * partial_dims(shape.head_dim, 16 // KV_BYTES[dtype]), rows * 2, num_tokens * head_blocks

    @staticmethod
    def allocate(
        device: Device, num_tokens: int, max_tokens: int, shape: HeadShape, dtype: KVDtype = DEFAULT
    ) -> "PagedScratch":
        """For such passes. Raises BackendError when memory is short."""
        return PagedScratch(*split_arrays(device, *PagedScratch.sizes(num_tokens, max_tokens, shape, dtype)))


def paged_decode_attention(
    device: Device,
    qkv: Any,
    rope: RopeTables,
    slot_positions: Any,
    cache: LayerCache,
    work_list: Any,
    num_blocks: int,
    scratch: PagedScratch,
    out: Any,
    num_tokens: int,
    shape: HeadShape,
    *,
    use_pdl: bool = True,
) -> Launch:
    """One layer's attention of one new token in each of many slots, which is stored in the cache as well:
    out[b] = softmax(q_b . K / sqrt(head_dim)) . V over positions 0 .. slot_positions[b, 1] of its slot.

    qkv float32 [num_tokens, shape.qkv_size]; rope: the angles of max_tokens positions, as many as a context can have;
    slot_positions int32 [num_tokens, 2], tokens of different slots, slot -1 for tokens that are not used; cache: the
    block table lists the pages of the new tokens too; out float32 [num_tokens, shape.out_size], which is not written
    for unused tokens; scratch: for at least `num_tokens` and max_tokens. work_list int32 [num_blocks]: the
    `work_entries` of all tokens, `splits_needed` blocks for each at best (any number gives the same result), and -1 for
    blocks without work; it must be there before the launches that this one may overlap.
    Raises ValueError if an operand is too small or of another dtype, or where `fits` is False.
    """
    kernel = "paged_decode_attention"
    shape.check(kernel)
    check_head(kernel, shape.head_dim, shape.group)
    (cos,) = checked(kernel, "a pass", cos=(rope.cos, shape.head_dim // 2, "float32"))
    max_tokens = cos.size // (shape.head_dim // 2)
    partials, stats, arrivals = PagedScratch.sizes(num_tokens, max_tokens, shape, cache.dtype)
    arguments, others = pass_arguments(
        kernel, qkv, rope, slot_positions, cache, num_tokens, shape,
        partials=(scratch.partials, partials, "float32"), stats=(scratch.stats, stats, "float32"),
        arrivals=(scratch.arrivals, arrivals, "int32"), out=(out, num_tokens * shape.out_size, "float32"),
        work_list=(work_list, max(1, num_blocks), "int32"),
    )  # fmt: skip
    if num_blocks < 1 or num_tokens > MAX_TOKENS:
        raise ValueError(f"{kernel}: {num_blocks} blocks for {num_tokens} tokens; 1 or more for up to {MAX_TOKENS}")
    head_blocks = shape.num_heads // heads_per_block(shape.group)
    threads = threads_for(device.arch, shape.head_dim, num_blocks * head_blocks, device.num_sms, cache.dtype)
    cluster = cluster_for(device.arch, num_tokens, num_blocks * head_blocks, device.num_sms)
    if cluster > 1:
        threads = STRIPES * WARP // cluster
        spec = paged_decode_spec(device.arch, shape.head_dim, shape.group, threads, cache.dtype, cluster=cluster)
    else:
        spec = paged_decode_spec(device.arch, shape.head_dim, shape.group, threads, cache.dtype)
    _, _, _, _, block_table, block_table_stride, keys, *_ = arguments
    num_slots, max_position = block_table.size // block_table_stride, min(max_tokens, block_table_stride * PAGE)
    sizes = (shape.num_kv_heads, max_splits_of(max_tokens), num_slots, max_position, keys.size)
    return device.launch(spec, (num_blocks, head_blocks * cluster), (*arguments, *others, *sizes), use_pdl)
