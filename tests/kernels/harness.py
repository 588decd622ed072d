"""What kernel tests share: running a kernel on a GPU or in the simulator, and the checks around a launch.

What is expected of kernel modules
- A kernel is a plain Python function that a factory `make_x(arch, constants...)` builds: constants are closure
  variables, parameters are flat pointers and scalars. `x_spec(...)` makes a KernelSpec of it. Both take block sizes,
  so that simulated blocks can be small.
- variants.py lists the specs that test_machine_code.py compiles for every architecture: no local memory, no spills, at
  least so many dp4a and 16-byte loads.
- Instructions are called as `ptx.name`; in the simulator each is its emulation in plain Python (kernels/ptx/base.py).
- Kernels whose blocks wait for each other take the number of blocks from gridDim, and are simulated with one block: the
  simulator runs one block after the other.

How a kernel test file is built
- a property `check_x(...)` that makes inputs, calls `run(spec, grid, arguments)` and compares with NumPy;
- `@simulated @given(...) def test_simulated_x(...)`: the property on tiny shapes, in Numba's CUDA simulator;
- `@needs_gpu @given(...) def test_x_on_gpu(...)`: the same property at full size.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import types

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.ptx.tma import Boxes, SimulatedTensorMap
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView
from bitnet_numba.kernels.runtime.spec import KernelSpec

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
ROOT = Path(__file__).parent.parent.parent
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
ARCH = 90  # what simulated kernels are built for
GUARD = 64  # elements on each side of an output that must stay unchanged
POISON = 0xA5  # every byte of them, and of an output before the launch


@cache
def why_no_gpu() -> str:
    """One line that says why there is no usable GPU; "" if there is one."""
    if SIMULATED:
        return "this is the simulator"
    from bitnet_numba.kernels.runtime.device import usable_device

    try:
        usable_device()
    except BackendError as error:
        return str(error)
    return ""


def needs_gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test `gpu`, and skips it with the reason where there is none."""
    skip = pytest.mark.skipif(bool(why_no_gpu()), reason=f"needs a GPU: {why_no_gpu()}")
    return pytest.mark.gpu(skip(test))


def arch() -> int:
    """The architecture that kernels of this process run on."""
    if SIMULATED:
        return ARCH
    from bitnet_numba.kernels.runtime.device import usable_device

    return usable_device().arch


