"""RMSNorm of each query's and each key's head, before they are rotated (Qwen3's block).

    x = w * (x / sqrt(mean(x^2) + eps))     over a head's dimensions, with one w for all queries and one for all keys

A warp is a head of a token, its dimensions a few a lane. The squares are summed in float64 and the mean is rounded
once, as in linear/quantize.py; every other operation is the reference's. It is a launch of its own, in place, because
queries and keys are read, and rotated, in five attention kernels.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.parts import HeadShape, check_head
from bitnet_numba.kernels.operands import Norm, checked
from bitnet_numba.kernels.ptx.base import WARP, float32, float64, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec

WARPS = 4  # heads of a block


def make_head_norm(arch: int, head_dim: int) -> Callable[..., None]:
    """The kernel for a head size."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    D, EACH = head_dim, -(-head_dim // WARP)
    ZERO, ONE = float32(0), float32(1)

    def head_norm(qkv, q_weight, k_weight, eps, num_heads, num_kv_heads):
        x_r = cuda.local.array(EACH, float32)
        w_r = cuda.local.array(EACH, float32)
        tid = int32(cuda.threadIdx.x)
        head, lane = int32(int32(cuda.blockIdx.y) * WARPS + tid // WARP), int32(tid % WARP)
        there = head < num_heads + num_kv_heads
        is_query = head < num_heads
        for j in range(EACH):
            d = int32(lane + j * WARP)
            w_r[j] = ZERO
            if there and d < D:
                w_r[j] = q_weight[d] if is_query else k_weight[d]
        release()
        wait()
        if not there:
            return
        at = int64(cuda.blockIdx.x) * int32(int32(num_heads + 2 * num_kv_heads) * D) + int32(head * D)
        squares = float64(0)
        for j in range(EACH):
            d = int32(lane + j * WARP)
            x_r[j] = qkv[at + d] if d < D else ZERO
            squares += float64(ptx.mul_rn(x_r[j], x_r[j]))
        for step in range(5):
            squares += ptx.shuffle_xor(squares, 1 << step)
        inverse = ptx.div_rn(ONE, ptx.sqrt_rn(ptx.add_rn(float32(squares / float64(D)), eps)))
        for j in range(EACH):
            d = int32(lane + j * WARP)
            if d < D:
                qkv[at + d] = ptx.mul_rn(w_r[j], ptx.mul_rn(x_r[j], inverse))

    return head_norm


@cache
def head_norm_spec(arch: int, head_dim: int) -> KernelSpec:
    """The variant for a head size. Raises ValueError for one that is odd or over MAX_HEAD_DIM."""
    check_head("head_norm", head_dim, 1)
    f32 = types.CPointer(types.float32)
    signature = (f32, f32, f32, types.float32, types.int32, types.int32)
    return KernelSpec(f"head_norm[{head_dim}]", make_head_norm(arch, head_dim), signature, WARPS * WARP)


def head_norm(
    device: Device,
    qkv: Any,
    q_norm: Norm,
    k_norm: Norm,
    num_tokens: int,
    shape: HeadShape,
    *,
    use_pdl: bool = True,
) -> Launch:
    """The launch that norms the queries and keys of `num_tokens` tokens in place.

    qkv float32 [num_tokens, shape.qkv_size]; the norms, of one eps, have head_dim weights. Raises ValueError if an
    operand is too small or of another dtype.
    """
    shape.check("head_norm")
    if num_tokens < 1:
        raise ValueError(f"head_norm: {num_tokens} tokens; at least one is needed")
    if q_norm.eps != k_norm.eps:
        raise ValueError(f"head_norm: queries and keys have one eps, not {q_norm.eps} and {k_norm.eps}")
    qkv, q_weight, k_weight = checked(
        "head_norm",
        f"{num_tokens} x {shape.num_heads} heads of {shape.head_dim}, {shape.num_kv_heads} key-value heads",
        qkv=(qkv, num_tokens * shape.qkv_size, "float32"),
        q_norm=(q_norm.weight, shape.head_dim, "float32"),
        k_norm=(k_norm.weight, shape.head_dim, "float32"),
    )
    grid = num_tokens, -(-(shape.num_heads + shape.num_kv_heads) // WARPS)
    arguments = (qkv, q_weight, k_weight, np.float32(q_norm.eps), shape.num_heads, shape.num_kv_heads)
    return device.launch(head_norm_spec(device.arch, shape.head_dim), grid, arguments, use_pdl)
