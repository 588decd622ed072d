"""Loading kernels and launching them with prepared arguments."""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from numba.cuda import types

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.runtime.compiler import ENTRY, is_cached, machine_code
from bitnet_numba.kernels.runtime.driver import driver_call, enum_member, stream_handle
from bitnet_numba.kernels.runtime.spec import KernelSpec

KernelArgument = Any  # DeviceArray or other array with .address, tensor map, None, int or float

PDL_ARCH = 90  # the first architecture with programmatic dependent launch

_loaded: dict[tuple, tuple[Any, Any]] = {}  # function and module, by key


class _Known(NamedTuple):
    """What every launch of a spec takes."""

    spec: KernelSpec
    function: Any
    parameters: tuple[Callable[[KernelArgument], Any], ...]  # an argument as the driver takes it


# By identity and architecture: a spec's hash is that of Numba's types, which takes longer than all else of a launch.
# What is here holds the spec, so no other one gets its identity.
_known: dict[tuple[int, int], _Known] = {}


def _key(spec: KernelSpec, arch: int) -> tuple:
    return (spec.name, spec.signature, spec.threads, spec.blocks_per_sm, spec.registers, spec.dynamic_shared, arch)


def load_kernel(spec: KernelSpec, arch: int) -> Any:
    """A spec's driver function, compiled and loaded once. Raises BackendError."""
    key = _key(spec, arch)
    if key not in _loaded:
        cubin, _ = machine_code(spec, arch)
        module = driver_call("cuModuleLoadData", cubin)
        function = driver_call("cuModuleGetFunction", module, ENTRY.encode())
        attributes = {"MAX_DYNAMIC_SHARED_SIZE_BYTES": spec.dynamic_shared} if spec.dynamic_shared else {}
        if arch >= PDL_ARCH:  # kernels overlap (see CARVEOUT); before that, the driver's choice is good
            attributes["PREFERRED_SHARED_MEMORY_CARVEOUT"] = spec.carveout
        for attribute, value in attributes.items():
            driver_call("cuFuncSetAttribute", function, enum_member("CUfunction_attribute", attribute), value)
        # The module is kept too: its functions are lost with it.
        _loaded[key] = (function, module)
    return _loaded[key][0]


def load_kernels(specs: Sequence[KernelSpec], arch: int, progress: Callable[[int, int], None]) -> None:
    """Loads kernels. Those not in the disk cache are compiled first, and `progress(done, total)` counts them. Raises
    BackendError."""
    missing = [spec for spec in specs if _key(spec, arch) not in _loaded and not is_cached(spec, arch)]
    for done, spec in enumerate(missing):
        progress(done, len(missing))
        machine_code(spec, arch)
    if missing:
        progress(len(missing), len(missing))
    for spec in specs:
        load_kernel(spec, arch)


def _know(spec: KernelSpec, arch: int) -> _Known:
    """Loads a spec's function where that has not been done yet. Raises BackendError."""
    known = _known.get((id(spec), arch))
    if known is None:
        parameters = tuple(_parameter(kind) for kind in spec.signature)
        known = _known[id(spec), arch] = _Known(spec, load_kernel(spec, arch), parameters)
    return known


class Launch:
    """A kernel and its arguments. On its own it is a dry run's; see `PreparedLaunch`."""

    def __init__(self, spec: KernelSpec, arguments: Sequence[KernelArgument]):
        """Raises ValueError for a wrong number of arguments."""
        if len(arguments) != len(spec.signature):
            raise ValueError(f"{spec.name} takes {len(spec.signature)} arguments, not {len(arguments)}")
        self.spec, self.arguments = spec, arguments

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.spec.name

    def __call__(self, stream: Any) -> None:
        """Enqueues the launch on a stream: anything that `stream_handle` takes."""
        raise NotImplementedError("a dry run launches nothing")


class PreparedLaunch(Launch):
    """A launch on a GPU: calling it costs a few microseconds of host time."""

    def __init__(
        self,
        spec: KernelSpec,
        grid: int | tuple[int, int],
        arguments: Sequence[KernelArgument],
        arch: int,
        use_pdl: bool = True,
    ):
        """Arguments as of `Device.launch`. Raises BackendError if the kernel cannot be compiled or loaded."""
        from cuda.bindings import driver

        super().__init__(spec, arguments)
        _, self._function, parameters = _know(spec, arch)
        self._values = [parameter(value) for parameter, value in zip(parameters, arguments, strict=True)]
        self._pointers = (ctypes.c_void_p * len(self._values))(*(ctypes.addressof(value) for value in self._values))
        self._parameters = ctypes.addressof(self._pointers)
        self._config = config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY = grid if isinstance(grid, tuple) else (grid, 1)
        config.gridDimZ = 1
        config.blockDimX, config.blockDimY, config.blockDimZ = spec.threads, 1, 1
        config.sharedMemBytes = spec.dynamic_shared
        attributes = _attributes(use_pdl and arch >= PDL_ARCH, spec.cluster)
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        self._launch, self._handle_type = driver.cuLaunchKernelEx, driver.CUstream

    def __call__(self, stream: Any) -> None:
        """Enqueues the launch. Raises BackendError, or ValueError if that is no stream."""
        self._config.hStream = stream if type(stream) is self._handle_type else stream_handle(stream)
        (status,) = self._launch(self._config, self._function, self._parameters, 0)
        if status:
            raise BackendError(f"launching {self.name} failed: {status.name}")


@cache
def _attributes(pdl: bool, cluster: int) -> list[Any]:
    """Of a launch's configuration, which copies them."""
    from cuda.bindings import driver

    attributes = []
    if pdl:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attributes[-1].value.programmaticStreamSerializationAllowed = 1
    if cluster > 1:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimensions = attributes[-1].value.clusterDim
        dimensions.x, dimensions.y, dimensions.z = 1, cluster, 1
    return attributes


def _parameter(kind: Any) -> Callable[[KernelArgument], Any]:
    """What makes an argument of a type into one that the driver takes: Numba passes None as a null pointer."""
    if kind == types.none:
        return lambda value: ctypes.c_void_p(0)
    if isinstance(kind, types.CPointer):
        return lambda value: ctypes.c_uint64(value if isinstance(value, int) else value.address)
    scalars = {types.int32: ctypes.c_int32, types.float32: ctypes.c_float, types.int64: ctypes.c_int64}
    return scalars[kind]
