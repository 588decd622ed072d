"""Products with group scales of activations in two int8 planes, with any number of tokens.

    quantise (norm)     both planes
    product             of the first plane: stored, or added to the residual stream
    product             of the second plane, added to that

Gate and up are a linear each, since what is activated is the sum; then gate = activation(gate) * up. The
products' kernels are those of one plane, and a token's bits do not depend on how many there are.
"""

from dataclasses import replace
from typing import Any

from bitnet_numba.backends.cuda.buffers import Buffers
from bitnet_numba.backends.cuda.weights import segment_of
from bitnet_numba.kernels.linear.gated import gate
from bitnet_numba.kernels.linear.gemm_groups import gemm_groups
from bitnet_numba.kernels.linear.operands import GroupedActivations, GroupedLinear
from bitnet_numba.kernels.linear.quantize_groups import quantize_groups
from bitnet_numba.kernels.operands import Norm
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch


def two_plane_product(
    device: Device,
    linear: GroupedLinear,
    b: Buffers,
    x: Any,
    norm: Norm | None,
    count: Any,
    out: Any,
    num_tokens: int,
    *,
    epilogue: str = "store",
    activation: str = "relu2",
) -> list[Launch]:
    """Norms (if a norm is given) and quantises x, and multiplies it with a linear; operands as of `gemm_groups`.

    b: the buffers of several tokens, whose `quantized`, `second` and `up` are used.
    """
    first = b.quantized
    assert isinstance(first, GroupedActivations)

    def product(linear: GroupedLinear, out: Any, epilogue: str) -> list[Launch]:
        unbiased = replace(linear, bias=None)
        return [
            gemm_groups(device, linear, first, count, out, num_tokens, epilogue=epilogue),
            gemm_groups(device, unbiased, b.second, count, out, num_tokens, epilogue="residual"),
        ]

    quantised = quantize_groups(device, x, first, num_tokens, linear.K, norm=norm, second=b.second)
    if epilogue != "gated":
        return [quantised, *product(linear, out, epilogue)]
    gate_linear, up_linear = segment_of(linear, 0), segment_of(linear, 1)
    assert isinstance(gate_linear, GroupedLinear) and isinstance(up_linear, GroupedLinear)
    return [
        quantised,
        *product(gate_linear, out, "store"),
        *product(up_linear, b.up, "store"),
        gate(device, out, b.up, num_tokens * gate_linear.N, activation),
    ]
