"""The types that keys and values can have in the cache, and the device functions that depend on them.

    float16     11 bits of mantissa; a key or value beyond 65504 is stored as NaN
    bfloat16    8 bits, float32's range

NaN in the cache makes every output of attention that it goes into infinite or NaN (see `parts.finite_or_inf`), and from
there on all that the token computes, up to its logits: the sampler then gives NAN_TOKEN in place of a token. So a value
that does not fit is noticed without anybody looking for it.

Tensor cores multiply 16-bit numbers, but queries and the softmax's weights are float32: each goes in as a sum of terms
of the cache's type, each the rounded rest of those before it. Three of bfloat16 hold all 24 bits; two of float16 hold
22, of numbers under 2^-3 down to a step of 2^-25. A query beyond 65504 becomes infinite, then NaN.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import device_function, float32

KVDtype = Literal["float16", "bfloat16"]
KV_DTYPES: tuple[KVDtype, ...] = ("float16", "bfloat16")
KV_BYTES: dict[KVDtype, int] = {"float16": 2, "bfloat16": 2}  # of a number
DEFAULT: KVDtype = "float16"
F16_LIMIT = float32(65520)  # from here on rounding to float16 gives infinity
NAN = float32(np.nan)


class HalfFunctions(NamedTuple):
    """Device functions of a 16-bit type. A word holds two numbers, the first in its lower half."""

    name: Literal["bf16", "f16"]  # as instructions call it
    terms: int  # of which a float32 is a sum in the kernels of one token
    pack: Callable[..., Any]  # (x0, x1): two float32, rounded, as a word; sm_80
    low: Callable[..., Any]  # (word): its lower number as float32
    high: Callable[..., Any]
    rounded: Callable[..., Any]  # (x): float32 as the cache will have it
    join: Callable[..., Any]  # (x0, x1): two `rounded` as a word
    stored: Callable[..., Any]  # (x0, x1): two float32 as a word of the cache
    mma: Callable[..., Any]  # see `ptx.mma_bf16`
    mma_into: Callable[..., Any]  # (acc_r, n, a0 .. a3, b0, b1): acc_r[n .. n + 3] += A . B


@device_function
def _fitting_f16(x):
    """NaN for what float16 cannot hold."""
    return x if abs(x) < F16_LIMIT else NAN


@device_function
def _rounded_f16(x):
    return ptx.f16_low(ptx.join_f16(_fitting_f16(x), float32(0)))


@device_function
def _stored_f16(x0, x1):
    return ptx.join_f16(_fitting_f16(x0), _fitting_f16(x1))


@device_function
def _stored_bf16(x0, x1):
    return ptx.join_bf16(ptx.to_bf16(x0), ptx.to_bf16(x1))


def _mma_into(mma: Callable[..., Any]) -> Callable[..., Any]:
    @device_function
    def mma_into(acc_r, n, a0, a1, a2, a3, b0, b1):
        acc_r[n], acc_r[n + 1], acc_r[n + 2], acc_r[n + 3] = mma(
            a0, a1, a2, a3, b0, b1, acc_r[n], acc_r[n + 1], acc_r[n + 2], acc_r[n + 3]
        )

    return mma_into


@cache
def half_functions(dtype: KVDtype) -> HalfFunctions:
    """Those of a type of two bytes."""
    if dtype == "float16":
        return HalfFunctions(
            "f16", 2, ptx.pack_f16x2, ptx.f16_low, ptx.f16_high, _rounded_f16, ptx.join_f16, _stored_f16,
            ptx.mma_f16, _mma_into(ptx.mma_f16),
        )  # fmt: skip
    return HalfFunctions(
        "bf16", 3, ptx.pack_bf16x2, ptx.bf16_low, ptx.bf16_high, ptx.to_bf16, ptx.join_bf16, _stored_bf16,
        ptx.mma_bf16, _mma_into(ptx.mma_bf16),
    )  # fmt: skip
