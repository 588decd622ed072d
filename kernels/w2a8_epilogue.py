"""What the W2A8 products of many tokens do with a finished int32 sum: one definition for all their kernels.

The float operations and their order are those of w2a8_gemv.py, so that results are equal to the bit.
"""

import math
from collections.abc import Callable
from typing import Any

from bitnet_numba.kernels.intrinsics import (
    add_rn,
    device_function,
    div_rn,
    float32,
    int32,
    int_to_float,
    mul_rn,
)
from bitnet_numba.packing import CODE_OFFSET

EPILOGUES = ("acc", "store", "residual", "gated")


def make_epilogue(epilogue: str, activation: str) -> Callable[..., Any]:
    """`finish(sum, sum2, total, scale, scale2, s, bias, n, rows, old)`: what is written for row n of one token.

    sum: of codes times activations, int32; sum2: that of row n + rows, for "gated"; total: the activations' sum; s: the
    token's scale; old: what the output held, for "residual". "acc": the int32 sum of weights times activations.
    """
    GATED, RESIDUAL, ACC, RELU2 = epilogue == "gated", epilogue == "residual", epilogue == "acc", activation == "relu2"
    ZERO, ONE = float32(0), float32(1)

    @device_function
    def finish(sum_, sum2, total, scale, scale2, s, bias, n, rows, old):
        offset = int32(CODE_OFFSET * total)
        if ACC:
            return int32(sum_ - offset)
        y = div_rn(mul_rn(int_to_float(int32(sum_ - offset)), scale), s)
        if bias is not None:
            y = add_rn(y, bias[n])
        if GATED:
            z = div_rn(mul_rn(int_to_float(int32(sum2 - offset)), scale2), s)
            if bias is not None:
                z = add_rn(z, bias[rows + n])
            if RELU2:
                y = max(y, ZERO)
                y = mul_rn(mul_rn(y, y), z)
            else:
                y = mul_rn(div_rn(y, add_rn(ONE, math.exp(-y))), z)
        if RESIDUAL:
            y = add_rn(old, y)
        return y

    return finish
