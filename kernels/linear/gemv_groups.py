"""The W2A8 matrix-vector product with group scales: one token. Read gemv.py first; what is said there is not repeated.

    y[n] = sum over groups g of acc[n, g] * (m[n, g] * d[g])  (+ bias[n])

acc[n, g]: the exact sum of q[k] * w[n, k] over the 128 columns of group g; m: the weights' float16 scales; d: the steps
of the vector, which is quantised group by group. The groups are added from the first on, so the result has the
reference's bits, however the rows and columns are shared out. The codes are made signed weights, times 64 (see
`signed`), so that no sum of q is needed; d takes the 64 off, exactly.

Blocks, rounds, rows and the loads before `pdl_wait` are those of gemv.py; a step of 128 columns is a group. New is that
a warp may not add up groups in registers. So it makes the sums of four groups at a time, on tensor cores, whose product
needs no shuffles over the lanes that share rows: with g = lane / 4, i = lane % 4 and a lane's 16 bytes of weights,
rows 4 (g & 1) + 8 (g >> 1 & 1) .. + 3 of the sixteen columns c = 4 (g >> 2) + i,

    left operand    rows g, g + 8: the lane's rows 0, 1 in one product, rows 2, 3 in another; columns: its own
    right operand   column n = 0 .. 7: the activations of group n & 3 at the columns of the lanes with g >> 2 = n >> 2,
                    zeros while another group is multiplied
    sums            [row g, column n] is right where g >> 2 = n >> 2, and half of the columns of group n & 3: the lanes
                    whose sums are right trade two rows for the other half of the other two

Then acc * (m * d) goes to shared memory, [groups, 16] for a row-block, and a thread for each row adds them up. Before
sm_75 the sums are made by `dp4a` as in gemv.py, a group at a time.
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
from bitnet_numba.kernels.linear.heuristics import MIN_ARCH
from bitnet_numba.kernels.linear.operands import GroupedLinear, check_segments
from bitnet_numba.kernels.linear.signed import WEIGHT, signed
from bitnet_numba.kernels.operands import Norm, checked
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, int32, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import BLOCK_ROWS, GROUP_COLS, ZERO_WORD, padded_shape

assert STEP_COLS == GROUP_COLS  # a lane's 16 bytes are of one group
QUAD = 4  # groups that are multiplied into one set of sums
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
    tensor_cores: bool = True,
) -> Callable[..., None]:
    """The kernel for K columns; units, parts and rounds as of `make_gemv`."""
    load, wait, trigger = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    warp_max = ptx.warp_max_int(arch)
    multiply, finish = ptx.mma_s8(arch, signed=True), make_group_epilogue(epilogue, activation)
    GATED, RESIDUAL, NORM, MMA = epilogue == "gated", epilogue == "residual", norm, tensor_cores
    UNITS, P, ROUNDS = units, parts, rounds
    HALVES = 2 if GATED else 1
    WARPS = UNITS * HALVES * P
    THREADS = WARPS * WARP
    KP = padded_shape(1, K)[1]
    GROUPS = -(-KP // GROUP_COLS)
    LOADS = -(-GROUPS // P)  # groups of a warp in a round
    QUADS = -(-LOADS // QUAD)
    W_REGS, M_REGS = 4 * LOADS, 2 * QUADS
    Q_WORDS = LOADS * P * GROUP_COLS // 4
    EXACT = KP == LOADS * P * GROUP_COLS
    PART_FLOATS = UNITS * HALVES * GROUPS * BLOCK_ROWS
    GROUP_SCALES = BLOCK_ROWS // 2  # int32 words of a row-block's scales of a group
    CHUNKS = KP // 4  # 16-byte pieces of x: 32 are a group, and a warp's
    X_LOADS = -(-CHUNKS // THREADS)
    X_REGS = 4 * X_LOADS
    OUT_THREADS = UNITS * BLOCK_ROWS
    PER_COLUMN = float32(1 / K)
    ZERO, PER_WEIGHT = float32(0), float32(1 / WEIGHT)
    NOTHING = int32(np.uint32(ZERO_WORD).astype(np.int32))

    @device_function
    def load_x(x_r, n_r, x, tid):
        """This thread's elements of x; zeros, in the norm too, where there are none."""
        for j in range(X_LOADS):
            chunk = int32(tid + j * THREADS)
            if chunk < CHUNKS:
                put4(x_r, 4 * j, ptx.load4(x, chunk * 4))
            else:
                zero4(x_r, 4 * j)
                zero4(n_r, 4 * j)

    @device_function
    def load_norm(n_r, norm, tid):
        """This thread's weights of the norm."""
        for j in range(X_LOADS):
            chunk = int32(tid + j * THREADS)
            if chunk < CHUNKS:
                put4(n_r, 4 * j, ptx.load4(norm, chunk * 4))

    @device_function
    def add_products(sums, w0, w1, x0, x1, x2, x3):
        """Adds the products of two rows' words."""
        c0, c1, c2, c3 = sums
        c0, c1, c2, c3 = multiply(signed(w0, 0), signed(w1, 0), signed(w0, 1), signed(w1, 1), x0, x1, c0, c1, c2, c3)
        return multiply(signed(w0, 2), signed(w1, 2), signed(w0, 3), signed(w1, 3), x2, x3, c0, c1, c2, c3)

    @device_function
    def dot16(w, x0, x1, x2, x3):
        """The sum of a word's 16 weights times 16 activations."""
        a = ptx.dp4a(signed(w, 1), x1, ptx.dp4a(signed(w, 0), x0, int32(0)))
        return ptx.dp4a(signed(w, 3), x3, ptx.dp4a(signed(w, 2), x2, a))

    def gemv_groups(words, x, norm, eps, scales, bias, out, rows, unit_count, up_offset):
        q_s = ptx.pointer(cuda.shared.array(Q_WORDS, int32, SHARED_ALIGN))
        part_s = ptx.pointer(cuda.shared.array(PART_FLOATS, float32, SHARED_ALIGN))  # [UNITS, HALVES, GROUPS, 16]
        step_s = ptx.pointer(cuda.shared.array(GROUPS, float32))
        square_s = ptx.pointer(cuda.shared.array(WARPS, float32))
        w_r = cuda.local.array(W_REGS, int32)
        m_r = cuda.local.array(M_REGS, int32)
        x_r = cuda.local.array(X_REGS, float32)
        n_r = cuda.local.array(X_REGS, float32)
        max_r = cuda.local.array(X_LOADS, float32)

        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        part = int32(warp % P)
        half = int32(warp // P % HALVES)
        slot = int32(warp // (P * HALVES))
        first = int32(cuda.blockIdx.x)
        grid = int32(cuda.gridDim.x)
        g, i = lane >> 2, lane & 3
        if MMA:
            c = int32((g >> 2) * 4 + i)
            piece = int32((g & 1) | (c & 1) << 1 | (g >> 1 & 1) << 2 | (c >> 1) << 3)
            row = int32((g & 1) * 4 + (g >> 1 & 1) * 8 + (g >> 2) * 2)  # and row + 1: whose sums this lane ends up with
            own, own_n = int32(g & 3), int32(2 * (i & 1))  # groups of a quad: whose activations, and sums own_n, + 1
            adds = (i >> 1) == (g >> 2)
        else:
            piece = lane
            row = int32((lane & 1) * 4 + (lane >> 2 & 1) * 8 + (lane & 2) + (lane >> 3 & 1))

        # 1. This block's weights and scales, and the norm's.
        unit = int32(first + slot * grid)
        for u in range(LOADS):
            column = int32((part + u * P) * STEP_WORDS + piece * 4)
            if unit < unit_count and (EXACT or column < KP):
                put4(w_r, 4 * u, load(words, int32(unit + half * up_offset) * KP + column))
            else:
                put4(w_r, 4 * u, (NOTHING, NOTHING, NOTHING, NOTHING))
        if MMA:
            scales_rd = int32(min(unit, int32(unit_count - 1)) + half * up_offset) * (GROUPS * GROUP_SCALES) + (
                row >> 1
            )
            for t in range(QUADS):
                for n in range(2):
                    group = min(int32(part + (QUAD * t + own_n + n) * P), int32(GROUPS - 1))
                    m_r[2 * t + n] = scales[scales_rd + group * GROUP_SCALES]
        if NORM:
            load_norm(n_r, norm, tid)
        trigger()
        wait()

        # 2. The activations as int8 in shared memory, and each group's step.
        load_x(x_r, n_r, x, tid)
        squares = ZERO
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
            max_r[j] = ptx.bits_to_float(uint32(warp_max(int32(ptx.float_to_bits(most)))))
        if NORM:
            squares = ptx.warp_sum(squares)
            if lane == 0:
                square_s[warp] = squares
            cuda.syncthreads()
            squares = ZERO
            for j in range(WARPS):
                squares = float32(squares + square_s[j])
            inverse = ptx.rsqrt_approx(float32(squares * PER_COLUMN + eps))
            for j in range(X_LOADS):
                max_r[j] = float32(max_r[j] * inverse)
            for j in range(X_REGS):
                x_r[j] = ptx.mul_rn(n_r[j], ptx.mul_rn(x_r[j], inverse))
        for j in range(X_LOADS):
            # A NaN in x makes the sum of squares NaN, which stays: then so is all of y.
            s = ptx.mul_rn(ptx.rcp_rn(EPSILON if max_r[j] < EPSILON else max_r[j]), INT8_MAX)
            q0 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[4 * j], s), ROUNDER))
            q1 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[4 * j + 1], s), ROUNDER))
            q2 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[4 * j + 2], s), ROUNDER))
            q3 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[4 * j + 3], s), ROUNDER))
            word = int32(ptx.byte_permute(ptx.byte_permute(q0, q1, 0x40), ptx.byte_permute(q2, q3, 0x40), 0x5410))
            chunk, group = int32(tid + j * THREADS), int32(warp + j * WARPS)
            if chunk < CHUNKS:
                q_s[chunk] = word
            if lane == 0 and group < GROUPS:
                step_s[group] = float32(ptx.rcp_rn(s) * PER_WEIGHT)
        cuda.syncthreads()

        # 3. Products, sums, output, round by round.
        for round_ in range(ROUNDS):
            base_unit = int32(first + round_ * UNITS * grid)
            unit = int32(base_unit + slot * grid)
            next_unit = int32(unit + UNITS * grid)
            part_wr = int32((slot * HALVES + half) * (GROUPS * BLOCK_ROWS) + row)
            scales_rd = int32(min(next_unit, int32(unit_count - 1)) + half * up_offset) * (GROUPS * GROUP_SCALES)
            if not MMA:
                scales_rd = int32(min(unit, int32(unit_count - 1)) + half * up_offset) * (GROUPS * GROUP_SCALES)
            scales_rd = int32(scales_rd + (row >> 1))
            for t in range(QUADS):
                if MMA:
                    x0, x1, x2, x3 = ptx.load4(
                        q_s, min(int32(part + (QUAD * t + own) * P), int32(LOADS * P - 1)) * (GROUP_COLS // 4) + c * 4
                    )
                    a = b = int32(0), int32(0), int32(0), int32(0)
                for j in range(QUAD):
                    u = QUAD * t + j
                    if u < LOADS:
                        group = int32(part + u * P)
                        if MMA:
                            mine = own == j
                            y0, y1 = x0 if mine else int32(0), x1 if mine else int32(0)
                            y2, y3 = x2 if mine else int32(0), x3 if mine else int32(0)
                            a = add_products(a, w_r[4 * u], w_r[4 * u + 1], y0, y1, y2, y3)
                            b = add_products(b, w_r[4 * u + 2], w_r[4 * u + 3], y0, y1, y2, y3)
                        else:
                            x0, x1, x2, x3 = ptx.load4(
                                q_s, group * (GROUP_COLS // 4) + (lane >> 3) * 8 + (lane >> 1 & 1) * 4
                            )
                            r0 = dot16(w_r[4 * u], x0, x1, x2, x3)
                            r1 = dot16(w_r[4 * u + 1], x0, x1, x2, x3)
                            r2 = dot16(w_r[4 * u + 2], x0, x1, x2, x3)
                            r3 = dot16(w_r[4 * u + 3], x0, x1, x2, x3)
                            upper, odd = (lane & 2) != 0, (lane & 8) != 0
                            keep0, keep1, send0, send1 = (r2, r3, r0, r1) if upper else (r0, r1, r2, r3)
                            keep0 = int32(keep0 + ptx.shuffle_xor(send0, 2))
                            keep1 = int32(keep1 + ptx.shuffle_xor(send1, 2))
                            keep, send = (keep1, keep0) if odd else (keep0, keep1)
                            keep = int32(keep + ptx.shuffle_xor(send, 8))
                            keep = int32(keep + ptx.shuffle_xor(keep, 16))
                            if lane < 16 and group < GROUPS:
                                pair = scales[scales_rd + group * GROUP_SCALES]
                                m = ptx.f16_high(pair) if row & 1 else ptx.f16_low(pair)
                                acc = ptx.int_to_float(keep)
                                part_s[part_wr + group * BLOCK_ROWS] = ptx.mul_rn(acc, ptx.mul_rn(m, step_s[group]))
                        if ROUNDS > 1:
                            column = int32(group * STEP_WORDS + piece * 4)
                            if next_unit < unit_count and (EXACT or column < KP) and round_ + 1 < ROUNDS:
                                put4(w_r, 4 * u, load(words, int32(next_unit + half * up_offset) * KP + column))
                if MMA:
                    upper = g >= 4
                    k0, k1, k2, k3 = b if upper else a
                    s0, s1, s2, s3 = a if upper else b
                    k0, k1 = int32(k0 + ptx.shuffle_xor(s0, 18)), int32(k1 + ptx.shuffle_xor(s1, 18))
                    k2, k3 = int32(k2 + ptx.shuffle_xor(s2, 18)), int32(k3 + ptx.shuffle_xor(s3, 18))
                    for n in range(2):
                        group = int32(part + (QUAD * t + own_n + n) * P)
                        pair = m_r[2 * t + n]
                        if adds and QUAD * t + own_n + n < LOADS and group < GROUPS:
                            step, to = step_s[group], int32(part_wr + group * BLOCK_ROWS)
                            acc0, acc1 = ptx.int_to_float(k1 if n else k0), ptx.int_to_float(k3 if n else k2)
                            part_s[to] = ptx.mul_rn(acc0, ptx.mul_rn(ptx.f16_low(pair), step))
                            part_s[to + 1] = ptx.mul_rn(acc1, ptx.mul_rn(ptx.f16_high(pair), step))
                        if ROUNDS > 1:
                            m_r[2 * t + n] = scales[scales_rd + min(group, int32(GROUPS - 1)) * GROUP_SCALES]

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
    tensor_cores: bool | None = None,
) -> KernelSpec:
    """The compiled variant for a plan; tensor_cores: None for what suits the architecture, others for tests."""
    gated = epilogue == "gated"
    tensor_cores = arch >= MIN_ARCH if tensor_cores is None else tensor_cores
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
    loads = -(-K // (GROUP_COLS * split.parts))
    threads = split.units * (2 if gated else 1) * split.parts * WARP
    vector = 4 * -(-K // (4 * threads)) * (2 if norm else 1)
    registers = 4 * loads + 2 * -(-loads // QUAD) + vector + EXTRA_REGISTERS
    kernel = make_gemv_groups(
        arch, K, split.units, split.parts, norm, epilogue, activation, split.rounds, tensor_cores
    )  # fmt: skip
    unit = "mma" if tensor_cores else "dp4a"
    kind = f"{'norm ' if norm else ''}{kind} {'bias ' if bias else ''}{unit}"
    return KernelSpec(
        # With the architecture: sm_75 has another mma.
        name=f"gemv_groups[sm_{arch} {K} {kind} {' '.join(map(str, split[:3]))}]",
        kernel=kernel,
        signature=signature,
        threads=threads,
        blocks_per_sm=max(1, min(MAX_BLOCKS_PER_SM, REGISTERS // (threads * registers))),
        dp4a=0 if tensor_cores else 16 * loads,
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
    in x makes all of y NaN, infinity makes it infinite or NaN. Epilogues as of `gemv`, without "acc". Arrays must be
    aligned to 16 bytes. Raises ValueError for operands that do not fit.
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
