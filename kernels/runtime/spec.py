"""KernelSpec: one compiled form of a kernel, as each kernel module lists them for its launcher, tests and reports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from numba import types

# A SM cannot divide its memory anew while a block is resident: kernels that ask for different divisions
# cannot overlap. So all ask for this one, but for those that need more shared memory, or more L1.
CARVEOUT = 75
CARVEOUT_BYTES = 196 * 1024  # of shared memory that this makes on sm_90
RESERVED_BYTES = 1024  # of it that each block takes beside its own


class KernelSpec(NamedTuple):
    """A kernel specialised to fixed constants and argument types: all that compiling it takes, without a device.

    Each kernel module has `forms(arch) -> list[KernelSpec]`: those of a full-size 2B4T step first, then of every other
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


@dataclass
class ArchSpec:
    """What the choice of a kernel depends on. A `Device` is one; without a device, this stands in for it."""

    arch: int  # 10 * major + minor of the compute capability, e.g. 90
    num_sms: int  # streaming multiprocessors
