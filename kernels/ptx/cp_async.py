"""TODO docstring."""

import threading
from collections.abc import Callable
from typing import Any

from bitnet_numba.kernels.ptx.base import instruction

# ---- Asynchronous copies --------------------------------------------------------------------------------------------

# From global to shared memory. A thread's copies since its last commit are a group, and it waits for groups. Under the
# simulator a copy arrives when it is waited for, or at some barrier before (see tests/simulator.py).


@instruction(
    "{ .reg .u64 to; cvta.to.shared.u64 to, $0; cp.async.cg.shared.global [to], [$1], 16, $2; }",
    "",
    "ppr",
    effects=True,
)
def cp_async_16(to: Any, i: Any, source: Any, j: Any, size: Any) -> None:
    """Starts copying 32-bit elements j .. j+3 of global memory to i .. i+3 of a shared array (multiples of 4); `size`
    is 16, or 0 for zeros without reading; the address must lie in the source all the same (`cp_async_16_at`). sm_80."""
    if not 0 <= int(j) <= len(source) - 4:
        raise IndexError(f"a copy from elements {int(j)} .. {int(j) + 3} of {len(source)}")
    thread: Any = threading.current_thread()
    thread.__dict__.setdefault("async_copies", [[]])[-1].append((to, int(i), source, int(j), int(size)))


@instruction("cp.async.commit_group;", "", "", effects=True)
def cp_async_commit() -> None:
    """Ends a group of this thread's copies. sm_80."""
    threading.current_thread().__dict__.setdefault("async_copies", [[]]).append([])


def _cp_async_wait(pending: int) -> Callable:
    @instruction(f"cp.async.wait_group {pending};", "", "", effects=True)
    def wait() -> None:
        groups = threading.current_thread().__dict__.setdefault("async_copies", [[]])
        while len(groups) - 1 > pending:
            for to, i, source, j, size in groups.pop(0):
                to[i : i + 4] = source[j : j + 4] if size else 0

    return wait


_CP_ASYNC_WAITS = [_cp_async_wait(pending) for pending in range(6)]


def cp_async_wait(pending: int) -> Callable:
    """`wait()`: until at most `pending` (0 to 5) of this thread's latest groups have not arrived. sm_80."""
    return _CP_ASYNC_WAITS[pending]
