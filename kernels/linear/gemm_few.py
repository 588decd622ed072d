"""The W2A8 product of 1 to 8 tokens on tensor cores: a block for every SM, its weights in registers before it waits.

    y[m, n] = (sum_k q[m, k] * w[n, k]) * scale[segment of n] / s[m]  (+ bias[n])

Between gemv.py, whose `dp4a` take as long again for every token, and the GEMMs, whose tiles of 64 rows leave most SMs
without a block: as of the GEMV, every weight is read once, into the registers of the warp that multiplies it, while the
kernels before this one still run. Results have the same bits as by any other GEMM, whatever the number of tokens. It is
used for two to four (heuristics.py): one token takes the GEMV, and a step of eight is shorter with `gemm_wgmma`.

Work split (U units, P warps):

    block b    units b, b + grid, ...: U row-blocks, or pairs of them for "gated" (gate and up rows), all tokens
    warp w     all units of the block, panels w, w + P, ... of 64 columns:
        columns      0    64   128   192
        warp 0       |====|    |====|    ...      (P = 2)
        warp 1       |    |====|    |====...
    So only one warp needs a column of the activations, which go straight to its registers, and there is no barrier
    before the warps' sums meet in shared memory.

How a panel lies in a warp's registers is drawn in gemm_mma.py: 8 bytes of words a lane and row-block, 16 bytes of q of
token g = lane / 4. Where there are fewer than eight tokens, the others' columns of the product repeat the last one.

No two blocks of a launch share an SM where they could: see "Where blocks go" in docs/performance-notes.md, which also
has what was tried: norm and quantisation in here are no faster than in a launch of their own.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.epilogue import make_epilogue
from bitnet_numba.kernels.linear.gemm_mma import FRAGMENT, PANEL, PANEL_INTS
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, CODE_BITS, CODE_MASK, padded_shape

MIN_ARCH = 75  # mma of 8-bit integers
MAX_TOKENS = 8  # of one mma
WARPS = 8  # of a block: a multiple of 4, so that all results of a thread are of one token and place in a row-block
MAX_REGISTERS = 112  # of a thread for weights and sums: the rest is for what comes and goes
EXTRA_REGISTERS = 28  # of a thread, about, beside weights, sums and activations
REGISTERS = 65536  # of an SM
MAX_BLOCKS_PER_SM = 4  # of launches that overlap
MAX_AHEAD = 8  # panels of activations that a warp loads at once


class Plan(NamedTuple):
    """How a product is split: what `make_gemm_few` is specialised to, and the grid."""

    units: int  # row-blocks (pairs for "gated") of a block
    warps: int  # of a block
    grid: int  # blocks


def plan(rows: int, K: int, num_sms: int, gated: bool = False) -> Plan | None:
    """One block an SM; None if its weights do not fit the registers."""
    halves = 2 if gated else 1
    unit_count = -(-rows // (BLOCK_ROWS * halves))
    units = -(-unit_count // num_sms)
    panels = -(-K // (PANEL * WARPS))
    if units * halves * (2 * panels + 4) > MAX_REGISTERS:
        return None
    return Plan(units, WARPS, min(unit_count, num_sms))


def make_gemm_few(
    arch: int, K: int, split: Plan, epilogue: str = "store", activation: str = "relu2"
) -> Callable[..., None]:
    """The kernel for K columns and up to MAX_TOKENS tokens; epilogues as of `make_epilogue`. Raises ValueError unless
    the number of warps is a multiple of 4."""
    load, wait, trigger = ptx.stream_load2(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    multiply = ptx.mma_s8(arch)
    GATED, RESIDUAL, ACC = epilogue == "gated", epilogue == "residual", epilogue == "acc"
    finish = make_epilogue(epilogue, activation)
    UNITS, P = split.units, split.warps
    HALVES = 2 if GATED else 1
    R = UNITS * HALVES  # row-blocks of a block
    KP = padded_shape(1, K)[1]
    EACH = -(-KP // (PANEL * P))  # panels of a warp
    EXACT = KP == EACH * P * PANEL  # no panel lies beyond the row, not even in part
    AHEAD = min(EACH, MAX_AHEAD)
    W_REGS, ACC_REGS, B_REGS = 2 * EACH * R, 4 * R, 4 * AHEAD
    STRIDE = KP // 4  # of a token's q, in int32 words
    WARP_SUMS = R * FRAGMENT  # sums of a warp
    SUMS = P * WARP_SUMS
    THREADS = P * WARP
    OUT_ROUNDS = -(-UNITS * FRAGMENT // THREADS)
    MASK, ZERO = np.int32(CODE_MASK), float32(0)
    if THREADS % FRAGMENT:
        raise ValueError(f"no product of few tokens is made of {split}")

    @device_function
    def load_words(w_r, words, warp, lane_rd, lane_column, first, grid, unit_count, up_offset):
        """All weights of this warp; zeros where there are none."""
        for r in range(R):
            unit = int32(first + r // HALVES * grid)
            row_rd = int32(int32(unit + r % HALVES * up_offset) * KP + lane_rd)
            for j in range(EACH):
                n = 2 * (j * R + r)
                column = int32((warp + j * P) * PANEL + lane_column)
                w_r[n] = w_r[n + 1] = int32(0)
                if unit < unit_count and (EXACT or column < KP):
                    w_r[n], w_r[n + 1] = load(words, row_rd + column)

    @device_function
    def load_q(b_r, q, q_rd, panel, lane_column, slot):
        """A panel's q of token g into its registers, the slot-th of AHEAD; zeros beyond the last column."""
        n = 4 * slot
        b_r[n] = b_r[n + 1] = b_r[n + 2] = b_r[n + 3] = int32(0)
        if EXACT or panel * PANEL + lane_column < KP:
            b_r[n], b_r[n + 1], b_r[n + 2], b_r[n + 3] = ptx.load4(q, q_rd + panel * PANEL_INTS)

    @device_function
    def multiply_panel(acc_r, w_r, b_r, j):
        """Adds the products of a warp's j-th panel with all its row-blocks."""
        b = 4 * (j % AHEAD)
        b0, b1, b2, b3 = b_r[b], b_r[b + 1], b_r[b + 2], b_r[b + 3]
        for r in range(R):
            c0, c1, c2, c3 = acc_r[4 * r], acc_r[4 * r + 1], acc_r[4 * r + 2], acc_r[4 * r + 3]
            w0, w1 = w_r[2 * (j * R + r)], w_r[2 * (j * R + r) + 1]
            for p in range(2):
                low, high = 2 * CODE_BITS * p, 2 * CODE_BITS * p + CODE_BITS
                a0, a2 = (w0 >> low) & MASK, (w0 >> high) & MASK
                a1, a3 = (w1 >> low) & MASK, (w1 >> high) & MASK
                x0, x1 = (b2, b3) if p else (b0, b1)
                c0, c1, c2, c3 = multiply(a0, a1, a2, a3, x0, x1, c0, c1, c2, c3)
            acc_r[4 * r], acc_r[4 * r + 1], acc_r[4 * r + 2], acc_r[4 * r + 3] = c0, c1, c2, c3

    def gemm_few(
        words, q, s, q_sum, count, scales, bias, out, M, rows, unit_count, up_offset, bound1, bound2
    ):  # fmt: skip
        sum_s = ptx.pointer(cuda.shared.array(SUMS, int32, SHARED_ALIGN))
        w_r = cuda.local.array(W_REGS, int32)
        b_r = cuda.local.array(B_REGS, int32)
        acc_r = cuda.local.array(ACC_REGS, int32)
        old_r = cuda.local.array(OUT_ROUNDS, float32)

        tid = int32(cuda.threadIdx.x)
        warp, lane = tid >> 5, tid & 31
        g, i = lane >> 2, lane & 3
        first, grid = int32(cuda.blockIdx.x), int32(cuda.gridDim.x)
        limit = min(int32(M), int32(count[0]))  # no kernel writes it: it may be read before the wait

        # 1. This block's weights; what results need of their rows.
        lane_rd = int32((g >> 2) * 16 + (i & 1) * 8 + (g & 3) * 2)
        lane_column = int32((i >> 1) * BLOCK_COLS)
        load_words(w_r, words, warp, lane_rd, lane_column, first, grid, unit_count, up_offset)
        for n in range(ACC_REGS):
            acc_r[n] = int32(0)
        m0 = m1 = m2 = ZERO
        if not ACC:
            m0 = scales[0]
            m1 = scales[1] if bound1 < rows or GATED else ZERO
            m2 = scales[2] if bound2 < rows else ZERO
        # A thread's results: one element of a fragment, of every (THREADS / FRAGMENT)-th unit.
        element = int32(tid % FRAGMENT)
        e_lane, e_k = element >> 2, element & 3
        e_row = int32((e_lane >> 4) * 8 + (e_lane >> 2 & 3) * 2 + (e_k >> 1))
        token = int32((e_lane & 3) * 2 + (e_k & 1))
        trigger()
        wait()
        if limit <= 0:
            return

        # 2. Activations, as many panels as fit the registers; the token's scale and sum; old values of a residual.
        q_rd = int32(min(g, int32(limit - 1)) * STRIDE + i * 4)
        for j in range(AHEAD):
            load_q(b_r, q, q_rd, int32(warp + j * P), lane_column, j)
        token_s, token_q_sum = ZERO, int32(0)
        if token < limit:
            token_s, token_q_sum = s[token], q_sum[token]
        for n in range(OUT_ROUNDS):
            old_r[n] = ZERO
            if RESIDUAL:
                unit = int32(first + (tid + n * THREADS) // FRAGMENT * grid)
                row = int32(unit * BLOCK_ROWS + e_row)
                if unit < unit_count and row < rows and token < limit:
                    old_r[n] = out[token * rows + row]

        # 3. Products.
        for j in range(EACH):
            multiply_panel(acc_r, w_r, b_r, j)
            if j + AHEAD < EACH:
                load_q(b_r, q, q_rd, int32(warp + (j + AHEAD) * P), lane_column, j % AHEAD)

        # 4. The warps' sums meet, and leave.
        for r in range(R):
            at = warp * WARP_SUMS + r * FRAGMENT + lane * 4
            ptx.store4(sum_s, at, acc_r[4 * r], acc_r[4 * r + 1], acc_r[4 * r + 2], acc_r[4 * r + 3])
        cuda.syncthreads()
        for n in range(OUT_ROUNDS):
            slot = int32((tid + n * THREADS) // FRAGMENT)
            unit = int32(first + slot * grid)
            row = int32(unit * BLOCK_ROWS + e_row)
            if slot < UNITS and unit < unit_count and row < rows and token < limit:
                c = e = int32(0)
                at = int32(slot * (HALVES * FRAGMENT) + element)
                for k in range(P):
                    c = int32(c + sum_s[at + k * WARP_SUMS])
                    if GATED:
                        e = int32(e + sum_s[at + (k * WARP_SUMS + FRAGMENT)])
                m_row = m0 if row < bound1 else (m1 if row < bound2 else m2)
                y = finish(c, e, token_q_sum, m_row, m1, token_s, bias, row, rows, old_r[n])
                out[token * rows + row] = y

    return gemm_few


@cache
def gemm_few_spec(
    arch: int, K: int, split: Plan, epilogue: str = "store", activation: str = "relu2", bias: bool = False
) -> KernelSpec:
    """The compiled variant for a plan."""
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    out, gated = i32 if epilogue == "acc" else f32, epilogue == "gated"
    # words, q, s, q_sum, count, scales, bias, out; M, rows, unit_count, up_offset, bound1, bound2
    signature = (i32, i32, f32, i32, i32, f32, f32 if bias else types.none, out, *(types.int32,) * 6)
    kind = f"gated {activation}" if gated else epilogue
    panels = -(-K // (PANEL * split.warps))
    row_blocks = split.units * (2 if gated else 1)
    registers = row_blocks * (2 * panels + 4) + 4 * min(panels, MAX_AHEAD) + EXTRA_REGISTERS
    threads = split.warps * WARP
    blocks = max(1, min(MAX_BLOCKS_PER_SM, REGISTERS // (threads * registers)))
    return KernelSpec(
        name=f"gemm_few[{K} {kind} {'bias ' if bias else ''}{split.units} {split.warps}]",
        kernel=make_gemm_few(arch, K, split, epilogue, activation),
        signature=signature,
        threads=threads,
        blocks_per_sm=blocks,
        one_per_sm=blocks > 1,
    )


def launch_sizes(split: Plan, M: int, N: int, K: int, ends: Sequence[int], gated: bool) -> tuple:
    """The grid and the int32 arguments, as of `gemm.launch_sizes`: (M, rows, unit_count, up_offset, bound1, bound2)."""
    rows = N // 2 if gated else N
    unit_count = -(-rows // BLOCK_ROWS)
    return split.grid, (M, rows, unit_count, unit_count if gated else 0, *(*ends, N, N)[:2])
