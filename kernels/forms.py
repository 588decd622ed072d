"""KernelForm: one compiled form of a kernel, as each kernel module lists them for its launcher, tests and reports."""

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types


def array(dtype: types.Type, writable: bool = True) -> types.Array:
    """The type of a one-dimensional contiguous array argument."""
    return types.Array(dtype, 1, "C", readonly=not writable)


class KernelForm(NamedTuple):
    """A kernel specialised to fixed constants and argument types: all that compiling it takes, without a device.

    Each kernel module has `forms() -> list[KernelForm]`: the forms of a full-size 2B4T step and of every other branch
    that is compiled in (other head sizes, other activations, ...).
    """

    name: str  # unique, e.g. "w2a8_gemv[2560x6912]"
    kernel: Callable[..., Any]  # made by @cuda.jit; .py_func is the Python function
    signature: tuple[types.Type, ...]
    threads: int  # per block: the launch bound
    blocks_per_sm: int = 1  # resident blocks that the register budget must allow
    dp4a: int = 0  # least number of dp4a instructions in its PTX
    wide_loads: int = 0  # least number of 16-byte global loads in its PTX
