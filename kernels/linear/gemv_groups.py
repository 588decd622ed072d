"""The W2A8 matrix-vector product with group scales: one token. Read gemv.py first; what is said there is not repeated.

    y[n] = sum over groups g of acc[n, g] * (m[n, g] * d[g])  (+ bias[n])

acc[n, g]: the exact sum of q[k] * w[n, k] over the 128 columns of group g; m: the weights' float16 scales; d: the steps
of the vector, which is quantised group by group. The groups are added from the first on, so the result has the
reference's bits, however the rows and columns are shared out.

Blocks, rounds, rows and the loads before `pdl_wait` are those of gemv.py. New is that a warp may not add up groups in
registers. So a warp takes four groups at a time, a chunk, and each lane stays within one group until its sums are made:

    lane l, load p = 0 .. 3    group l / 8 of the chunk, block p of its four blocks of 32 columns, 16-byte piece l % 8:
                               four rows and half of the block's columns, 16
    after the chunk            two lanes, l and l ^ 2, have the same rows and trade two of them for the other half

Then acc * (m * d) goes to shared memory, [groups, 16] for a row-block, and a thread for each row adds them up.

The activations' pieces of 16 columns are stored so that a chunk's groups do not meet in a bank: piece c of group g lies
at place c ^ 2 (g % 4).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear import gemv
from bitnet_numba.kernels.linear.epilogue import GROUP_EPILOGUES, make_group_epilogue
from bitnet_numba.kernels.linear.gemv import (
    EPSILON,
    INT8_MAX,
    MAX_BLOCKS_PER_SM,
    REGISTERS,
    ROUNDER,
    STEP_COLS,
    STEP_WORDS,
    Plan,
    put4,
    zero4,
)
from bitnet_numba.kernels.linear.operands import GroupedLinear, check_segments
from bitnet_numba.kernels.operands import Norm, checked
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import (
    BLOCK_COLS,
    BLOCK_ROWS,
    CODE_BITS,
    CODE_MASK,
    CODE_OFFSET,
    GROUP_COLS,
    ZERO_WORD,
    padded_shape,
)

assert STEP_COLS == GROUP_COLS == 4 * BLOCK_COLS
QUAD = 4  # groups of a chunk, and blocks of a group
GROUP_WORDS = GROUP_COLS // 4  # int32 words of a group's activations
MAX_LOADS = 16  # of a lane in a round
MAX_COLUMNS = 14336  # beyond, a block's part of the vector and of the weights do not fit its registers
EXTRA_REGISTERS = 52  # of a thread, beside weights, scales, and the vector and norm that it holds


def make_gemv_groups(
    arch: int,
    K: int,
    units: int,
    parts: int,
    norm: bool = True,
    epilogue: str = "store",
    activation: str = "relu2",
    rounds: int = 1,
) -> Callable[..., None]:
    """The kernel for K columns; units, parts and rounds as of `make_gemv`."""
    load, wait, trigger = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    warp_max, redux = ptx.warp_max_int(arch), ptx.redux_sum_int(arch)
    finish = make_group_epilogue(epilogue, activation)
    GATED, RESIDUAL, NORM = epilogue == "gated", epilogue == "residual", norm
    UNITS, P, ROUNDS = units, parts, rounds
    HALVES = 2 if GATED else 1
    WARPS = UNITS * HALVES * P
    THREADS = WARPS * WARP
    KP = padded_shape(1, K)[1]
    GROUPS = -(-KP // GROUP_COLS)
    CHUNKS = -(-GROUPS // (QUAD * P))  # of a warp in a round
    LOADS = QUAD * CHUNKS
    W_REGS = 4 * LOADS
    PADDED_GROUPS = -(-GROUPS // QUAD) * QUAD
    Q_WORDS = PADDED_GROUPS * GROUP_WORDS
    PART_FLOATS = UNITS * HALVES * GROUPS * BLOCK_ROWS
    GROUP_SCALES = BLOCK_ROWS // 2  # int32 words of a row-block's scales of a group
    PIECES = KP // 4  # 16-byte pieces of x: 32 are a group, and a warp's
    X_LOADS = -(-PADDED_GROUPS // WARPS)  # groups of a warp's part of x
    X_REGS = 4 * X_LOADS
    OUT_THREADS = UNITS * BLOCK_ROWS
    PER_COLUMN = float32(1 / K)
    ZERO, ONES = float32(0), int32(0x01010101)
    MASK0, MASK1, MASK2, MASK3 = (np.int32(np.uint32(CODE_MASK << CODE_BITS * i).astype(np.int32)) for i in range(4))
    SHIFT1, SHIFT2, SHIFT3 = CODE_BITS, 2 * CODE_BITS, 3 * CODE_BITS
    NOTHING = int32(np.uint32(ZERO_WORD).astype(np.int32))
    assert X_LOADS <= WARP

    @device_function
    def load_x(x_r, n_r, x, tid):
        """This thread's elements of x; zeros, in the norm too, where there are none."""
        for j in range(X_LOADS):
            chunk = int32(tid + j * THREADS)
            if chunk < PIECES:
                put4(x_r, 4 * j, ptx.load4(x, chunk * 4))
            else:
                zero4(x_r, 4 * j)
                zero4(n_r, 4 * j)

    @device_function
    def load_norm(n_r, norm, tid):
        """This thread's weights of the norm."""
        for j in range(X_LOADS):
            chunk = int32(tid + j * THREADS)
            if chunk < PIECES:
                put4(n_r, 4 * j, ptx.load4(norm, chunk * 4))

    @device_function
    def dot16(w, x0, x1, x2, x3, a0, a1, a2, a3):
        """Adds the products of a word's 16 codes: of codes << 2 i to a_i."""
        a0, a1 = ptx.dp4a_us(w & MASK0, x0, a0), ptx.dp4a_us(w & MASK1, x1, a1)
        a2, a3 = ptx.dp4a_us(w & MASK2, x2, a2), ptx.dp4a_us(w & MASK3, x3, a3)
        return a0, a1, a2, a3

    def gemv_groups(words, x, norm, eps, scales, bias, out, rows, unit_count, up_offset):
        q_s = ptx.pointer(cuda.shared.array(Q_WORDS, int32, SHARED_ALIGN))
        part_s = ptx.pointer(cuda.shared.array(PART_FLOATS, float32, SHARED_ALIGN))  # [UNITS, HALVES, GROUPS, 16]
        step_s = ptx.pointer(cuda.shared.array(PADDED_GROUPS, float32))
        offset_s = ptx.pointer(cuda.shared.array(PADDED_GROUPS, int32))  # what the codes' offset adds to a group's sums
        square_s = ptx.pointer(cuda.shared.array(WARPS, float32))
        w_r = cuda.local.array(W_REGS, int32)
        m_r = cuda.local.array(CHUNKS, int32)
        x_r = cuda.local.array(X_REGS, float32)
        n_r = cuda.local.array(X_REGS, float32)

        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        part = int32(warp % P)
        half = int32(warp // P % HALVES)
        slot = int32(warp // (P * HALVES))
        first = int32(cuda.blockIdx.x)
        grid = int32(cuda.gridDim.x)
        own = int32(lane >> 3)  # group of a chunk
        row = int32((lane >> 2 & 1) * 8 + (lane & 1) * 4 + (lane & 2))  # and row + 1: whose sums this lane ends up with

        # 1. This block's weights and scales, and the norm's.
        unit = int32(first + slot * grid)
        for u in range(LOADS):
            column = int32(((part + u // QUAD * P) * QUAD + own) * STEP_WORDS + u % QUAD * BLOCK_COLS + (lane & 7) * 4)
            if unit < unit_count and column < KP:
                put4(w_r, 4 * u, load(words, int32(unit + half * up_offset) * KP + column))
            else:
                put4(w_r, 4 * u, (NOTHING, NOTHING, NOTHING, NOTHING))
        scales_rd = int32(min(unit, int32(unit_count - 1)) + half * up_offset) * (GROUPS * GROUP_SCALES) + (row >> 1)
        for t in range(CHUNKS):
            group = min(int32((part + t * P) * QUAD + own), int32(GROUPS - 1))
            m_r[t] = scales[scales_rd + group * GROUP_SCALES]
        if NORM:
            load_norm(n_r, norm, tid)
        trigger()
        wait()

        # 2. The activations as int8 in shared memory, and each group's step.
        load_x(x_r, n_r, x, tid)
        squares = absmax = ZERO
        for j in range(X_LOADS):
            most = ZERO
            for k in range(4):
                e = 4 * j + k
                if NORM:
                    squares = float32(squares + x_r[e] * x_r[e])
                    most = max(most, abs(float32(n_r[e] * x_r[e])))
                else:
                    magnitude = int32(ptx.float_to_bits(x_r[e]) & 0x7FFFFFFF)
                    most = ptx.bits_to_float(uint32(max(int32(ptx.float_to_bits(most)), magnitude)))
            # As bits, which order floats that are not negative as the numbers do, and put NaN above all.
            most = ptx.bits_to_float(uint32(warp_max(int32(ptx.float_to_bits(most)))))
            absmax = most if lane == j else absmax  # lane j keeps that of the warp's group j
        if NORM:
            squares = ptx.warp_sum(squares)
            if lane == 0:
                square_s[warp] = squares
            cuda.syncthreads()
            squares = ZERO
            for j in range(WARPS):
                squares = float32(squares + square_s[j])
            inverse = ptx.rsqrt_approx(float32(squares * PER_COLUMN + eps))
            absmax = float32(absmax * inverse)
            for j in range(X_REGS):
                x_r[j] = ptx.mul_rn(n_r[j], ptx.mul_rn(x_r[j], inverse))
        # Scale and step of each lane's group: a reciprocal is a branch and a chain of instructions.
        # A NaN in x makes the sum of squares NaN, which stays: then so is all of y.
        own_s = ptx.mul_rn(ptx.rcp_rn(EPSILON if absmax < EPSILON else absmax), INT8_MAX)
        own_step, group = ptx.rcp_rn(own_s), int32(warp + lane * WARPS)
        if lane < X_LOADS and group < GROUPS:
            step_s[group] = own_step
        for j in range(X_LOADS):
            s = ptx.shuffle(own_s, j)
            q0 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[4 * j], s), ROUNDER))
            q1 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[4 * j + 1], s), ROUNDER))
            q2 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[4 * j + 2], s), ROUNDER))
            q3 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[4 * j + 3], s), ROUNDER))
            word = int32(ptx.byte_permute(ptx.byte_permute(q0, q1, 0x40), ptx.byte_permute(q2, q3, 0x40), 0x5410))
            group = int32(warp + j * WARPS)
            sum_ = redux(ptx.dp4a(word, ONES, int32(0)))
            if group < PADDED_GROUPS:
                q_s[group * GROUP_WORDS + ((lane >> 2 ^ 2 * (group & 3)) << 2) + (lane & 3)] = word
                if lane == 0:
                    offset_s[group] = int32(-CODE_OFFSET * sum_)
        cuda.syncthreads()

        # 3. Products, sums, output, round by round.
        for round_ in range(ROUNDS):
            base_unit = int32(first + round_ * UNITS * grid)
            unit = int32(base_unit + slot * grid)
            next_unit = int32(unit + UNITS * grid)
            part_wr = int32((slot * HALVES + half) * (GROUPS * BLOCK_ROWS) + row)
            scales_rd = int32(min(next_unit, int32(unit_count - 1)) + half * up_offset) * (GROUPS * GROUP_SCALES)
            scales_rd = int32(scales_rd + (row >> 1))
            for t in range(CHUNKS):
                group = int32((part + t * P) * QUAD + own)
                x_rd = min(group, int32(PADDED_GROUPS - 1)) * GROUP_WORDS
                a00 = a01 = a02 = a03 = int32(0)  # a[row][i]: products of codes << 2 * i
                a10 = a11 = a12 = a13 = int32(0)
                a20 = a21 = a22 = a23 = int32(0)
                a30 = a31 = a32 = a33 = int32(0)
                for p in range(QUAD):
                    u = QUAD * t + p
                    x0, x1, x2, x3 = ptx.load4(q_s, x_rd + ((2 * p + (lane >> 1 & 1) ^ 2 * own) << 2))
                    a00, a01, a02, a03 = dot16(w_r[4 * u], x0, x1, x2, x3, a00, a01, a02, a03)
                    a10, a11, a12, a13 = dot16(w_r[4 * u + 1], x0, x1, x2, x3, a10, a11, a12, a13)
                    a20, a21, a22, a23 = dot16(w_r[4 * u + 2], x0, x1, x2, x3, a20, a21, a22, a23)
                    a30, a31, a32, a33 = dot16(w_r[4 * u + 3], x0, x1, x2, x3, a30, a31, a32, a33)
                    if ROUNDS > 1:
                        column = int32(group * STEP_WORDS + p * BLOCK_COLS + (lane & 7) * 4)
                        if next_unit < unit_count and column < KP and round_ + 1 < ROUNDS:
                            put4(w_r, 4 * u, load(words, int32(next_unit + half * up_offset) * KP + column))
                # Sums of 4^i multiples are 4^i multiples: the shifts are exact.
                r0 = int32(a00 + (a01 >> SHIFT1) + (a02 >> SHIFT2) + (a03 >> SHIFT3))
                r1 = int32(a10 + (a11 >> SHIFT1) + (a12 >> SHIFT2) + (a13 >> SHIFT3))
                r2 = int32(a20 + (a21 >> SHIFT1) + (a22 >> SHIFT2) + (a23 >> SHIFT3))
                r3 = int32(a30 + (a31 >> SHIFT1) + (a32 >> SHIFT2) + (a33 >> SHIFT3))
                upper = (lane & 2) != 0
                keep0, keep1, send0, send1 = (r2, r3, r0, r1) if upper else (r0, r1, r2, r3)
                keep0, keep1 = int32(keep0 + ptx.shuffle_xor(send0, 2)), int32(keep1 + ptx.shuffle_xor(send1, 2))
                if group < GROUPS:
                    offset, step, pair = offset_s[group], step_s[group], m_r[t]
                    acc0, acc1 = ptx.int_to_float(int32(keep0 + offset)), ptx.int_to_float(int32(keep1 + offset))
                    to = int32(part_wr + group * BLOCK_ROWS)
                    y0 = ptx.mul_rn(acc0, ptx.mul_rn(ptx.f16_low(pair), step))
                    ptx.store2(part_s, to, y0, ptx.mul_rn(acc1, ptx.mul_rn(ptx.f16_high(pair), step)))
                if ROUNDS > 1:
                    m_r[t] = scales[scales_rd + min(group, int32(GROUPS - 1)) * GROUP_SCALES]

            out_unit = int32(base_unit + tid // BLOCK_ROWS * grid)
            n = int32(out_unit * BLOCK_ROWS + tid % BLOCK_ROWS)
            writes = tid < OUT_THREADS and out_unit < unit_count and n < rows
            old = ZERO
            if RESIDUAL and writes:
                old = out[n]
            cuda.syncthreads()
            if writes:
                y = z = ZERO
                start = int32(tid // BLOCK_ROWS * (HALVES * GROUPS * BLOCK_ROWS) + tid % BLOCK_ROWS)
                for group in range(GROUPS):
                    y = ptx.add_rn(y, part_s[start + group * BLOCK_ROWS])
                    if GATED:
                        z = ptx.add_rn(z, part_s[start + (GROUPS + group) * BLOCK_ROWS])
                out[n] = finish(y, z, bias, n, rows, old)
            if ROUNDS > 1:
                cuda.syncthreads()  # the next round writes the products again

    return gemv_groups


def plan(rows: int, K: int, num_sms: int, gated: bool = False) -> Plan:
    """The launch rule, as of `gemv.plan`. Raises ValueError for more than MAX_COLUMNS columns."""
    if K > MAX_COLUMNS:
        raise ValueError(f"gemv_groups: {K} columns are more than {MAX_COLUMNS}")
    return gemv.plan(rows, K, num_sms, gated, MAX_LOADS)


@cache
def gemv_groups_spec(
    arch: int,
    K: int,
    split: Plan,
    norm: bool = True,
    epilogue: str = "store",
    activation: str = "relu2",
    bias: bool = False,
) -> KernelSpec:
    """The compiled variant for a plan."""
    gated = epilogue == "gated"
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    signature = (
        i32,  # words
        f32,  # x
        f32 if norm else types.none,  # norm
        types.float32,  # eps
        i32,  # scales
        f32 if bias else types.none,  # bias
        f32,  # out
        *(types.int32,) * 3,  # rows, unit_count, up_offset
    )
    kind = f"gated {activation}" if gated else epilogue
    loads = QUAD * -(-K // (QUAD * GROUP_COLS * split.parts))
    threads = split.units * (2 if gated else 1) * split.parts * WARP
    vector = 4 * -(-K // (4 * threads)) * (2 if norm else 1)
    registers = 4 * loads + loads // QUAD + vector + EXTRA_REGISTERS
    kind = f"{'norm ' if norm else ''}{kind} {'bias ' if bias else ''}".strip()
    return KernelSpec(
        name=f"gemv_groups[{K} {kind} {' '.join(map(str, split[:3]))}]",
        kernel=make_gemv_groups(arch, K, split.units, split.parts, norm, epilogue, activation, split.rounds),
        signature=signature,
        threads=threads,
        blocks_per_sm=max(1, min(MAX_BLOCKS_PER_SM, REGISTERS // (threads * registers))),
        dp4a=16 * loads,
        wide_loads=loads,
    )


def gemv_groups(
    device: Device,
    linear: GroupedLinear,
    x: Any,
    out: Any,
    *,
    norm: Norm | None = None,
    epilogue: str = "store",
    activation: str = "relu2",
    use_pdl: bool = True,
) -> Launch:
    """The launch of one token's product.

    x: float32 [K rounded up to 32], zeros at the end, which is normed if there is a norm, and quantised by groups. NaN
    in x makes all of y NaN, infinity makes it infinite or NaN (but where the norm's weight is 0). Epilogues as of
    `gemv`, without "acc". Arrays must be aligned to 16 bytes. Raises ValueError for operands that do not fit.
    """
    gated = epilogue == "gated"
    if epilogue not in GROUP_EPILOGUES:
        raise ValueError(f"gemv_groups: no epilogue {epilogue!r}, only {', '.join(GROUP_EPILOGUES)}")
    check_segments("gemv_groups", linear.segments, gated)
    N, K = linear.N, linear.K
    rows, padded_K = N // 2 if gated else N, padded_shape(1, K)[1]
    words, scales, bias, out, x, weight = checked(
        "gemv_groups",
        f"a {N} x {K} product",
        **linear.sizes(),
        out=(out, rows, "float32"),
        x=(x, padded_K, "float32"),
        norm=(norm.weight if norm is not None else None, padded_K, "float32"),
    )
    split = plan(N, K, device.num_sms, gated)
    spec = gemv_groups_spec(device.arch, K, split, norm is not None, epilogue, activation, bias is not None)
    unit_count = -(-rows // BLOCK_ROWS)
    arguments = (
        words, x, weight, norm.eps if norm is not None else 0.0, scales, bias, out,
        rows, unit_count, unit_count if gated else 0,
    )  # fmt: skip
    return device.launch(spec, split.grid, arguments, use_pdl)
