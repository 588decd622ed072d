"""RMSNorm of whole rows, of what is not quantised at once: into rows of their own, or added to the residual stream.

    y = w * (x / sqrt(mean(x^2) + eps))        out = y, or with `add`: out += y        (Zhang and Sennrich, 2019)

Most norms are part of the quantisation after them (see `quantize`). These stand alone: before linears that have norms
of their own, and behind a sub-layer (Gemma's block). A CTA is a row, a thread four columns at a time; the row is read
twice, the second time from L1. The squares are summed in float64 and the mean is rounded once, as in quantize.py, so
that a row's result does not depend on how it is split.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.operands import Norm, checked
from bitnet_numba.kernels.ptx.base import WARP, float32, float64, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec

MAX_THREADS = 256


def make_row_norm(arch: int, K: int, add: bool, threads: int) -> Callable[..., None]:
    """The kernel for rows of K columns, a multiple of 4."""
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    COLUMNS, PIECES, STEP, WARPS, ADD = K, np.int32(K // 4), np.int32(threads), threads // WARP, add
    ONE = float32(1)

    def row_norm(x, weight, eps, out):
        square_s = ptx.pointer(cuda.shared.array(WARPS, float64))
        tid = int32(cuda.threadIdx.x)
        row = int64(cuda.blockIdx.x) * COLUMNS
        trigger()
        wait()
        squares = float64(0)
        for piece in range(tid, PIECES, STEP):
            a, b, c, d = ptx.load4(x, row + 4 * piece)
            squares += float64(ptx.mul_rn(a, a))
            squares += float64(ptx.mul_rn(b, b))
            squares += float64(ptx.mul_rn(c, c))
            squares += float64(ptx.mul_rn(d, d))
        for step in range(5):
            squares += ptx.shuffle_xor(squares, 1 << step)
        if tid % WARP == 0:
            square_s[tid // WARP] = squares
        cuda.syncthreads()
        squares = float64(0)
        for i in range(WARPS):
            squares += square_s[i]
        mean = float32(squares / float64(COLUMNS))
        inverse = ptx.div_rn(ONE, ptx.sqrt_rn(ptx.add_rn(mean, eps)))
        for piece in range(tid, PIECES, STEP):
            a, b, c, d = ptx.load4(x, row + 4 * piece)
            p, q, r, s = ptx.load4(weight, 4 * piece)
            a, b = ptx.mul_rn(p, ptx.mul_rn(a, inverse)), ptx.mul_rn(q, ptx.mul_rn(b, inverse))
            c, d = ptx.mul_rn(r, ptx.mul_rn(c, inverse)), ptx.mul_rn(s, ptx.mul_rn(d, inverse))
            if ADD:
                p, q, r, s = ptx.load4(out, row + 4 * piece)
                a, b, c, d = ptx.add_rn(p, a), ptx.add_rn(q, b), ptx.add_rn(r, c), ptx.add_rn(s, d)
            ptx.store4(out, row + 4 * piece, a, b, c, d)

    return row_norm


@cache
def row_norm_spec(arch: int, K: int, add: bool = False, threads: int = MAX_THREADS) -> KernelSpec:
    """The variant for rows of K columns; `threads` at most, and others only in tests.

    Raises ValueError if K is no multiple of 4.
    """
    if K < 4 or K % 4:
        raise ValueError(f"rows to norm have a multiple of 4 columns, not {K}")
    threads = min(threads, -(-K // (4 * WARP)) * WARP)
    f32 = types.CPointer(types.float32)
    kernel = make_row_norm(arch, K, add, threads)
    return KernelSpec(f"row_norm[{K}, {add}, {threads}]", kernel, (f32, f32, types.float32, f32), threads, wide_loads=3)


def row_norm(
    device: Device,
    x: Any,
    norm: Norm,
    out: Any,
    num_tokens: int,
    K: int,
    *,
    add: bool = False,
    use_pdl: bool = True,
) -> Launch:
    """The launch that norms `num_tokens` rows of K columns into `out`; with `add`, adds them to what is there.

    x, out: float32 [num_tokens, K], which may be the same. Raises ValueError with the sizes if operands do not fit.
    """
    if num_tokens < 1:
        raise ValueError(f"row_norm: {num_tokens} tokens; at least one is needed")
    spec = row_norm_spec(device.arch, K, add)
    x, weight, out = checked(
        "row_norm",
        f"{num_tokens} rows of {K} columns",
        x=(x, num_tokens * K, "float32"),
        norm=(norm.weight, K, "float32"),
        out=(out, num_tokens * K, "float32"),
    )
    return device.launch(spec, num_tokens, (x, weight, np.float32(norm.eps), out), use_pdl)
