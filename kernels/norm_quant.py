"""RMSNorm and absmax quantisation of whole rows, for products of many tokens; optionally after a gated activation.

    v = x, or relu2(gate) * up, or silu(gate) * up          float32
    n = w * (v / sqrt(mean(v^2) + eps)), or v itself        (Zhang and Sennrich, 2019)
    s = 127 / max(max|n|, 1e-5), q = rint(n * s), half to even          as in `bitnet_numba.quantize`

A step of one token does not use it: there the matrix-vector product quantises its input itself (see w2a8_gemv),
because a launch costs more than the vector. For M tokens a block owns a row; its values stay in registers between the
two reductions, so that each is read once: 4 M K bytes in (8 with a gate), M K out.

    block = token     thread t: columns t, t + T, t + 2 T, ...     (coalesced for every K, no alignment asked for)

The squares are summed in float64 and the mean is rounded once: the result does not depend on how the work is split, so
that a row gives the same q whatever the block size. Every other operation is the definition's, in its order.
Products and sums of q are exact, so the activations' sum is carried as int32 for the `+2` correction of `packing`.
"""

import math
from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels.device import Device, DeviceArray, Launch
from bitnet_numba.kernels.forms import KernelForm
from bitnet_numba.kernels.intrinsics import (
    WARP,
    add_rn,
    div_rn,
    float32,
    float64,
    grid_release,
    grid_wait,
    int32,
    int64,
    mul_rn,
    round_to_int,
    shuffle_xor,
    sqrt_rn,
    warp_max,
    warp_sum_int,
)
from bitnet_numba.packing import BLOCK_COLS
from bitnet_numba.quantize import EPSILON, INT8_MAX

ACTIVATIONS = ("none", "relu2", "silu")
MOST_VALUES = 36  # of a row in a thread's registers
MOST_EARLY = 16  # weights in registers beside them, loaded before the row is there
LARGE = 16384  # columns above which a block has 768 threads instead of 512: 85 registers each


