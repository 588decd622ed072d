"""Flat arrays in device memory and in page-locked host memory, and small uploads in a stream's order."""

import ctypes
import math
from typing import Any

import numpy as np

from bitnet_numba.kernels.runtime.driver import Event, Stream, driver_call


class DeviceArray:
    """A flat array in device memory, freed by `close` or with its last reference. Another library can read it by
    `__cuda_array_interface__`."""

    def __init__(self, size: int, dtype: Any, zero: bool = False):
        """Allocates, and with `zero` fills with zero bytes. Raises BackendError (out of memory)."""
        self.dtype, self.size = np.dtype(dtype), size
        self.nbytes = size * self.dtype.itemsize
        self.address = int(driver_call("cuMemAlloc", max(self.nbytes, 16)))
        if zero:
            driver_call("cuMemsetD8", self.address, 0, self.nbytes)
            driver_call("cuCtxSynchronize")  # a Stream does not wait for the default stream

    @staticmethod
    def of(host: np.ndarray) -> "DeviceArray":
        """A copy of a host array, flattened."""
        array = DeviceArray(host.size, host.dtype)
        array.write(host)
        return array

    def write(self, host: np.ndarray, start: int = 0) -> None:
        """Copies a host array of the same dtype to elements start, start + 1, ... Raises ValueError if it does not
        fit."""
        if host.dtype != self.dtype or start + host.size > self.size:
            raise ValueError(f"{host.size} x {host.dtype} do not fit {self.size} x {self.dtype} at {start}")
        host = np.ascontiguousarray(host)
        driver_call("cuMemcpyHtoD", self.address + start * self.dtype.itemsize, host.ctypes.data, host.nbytes)
        driver_call("cuStreamSynchronize", 0)  # pageable memory may still be in flight

    def read(self) -> np.ndarray:
        """A copy on the host, made after all work on the device."""
        host = np.empty(self.size, self.dtype)
        driver_call("cuCtxSynchronize")
        self.read_into(host)
        return host

    def read_into(self, host: np.ndarray) -> None:
        """Copies as many of the first elements as a contiguous host array has. The work that writes them must have
        ended."""
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
    """An array over memory that belongs to another, which must outlive it."""

    owner: Any = None  # kept alive by this

    def __init__(self, address: int, size: int, dtype: Any):
        self.dtype, self.size, self.address = np.dtype(dtype), size, address
        self.nbytes = size * self.dtype.itemsize

    def close(self) -> None:
        """Does nothing: the owner frees the memory."""


def as_device_array(array: Any) -> DeviceArray:
    """A DeviceArray over an array with `__cuda_array_interface__` (CuPy, PyTorch, Numba), flattened, which it keeps
    alive; a DeviceArray as it is.

    Nothing is copied. Whether the memory is read-only and the interface's `stream` are not looked at: the caller knows
    what is written, and in what order. Raises ValueError unless the elements are contiguous in C order.
    """
    if isinstance(array, DeviceArray):
        return array
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        raise ValueError(f"expected an array in device memory, not {type(array).__name__}")
    dtype, shape, strides = np.dtype(interface["typestr"]), tuple(interface["shape"]), interface.get("strides")
    size = math.prod(shape)
    if strides is not None and size:  # None: contiguous. Without elements, or along one, strides mean nothing.
        contiguous = [dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        if any(n > 1 and have != want for n, have, want in zip(shape, strides, contiguous, strict=True)):
            raise ValueError(f"an array of shape {shape} and strides {tuple(strides)} is not contiguous")
    view = DeviceView(interface["data"][0] or 0, size, dtype)
    view.owner = array
    return view


class PinnedArray:
    """Page-locked host memory that kernels can access too: `.host` is a NumPy array, `.address` what kernels take."""

    def __init__(self, size: int, dtype: Any):
        self.dtype, self.size = np.dtype(dtype), size
        self._pointer = driver_call("cuMemHostAlloc", size * self.dtype.itemsize, 2)  # 2: CU_MEMHOSTALLOC_DEVICEMAP
        buffer = (ctypes.c_byte * (size * self.dtype.itemsize)).from_address(int(self._pointer))
        self.host = np.frombuffer(buffer, self.dtype)
        self.address = int(driver_call("cuMemHostGetDevicePointer", self._pointer, 0))

    def close(self) -> None:
        """Frees the memory; `.host` must not be used afterwards."""
        if self.address:
            driver_call("cuMemFreeHost", self._pointer)
            self.address = 0


class Uploads:
    """Small writes to device memory, enqueued on a stream, from two pieces of page-locked memory in turns."""

    def __init__(self, stream: Stream, size: int = 1 << 21):
        """size: bytes of a piece, at least that of the largest write."""
        self._stream, self._size, self._next = stream, size, 0
        self._pieces = [PinnedArray(size, np.uint8) for _ in range(2)]
        self._copied = [Event(timing=False) for _ in range(2)]  # when all copies from a piece have been made

    def write(self, array: DeviceArray, values: Any, start: int = 0) -> None:
        """Enqueues the copy of values, converted to the array's dtype, to elements start, start + 1, ... Raises
        ValueError if they do not fit the array or a piece."""
        data = np.ascontiguousarray(values, array.dtype).reshape(-1)
        if start + data.size > array.size:
            raise ValueError(f"{data.size} x {array.dtype} do not fit {array.size} x {array.dtype} at {start}")
        if data.nbytes > self._size:
            raise ValueError(f"{data.nbytes} bytes do not fit a piece of {self._size}")
        if self._next + data.nbytes > self._size:
            self._turn()
        piece = self._pieces[0]
        piece.host[self._next : self._next + data.nbytes] = data.view(np.uint8)
        address = array.address + start * array.dtype.itemsize
        self._stream.upload(address, piece, data.nbytes, self._next)
        self._next += -(-data.nbytes // 16) * 16  # aligned

    def _turn(self) -> None:
        """Goes on with the other piece, whose copies were enqueued long ago: the host hardly ever waits for them."""
        self._copied[0].record(self._stream)
        self._pieces.reverse()
        self._copied.reverse()
        self._copied[0].wait()  # not at all the first time, before it is recorded
        self._next = 0

    def close(self) -> None:
        """Frees the memory."""
        for piece in self._pieces:
            piece.close()
