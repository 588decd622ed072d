"""Arrays in device memory and page-locked host memory, and small uploads in the order of a stream's work."""

import ctypes
from typing import Any

import numpy as np

from bitnet_numba.kernels.runtime.driver import Stream, driver_call


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
    """Memory that belongs to another array, which must outlive it: `owner`, where that is held here."""

    owner: Any = None

    def __init__(self, address: int, size: int, dtype: Any):
        self.dtype, self.size, self.address = np.dtype(dtype), size, address
        self.nbytes = size * self.dtype.itemsize

    def close(self) -> None:
        """Nothing: the memory belongs to another."""


def as_device_array(array: Any) -> DeviceArray:
    """A DeviceArray over anything with `__cuda_array_interface__` (CuPy, PyTorch, Numba), flattened; a DeviceArray as
    it is. The result keeps the memory's owner alive. Raises ValueError unless elements lie side by side in C order.
    """
    if isinstance(array, DeviceArray):
        return array
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        raise ValueError(f"expected an array in device memory, not {type(array).__name__}")
    dtype, shape, strides = np.dtype(interface["typestr"]), interface["shape"], interface.get("strides")
    size = 1
    expected: list[int] = []
    for length in reversed(shape):
        expected.insert(0, size * dtype.itemsize)
        size *= length
    if (
        strides is not None
        and size
        and any(n > 1 and have != want for n, have, want in zip(shape, strides, expected, strict=True))
    ):
        raise ValueError(f"an array of shape {tuple(shape)} and strides {tuple(strides)} is not contiguous")
    view = DeviceView(interface["data"][0] or 0, size, dtype)
    view.owner = array
    return view


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
