"""TODO docstring."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from numba.cuda import types

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.runtime.compiler import ENTRY, is_cached, machine_code
from bitnet_numba.kernels.runtime.driver import Device, _enum, driver_call
from bitnet_numba.kernels.runtime.spec import KernelSpec

KernelArgument = Any  # DeviceArray, None, int or float


# ---- Kernels ---------------------------------------------------------------------------------------------------------


_loaded: dict[Any, Any] = {}


OVERLAP_ARCH = 90  # the first that starts a launch before the one before has ended


def _key(spec: KernelSpec, device: Device) -> tuple:
    return (spec.name, spec.signature, spec.threads, spec.blocks_per_sm, device.arch)


def load_kernel(spec: KernelSpec, device: Device) -> Any:
    """A KernelSpec as a driver function, compiled and loaded once."""
    key = _key(spec, device)
    if key not in _loaded:
        cubin, _ = machine_code(spec, device.arch)
        module = driver_call("cuModuleLoadData", cubin)
        function = driver_call("cuModuleGetFunction", module, ENTRY.encode())
        attributes = {"MAX_DYNAMIC_SHARED_SIZE_BYTES": spec.shared} if spec.shared else {}
        if device.arch >= OVERLAP_ARCH:  # for launches that overlap; others keep the driver's choice
            attributes["PREFERRED_SHARED_MEMORY_CARVEOUT"] = spec.carveout
        for attribute, value in attributes.items():
            driver_call("cuFuncSetAttribute", function, _enum("CUfunction_attribute", attribute), value)
        # The module is kept too: functions die with it.
        _loaded[key] = (function, module)
    return _loaded[key][0]


def load_kernels(specs: Sequence[KernelSpec], device: Device, progress: Callable[[int, int], None]) -> None:
    """Loads forms; those not in the disk cache are compiled first, with `progress(done, total)` as it goes."""
    missing = [spec for spec in specs if _key(spec, device) not in _loaded and not is_cached(spec, device.arch)]
    for done, spec in enumerate(missing):
        progress(done, len(missing))
        machine_code(spec, device.arch)
    if missing:
        progress(len(missing), len(missing))
    for spec in specs:
        load_kernel(spec, device)


# ---- Launches -------------------------------------------------------------------------------------------------------


class Launch:
    """A kernel with its arguments, ready to go: calling it with a stream costs a few microseconds of host time."""

    def __init__(
        self,
        spec: KernelSpec,
        grid: int | tuple[int, int],
        arguments: Sequence[KernelArgument],
        device: Device,
        overlap: bool = True,
    ):
        """`overlap`: may start before the launch before it has ended (the kernel must have a pdl_wait)."""
        from cuda.bindings import driver

        if len(arguments) != len(spec.signature):
            raise ValueError(f"{spec.name} takes {len(spec.signature)} arguments, not {len(arguments)}")
        self.name = spec.name
        self._function = load_kernel(spec, device)
        self._values = [value for kind, a in zip(spec.signature, arguments, strict=True) for value in _pack(kind, a)]
        self._pointers = (ctypes.c_void_p * len(self._values))(*(ctypes.addressof(value) for value in self._values))
        self._parameters = ctypes.addressof(self._pointers)
        self._keep = list(arguments)
        self._config = config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY = grid if isinstance(grid, tuple) else (grid, 1)
        config.gridDimZ = 1
        config.blockDimX, config.blockDimY, config.blockDimZ = spec.threads, 1, 1
        config.sharedMemBytes = spec.shared
        attributes = []
        if overlap and device.arch >= OVERLAP_ARCH:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        if spec.cluster > 1:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster = attributes[-1].value.clusterDim
            cluster.x, cluster.y, cluster.z = 1, spec.cluster, 1
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
