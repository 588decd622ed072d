"""The W2A8 matrix product on tensor cores: ternary weights [N, K] as packed words, M tokens' activations as int8.

    y[m, n] = (sum_k q[m, k] * w[n, k]) * scale[segment of n] / s[m]  (+ bias[n])

The sums are exact integers and everything after them is done as in w2a8_gemv.py, operation by operation, so that a
token's row of the result is the same, to the bit, as that of a product for it alone, whatever M and the tiles.

`mma.m16n8k32` multiplies 16 x 32 codes (w + 2, unsigned) with 32 x 8 activations. A product's columns may come in any
order if both operands agree, and its 16 rows may be any rows: so each lane takes what lies together in memory, and no
value ever changes lanes. Of a row-block's 64 columns (two blocks of `packing`, 256 bytes in a row), with g = lane / 4
and i = lane % 4:

    words    8 bytes: columns 16 i .. 16 i + 15 of rows r and r + 1, r = 8 (g / 4) + 2 (g % 4)
    q       16 bytes: columns 16 i .. 16 i + 15 of token g
    product p = 0, 1 takes columns 8 p .. 8 p + 7 of every lane's sixteen:
             a0, a2 = (word >> 4 p), (word >> 4 p + 2) & mask;  a1, a3 the same of the other word;  b0, b1 = q's words
    sums     rows r, r + 1 of tokens 2 i, 2 i + 1

Work split:

    block (x, y): tokens T x .. T x + T - 1;  row-blocks of the y-th tile: row_warps groups of `blocks` each
    warp: one group of row-blocks ("gated": pairs, gate and up rows at once), all T tokens, every k_warps-th panel of
    64 columns:
        columns      0    64   128   192
        warp 0       |====|    |====|    ...      (k_warps = 2; a turn is k_warps panels)
        warp 1       |    |====|    |====...
    The warps' int32 sums meet in shared memory.

Weights go from global memory straight to registers, `held` turns ahead: each word is used by one warp, and seven
instructions make four operand registers of it, for T / 8 products. The first ones are asked for before `grid_wait`,
while the kernels before this one still run. Activations either come through shared memory, by asynchronous copies
`stages` - 1 turns ahead (64 bytes of a token after the other: a quarter warp's 16-byte loads touch every bank once),
or, where no two warps want the same, straight from global memory (`stages` = 0).
docs/performance-notes.md has what was tried and measured.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels.device import Device, DeviceArray, Launch, driver_call
from bitnet_numba.kernels.forms import KernelForm
from bitnet_numba.kernels.intrinsics import (
    PANEL_ALIGN,
    SHARED_ALIGN,
    WARP,
    arrival_expect,
    arrival_init,
    arrival_wait,
    async_commit,
    async_copy4,
    async_wait,
    copy_panel,
    float32,
    grid_release,
    grid_wait,
    int32,
    int64,
    load4,
    mma_codes,
    pointer,
    store4,
    stream_pair,
    warpgroup_mma,
)
from bitnet_numba.kernels.w2a8_columns import STEP, make_columns
from bitnet_numba.kernels.w2a8_epilogue import EPILOGUES, make_epilogue
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, CODE_BITS, CODE_MASK, packed_words

LEAST_ARCH = 80  # mma of 8-bit integers with 32 columns
PANEL = 64  # columns that a warp multiplies in a turn: two blocks
PANEL_INTS = PANEL // 4  # of a token's activations
TOKENS = 8  # of one mma
FRAGMENT = 4 * WARP  # int32 sums of one mma
SHARED_INTS = 48 * 1024 // 4 - 512  # static shared memory of a block, less what the tokens' scales and sums take
MOST_SEGMENTS = 3  # q, k and v


class Tile(NamedTuple):
    """How a product is cut up: what its kernel is specialised to."""

    tokens: int  # of a block: a multiple of 8
    blocks: int  # row-blocks of a warp; even for "gated"
    row_warps: int  # warps of a block side by side along the rows
    k_warps: int  # warps that share rows, each with its own columns
    held: int  # turns of weights in registers
    stages: int  # turns of activations in shared memory; 0: straight to registers
    per_sm: int = 1  # blocks of a multiprocessor that the registers must allow
    scheme: str = "mma"  # or "wgmma", for sm_90 alone, or "dp4a", of w2a8_columns.py

    @property
    def rows(self) -> int:
        """Rows of the matrix that a block owns (gate and up rows counted each)."""
        return self.blocks * self.row_warps * BLOCK_ROWS

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.row_warps * self.k_warps * WARP


def make_matmul(arch: int, tile: Tile, epilogue: str = "store", activation: str = "relu2") -> Callable[..., None]:
    """The kernel for a tile. `epilogue`: "acc" int32 sums, for tests; "store" y; "residual" y is added to what `out`
    holds; "gated" activation(y[n]) * y[n + N/2]."""
    load, wait, release = stream_pair(arch), grid_wait(arch), grid_release(arch)
    GATED, RESIDUAL, ACC = epilogue == "gated", epilogue == "residual", epilogue == "acc"
    finish = make_epilogue(epilogue, activation)
    T, U, WR, WK, HELD, STAGES = tile[:6]
    HALVES = 2 if GATED else 1
    UNITS = U // HALVES  # row-blocks of the output
    THREADS = tile.threads
    NT = T // TOKENS
    WARPGROUP = tile.scheme == "wgmma"
    STAGED = STAGES > 0 and not WARPGROUP
    arrived = async_wait(max(STAGES - 2, 0))
    SPAN = 2 * PANEL if WARPGROUP else PANEL  # columns that a warp multiplies in a turn
    STAGE = WK * T * SPAN // 4
    COPIES = -(-STAGE // 4 // THREADS)
    COPIES_EXACT = STAGE % (4 * THREADS) == 0
    B_AHEAD = 0 if STAGES else max(n for n in (8, 7, 6, 5, 4, 3, 2, 1) if HELD % n == 0 and (n == 1 or n * NT <= 8))
    W_EACH, A_EACH = (16, 16) if WARPGROUP else (2, 8)  # registers of a row-block and turn
    W_REGS, A_REGS, B_REGS, ACC_REGS = W_EACH * U * HELD, A_EACH * U, max(4 * NT * B_AHEAD, 1), 4 * U * NT
    ALIGN = PANEL_ALIGN if WARPGROUP else SHARED_ALIGN
    SLOTS = max(STAGES, 1)
    # Sums meet in passes of as many n-tiles as fit the shared memory.
    N_PASS = next(n for n in range(NT, 0, -1) if NT % n == 0 and n * U * WR * WK * FRAGMENT <= SHARED_INTS)
    PASSES = NT // N_PASS
    SHARED = max(STAGES * STAGE, N_PASS * U * WR * WK * FRAGMENT)
    PASS = N_PASS * U * FRAGMENT  # sums of a warp in a pass
    SCALE_TURNS = -(-T // THREADS)
    MASK = np.int32(CODE_MASK)
    ZERO = float32(0)
    bad_group = WARPGROUP and (WR % 4 or STAGES < 2)
    if GATED and U % 2 or T % TOKENS or SHARED > SHARED_INTS or bad_group:
        raise ValueError(f"no product is made of {tile}")
    warpgroup_product = warpgroup_mma(T, U)

    def matmul(
        words, q, panels, s, total, count, scales, bias, out, M, rows, KP, turns, blocks, second, bound1, bound2
    ):
        shared = pointer(cuda.shared.array(SHARED, int32, ALIGN))  # activations, then sums
        arrival_s = pointer(cuda.shared.array(SLOTS, int64))
        s_s = pointer(cuda.shared.array(T, float32))
        total_s = pointer(cuda.shared.array(T, int32))
        w_r = cuda.local.array(W_REGS, int32)
        a_r = cuda.local.array(A_REGS, int32)
        b_r = cuda.local.array(B_REGS, int32)
        acc_r = cuda.local.array(ACC_REGS, int32)
        old_r = cuda.local.array(4, float32)
        words_rd = cuda.local.array(U, int32)
        q_rd = cuda.local.array(NT, int32)
        column_r = cuda.local.array(COPIES, int32)
        from_r = cuda.local.array(COPIES, int32)
        bytes_r = cuda.local.array(COPIES, int32)

        tid = int32(cuda.threadIdx.x)
        warp, lane = tid >> 5, tid & 31
        g, i = lane >> 2, lane & 3
        k_warp = int32(warp % WK)
        row_warp = int32(warp // WK)
        if WARPGROUP:  # four neighbouring warps multiply together, each its own rows
            k_warp = int32((warp >> 2) % WK)
            row_warp = int32((warp >> 2) // WK * 4 + (warp & 3))
        first = int32(cuda.blockIdx.x) * T
        limit = min(int32(M), int32(count[0]))  # no kernel writes it: it may be read before the wait
        if first >= limit:
            if first == 0:
                wait()  # so that the launch does not end before those it follows
            return
        unit0 = int32((int32(cuda.blockIdx.y) * WR + row_warp) * UNITS)

        # 1. The first turns' weights. Beyond the last column they are any words, and count for nothing.
        for u in range(U):
            unit = min(int32(unit0 + u // HALVES), int32(blocks - 1))
            lane_rd = int32((g >> 2) * 16 + (g & 3) * 2 + (0 if WARPGROUP else (i & 1) * 8))
            words_rd[u] = int32(int32(unit + u % HALVES * second) * KP + lane_rd)
        last = int32(KP - BLOCK_COLS)
        # The column of the words that are asked for next; a row-block has a word a column.
        column = int32(k_warp * SPAN + (0 if WARPGROUP else (i >> 1) * BLOCK_COLS))
        for j in range(HELD):
            for u in range(U):
                for c in range(W_EACH // 2):
                    n = W_EACH * (j * U + u) + 2 * c
                    at = int32(min(int32(column + (c >> 1) * BLOCK_COLS), last) + (c & 1) * 8)
                    w_r[n], w_r[n + 1] = load(words, words_rd[u] + at)
            column += WK * SPAN
        for n in range(ACC_REGS):
            acc_r[n] = int32(0)
        scale0 = scale1 = scale2 = ZERO
        if not ACC:
            scale0 = scales[0]
            scale1 = scales[1] if bound1 < rows or GATED else ZERO
            scale2 = scales[2] if bound2 < rows else ZERO
        if WARPGROUP and tid == 0:
            for n in range(SLOTS):
                arrival_init(arrival_s, n)
        release()
        wait()

        # 2. The first turns' activations.
        stride = int32(KP >> 2)  # int32 words of a token
        q_column = int32(k_warp * PANEL_INTS + i * 4)  # of what is asked for next, in int32 words
        if STAGED:
            for n in range(COPIES):
                chunk = int32(tid + n * THREADS)
                token = int32((chunk >> 2) % T)
                column_r[n] = int32(chunk // (4 * T) * PANEL_INTS + (chunk & 3) * 4)
                from_r[n] = int32((first + token) * stride)
                bytes_r[n] = int32(16) if first + token < limit else int32(0)
            for t in range(STAGES - 1):
                for n in range(COPIES):
                    chunk = int32(tid + n * THREADS)
                    size = bytes_r[n] if column_r[n] < stride else int32(0)
                    if COPIES_EXACT or chunk < STAGE // 4:
                        async_copy4(shared, t * STAGE + chunk * 4, q, from_r[n] + column_r[n], size)
                    column_r[n] += WK * PANEL_INTS
                async_commit()
        elif WARPGROUP:
            cuda.syncthreads()
            if tid == 0:
                for t in range(STAGES - 1):
                    if t < turns:
                        arrival_expect(arrival_s, t, 4 * STAGE)
                        for k in range(2 * WK):
                            to = t * STAGE + k * (T * PANEL_INTS)
                            copy_panel(panels, 0, shared, to, arrival_s, t, t * WK * SPAN + k * PANEL, first)
        else:
            for t in range(NT):
                q_rd[t] = int32(min(int32(first + t * TOKENS + g), int32(limit - 1)) * stride)
            for j in range(B_AHEAD):
                at = min(q_column, int32(stride - 4))
                for t in range(NT):
                    n = 4 * (j * NT + t)
                    b_r[n], b_r[n + 1], b_r[n + 2], b_r[n + 3] = load4(q, q_rd[t] + at)
                    if q_column >= stride:
                        b_r[n] = b_r[n + 1] = b_r[n + 2] = b_r[n + 3] = int32(0)
                q_column += WK * PANEL_INTS
        for n in range(SCALE_TURNS):
            token = int32(tid + n * THREADS)
            if token < T and first + token < limit:
                s_s[token] = s[first + token]
                total_s[token] = total[first + token]

        # 3. Products.
        b_rd = int32((k_warp * T + g) * PANEL_INTS + i * 4)
        stage_rd, stage_wr = int32(0), int32((STAGES - 1) * STAGE)
        slot_rd, slot_wr, parity = int32(0), int32(STAGES - 1), int32(0)
        turn = int32(0)
        while turn < turns:
            for j in range(HELD):
                if turn + j < turns:
                    if STAGED:
                        arrived()
                        cuda.syncthreads()  # everyone's copies have arrived, and the last turn has been read
                        for n in range(COPIES):
                            chunk = int32(tid + n * THREADS)
                            size = bytes_r[n] if column_r[n] < stride else int32(0)
                            if COPIES_EXACT or chunk < STAGE // 4:
                                async_copy4(shared, stage_wr + chunk * 4, q, from_r[n] + column_r[n], size)
                            column_r[n] += WK * PANEL_INTS
                        async_commit()
                    if WARPGROUP:
                        cuda.syncthreads()  # the last turn's activations have been multiplied
                        ahead = int32(turn + j + STAGES - 1)
                        if tid == 0 and ahead < turns:
                            arrival_expect(arrival_s, slot_wr, 4 * STAGE)
                            for k in range(2 * WK):
                                to = slot_wr * STAGE + k * (T * PANEL_INTS)
                                copy_panel(
                                    panels, 0, shared, to, arrival_s, slot_wr, ahead * WK * SPAN + k * PANEL, first
                                )
                        for u in range(U):
                            for n in range(16):
                                a_r[16 * u + n] = (w_r[16 * (j * U + u) + n] >> (CODE_BITS * i)) & MASK
                        arrival_wait(arrival_s, slot_rd, parity)
                        warpgroup_product(acc_r, a_r, shared, slot_rd * STAGE + k_warp * (T * SPAN // 4))
                        slot_wr = slot_rd
                        slot_rd += 1
                        if slot_rd == STAGES:
                            slot_rd, parity = int32(0), int32(1 - parity)
                    elif STAGED:
                        for u in range(U):
                            for r in range(2):
                                w = w_r[2 * (j * U + u) + r]
                                for p in range(4):
                                    a_r[8 * u + 4 * (p >> 1) + 2 * (p & 1) + r] = (w >> (CODE_BITS * p)) & MASK
                        for t in range(NT):
                            b0, b1, b2, b3 = load4(shared, stage_rd + b_rd + t * TOKENS * PANEL_INTS)
                            for p in range(2):
                                for u in range(U):
                                    n, a = 4 * (u * NT + t), 8 * u + 4 * p
                                    c0, c1, c2, c3 = acc_r[n], acc_r[n + 1], acc_r[n + 2], acc_r[n + 3]
                                    a0, a1, a2, a3 = a_r[a], a_r[a + 1], a_r[a + 2], a_r[a + 3]
                                    x0, x1 = (b2, b3) if p else (b0, b1)
                                    c0, c1, c2, c3 = mma_codes(a0, a1, a2, a3, x0, x1, c0, c1, c2, c3)
                                    acc_r[n], acc_r[n + 1], acc_r[n + 2], acc_r[n + 3] = c0, c1, c2, c3
                    else:
                        for u in range(U):
                            for p in range(2):
                                w0, w1 = w_r[2 * (j * U + u)], w_r[2 * (j * U + u) + 1]
                                a0, a2 = (
                                    (w0 >> (2 * CODE_BITS * p)) & MASK,
                                    (w0 >> (2 * CODE_BITS * p + CODE_BITS)) & MASK,
                                )
                                a1, a3 = (
                                    (w1 >> (2 * CODE_BITS * p)) & MASK,
                                    (w1 >> (2 * CODE_BITS * p + CODE_BITS)) & MASK,
                                )
                                for t in range(NT):
                                    n, b = 4 * (u * NT + t), 4 * (j % B_AHEAD * NT + t) + 2 * p
                                    c0, c1, c2, c3 = acc_r[n], acc_r[n + 1], acc_r[n + 2], acc_r[n + 3]
                                    c0, c1, c2, c3 = mma_codes(a0, a1, a2, a3, b_r[b], b_r[b + 1], c0, c1, c2, c3)
                                    acc_r[n], acc_r[n + 1], acc_r[n + 2], acc_r[n + 3] = c0, c1, c2, c3
                        if turn + j + B_AHEAD < turns:
                            at = min(q_column, int32(stride - 4))
                            for t in range(NT):
                                n = 4 * (j % B_AHEAD * NT + t)
                                b_r[n], b_r[n + 1], b_r[n + 2], b_r[n + 3] = load4(q, q_rd[t] + at)
                                if q_column >= stride:
                                    b_r[n] = b_r[n + 1] = b_r[n + 2] = b_r[n + 3] = int32(0)
                            q_column += WK * PANEL_INTS
                    if turn + j + HELD < turns:
                        for u in range(U):
                            for c in range(W_EACH // 2):
                                n = W_EACH * (j * U + u) + 2 * c
                                at = int32(min(int32(column + (c >> 1) * BLOCK_COLS), last) + (c & 1) * 8)
                                w_r[n], w_r[n + 1] = load(words, words_rd[u] + at)
                        column += WK * SPAN
                    if STAGED:
                        stage_rd = int32(stage_rd + STAGE if stage_rd < (STAGES - 1) * STAGE else 0)
                        stage_wr = int32(stage_wr + STAGE if stage_wr < (STAGES - 1) * STAGE else 0)
            turn += HELD

        # 4. Output. A fragment's 4 x 32 sums keep their order in shared memory; the warps of a row group share out its
        # fragments.
        row_sums = int32(row_warp * (WK * PASS))
        lane_row = int32((g >> 2) * 8 + (g & 3) * 2)
        for pass_ in range(PASSES):
            t0 = pass_ * N_PASS
            cuda.syncthreads()
            for n in range(N_PASS * U):
                at = int32(row_sums + k_warp * PASS + n * FRAGMENT + lane * 4)
                c = 4 * (n % U * NT + t0 + n // U)
                store4(shared, at, acc_r[c], acc_r[c + 1], acc_r[c + 2], acc_r[c + 3])
            fragment = int32(k_warp)
            if RESIDUAL:
                for k in range(4):  # beyond the last row or token: of that one, and not used
                    m = min(int32(first + (t0 + fragment // UNITS) * TOKENS + 2 * i + k % 2), int32(limit - 1))
                    r = min(int32((unit0 + fragment % UNITS) * BLOCK_ROWS + lane_row + k // 2), int32(rows - 1))
                    old_r[k] = out[m * rows + r]
            cuda.syncthreads()
            while fragment < N_PASS * UNITS:
                unit, t = int32(fragment % UNITS), int32(fragment // UNITS)
                row = int32((unit0 + unit) * BLOCK_ROWS + lane_row)
                token = int32((t0 + t) * TOKENS + 2 * i)
                at = int32(row_sums + (t * U + unit * HALVES) * FRAGMENT + lane * 4)
                fragment += WK
                old0, old1, old2, old3 = old_r[0], old_r[1], old_r[2], old_r[3]
                if RESIDUAL:  # the next fragment's
                    for k in range(4):
                        m = min(int32(first + (t0 + fragment // UNITS) * TOKENS + 2 * i + k % 2), int32(limit - 1))
                        r = min(int32((unit0 + fragment % UNITS) * BLOCK_ROWS + lane_row + k // 2), int32(rows - 1))
                        old_r[k] = out[m * rows + r]
                c0, c1, c2, c3 = load4(shared, at)
                for k in range(1, WK):
                    d0, d1, d2, d3 = load4(shared, at + k * PASS)
                    c0, c1, c2, c3 = int32(c0 + d0), int32(c1 + d1), int32(c2 + d2), int32(c3 + d3)
                e0 = e1 = e2 = e3 = int32(0)
                if GATED:
                    e0, e1, e2, e3 = load4(shared, at + FRAGMENT)
                    for k in range(1, WK):
                        d0, d1, d2, d3 = load4(shared, at + FRAGMENT + k * PASS)
                        e0, e1, e2, e3 = int32(e0 + d0), int32(e1 + d1), int32(e2 + d2), int32(e3 + d3)
                for k in range(4):
                    m, r = int32(token + k % 2), int32(row + k // 2)
                    if first + m < limit and r < rows:
                        c = c0 if k == 0 else (c1 if k == 1 else (c2 if k == 2 else c3))
                        e = e0 if k == 0 else (e1 if k == 1 else (e2 if k == 2 else e3))
                        old = old0 if k == 0 else (old1 if k == 1 else (old2 if k == 2 else old3))
                        scale = scale0 if r < bound1 else (scale1 if r < bound2 else scale2)
                        y = finish(c, e, total_s[m], scale, scale1, s_s[m], bias, r, rows, old)
                        out[int32(first + m) * rows + r] = y

    return matmul


def plan(M: int, N: int, K: int, arch: int, multiprocessors: int, gated: bool = False) -> Tile:
    """The launch rule, from measurements on 132 multiprocessors; N counts gate and up rows.

    Up to 128 tokens the time is that of getting the weights: activations go straight to registers, 8, 16 or 32 tokens
    a block; a matrix with few rows is split over eight warps along K, long rows over sixteen, one with many rows (more
    than four blocks a multiprocessor) over four. Beyond that blocks of 160 x 64 or 128 x 64 sums, activations through
    shared memory: whichever leaves the busiest multiprocessor less to do. Before sm_80: dp4a, 8 tokens a block.
    """
    halves = 2 if gated else 1
    if arch < LEAST_ARCH:
        return Tile(TOKENS, halves, 1, 8, 0, 0, scheme="dp4a")
    row_blocks = -(-N // BLOCK_ROWS)
    many = row_blocks > 4 * multiprocessors
    if M <= 8:
        if many:
            return Tile(8, 2, 2, 4, 5, 0, 2)
        return Tile(8, 2, 1, 16, 5, 0, 1) if K > 4096 else Tile(8, 4, 1, 8, 5, 0, 1)
    if M <= 128:
        tokens = 16 if M <= 16 else 32
        if many:
            return Tile(tokens, 4, 1, 4, 2, 0, 1)
        return Tile(tokens, 4, 1, 8, 2, 0, 1) if gated or K > 4096 else Tile(tokens, 1, 1, 8, 4, 0, 2)
    tiles = [Tile(64, 2, 4, 1, 2, 4, 3)] if many or gated else [Tile(64, 4, 2, 2, 2, 3, 2), Tile(64, 2, 5, 2, 2, 2, 1)]

    def busiest(tile: Tile) -> int:
        blocks = -(-M // tile.tokens) * -(-N // tile.rows)
        return -(-blocks // multiprocessors) * tile.tokens * tile.rows

    return min(tiles, key=busiest)


def form(arch: int, tile: Tile, epilogue: str = "store", activation: str = "relu2", bias: bool = False) -> KernelForm:
    """The compiled form of a tile; K, N and M are arguments of the launch."""
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    out = i32 if epilogue == "acc" else f32
    panels = i32 if tile.scheme == "wgmma" else types.none
    signature = (i32, i32, panels, f32, i32, i32, f32, f32 if bias else types.none, out, *(types.int32,) * 8)
    kind = f"gated {activation}" if epilogue == "gated" else epilogue
    if tile.scheme == "dp4a":
        kernel, dp4a = make_columns(arch, tile.k_warps, epilogue, activation), 16 * tile.tokens
    else:
        kernel, dp4a = make_matmul(arch, tile, epilogue, activation), 0
    return KernelForm(
        name=f"w2a8_matmul[{kind} {'bias ' if bias else ''}{' '.join(map(str, tile))}]",
        kernel=kernel,
        signature=signature,
        threads=tile.threads,
        blocks_per_sm=tile.per_sm,
        dp4a=dp4a,
    )


def launch_sizes(tile: Tile, M: int, N: int, K: int, ends: Sequence[int], gated: bool) -> tuple:
    """The grid and the int32 arguments of a product: (x, y), (M, rows, KP, turns, blocks, second, bound1, bound2)."""
    rows, halves = (N // 2, 2) if gated else (N, 1)
    blocks, padded_K = -(-rows // BLOCK_ROWS), -(-K // BLOCK_COLS) * BLOCK_COLS
    turns = -(
        -padded_K // ((STEP if tile.scheme == "dp4a" else PANEL * (2 if tile.scheme == "wgmma" else 1)) * tile.k_warps)
    )
    grid = (-(-M // tile.tokens), -(-blocks // (tile.blocks * tile.row_warps // halves)))
    return grid, (M, rows, padded_K, turns, blocks, blocks if gated else 0, *(*ends, N, N)[:2])


def tensor_map(q: DeviceArray, M: int, KP: int, tokens: int) -> DeviceArray:
    """What `copy_panel` wants to know of q, int8 [M, KP]: a CUtensorMap in device memory."""
    from cuda.bindings import driver

    def member(kind: str, name: str) -> object:
        return getattr(getattr(driver, f"CUtensorMap{kind}"), f"CU_TENSOR_MAP_{name}")

    def numbers(kind: str, *values: int) -> list:
        return [getattr(driver, kind)(value) for value in values]

    encoded = driver_call(
        "cuTensorMapEncodeTiled",
        member("DataType", "DATA_TYPE_UINT8"),
        2,
        q.address,
        numbers("cuuint64_t", KP, M),
        numbers("cuuint64_t", KP),
        numbers("cuuint32_t", PANEL, tokens),
        numbers("cuuint32_t", 1, 1),
        member("Interleave", "INTERLEAVE_NONE"),
        member("Swizzle", "SWIZZLE_64B"),
        member("L2promotion", "L2_PROMOTION_L2_256B"),
        member("FloatOOBfill", "FLOAT_OOB_FILL_NONE"),
    )
    return DeviceArray.of(np.array([int(word) for word in encoded.opaque], np.uint64))


def w2a8_matmul(
    device: Device,
    words: DeviceArray,
    q: DeviceArray,
    s: DeviceArray,
    total: DeviceArray,
    count: DeviceArray,
    scales: DeviceArray,
    out: DeviceArray,
    M: int,
    N: int,
    K: int,
    ends: Sequence[int] = (),
    bias: DeviceArray | None = None,
    epilogue: str = "store",
    activation: str = "relu2",
    overlap: bool = True,
) -> Launch:
    """The prepared launch of a product for up to M tokens.

    words int32 [packed_words(N, K)]; q int8 [M, KP], KP = K rounded up to 32, zeros at the end of each row; s float32
    [M], the scales of `quantize_activations`; total int32 [M], the sums of q's rows; count int32 [1], how many of the M
    tokens there are when it runs (no kernel still running may write it): rows of `out` for the others keep what they
    hold, or get anything. scales float32, one for each of up to three segments of rows that end at `ends` (by default
    one, N; "gated": two equal ones); bias float32 [N] or None; out float32 [M, N] ("gated" [M, N / 2]), or int32 for
    epilogue "acc". Epilogues as in `make_matmul`. Raises ValueError with the sizes if they do not fit together.
    """
    gated = epilogue == "gated"
    ends = tuple(ends) or ((N // 2, N) if gated else (N,))
    if M < 1:
        raise ValueError(f"w2a8_matmul: a product needs at least one token, not {M}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"w2a8_matmul: no epilogue {epilogue!r}, only {', '.join(EPILOGUES)}")
    if not 1 <= len(ends) <= MOST_SEGMENTS or ends[-1] != N or list(ends) != sorted(ends):
        raise ValueError(f"w2a8_matmul: segments that end at {ends} do not divide {N} rows into up to {MOST_SEGMENTS}")
    if gated and (N % (2 * BLOCK_ROWS) or ends != (N // 2, N)):
        raise ValueError(
            f"w2a8_matmul: {N} rows in segments to {ends} are no gate and up rows in blocks of {BLOCK_ROWS}"
        )
    padded_K = -(-K // BLOCK_COLS) * BLOCK_COLS
    if out.dtype != ("int32" if epilogue == "acc" else "float32"):
        raise ValueError(f"w2a8_matmul: out must be {'int32' if epilogue == 'acc' else 'float32'}, not {out.dtype}")
    sizes = {"words": (words, packed_words(N, K)), "q": (q, M * padded_K), "s": (s, M), "total": (total, M)}
    sizes |= {"count": (count, 1), "scales": (scales, len(ends)), "out": (out, M * (N // 2 if gated else N))}
    sizes |= {"bias": (bias, N)} if bias is not None else {}
    for name, (array, size) in sizes.items():
        if array.size < size:
            raise ValueError(
                f"w2a8_matmul: {name} holds {array.size} elements, a {N} x {K} product of {M} tokens takes {size}"
            )
    tile = plan(M, N, K, device.arch, device.multiprocessors, gated)
    grid, integers = launch_sizes(tile, M, N, K, ends, gated)
    panels = tensor_map(q, M, padded_K, tile.tokens) if tile.scheme == "wgmma" else None
    arguments = (words, q, panels, s, total, count, scales, bias, out, *integers)
    return Launch(form(device.arch, tile, epilogue, activation, bias is not None), grid, arguments, device, overlap)


def forms(arch: int) -> list[KernelForm]:
    """Forms of 2B4T's products on 132 multiprocessors for 8, 32, 128 and 512 tokens, and every other branch."""
    kinds = [(3840, 2560, "store"), (2560, 2560, "residual"), (13824, 2560, "gated"), (2560, 6912, "residual")]
    found = {
        (plan(M, N, K, arch, 132, epilogue == "gated"), epilogue): None
        for M in (512, 8, 32, 128)
        for N, K, epilogue in kinds
    }
    few, many = plan(8, 512, 512, arch, 132, True), plan(512, 512, 512, arch, 132, True)
    return [form(arch, tile, epilogue) for tile, epilogue in found] + [
        form(arch, few, "acc"),
        form(arch, few, "gated", "silu", True),
        form(arch, many, "store", bias=True),
    ]
