"""Calls into the CUDA driver, and its streams, graphs and events.

Kernels are launched through `cuda.bindings`, not through Numba: a launch is prepared once and then costs a few
microseconds, arguments are raw addresses, and PDL, clusters and graphs are at hand. Importing this touches no device.
"""

import contextlib
import ctypes
import sys
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

from bitnet_numba.errors import BackendError

if TYPE_CHECKING:
    from bitnet_numba.kernels.runtime.memory import PinnedArray


# Of `Pace`: how long before an event is due polling begins, in seconds and as a share of what is between two; how long
# it goes on beyond that; the longest sleep; how late the driver wakes who sleeps; how fast a distance may grow; from
# which distance on there was a pause.
EARLY, EARLY_SHARE, POLL, NAP, WOKEN_LATE, GROWTH, PAUSE = 40e-6, 0.03, 100e-6, 500e-6, 80e-6, 1.1, 0.2
# Of prctl, and ns: Linux lets a thread sleep 50 us longer unless it asks for less.
SET_TIMER_SLACK, GET_TIMER_SLACK, SLACK = 29, 30, 1000


def driver_call(name: str, *arguments: Any) -> Any:
    """Calls a driver function and returns its result (a tuple of several). Raises BackendError."""
    from cuda.bindings import driver

    status, *results = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"the CUDA driver refused {name}: {status.name}")
    return results[0] if len(results) == 1 else tuple(results)


def enum_member(kind: str, suffix: str) -> Any:
    """The member of a driver enum whose name ends so, e.g. ("CUstreamCaptureMode", "THREAD_LOCAL")."""
    from cuda.bindings import driver

    return next(member for member in getattr(driver, kind) if member.name.endswith(suffix))


def stream_handle(stream: Any) -> Any:
    """The handle of a stream, as the driver takes it: an int, or a CUstream unchanged.

    stream: None (the legacy default stream), a handle, or an object with `__cuda_stream__()` (`Stream`, Numba,
    cuda.core: returns a protocol version and a handle), `cuda_stream` (PyTorch) or `ptr` (CuPy). Raises ValueError for
    anything else.
    """
    if isinstance(stream, int):
        return stream
    if stream is None:
        return 0
    from cuda.bindings import driver

    if isinstance(stream, driver.CUstream):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        _, handle = stream.__cuda_stream__()
        return int(handle)
    for attribute in ("cuda_stream", "ptr"):
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    raise ValueError(f"expected a CUDA stream, not {type(stream).__name__}")


class Stream:
    """A queue of device work; it does not wait for the default stream."""

    def __init__(self) -> None:
        self.handle = driver_call("cuStreamCreate", 1)  # 1: CU_STREAM_NON_BLOCKING

    def __cuda_stream__(self) -> tuple[int, int]:
        """The stream protocol: (version, handle)."""
        return 0, int(self.handle)

    def synchronize(self) -> None:
        """Waits for all work in it. Raises BackendError if a kernel failed."""
        driver_call("cuStreamSynchronize", self.handle)

    def upload(self, address: int, source: "PinnedArray", nbytes: int, start: int = 0) -> None:
        """Enqueues a copy of page-locked memory from byte `start` on. The source must not change before it is done."""
        driver_call("cuMemcpyHtoDAsync", address, source.host.ctypes.data + start, nbytes, self.handle)

    def download(self, target: "PinnedArray", start: int, address: int, nbytes: int) -> None:
        """Enqueues a copy to page-locked memory, to byte `start` and on."""
        driver_call("cuMemcpyDtoHAsync", target.host.ctypes.data + start, address, nbytes, self.handle)

    def capture(self, launches: Sequence[Callable[[Any], None]]) -> "Graph":
        """A graph of the launches, one after the other."""
        driver_call("cuStreamBeginCapture", self.handle, enum_member("CUstreamCaptureMode", "THREAD_LOCAL"))
        try:
            for launch in launches:
                launch(self.handle)
        finally:
            graph = driver_call("cuStreamEndCapture", self.handle)
        return Graph(graph)


