"""TODO docstring."""

import threading
from collections.abc import Callable
from typing import Any

from numba import cuda

from bitnet_numba.kernels.ptx.base import SIMULATED, WARP, device_function, float32, int32
from bitnet_numba.kernels.ptx.memory import _atomic_lock

# ---- Exchange inside a warp -----------------------------------------------------------------------------------------


class _SimulatedWarp:
    """The meeting point of a simulated warp's 32 threads, kept on the block that they run in."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(WARP, timeout=60)
        self.values: list[Any] = [None] * WARP


def _exchange(value: Any, source: Callable[[int], int]) -> Any:
    thread: Any = threading.current_thread()
    if hasattr(thread, "exchange_in_warp"):  # the tests' own scheduler (tests/simulator.py)
        return thread.exchange_in_warp(value, source)
    warp, lane = divmod(thread.thread_id, WARP)
    with _atomic_lock:
        warps = thread._manager.__dict__.setdefault("warps", {})
        meeting = warps.setdefault(warp, _SimulatedWarp())
    meeting.values[lane] = value
    meeting.barrier.wait()
    result = meeting.values[source(lane)]
    meeting.barrier.wait()  # nobody writes the next value before all have read this one
    return result


if SIMULATED:

    def shuffle_xor(value: Any, mask: Any) -> Any:
        """The value of lane `lane ^ mask`. Any architecture."""
        return _exchange(value, lambda lane: lane ^ int(mask))

    def shuffle(value: Any, source: Any) -> Any:
        """The value of lane `source`. Any architecture."""
        return _exchange(value, lambda lane: int(source))

else:
    _ALL_LANES = 0xFFFFFFFF

    @device_function
    def shuffle_xor(value: Any, mask: Any) -> Any:
        return cuda.shfl_xor_sync(_ALL_LANES, value, mask)

    @device_function
    def shuffle(value: Any, source: Any) -> Any:
        return cuda.shfl_sync(_ALL_LANES, value, source)

# The butterfly leaves the same value, to the bit, in every lane: each step adds the same pair in both orders.


@device_function
def warp_sum(x: Any) -> Any:
    """The sum of float32 x over the warp, in every lane."""
    for step in range(5):
        x = float32(x + shuffle_xor(x, 1 << step))
    return x


@device_function
def warp_max(x: Any) -> Any:
    """The largest x, float32 or int32, of the warp, in every lane."""
    for step in range(5):
        x = max(x, shuffle_xor(x, 1 << step))
    return x


@device_function
def warp_sum_int(x: Any) -> Any:
    """The sum of int32 x over the warp, in every lane."""
    for step in range(5):
        x = int32(x + shuffle_xor(x, 1 << step))
    return x
