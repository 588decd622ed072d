"""What launchers are given: a GPU (`CudaDevice`), or one that only records what would run (`DryRunDevice`)."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.ptx.tma import Boxes
from bitnet_numba.kernels.runtime.driver import driver_call
from bitnet_numba.kernels.runtime.launch import KernelArgument, Launch, PreparedLaunch
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView
from bitnet_numba.kernels.runtime.spec import ArchSpec, KernelSpec
from bitnet_numba.kernels.runtime.tensor_map import tensor_map

MIN_ARCH = 61  # the first with dp4a


class Device(ArchSpec):
    """An architecture with memory and launches: all that launchers know of a device. Tests implement it too."""

    def empty(self, size: int, dtype: Any) -> DeviceArray:
        """A new flat array, not initialised. Raises BackendError (out of memory)."""
        raise NotImplementedError

    def zeros(self, size: int, dtype: Any) -> DeviceArray:
        """A new flat array of zeros. Raises BackendError (out of memory)."""
        raise NotImplementedError

    def array(self, host: np.ndarray) -> DeviceArray:
        """A copy of a host array, flattened. Raises BackendError (out of memory)."""
        raise NotImplementedError

    def tensor_map(self, array: DeviceArray, boxes: Boxes) -> Any:
        """What `ptx.tma_load_2d` or `tma_load_3d` take for an array of two or three dimensions. It is valid as long as
        the array."""
        raise NotImplementedError

    def launch(
        self,
        spec: KernelSpec,
        grid: int | tuple[int, int],
        arguments: Sequence[KernelArgument],
        use_pdl: bool = True,
    ) -> Launch:
        """A kernel with its arguments, ready to be enqueued on a stream.

        grid: blocks along x, or (x, y). arguments: one for each type of the spec's signature; arrays or addresses for
        pointers, None, tensor maps, int or float. `use_pdl`: it may start before the launch before it has ended, and
        waits for that by `ptx.pdl_wait`; ignored before sm_90. Raises ValueError for a wrong number of arguments,
        BackendError if the kernel cannot be compiled or loaded.
        """
        raise NotImplementedError


class CudaDevice(Device):
    """An NVIDIA GPU, by its primary context. See `usable_device`."""

    def __init__(self, index: int):
        """Makes the context current on this thread. Raises BackendError if the GPU is too old."""
        self._handle = driver_call("cuDeviceGet", index)
        major, minor = (self._attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
        self.arch = 10 * major + minor
        self.num_sms = self._attribute("MULTIPROCESSOR_COUNT")
        self.l2_bytes = self._attribute("L2_CACHE_SIZE")
        self.name = driver_call("cuDeviceGetName", 128, self._handle).split(b"\0")[0].decode()
        if self.arch < MIN_ARCH:
            raise BackendError(
                f"{self.name} has compute capability {self.arch // 10}.{self.arch % 10}; "
                f"at least {MIN_ARCH // 10}.{MIN_ARCH % 10} is needed (dp4a)"
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

    def empty(self, size: int, dtype: Any) -> DeviceArray:
        return DeviceArray(size, dtype)

    def zeros(self, size: int, dtype: Any) -> DeviceArray:
        return DeviceArray(size, dtype, zero=True)

    def array(self, host: np.ndarray) -> DeviceArray:
        return DeviceArray.of(host)

    def tensor_map(self, array: DeviceArray, boxes: Boxes) -> Any:
        return tensor_map(array.address, boxes)

    def launch(
        self,
        spec: KernelSpec,
        grid: int | tuple[int, int],
        arguments: Sequence[KernelArgument],
        use_pdl: bool = True,
    ) -> Launch:
        return PreparedLaunch(spec, grid, arguments, self.arch, use_pdl)


class DryRunDevice(Device):
    """A device for dry runs: arrays have sizes and no memory, and launches record which kernels they need."""

    def __init__(self, arch: int, num_sms: int):
        super().__init__(arch, num_sms)
        self._specs: dict[str, KernelSpec] = {}

    @property
    def specs(self) -> list[KernelSpec]:
        """The kernels of all launches so far, each once, in the order of their first launch."""
        return list(self._specs.values())

    def empty(self, size: int, dtype: Any) -> DeviceArray:
        return DeviceView(0, size, dtype)

    def zeros(self, size: int, dtype: Any) -> DeviceArray:
        return DeviceView(0, size, dtype)

    def array(self, host: np.ndarray) -> DeviceArray:
        return DeviceView(0, host.size, host.dtype)

    def tensor_map(self, array: DeviceArray, boxes: Boxes) -> Any:
        return DeviceView(0, 16, np.uint64)

    def launch(
        self,
        spec: KernelSpec,
        grid: int | tuple[int, int],
        arguments: Sequence[KernelArgument],
        use_pdl: bool = True,
    ) -> Launch:
        self._specs.setdefault(spec.name, spec)
        return Launch(spec, arguments)


@cache
def usable_device(index: int = 0) -> CudaDevice:
    """The GPU of that index. Raises BackendError with one line that says why there is none."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise BackendError("the CUDA packages are not installed (pip install 'bitnet-numba[cuda13]')") from None
    try:
        # Resolves the driver library; without one the bindings raise their own error type.
        status, *_ = driver.cuInit(0)
    except Exception:  # noqa: BLE001 - the type differs between versions of the bindings
        raise BackendError("no NVIDIA driver is installed") from None
    if status not in (driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_NO_DEVICE):
        raise BackendError(f"the NVIDIA driver does not start: {status.name}")
    if status == driver.CUresult.CUDA_ERROR_NO_DEVICE or not driver_call("cuDeviceGetCount"):
        raise BackendError("no CUDA device is present")
    return CudaDevice(index)