def simulated(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test `simulated`: it runs in Numba's CUDA simulator, which must be chosen before Numba is imported."""
    skip = pytest.mark.skipif(not SIMULATED, reason="NUMBA_ENABLE_CUDASIM=1 python -m pytest -m simulated runs these")
    return pytest.mark.simulated(skip(test))


class Out:
    """An output, or with `start` an array that is changed in place, with guard bands on both sides."""

    def __init__(self, size: int, dtype: Any, start: np.ndarray | None = None):
        self.dtype, self.size = np.dtype(dtype), size
        self.buffer = np.full((size + 2 * GUARD) * self.dtype.itemsize, POISON, np.uint8).view(self.dtype)
        if start is not None:
            self.array[...] = start.reshape(-1)

    @property
    def array(self) -> np.ndarray:
        """The part between the guard bands."""
        return self.buffer[GUARD : GUARD + self.size]

    def check_guards(self) -> None:
        """Raises AssertionError if something was written outside the output."""
        bands = np.concatenate([self.buffer[:GUARD], self.buffer[GUARD + self.size :]])
        assert (bands.view(np.uint8) == POISON).all(), "something was written outside an output"


_repeated: set[str] = set()  # variants whose launch was repeated in the simulator


def run(spec: Any, grid: int | tuple[int, int], arguments: Sequence[Any], repeat: int = 2) -> None:
    """Launches a kernel on NumPy arrays, `Out`s and scalars. Every `Out` has the result afterwards.

    Checks that inputs are unmodified, guard bands untouched, and that each of `repeat` launches gives the same bits.
    Simulated, where the order of threads differs from launch to launch anyway, only the first of a variant is repeated.
    """
    if SIMULATED and spec.name in _repeated:
        repeat = 1
    elif repeat > 1:
        _repeated.add(spec.name)
    before = [a.buffer.copy() if isinstance(a, Out) else np.copy(a) for a in arguments]
    first: list[np.ndarray] = []
    for repetition in range(repeat):
        for argument, start in zip(arguments, before, strict=True):
            if isinstance(argument, Out):
                argument.buffer[...] = start
        (_simulate if SIMULATED else _launch)(spec, grid, arguments)
        for i, (argument, start) in enumerate(zip(arguments, before, strict=True)):
            if isinstance(argument, Out):
                argument.check_guards()
            elif isinstance(argument, np.ndarray):
                assert argument.tobytes() == start.tobytes(), f"{spec.name} modified its input, argument {i}"
        results = [argument.buffer.copy() for argument in arguments if isinstance(argument, Out)]
        if repetition == 0:
            first = results
        for a, b in zip(first, results, strict=True):
            assert a.tobytes() == b.tobytes(), f"{spec.name}: a repeated launch gave other bits"


def mapped(array: np.ndarray, boxes: Boxes) -> tuple[Any, Any]:
    """A tensor map of an array, and what must live as long as that."""
    assert array.nbytes >= 4 * boxes.size
    if SIMULATED:
        return SimulatedTensorMap(array.reshape(-1).view(np.int32), boxes), array
    from bitnet_numba.kernels.runtime.tensor_map import tensor_map

    on_device = DeviceArray.of(array)
    return tensor_map(on_device.address, boxes), on_device


class HarnessDevice(DryRunDevice):
    """A device whose launches `run` makes, on arrays of the test: launchers get stand-ins for them."""

    def __init__(self, num_sms: int):
        super().__init__(arch(), num_sms)
        self._arrays: dict[int, tuple[DeviceArray, np.ndarray | Out]] = {}
        self._launch: tuple[KernelSpec, Any, Sequence[Any]] | None = None
        self._mapped: list[Any] = []  # what tensor maps are of

    def operand(self, array: np.ndarray | Out | None) -> Any:
        """What a launcher takes for an array of the test."""
        if array is None:
            return None
        view = DeviceView(0, array.size, array.dtype)
        self._arrays[id(view)] = view, array
        return view

    def tensor_map(self, array: DeviceArray, boxes: Boxes) -> Any:
        host = self._arrays[id(array)][1]
        assert isinstance(host, np.ndarray)
        tensor_map, owner = mapped(host, boxes)
        self._mapped.append(owner)
        return tensor_map

    def launch(self, spec: KernelSpec, grid: Any, arguments: Sequence[Any], use_pdl: bool = True) -> Launch:
        self._launch = spec, grid, arguments
        return super().launch(spec, grid, arguments, use_pdl)

    def run(self, repeat: int = 2) -> str:
        """Runs the last launch, with the checks of `harness.run`; returns the kernel's name."""
        assert self._launch is not None
        spec, grid, arguments = self._launch
        arrays = [self._arrays[id(a)][1] if id(a) in self._arrays else a for a in arguments]
        for i, (kind, array) in enumerate(zip(spec.signature, arrays, strict=True)):
            # What kernels read as words: int8 activations, float16 scales, pairs of floats that are copied.
            if isinstance(array, np.ndarray) and kind == types.CPointer(types.int32):
                arrays[i] = array.view(np.int32)
        run(spec, grid, arrays, repeat)
        return spec.name


def _simulate(spec: Any, grid: int | tuple[int, int], arguments: Sequence[Any]) -> None:
    from numba import cuda

    from tests.kernels import simulator

    simulator.install()
    simulator.Block.of_clusters(spec.cluster)
    flat = [a.array if isinstance(a, Out) else a.reshape(-1) if isinstance(a, np.ndarray) else a for a in arguments]
    cuda.jit(spec.kernel)[grid, spec.threads, 0, spec.shared](*flat)


def _launch(spec: Any, grid: int | tuple[int, int], arguments: Sequence[Any]) -> None:
    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import Stream

    device, values, arrays = usable_device(), [], []
    for argument in arguments:
        if isinstance(argument, Out):
            arrays.append(DeviceArray.of(argument.buffer))
            values.append(arrays[-1].address + GUARD * argument.dtype.itemsize)
        elif isinstance(argument, np.ndarray):
            arrays.append(DeviceArray.of(argument))
            values.append(arrays[-1])
        else:
            values.append(argument)
    stream = Stream()
    device.launch(spec, grid, values, use_pdl=False)(stream.handle)
    stream.synchronize()
    hosts = [a.buffer if isinstance(a, Out) else a for a in arguments if isinstance(a, Out | np.ndarray)]
    for host, array in zip(hosts, arrays, strict=True):
        host[...] = array.read().reshape(host.shape)


def assert_close(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray | float, what: str) -> None:
    """Fails with the worst index and both values unless |actual - expected| <= bound everywhere; NaN never passes."""
    error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    excess = np.where(np.isnan(error), np.inf, error - bound)
    worst = np.unravel_index(int(excess.argmax()), excess.shape)
    limit = np.broadcast_to(np.asarray(bound), error.shape)[worst]
    values = f"{actual[worst]!r}, expected {expected[worst]!r}"
    assert excess[worst] <= 0, f"{what}: worst at {worst}: {values}, off by {error[worst]:.3g} > {limit:.3g}"