class Graph:
    """Captured launches that are replayed as one."""

    def __init__(self, graph: Any):
        """Takes a CUgraph, which it destroys."""
        self._executable: Any = driver_call("cuGraphInstantiate", graph, 0)
        driver_call("cuGraphDestroy", graph)

    def replay(self, stream: Stream) -> None:
        """Enqueues all of its launches."""
        driver_call("cuGraphLaunch", self._executable, stream.handle)

    def close(self) -> None:
        """Frees it."""
        if self._executable is not None:
            driver_call("cuGraphExecDestroy", self._executable)
            self._executable = None

    def __del__(self) -> None:
        try:  # noqa: SIM105 - at exit the driver may be gone already, and contextlib too
            self.close()
        except Exception:  # noqa: BLE001, S110
            pass


class Event:
    """A point in a stream's work that the host can wait for, and that time is measured between."""

    def __init__(self, timing: bool = True):
        """timing: time is measured, and waiting takes a core; else the host sleeps while it waits."""
        # CU_EVENT_DEFAULT, or CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING
        self.handle = driver_call("cuEventCreate", 0 if timing else 1 | 2)

    def record(self, stream: Stream) -> None:
        """Marks the point after all work enqueued so far."""
        driver_call("cuEventRecord", self.handle, stream.handle)

    def wait(self) -> None:
        """Blocks the host until the point is reached."""
        driver_call("cuEventSynchronize", self.handle)

    def reached(self) -> bool:
        """Whether the point is reached. Raises BackendError if a kernel failed."""
        return _is_done("cuEventQuery", self.handle)

    def microseconds_since(self, earlier: "Event") -> float:
        """Device time since another event; both must have been reached."""
        return 1000.0 * driver_call("cuEventElapsedTime", earlier.handle, self.handle)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - as of Graph
            driver_call("cuEventDestroy", self.handle)
        except Exception:  # noqa: BLE001, S110
            pass


def _is_done(query: str, handle: Any) -> bool:
    from cuda.bindings import driver

    (status,) = getattr(driver, query)(handle)
    if status not in (driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_NOT_READY):
        raise BackendError(f"a kernel failed: {status.name}")
    return bool(status == driver.CUresult.CUDA_SUCCESS)


@cache
def _prctl() -> Callable[[int, int], int]:
    """Linux's call of this name, which returns -1 where a sandbox forbids it; elsewhere, what does nothing."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            prctl = ctypes.PyDLL(None).prctl  # holds Python's lock, for so short a call
            prctl.argtypes = (ctypes.c_int, ctypes.c_ulong)
            return prctl
    return lambda option, value: 0


def sleep_exactly(seconds: float) -> None:
    """Sleeps 5 us too long, as a rule, where `time.sleep` sleeps 60 too long."""
    prctl = _prctl()
    before = prctl(GET_TIMER_SLACK, 0)
    changed = before > 0 and prctl(SET_TIMER_SLACK, SLACK) == 0  # 0: of a real-time thread, which has none
    try:
        sleep(seconds)
    finally:
        if changed:
            prctl(SET_TIMER_SLACK, before)


class Pace:
    """Waits for events that are reached at distances like those before, such as the ends of steps; for one thread.

    Who sleeps until the driver wakes it is told 60 to 100 us late, and who polls takes a core. So this sleeps until
    shortly before an event is due, judged by those before it, and then polls; not for long, in case it comes late.
    """

    def __init__(self) -> None:
        self._last: float | None = None  # when the last event that was waited for was reached; None: unknown
        # Seconds from the event before to one of a kind, the shorter if they differ
        self._distances: dict[Hashable, float] = {}

    def wait(self, event: Event, kind: Hashable = None) -> None:
        """Blocks the host until the event is reached. kind: of the work between it and the event waited for before."""
        distance = self._distances.get(kind, 0.0)
        if event.reached():  # nobody knows how long ago
            if self._last is not None:
                self._last = min(perf_counter(), self._last + distance) if distance else None
            return
        early = EARLY + EARLY_SHARE * distance
        due = 0.0 if self._last is None else self._last + distance - early
        while (left := due - perf_counter()) > 0:
            sleep_exactly(min(left, NAP))
            if event.reached():
                self._last, self._distances[kind] = None, distance / 2
                return
        until, late = perf_counter() + 2 * early + POLL, 0.0
        while not event.reached():
            if perf_counter() > until:
                event.wait()
                late = WOKEN_LATE
                break
        now = perf_counter() - late
        if self._last is not None and (measured := now - self._last) < PAUSE:
            self._distances[kind] = min(measured, GROWTH * distance or measured)
        self._last = now
