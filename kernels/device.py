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
from numba.cuda import types

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.compilation import ENTRY, is_cached, machine_code
from bitnet_numba.kernels.forms import KernelForm

LEAST_ARCH = 61  # dp4a
KernelArgument = Any  # DeviceArray, None, int or float


def driver_call(name: str, *arguments: Any) -> Any:
    """Calls a driver function and returns its result (a tuple where there are several). Raises BackendError."""
    from cuda.bindings import driver

    status, *results = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"the CUDA driver refused {name}: {status.name}")
    return results[0] if len(results) == 1 else tuple(results)


# ---- The device -----------------------------------------------------------------------------------------------------


class Device:
    """The current CUDA device with its primary context active on this thread."""

    def __init__(self, index: int):
        self._handle = driver_call("cuDeviceGet", index)
        major, minor = (self._attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
        self.arch = 10 * major + minor
        self.multiprocessors = self._attribute("MULTIPROCESSOR_COUNT")
        self.l2_bytes = self._attribute("L2_CACHE_SIZE")
        self.name = driver_call("cuDeviceGetName", 128, self._handle).split(b"\0")[0].decode()
        if self.arch < LEAST_ARCH:
            raise BackendError(
                f"{self.name} has compute capability {self.arch // 10}.{self.arch % 10}; "
                f"{LEAST_ARCH // 10}.{LEAST_ARCH % 10} is the least (dp4a)"
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


# ---- Kernels ---------------------------------------------------------------------------------------------------------


_loaded: dict[Any, Any] = {}


OVERLAP_ARCH = 90  # the first that starts a launch before the one before has ended


def _key(form: KernelForm, device: Device) -> tuple:
    return (form.name, form.signature, form.threads, form.blocks_per_sm, device.arch)


def load_kernel(form: KernelForm, device: Device) -> Any:
    """A KernelForm as a driver function, compiled and loaded once."""
    key = _key(form, device)
    if key not in _loaded:
        cubin, _ = machine_code(form, device.arch)
        module = driver_call("cuModuleLoadData", cubin)
        function = driver_call("cuModuleGetFunction", module, ENTRY.encode())
        attributes = {"MAX_DYNAMIC_SHARED_SIZE_BYTES": form.shared} if form.shared else {}
        if device.arch >= OVERLAP_ARCH:  # for launches that overlap; others keep the driver's choice
            attributes["PREFERRED_SHARED_MEMORY_CARVEOUT"] = form.carveout
        for attribute, value in attributes.items():
            driver_call("cuFuncSetAttribute", function, _enum("CUfunction_attribute", attribute), value)
        # The module is kept too: functions die with it.
        _loaded[key] = (function, module)
    return _loaded[key][0]


def load_kernels(forms: Sequence[KernelForm], device: Device, progress: Callable[[int, int], None]) -> None:
    """Loads forms; those not in the disk cache are compiled first, with `progress(done, total)` as it goes."""
    missing = [form for form in forms if _key(form, device) not in _loaded and not is_cached(form, device.arch)]
    for done, form in enumerate(missing):
        progress(done, len(missing))
        machine_code(form, device.arch)
    if missing:
        progress(len(missing), len(missing))
    for form in forms:
        load_kernel(form, device)


# ---- Launches -------------------------------------------------------------------------------------------------------


class Launch:
    """A kernel with its arguments, ready to go: calling it with a stream costs a few microseconds of host time."""

    def __init__(
        self,
        form: KernelForm,
        grid: int | tuple[int, int],
        arguments: Sequence[KernelArgument],
        device: Device,
        overlap: bool = True,
    ):
        """`overlap`: may start before the launch before it has ended (the kernel must have a grid_wait)."""
        from cuda.bindings import driver

        if len(arguments) != len(form.signature):
            raise ValueError(f"{form.name} takes {len(form.signature)} arguments, not {len(arguments)}")
        self.name = form.name
        self._function = load_kernel(form, device)
        self._values = [value for kind, a in zip(form.signature, arguments, strict=True) for value in _pack(kind, a)]
        self._pointers = (ctypes.c_void_p * len(self._values))(*(ctypes.addressof(value) for value in self._values))
        self._parameters = ctypes.addressof(self._pointers)
        self._keep = list(arguments)
        self._config = config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY = grid if isinstance(grid, tuple) else (grid, 1)
        config.gridDimZ = 1
        config.blockDimX, config.blockDimY, config.blockDimZ = form.threads, 1, 1
        config.sharedMemBytes = form.shared
        attributes = []
        if overlap and device.arch >= OVERLAP_ARCH:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        if form.cluster > 1:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster = attributes[-1].value.clusterDim
            cluster.x, cluster.y, cluster.z = 1, form.cluster, 1
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        self._launch = driver.cuLaunchKernelEx

    def __call__(self, stream: Any) -> None:
        """Enqueues the launch. Raises BackendError."""
        self._config.hStream = stream
        (status,) = self._launch(self._config, self._function, self._parameters, 0)
        if status:
            raise BackendError(f"launching {self.name} failed: {status.name}")


def _pack(kind: Any, value: KernelArgument) -> list[Any]:
    """The machine-level parameters of one kernel argument."""
    if kind == types.none:
        return [ctypes.c_void_p(0)]
    if isinstance(kind, types.CPointer):
        return [ctypes.c_uint64(value if isinstance(value, int) else value.address)]
    if isinstance(kind, types.Array):  # meminfo, parent, items, bytes an item, data, shape, strides
        size = value.dtype.itemsize
        numbers = (0, 0, value.size, size, value.address, value.size, size)
        return [ctypes.c_int64(number) for number in numbers]
    scalars = {types.int32: ctypes.c_int32, types.float32: ctypes.c_float, types.int64: ctypes.c_int64}
    return [scalars[kind](value)]


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

    def capture(self, launches: Sequence[Launch]) -> "Graph":
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
