"""Attention of a prompt's tokens over their context, on tensor cores: tiles of queries against tiles of keys.

The manner is FlashAttention-2's (Dao, 2023): a block holds some queries in registers and walks over the keys, with a
running maximum and sum for each query, so that no matrix of scores is ever in memory. Queries are rotated here; keys
and values, the pass's own included, are in the cache already (see kv_cache).

    block     HEADS query heads that share a key-value head  x  TILES * 16 tokens         grid y: tokens, the last first
    warp      one of its heads, 16 tokens                                                 grid x: key-value heads, ..
    +-- warp: 16 queries --+        key tiles of KEYS tokens, absolute: 0 .. 31, 32 .. 63, ...
    | head 0, tokens 0-15  |        +--------+--------+--------+--------+
    | head 1, tokens 0-15  |   x    | tile 0 | tile 1 | tile 2 |\\ masked|    up to the tile of the block's last token
    | ...                  |        +--------+--------+--------+--------+
    +----------------------+        two tiles of keys and values in shared memory; while one is multiplied,
                                    cp.async fetches the next: one barrier a tile
    lane      g = lane / 4, c = lane % 4: queries g and g + 8; of scores and output columns 2c, 2c + 1 of every 8

    scores [16, KEYS] = q [16, D] . k'        out [16, D] += p [16, KEYS] . v            mma m16n8k16, float32 sums

Precision. Cache entries are bfloat16 as they are. q and p are float32, so each goes in as two bfloat16 terms, hi + lo:
what is left out is 2^-18 of an entry, where one term would leave 2^-9. That doubles the products, but not the time:
with one term each it was 77 % as long. docs/performance-notes.md has what was tried and measured.

A query's bits depend on its own position alone. Its sums run over absolute tiles in order, and a tile in which all its
keys are masked changes nothing: the maximum stays, every factor is exactly 1 and every weight exactly 0. So it does not
matter how a prompt is cut into passes, nor which queries share a block.

Head sizes over 128: a warp's registers hold the scores' operands of all dimensions, but only half of the output's. So
each block computes all scores and half of the values' dimensions, on tiles of 16 keys.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.decode import MAX_HEAD_DIM
from bitnet_numba.kernels.attention.kv_cache import (
    CACHE_SIGNATURE,
    PAGE,
    LayerCache,
    cache_arguments,
    check_sizes,
    token_words,
)
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec

MIN_ARCH = 80  # mma of bfloat16
WARP_TOKENS = 16  # queries of a warp: an operand's rows
WIDE = 128  # head sizes up to here are done whole
SINGLE_ROUND_MAX_WARPS = 4
LOG2_E = np.log2(np.e)


def block_shape(group: int, warps: int = SINGLE_ROUND_MAX_WARPS) -> tuple[int, int]:
    """(query heads, tiles of 16 tokens) of a block of about `warps` warps; heads divides the group."""
    heads = max(n for n in range(1, warps + 1) if group % n == 0)
    return heads, max(1, warps // heads)


def value_parts(head_dim: int) -> int:
    """Into how many blocks' work a head's output dimensions are divided."""
    return 1 if head_dim <= WIDE else 2


def make_attention_prompt(arch: int, head_dim: int, group: int, heads: int, tiles: int) -> Callable[..., None]:
    """The kernel for a head size and `group` query heads a key-value head; a block has `heads` of them, `tiles` times
    16 tokens."""
    wait, release, arrived = ptx.pdl_wait(arch), ptx.pdl_trigger(arch), ptx.cp_async_wait(0)
    mma, pack = ptx.mma_bf16, ptx.pack_bf16x2
    D, HALF, WORDS = head_dim, head_dim // 2, token_words(head_dim)
    HEADS, PARTS, VPARTS = heads, group // heads, value_parts(head_dim)
    KEYS = 32 if VPARTS == 1 else 16  # of a tile
    TILE_BITS, PAGE_TILES = KEYS.bit_length() - 1, PAGE // KEYS
    THREADS, TOKENS = heads * tiles * WARP, tiles * WARP_TOKENS
    KS = -(-D // 16)  # steps of the scores' product
    VT = 2 * -(-KS // VPARTS)  # tiles of 8 output dimensions
    VG = 8 if VPARTS == 1 else 4  # of them at a time
    NT = KEYS // 8  # tiles of 8 keys
    K_CHUNKS, V_CHUNKS = 2 * KS, VT  # of 16 bytes in a row
    LAST_CHUNK = np.int32(WORDS - 4)
    K_ROW, V_ROW = 16 * (K_CHUNKS + 1), 16 * (V_CHUNKS + 1)  # bytes; odd in chunks: 8 rows lie in different banks
    K_BYTES, V_BYTES = KEYS * K_ROW, KEYS * V_ROW
    K_WORDS, V_WORDS = K_BYTES // 2, V_BYTES // 2  # two tiles
    ROW_LANES = 1 << (K_CHUNKS - 1).bit_length()  # threads that load a row
    K_FULL, V_FULL = K_CHUNKS == ROW_LANES, V_CHUNKS == ROW_LANES
    LOAD_ROWS = THREADS // ROW_LANES  # at a time
    LOADS, EVEN = -(-KEYS // LOAD_ROWS), KEYS % LOAD_ROWS == 0
    Q_REGS, O_REGS, S_REGS, V_GROUPS = 4 * KS, 4 * VT, 4 * NT, -(-VT // VG)
    HELD = KS if VPARTS == 1 else 6  # steps whose lower terms of q stay in registers
    LO_WORDS = max(4, (KS - HELD) * THREADS * 4)
    PAIRED = HALF % 16 == 0  # a lane's dimensions d and d + HALF are in whole steps
    USED_TURNS = -(-TOKENS // WARP)
    SCALE = float32(D**-0.5 * LOG2_E)  # exponentials are taken to base 2
    LOWEST, ZERO, ONE = float32(-np.inf), float32(0), float32(1)

    @device_function
    def split(x0, x1):
        """Two float32 as two words of bfloat16: the values and what rounding left of them."""
        hi = pack(x0, x1)
        return hi, pack(x0 - ptx.bf16_low(hi), x1 - ptx.bf16_high(hi))

    @device_function
    def rotated(qkv, cos, sin, q_rd, angle, d):
        """Dimension d of a query, rotated and scaled."""
        value = ZERO
        if d < D:
            upper = d >= HALF
            j = int32(d - HALF) if upper else d
            turned = ptx.mul_rn(qkv[q_rd + (j if upper else int32(d + HALF))], sin[angle + j])
            value = ptx.mul_rn(
                ptx.add_rn(ptx.mul_rn(qkv[q_rd + d], cos[angle + j]), turned if upper else -turned), SCALE
            )
        return value

    @device_function
    def load_queries(qkv, cos, sin, q_rd, angle, c, r, q_hi, q_lo):
        """One of a lane's two queries as left operand: registers 4s + r, 4s + 2 + r are dimensions 16s + 2c and
        16s + 8 + 2c, and of the next dimension each."""
        for s in range(KS // 2 if PAIRED else KS):
            for half in range(2):
                d = int32(16 * s + 8 * half + 2 * c)
                i = 4 * s + 2 * half + r
                if PAIRED:
                    x0, x1 = ptx.load2_f32(qkv, q_rd + d)
                    y0, y1 = ptx.load2_f32(qkv, q_rd + d + HALF)
                    c0, c1 = ptx.load2_f32(cos, angle + d)
                    s0, s1 = ptx.load2_f32(sin, angle + d)
                    a0 = ptx.mul_rn(ptx.add_rn(ptx.mul_rn(x0, c0), -ptx.mul_rn(y0, s0)), SCALE)
                    a1 = ptx.mul_rn(ptx.add_rn(ptx.mul_rn(x1, c1), -ptx.mul_rn(y1, s1)), SCALE)
                    b0 = ptx.mul_rn(ptx.add_rn(ptx.mul_rn(y0, c0), ptx.mul_rn(x0, s0)), SCALE)
                    b1 = ptx.mul_rn(ptx.add_rn(ptx.mul_rn(y1, c1), ptx.mul_rn(x1, s1)), SCALE)
                    q_hi[i], q_lo[i] = split(a0, a1)
                    q_hi[i + 2 * KS], q_lo[i + 2 * KS] = split(b0, b1)
                else:
                    x0 = rotated(qkv, cos, sin, q_rd, angle, d)
                    x1 = rotated(qkv, cos, sin, q_rd, angle, int32(d + 1))
                    q_hi[i], q_lo[i] = split(x0, x1)

    def attention_prompt(
        qkv, cos, sin, where, table, table_stride, keys, values, page_words, head_words, out, rows, kv_heads
    ):  # fmt: skip
        k_s = ptx.pointer(cuda.shared.array(K_WORDS, int32, SHARED_ALIGN))
        v_s = ptx.pointer(cuda.shared.array(V_WORDS, int32, SHARED_ALIGN))
        lo_s = ptx.pointer(cuda.shared.array(LO_WORDS, int32, SHARED_ALIGN))  # [KS - HELD, threads, 4], a thread's own
        q_hi = cuda.local.array(Q_REGS, int32)
        q_lo = cuda.local.array(Q_REGS, int32)
        s_r = cuda.local.array(S_REGS, float32)
        t_r = cuda.local.array(S_REGS, float32)  # scores of the lower terms of q: shorter chains
        o_r = cuda.local.array(O_REGS, float32)
        b_r = cuda.local.array(16, int32)

        release()
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid >> 5), int32(tid & 31)
        g, c = int32(lane >> 2), int32(lane & 3)
        first = int32((int32(cuda.gridDim.y) - 1 - int32(cuda.blockIdx.y)) * TOKENS)
        part = int32(cuda.blockIdx.x)
        v_part = int32(0)
        if VPARTS > 1:
            v_part, part = int32(part % VPARTS), int32(part // VPARTS)
        kv = part if PARTS == 1 else ptx.udiv(part, int32(PARTS))
        head = int32(part * HEADS + warp % HEADS)
        token = int32(warp // HEADS * WARP_TOKENS)  # the warp's first, in the block
        wait()
        slot, start = int32(where[2 * first]), int32(where[2 * first + 1])
        used = int32(0)
        for i in range(USED_TURNS):
            row = int32(lane + i * WARP)
            if row < TOKENS and first + row < rows:
                used = int32(used + int32(where[2 * (first + row)] >= 0))
        if slot < 0:
            return
        used = ptx.warp_sum_int(used)
        last = int32(start + used - 1)  # position of the block's last query
        end = int32((last >> TILE_BITS) + 1)  # key tiles

        # Where this thread's 16 bytes of every LOAD_ROWS-th token come from and go to.
        chunk, load_row = int32(tid % ROW_LANES), int32(tid // ROW_LANES)
        k_wr = ptx.shared_address(k_s, load_row * (K_ROW // 4) + chunk * 4)
        v_wr = ptx.shared_address(v_s, load_row * (V_ROW // 4) + chunk * 4)
        v_skip = int32(v_part * VT * 4)
        k_bytes = int32(16) if chunk * 4 < WORDS else int32(0)
        v_bytes = int32(16) if chunk * 4 + v_skip < WORDS else int32(0)
        # What pads a row is not read; its address is the last chunk's, since the cache may end there.
        k_word, v_word = min(int32(chunk * 4), LAST_CHUNK), min(int32(chunk * 4 + v_skip), LAST_CHUNK)
        head_rd = int64(kv) * head_words + load_row * WORDS + k_word
        v_skip = int32(v_word - k_word)
        pages = int64(slot) * table_stride
        rd = int64(table[pages]) * page_words + head_rd
        for n in range(LOADS):
            row = int32(load_row + n * LOAD_ROWS)
            if (K_FULL or chunk < K_CHUNKS) and (EVEN or row < KEYS):
                size = k_bytes if row <= last else int32(0)
                ptx.cp_async_16_at(k_s, k_wr + n * LOAD_ROWS * K_ROW, keys, rd + n * LOAD_ROWS * WORDS, size)
            if (V_FULL or chunk < V_CHUNKS) and (EVEN or row < KEYS):
                size = v_bytes if row <= last else int32(0)
                ptx.cp_async_16_at(v_s, v_wr + n * LOAD_ROWS * V_ROW, values, rd + v_skip + n * LOAD_ROWS * WORDS, size)
        ptx.cp_async_commit()
        page = int32(table[pages + (min(int32(1), int32(end - 1)) // PAGE_TILES)])  # of the tile after

        # Rows that are not used repeat the last one that is.
        row0, row1 = min(int32(token + g), int32(used - 1)), min(int32(token + g + 8), int32(used - 1))
        stride = int32((PARTS * HEADS + 2) * kv_heads * D)
        q_rd = int64(first) * stride + int32(head * D)
        load_queries(qkv, cos, sin, q_rd + int64(row0) * stride, int64(start + row0) * HALF, c, 0, q_hi, q_lo)
        load_queries(qkv, cos, sin, q_rd + int64(row1) * stride, int64(start + row1) * HALF, c, 1, q_hi, q_lo)
        for s in range(HELD, KS):
            ptx.store4(
                lo_s, ((s - HELD) * THREADS + tid) * 4, q_lo[4 * s], q_lo[4 * s + 1], q_lo[4 * s + 2], q_lo[4 * s + 3]
            )

        # A lane's rows of the matrices that ldmatrix_x4 takes: keys 8i .. and dimensions by 8, see there.
        k_rd = ptx.shared_address(k_s, ((lane >> 4) * 8 + (lane & 7)) * (K_ROW // 4) + (lane >> 3 & 1) * 4)
        v_rd = ptx.shared_address(v_s, ((lane >> 3 & 1) * 8 + (lane & 7)) * (V_ROW // 4) + (lane >> 4) * 4)
        at0 = int32(start + token + g)  # positions of the lane's two queries
        at1 = int32(at0 + 8)
        warp_end = int32(start + token + WARP_TOKENS) if token < used else int32(0)
        top0 = top1 = LOWEST
        total0 = total1 = ZERO
        for i in range(O_REGS):
            o_r[i] = ZERO
        tile = int32(0)
        while tile < end:
            begin = int32(tile << TILE_BITS)  # the tile's first token
            arrived()
            cuda.syncthreads()  # this tile is there, the one before is used up
            following = int32(tile + 1)
            if following < end:
                rd = int64(page) * page_words + head_rd + int32(following % PAGE_TILES * (KEYS * WORDS))
                ahead = int32((following & 1) * K_BYTES)
                for n in range(LOADS):
                    row = int32(load_row + n * LOAD_ROWS)
                    if (K_FULL or chunk < K_CHUNKS) and (EVEN or row < KEYS):
                        size = k_bytes if begin + KEYS + row <= last else int32(0)
                        ptx.cp_async_16_at(
                            k_s, k_wr + ahead + n * LOAD_ROWS * K_ROW, keys, rd + n * LOAD_ROWS * WORDS, size
                        )
                rd += v_skip
                ahead = int32((following & 1) * V_BYTES)
                for n in range(LOADS):
                    row = int32(load_row + n * LOAD_ROWS)
                    if (V_FULL or chunk < V_CHUNKS) and (EVEN or row < KEYS):
                        size = v_bytes if begin + KEYS + row <= last else int32(0)
                        ptx.cp_async_16_at(
                            v_s, v_wr + ahead + n * LOAD_ROWS * V_ROW, values, rd + n * LOAD_ROWS * WORDS, size
                        )
                page = int32(table[pages + (min(int32(tile + 2), int32(end - 1)) // PAGE_TILES)])
            ptx.cp_async_commit()
            if begin < warp_end:
                k_at, v_at = int32(k_rd + (tile & 1) * K_BYTES), int32(v_rd + (tile & 1) * V_BYTES)
                for i in range(S_REGS):
                    s_r[i] = t_r[i] = ZERO
                for s in range(KS):
                    for n in range(0, NT, 2):
                        b0, b1, b2, b3 = ptx.ldmatrix_x4(k_s, k_at + (n * 8 * K_ROW + s * 32))
                        b_r[2 * n], b_r[2 * n + 1], b_r[2 * n + 2], b_r[2 * n + 3] = b0, b1, b2, b3
                    a0, a1, a2, a3 = q_hi[4 * s], q_hi[4 * s + 1], q_hi[4 * s + 2], q_hi[4 * s + 3]
                    for n in range(NT):
                        c0, c1, c2, c3 = s_r[4 * n], s_r[4 * n + 1], s_r[4 * n + 2], s_r[4 * n + 3]
                        c0, c1, c2, c3 = mma(a0, a1, a2, a3, b_r[2 * n], b_r[2 * n + 1], c0, c1, c2, c3)
                        s_r[4 * n], s_r[4 * n + 1], s_r[4 * n + 2], s_r[4 * n + 3] = c0, c1, c2, c3
                    if s < HELD:
                        a0, a1, a2, a3 = q_lo[4 * s], q_lo[4 * s + 1], q_lo[4 * s + 2], q_lo[4 * s + 3]
                    else:
                        a0, a1, a2, a3 = ptx.load4(lo_s, ((s - HELD) * THREADS + tid) * 4)
                    for n in range(NT):
                        c0, c1, c2, c3 = t_r[4 * n], t_r[4 * n + 1], t_r[4 * n + 2], t_r[4 * n + 3]
                        c0, c1, c2, c3 = mma(a0, a1, a2, a3, b_r[2 * n], b_r[2 * n + 1], c0, c1, c2, c3)
                        t_r[4 * n], t_r[4 * n + 1], t_r[4 * n + 2], t_r[4 * n + 3] = c0, c1, c2, c3
                for i in range(S_REGS):
                    s_r[i] += t_r[i]
                if begin + KEYS > at0:
                    for n in range(NT):
                        key = int32(begin + 2 * c + 8 * n)
                        s_r[4 * n] = s_r[4 * n] if key <= at0 else LOWEST
                        s_r[4 * n + 1] = s_r[4 * n + 1] if key < at0 else LOWEST
                        s_r[4 * n + 2] = s_r[4 * n + 2] if key <= at1 else LOWEST
                        s_r[4 * n + 3] = s_r[4 * n + 3] if key < at1 else LOWEST
                before0, before1 = top0, top1
                for n in range(NT):
                    top0 = max(top0, max(s_r[4 * n], s_r[4 * n + 1]))
                    top1 = max(top1, max(s_r[4 * n + 2], s_r[4 * n + 3]))
                for step in range(2):
                    top0 = max(top0, ptx.shuffle_xor(top0, 1 << step))
                    top1 = max(top1, ptx.shuffle_xor(top1, 1 << step))
                alpha0, alpha1 = ptx.exp2_approx(before0 - top0), ptx.exp2_approx(before1 - top1)
                total0, total1 = total0 * alpha0, total1 * alpha1
                for n in range(VT):
                    o_r[4 * n], o_r[4 * n + 1] = o_r[4 * n] * alpha0, o_r[4 * n + 1] * alpha0
                    o_r[4 * n + 2], o_r[4 * n + 3] = o_r[4 * n + 2] * alpha1, o_r[4 * n + 3] * alpha1
                for n in range(NT):
                    p0, p1 = ptx.exp2_approx(s_r[4 * n] - top0), ptx.exp2_approx(s_r[4 * n + 1] - top0)
                    p2, p3 = ptx.exp2_approx(s_r[4 * n + 2] - top1), ptx.exp2_approx(s_r[4 * n + 3] - top1)
                    total0, total1 = total0 + (p0 + p1), total1 + (p2 + p3)
                    s_r[4 * n], s_r[4 * n + 1], s_r[4 * n + 2], s_r[4 * n + 3] = p0, p1, p2, p3
                for k in range(KEYS // 16):
                    i = 8 * k
                    a0, l0 = split(s_r[i], s_r[i + 1])
                    a1, l1 = split(s_r[i + 2], s_r[i + 3])
                    a2, l2 = split(s_r[i + 4], s_r[i + 5])
                    a3, l3 = split(s_r[i + 6], s_r[i + 7])
                    for v in range(V_GROUPS):
                        for n in range(0, VG, 2):
                            if VG * v + n < VT:
                                b0, b1, b2, b3 = ptx.ldmatrix_x4_trans(v_s, v_at + (k * 16 * V_ROW + (VG * v + n) * 16))
                                b_r[2 * n], b_r[2 * n + 1], b_r[2 * n + 2], b_r[2 * n + 3] = b0, b1, b2, b3
                        for n in range(VG):
                            if VG * v + n < VT:
                                i = 4 * (VG * v + n)
                                c0, c1, c2, c3 = o_r[i], o_r[i + 1], o_r[i + 2], o_r[i + 3]
                                c0, c1, c2, c3 = mma(a0, a1, a2, a3, b_r[2 * n], b_r[2 * n + 1], c0, c1, c2, c3)
                                o_r[i], o_r[i + 1], o_r[i + 2], o_r[i + 3] = c0, c1, c2, c3
                        for n in range(VG):
                            if VG * v + n < VT:
                                i = 4 * (VG * v + n)
                                c0, c1, c2, c3 = o_r[i], o_r[i + 1], o_r[i + 2], o_r[i + 3]
                                c0, c1, c2, c3 = mma(l0, l1, l2, l3, b_r[2 * n], b_r[2 * n + 1], c0, c1, c2, c3)
                                o_r[i], o_r[i + 1], o_r[i + 2], o_r[i + 3] = c0, c1, c2, c3
            tile = following

        for step in range(2):
            total0 = total0 + ptx.shuffle_xor(total0, 1 << step)
            total1 = total1 + ptx.shuffle_xor(total1, 1 << step)
        for r in range(2):
            row = int32(token + g + 8 * r)
            if row < used:
                inverse = ptx.div_rn(ONE, total0 if r == 0 else total1)
                wr = (int64(first) + row) * int32(PARTS * HEADS * kv_heads * D) + int32(head * D)
                for n in range(VT):
                    d = int32(8 * n + 2 * c + v_part * (8 * VT))
                    if d < D:
                        i = 4 * n + 2 * r
                        ptx.store2_f32(out, wr + d, o_r[i] * inverse, o_r[i + 1] * inverse)

    return attention_prompt


_FLOATS = types.CPointer(types.float32)
SIGNATURE = (
    *(_FLOATS, _FLOATS, _FLOATS, types.CPointer(types.int32), *CACHE_SIGNATURE),  # qkv, cos, sin, where, the cache
    *(_FLOATS, types.int32, types.int32),  # out, rows, kv_heads
)


@cache
def attention_prompt_spec(
    arch: int, head_dim: int, group: int, warps: int = SINGLE_ROUND_MAX_WARPS, blocks_per_sm: int = 2
) -> KernelSpec:
    """The compiled form for a head size and a number of query heads per key-value head.

    Raises ValueError for an architecture without the products, an odd head size or one over 256.
    """
    if arch < MIN_ARCH:
        raise ValueError(f"attention_prompt needs compute capability 8.0, not {arch // 10}.{arch % 10}")
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"attention_prompt takes even head sizes up to {MAX_HEAD_DIM}, not {head_dim}")
    if group < 1:
        raise ValueError(f"a key-value head serves at least one query head, not {group}")
    heads, tiles = block_shape(group, warps)
    kernel = make_attention_prompt(arch, head_dim, group, heads, tiles)
    threads = heads * tiles * WARP
    name = f"attention_prompt[{head_dim}, {group}, {heads}, {tiles}, {blocks_per_sm}]"
    return KernelSpec(name, kernel, SIGNATURE, threads, blocks_per_sm)


def attention_prompt_grid(
    rows: int, kv_heads: int, head_dim: int, group: int, warps: int = SINGLE_ROUND_MAX_WARPS
) -> tuple[int, int]:
    """Blocks of a launch for `rows` rows."""
    heads, tiles = block_shape(group, warps)
    return kv_heads * (group // heads) * value_parts(head_dim), -(-rows // (tiles * WARP_TOKENS))


def attention_prompt(
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
    """The launch for a pass of one slot's tokens: out = softmax(q . K / sqrt(head_dim)) . V, causal.

    qkv float32 [rows, (heads + 2 * kv_heads) * head_dim]; cos, sin float32 [positions, head_dim / 2]; where int32
    [rows, 2]: (slot, start), (slot, start + 1), ..., then (-1, anything) for rows that are not used; cache: holds every
    token up to the last row's; out float32 [rows, heads * head_dim], of which unused rows are not written.
    Raises ValueError with the sizes if they do not fit together.
    """
    size = rows * heads * head_dim
    check_sizes("attention_prompt", qkv, cos, sin, where, cache, rows, heads, kv_heads, head_dim, out=(out, size))
    spec = attention_prompt_spec(device.arch, head_dim, heads // kv_heads)
    grid = attention_prompt_grid(rows, kv_heads, head_dim, heads // kv_heads)
    arguments = (qkv, cos, sin, where, *cache_arguments(cache), out, rows, kv_heads)
    return device.launch(spec, grid, arguments, use_pdl)
