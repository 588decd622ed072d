"""Queries or keys of whole texts, in place: RMSNorm of each head, where the model has it, then rotary embedding.

    x = w * (x / sqrt(mean(x^2) + eps))     over a head's dimensions
    x[i], x[i + D / 2] = x[i] * cos - x[i + D / 2] * sin, x[i + D / 2] * cos + x[i] * sin      at the token's position

A warp is a head of a token; a lane has pairs i = lane, lane + 32, ... The squares are summed in float64 and the mean is
rounded once, as in head_norm.py; every other operation is the reference's.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.parts import RopeTables, check_head, rotate_pair
from bitnet_numba.kernels.operands import Norm, checked
from bitnet_numba.kernels.ptx.base import WARP, float32, float64, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec

WARPS = 4  # heads of a block


def make_rotate_heads(arch: int, head_dim: int, norm: bool) -> Callable[..., None]:
    """The kernel for a head size."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    D, HALF, EACH, NORM = head_dim, head_dim // 2, -(-(head_dim // 2) // WARP), norm
    ZERO, ONE = float32(0), float32(1)

    def rotate_heads(x, weight, eps, cos, sin, text_starts, num_heads):
        x_r = cuda.local.array(EACH, float32)
        y_r = cuda.local.array(EACH, float32)
        release()
        row, tid = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        head, lane = int32(int32(cuda.blockIdx.y) * WARPS + tid // WARP), int32(tid % WARP)
        wait()
        start = int32(text_starts[row])
        if head >= num_heads or start < 0:
            return
        at = (int64(row) * num_heads + head) * D
        squares = float64(0)
        for j in range(EACH):
            i = int32(lane + j * WARP)
            x_r[j] = x[at + i] if i < HALF else ZERO
            y_r[j] = x[at + HALF + i] if i < HALF else ZERO
            squares += float64(ptx.mul_rn(x_r[j], x_r[j])) + float64(ptx.mul_rn(y_r[j], y_r[j]))
        inverse = ONE
        if NORM:
            for step in range(5):
                squares += ptx.shuffle_xor(squares, 1 << step)
            inverse = ptx.div_rn(ONE, ptx.sqrt_rn(ptx.add_rn(float32(squares / float64(D)), eps)))
        angle = int64(row - start) * HALF
        for j in range(EACH):
            i = int32(lane + j * WARP)
            if i < HALF:
                a, b = x_r[j], y_r[j]
                if NORM:
                    a = ptx.mul_rn(weight[i], ptx.mul_rn(a, inverse))
                    b = ptx.mul_rn(weight[HALF + i], ptx.mul_rn(b, inverse))
                a, b = rotate_pair(a, b, cos[angle + i], sin[angle + i])
                x[at + i], x[at + HALF + i] = a, b

    return rotate_heads


@cache
def rotate_heads_spec(arch: int, head_dim: int, norm: bool = True) -> KernelSpec:
    """The variant for a head size. Raises ValueError for one that is odd or over MAX_HEAD_DIM."""
    check_head("rotate_heads", head_dim, 1)
    f32 = types.CPointer(types.float32)
    signature = (f32, f32, types.float32, f32, f32, types.CPointer(types.int32), types.int32)
    kernel = make_rotate_heads(arch, head_dim, norm)
    return KernelSpec(f"rotate_heads[{head_dim}, {norm}]", kernel, signature, WARPS * WARP)


def rotate_heads(
    device: Device,
    x: Any,
    norm: Norm | None,
    rope: RopeTables,
    text_starts: Any,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    *,
    use_pdl: bool = True,
) -> Launch:
    """The launch that norms (where `norm` is given) and rotates heads of tokens in place.

    x float32 [num_tokens, num_heads, head_dim]; rope: the angles of every position of a text; text_starts int32
    [num_tokens]: the row of the first token of a row's text, -1 for rows that are not used and not touched. Raises
    ValueError if an operand is too small or of another dtype.
    """
    if num_tokens < 1 or num_heads < 1:
        raise ValueError(f"rotate_heads: {num_tokens} tokens of {num_heads} heads; at least one is needed")
    spec = rotate_heads_spec(device.arch, head_dim, norm is not None)
    x, weight, cos, sin, text_starts = checked(
        "rotate_heads",
        f"{num_tokens} x {num_heads} heads of {head_dim}",
        x=(x, num_tokens * num_heads * head_dim, "float32"),
        norm=(norm.weight if norm is not None else None, head_dim, "float32"),
        cos=(rope.cos, head_dim // 2, "float32"),
        sin=(rope.sin, head_dim // 2, "float32"),
        text_starts=(text_starts, num_tokens, "int32"),
    )
    # Without a norm the weight is not read; any address serves.
    eps = np.float32(norm.eps if norm is not None else 0)
    arguments = (x, cos if weight is None else weight, eps, cos, sin, text_starts, num_heads)
    return device.launch(spec, (num_tokens, -(-num_heads // WARPS)), arguments, use_pdl)
