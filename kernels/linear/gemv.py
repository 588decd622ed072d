"""The fast W2A8 matrix-vector product: one token. gemv_simple.py has three short versions to read first.

    y[n] = (sum_k q[k] * w[n, k]) * scale[segment of n] / s  (+ bias[n])

with w ternary, packed (see `packing`), and q, s the absmax quantisation of the input vector. The sums are exact
integers: the codes w + 2 go into `dp4a` as they are stored, and 2 * sum(q) is taken off once per row.

`make_gemv` makes every variant, from two choices:
    prologue   "int8": q, s and sum(q) are given;  "quantize": x, float32, is quantised here;
               "norm": x goes through RMSNorm, then is quantised;  "exact norm": the same with the roundings of
               `quantize`, so that a batch of one gets what it would get in company (the sum of squares, in float64,
               has another order: one in 10^8 means is rounded otherwise)
    epilogue   "acc": int32 sums, for tests;  "store": y;  "residual": y is added to what `out` holds;
               "gated": activation(y[n]) * y[n + N/2], the feed-forward's gate and up rows at once
The vector is small, and each launch and each trip through L2 that the next kernel waits for cost more than quantising
it: so every block quantises all of it for itself, while its weights are on their way.

Work split (P = parts, U = units):

    block b: row-blocks b, b + grid, ... (U of them in a round), 16 rows each;   P warps share a row-block:
        columns   0        128       256       384
        warp 0    |========|         |         |======= ...      every P-th step of 128 columns
        warp 1    |        |=========|         |        ...
    lane: 16 bytes of a step = words 4*lane .. +3 = rows r .. r+3 of 16 columns, with
        r       = 4 * (lane & 1) + 8 * (lane >> 2 & 1)
        column  = 32 * (lane >> 3) + 16 * (lane >> 1 & 1)
    so 8 lanes share rows. Four shuffles add them up, trading rows for lanes; the P warps meet in shared memory.

A block loads all its weights into registers before `pdl_wait`, that is, while the kernels before this one still run. A
matrix too large for that takes rounds: as a round's weights are used, the next round's are loaded in their place.

Blocks that start early find SMs that are still full of others, and then several of a launch go to one that is not: in
a decode step a product ran on half of the SMs. With `spread`, blocks that would fit an SM three times or more ask for
over half of its shared memory, and so wait for an SM of their own. Blocks of larger products have room for one beside a
neighbour's anyway.

Of a word, `word & (mask << 2i)` holds codes times 4^i, so a dp4a takes one more instruction, not two; the sums for
each i are kept apart and shifted back once. RMSNorm and absmax share one reduction over the block: the largest
|weight * x| is multiplied by 1 / rms afterwards, so s may be off by 2 ulp. docs/performance-notes.md has what was tried
and measured.

Phases are device functions where that leaves the machine code as it was, on every architecture: not those with
barriers, shuffles or the loads of weights, for which the compiler then finds other registers and schedules.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.epilogue import EPILOGUES, make_gated, make_mean_square, make_scaled
from bitnet_numba.kernels.linear.operands import PackedLinear, QuantizedActivations, check_segments
from bitnet_numba.kernels.operands import Norm, checked
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, float64, int32, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import BLOCK_ROWS, CODE_BITS, CODE_MASK, CODE_OFFSET, padded_shape

STEP_COLS = 128  # columns that one 16-byte load of each lane covers: four blocks of weights
STEP_WORDS = WARP * 4
WARPS = 8  # of a block, about: more make barriers dearer, and two launches that overlap must fit an SM's registers
SINGLE_ROUND_MAX_WARPS = 12
BLOCK_MAX_WARPS = 32
EXTRA_REGISTERS = 44  # of a thread, beside the weights it holds
REGISTERS = 65536  # of an SM
MAX_BLOCKS_PER_SM = 4  # of launches that overlap
SPREAD_ARCH = 90  # where this was measured
MAX_LOADS = 28  # of a lane in a round: 112 registers of weights
EPSILON = float32(1e-5)  # least absmax, as in `quantize`
INT8_MAX = float32(127)
ROUNDER = float32(1.5 * 2**23)  # added to a small number, leaves it rounded, half to even, in the low bits
MAGNITUDE = 0x7FFFFFFF  # of a float32's bits: all but the sign
ALL_ONES = 0x01010101  # four bytes of 1: dp4a with it adds up four activations


@device_function
def put4(registers, i, four):
    """Four values into a register array, from element i on."""
    registers[i], registers[i + 1], registers[i + 2], registers[i + 3] = four


@device_function
def zero4(registers, i):
    """Zeros into four elements of a register array."""
    for j in range(4):
        registers[i + j] = int32(0)


def make_gemv(
    arch: int,
    K: int,
    units: int,
    parts: int,
    prologue: str = "norm",
    epilogue: str = "store",
    activation: str = "relu2",
    rounds: int = 1,
) -> Callable[..., None]:
    """The kernel for K columns. A block does `units` row-blocks (pairs of them for "gated") in a round, each by `parts`
    warps, in `rounds` rounds."""
    load, wait, trigger = ptx.stream_load(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    warp_max_int = ptx.warp_max_int(arch)
    GATED, RESIDUAL, ACC = epilogue == "gated", epilogue == "residual", epilogue == "acc"
    NORM, STRICT, INT8 = prologue in ("norm", "exact norm"), prologue == "exact norm", prologue == "int8"
    UNITS, P, ROUNDS = units, parts, rounds
    HALVES = 2 if GATED else 1
    WARPS = UNITS * HALVES * P
    THREADS = WARPS * WARP
    KP = padded_shape(1, K)[1]
    STEPS = -(-KP // STEP_COLS)
    LOADS = -(-STEPS // P)  # of 16 bytes, per lane and round
    W_REGS = 4 * LOADS
    Q_WORDS = LOADS * P * STEP_COLS // 4
    EXACT = KP == LOADS * P * STEP_COLS  # no lane's load lies beyond the row
    SUM_INTS = WARPS * BLOCK_ROWS
    CHUNKS = KP // 4  # 16-byte pieces of x
    X_LOADS = -(-CHUNKS // THREADS)
    X_REGS = 4 * X_LOADS
    Q_CHUNKS = KP // 16
    Q_LOADS = -(-Q_CHUNKS // THREADS)
    OUT_THREADS = UNITS * BLOCK_ROWS
    PER_COLUMN, mean_of = float32(1 / K), make_mean_square(K)
    WARP_BITS = (WARPS - 1).bit_length()
    MASK0, MASK1, MASK2, MASK3 = (np.int32(np.uint32(CODE_MASK << CODE_BITS * i).astype(np.int32)) for i in range(4))
    SHIFT1, SHIFT2, SHIFT3 = CODE_BITS, 2 * CODE_BITS, 3 * CODE_BITS
    ZERO = float32(0)
    scaled, gated = make_scaled(), make_gated(activation)

    @device_function
    def copy_q(q_s, x, tid):
        """Activations that are int8 already, to shared memory."""
        for j in range(Q_LOADS):
            chunk = int32(tid + j * THREADS)
            if chunk < Q_CHUNKS:
                a, b, c, d = ptx.load4(x, chunk * 4)
                ptx.store4(q_s, chunk * 4, a, b, c, d)

    @device_function
    def load_norm(n_r, norm, tid):
        """This thread's weights of the norm."""
        for j in range(X_LOADS):
            chunk = int32(tid + j * THREADS)
            if chunk < CHUNKS:
                put4(n_r, 4 * j, ptx.load4(norm, chunk * 4))

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
    def quantise(q_s, x_r, s, tid):
        """x_r as int8 to shared memory; returns the sum of this thread's."""
        q_sum = int32(0)
        for j in range(X_LOADS):
            # No clamp: |x| * s is at most 127 (1 + 2^-20), which rounds to 127. Adding 1.5 * 2^23 rounds half to even
            # and leaves the whole number in the low bits, four times as fast as a conversion.
            q0 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[4 * j], s), ROUNDER))
            q1 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[4 * j + 1], s), ROUNDER))
            q2 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[4 * j + 2], s), ROUNDER))
            q3 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[4 * j + 3], s), ROUNDER))
            word = int32(ptx.byte_permute(ptx.byte_permute(q0, q1, 0x40), ptx.byte_permute(q2, q3, 0x40), 0x5410))
            q_sum = ptx.dp4a(word, ALL_ONES, q_sum)
            chunk = int32(tid + j * THREADS)
            if chunk < CHUNKS:
                q_s[chunk] = word
        return q_sum

    @device_function
    def dot16(w, x0, x1, x2, x3, a0, a1, a2, a3):
        """Adds a word's 16 codes times 16 activations to four sums, for i = 0..3, each 4^i times too large."""
        a0, a1 = ptx.dp4a_us(w & MASK0, x0, a0), ptx.dp4a_us(w & MASK1, x1, a1)
        a2, a3 = ptx.dp4a_us(w & MASK2, x2, a2), ptx.dp4a_us(w & MASK3, x3, a3)
        return a0, a1, a2, a3

    def gemv(words, x, norm, eps, scales, bias, out, rows, unit_count, up_offset, bound1, bound2, x_scale, x_q_sum):
        q_s = ptx.pointer(cuda.shared.array(Q_WORDS, int32, SHARED_ALIGN))
        sum_s = ptx.pointer(cuda.shared.array(SUM_INTS, int32, SHARED_ALIGN))  # [WARPS, 16] partial rows
        square_s = ptx.pointer(cuda.shared.array(WARPS, float32))
        max_s = ptx.pointer(cuda.shared.array(WARPS, float32))
        q_sum_s = ptx.pointer(cuda.shared.array(WARPS, int32))
        w_r = cuda.local.array(W_REGS, int32)
        x_r = cuda.local.array(X_REGS, float32)
        n_r = cuda.local.array(X_REGS, float32)

        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        part = int32(warp % P)
        half = int32(warp // P % HALVES)
        slot = int32(warp // (P * HALVES))
        first = int32(cuda.blockIdx.x)
        grid = int32(cuda.gridDim.x)

        # 1. This block's weights, and the norm's.
        unit = int32(first + slot * grid)
        for u in range(LOADS):
            column = int32((part + u * P) * STEP_WORDS + lane * 4)
            if unit < unit_count and (EXACT or column < KP):
                put4(w_r, 4 * u, load(words, int32(unit + half * up_offset) * KP + column))
            else:
                zero4(w_r, 4 * u)
        if NORM:
            load_norm(n_r, norm, tid)
        trigger()
        wait()

        # 2. The activations as int8 in shared memory, their scale and sum.
        if INT8:
            s = x_scale[0]
            q_sum = x_q_sum[0]  # here, so that the output does not wait for it
            copy_q(q_s, x, tid)
        else:
            load_x(x_r, n_r, x, tid)
            if STRICT:
                wide_s = ptx.pointer(cuda.shared.array(WARPS, float64))
                wide = float64(0)
                for i in range(X_REGS):
                    wide += ptx.widen_positive(ptx.mul_rn(x_r[i], x_r[i]))
                for step in range(5):
                    wide += ptx.shuffle_xor(wide, 1 << step)
                if lane == 0:
                    wide_s[warp] = wide
                cuda.syncthreads()
                source = int32(lane & ((1 << WARP_BITS) - 1))
                wide = wide_s[source] if source < WARPS else float64(0)
                for step in range(WARP_BITS):
                    wide += ptx.shuffle_xor(wide, 1 << step)
                inverse = ptx.rcp_rn(ptx.sqrt_rn(ptx.add_rn(mean_of(wide), eps)))
                most = int32(0)  # as bits: a maximum of floats would drop NaN
                for i in range(X_REGS):
                    x_r[i] = ptx.mul_rn(n_r[i], ptx.mul_rn(x_r[i], inverse))
                    most = max(most, int32(ptx.float_to_bits(x_r[i]) & MAGNITUDE))
                most = warp_max_int(most)
                if lane == 0:
                    max_s[warp] = ptx.bits_to_float(uint32(most))
                cuda.syncthreads()
                for i in range(WARPS):
                    most = max(most, int32(ptx.float_to_bits(max_s[i])))
                absmax = ptx.bits_to_float(uint32(most))
            else:
                squares = ZERO
                absmax = ZERO
                for i in range(X_REGS):
                    if NORM:
                        squares = float32(squares + x_r[i] * x_r[i])
                        absmax = max(absmax, abs(float32(n_r[i] * x_r[i])))
                    else:
                        squares = float32(squares + x_r[i] * ZERO)  # NaN where x is not finite, which max would drop
                        absmax = max(absmax, abs(x_r[i]))
                squares = ptx.warp_sum(squares)
                absmax = ptx.warp_max(absmax)
                if lane == 0:
                    square_s[warp] = squares
                    max_s[warp] = absmax
                cuda.syncthreads()
                squares = ZERO
                for i in range(WARPS):
                    squares = float32(squares + square_s[i])
                    absmax = max(absmax, max_s[i])
                if NORM:
                    inverse = ptx.rsqrt_approx(float32(squares * PER_COLUMN + eps))
                    absmax = float32(absmax * inverse)
                    for i in range(X_REGS):
                        x_r[i] = ptx.mul_rn(n_r[i], ptx.mul_rn(x_r[i], inverse))
                else:
                    absmax = float32(absmax + squares)
            # What is not finite in x makes the sum of squares NaN, which stays: then so is all of y.
            s = ptx.mul_rn(ptx.rcp_rn(EPSILON if absmax < EPSILON else absmax), INT8_MAX)
            q_sum = quantise(q_s, x_r, s, tid)
        cuda.syncthreads()
        if not INT8:
            q_sum = ptx.warp_sum_int(q_sum)  # here, not before the barrier: nobody needs it until the sums meet
            if lane == 0:
                q_sum_s[warp] = q_sum

        # 3. Products, sums, output, round by round.
        for round_ in range(ROUNDS):
            base_unit = int32(first + round_ * UNITS * grid)
            unit = int32(base_unit + slot * grid)
            next_unit = int32(unit + UNITS * grid)
            a00 = a01 = a02 = a03 = int32(0)  # a[row][i]: products of codes << 2 * i
            a10 = a11 = a12 = a13 = int32(0)
            a20 = a21 = a22 = a23 = int32(0)
            a30 = a31 = a32 = a33 = int32(0)
            for u in range(LOADS):
                step = int32(part + u * P)
                x0, x1, x2, x3 = ptx.load4(q_s, step * (STEP_COLS // 4) + (lane >> 3) * 8 + (lane >> 1 & 1) * 4)
                a00, a01, a02, a03 = dot16(w_r[4 * u], x0, x1, x2, x3, a00, a01, a02, a03)
                a10, a11, a12, a13 = dot16(w_r[4 * u + 1], x0, x1, x2, x3, a10, a11, a12, a13)
                a20, a21, a22, a23 = dot16(w_r[4 * u + 2], x0, x1, x2, x3, a20, a21, a22, a23)
                a30, a31, a32, a33 = dot16(w_r[4 * u + 3], x0, x1, x2, x3, a30, a31, a32, a33)
                if ROUNDS > 1:
                    column = int32(step * STEP_WORDS + lane * 4)
                    if next_unit < unit_count and (EXACT or column < KP) and round_ + 1 < ROUNDS:
                        put4(w_r, 4 * u, load(words, int32(next_unit + half * up_offset) * KP + column))
            # Sums of 4^i multiples are 4^i multiples: the shifts are exact.
            r0 = int32(a00 + (a01 >> SHIFT1) + (a02 >> SHIFT2) + (a03 >> SHIFT3))
            r1 = int32(a10 + (a11 >> SHIFT1) + (a12 >> SHIFT2) + (a13 >> SHIFT3))
            r2 = int32(a20 + (a21 >> SHIFT1) + (a22 >> SHIFT2) + (a23 >> SHIFT3))
            r3 = int32(a30 + (a31 >> SHIFT1) + (a32 >> SHIFT2) + (a33 >> SHIFT3))
            upper = (lane & 2) != 0
            keep0, keep1, send0, send1 = (r2, r3, r0, r1) if upper else (r0, r1, r2, r3)
            keep0 = int32(keep0 + ptx.shuffle_xor(send0, 2))
            keep1 = int32(keep1 + ptx.shuffle_xor(send1, 2))
            odd = (lane & 8) != 0
            keep, send = (keep1, keep0) if odd else (keep0, keep1)
            keep = int32(keep + ptx.shuffle_xor(send, 8))
            keep = int32(keep + ptx.shuffle_xor(keep, 16))
            if lane < 16:
                row = (lane & 1) * 4 + (lane >> 2 & 1) * 8 + (lane & 2) + (lane >> 3 & 1)
                sum_s[warp * BLOCK_ROWS + row] = keep

            out_unit = int32(base_unit + tid // BLOCK_ROWS * grid)
            n = int32(out_unit * BLOCK_ROWS + tid % BLOCK_ROWS)
            writes = tid < OUT_THREADS and out_unit < unit_count and n < rows
            scale = up_scale = row_bias = up_bias = old = ZERO
            if writes and not ACC:
                scale = scales[0] if n < bound1 else (scales[1] if n < bound2 else scales[2])
                if bias is not None:
                    row_bias = bias[n]
                if RESIDUAL:
                    old = out[n]
                if GATED:
                    up_scale = scales[1]
                    if bias is not None:
                        up_bias = bias[rows + n]
            cuda.syncthreads()
            if writes:
                if not INT8:
                    q_sum = int32(0)
                    for i in range(WARPS):
                        q_sum = int32(q_sum + q_sum_s[i])
                start = int32(tid // BLOCK_ROWS * HALVES * P * BLOCK_ROWS + tid % BLOCK_ROWS)
                acc = int32(-CODE_OFFSET * q_sum)
                for i in range(P):
                    acc = int32(acc + sum_s[start + i * BLOCK_ROWS])
                if ACC:
                    out[n] = acc
                else:
                    y = scaled(acc, scale, s)
                    if bias is not None:
                        y = ptx.add_rn(y, row_bias)
                    if GATED:
                        acc = int32(-CODE_OFFSET * q_sum)
                        for i in range(P):
                            acc = int32(acc + sum_s[start + (P + i) * BLOCK_ROWS])
                        z = scaled(acc, up_scale, s)
                        if bias is not None:
                            z = ptx.add_rn(z, up_bias)
                        y = gated(y, z)
                    if RESIDUAL:
                        y = ptx.add_rn(old, y)
                    out[n] = y
            if ROUNDS > 1:
                cuda.syncthreads()  # the next round writes the sums again

    return gemv


class Plan(NamedTuple):
    """How a product is split: what `make_gemv` is specialised to, and the grid."""

    units: int  # row-blocks (pairs for "gated") of a block in a round
    parts: int  # warps that share a row-block
    rounds: int
    grid: int  # blocks


def plan(rows: int, K: int, num_sms: int, gated: bool = False, max_loads: int = MAX_LOADS) -> Plan:
    """The launch rule: one block an SM, its weights in registers all at once if they fit.

    A block owns every grid-th unit of 16 rows (pairs of 16 for "gated"). It has about WARPS warps: few enough for the
    blocks of the next launches to fit beside it and for cheap barriers, enough to hide latencies. A lane holds at most
    max_loads loads; where more than SINGLE_ROUND_MAX_WARPS warps would be needed, the units are done in rounds, by
    WARPS of them: loading ahead takes more registers. Raises ValueError for more columns than a block can hold.
    """
    halves = 2 if gated else 1
    unit_count = -(-rows // (BLOCK_ROWS * halves))
    steps = -(-K // STEP_COLS)
    block_units = -(-unit_count // num_sms)
    for rounds in range(1, block_units + 1):
        units = -(-block_units // rounds)
        parts = max(-(-steps // max_loads), min(steps, WARPS // (units * halves)))
        if units * halves * parts <= (SINGLE_ROUND_MAX_WARPS if rounds == 1 else WARPS):
            break
    parts = -(-steps // -(-steps // parts))  # no more warps than the loads need
    if parts * units * halves > BLOCK_MAX_WARPS:
        raise ValueError(
            f"{K} columns are more than the {BLOCK_MAX_WARPS * max_loads * STEP_COLS} that a block can hold"
        )
    return Plan(units, parts, rounds, min(unit_count, num_sms))


@cache
def gemv_spec(
    arch: int,
    K: int,
    split: Plan,
    prologue: str = "norm",
    epilogue: str = "store",
    activation: str = "relu2",
    bias: bool = False,
    spread: bool = False,
) -> KernelSpec:
    """The compiled variant for a plan; spread: see `gemv`."""
    gated, int8 = epilogue == "gated", prologue == "int8"
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    signature = (
        i32,  # words
        i32 if int8 else f32,  # x
        f32 if prologue in ("norm", "exact norm") else types.none,  # norm
        types.float32,  # eps
        f32,  # scales
        f32 if bias else types.none,  # bias
        i32 if epilogue == "acc" else f32,  # out
        *(types.int32,) * 5,  # rows, unit_count, up_offset, bound1, bound2
        *((f32, i32) if int8 else (types.none, types.none)),  # x_scale, x_q_sum
    )
    kind = f"gated {activation}" if gated else epilogue
    loads = -(-K // (STEP_COLS * split.parts))
    threads = split.units * (2 if gated else 1) * split.parts * WARP
    blocks = max(1, min(MAX_BLOCKS_PER_SM, REGISTERS // (threads * (4 * loads + EXTRA_REGISTERS))))
    return KernelSpec(
        name=f"gemv[{K} {prologue} {kind} {'bias ' if bias else ''}{' '.join(map(str, split[:3]))}]",
        kernel=make_gemv(arch, K, split.units, split.parts, prologue, epilogue, activation, split.rounds),
        signature=signature,
        threads=threads,
        blocks_per_sm=blocks,
        dp4a=16 * loads,
        wide_loads=loads,
        one_per_sm=spread and arch == SPREAD_ARCH and blocks > 2,
    )


def gemv(
    device: Device,
    linear: PackedLinear,
    x: Any,
    out: Any,
    *,
    norm: Norm | None = None,
    epilogue: str = "store",
    activation: str = "relu2",
    exact: bool = False,
    spread: bool = False,
    use_pdl: bool = True,
) -> Launch:
    """The launch of one token's product.

    x: float32 [K rounded up to 32], zeros at the end, which is normed if there is a norm, and quantised; or a token's
    QuantizedActivations. NaN or infinity in x makes all of y NaN (not infinity where the norm's weight is 0).
    epilogue: "store" writes y to out, float32 [N]; "residual" adds it to out; "gated", for gate and up rows, writes
    activation(y[n]) * y[n + N/2], activation "relu2" or "silu", to out, float32 [N/2]; "acc" writes the sums of weights
    times q to out, int32 [N]. exact: the norm has the roundings of `quantize`. spread: the launches around it are
    others, as in a decode step, so that small blocks are better kept one an SM (sm_90). Arrays must be aligned to 16
    bytes. Raises ValueError for operands that do not fit.
    """
    gated, int8 = epilogue == "gated", isinstance(x, QuantizedActivations)
    if epilogue not in EPILOGUES:
        raise ValueError(f"gemv: no epilogue {epilogue!r}, only {', '.join(EPILOGUES)}")
    if int8 and norm is not None:
        raise ValueError("gemv: the norm comes before quantisation, and x is quantised")
    check_segments("gemv", linear.segments, gated)
    N, K = linear.N, linear.K
    rows, padded_K = N // 2 if gated else N, padded_shape(1, K)[1]
    weight = norm.weight if norm is not None else None
    inputs = x.sizes(1, K) if int8 else {"x": (x, padded_K, "float32"), "norm": (weight, padded_K, "float32")}
    words, scales, bias, out, *operands = checked(
        "gemv",
        f"a {N} x {K} product",
        **linear.sizes(),
        out=(out, rows, "int32" if epilogue == "acc" else "float32"),
        **inputs,
    )
    x, weight, x_scale, x_q_sum = (operands[0], None, *operands[1:]) if int8 else (*operands, None, None)
    prologue = "int8" if int8 else "quantize" if norm is None else "exact norm" if exact else "norm"
    split = plan(N, K, device.num_sms, gated)
    spec = gemv_spec(device.arch, K, split, prologue, epilogue, activation, bias is not None, spread)
    unit_count = -(-rows // BLOCK_ROWS)
    bounds = (*linear.segment_ends, N, N)[:2]
    arguments = (
        words, x, weight, norm.eps if norm is not None else 0.0, scales, bias, out,
        rows, unit_count, unit_count if gated else 0, *bounds, x_scale, x_q_sum,
    )  # fmt: skip
    return device.launch(spec, split.grid, arguments, use_pdl)
