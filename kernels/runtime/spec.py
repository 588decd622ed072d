"""KernelSpec: a kernel specialised to constants and argument types. ArchSpec: what the choice of one depends on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from numba import types

# An SM cannot divide its memory into L1 and shared memory anew while a block is resident, so kernels that ask for
# different divisions never overlap (PDL). All ask for this one, except those that need more shared memory or more L1.
CARVEOUT = 75  # percent that is shared memory
CARVEOUT_BYTES = 196 * 1024  # of shared memory that this gives on sm_90
RESERVED_BYTES = 1024  # of it that the system takes for each block
ONE_PER_SM_BYTES = 100 * 1024  # two blocks that each ask for so much do not fit an SM; the rest is for other kernels


class SMMemory(NamedTuple):
    """What an SM has beside its registers, of which every SM has 65536. In bytes."""

    l1: int  # L1 and shared memory together
    shared: int  # of it that can be shared memory; a block can have all but RESERVED_BYTES


_LARGE, _AMPERE, _SMALL = (SMMemory(l1 << 10, shared << 10) for l1, shared in ((256, 228), (192, 164), (128, 100)))
_SM_MEMORY = {
    61: SMMemory((48 + 96) << 10, 96 << 10), 70: SMMemory(128 << 10, 96 << 10), 75: SMMemory(96 << 10, 64 << 10),
    80: _AMPERE, 87: _AMPERE, 90: _LARGE, 100: _LARGE, 103: _LARGE, 110: _LARGE,
}  # fmt: skip


def sm_memory(arch: int) -> SMMemory:
    """Of an architecture (CUDA C++ Programming Guide, "Compute Capabilities"). One that is not listed there counts as
    the smallest since sm_80, which sm_86, sm_89 and sm_120 are."""
    return _SM_MEMORY.get(arch, _SMALL)


class KernelSpec(NamedTuple):
    """One compiled variant of a kernel: all that compiling and launching it take, without a device.

    Kernel modules make specs for their launchers; those that tests and reports go through are listed in
    tests/kernels/variants.py.
    """

    name: str  # unique among variants: it is the key of the disk cache. E.g. "gemv[2560x6912]"
    kernel: Callable[..., Any]  # a plain Python function
    signature: tuple[types.Type, ...]
    threads: int  # per block: the launch bound
    blocks_per_sm: int = 1  # resident blocks that the register budget must allow
    dp4a: int = 0  # its PTX has at least so many dp4a instructions
    wide_loads: int = 0  # its PTX has at least so many 16-byte global loads
    shared: int = 0  # bytes of dynamic shared memory per block
    cluster: int = 1  # blocks per cluster, neighbours along y
    carveout: int = CARVEOUT  # percent of an SM's L1 and shared memory that is shared memory
    registers: int = 0  # of a thread at most; 0: what `threads` and `blocks_per_sm` allow
    one_per_sm: bool = False  # no two blocks of a launch share an SM, though they would fit

    @property
    def dynamic_shared(self) -> int:
        """Bytes of dynamic shared memory per block that a launch asks for."""
        return max(self.shared, ONE_PER_SM_BYTES) if self.one_per_sm else self.shared


@dataclass
class ArchSpec:
    """What the choice of a kernel depends on. A `Device` is one; this alone serves where there is no device."""

    arch: int  # 10 * major + minor of the compute capability, e.g. 90
    num_sms: int  # streaming multiprocessors
