"""The CUDA device: is there a usable one, memory, loaded kernels, launches, graphs.

Kernels run through the driver's own interface, `cuda.bindings`, not through Numba's launcher: so a launch is prepared
once and costs a few microseconds, takes raw pointers, and programmatic dependent launch and graphs are at hand.
Importing this module touches no device.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.runtime.spec import ArchSpec

MIN_ARCH = 61  # dp4a


def driver_call(name: str, *arguments: Any) -> Any:
    """Calls a driver function and returns its result (a tuple where there are several). Raises BackendError."""
    from cuda.bindings import driver

    status, *results = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"the CUDA driver refused {name}: {status.name}")
    return results[0] if len(results) == 1 else tuple(results)


# ---- The device -----------------------------------------------------------------------------------------------------


class Device(ArchSpec):
    """The current CUDA device with its primary context active on this thread."""

    def __init__(self, index: int):
        self._handle = driver_call("cuDeviceGet", index)
        major, minor = (self._attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
        self.arch = 10 * major + minor
        self.num_sms = self._attribute("MULTIPROCESSOR_COUNT")
        self.l2_bytes = self._attribute("L2_CACHE_SIZE")
        self.name = driver_call("cuDeviceGetName", 128, self._handle).split(b"\0")[0].decode()
        if self.arch < MIN_ARCH:
            raise BackendError(
                f"{self.name} has compute capability {self.arch // 10}.{self.arch % 10}; "
                f"{MIN_ARCH // 10}.{MIN_ARCH % 10} is the least (dp4a)"
            )
        self._context = driver_call("cuDevicePrimaryCtxRetain", self._handle)
        self.activate()

    def _attribute(self, name: str) -> int:
        from cuda.bindings import driver

        attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(driver_call("cuDeviceGetAttribute", attribute, self._handle))

    def activate(self) -> None:
        """Makes the context current on the calling thread."""
        driver_call("cuCtxSetCurrent", self._context)

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of device memory."""
        free, total = driver_call("cuMemGetInfo")
        return free, total


@cache
def usable_device(index: int = 0) -> Device:
    """The device. Raises BackendError with one line that says why there is none."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise BackendError("the CUDA packages are not installed (pip install 'bitnet-numba[cuda13]')") from None
    try:
        # Resolves the driver library; without one the bindings raise their own error type.
        status, *_ = driver.cuInit(0)
    except Exception:  # noqa: BLE001 - the type differs between versions of the bindings
        raise BackendError("no NVIDIA driver is installed") from None
    if status == driver.CUresult.CUDA_ERROR_NO_DEVICE or not driver_call("cuDeviceGetCount"):
        raise BackendError("no CUDA device is present")
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"the NVIDIA driver does not start: {status.name}")
    return Device(index)


# ---- Memory ---------------------------------------------------------------------------------------------------------


class DeviceArray:
    """A flat array in device memory; freed with `close`, or when nothing refers to it any more."""

    def __init__(self, size: int, dtype: Any, zero: bool = False):
        """Allocates; `zero` fills with zero bytes. Raises BackendError (out of memory)."""
        self.dtype, self.size = np.dtype(dtype), size
        self.nbytes = size * self.dtype.itemsize
        self.address = int(driver_call("cuMemAlloc", max(self.nbytes, 16)))
        if zero:
            driver_call("cuMemsetD8", self.address, 0, self.nbytes)
            driver_call("cuCtxSynchronize")  # our streams do not wait for the default one

    @staticmethod
    def of(host: np.ndarray) -> "DeviceArray":
        """A copy of a host array, flattened."""
        array = DeviceArray(host.size, host.dtype)
        array.write(host)
        return array

    def write(self, host: np.ndarray, start: int = 0) -> None:
        """Copies a host array of the same type to elements start, start + 1, ..."""
        if host.dtype != self.dtype or start + host.size > self.size:
            raise ValueError(f"{host.size} x {host.dtype} do not fit {self.size} x {self.dtype} at {start}")
        host = np.ascontiguousarray(host)
        driver_call("cuMemcpyHtoD", self.address + start * self.dtype.itemsize, host.ctypes.data, host.nbytes)
        driver_call("cuStreamSynchronize", 0)  # the copy from pageable memory may still be on its way

    def read(self) -> np.ndarray:
        """A copy on the host, after all work on the device."""
        host = np.empty(self.size, self.dtype)
        driver_call("cuCtxSynchronize")
        self.read_into(host)
        return host

    def read_into(self, host: np.ndarray) -> None:
        """Copies the first elements to a contiguous host array, as many as it has; their work must have ended."""
        driver_call("cuMemcpyDtoH", host.ctypes.data, self.address, host.nbytes)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        shape = (self.size,)
        return {"shape": shape, "typestr": self.dtype.str, "data": (self.address, False), "version": 3}

    def close(self) -> None:
        """Frees the memory."""
        if self.address:
            driver_call("cuMemFree", self.address)
            self.address = 0

    def __del__(self) -> None:
        try:  # noqa: SIM105 - at exit the driver may be gone already, and contextlib too
            self.close()
        except Exception:  # noqa: BLE001, S110
            pass


class DeviceView(DeviceArray):
    """Part of another array's memory, which must outlive it."""

    def __init__(self, address: int, size: int, dtype: Any):
        self.dtype, self.size, self.address = np.dtype(dtype), size, address
        self.nbytes = size * self.dtype.itemsize

    def close(self) -> None:
        """Nothing: the memory belongs to another."""


