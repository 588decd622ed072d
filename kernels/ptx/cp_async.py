"""cp.async: 16-byte copies from global to shared memory that run while the thread goes on (sm_80).

A thread's copies since its last commit are a group; it waits for groups, in the order of their commits. What a thread
has waited for is visible to the block after a barrier.

Under the simulator a copy is made at some barrier after its start, or at the latest when its group is waited for (see
tests/kernels/simulator.py), so that a missing wait shows.
"""

from collections.abc import Callable
from typing import Any

from bitnet_numba.kernels.ptx.base import instruction, simulated_thread


@instruction(
    "{ .reg .u64 to; cvta.to.shared.u64 to, $0; cp.async.cg.shared.global [to], [$1], 16, $2; }",
    "",
    "ppr",
    effects=True,
)
def cp_async_16(array: Any, i: Any, source: Any, j: Any, size: Any) -> None:
    """Starts copying 32-bit elements j .. j+3 of global memory to elements i .. i+3 of a shared array (multiples of 4).

    `size` is 16, or 0: then zeros are written and the source is not read, but elements j .. j+3 must lie in it all the
    same, since memory checkers look at the address alone. sm_80.
    """
    if not 0 <= int(j) <= len(source) - 4:
        raise IndexError(f"a copy from elements {int(j)} .. {int(j) + 3} of {len(source)}")
    simulated_thread().async_copies[-1].append((array, int(i), source, int(j), int(size)))


@instruction("cp.async.cg.shared.global [$0], [$1], 16, $2;", "", "srpr", effects=True)
def cp_async_16_at(array: Any, address: Any, source: Any, j: Any, size: Any) -> None:
    """`cp_async_16` to an address in a shared array. sm_80."""
    cp_async_16(array, int(address) // 4, source, j, size)


@instruction("cp.async.commit_group;", "", "", effects=True)
def cp_async_commit() -> None:
    """Ends a group of this thread's copies. sm_80."""
    simulated_thread().async_copies.append([])


def _cp_async_wait(pending: int) -> Callable:
    @instruction(f"cp.async.wait_group {pending};", "", "", effects=True)
    def wait() -> None:
        groups = simulated_thread().async_copies
        while len(groups) - 1 > pending:
            for array, i, source, j, size in groups.pop(0):
                array[i : i + 4] = source[j : j + 4] if size else 0

    return wait


_CP_ASYNC_WAITS = [_cp_async_wait(pending) for pending in range(6)]


def cp_async_wait(pending: int) -> Callable:
    """`wait()`: blocks until at most the latest `pending` (0 to 5) of this thread's groups are under way. sm_80."""
    return _CP_ASYNC_WAITS[pending]
