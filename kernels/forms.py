"""KernelForm: one compiled form of a kernel, as each kernel module lists them for its launcher, tests and reports."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from numba import types

# A multiprocessor cannot divide its memory anew while a block is resident: kernels that ask for different divisions
# cannot overlap. So all ask for this one, but for those that need more shared memory, or more L1.
CARVEOUT = 75
CARVED_BYTES = 196 * 1024  # of shared memory that this makes on sm_90
SYSTEM_BYTES = 1024  # of it that each block takes beside its own


class KernelForm(NamedTuple):
    """A kernel specialised to fixed constants and argument types: all that compiling it takes, without a device.

    Each kernel module has `forms(arch) -> list[KernelForm]`: those of a full-size 2B4T step first, then of every other
    branch (other head sizes, other activations, ...).
    """

    name: str  # unique, e.g. "w2a8_gemv[2560x6912]"
    kernel: Callable[..., Any]  # a plain Python function
    signature: tuple[types.Type, ...]
    threads: int  # per block: the launch bound
    blocks_per_sm: int = 1  # resident blocks that the register budget must allow
    dp4a: int = 0  # least number of dp4a instructions in its PTX
    wide_loads: int = 0  # least number of 16-byte global loads in its PTX
    shared: int = 0  # bytes of dynamic shared memory, per block
    cluster: int = 1  # blocks, neighbours along y, that run together and reach each other's shared memory
    carveout: int = CARVEOUT  # percent of the memory that L1 and shared memory divide


class Target(Protocol):
    """What a choice of forms depends on: a Device, or what stands for one where there is none."""

    @property
    def arch(self) -> int:
        """Such as 90."""

    @property
    def multiprocessors(self) -> int:
        """How many."""
