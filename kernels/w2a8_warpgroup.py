"""The W2A8 matrix product by warpgroups, for many tokens on sm_90: four warps multiply together, `wgmma`.

There `mma.sync`, which w2a8_tensor.py uses, runs at half the unit's rate. What it computes, the sums' exactness and the
output are as there; what differs:

    weights      the register operand: with g = lane / 4, i = lane % 4, a lane takes the words of rows r and r + 1,
                 r = 8 (g / 4) + 2 (g % 4), of every 16 columns, and of each word the four columns 4 i .. 4 i + 3:
                 (word >> 2 i) & mask. So columns come in their natural order; the four lanes of a row load the same
                 words, which is one access.
    activations  the shared operand: panels of 64 columns, int8 [tokens, 64], that the copy engine brings (`copy_panel`,
                 zeros beyond the last token and column), `stages` - 1 turns ahead; a stage's arrival counter says when
    turn         two panels (128 columns): four products of 32 columns a row-block

    block (x, y): tokens T x .. T x + T - 1;  row-blocks of the y-th tile, `blocks` a warp;  warps 4 w .. 4 w + 3 are
    warpgroup w, each warp with rows of its own

docs/performance-notes.md has what was measured: a turn takes far longer than its products, and why is not known yet.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda

from bitnet_numba.kernels.device import DeviceArray, driver_call
from bitnet_numba.kernels.intrinsics import (
    float32,
    grid_release,
    grid_wait,
    int32,
    int64,
    load4,
    pointer,
    store4,
    stream_pair,
)
from bitnet_numba.kernels.tensor_cores import (
    PANEL_ALIGN,
    PANEL_COLUMNS,
    arrival_expect,
    arrival_init,
    arrival_wait,
    copy_panel,
    warpgroup_mma,
)
from bitnet_numba.kernels.w2a8_epilogue import make_epilogue
from bitnet_numba.kernels.w2a8_tensor import FRAGMENT, SHARED_INTS, TOKENS, Tile
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, CODE_BITS, CODE_MASK

ARCH = 90  # wgmma is this architecture's alone
SPAN = 2 * PANEL_COLUMNS  # columns of a turn
PANEL_INTS = PANEL_COLUMNS // 4  # of a token
CODES = 16  # registers of a row-block and turn


def make_warpgroup(arch: int, tile: Tile, epilogue: str = "store", activation: str = "relu2") -> Callable[..., None]:
    """The kernel for a tile with k_warps 1 and row_warps a multiple of 4; epilogues as in `make_matmul`."""
    load, wait, release = stream_pair(arch), grid_wait(arch), grid_release(arch)
    GATED, RESIDUAL, ACC = epilogue == "gated", epilogue == "residual", epilogue == "acc"
    finish = make_epilogue(epilogue, activation)
    T, U, WR, _, HELD, STAGES = tile[:6]
    HALVES = 2 if GATED else 1
    UNITS = U // HALVES  # row-blocks of the output
    THREADS = tile.threads
    NT = T // TOKENS
    STAGE = T * SPAN // 4
    W_REGS, A_REGS, ACC_REGS = CODES * U * HELD, CODES * U, 4 * U * NT
    PIECES = CODES // 2
    # Sums go out in passes of as many n-tiles as fit the shared memory.
    N_PASS = next(n for n in range(NT, 0, -1) if NT % n == 0 and n * U * WR * FRAGMENT <= SHARED_INTS)
    PASSES = NT // N_PASS
    SHARED = max(STAGES * STAGE, N_PASS * U * WR * FRAGMENT)
    PASS = N_PASS * U * FRAGMENT  # sums of a warp in a pass
    SCALE_TURNS = -(-T // THREADS)
    MASK = np.int32(CODE_MASK)
    ZERO = float32(0)
    if GATED and U % 2 or T % TOKENS or SHARED > SHARED_INTS or WR % 4 or STAGES < 2 or tile.k_warps != 1:
        raise ValueError(f"no product of warpgroups is made of {tile}")
    multiply = warpgroup_mma(T, U)

    def warpgroup(
        words, panels, s, total, count, scales, bias, out, M, rows, KP, turns, blocks, second, bound1, bound2
    ):  # fmt: skip
        shared = pointer(cuda.shared.array(SHARED, int32, PANEL_ALIGN))  # activations, then sums
        arrival_s = pointer(cuda.shared.array(STAGES, int64))
        s_s = pointer(cuda.shared.array(T, float32))
        total_s = pointer(cuda.shared.array(T, int32))
        w_r = cuda.local.array(W_REGS, int32)
        a_r = cuda.local.array(A_REGS, int32)
        acc_r = cuda.local.array(ACC_REGS, int32)
        old_r = cuda.local.array(4, float32)
        words_rd = cuda.local.array(U, int32)

        tid = int32(cuda.threadIdx.x)
        warp, lane = tid >> 5, tid & 31
        g, i = lane >> 2, lane & 3
        first = int32(cuda.blockIdx.x) * T
        limit = min(int32(M), int32(count[0]))  # no kernel writes it: it may be read before the wait
        if first >= limit:
            if first == 0:
                wait()  # so that the launch does not end before those it follows
            return
        unit0 = int32((int32(cuda.blockIdx.y) * WR + warp) * UNITS)

        # 1. The first turns' weights. Beyond the last column they are any words: the activations are zero there.
        for u in range(U):
            unit = min(int32(unit0 + u // HALVES), int32(blocks - 1))
            words_rd[u] = int32(int32(unit + u % HALVES * second) * KP + (g >> 2) * 16 + (g & 3) * 2)
        last = int32(KP - BLOCK_COLS)
        column = int32(0)  # of the words that are asked for next; a row-block has a word a column
        for j in range(HELD):
            for u in range(U):
                for c in range(PIECES):
                    n = CODES * (j * U + u) + 2 * c
                    at = int32(min(int32(column + (c >> 1) * BLOCK_COLS), last) + (c & 1) * 8)
                    w_r[n], w_r[n + 1] = load(words, words_rd[u] + at)
            column += SPAN
        for n in range(ACC_REGS):
            acc_r[n] = int32(0)
        scale0 = scale1 = scale2 = ZERO
        if not ACC:
            scale0 = scales[0]
            scale1 = scales[1] if bound1 < rows or GATED else ZERO
            scale2 = scales[2] if bound2 < rows else ZERO
        if tid == 0:
            for n in range(STAGES):
                arrival_init(arrival_s, n)
        release()
        wait()

        # 2. The first turns' activations.
        cuda.syncthreads()
        if tid == 0:
            for t in range(STAGES - 1):
                if t < turns:
                    arrival_expect(arrival_s, t, 4 * STAGE)
                    for k in range(2):
                        to = t * STAGE + k * (T * PANEL_INTS)
                        copy_panel(panels, 0, shared, to, arrival_s, t, t * SPAN + k * PANEL_COLUMNS, first)
        for n in range(SCALE_TURNS):
            token = int32(tid + n * THREADS)
            if token < T and first + token < limit:
                s_s[token] = s[first + token]
                total_s[token] = total[first + token]

        # 3. Products.
        slot_rd, slot_wr, parity = int32(0), int32(STAGES - 1), int32(0)
        turn = int32(0)
        while turn < turns:
            for j in range(HELD):
                if turn + j < turns:
                    cuda.syncthreads()  # the last turn's activations have been multiplied
                    ahead = int32(turn + j + STAGES - 1)
                    if tid == 0 and ahead < turns:
                        arrival_expect(arrival_s, slot_wr, 4 * STAGE)
                        for k in range(2):
                            to = slot_wr * STAGE + k * (T * PANEL_INTS)
                            at = ahead * SPAN + k * PANEL_COLUMNS
                            copy_panel(panels, 0, shared, to, arrival_s, slot_wr, at, first)
                    for u in range(U):
                        for n in range(CODES):
                            a_r[CODES * u + n] = (w_r[CODES * (j * U + u) + n] >> (CODE_BITS * i)) & MASK
                    arrival_wait(arrival_s, slot_rd, parity)
                    multiply(acc_r, a_r, shared, slot_rd * STAGE)
                    slot_wr = slot_rd
                    slot_rd += 1
                    if slot_rd == STAGES:
                        slot_rd, parity = int32(0), int32(1 - parity)
                    if turn + j + HELD < turns:
                        for u in range(U):
                            for c in range(PIECES):
                                n = CODES * (j * U + u) + 2 * c
                                at = int32(min(int32(column + (c >> 1) * BLOCK_COLS), last) + (c & 1) * 8)
                                w_r[n], w_r[n + 1] = load(words, words_rd[u] + at)
                        column += SPAN
            turn += HELD

        # 4. Output, each warp its own. A fragment's 4 x 32 sums keep their order on the way through shared memory.
        row_sums = int32(warp * PASS)
        lane_row = int32((g >> 2) * 8 + (g & 3) * 2)
        for pass_ in range(PASSES):
            t0 = pass_ * N_PASS
            cuda.syncthreads()
            for n in range(N_PASS * U):
                at = int32(row_sums + n * FRAGMENT + lane * 4)
                c = 4 * (n % U * NT + t0 + n // U)
                store4(shared, at, acc_r[c], acc_r[c + 1], acc_r[c + 2], acc_r[c + 3])
            fragment = int32(0)
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
                fragment += 1
                old0, old1, old2, old3 = old_r[0], old_r[1], old_r[2], old_r[3]
                if RESIDUAL:  # the next fragment's
                    for k in range(4):
                        m = min(int32(first + (t0 + fragment // UNITS) * TOKENS + 2 * i + k % 2), int32(limit - 1))
                        r = min(int32((unit0 + fragment % UNITS) * BLOCK_ROWS + lane_row + k // 2), int32(rows - 1))
                        old_r[k] = out[m * rows + r]
                c0, c1, c2, c3 = load4(shared, at)
                e0 = e1 = e2 = e3 = int32(0)
                if GATED:
                    e0, e1, e2, e3 = load4(shared, at + FRAGMENT)
                for k in range(4):
                    m, r = int32(token + k % 2), int32(row + k // 2)
                    if first + m < limit and r < rows:
                        c = c0 if k == 0 else (c1 if k == 1 else (c2 if k == 2 else c3))
                        e = e0 if k == 0 else (e1 if k == 1 else (e2 if k == 2 else e3))
                        old = old0 if k == 0 else (old1 if k == 1 else (old2 if k == 2 else old3))
                        scale = scale0 if r < bound1 else (scale1 if r < bound2 else scale2)
                        y = finish(c, e, total_s[m], scale, scale1, s_s[m], bias, r, rows, old)
                        out[int32(first + m) * rows + r] = y

    return warpgroup


@cache
def tensor_map(q: int, M: int, KP: int, tokens: int) -> DeviceArray:
    """What `copy_panel` wants to know of the q at an address, int8 [M, KP]: a CUtensorMap in device memory, for panels
    of `tokens`. It is kept, 128 bytes, since captured launches go on using it."""
    from cuda.bindings import driver

    def member(kind: str, name: str) -> object:
        return getattr(getattr(driver, f"CUtensorMap{kind}"), f"CU_TENSOR_MAP_{name}")

    def numbers(kind: str, *values: int) -> list:
        return [getattr(driver, kind)(value) for value in values]

    encoded = driver_call(
        "cuTensorMapEncodeTiled",
        member("DataType", "DATA_TYPE_UINT8"),
        2,
        q,
        numbers("cuuint64_t", KP, M),
        numbers("cuuint64_t", KP),
        numbers("cuuint32_t", PANEL_COLUMNS, tokens),
        numbers("cuuint32_t", 1, 1),
        member("Interleave", "INTERLEAVE_NONE"),
        member("Swizzle", "SWIZZLE_64B"),
        member("L2promotion", "L2_PROMOTION_L2_256B"),
        member("FloatOOBfill", "FLOAT_OOB_FILL_NONE"),
    )
    return DeviceArray.of(np.array([int(word) for word in encoded.opaque], np.uint64))
