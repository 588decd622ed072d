"""Attention of one token over a long context, on tensor cores: the kernel that `decode` launches from LONG_CONTEXT on.

Same launch, same cache, same contract as the float32 kernel in `decode`; only the products differ: mma m16n8k16 on the
fragments drawn in `parts`, where multiply-adds and the shuffles that add them up would take most of the time.

    grid       x: splits of the context        y: key-value heads (times the parts of a group's query heads)
    warp w     tiles of 16 tokens w, w + W, ... of its block's split, W warps;     lane: g = lane / 4, c = lane % 4

    scores [16 rows, 8 tokens] += q [16, 16 dims] . k [16 dims, 8 tokens]      rows: three terms of four heads
    out [16 rows, 8 dims] += p [16, 16 tokens] . v [16 tokens, 8 dims]         rows likewise; two tokens' words of v are
                                                                               permuted byte by byte into pairs of one
                                                                               dimension
Each warp keeps a running maximum and sum for each head; the warps meet in shared memory, the splits as in `decode`.

The kernel is longer than its phases ask for: the scores' products and the combination of splits stand in its body, and
`insert_key`, `insert_value` differ from those of `paged_decode`, since as functions, or shared, they change the machine
code of the whole kernel, up to spills.
"""

from collections.abc import Callable

from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.kv_dtype import KVDtype, half_functions
from bitnet_numba.kernels.attention.parts import (
    HIGH_HALVES,
    KEY_DIMS,
    LOW_HALVES,
    MINUS_INF,
    MMA_ARCH,
    MMA_HEADS,
    MMA_MAX_HEAD_DIM,
    TILE_TOKENS,
    VALUE_DIMS,
    finite_or_inf,
    load4_into,
    make_store_out,
    make_term_functions,
    make_tile_functions,
    online_softmax,
    padded_head_dim,
    partial_dims,
    rotate_pair,
    score_scale,
)
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32, int64, uint32

MAX_SPLITS = 128
THREADS = 384  # one block a SM: 12 warps of 168 registers
# Where launches overlap, blocks of the products before and after fit beside one of 8 warps.
OVERLAP_ARCH, OVERLAP_THREADS, OVERLAP_REGISTERS = 90, 256, 184  # measured there
PREFETCH = 10  # partial results that a thread of a head's last block has in flight


def fits(arch: int, head_dim: int) -> bool:
    """Whether this kernel serves a head size on an architecture; the one in `decode` serves those that it does not."""
    return arch >= MMA_ARCH and head_dim <= MMA_MAX_HEAD_DIM


def bounds(arch: int) -> tuple[int, int]:
    """Threads of a block on an architecture, and registers of a thread at most (0: as many as there are)."""
    return (OVERLAP_THREADS, OVERLAP_REGISTERS) if arch == OVERLAP_ARCH else (THREADS, 0)