def make_norm_quant(arch: int, K: int, activation: str, norm: bool, threads: int) -> Callable[..., None]:
    """The kernel for rows of K columns; `activation` one of ACTIVATIONS."""
    wait, release = grid_wait(arch), grid_release(arch)
    VALUES, WARPS, PADDED = -(-K // threads), threads // WARP, -(-K // BLOCK_COLS) * BLOCK_COLS
    EARLY = norm and VALUES <= MOST_EARLY
    W_REGS = VALUES if EARLY else 1
    GATED, RELU2, NORM = activation != "none", activation == "relu2", norm
    ZERO, ONE, LEAST, MOST = float32(0), float32(1), float32(EPSILON), float32(INT8_MAX)

    def norm_quant(x, stride, second, weight, eps, q, s, total):
        square_s = cuda.shared.array(WARPS, float64)
        max_s = cuda.shared.array(WARPS, float32)
        sum_s = cuda.shared.array(WARPS, int32)
        v_r = cuda.local.array(VALUES, float32)
        w_r = cuda.local.array(W_REGS, float32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        row = int64(cuda.blockIdx.x)
        x_rd = row * stride
        if EARLY:
            for i in range(VALUES):
                k = int32(tid + i * threads)
                w_r[i] = weight[k] if k < K else ZERO
        release()
        wait()

        for i in range(VALUES):
            k = int32(tid + i * threads)
            v = ZERO
            if k < K:
                v = x[x_rd + k]
                if GATED:
                    up = x[x_rd + second + k]
                    if RELU2:
                        v = max(v, ZERO)
                        v = mul_rn(mul_rn(v, v), up)
                    else:
                        v = mul_rn(div_rn(v, add_rn(ONE, float32(math.exp(-v)))), up)
            v_r[i] = v
        if NORM:
            squares = float64(0)
            for i in range(VALUES):
                squares += float64(mul_rn(v_r[i], v_r[i]))
            for step in range(5):
                squares += shuffle_xor(squares, 1 << step)
            if lane == 0:
                square_s[warp] = squares
            cuda.syncthreads()
            squares = float64(0)
            for i in range(WARPS):
                squares += square_s[i]
            mean = float32(squares / float64(K))
            inverse = div_rn(ONE, sqrt_rn(add_rn(mean, eps)))
            for i in range(VALUES):
                k = int32(tid + i * threads)
                w = ZERO
                if EARLY:
                    w = w_r[i]
                elif k < K:
                    w = weight[k]
                v_r[i] = mul_rn(w, mul_rn(v_r[i], inverse))
        largest = ZERO
        for i in range(VALUES):
            largest = max(largest, abs(v_r[i]))
        largest = warp_max(largest)
        if lane == 0:
            max_s[warp] = largest
        cuda.syncthreads()
        for i in range(WARPS):
            largest = max(largest, max_s[i])
        scale = mul_rn(div_rn(ONE, max(largest, LEAST)), MOST)
        added = int32(0)
        for i in range(VALUES):
            k = int32(tid + i * threads)
            # No clamp: |v| * scale is at most 127 (1 + 2^-22), which rounds to 127. Padding holds zeros.
            value = round_to_int(mul_rn(v_r[i], scale))
            added = int32(added + value)
            if k < PADDED:
                q[row * PADDED + k] = value
        for k in range(tid + VALUES * threads, PADDED, threads):
            q[row * PADDED + k] = int32(0)
        added = warp_sum_int(added)
        if lane == 0:
            sum_s[warp] = added
        cuda.syncthreads()
        if tid == 0:
            added = int32(0)
            for i in range(WARPS):
                added = int32(added + sum_s[i])
            s[row] = scale
            total[row] = added

    return norm_quant


_FLOATS = types.CPointer(types.float32)
SIGNATURE = (
    *(_FLOATS, types.int32, types.int32, _FLOATS, types.float32),  # x, stride, second, weight, eps
    *(types.CPointer(types.int8), _FLOATS, types.CPointer(types.int32)),  # q, s, total
)


def norm_quant_form(arch: int, K: int, activation: str = "none", norm: bool = True, threads: int = 0) -> KernelForm:
    """The compiled form for rows of K columns; `threads` only for tests (0: this module's choice).

    Raises ValueError for an unknown activation or a row that no block can hold.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    threads = threads or (512 if K <= LARGE else 768)
    if not 1 <= K <= MOST_VALUES * threads:
        raise ValueError(f"rows to quantise have 1 to {MOST_VALUES * threads} columns, not {K}")
    kernel = make_norm_quant(arch, K, activation, norm, threads)
    return KernelForm(f"norm_quant[{K}, {activation}, {norm}, {threads}]", kernel, SIGNATURE, threads)


def norm_quant(
    device: Device,
    x: DeviceArray,
    weight: DeviceArray | None,
    eps: float,
    q: DeviceArray,
    s: DeviceArray,
    total: DeviceArray,
    tokens: int,
    K: int,
    activation: str = "none",
    overlap: bool = True,
) -> Launch:
    """The launch that norms (with a weight) and quantises `tokens` rows.

    x float32 [tokens, K], or [tokens, 2 K] with gate and up side by side if there is an activation; weight float32
    [K] or None; q int8 [tokens, K rounded up to 32], padded with zeros; s float32 [tokens]; total int32 [tokens]:
    sums of q. Raises ValueError with the sizes if they do not fit together.
    """
    gated = activation != "none"
    stride = 2 * K if gated else K
    form = norm_quant_form(device.arch, K, activation, weight is not None)
    padded = -(-K // BLOCK_COLS) * BLOCK_COLS
    sizes = {"x": (x, tokens * stride), "q": (q, tokens * padded), "s": (s, tokens), "total": (total, tokens)}
    if weight is not None:
        sizes["weight"] = (weight, K)
    for name, (array, size) in sizes.items():
        if array.size < size:
            raise ValueError(f"norm_quant: {name} holds {array.size} elements, {size} are needed")
    if tokens < 1:
        raise ValueError(f"norm_quant: {tokens} tokens; at least one is needed")
    # Without a norm the weight is not read; any address serves.
    arguments = (x, stride, K, weight if weight is not None else x, np.float32(eps), q, s, total)
    return Launch(form, tokens, arguments, device, overlap)


def forms(arch: int) -> list[KernelForm]:
    """Rows of 2B4T, of the longest kind, and every other branch."""
    choices = [(2560, "none", True), (6912, "relu2", True), (6912, "silu", False), (2560, "none", False)]
    choices += [(100, "silu", True), (27648, "relu2", True)]
    return [norm_quant_form(arch, K, activation, norm) for K, activation, norm in choices]
