"""Programmatic dependent launch (PDL): a kernel starts while the one before it in the stream still runs.

The launch attribute that permits it is set by `Device.launch(..., use_pdl=True)`.
"""

from collections.abc import Callable

from bitnet_numba.kernels.ptx.base import device_function, instruction


@instruction("griddepcontrol.wait;", "", "", effects=True)
def _pdl_wait() -> None: ...


@instruction("griddepcontrol.launch_dependents;", "", "", effects=True)
def _pdl_trigger() -> None: ...


@device_function
def _nothing() -> None:
    return None


def pdl_wait(arch: int) -> Callable:
    """`wait()`: blocks until the kernels before this one have finished and their writes are visible. sm_90; on others
    it does nothing, since there a kernel starts after the one before it has ended."""
    return _pdl_wait if arch >= 90 else _nothing


def pdl_trigger(arch: int) -> Callable:
    """`trigger()`: lets the next kernel start once all blocks of this one have come here or ended; it still waits for
    this one's writes by `pdl_wait`. sm_90; nothing on others."""
    return _pdl_trigger if arch >= 90 else _nothing
