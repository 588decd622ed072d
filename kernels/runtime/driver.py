"""Calls into the CUDA driver, and what they are made of: streams, graphs, events.

Kernels run through the driver's own interface, `cuda.bindings`, not through Numba's launcher: so a launch is prepared
once and costs a few microseconds, takes raw pointers, and programmatic dependent launch and graphs are at hand.
Importing this module touches no device.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bitnet_numba.errors import BackendError

if TYPE_CHECKING:
    from bitnet_numba.kernels.runtime.memory import PinnedArray


def driver_call(name: str, *arguments: Any) -> Any:
    """Calls a driver function and returns its result (a tuple where there are several). Raises BackendError."""
    from cuda.bindings import driver

    status, *results = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"the CUDA driver refused {name}: {status.name}")
    return results[0] if len(results) == 1 else tuple(results)


class Stream:
    """A queue of device work."""

    def __init__(self) -> None:
        self.handle = driver_call("cuStreamCreate", 1)  # 1: does not wait for the default stream

    def synchronize(self) -> None:
        """Waits for all work in it. Raises BackendError if a kernel failed."""
        driver_call("cuStreamSynchronize", self.handle)

    def idle(self) -> bool:
        """Whether all work in it is done. Raises BackendError if a kernel failed."""
        from cuda.bindings import driver

        (status,) = driver.cuStreamQuery(self.handle)
        if status not in (driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_NOT_READY):
            raise BackendError(f"a kernel failed: {status.name}")
        return status == driver.CUresult.CUDA_SUCCESS

    def upload(self, address: int, source: "PinnedArray", nbytes: int, start: int = 0) -> None:
        """Enqueues a copy of page-locked memory from byte `start` on, which must stay as it is until that is done."""
        driver_call("cuMemcpyHtoDAsync", address, source.host.ctypes.data + start, nbytes, self.handle)

    def download(self, target: "PinnedArray", start: int, address: int, nbytes: int) -> None:
        """Enqueues a copy to page-locked memory, from its byte `start` on."""
        driver_call("cuMemcpyDtoHAsync", target.host.ctypes.data + start, address, nbytes, self.handle)

    def capture(self, launches: Sequence[Callable[[Any], None]]) -> "Graph":
        """The launches, one after the other, as a graph."""
        driver_call("cuStreamBeginCapture", self.handle, enum_member("CUstreamCaptureMode", "THREAD_LOCAL"))
        try:
            for launch in launches:
                launch(self.handle)
        finally:
            graph = driver_call("cuStreamEndCapture", self.handle)
        return Graph(graph)


class Graph:
    """Launches that are replayed as one."""

    def __init__(self, graph: Any):
        self._executable: Any = driver_call("cuGraphInstantiate", graph, 0)
        driver_call("cuGraphDestroy", graph)

    def replay(self, stream: Stream) -> None:
        """Enqueues all of it."""
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
    """A point in a stream that the host can wait for, or measure time between."""

    def __init__(self) -> None:
        self.handle = driver_call("cuEventCreate", 0)

    def record(self, stream: Stream) -> None:
        """Marks the point after all work enqueued so far."""
        driver_call("cuEventRecord", self.handle, stream.handle)

    def wait(self) -> None:
        """Blocks the host until the point is reached."""
        driver_call("cuEventSynchronize", self.handle)

    def microseconds_since(self, earlier: "Event") -> float:
        """Device time between two reached points."""
        return 1000.0 * driver_call("cuEventElapsedTime", earlier.handle, self.handle)


def enum_member(kind: str, member: str) -> Any:
    from cuda.bindings import driver

    return next(value for value in getattr(driver, kind) if value.name.endswith(member))
