"""Attention of one token over a long context, on tensor cores: what `attention` does, faster from 256 tokens on.

Same launch, same cache, same contract (see attention.py); only the products differ. There, a lane's multiply-adds and
the shuffles that add them up are what takes the time: 7 us of a launch's 10 at 4096 tokens of 2B4T, against 2.5 us for
reading the cache. Here both are matrix products m16n8k16, bfloat16 in, float32 sums. The cache is bfloat16 as it is. q
and the weights p are float32, so each is split into three bfloat16 terms (x = hi + mid + lo: 24 bits in all), which are
three rows of the left operand: 4 query heads x 3 terms = 12 of its 16 rows, and the sum of a head's three rows is the
product, exact but for the float32 sums themselves.

    grid       x: splits of the context        y: key-value heads (times the parts of a group's query heads)
    warp w     groups of 16 tokens w, w + W, ... of its block's split;        lane: g = lane / 4, c = lane % 4

    scores [16 rows, 8 tokens] += q [16, 16 dims] . k [16 dims, 8 tokens]      lane: token g, dims 8c .. 8c + 7 of 32
        rows g and g + 8: hi of head g or mid of head g - 4, and lo; c0 + c2, plus those of lane ^ 16, is the score.
        So lanes g and g + 4 hold head g % 4, tokens 2c and 2c + 1: just what the left operand below wants of them.
    out [16 rows, 8 dims] += p [16, 16 tokens] . v [16 tokens, 8 dims]         tokens 2c, 2c + 1, 2c + 8, 2c + 9, dims
        8g .. 8g + 7 of 64: two tokens' words are shuffled byte by byte into pairs of one dimension.

A product's dimensions may be taken in any order, as long as both operands agree: so a lane's 16 bytes lie together. The
softmax runs along (a maximum per warp and head); the warps meet in shared memory, the blocks as in attention.py.

Measured with values stored in pairs of tokens, which needs no byte shuffles but another cache layout than the other
kernel's (H200, 2B4T, us in a layer's chain of launches at 511 / 1023 / 4095 tokens): 18.3 / 19.8 / 22.2, where the
multiply-add forms give 19.1 / 20.3 / 24.4. This version has not been timed.
"""

from collections.abc import Callable

import numpy as np
from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32, uint32

MIN_ARCH = 80  # mma of bfloat16
SLOTS = 4  # query heads of a block: three rows each of a product's sixteen
GROUP_TOKENS = 16  # tokens that a warp takes at a time
LANE_DIMS = 8  # of a 16-byte load
KEY_DIMS, VALUE_DIMS = 32, 64  # dimensions that one load of a token's four, or eight, lanes covers
MAX_SPLITS = 128
MAX_HEAD_DIM = 128  # larger ones' keys, values and output do not fit the registers at once
THREADS = 384  # one block a SM: 12 warps of 168 registers
LOWER, UPPER = 0x5410, 0x7632  # byte_permute selectors: the lower halves of two words, and the upper ones
LOG2_E = np.log2(np.e)


