"""What the kernel tests share: running a kernel on a GPU or on the simulator, and the checks around a launch.

The agreement with the kernel modules
- A kernel is a plain Python function that a factory `make_x(arch, constants...)` builds: constants are closure
  variables, arguments are pointers (flat) and scalars. Each module lists its compiled forms, `forms(arch) ->
  list[KernelSpec]` (see kernels/forms.py); block sizes are arguments of the factory, so that simulated blocks are
  small.
- test_ptx.py compiles every form for every architecture and checks the PTX: no local memory, at least so many dp4a and
  16-byte loads, and, where ptxas is there, no spills.
- Stand-ins in intrinsics.py find the running thread by `threading.current_thread()`; tests/simulator.py says what it
  has.
- Kernels that wait for each other across blocks (a grid barrier) cannot run on the simulator with more than one block,
  because it runs block after block: such kernels take the number of blocks from gridDim and are simulated with one.

How a kernel test file is built
- a property `check_x(...)` that makes inputs, calls `run(form, grid, arguments)` and compares with NumPy;
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

from bitnet_numba.errors import BackendError

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
ROOT = Path(__file__).parent.parent.parent
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
ARCH = 90  # what simulated kernels are built for
GUARD = 64  # elements on each side of an output that must stay as they were
POISON = 0xA5


@cache
def why_no_gpu() -> str:
    """One line that says why there is no usable GPU, or nothing."""
    if SIMULATED:
        return "this is the simulator"
    from bitnet_numba.kernels.runtime.device import usable_device

    try:
        usable_device()
    except BackendError as error:
        return str(error)
    return ""


def needs_gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test `gpu` and skips it, with the reason, where there is none."""
    skip = pytest.mark.skipif(bool(why_no_gpu()), reason=f"needs a GPU: {why_no_gpu()}")
    return pytest.mark.gpu(skip(test))


def arch() -> int:
    """The architecture that kernels of this process run on."""
    if SIMULATED:
        return ARCH
    from bitnet_numba.kernels.runtime.device import usable_device

    return usable_device().arch


def simulated(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test `simulated`: it needs Numba's CUDA simulator, which must be chosen before Numba is imported."""
    skip = pytest.mark.skipif(not SIMULATED, reason="NUMBA_ENABLE_CUDASIM=1 python -m pytest -m simulated runs these")
    return pytest.mark.simulated(skip(test))


class Out:
    """An output (or an array that is changed in place): guarded on both sides, and poisoned unless it has a start."""

    def __init__(self, size: int, dtype: Any, start: np.ndarray | None = None):
        self.dtype, self.size = np.dtype(dtype), size
        self.buffer = np.full((size + 2 * GUARD) * self.dtype.itemsize, POISON, np.uint8).view(self.dtype)
        if start is not None:
            self.array[...] = start.reshape(-1)

    @property
    def array(self) -> np.ndarray:
        """What is between the guard bands."""
        return self.buffer[GUARD : GUARD + self.size]

    def check_guards(self) -> None:
        """Raises AssertionError if something was written outside the output."""
        bands = np.concatenate([self.buffer[:GUARD], self.buffer[GUARD + self.size :]])
        assert (bands.view(np.uint8) == POISON).all(), "something was written outside an output"


def run(spec: Any, grid: int | tuple[int, int], arguments: Sequence[Any], repeat: int = 2) -> None:
    """Launches a form on NumPy arrays, `Out`s and scalars; every `Out` holds the result afterwards.

    Checks that inputs are unmodified, guard bands untouched, and that a second launch gives the same bits.
    """
    before = [a.buffer.copy() if isinstance(a, Out) else np.copy(a) for a in arguments]
    first: list[np.ndarray] = []
    for turn in range(repeat):
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
        if turn == 0:
            first = results
        for a, b in zip(first, results, strict=True):
            assert a.tobytes() == b.tobytes(), f"{spec.name}: a repeated launch gave other bits"


def mapped(array: np.ndarray, sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """What tells the copy engine about a matrix (sizes as of `tensor_map`), and what must live as long."""
    rows, ints, *box = sizes
    if SIMULATED:
        from bitnet_numba.kernels.ptx.tma import SimulatedTensorMap

        return SimulatedTensorMap(array.reshape(-1).view(np.int32).reshape(rows, ints), *box), array
    from bitnet_numba.kernels.runtime.memory import DeviceArray
    from bitnet_numba.kernels.runtime.tensor_map import tensor_map

    on_device = DeviceArray.of(array)
    return tensor_map(on_device.address, *sizes), on_device


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
    from bitnet_numba.kernels.runtime.memory import DeviceArray

    device, values, held = usable_device(), [], []
    for argument in arguments:
        if isinstance(argument, Out):
            held.append(DeviceArray.of(argument.buffer))
            values.append(held[-1].address + GUARD * argument.dtype.itemsize)
        elif isinstance(argument, np.ndarray):
            held.append(DeviceArray.of(argument))
            values.append(held[-1])
        else:
            values.append(argument)
    stream = Stream()
    device.launch(spec, grid, values, use_pdl=False)(stream.handle)
    stream.synchronize()
    arrays = [argument for argument in arguments if isinstance(argument, Out | np.ndarray)]
    for argument, array in zip(arrays, held, strict=True):
        (argument.buffer if isinstance(argument, Out) else argument)[...] = array.read().reshape(
            argument.buffer.shape if isinstance(argument, Out) else argument.shape
        )


def assert_close(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray | float, what: str) -> None:
    """Fails with the worst index and both values unless |actual - expected| <= bound everywhere; NaN never passes."""
    error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    excess = np.where(np.isnan(error), np.inf, error - bound)
    worst = np.unravel_index(int(excess.argmax()), excess.shape)
    limit = np.broadcast_to(np.asarray(bound), error.shape)[worst]
    values = f"{actual[worst]!r}, expected {expected[worst]!r}"
    assert excess[worst] <= 0, f"{what}: worst at {worst}: {values}, off by {error[worst]:.3g} > {limit:.3g}"
