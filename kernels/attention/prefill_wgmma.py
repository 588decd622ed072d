"""Attention of a prompt's tokens on sm_90 by `wgmma`, up to head size 128: operands, result and precision are those of
prefill.py, whose `mma.sync` has half of this unit's rate here. TMA loads keys and values.

    block      HEADS query heads that share a key-value head  x  tiles of 16 tokens: 128 queries, one block an SM
    warp       one of its heads, 16 tokens; four are a warpgroup and issue products of 64 queries together
    tile       128 keys, or values, at absolute positions: two pages
    lane       g = lane / 4, c = lane % 4: queries g and g + 8; of scores and output columns 2c, 2c + 1 of every 8

    scores [64, keys] = q [64, D] . k'       q: two terms in shared memory
    out [64, D] += p [64, keys] . v          p: two terms in registers

    shared memory    | queries: warpgroup 0: high, low; 1: high, low | keys: two tiles | values: two tiles |
                     each as panels of 64 dimensions, rows of 128 bytes in 128-byte swizzle

The warpgroups take turns: while one's products run, the other turns its scores into weights. Both run the same code,
the second a barrier later. Products t are out += p . v of tile t and the scores of tile t + 1:

    warpgroup 0    | start products 0 | wait, weights 1  | start products 1 | wait, weights 2  | ...
    warpgroup 1    |                  | start products 0 | wait, weights 1  | start products 1 | ...
    loads          |                  | keys 2, values 1                    | keys 3, values 2 ...

Where the barriers stand matters: products of both at once run slower than one after the other, and without a `wgmma`
fence before it the assembler moves a barrier in front of the weights. docs/performance-notes.md has the figures.

Keys after the block's last token arrive as zeros where their page is not needed at all, and otherwise as the page has
them: scores of such keys are masked, and their values, which may be NaN, are overwritten with zeros.

A query's bits depend on its own position alone, for prefill.py's reasons: its sums run over absolute tiles in order,
and a tile whose keys are all masked for it changes nothing.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.kv_cache import PAGE, PAGE_BITS, PASS_SIGNATURE, token_words
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype, half_functions
from bitnet_numba.kernels.attention.parts import (
    MINUS_INF,
    HeadShape,
    check_head,
    finite_or_inf,
    make_rotated_query,
    rotate_pair,
    score_scale,
)
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32, int64
from bitnet_numba.kernels.ptx.tma import PANEL_ALIGN, SPAN_INTS, Boxes
from bitnet_numba.kernels.ptx.wgmma import TILE_BYTES
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec

ARCH = 90  # the only architecture with wgmma
MAX_HEAD_DIM = 128  # the registers hold a query's output, scores and weights
WARP_TOKENS = 16
WARPS = 8  # of a block: two warpgroups, which take turns
WARPGROUP = 128  # threads
KEYS = 128  # of a tile
ROW_BYTES = 4 * SPAN_INTS  # of a panel


def fits(arch: int, head_dim: int) -> bool:
    """Whether this kernel serves a head size on an architecture."""
    return arch == ARCH and head_dim % 2 == 0 and 2 <= head_dim <= MAX_HEAD_DIM


def block_shape(group: int, warps: int = WARPS) -> tuple[int, int]:
    """(query heads, tiles of 16 tokens) of a block: the heads divide the group and the warps."""
    heads = max(n for n in (1, 2, 4, 8) if group % n == 0 and n <= warps)
    return heads, warps // heads


def shared_bytes(head_dim: int, warps: int = WARPS, keys: int = KEYS) -> int:
    """Dynamic shared memory of a block, with room to align its start, which the kernel does."""
    panels = -(-head_dim // 64)
    return panels * (2 * TILE_BYTES * (warps // 4) + 4 * keys * ROW_BYTES) + PANEL_ALIGN


def make_prefill_wgmma(
    arch: int, head_dim: int, group: int, warps: int, keys: int, dtype: KVDtype
) -> Callable[..., None]:
    """The kernel for a head size and `group` query heads a key-value head; a block has 4 or 8 `warps`, a tile `keys`
    keys."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    rotated, half = make_rotated_query(head_dim), half_functions(dtype)
    pack, low_of, high_of = half.pack, half.low, half.high
    HEADS, TILES = block_shape(group, warps)
    HEAD_BLOCKS, TOKENS, USED_ROUNDS = group // HEADS, TILES * WARP_TOKENS, -(-TILES * WARP_TOKENS // WARP)
    D, HALF, WORDS = head_dim, head_dim // 2, token_words(head_dim, dtype)
    N, TILE_BITS = keys, keys.bit_length() - 1
    STEPS, COLUMNS = -(-D // 16), -(-D // 8) * 8  # products along the dimensions of a score; columns of the output
    S_TILES, O_TILES = N // 8, COLUMNS // 8
    S_REGS, P_REGS, O_REGS = 4 * S_TILES, 4 * S_TILES, 4 * O_TILES
    PANELS = -(-WORDS // SPAN_INTS)
    BOX_ROWS = min(N, PAGE)  # of a TMA load: a page, or a part of it
    PARTS = N // BOX_ROWS  # boxes of a panel
    BOX, BOXES = BOX_ROWS * ROW_BYTES, PANELS * PARTS
    TILE = BOXES * BOX
    GROUPS, V_PIECES = warps // 4, TILE // 16  # pieces of 16 bytes
    Q_GROUP = 2 * PANELS * TILE_BYTES  # a warpgroup's queries
    K_AT, V_AT = GROUPS * Q_GROUP, GROUPS * Q_GROUP + 2 * TILE
    Q_HEADS = min(HEADS, 4)  # heads of a warpgroup
    Q_TOKENS = WARP_TOKENS // Q_HEADS  # of its tokens that a warp loads, for all these heads: angles are loaded once
    PAIR_WORDS = HALF // 2 if HALF % 2 == 0 else 0  # words of the lower half, loaded with those of the upper half
    ROUNDS = -(-Q_TOKENS * PAIR_WORDS // WARP)
    X_REGS = max(1, ROUNDS * (4 + 4 * Q_HEADS))
    # Words computed one by one: all where halves are odd, and those that pad the head.
    FIRST_OTHER = 2 * PAIR_WORDS
    OTHER_WORDS = 8 * STEPS - FIRST_OTHER
    OTHER_ROUNDS = -(-Q_TOKENS * OTHER_WORDS // WARP)
    SCALE = score_scale(D)
    ZERO, NOTHING = float32(0), int32(0)
    issue_scores, scores_ready = ptx.wgmma_scores(N, STEPS, half.name)
    fence, issue_values, values_ready = ptx.wgmma_values(N, COLUMNS, half.name)

    @device_function
    def store_query(shared, at, row, word, x0, x1):
        """Both terms of a row's dimensions 2 word, 2 word + 1. at: index of the warpgroup's queries."""
        hi = pack(x0, x1)
        lo = pack(x0 - low_of(hi), x1 - high_of(hi))
        piece = int32((word >> 2 & 7) ^ (row & 7))
        wr = int32(at + (word >> 5) * (TILE_BYTES // 4) + row * SPAN_INTS + piece * 4 + (word & 3))
        shared[wr] = hi
        shared[wr + PANELS * TILE_BYTES // 4] = lo

    @device_function
    def own_word(lane, i, words):
        """(token, word) of a lane's i-th pair of a warp's tokens and `words` words; those beyond repeat the last."""
        n = min(int32(lane + i * WARP), int32(Q_TOKENS * words - 1))
        token = int32(n // words)
        return token, int32(n - token * words)

    @device_function
    def load_queries(x_r, qkv, cos, sin, shared, at, q_rd, stride, token, first_token, used, start, lane):
        """Q_TOKENS tokens' queries of the warpgroup's heads, rotated and scaled. token: of the warpgroup's; q_rd: its
        first head of the block's first token. All loads come before the first use."""
        for i in range(ROUNDS):
            own, word = own_word(lane, i, PAIR_WORDS)
            t = min(int32(first_token + token + own), int32(used - 1))
            rd, angle = q_rd + int64(t) * stride + 2 * word, int64(start + t) * HALF + 2 * word
            n = i * (4 + 4 * Q_HEADS)
            x_r[n], x_r[n + 1] = ptx.load2_f32(cos, angle)
            x_r[n + 2], x_r[n + 3] = ptx.load2_f32(sin, angle)
            for h in range(Q_HEADS):
                m = n + 4 + 4 * h
                x_r[m], x_r[m + 1] = ptx.load2_f32(qkv, rd + h * D)
                x_r[m + 2], x_r[m + 3] = ptx.load2_f32(qkv, rd + (h * D + HALF))
        for i in range(ROUNDS):
            own, word = own_word(lane, i, PAIR_WORDS)
            t = int32(token + own)
            row = int32((t // WARP_TOKENS) * (Q_HEADS * WARP_TOKENS) + t % WARP_TOKENS)
            n = i * (4 + 4 * Q_HEADS)
            for h in range(Q_HEADS):
                m = n + 4 + 4 * h
                a0, b0 = rotate_pair(x_r[m], x_r[m + 2], x_r[n], x_r[n + 2])
                a1, b1 = rotate_pair(x_r[m + 1], x_r[m + 3], x_r[n + 1], x_r[n + 3])
                to = int32(row + h * WARP_TOKENS)
                store_query(shared, at, to, word, ptx.mul_rn(a0, SCALE), ptx.mul_rn(a1, SCALE))
                upper = int32(word + PAIR_WORDS)
                store_query(shared, at, to, upper, ptx.mul_rn(b0, SCALE), ptx.mul_rn(b1, SCALE))
        for h in range(Q_HEADS):
            for i in range(OTHER_ROUNDS):
                own, word = own_word(lane, i, OTHER_WORDS)
                t = int32(token + own)
                row = int32((t // WARP_TOKENS) * (Q_HEADS * WARP_TOKENS) + t % WARP_TOKENS + h * WARP_TOKENS)
                word = int32(word + FIRST_OTHER)
                t = min(int32(first_token + t), int32(used - 1))
                rd, angle = q_rd + int64(t) * stride + h * D, int64(start + t) * HALF
                x0 = rotated(qkv, cos, sin, rd, angle, int32(2 * word))
                x1 = rotated(qkv, cos, sin, rd, angle, int32(2 * word + 1))
                store_query(shared, at, row, word, x0, x1)

    @device_function
    def box_row(block_table, pages, page_rows, head_row, last, tile, part, beyond):
        """Row of a tile's part in the cache as a matrix; `beyond`, where there is nothing, for what is after token
        `last`."""
        token = int32((tile << TILE_BITS) + part * BOX_ROWS)
        page = int32(block_table[pages + (min(token, last) >> PAGE_BITS)])
        row = int32(page * page_rows + head_row + (token & (PAGE - 1)))
        return row if token <= last else beyond

    @device_function
    def mask(s_r, begin, position0, position1, c):
        """Leaves out the keys after a lane's queries."""
        last0, last1 = int32(position0 - begin - 2 * c), int32(position1 - begin - 2 * c)
        for t in range(S_TILES):
            s_r[4 * t] = s_r[4 * t] if 8 * t <= last0 else MINUS_INF
            s_r[4 * t + 1] = s_r[4 * t + 1] if 8 * t + 1 <= last0 else MINUS_INF
            s_r[4 * t + 2] = s_r[4 * t + 2] if 8 * t <= last1 else MINUS_INF
            s_r[4 * t + 3] = s_r[4 * t + 3] if 8 * t + 1 <= last1 else MINUS_INF

    @device_function
    def exponentials(s_r, before0, before1, sum0, sum1):
        """Scores become weights; returns the running maximum and sum of both queries, and the factors of what was
        added up before."""
        max0, max1 = before0, before1
        for t in range(S_TILES):
            max0 = max(max0, max(s_r[4 * t], s_r[4 * t + 1]))
            max1 = max(max1, max(s_r[4 * t + 2], s_r[4 * t + 3]))
        for step in range(2):
            max0 = max(max0, ptx.shuffle_xor(max0, 1 << step))
            max1 = max(max1, ptx.shuffle_xor(max1, 1 << step))
        alpha0, alpha1 = ptx.exp2_approx(before0 - max0), ptx.exp2_approx(before1 - max1)
        sum0, sum1 = sum0 * alpha0, sum1 * alpha1
        for t in range(S_TILES):
            i = 4 * t
            p0, p1 = ptx.exp2_approx(s_r[i] - max0), ptx.exp2_approx(s_r[i + 1] - max0)
            p2, p3 = ptx.exp2_approx(s_r[i + 2] - max1), ptx.exp2_approx(s_r[i + 3] - max1)
            sum0, sum1 = sum0 + (p0 + p1), sum1 + (p2 + p3)
            s_r[i], s_r[i + 1], s_r[i + 2], s_r[i + 3] = p0, p1, p2, p3
        return max0, max1, sum0, sum1, alpha0, alpha1

    @device_function
    def split(s_r, p_r):
        """Weights as left operand, in two terms."""
        for t in range(S_TILES):
            i, to = 4 * t, 8 * (t // 2) + 2 * (t % 2)
            hi0, hi1 = pack(s_r[i], s_r[i + 1]), pack(s_r[i + 2], s_r[i + 3])
            p_r[to], p_r[to + 1] = hi0, hi1
            p_r[to + 4] = pack(s_r[i] - low_of(hi0), s_r[i + 1] - high_of(hi0))
            p_r[to + 5] = pack(s_r[i + 2] - low_of(hi1), s_r[i + 3] - high_of(hi1))

    @device_function
    def rescale(o_r, alpha0, alpha1):
        for t in range(O_TILES):
            o_r[4 * t], o_r[4 * t + 1] = o_r[4 * t] * alpha0, o_r[4 * t + 1] * alpha0
            o_r[4 * t + 2], o_r[4 * t + 3] = o_r[4 * t + 2] * alpha1, o_r[4 * t + 3] * alpha1

    def prefill_attention_wgmma(
        qkv, cos, sin, slot_positions, block_table, block_table_stride, keys_map, values_map, page_rows, head_rows,
        out, num_tokens, num_kv_heads, num_rows,
    ):  # fmt: skip
        shared = ptx.pointer(cuda.shared.array(0, int32))
        mbarrier_s = ptx.pointer(cuda.shared.array(2, int64))
        s_r = cuda.local.array(S_REGS, float32)
        p_r = cuda.local.array(P_REGS, int32)
        o_r = cuda.local.array(O_REGS, float32)
        x_r = cuda.local.array(X_REGS, float32)

        release()
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid >> 5), int32(tid & 31)
        g, c = int32(lane >> 2), int32(lane & 3)
        first = int32((int32(cuda.gridDim.y) - 1 - int32(cuda.blockIdx.y)) * TOKENS)  # the block's first token
        head_block = int32(cuda.blockIdx.x)
        kv = head_block if HEAD_BLOCKS == 1 else ptx.udiv(head_block, int32(HEAD_BLOCKS))
        head = int32(head_block * HEADS + warp % HEADS)
        token = int32(warp // HEADS * WARP_TOKENS)  # the warp's first, in the block
        unaligned, mbarriers = ptx.shared_address(shared, 0), ptx.shared_address(mbarrier_s, 0)
        base = int32((unaligned + (PANEL_ALIGN - 1)) & -PANEL_ALIGN)
        if tid == 0:
            ptx.prefetch_tensor_map(keys_map, 0)
            ptx.prefetch_tensor_map(values_map, 0)
            for n in range(2):
                ptx.mbarrier_init(mbarriers + 8 * n)
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

        # 1. The first tiles.
        pages = int64(slot) * block_table_stride
        head_row, beyond = int32(kv * head_rows), int32(num_rows)
        warpgroup, panel, part = int32(warp >> 2), int32(warp // PARTS * SPAN_INTS), int32(warp % PARTS)
        k_to, v_to = int32(base + K_AT + warp * BOX), int32(base + V_AT + warp * BOX)
        loads = lane == 0 and warp < BOXES
        row = box_row(block_table, pages, page_rows, head_row, last, int32(0), part, beyond)
        v_row = box_row(block_table, pages, page_rows, head_row, last, int32(1), part, beyond)
        k_row = box_row(block_table, pages, page_rows, head_row, last, int32(2), part, beyond)
        if tid == 0:
            ptx.mbarrier_expect_tx(mbarriers, TILE)
            ptx.mbarrier_expect_tx(mbarriers + 8, int32(2 * TILE) if end > 1 else int32(TILE))
        cuda.syncthreads()
        if loads:
            ptx.tma_load_2d(keys_map, 0, shared, k_to, mbarriers, panel, row)
            if end > 1:
                ptx.tma_load_2d(keys_map, 0, shared, k_to + TILE, mbarriers + 8, panel, v_row)
            ptx.tma_load_2d(values_map, 0, shared, v_to, mbarriers + 8, panel, row)

        # 2. Queries.
        stride = int32((HEAD_BLOCKS * HEADS + 2) * num_kv_heads * D)
        own_q = int32(base + warpgroup * Q_GROUP)
        first_warp = int32(warpgroup * 4)
        q_rd = int64(first) * stride + int32((head_block * HEADS + first_warp % HEADS) * D)
        load_queries(
            x_r, qkv, cos, sin, shared, int32((own_q - unaligned) >> 2), q_rd, stride, int32((warp & 3) * Q_TOKENS),
            int32(first_warp // HEADS * WARP_TOKENS), used, start, lane,
        )  # fmt: skip
        ptx.fence_proxy_async()
        cuda.syncthreads()

        # 3. Tiles.
        warp_position = int32(start + min(token, int32(used - 1)))  # of the warp's first query
        position0 = int32(start + min(int32(token + g), int32(used - 1)))
        position1 = int32(start + min(int32(token + g + 8), int32(used - 1)))
        for i in range(O_REGS):
            o_r[i] = ZERO
        ptx.mbarrier_wait(mbarriers, 0)
        if warpgroup:
            cuda.syncthreads()  # from here on it is a barrier behind
        issue_scores(s_r, shared, own_q, base + K_AT)
        cuda.syncthreads()
        scores_ready(s_r)
        if N - 1 > warp_position:
            mask(s_r, int32(0), position0, position1, c)
        max0, max1, sum0, sum1, alpha0, alpha1 = exponentials(s_r, MINUS_INF, MINUS_INF, ZERO, ZERO)
        split(s_r, p_r)
        ptx.mbarrier_wait(mbarriers + 8, 0)
        fence(o_r, p_r)
        cuda.syncthreads()
        tile = int32(0)
        while tile + 1 < end:
            slot = int32(tile + 1 & 1)
            issue_values(o_r, p_r, shared, int32(base + V_AT + (1 - slot) * TILE))
            issue_scores(s_r, shared, own_q, int32(base + K_AT + slot * TILE))
            mbarrier, more = int32(mbarriers + 8 * (1 - slot)), tile + 2 < end
            if tid == 0:
                ptx.mbarrier_expect_tx(mbarrier, int32(2 * TILE) if more else int32(TILE))
            cuda.syncthreads()  # warpgroup 0: both have multiplied this tile's keys and the values before it
            if loads:
                if more:
                    ptx.tma_load_2d(keys_map, 0, shared, int32(k_to + (1 - slot) * TILE), mbarrier, panel, k_row)
                ptx.tma_load_2d(values_map, 0, shared, int32(v_to + slot * TILE), mbarrier, panel, v_row)
            v_row = k_row
            k_row = box_row(block_table, pages, page_rows, head_row, last, int32(tile + 3), part, beyond)
            values_ready(o_r)
            scores_ready(s_r)
            tile = int32(tile + 1)
            begin = int32(tile << TILE_BITS)
            if begin + (N - 1) > warp_position:
                mask(s_r, begin, position0, position1, c)
            max0, max1, sum0, sum1, alpha0, alpha1 = exponentials(s_r, max0, max1, sum0, sum1)
            split(s_r, p_r)
            rescale(o_r, alpha0, alpha1)
            ptx.mbarrier_wait(int32(mbarriers + 8 * (1 - slot)), int32(tile + 1 >> 1 & 1))
            fence(o_r, p_r)
            cuda.syncthreads()

        # 4. The last tile's values. What follows the last token in its page may be anything, even NaN.
        own_v = int32(base + V_AT + (tile & 1) * TILE)
        left = int32(last + 1 - (tile << TILE_BITS))  # keys of the tile
        if left < N:
            for n in range(V_PIECES // WARPGROUP):
                piece = int32((tid & WARPGROUP - 1) + n * WARPGROUP)
                if (piece >> 3 & (N - 1)) >= left:
                    ptx.store4(shared, ((own_v - unaligned) >> 2) + piece * 4, NOTHING, NOTHING, NOTHING, NOTHING)
            ptx.fence_proxy_async()
            ptx.warpgroup_barrier(warpgroup)
        issue_values(o_r, p_r, shared, own_v)
        if warpgroup < GROUPS - 1:
            cuda.syncthreads()  # which the others are still to come to
        values_ready(o_r)

        # 5. Output.
        for step in range(2):
            sum0 = sum0 + ptx.shuffle_xor(sum0, 1 << step)
            sum1 = sum1 + ptx.shuffle_xor(sum1, 1 << step)
        for r in range(2):
            row = int32(token + g + 8 * r)
            if row < used:
                inverse = ptx.rcp_approx(sum0 if r == 0 else sum1)
                wr = (int64(first) + row) * int32(HEAD_BLOCKS * HEADS * num_kv_heads * D) + int32(head * D)
                for n in range(O_TILES):
                    d = int32(8 * n + 2 * c)
                    if COLUMNS == D or d < D:
                        i = 4 * n + 2 * r
                        ptx.store2_f32(
                            out, wr + d, finite_or_inf(o_r[i] * inverse), finite_or_inf(o_r[i + 1] * inverse)
                        )

    return prefill_attention_wgmma


@cache
def prefill_wgmma_spec(
    arch: int, head_dim: int, group: int, dtype: KVDtype = DEFAULT, warps: int = WARPS, keys: int = KEYS
) -> KernelSpec:
    """The variant for a head size, a number of query heads per key-value head and a type of the cache.

    Raises ValueError for an architecture without the products, and a head size that is odd or over MAX_HEAD_DIM.
    """
    if arch != ARCH:
        raise ValueError(f"prefill_attention_wgmma needs compute capability 9.0, not {arch // 10}.{arch % 10}")
    check_head("prefill_attention_wgmma", head_dim, group, MAX_HEAD_DIM)
    return KernelSpec(
        name=f"prefill_attention_wgmma[{head_dim}, {group}, {dtype}, {warps}, {keys}]",
        kernel=make_prefill_wgmma(arch, head_dim, group, warps, keys, dtype),
        signature=(*PASS_SIGNATURE, types.CPointer(types.float32), *(types.int32,) * 3),
        threads=warps * WARP,
        shared=shared_bytes(head_dim, warps, keys),
    )


def prefill_wgmma_grid(num_tokens: int, num_kv_heads: int, group: int, warps: int = WARPS) -> tuple[int, int]:
    """Blocks of a launch for `num_tokens` tokens."""
    heads, tiles = block_shape(group, warps)
    return num_kv_heads * (group // heads), -(-num_tokens // (tiles * WARP_TOKENS))


def boxes_of_cache(cache_words: int, head_dim: int, keys: int = KEYS) -> Boxes:
    """The boxes that keys and values are loaded in: the cache as a matrix of tokens."""
    words = token_words(head_dim)
    return Boxes.of_matrix(cache_words // words, words, min(keys, PAGE), SPAN_INTS)


def launch_arguments(
    device: Device, arguments: tuple[Any, ...], out: DeviceArray, num_tokens: int, shape: HeadShape, dtype: KVDtype
) -> tuple[KernelSpec, tuple[int, int], tuple[Any, ...]]:
    """What `device.launch` takes for this kernel, of the operands that `pass_arguments` has checked: spec, grid,
    arguments.

    Raises ValueError where pages or heads of the cache do not begin with a token.
    """
    *rest, keys, values, page_words, head_words = arguments
    words = token_words(shape.head_dim)
    if page_words % words or head_words % words:
        raise ValueError(f"prefill_attention: strides of {page_words} and {head_words} are not tokens of {words} words")
    spec = prefill_wgmma_spec(device.arch, shape.head_dim, shape.group, dtype, WARPS, KEYS)
    grid = prefill_wgmma_grid(num_tokens, shape.num_kv_heads, shape.group, WARPS)
    boxes = boxes_of_cache(keys.size, shape.head_dim, KEYS)
    cache = device.tensor_map(keys, boxes), device.tensor_map(values, boxes), page_words // words, head_words // words
    return spec, grid, (*rest, *cache, out, num_tokens, shape.num_kv_heads, boxes.shape[0])