class PinnedArray:
    """Page-locked host memory that the device reaches too: `.host` is the NumPy array, `.address` what kernels take."""

    def __init__(self, size: int, dtype: Any):
        self.dtype, self.size = np.dtype(dtype), size
        self._pointer = driver_call("cuMemHostAlloc", size * self.dtype.itemsize, 2)  # 2: mapped for the device
        buffer = (ctypes.c_byte * (size * self.dtype.itemsize)).from_address(int(self._pointer))
        self.host = np.frombuffer(buffer, self.dtype)
        self.address = int(driver_call("cuMemHostGetDevicePointer", self._pointer, 0))

    def close(self) -> None:
        """Frees the memory; `.host` must not be used any more."""
        if self.address:
            driver_call("cuMemFreeHost", self._pointer)
            self.address = 0


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
        driver_call("cuStreamBeginCapture", self.handle, _enum("CUstreamCaptureMode", "THREAD_LOCAL"))
        try:
            for launch in launches:
                launch(self.handle)
        finally:
            graph = driver_call("cuStreamEndCapture", self.handle)
        return Graph(graph)


class Uploads:
    """Small writes to device memory in the order of a stream's work, by way of a ring of page-locked memory."""

    def __init__(self, stream: Stream, size: int = 1 << 22):
        self._stream, self._size, self._next = stream, size, 0
        self._ring = PinnedArray(size, np.uint8)

    def write(self, array: DeviceArray, values: Any, start: int = 0) -> None:
        """Enqueues the copy of values, of the array's type, to elements start, start + 1, ..."""
        data = np.ascontiguousarray(values, array.dtype).reshape(-1)
        if start + data.size > array.size or data.nbytes > self._size:
            raise ValueError(f"{data.size} elements do not fit {array.size} from {start} on")
        if self._next + data.nbytes > self._size:
            self._stream.synchronize()  # every copy out of the ring has been made
            self._next = 0
        self._ring.host[self._next : self._next + data.nbytes] = data.view(np.uint8)
        address = array.address + start * array.dtype.itemsize
        self._stream.upload(address, self._ring, data.nbytes, self._next)
        self._next += -(-data.nbytes // 16) * 16

    def close(self) -> None:
        """Frees the ring."""
        self._ring.close()


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


def _enum(kind: str, member: str) -> Any:
    from cuda.bindings import driver

    return next(value for value in getattr(driver, kind) if value.name.endswith(member))
