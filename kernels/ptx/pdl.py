"""TODO docstring."""

from collections.abc import Callable

from bitnet_numba.kernels.ptx.base import device_function, instruction


@instruction("griddepcontrol.wait;", "", "", effects=True)
def _pdl_wait() -> None:
    return None


@instruction("griddepcontrol.launch_dependents;", "", "", effects=True)
def _pdl_trigger() -> None:
    return None


@device_function
def _nothing() -> None:
    return None


def pdl_wait(arch: int) -> Callable:
    """`wait()`: blocks until the launches before this one have finished and their writes are visible. sm_90; else
    nothing, since there the launch itself waits."""
    return _pdl_wait if arch >= 90 else _nothing


def pdl_trigger(arch: int) -> Callable:
    """`release()`: lets the next launch start before this one ends (it still waits for data). sm_90; else nothing."""
    return _pdl_trigger if arch >= 90 else _nothing
