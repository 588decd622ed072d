"""gate = activation(gate) * up, element by element: where gate and up are products of different activations, so that no
GEMM has both in its epilogue (linears that have a norm of their own each). Arithmetic as of `epilogue.make_gated`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.epilogue import make_gated
from bitnet_numba.kernels.operands import checked
from bitnet_numba.kernels.ptx.base import int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec

THREADS = 256


def make_gate(arch: int, activation: str, threads: int) -> Callable[..., None]:
    """The kernel for an activation; a thread has four elements."""
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    gated, EACH = make_gated(activation), threads

    def gate_up(gate, up, pieces):
        trigger()
        piece = int32(cuda.blockIdx.x * EACH + cuda.threadIdx.x)
        wait()
        if piece < pieces:
            at = 4 * int64(piece)
            a, b, c, d = ptx.load4(gate, at)
            p, q, r, s = ptx.load4(up, at)
            ptx.store4(gate, at, gated(a, p), gated(b, q), gated(c, r), gated(d, s))

    return gate_up


@cache
def gate_spec(arch: int, activation: str, threads: int = THREADS) -> KernelSpec:
    """The variant for an activation; `threads` only for tests."""
    f32 = types.CPointer(types.float32)
    kernel = make_gate(arch, activation, threads)
    return KernelSpec(f"gate[{activation}, {threads}]", kernel, (f32, f32, types.int32), threads, wide_loads=2)


def gate(device: Device, gate: Any, up: Any, size: int, activation: str, *, use_pdl: bool = True) -> Launch:
    """The launch that makes activation(gate) * up of `gate`; both float32 [size], a multiple of 4.

    Raises ValueError for an array that is too small, or another size.
    """
    if size < 4 or size % 4:
        raise ValueError(f"gate: a multiple of 4 elements is needed, not {size}")
    gate, up = checked("gate", f"{size} elements", gate=(gate, size, "float32"), up=(up, size, "float32"))
    pieces = size // 4
    return device.launch(gate_spec(device.arch, activation), -(-pieces // THREADS), (gate, up, pieces), use_pdl)
