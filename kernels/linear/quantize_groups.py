"""RMSNorm and absmax quantisation of rows by groups of 128 columns, before a GEMM with group scales.

    n = w * (x / sqrt(mean(x^2) + eps)), or x itself
    s = 127 / max(max|n|, 1e-5), q = rint(n * s), half to even, d = 1 / s     of each group, as `quantize_groups` has it

As quantize.py, but a warp's 32 pieces of four columns are one group, so its absmax needs no shared memory and no
barrier. A group that holds NaN gets d = NaN, so that all that is made of it is NaN. With two planes, what rint rounds
off is quantised, too, in steps that are 254 times finer (`quantize_groups_twice`).

    CTA = token     warp w: groups w, w + warps, ...    lane: four columns, 16 bytes in, one word of q out
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.operands import GroupedActivations, steps_stride
from bitnet_numba.kernels.linear.quantize import MAGNITUDE, MAX_COLUMNS, ROUNDER
from bitnet_numba.kernels.operands import Norm, checked
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, float64, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import BLOCK_COLS, num_groups
from bitnet_numba.quantize import EPSILON, FINER, INT8_MAX, SECOND_STEP

MAX_WARPS = 32
GROUPS_EACH = 4  # of a warp, if the row is not too long


def make_quantize_groups(arch: int, K: int, norm: bool, warps: int, planes: int = 1) -> Callable[..., None]:
    """The kernel for rows of K columns, a multiple of 4."""
    wait, trigger, warp_max = ptx.pdl_wait(arch), ptx.pdl_trigger(arch), ptx.warp_max_int(arch)
    PIECES, PADDED = K // 4, -(-K // BLOCK_COLS) * BLOCK_COLS // 4
    GROUPS, WARPS, COLUMNS, NORM = num_groups(K), warps, K, norm
    ROUNDS = -(-GROUPS // WARPS)
    VALUES = 4 * ROUNDS
    ZERO, ONE, MIN_ABSMAX, Q_MAX = float32(0), float32(1), float32(EPSILON), float32(INT8_MAX)
    TWO, TIMES, STEP = planes == 2, float32(FINER), float32(SECOND_STEP)

    @device_function
    def rest(v, scale):
        """What is rounded off of a value, in steps of the second plane, as bits whose lowest byte is the int8."""
        scaled = ptx.mul_rn(v, scale)
        rounded = ptx.add_rn(ptx.add_rn(scaled, ROUNDER), -ROUNDER)
        return ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(ptx.add_rn(scaled, -rounded), TIMES), ROUNDER))

    def quantize_groups(x, weight, eps, q, steps, stride, second, second_steps):
        square_s = ptx.pointer(cuda.shared.array(WARPS, float64))
        v_r = cuda.local.array(VALUES, float32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        row = int64(cuda.blockIdx.x)
        trigger()
        wait()
        for t in range(ROUNDS):
            piece = int32((warp + t * WARPS) * WARP + lane)
            i = 4 * t
            v_r[i] = v_r[i + 1] = v_r[i + 2] = v_r[i + 3] = ZERO
            if piece < PIECES:
                v_r[i], v_r[i + 1], v_r[i + 2], v_r[i + 3] = ptx.load4(x, row * COLUMNS + 4 * piece)
        if NORM:
            squares = float64(0)
            for i in range(VALUES):
                squares += float64(ptx.mul_rn(v_r[i], v_r[i]))
            for step in range(5):
                squares += ptx.shuffle_xor(squares, 1 << step)
            if lane == 0:
                square_s[warp] = squares
            cuda.syncthreads()
            squares = float64(0)
            for i in range(WARPS):
                squares += square_s[i]
            mean = float32(squares / float64(COLUMNS))
            inverse = ptx.div_rn(ONE, ptx.sqrt_rn(ptx.add_rn(mean, eps)))
            for t in range(ROUNDS):
                piece = int32((warp + t * WARPS) * WARP + lane)
                if piece < PIECES:
                    w0, w1, w2, w3 = ptx.load4(weight, 4 * piece)
                    i = 4 * t
                    v_r[i] = ptx.mul_rn(w0, ptx.mul_rn(v_r[i], inverse))
                    v_r[i + 1] = ptx.mul_rn(w1, ptx.mul_rn(v_r[i + 1], inverse))
                    v_r[i + 2] = ptx.mul_rn(w2, ptx.mul_rn(v_r[i + 2], inverse))
                    v_r[i + 3] = ptx.mul_rn(w3, ptx.mul_rn(v_r[i + 3], inverse))
        # Lane t computes the scale and step of the warp's group t: a division is a call.
        absmax = ZERO
        for t in range(ROUNDS):
            # As bits, which order |v| as the numbers do and put NaN above all: a maximum of floats would drop it.
            most = int32(0)
            for i in range(4):
                most = max(most, int32(ptx.float_to_bits(v_r[4 * t + i]) & MAGNITUDE))
            largest = ptx.bits_to_float(uint32(warp_max(most)))
            absmax = largest if lane == t else absmax
        own_scale = ptx.mul_rn(ptx.div_rn(ONE, MIN_ABSMAX if absmax < MIN_ABSMAX else absmax), Q_MAX)
        own_step, group = ptx.div_rn(ONE, own_scale), int32(warp + lane * WARPS)
        if lane < ROUNDS and group < GROUPS:
            steps[int64(group) * stride + row] = own_step
            if TWO:
                second_steps[int64(group) * stride + row] = ptx.mul_rn(own_step, STEP)
        for t in range(ROUNDS):
            scale = ptx.shuffle(own_scale, t)
            # No clamp: |v| * scale is at most 127 (1 + 2^-22), which rounds to 127. Padding holds zeros.
            q0 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(v_r[4 * t], scale), ROUNDER))
            q1 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(v_r[4 * t + 1], scale), ROUNDER))
            q2 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(v_r[4 * t + 2], scale), ROUNDER))
            q3 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(v_r[4 * t + 3], scale), ROUNDER))
            word = int32(ptx.byte_permute(ptx.byte_permute(q0, q1, 0x40), ptx.byte_permute(q2, q3, 0x40), 0x5410))
            piece = int32((warp + t * WARPS) * WARP + lane)
            if piece < PADDED:
                q[row * PADDED + piece] = word
            if TWO:
                r0, r1 = rest(v_r[4 * t], scale), rest(v_r[4 * t + 1], scale)
                r2, r3 = rest(v_r[4 * t + 2], scale), rest(v_r[4 * t + 3], scale)
                word = int32(ptx.byte_permute(ptx.byte_permute(r0, r1, 0x40), ptx.byte_permute(r2, r3, 0x40), 0x5410))
                if piece < PADDED:
                    second[row * PADDED + piece] = word

    return quantize_groups


@cache
def quantize_groups_spec(arch: int, K: int, norm: bool = True, warps: int = 0, planes: int = 1) -> KernelSpec:
    """The variant for rows of K columns; `warps` only for tests (0: this module's choice).

    Raises ValueError for a number of columns that is no multiple of 4, or more than a CTA can hold.
    """
    if not 1 <= K <= MAX_COLUMNS or K % 4:
        raise ValueError(f"rows to quantise by groups have 4 to {MAX_COLUMNS} columns, a multiple of 4, not {K}")
    if not warps:
        warps = -(-num_groups(K) // max(GROUPS_EACH, -(-num_groups(K) // MAX_WARPS)))
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    kernel = make_quantize_groups(arch, K, norm, warps, planes)
    second = (i32, f32) if planes == 2 else (types.none, types.none)
    signature = (f32, f32, types.float32, i32, f32, types.int32, *second)
    name = f"quantize_groups[{K}, {norm}, {warps}{', twice' if planes == 2 else ''}]"
    return KernelSpec(name, kernel, signature, warps * WARP, wide_loads=1)


def quantize_groups(
    device: Device,
    x: Any,
    out: GroupedActivations,
    num_tokens: int,
    K: int,
    *,
    norm: Norm | None = None,
    second: GroupedActivations | None = None,
    use_pdl: bool = True,
) -> Launch:
    """The launch that quantises `num_tokens` rows of K columns by groups, after an RMSNorm where `norm` is given.

    x: float32 [num_tokens, K]. second: of the second plane, if there are two. Raises ValueError with the sizes if
    operands do not fit together, or for rows that no CTA can hold.
    """
    if num_tokens < 1:
        raise ValueError(f"quantize_groups: {num_tokens} tokens; at least one is needed")
    kernel = quantize_groups_spec(device.arch, K, norm is not None, planes=1 if second is None else 2)
    operands = out.sizes(num_tokens, K)
    if second is not None:
        operands |= {f"second {name}": of for name, of in second.sizes(num_tokens, K).items()}
    operands["x"] = (x, num_tokens * K, "float32")
    operands["norm"] = (norm.weight if norm is not None else None, K, "float32")
    q, steps, *planes, x, weight = checked("quantize_groups", f"{num_tokens} rows of {K} columns", **operands)
    # Without a norm the weight is not read; any address serves.
    eps = np.float32(norm.eps if norm is not None else 0)
    arguments = (x, x if weight is None else weight, eps, q, steps, steps_stride(num_tokens), *(planes or (None, None)))
    return device.launch(kernel, num_tokens, arguments, use_pdl)
