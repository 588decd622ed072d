"""Exchange of values between the lanes of a warp. Every thread of the warp must take part."""

from collections.abc import Callable
from typing import Any

from numba import cuda

from bitnet_numba.kernels.ptx.base import SIMULATED, device_function, float32, instruction, int32, simulated_thread

if SIMULATED:

    def shuffle_xor(value: Any, mask: Any) -> Any:
        """The value of lane `lane ^ mask`. Any architecture."""
        return simulated_thread().exchange_in_warp(value, lambda lane: lane ^ int(mask))

    def shuffle(value: Any, source: Any) -> Any:
        """The value of lane `source`. Any architecture."""
        return simulated_thread().exchange_in_warp(value, lambda lane: int(source))

else:
    _ALL_LANES = 0xFFFFFFFF

    @device_function
    def shuffle_xor(value: Any, mask: Any) -> Any:
        return cuda.shfl_xor_sync(_ALL_LANES, value, mask)

    @device_function
    def shuffle(value: Any, source: Any) -> Any:
        return cuda.shfl_sync(_ALL_LANES, value, source)


# The butterfly reductions leave the same bits in every lane: each step adds the same pair, in either order.


@device_function
def warp_sum(x: Any) -> Any:
    """The sum of float32 x over the warp, in every lane. Any architecture."""
    for step in range(5):
        x = float32(x + shuffle_xor(x, 1 << step))
    return x


@device_function
def warp_max(x: Any) -> Any:
    """The maximum of x, float32 or int32, over the warp, in every lane. Any architecture."""
    for step in range(5):
        x = max(x, shuffle_xor(x, 1 << step))
    return x


@device_function
def warp_sum_int(x: Any) -> Any:
    """The sum of int32 x over the warp, in every lane. Any architecture."""
    for step in range(5):
        x = int32(x + shuffle_xor(x, 1 << step))
    return x


@instruction("redux.sync.add.s32 $0, $1, 0xffffffff;", "r", "r", effects=True)
def _redux_add(x: Any) -> Any:
    return int32(sum(int(value) for value in simulated_thread().gather_in_warp(x)))


def redux_sum_int(arch: int) -> Callable:
    """`warp_sum_int`, which is one instruction from sm_80 on. Any architecture."""
    return _redux_add if arch >= 80 else warp_sum_int


@instruction("redux.sync.max.s32 $0, $1, 0xffffffff;", "r", "r", effects=True)
def _redux_max(x: Any) -> Any:
    return int32(max(int(value) for value in simulated_thread().gather_in_warp(x)))


def warp_max_int(arch: int) -> Callable:
    """`warp_max` of int32, which is one instruction from sm_80 on. Any architecture."""
    return _redux_max if arch >= 80 else warp_max