def partial_dims(head_dim: int) -> int:
    """Dimensions of a head's partial result, with padding."""
    return -(-head_dim // VALUE_DIMS) * VALUE_DIMS


@device_function
def store_query(q_s, head, word, x0, x1):
    """Dimensions 2 word, 2 word + 1 of a head's query as left operand, in three bfloat16 terms: registers 0 and 2 hold
    rows 0 .. 7 (first and second terms), 1 and 3 rows 8 .. 15 (third terms, zeros). q_s: [steps, lane, 4 registers]."""
    high = ptx.pack_bf16x2(x0, x1)
    x0, x1 = x0 - ptx.bf16_low(high), x1 - ptx.bf16_high(high)
    middle = ptx.pack_bf16x2(x0, x1)
    step, c = int32((word >> 4) * 2 + (word >> 1 & 1)), word >> 2 & 3
    to = int32((step * WARP + head * 4 + c) * 4 + (word & 1) * 2)
    q_s[to] = high
    q_s[to + 1] = ptx.pack_bf16x2(x0 - ptx.bf16_low(middle), x1 - ptx.bf16_high(middle))
    q_s[to + 64] = middle
    q_s[to + 65] = int32(0)


def make_long_attention(arch: int, head_dim: int, group: int, heads: int, threads: int) -> Callable[..., None]:
    """The kernel for a head size and a number of query heads per key-value head, `heads` (at most SLOTS, a divisor) of
    them a block. Its arguments are those of attention.py's kernel."""
    stream, wait, release = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    mma, pack = ptx.mma_bf16, ptx.pack_bf16x2
    D, HALF = head_dim, head_dim // 2
    WORDS = -(-head_dim // LANE_DIMS) * LANE_DIMS // 2  # of a token in the cache
    HEADS = heads
    PARTS = group // HEADS
    WARPS = threads // WARP
    L, Q = -(-D // KEY_DIMS), -(-D // VALUE_DIMS)  # 16-byte loads of each lane for a token's key, and for its value
    DP = VALUE_DIMS * Q  # dimensions with padding, in shared memory and in partial results
    WHOLE = 2 * WORDS == KEY_DIMS * L and 2 * WORDS == DP  # every lane of every load has dimensions
    K_REGS, V_REGS, O_REGS = 8 * L, 16 * Q, 32 * Q
    Q_WORDS, SPLITS_Q = 2 * L * WARP * 4, -(-(SLOTS + 2) * DP // 2 // threads)
    ROWS = SLOTS + 2  # of rotated vectors: queries, new key, new value
    ROTATED, ROTATIONS, PADS = ROWS * DP, -(-ROWS * HALF // threads), ROWS * (DP - D)
    STRIDE = DP + 4  # keeps the heads' sums in different banks
    PIECES = HEADS * DP // 4  # of 16 bytes in a split's partial result
    READERS = threads // PIECES
    if READERS < 1:
        raise ValueError(f"long attention needs {PIECES} threads a block, not {threads}")
    AHEAD = 10  # partial results that a thread has in flight
    AHEAD_REGS = 4 * AHEAD
    SUMS = max(WARPS * SLOTS * STRIDE, READERS * PIECES * 4)
    WARP_HEADS = WARPS * SLOTS
    WEIGHTS = max(WARPS, MAX_SPLITS) * SLOTS
    OUTPUTS, LAST_OUTPUTS = -(-HEADS * DP // 4 // threads), -(-HEADS * D // threads)
    HEAD_TURNS, SPLIT_TURNS = -(-SLOTS // WARPS), MAX_SPLITS // WARP
    STORES = -(-2 * WORDS // threads)
    SCALE = float32(D**-0.5 * LOG2_E)  # exponentials are taken to base 2
    LOWEST, ZERO = float32(-np.inf), float32(0)

    def attention(qkv, cos, sin, position, keys, values, partials, stats, arrivals, out, kv_heads, capacity, least):
        q_s = ptx.pointer(cuda.shared.array(Q_WORDS, int32, SHARED_ALIGN))  # left operands: [STEPS, lane, 4 registers]
        rotated_s = ptx.pointer(
            cuda.shared.array(ROTATED, float32, SHARED_ALIGN)
        )  # [SLOTS queries, new key, new value; DP]
        new_s = ptx.pointer(cuda.shared.array(DP, int32, SHARED_ALIGN))  # [2, DP / 2] the new key and value, as stored
        sum_s = ptx.pointer(cuda.shared.array(SUMS, float32, SHARED_ALIGN))  # [WARPS, SLOTS, STRIDE]
        max_s = ptx.pointer(cuda.shared.array(WARP_HEADS, float32))
        total_s = ptx.pointer(cuda.shared.array(WARP_HEADS, float32))
        weight_s = ptx.pointer(cuda.shared.array(WEIGHTS, float32))  # [warps or splits, SLOTS]
        top_s = ptx.pointer(cuda.shared.array(SLOTS, float32))
        whole_s = ptx.pointer(cuda.shared.array(SLOTS, float32))
        arrived_s = ptx.pointer(cuda.shared.array(1, int32))
        k_r = cuda.local.array(K_REGS, int32)
        v_r = cuda.local.array(V_REGS, int32)
        o_r = cuda.local.array(O_REGS, float32)
        ahead_r = cuda.local.array(AHEAD_REGS, float32)
        tops_r = cuda.local.array(SPLIT_TURNS, float32)
        cos_r = cuda.local.array(ROTATIONS, float32)
        sin_r = cuda.local.array(ROTATIONS, float32)

        release()
        tid = int32(cuda.threadIdx.x)
        warp, lane = tid >> 5, tid & 31
        g, c = lane >> 2, lane & 3
        split, splits, part = int32(cuda.blockIdx.x), int32(cuda.gridDim.x), int32(cuda.blockIdx.y)
        kv = part if PARTS == 1 else ptx.udiv(part, int32(PARTS))
        first_head = part * HEADS
        pos = int32(position[0])
        groups = int32((pos >> 4) + 1)
        chunk = max(int32((least + 15) >> 4), ptx.udiv(int32(groups + splits - 1), splits))
        if groups <= WARPS:
            chunk = int32(WARPS)  # one group for each warp of one block: no other block to wait for
        current = int32(split * chunk)
        if current >= groups:
            return
        end = min(int32(current + chunk), groups)
        current = int32(current + warp)
        # Words of this lane's tokens and dimensions; 64 bits, for a cache may hold more than 2^31 words.
        k_rd = (kv * capacity + current * GROUP_TOKENS + g) * WORDS + c * 4
        v_rd = (kv * capacity + current * GROUP_TOKENS + 2 * c) * WORDS + g * 4
        # Tokens t < left exist in the cache, t counted from this group's first.
        left = int32(pos - current * GROUP_TOKENS) if current < end else int32(0)
        for i in range(L):
            for t in range(2):
                n = 8 * i + 4 * t
                k_r[n] = k_r[n + 1] = k_r[n + 2] = k_r[n + 3] = int32(0)
                if g + 8 * t < left and (WHOLE or 16 * i + 4 * c < WORDS):
                    k_r[n], k_r[n + 1], k_r[n + 2], k_r[n + 3] = stream(keys, k_rd + (8 * t * WORDS + 16 * i))
        for i in range(Q):
            for t in range(4):
                n = 16 * i + 4 * t
                at = (t & 1) + 4 * (t & 2)
                v_r[n] = v_r[n + 1] = v_r[n + 2] = v_r[n + 3] = int32(0)
                if 2 * c + at < left and (WHOLE or 32 * i + 4 * g < WORDS):
                    v_r[n], v_r[n + 1], v_r[n + 2], v_r[n + 3] = stream(values, v_rd + (at * WORDS + 32 * i))
        for n in range(ROTATIONS):
            i = int32(tid + n * threads)
            j = int32(pos * HALF + i - ptx.udiv(i, int32(HALF)) * HALF)
            cos_r[n], sin_r[n] = cos[j], sin[j]

        wait()
        # Rotation of the queries and the new key; the new value comes along unrotated.
        for n in range(ROTATIONS):
            i = int32(tid + n * threads)
            if i < ROWS * HALF:
                row = ptx.udiv(i, int32(HALF))
                j = int32(i - row * HALF)
                head = int32(first_head + row)
                if row >= SLOTS:
                    head = int32(kv_heads * group + kv + (row - SLOTS) * kv_heads)
                x0 = x1 = ZERO
                if row >= SLOTS or row < HEADS:
                    x0, x1 = qkv[head * D + j], qkv[head * D + HALF + j]
                y0 = ptx.add_rn(ptx.mul_rn(x0, cos_r[n]), ptx.mul_rn(-x1, sin_r[n]))
                y1 = ptx.add_rn(ptx.mul_rn(x1, cos_r[n]), ptx.mul_rn(x0, sin_r[n]))
                if row > SLOTS:
                    y0, y1 = x0, x1
                y0 = ptx.to_bf16(y0) if row >= SLOTS else y0 * SCALE
                y1 = ptx.to_bf16(y1) if row >= SLOTS else y1 * SCALE
                rotated_s[row * DP + j] = y0
                rotated_s[row * DP + HALF + j] = y1
        if DP > D:
            for i in range(tid, PADS, threads):
                row = int32(i // (DP - D))
                rotated_s[row * DP + D + i - row * (DP - D)] = ZERO
        cuda.syncthreads()
        # The queries as left operands, the new key and value as bfloat16.
        for n in range(SPLITS_Q):
            i = int32(tid + n * threads)
            head = ptx.udiv(i, int32(DP // 2))
            word = int32(i - head * (DP // 2))
            if head < SLOTS and word < 16 * L:
                store_query(q_s, head, word, rotated_s[head * DP + 2 * word], rotated_s[head * DP + 2 * word + 1])
            elif SLOTS <= head < ROWS:
                new_s[(head - SLOTS) * (DP // 2) + word] = pack(
                    rotated_s[head * DP + 2 * word], rotated_s[head * DP + 2 * word + 1]
                )
        cuda.syncthreads()

        for i in range(O_REGS):
            o_r[i] = ZERO
        top, total = LOWEST, ZERO
        while current < end:
            left = int32(pos - current * GROUP_TOKENS)
            if left < GROUP_TOKENS:  # the new token is in this group: its key
                for i in range(L):
                    a0, a1, a2, a3 = ptx.load4(new_s, 4 * c + 16 * i)
                    if g == left:
                        k_r[8 * i], k_r[8 * i + 1], k_r[8 * i + 2], k_r[8 * i + 3] = a0, a1, a2, a3
                    if g + 8 == left:
                        k_r[8 * i + 4], k_r[8 * i + 5], k_r[8 * i + 6], k_r[8 * i + 7] = a0, a1, a2, a3
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
                k_rd += WARPS * GROUP_TOKENS * WORDS
                ahead = int32(left - WARPS * GROUP_TOKENS)
                for i in range(L):
                    for t in range(2):
                        n = 8 * i + 4 * t
                        k_r[n] = k_r[n + 1] = k_r[n + 2] = k_r[n + 3] = int32(0)
                        if g + 8 * t < ahead and (WHOLE or 16 * i + 4 * c < WORDS):
                            k_r[n], k_r[n + 1], k_r[n + 2], k_r[n + 3] = stream(keys, k_rd + (8 * t * WORDS + 16 * i))
            # The three terms' rows add up to the scores of head g % 4: tokens 2c, 2c + 1, 2c + 8, 2c + 9.
            s0, s1 = (s0 + s2) + (u0 + u2), (s1 + s3) + (u1 + u3)
            t0, t1 = (t0 + t2) + (w0 + w2), (t1 + t3) + (w1 + w3)
            s0 += ptx.shuffle_xor(s0, 16)
            s1 += ptx.shuffle_xor(s1, 16)
            t0 += ptx.shuffle_xor(t0, 16)
            t1 += ptx.shuffle_xor(t1, 16)
            if left < GROUP_TOKENS:
                s0 = s0 if 2 * c <= left else LOWEST
                s1 = s1 if 2 * c + 1 <= left else LOWEST
                t0 = t0 if 2 * c + 8 <= left else LOWEST
                t1 = t1 if 2 * c + 9 <= left else LOWEST
            before = top
            top = max(top, max(max(s0, s1), max(t0, t1)))
            top = max(top, ptx.shuffle_xor(top, 1))
            top = max(top, ptx.shuffle_xor(top, 2))
            alpha = ptx.exp2_approx(before - top)
            s0, s1 = ptx.exp2_approx(s0 - top), ptx.exp2_approx(s1 - top)
            t0, t1 = ptx.exp2_approx(t0 - top), ptx.exp2_approx(t1 - top)
            total = total * alpha + ((s0 + s1) + (t0 + t1))
            a0, a2 = pack(s0, s1), pack(t0, t1)  # hi
            s0, s1, t0, t1 = (
                s0 - ptx.bf16_low(a0),
                s1 - ptx.bf16_high(a0),
                t0 - ptx.bf16_low(a2),
                t1 - ptx.bf16_high(a2),
            )
            b0, b1 = pack(s0, s1), pack(t0, t1)  # mid
            a1 = pack(s0 - ptx.bf16_low(b0), s1 - ptx.bf16_high(b0))  # lo
            a3 = pack(t0 - ptx.bf16_low(b1), t1 - ptx.bf16_high(b1))
            if g >= SLOTS:
                a0, a1, a2, a3 = b0, int32(0), b1, int32(0)
            if before != LOWEST:
                for i in range(O_REGS):
                    o_r[i] *= alpha
            if left < GROUP_TOKENS:  # the new value
                for i in range(Q):
                    b0, b1, b2, b3 = ptx.load4(new_s, 4 * g + (DP // 2 + 32 * i))
                    for t in range(4):
                        n = 16 * i + 4 * t
                        if 2 * c + (t & 1) + 4 * (t & 2) == left:
                            v_r[n], v_r[n + 1], v_r[n + 2], v_r[n + 3] = b0, b1, b2, b3
            for i in range(Q):
                for j in range(4):
                    v = 16 * i + j
                    for odd in range(2):
                        n = 8 * (4 * i + j) + 4 * odd
                        halves = UPPER if odd else LOWER
                        b0 = int32(ptx.byte_permute(v_r[v], v_r[v + 4], halves))
                        b1 = int32(ptx.byte_permute(v_r[v + 8], v_r[v + 12], halves))
                        o0, o1, o2, o3 = o_r[n], o_r[n + 1], o_r[n + 2], o_r[n + 3]
                        o0, o1, o2, o3 = mma(a0, a1, a2, a3, b0, b1, o0, o1, o2, o3)
                        o_r[n], o_r[n + 1], o_r[n + 2], o_r[n + 3] = o0, o1, o2, o3
            if following < end:
                v_rd += WARPS * GROUP_TOKENS * WORDS
                ahead = int32(left - WARPS * GROUP_TOKENS)
                for i in range(Q):
                    for t in range(4):
                        n = 16 * i + 4 * t
                        at = (t & 1) + 4 * (t & 2)
                        v_r[n] = v_r[n + 1] = v_r[n + 2] = v_r[n + 3] = int32(0)
                        if 2 * c + at < ahead and (WHOLE or 32 * i + 4 * g < WORDS):
                            b0, b1, b2, b3 = stream(values, v_rd + (at * WORDS + 32 * i))
                            v_r[n], v_r[n + 1], v_r[n + 2], v_r[n + 3] = b0, b1, b2, b3
            current = following

        # The warps meet. Lanes g and g + 4 trade: each adds up the terms of eight dimensions of sixteen.
        total += ptx.shuffle_xor(total, 1)
        total += ptx.shuffle_xor(total, 2)
        if c == 0 and g < SLOTS:
            max_s[warp * SLOTS + g] = top
            total_s[warp * SLOTS + g] = total
        sum_wr = (warp * SLOTS + (g & 3)) * STRIDE + 16 * c + 2 * (g & 4)
        for i in range(
            2 * Q
        ):  # eight tiles are a lane's eight neighbouring dimensions, four of them two pieces of 16 bytes
            for j in range(4):
                n = 4 * (4 * i + j)
                near, far = o_r[n] + o_r[n + 2], o_r[n + 1] + o_r[n + 3]  # dimension 16c + .. and 16c + 8 + ..
                sent = far if g < SLOTS else near
                o_r[4 * i + j] = (near if g < SLOTS else far) + ptx.shuffle_xor(sent, 16)
            to = sum_wr + (i // 2 * VALUE_DIMS + i % 2 * 4)
            ptx.store4(sum_s, to, o_r[4 * i], o_r[4 * i + 1], o_r[4 * i + 2], o_r[4 * i + 3])
        cuda.syncthreads()
        for n in range(HEAD_TURNS):
            h = int32(warp + n * WARPS)
            if h < SLOTS:
                top = max_s[lane * SLOTS + h] if lane < WARPS else LOWEST
                total = total_s[lane * SLOTS + h] if lane < WARPS else ZERO
                largest = ptx.warp_max(top)
                weight = ptx.exp2_approx(top - largest)
                total = ptx.warp_sum(weight * total)
                if lane < WARPS:
                    weight_s[lane * SLOTS + h] = weight
                if lane == 0:
                    top_s[h], whole_s[h] = largest, total
        cuda.syncthreads()
        used = int32(1)
        if groups > chunk:
            used = ptx.udiv(int32(groups + chunk - 1), chunk)
        part_wr = (part * splits + split) * HEADS
        for n in range(OUTPUTS):
            i = int32(tid + n * threads)
            h = ptx.udiv(i, int32(DP // 4))
            d = int32((i - h * (DP // 4)) * 4)
            if h < HEADS:
                a0 = a1 = a2 = a3 = ZERO
                for w in range(WARPS):
                    weight = weight_s[w * SLOTS + h]
                    b0, b1, b2, b3 = ptx.load4(sum_s, h * STRIDE + d + w * (SLOTS * STRIDE))
                    a0, a1, a2, a3 = a0 + weight * b0, a1 + weight * b1, a2 + weight * b2, a3 + weight * b3
                if used == 1:
                    inverse = ptx.div_rn(float32(1), whole_s[h])
                    to = (first_head + h) * D + d
                    for k in range(4):
                        if d + k < D:
                            out[to + k] = (a0 if k == 0 else a1 if k == 1 else a2 if k == 2 else a3) * inverse
                else:
                    ptx.store4(partials, (part_wr + h) * DP + d, a0, a1, a2, a3)
        if used > 1 and tid < HEADS:
            stats[(part_wr + tid) * 2] = top_s[tid]
            stats[(part_wr + tid) * 2 + 1] = whole_s[tid]
        # The block that holds the new token stores it.
        if end == groups and part % PARTS == 0:
            for n in range(STORES):
                i = int32(tid + n * threads)
                if i < WORDS:
                    keys[(kv * capacity + pos) * WORDS + i] = new_s[i]
                elif i < 2 * WORDS:
                    values[(kv * capacity + pos) * WORDS + i - WORDS] = new_s[i - WORDS + DP // 2]
        if used == 1:
            return

        cuda.syncthreads()
        if tid == 0:
            arrived_s[0] = int32(ptx.atomic_fetch_add_ordered(arrivals, part, uint32(1)))
        cuda.syncthreads()
        if arrived_s[0] != used - 1:
            return
        # The last block of this head: every split's partial result is there. A thread reads 16 bytes of every
        # READERS-th split.
        reader = ptx.udiv(tid, int32(PIECES))
        piece = int32(tid - reader * PIECES)
        h = ptx.udiv(piece, int32(DP // 4))
        part_rd = part * splits * HEADS
        a0 = a1 = a2 = a3 = ZERO
        first = int32(0)
        while first < used:
            for j in range(AHEAD):
                s = int32(first + j * READERS + reader)
                for k in range(4):
                    ahead_r[4 * j + k] = ZERO
                if s < used and reader < READERS and h < HEADS:
                    b0, b1, b2, b3 = ptx.load4(partials, (part_rd + s * HEADS) * DP + piece * 4)
                    ahead_r[4 * j], ahead_r[4 * j + 1], ahead_r[4 * j + 2], ahead_r[4 * j + 3] = b0, b1, b2, b3
            if first == 0:
                for n in range(HEAD_TURNS):
                    slot = int32(warp + n * WARPS)
                    if slot < HEADS:
                        largest = LOWEST
                        for k in range(SPLIT_TURNS):
                            i = int32(lane + k * WARP)
                            top = LOWEST
                            if i < used:
                                top = stats[(part_rd + i * HEADS + slot) * 2]
                            tops_r[k] = top
                            largest = max(largest, top)
                        largest = ptx.warp_max(largest)
                        total = ZERO
                        for k in range(SPLIT_TURNS):
                            i = int32(lane + k * WARP)
                            if i < used:
                                weight = ptx.exp2_approx(tops_r[k] - largest)
                                weight_s[i * SLOTS + slot] = weight
                                total += weight * stats[(part_rd + i * HEADS + slot) * 2 + 1]
                        total = ptx.warp_sum(total)
                        if lane == 0:
                            whole_s[slot] = total
                cuda.syncthreads()
            for j in range(AHEAD):
                s = int32(first + j * READERS + reader)
                if s < used and h < HEADS:
                    weight = weight_s[s * SLOTS + h]
                    a0 += weight * ahead_r[4 * j]
                    a1 += weight * ahead_r[4 * j + 1]
                    a2 += weight * ahead_r[4 * j + 2]
                    a3 += weight * ahead_r[4 * j + 3]
            first = int32(first + AHEAD * READERS)
        if reader < READERS:
            ptx.store4(sum_s, tid * 4, a0, a1, a2, a3)
        cuda.syncthreads()
        for n in range(LAST_OUTPUTS):
            i = int32(tid + n * threads)
            h = ptx.udiv(i, int32(D))
            if h < HEADS:
                total = ZERO
                for r in range(READERS):
                    total += sum_s[r * PIECES * 4 + h * DP + i - h * D]
                out[first_head * D + i] = ptx.div_rn(total, whole_s[h])
        if tid == 0:
            arrivals[part] = 0

    return attention