def make_decode_mma(
    arch: int, head_dim: int, group: int, heads: int, threads: int, dtype: KVDtype
) -> Callable[..., None]:
    """The kernel for a head size and a number of query heads per key-value head, `heads` (at most MMA_HEADS, a divisor)
    of them a block. Its arguments are those of the kernel in `decode`."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    half = half_functions(dtype)
    mma, mma_into, rounded, pack = half.mma, half.mma_into, half.rounded, half.pack
    store_query, weight_terms = make_term_functions(half)
    load_keys, load_values, mask_tile = make_tile_functions(arch, head_dim, int64, padded_head_dim(head_dim) // 2)
    store_out = make_store_out(head_dim)
    D, HALF = head_dim, head_dim // 2
    WORDS = padded_head_dim(head_dim) // 2  # of a token in the cache
    DP = partial_dims(head_dim)  # dimensions with padding, in shared memory and in partial results
    HEADS, HEAD_BLOCKS, WARPS = heads, group // heads, threads // WARP
    L, Q = -(-D // KEY_DIMS), -(-D // VALUE_DIMS)  # 16-byte loads of each lane for a token's key, and for its value
    K_REGS, V_REGS, O_REGS = 8 * L, 16 * Q, 32 * Q
    VECTORS = MMA_HEADS + 2  # rotated: queries, new key, new value
    Q_WORDS, VECTOR_ROUNDS = 2 * L * WARP * 4, -(-VECTORS * DP // 2 // threads)
    ROTATED, ROTATIONS, PADS = VECTORS * DP, -(-VECTORS * HALF // threads), VECTORS * (DP - D)
    STRIDE = DP + 4  # keeps the heads' sums in different banks
    PIECES = HEADS * DP // 4  # of 16 bytes in a split's partial result
    READERS = threads // PIECES  # splits that a head's last block reads at a time
    if READERS < 1:
        raise ValueError(f"decode_attention_mma needs {PIECES} threads a block, not {threads}")
    PREFETCH_REGS = 4 * PREFETCH
    ACC_FLOATS = max(WARPS * MMA_HEADS * STRIDE, READERS * PIECES * 4)
    STATS, WEIGHTS = WARPS * MMA_HEADS, max(WARPS, MAX_SPLITS) * MMA_HEADS
    OUTPUTS, LAST_OUTPUTS = -(-HEADS * DP // 4 // threads), -(-HEADS * D // threads)
    HEAD_ROUNDS, SPLIT_ROUNDS = -(-MMA_HEADS // WARPS), MAX_SPLITS // WARP
    STORES = -(-2 * WORDS // threads)
    SCALE, ZERO = score_scale(D), float32(0)

    @device_function
    def rotate_vectors(qkv, cos_r, sin_r, rotated_s, tid, first_head, kv, num_kv_heads):
        """Queries, rotated and scaled; the new key, rotated, and the new value, both rounded."""
        for n in range(ROTATIONS):
            i = int32(tid + n * threads)
            if i < VECTORS * HALF:
                row = ptx.udiv(i, int32(HALF))
                j = int32(i - row * HALF)
                head = int32(first_head + row)
                if row >= MMA_HEADS:
                    head = int32(num_kv_heads * group + kv + (row - MMA_HEADS) * num_kv_heads)
                x0 = x1 = ZERO
                if row >= MMA_HEADS or row < HEADS:
                    x0, x1 = qkv[head * D + j], qkv[head * D + HALF + j]
                y0, y1 = rotate_pair(x0, x1, cos_r[n], sin_r[n])
                if row > MMA_HEADS:
                    y0, y1 = x0, x1
                y0 = rounded(y0) if row >= MMA_HEADS else y0 * SCALE
                y1 = rounded(y1) if row >= MMA_HEADS else y1 * SCALE
                rotated_s[row * DP + j] = y0
                rotated_s[row * DP + HALF + j] = y1
        if DP > D:
            for i in range(tid, PADS, threads):
                row = int32(i // (DP - D))
                rotated_s[row * DP + D + i - row * (DP - D)] = ZERO

    @device_function
    def store_vectors(q_s, new_s, rotated_s, tid):
        """The queries as left operands, the new key and value as the cache has them."""
        for n in range(VECTOR_ROUNDS):
            i = int32(tid + n * threads)
            head = ptx.udiv(i, int32(DP // 2))
            word = int32(i - head * (DP // 2))
            if head < MMA_HEADS and word < 16 * L:
                store_query(q_s, head, word, rotated_s[head * DP + 2 * word], rotated_s[head * DP + 2 * word + 1])
            elif MMA_HEADS <= head < VECTORS:
                new_s[(head - MMA_HEADS) * (DP // 2) + word] = pack(
                    rotated_s[head * DP + 2 * word], rotated_s[head * DP + 2 * word + 1]
                )

    @device_function
    def insert_key(k_r, new_s, new, g, c):
        """Puts the new key, token `new` of the tile, into its lanes' registers."""
        for i in range(L):
            a0, a1, a2, a3 = ptx.load4(new_s, 4 * c + 16 * i)
            if g == new:
                k_r[8 * i], k_r[8 * i + 1], k_r[8 * i + 2], k_r[8 * i + 3] = a0, a1, a2, a3
            if g + 8 == new:
                k_r[8 * i + 4], k_r[8 * i + 5], k_r[8 * i + 6], k_r[8 * i + 7] = a0, a1, a2, a3

    @device_function
    def insert_value(v_r, new_s, new, g, c):
        """The new value likewise."""
        for i in range(Q):
            b0, b1, b2, b3 = ptx.load4(new_s, 4 * g + (DP // 2 + 32 * i))
            for t in range(4):
                n = 16 * i + 4 * t
                if 2 * c + (t & 1) + 4 * (t & 2) == new:
                    v_r[n], v_r[n + 1], v_r[n + 2], v_r[n + 3] = b0, b1, b2, b3

    @device_function
    def multiply_values(o_r, v_r, a0, a1, a2, a3):
        """o_r += p . v of a tile."""
        for i in range(Q):
            for j in range(4):
                v = 16 * i + j
                for odd in range(2):
                    halves = HIGH_HALVES if odd else LOW_HALVES
                    b0 = int32(ptx.byte_permute(v_r[v], v_r[v + 4], halves))
                    b1 = int32(ptx.byte_permute(v_r[v + 8], v_r[v + 12], halves))
                    mma_into(o_r, 8 * (4 * i + j) + 4 * odd, a0, a1, a2, a3, b0, b1)

    @device_function
    def store_warp(acc_s, max_s, sum_s, o_r, row_max, row_sum, warp, g, c):
        """A warp's results. Lanes g and g + 4 trade: each adds up the terms of eight dimensions of sixteen."""
        row_sum += ptx.shuffle_xor(row_sum, 1)
        row_sum += ptx.shuffle_xor(row_sum, 2)
        if c == 0 and g < MMA_HEADS:
            max_s[warp * MMA_HEADS + g] = row_max
            sum_s[warp * MMA_HEADS + g] = row_sum
        wr = (warp * MMA_HEADS + (g & 3)) * STRIDE + 16 * c + 2 * (g & 4)
        for i in range(2 * Q):  # a lane's eight neighbouring dimensions are eight products' columns
            for j in range(4):
                n = 4 * (4 * i + j)
                near, far = o_r[n] + o_r[n + 2], o_r[n + 1] + o_r[n + 3]  # dimension 16c + .. and 16c + 8 + ..
                sent = far if g < MMA_HEADS else near
                o_r[4 * i + j] = (near if g < MMA_HEADS else far) + ptx.shuffle_xor(sent, 16)
            to = wr + (i // 2 * VALUE_DIMS + i % 2 * 4)
            ptx.store4(acc_s, to, o_r[4 * i], o_r[4 * i + 1], o_r[4 * i + 2], o_r[4 * i + 3])

    @device_function
    def weigh_warps(max_s, sum_s, weight_s, row_max_s, row_sum_s, warp, lane):
        """Each warp's weight, and each head's maximum and sum over the warps."""
        for n in range(HEAD_ROUNDS):
            h = int32(warp + n * WARPS)
            if h < MMA_HEADS:
                row_max = max_s[lane * MMA_HEADS + h] if lane < WARPS else MINUS_INF
                row_sum = sum_s[lane * MMA_HEADS + h] if lane < WARPS else ZERO
                largest = ptx.warp_max(row_max)
                weight = ptx.exp2_approx(row_max - largest)
                row_sum = ptx.warp_sum(weight * row_sum)
                if lane < WARPS:
                    weight_s[lane * MMA_HEADS + h] = weight
                if lane == 0:
                    row_max_s[h], row_sum_s[h] = largest, row_sum

    def decode_attention_mma(
        qkv, cos, sin, position, keys, values, partials, stats, arrivals, out, num_kv_heads, capacity, min_split_tokens
    ):
        q_s = ptx.pointer(cuda.shared.array(Q_WORDS, int32, SHARED_ALIGN))  # left operands: [steps, lane, 4 registers]
        rotated_s = ptx.pointer(cuda.shared.array(ROTATED, float32, SHARED_ALIGN))  # [VECTORS, DP]
        new_s = ptx.pointer(cuda.shared.array(DP, int32, SHARED_ALIGN))  # [2, DP / 2] the new key and value, as stored
        acc_s = ptx.pointer(cuda.shared.array(ACC_FLOATS, float32, SHARED_ALIGN))  # [WARPS, MMA_HEADS, STRIDE]
        max_s = ptx.pointer(cuda.shared.array(STATS, float32))  # [WARPS, MMA_HEADS]
        sum_s = ptx.pointer(cuda.shared.array(STATS, float32))
        weight_s = ptx.pointer(cuda.shared.array(WEIGHTS, float32))  # [warps or splits, MMA_HEADS]
        row_max_s = ptx.pointer(cuda.shared.array(MMA_HEADS, float32))
        row_sum_s = ptx.pointer(cuda.shared.array(MMA_HEADS, float32))
        arrived_s = ptx.pointer(cuda.shared.array(1, int32))
        k_r = cuda.local.array(K_REGS, int32)
        v_r = cuda.local.array(V_REGS, int32)
        o_r = cuda.local.array(O_REGS, float32)
        prefetch_r = cuda.local.array(PREFETCH_REGS, float32)
        max_r = cuda.local.array(SPLIT_ROUNDS, float32)
        cos_r = cuda.local.array(ROTATIONS, float32)
        sin_r = cuda.local.array(ROTATIONS, float32)

        release()
        tid = int32(cuda.threadIdx.x)
        warp, lane = tid >> 5, tid & 31
        g, c = lane >> 2, lane & 3
        split, grid_splits, head_block = int32(cuda.blockIdx.x), int32(cuda.gridDim.x), int32(cuda.blockIdx.y)
        kv = head_block if HEAD_BLOCKS == 1 else ptx.udiv(head_block, int32(HEAD_BLOCKS))
        first_head = head_block * HEADS
        pos = int32(position[0])
        tiles = int32((pos >> 4) + 1)
        split_tiles = max(int32((min_split_tokens + 15) >> 4), ptx.udiv(int32(tiles + grid_splits - 1), grid_splits))
        if tiles <= WARPS:
            split_tiles = int32(WARPS)  # one tile for each warp of one block: no other block to wait for
        current = int32(split * split_tiles)
        if current >= tiles:
            return
        end = min(int32(current + split_tiles), tiles)
        current = int32(current + warp)
        # Words of this lane's tokens and dimensions; 64 bits, for a cache may hold more than 2^31 words.
        k_rd = (kv * capacity + current * TILE_TOKENS + g) * WORDS + c * 4
        v_rd = (kv * capacity + current * TILE_TOKENS + 2 * c) * WORDS + g * 4
        # Tokens t < left exist in the cache, t counted from this tile's first.
        left = int32(pos - current * TILE_TOKENS) if current < end else int32(0)
        load_keys(k_r, keys, k_rd, left, g, c)
        load_values(v_r, values, v_rd, left, g, c)
        for n in range(ROTATIONS):
            i = int32(tid + n * threads)
            j = int32(pos * HALF + i - ptx.udiv(i, int32(HALF)) * HALF)
            cos_r[n], sin_r[n] = cos[j], sin[j]

        wait()
        rotate_vectors(qkv, cos_r, sin_r, rotated_s, tid, first_head, kv, num_kv_heads)
        cuda.syncthreads()
        store_vectors(q_s, new_s, rotated_s, tid)
        cuda.syncthreads()

        for i in range(O_REGS):
            o_r[i] = ZERO
        row_max, row_sum = MINUS_INF, ZERO
        while current < end:
            left = int32(pos - current * TILE_TOKENS)
            if left < TILE_TOKENS:  # the new token is in this tile
                insert_key(k_r, new_s, left, g, c)
            s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = ZERO  # of the first half of each piece's dimensions
            u0 = u1 = u2 = u3 = w0 = w1 = w2 = w3 = ZERO  # of the second: shorter chains
            for i in range(L):
                a0, a1, a2, a3 = ptx.load4(q_s, lane * 4 + 2 * i * WARP * 4)
                s0, s1, s2, s3 = mma(a0, a1, a2, a3, k_r[8 * i], k_r[8 * i + 1], s0, s1, s2, s3)
                t0, t1, t2, t3 = mma(a0, a1, a2, a3, k_r[8 * i + 4], k_r[8 * i + 5], t0, t1, t2, t3)
                a0, a1, a2, a3 = ptx.load4(q_s, lane * 4 + (2 * i + 1) * WARP * 4)
                u0, u1, u2, u3 = mma(a0, a1, a2, a3, k_r[8 * i + 2], k_r[8 * i + 3], u0, u1, u2, u3)
                w0, w1, w2, w3 = mma(a0, a1, a2, a3, k_r[8 * i + 6], k_r[8 * i + 7], w0, w1, w2, w3)
            following = int32(current + WARPS)
            if following < end:
                k_rd += WARPS * TILE_TOKENS * WORDS
                load_keys(k_r, keys, k_rd, int32(left - WARPS * TILE_TOKENS), g, c)
            # The three terms' rows add up to the scores of head g % 4: tokens 2c, 2c + 1, 2c + 8, 2c + 9.
            s0, s1 = (s0 + s2) + (u0 + u2), (s1 + s3) + (u1 + u3)
            t0, t1 = (t0 + t2) + (w0 + w2), (t1 + t3) + (w1 + w3)
            s0 += ptx.shuffle_xor(s0, 16)
            s1 += ptx.shuffle_xor(s1, 16)
            t0 += ptx.shuffle_xor(t0, 16)
            t1 += ptx.shuffle_xor(t1, 16)
            if left < TILE_TOKENS:
                s0, s1, t0, t1 = mask_tile(s0, s1, t0, t1, c, left)
            before = row_max
            s0, s1, t0, t1, row_max, row_sum, alpha = online_softmax(s0, s1, t0, t1, row_max, row_sum)
            hi0, hi1, lo0, lo1 = weight_terms(s0, s1, t0, t1, g)
            if before != MINUS_INF:
                for i in range(O_REGS):
                    o_r[i] *= alpha
            if left < TILE_TOKENS:
                insert_value(v_r, new_s, left, g, c)
            multiply_values(o_r, v_r, hi0, lo0, hi1, lo1)
            if following < end:
                v_rd += WARPS * TILE_TOKENS * WORDS
                load_values(v_r, values, v_rd, int32(left - WARPS * TILE_TOKENS), g, c)
            current = following

        # The warps meet.
        store_warp(acc_s, max_s, sum_s, o_r, row_max, row_sum, warp, g, c)
        cuda.syncthreads()
        weigh_warps(max_s, sum_s, weight_s, row_max_s, row_sum_s, warp, lane)
        cuda.syncthreads()
        num_splits = int32(1)
        if tiles > split_tiles:
            num_splits = ptx.udiv(int32(tiles + split_tiles - 1), split_tiles)
        part_wr = (head_block * grid_splits + split) * HEADS
        for n in range(OUTPUTS):
            i = int32(tid + n * threads)
            h = ptx.udiv(i, int32(DP // 4))
            d = int32((i - h * (DP // 4)) * 4)
            if h < HEADS:
                a0 = a1 = a2 = a3 = ZERO
                for w in range(WARPS):
                    weight = weight_s[w * MMA_HEADS + h]
                    b0, b1, b2, b3 = ptx.load4(acc_s, h * STRIDE + d + w * (MMA_HEADS * STRIDE))
                    a0, a1, a2, a3 = a0 + weight * b0, a1 + weight * b1, a2 + weight * b2, a3 + weight * b3
                if num_splits == 1:
                    inverse = ptx.div_rn(float32(1), row_sum_s[h])
                    store_out(out, (first_head + h) * D + d, d, a0, a1, a2, a3, inverse)
                else:
                    ptx.store4(partials, (part_wr + h) * DP + d, a0, a1, a2, a3)
        if num_splits > 1 and tid < HEADS:
            stats[(part_wr + tid) * 2] = row_max_s[tid]
            stats[(part_wr + tid) * 2 + 1] = row_sum_s[tid]
        # The block that holds the new token stores it.
        if end == tiles and head_block % HEAD_BLOCKS == 0:
            for n in range(STORES):
                i = int32(tid + n * threads)
                if i < WORDS:
                    keys[(kv * capacity + pos) * WORDS + i] = new_s[i]
                elif i < 2 * WORDS:
                    values[(kv * capacity + pos) * WORDS + i - WORDS] = new_s[i - WORDS + DP // 2]
        if num_splits == 1:
            return

        # The last block of this head to arrive adds up the splits.
        cuda.syncthreads()
        if tid == 0:
            arrived_s[0] = int32(ptx.atomic_fetch_add_ordered(arrivals, head_block, uint32(1)))
        cuda.syncthreads()
        if arrived_s[0] != num_splits - 1:
            return
        # Every split's partial result is there. A thread reads 16 bytes of every READERS-th split.
        reader = ptx.udiv(tid, int32(PIECES))
        piece = int32(tid - reader * PIECES)
        h = ptx.udiv(piece, int32(DP // 4))
        part_rd = head_block * grid_splits * HEADS
        a0 = a1 = a2 = a3 = ZERO
        first = int32(0)
        while first < num_splits:
            for j in range(PREFETCH):
                s = int32(first + j * READERS + reader)
                for k in range(4):
                    prefetch_r[4 * j + k] = ZERO
                if s < num_splits and reader < READERS and h < HEADS:
                    load4_into(prefetch_r, 4 * j, partials, (part_rd + s * HEADS) * DP + piece * 4)
            if first == 0:  # each split's weight, and each head's sum over the splits
                for n in range(HEAD_ROUNDS):
                    head = int32(warp + n * WARPS)
                    if head < HEADS:
                        largest = MINUS_INF
                        for k in range(SPLIT_ROUNDS):
                            i = int32(lane + k * WARP)
                            row_max = MINUS_INF
                            if i < num_splits:
                                row_max = stats[(part_rd + i * HEADS + head) * 2]
                            max_r[k] = row_max
                            largest = max(largest, row_max)
                        largest = ptx.warp_max(largest)
                        row_sum = ZERO
                        for k in range(SPLIT_ROUNDS):
                            i = int32(lane + k * WARP)
                            if i < num_splits:
                                weight = ptx.exp2_approx(max_r[k] - largest)
                                weight_s[i * MMA_HEADS + head] = weight
                                row_sum += weight * stats[(part_rd + i * HEADS + head) * 2 + 1]
                        row_sum = ptx.warp_sum(row_sum)
                        if lane == 0:
                            row_sum_s[head] = row_sum
                cuda.syncthreads()
            for j in range(PREFETCH):
                s = int32(first + j * READERS + reader)
                if s < num_splits and h < HEADS:
                    weight = weight_s[s * MMA_HEADS + h]
                    a0 += weight * prefetch_r[4 * j]
                    a1 += weight * prefetch_r[4 * j + 1]
                    a2 += weight * prefetch_r[4 * j + 2]
                    a3 += weight * prefetch_r[4 * j + 3]
            first = int32(first + PREFETCH * READERS)
        if reader < READERS:
            ptx.store4(acc_s, tid * 4, a0, a1, a2, a3)
        cuda.syncthreads()
        for n in range(LAST_OUTPUTS):
            i = int32(tid + n * threads)
            h = ptx.udiv(i, int32(D))
            if h < HEADS:
                x = ZERO
                for r in range(READERS):
                    x += acc_s[r * PIECES * 4 + h * DP + i - h * D]
                out[first_head * D + i] = finite_or_inf(ptx.div_rn(x, row_sum_s[h]))
        if tid == 0:
            arrivals[head_block] = 0

    return decode_attention_mma
