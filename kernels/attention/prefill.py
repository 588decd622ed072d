"""Attention of a prompt's tokens over their context, on tensor cores: tiles of queries against tiles of keys. The
launcher takes prefill_wgmma.py's kernel on sm_90 up to head size 128, and otherwise this one.

After FlashAttention-2 (Dao, 2023): a block holds queries in registers and walks over the keys with a running maximum
and sum for each, so that no matrix of scores is ever in memory. Queries are rotated here; keys and values, the pass's
own included, are in the cache already (see `kv_cache`).

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

Precision. Cache entries go in as they are. q and p are float32, so each goes in as two terms of the cache's type,
hi + lo (see `kv_dtype`). Of bfloat16, what is left out is at most 2^-17 of an entry, where one term would leave 2^-8.

A query's bits depend on its own position alone. Its sums run over absolute tiles in order, and a tile in which all its
keys are masked changes nothing: the maximum stays, every factor is exactly 1 and every weight exactly 0. So it does not
matter how a prompt is cut into passes, nor which queries share a block.

Head sizes over 128: a warp's registers hold the scores' operands of all dimensions, but only half of the output's. So
each block computes all scores and half of the values' dimensions, on tiles of 16 keys.

The copies of a tile and the lanes' set-up stay in the kernel's body: as functions of their own they change the machine
code, of head sizes other than 128 and of 256.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention import prefill_wgmma
from bitnet_numba.kernels.attention.kv_cache import PAGE, PASS_SIGNATURE, LayerCache, pass_arguments, token_words
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, HALVES, KVDtype, half_functions
from bitnet_numba.kernels.attention.parts import (
    MAX_HEAD_DIM,
    MINUS_INF,
    MMA_ARCH,
    HeadShape,
    RopeTables,
    check_head,
    finite_or_inf,
    make_rotated_query,
    power_of_two,
    score_scale,
)
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec

MIN_ARCH = MMA_ARCH
WARP_TOKENS = 16  # queries of a warp: an operand's rows
WHOLE_HEAD_DIM = 128  # head sizes up to here are computed by one block
MAX_WARPS = 4  # of a block


def fits(arch: int, head_dim: int, dtype: KVDtype = DEFAULT) -> bool:
    """Whether `prefill_attention` serves a head size and a cache's type on an architecture; `paged_simt` serves those
    that it does not."""
    return dtype in HALVES and arch >= MIN_ARCH and head_dim % 2 == 0 and 2 <= head_dim <= MAX_HEAD_DIM


def block_shape(group: int, warps: int = MAX_WARPS) -> tuple[int, int]:
    """(query heads, tiles of 16 tokens) of a block of about `warps` warps; the heads divide the group."""
    heads = max(n for n in range(1, warps + 1) if group % n == 0)
    return heads, max(1, warps // heads)


def block_tokens(arch: int, head_dim: int, group: int) -> int:
    """Tokens of a pass that a block takes. They must be neighbours in one slot, so a prompt's first row in a pass is a
    multiple of this."""
    wgmma = prefill_wgmma.fits(arch, head_dim)
    _, tiles = prefill_wgmma.block_shape(group, prefill_wgmma.WARPS) if wgmma else block_shape(group)
    return tiles * WARP_TOKENS


def value_parts(head_dim: int) -> int:
    """Blocks that share a head's output dimensions."""
    return 1 if head_dim <= WHOLE_HEAD_DIM else 2


def make_prefill(arch: int, head_dim: int, group: int, heads: int, tiles: int, dtype: KVDtype) -> Callable[..., None]:
    """The kernel for a head size and `group` query heads a key-value head; a block has `heads` of them, `tiles` times
    16 tokens."""
    wait, release, arrived = ptx.pdl_wait(arch), ptx.pdl_trigger(arch), ptx.cp_async_wait(0)
    rotated, half = make_rotated_query(head_dim), half_functions(dtype)
    pack, low, high, mma_into = half.pack, half.low, half.high, half.mma_into
    D, HALF, WORDS = head_dim, head_dim // 2, token_words(head_dim, dtype)
    HEADS, HEAD_BLOCKS, VALUE_PARTS = heads, group // heads, value_parts(head_dim)
    KEYS = 32 if VALUE_PARTS == 1 else 16  # of a tile
    TILE_BITS, PAGE_TILES = KEYS.bit_length() - 1, PAGE // KEYS
    THREADS, TOKENS = heads * tiles * WARP, tiles * WARP_TOKENS
    Q_STEPS = -(-D // 16)  # products along the dimensions of a score
    KEY_TILES, VALUE_TILES = KEYS // 8, 2 * -(-Q_STEPS // VALUE_PARTS)  # columns of scores and output, by 8
    GROUP = 8 if VALUE_PARTS == 1 else 4  # output tiles whose operands are loaded at a time
    VALUE_GROUPS = -(-VALUE_TILES // GROUP)
    K_CHUNKS, V_CHUNKS = 2 * Q_STEPS, VALUE_TILES  # of 16 bytes in a row
    LAST_CHUNK = np.int32(WORDS - 4)
    K_ROW, V_ROW = 16 * (K_CHUNKS + 1), 16 * (V_CHUNKS + 1)  # bytes; odd in chunks: 8 rows lie in different banks
    K_BYTES, V_BYTES = KEYS * K_ROW, KEYS * V_ROW
    K_WORDS, V_WORDS = K_BYTES // 2, V_BYTES // 2  # two tiles
    ROW_LANES = power_of_two(K_CHUNKS)  # threads that load a row
    K_FULL, V_FULL = K_CHUNKS == ROW_LANES, V_CHUNKS == ROW_LANES
    LOAD_ROWS = THREADS // ROW_LANES  # at a time
    LOADS, EVEN = -(-KEYS // LOAD_ROWS), KEYS % LOAD_ROWS == 0
    Q_REGS, O_REGS, S_REGS = 4 * Q_STEPS, 4 * VALUE_TILES, 4 * KEY_TILES
    LO_REG_STEPS = Q_STEPS if VALUE_PARTS == 1 else 6  # steps whose lower terms of q stay in registers
    LO_WORDS = max(4, (Q_STEPS - LO_REG_STEPS) * THREADS * 4)
    PAIRED = HALF % 16 == 0  # a lane's dimensions d and d + HALF are in whole steps
    USED_ROUNDS = -(-TOKENS // WARP)
    SCALE = score_scale(D)
    ZERO, ONE = float32(0), float32(1)

    @device_function
    def split(x0, x1):
        """Two float32 as two words: the values and what rounding left of them."""
        hi = pack(x0, x1)
        return hi, pack(x0 - low(hi), x1 - high(hi))

    @device_function
    def load_queries(qkv, cos, sin, q_rd, angle, c, r, q_hi, q_lo):
        """One of a lane's two queries as left operand: registers 4s + r, 4s + 2 + r are dimensions 16s + 2c and
        16s + 8 + 2c, and of the next dimension each."""
        for s in range(Q_STEPS // 2 if PAIRED else Q_STEPS):
            for part in range(2):
                d = int32(16 * s + 8 * part + 2 * c)
                i = 4 * s + 2 * part + r
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
                    q_hi[i + 2 * Q_STEPS], q_lo[i + 2 * Q_STEPS] = split(b0, b1)
                else:
                    x0 = rotated(qkv, cos, sin, q_rd, angle, d)
                    x1 = rotated(qkv, cos, sin, q_rd, angle, int32(d + 1))
                    q_hi[i], q_lo[i] = split(x0, x1)

    @device_function
    def multiply_keys(s_r, t_r, b_r, q_hi, q_lo, lo_s, k_s, k_at, tid):
        """s_r = q . k' of a tile. t_r takes the lower terms of q: shorter chains."""
        for i in range(S_REGS):
            s_r[i] = t_r[i] = ZERO
        for s in range(Q_STEPS):
            for n in range(0, KEY_TILES, 2):
                b0, b1, b2, b3 = ptx.ldmatrix_x4(k_s, k_at + (n * 8 * K_ROW + s * 32))
                b_r[2 * n], b_r[2 * n + 1], b_r[2 * n + 2], b_r[2 * n + 3] = b0, b1, b2, b3
            a0, a1, a2, a3 = q_hi[4 * s], q_hi[4 * s + 1], q_hi[4 * s + 2], q_hi[4 * s + 3]
            for n in range(KEY_TILES):
                mma_into(s_r, 4 * n, a0, a1, a2, a3, b_r[2 * n], b_r[2 * n + 1])
            if s < LO_REG_STEPS:
                a0, a1, a2, a3 = q_lo[4 * s], q_lo[4 * s + 1], q_lo[4 * s + 2], q_lo[4 * s + 3]
            else:
                a0, a1, a2, a3 = ptx.load4(lo_s, ((s - LO_REG_STEPS) * THREADS + tid) * 4)
            for n in range(KEY_TILES):
                mma_into(t_r, 4 * n, a0, a1, a2, a3, b_r[2 * n], b_r[2 * n + 1])
        for i in range(S_REGS):
            s_r[i] += t_r[i]

    @device_function
    def mask(s_r, first, position, c):
        """Leaves out the keys after a lane's queries, at `position` and position + 8. `first`: the tile's first
        token."""
        if first + KEYS > position:
            later = int32(position + 8)
            for n in range(KEY_TILES):
                key = int32(first + 2 * c + 8 * n)
                s_r[4 * n] = s_r[4 * n] if key <= position else MINUS_INF
                s_r[4 * n + 1] = s_r[4 * n + 1] if key < position else MINUS_INF
                s_r[4 * n + 2] = s_r[4 * n + 2] if key <= later else MINUS_INF
                s_r[4 * n + 3] = s_r[4 * n + 3] if key < later else MINUS_INF

    @device_function
    def softmax(s_r, o_r, max0, max1, sum0, sum1):
        """Scores become weights; the running maximum and sum of both queries, and their outputs, are brought up to
        date."""
        before0, before1 = max0, max1
        for n in range(KEY_TILES):
            max0 = max(max0, max(s_r[4 * n], s_r[4 * n + 1]))
            max1 = max(max1, max(s_r[4 * n + 2], s_r[4 * n + 3]))
        for step in range(2):
            max0 = max(max0, ptx.shuffle_xor(max0, 1 << step))
            max1 = max(max1, ptx.shuffle_xor(max1, 1 << step))
        alpha0, alpha1 = ptx.exp2_approx(before0 - max0), ptx.exp2_approx(before1 - max1)
        sum0, sum1 = sum0 * alpha0, sum1 * alpha1
        for n in range(VALUE_TILES):
            o_r[4 * n], o_r[4 * n + 1] = o_r[4 * n] * alpha0, o_r[4 * n + 1] * alpha0
            o_r[4 * n + 2], o_r[4 * n + 3] = o_r[4 * n + 2] * alpha1, o_r[4 * n + 3] * alpha1
        for n in range(KEY_TILES):
            p0, p1 = ptx.exp2_approx(s_r[4 * n] - max0), ptx.exp2_approx(s_r[4 * n + 1] - max0)
            p2, p3 = ptx.exp2_approx(s_r[4 * n + 2] - max1), ptx.exp2_approx(s_r[4 * n + 3] - max1)
            sum0, sum1 = sum0 + (p0 + p1), sum1 + (p2 + p3)
            s_r[4 * n], s_r[4 * n + 1], s_r[4 * n + 2], s_r[4 * n + 3] = p0, p1, p2, p3
        return max0, max1, sum0, sum1

    @device_function
    def multiply_values(o_r, b_r, s_r, v_s, v_at):
        """o_r += p . v of a tile."""
        for k in range(KEYS // 16):
            i = 8 * k
            a0, l0 = split(s_r[i], s_r[i + 1])
            a1, l1 = split(s_r[i + 2], s_r[i + 3])
            a2, l2 = split(s_r[i + 4], s_r[i + 5])
            a3, l3 = split(s_r[i + 6], s_r[i + 7])
            for v in range(VALUE_GROUPS):
                for n in range(0, GROUP, 2):
                    if GROUP * v + n < VALUE_TILES:
                        b0, b1, b2, b3 = ptx.ldmatrix_x4_trans(v_s, v_at + (k * 16 * V_ROW + (GROUP * v + n) * 16))
                        b_r[2 * n], b_r[2 * n + 1], b_r[2 * n + 2], b_r[2 * n + 3] = b0, b1, b2, b3
                for n in range(GROUP):
                    if GROUP * v + n < VALUE_TILES:
                        mma_into(o_r, 4 * (GROUP * v + n), a0, a1, a2, a3, b_r[2 * n], b_r[2 * n + 1])
                for n in range(GROUP):
                    if GROUP * v + n < VALUE_TILES:
                        mma_into(o_r, 4 * (GROUP * v + n), l0, l1, l2, l3, b_r[2 * n], b_r[2 * n + 1])

    def prefill_attention(
        qkv, cos, sin, slot_positions, block_table, block_table_stride, keys, values, page_words, head_words, out,
        num_tokens, num_kv_heads,
    ):  # fmt: skip
        k_s = ptx.pointer(cuda.shared.array(K_WORDS, int32, SHARED_ALIGN))
        v_s = ptx.pointer(cuda.shared.array(V_WORDS, int32, SHARED_ALIGN))
        lo_s = ptx.pointer(cuda.shared.array(LO_WORDS, int32, SHARED_ALIGN))  # [steps, threads, 4], a thread's own
        q_hi = cuda.local.array(Q_REGS, int32)
        q_lo = cuda.local.array(Q_REGS, int32)
        s_r = cuda.local.array(S_REGS, float32)
        t_r = cuda.local.array(S_REGS, float32)
        o_r = cuda.local.array(O_REGS, float32)
        b_r = cuda.local.array(16, int32)

        release()
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid >> 5), int32(tid & 31)
        g, c = int32(lane >> 2), int32(lane & 3)
        first = int32((int32(cuda.gridDim.y) - 1 - int32(cuda.blockIdx.y)) * TOKENS)  # the block's first token
        head_block = int32(cuda.blockIdx.x)
        value_part = int32(0)
        if VALUE_PARTS > 1:
            value_part, head_block = int32(head_block % VALUE_PARTS), int32(head_block // VALUE_PARTS)
        kv = head_block if HEAD_BLOCKS == 1 else ptx.udiv(head_block, int32(HEAD_BLOCKS))
        head = int32(head_block * HEADS + warp % HEADS)
        token = int32(warp // HEADS * WARP_TOKENS)  # the warp's first, in the block
        wait()
        slot, start = int32(slot_positions[2 * first]), int32(slot_positions[2 * first + 1])
        used = int32(0)  # tokens of the block that are used
        for i in range(USED_ROUNDS):
            row = int32(lane + i * WARP)
            if row < TOKENS and first + row < num_tokens:
                used = int32(used + int32(slot_positions[2 * (first + row)] >= 0))
        if slot < 0:
            return
        used = ptx.warp_sum_int(used)
        last = int32(start + used - 1)  # position of the block's last query
        end = int32((last >> TILE_BITS) + 1)  # key tiles

        # Where this thread's 16 bytes of every LOAD_ROWS-th token come from and go to.
        chunk, load_row = int32(tid % ROW_LANES), int32(tid // ROW_LANES)
        k_wr = ptx.shared_address(k_s, load_row * (K_ROW // 4) + chunk * 4)
        v_wr = ptx.shared_address(v_s, load_row * (V_ROW // 4) + chunk * 4)
        v_skip = int32(value_part * VALUE_TILES * 4)
        k_bytes = int32(16) if chunk * 4 < WORDS else int32(0)
        v_bytes = int32(16) if chunk * 4 + v_skip < WORDS else int32(0)
        # What pads a row is not read; its address is the last chunk's, since the cache may end there.
        k_word, v_word = min(int32(chunk * 4), LAST_CHUNK), min(int32(chunk * 4 + v_skip), LAST_CHUNK)
        head_rd = int64(kv) * head_words + load_row * WORDS + k_word
        v_skip = int32(v_word - k_word)
        pages = int64(slot) * block_table_stride
        rd = int64(block_table[pages]) * page_words + head_rd
        for n in range(LOADS):
            row = int32(load_row + n * LOAD_ROWS)
            if (K_FULL or chunk < K_CHUNKS) and (EVEN or row < KEYS):
                size = k_bytes if row <= last else int32(0)
                ptx.cp_async_16_at(k_s, k_wr + n * LOAD_ROWS * K_ROW, keys, rd + n * LOAD_ROWS * WORDS, size)
            if (V_FULL or chunk < V_CHUNKS) and (EVEN or row < KEYS):
                size = v_bytes if row <= last else int32(0)
                ptx.cp_async_16_at(v_s, v_wr + n * LOAD_ROWS * V_ROW, values, rd + v_skip + n * LOAD_ROWS * WORDS, size)
        ptx.cp_async_commit()
        page = int32(block_table[pages + (min(int32(1), int32(end - 1)) // PAGE_TILES)])  # of the tile after

        # Tokens that are not used repeat the last one that is.
        row0, row1 = min(int32(token + g), int32(used - 1)), min(int32(token + g + 8), int32(used - 1))
        stride = int32((HEAD_BLOCKS * HEADS + 2) * num_kv_heads * D)
        q_rd = int64(first) * stride + int32(head * D)
        load_queries(qkv, cos, sin, q_rd + int64(row0) * stride, int64(start + row0) * HALF, c, 0, q_hi, q_lo)
        load_queries(qkv, cos, sin, q_rd + int64(row1) * stride, int64(start + row1) * HALF, c, 1, q_hi, q_lo)
        for s in range(LO_REG_STEPS, Q_STEPS):
            wr = ((s - LO_REG_STEPS) * THREADS + tid) * 4
            ptx.store4(lo_s, wr, q_lo[4 * s], q_lo[4 * s + 1], q_lo[4 * s + 2], q_lo[4 * s + 3])

        # A lane's rows of the matrices that ldmatrix_x4 takes: keys 8i .. and dimensions by 8, see there.
        k_rd = ptx.shared_address(k_s, ((lane >> 4) * 8 + (lane & 7)) * (K_ROW // 4) + (lane >> 3 & 1) * 4)
        v_rd = ptx.shared_address(v_s, ((lane >> 3 & 1) * 8 + (lane & 7)) * (V_ROW // 4) + (lane >> 4) * 4)
        position = int32(start + token + g)  # of the lane's first query; the second's is 8 more
        warp_end = int32(start + token + WARP_TOKENS) if token < used else int32(0)
        max0 = max1 = MINUS_INF
        sum0 = sum1 = ZERO
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
                        wr = k_wr + ahead + n * LOAD_ROWS * K_ROW
                        ptx.cp_async_16_at(k_s, wr, keys, rd + n * LOAD_ROWS * WORDS, size)
                ahead = int32((following & 1) * V_BYTES)
                for n in range(LOADS):
                    row = int32(load_row + n * LOAD_ROWS)
                    if (V_FULL or chunk < V_CHUNKS) and (EVEN or row < KEYS):
                        size = v_bytes if begin + KEYS + row <= last else int32(0)
                        wr = v_wr + ahead + n * LOAD_ROWS * V_ROW
                        ptx.cp_async_16_at(v_s, wr, values, rd + v_skip + n * LOAD_ROWS * WORDS, size)
                page = int32(block_table[pages + (min(int32(tile + 2), int32(end - 1)) // PAGE_TILES)])
            ptx.cp_async_commit()
            if begin < warp_end:
                multiply_keys(s_r, t_r, b_r, q_hi, q_lo, lo_s, k_s, int32(k_rd + (tile & 1) * K_BYTES), tid)
                mask(s_r, begin, position, c)
                max0, max1, sum0, sum1 = softmax(s_r, o_r, max0, max1, sum0, sum1)
                multiply_values(o_r, b_r, s_r, v_s, int32(v_rd + (tile & 1) * V_BYTES))
            tile = following

        for step in range(2):
            sum0 = sum0 + ptx.shuffle_xor(sum0, 1 << step)
            sum1 = sum1 + ptx.shuffle_xor(sum1, 1 << step)
        for r in range(2):
            row = int32(token + g + 8 * r)
            if row < used:
                inverse = ptx.div_rn(ONE, sum0 if r == 0 else sum1)
                wr = (int64(first) + row) * int32(HEAD_BLOCKS * HEADS * num_kv_heads * D) + int32(head * D)
                for n in range(VALUE_TILES):
                    d = int32(8 * n + 2 * c + value_part * (8 * VALUE_TILES))
                    if d < D:
                        i = 4 * n + 2 * r
                        ptx.store2_f32(
                            out, wr + d, finite_or_inf(o_r[i] * inverse), finite_or_inf(o_r[i + 1] * inverse)
                        )

    return prefill_attention


@cache
def prefill_spec(
    arch: int, head_dim: int, group: int, dtype: KVDtype = DEFAULT, warps: int = MAX_WARPS, blocks_per_sm: int = 2
) -> KernelSpec:
    """The variant for a head size, a number of query heads per key-value head and a type of the cache.

    Raises ValueError for an architecture without the products, and a head size that is odd or over MAX_HEAD_DIM.
    """
    if arch < MIN_ARCH:
        raise ValueError(f"prefill_attention needs compute capability 8.0, not {arch // 10}.{arch % 10}")
    check_head("prefill_attention", head_dim, group)
    heads, tiles = block_shape(group, warps)
    kernel = make_prefill(arch, head_dim, group, heads, tiles, dtype)
    name = f"prefill_attention[{head_dim}, {group}, {dtype}, {heads}, {tiles}, {blocks_per_sm}]"
    signature = (*PASS_SIGNATURE, types.CPointer(types.float32), types.int32, types.int32)
    return KernelSpec(name, kernel, signature, heads * tiles * WARP, blocks_per_sm)


def prefill_grid(
    num_tokens: int, num_kv_heads: int, head_dim: int, group: int, warps: int = MAX_WARPS
) -> tuple[int, int]:
    """Blocks of a launch for `num_tokens` tokens."""
    heads, tiles = block_shape(group, warps)
    return num_kv_heads * (group // heads) * value_parts(head_dim), -(-num_tokens // (tiles * WARP_TOKENS))


def prefill_attention(
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
    """Causal attention of tokens of prompts: out = softmax(q . K / sqrt(head_dim)) . V.

    qkv float32 [num_tokens, shape.qkv_size]; rope: the angles of every position; slot_positions int32 [num_tokens, 2]:
    in each `block_tokens` (slot, start), (slot, start + 1), ..., then (-1, anything) for tokens that are not used;
    cache: holds every token up to the last one's; out float32 [num_tokens, shape.out_size], which is not written for
    unused tokens.
    The kernel is prefill_wgmma's where that fits. Raises ValueError if an operand is too small or of another dtype, or
    where `fits` is False.
    """
    arguments, (out,) = pass_arguments(
        "prefill_attention", qkv, rope, slot_positions, cache, num_tokens, shape,
        out=(out, num_tokens * shape.out_size, "float32"),
    )  # fmt: skip
    if prefill_wgmma.fits(device.arch, shape.head_dim):
        launch = prefill_wgmma.launch_arguments(device, arguments, out, num_tokens, shape, cache.dtype)
        return device.launch(*launch, use_pdl)
    spec = prefill_spec(device.arch, shape.head_dim, shape.group, cache.dtype)
    grid = prefill_grid(num_tokens, shape.num_kv_heads, shape.head_dim, shape.group)
    return device.launch(spec, grid, (*arguments, out, num_tokens, shape.num_kv_heads), use_pdl)
