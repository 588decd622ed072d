"""Getting the machine code of a model's kernels: from the disk cache, or the first time compiled, by two processes.

Numba compiles one function at a time in a process. The step takes about as long as all kernels that it calls together:
so a process of its own compiles it into the disk cache while this one compiles the kernels.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numba import config

from bitnet_numba.backends.cores import usable_cpus
from bitnet_numba.backends.progress import CompileProgress
from bitnet_numba.checkpoint.packed import PackedCheckpoint, RowFormat
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.cpu import attention, isa, step
from bitnet_numba.kernels.cpu.kernels import Kernel, kernels_for
from bitnet_numba.kernels.runtime import disk_cache

# What the other process does.
COMPILE_STEP = """
import sys
sys.path[:] = sys.argv[1:]
from bitnet_numba.kernels.cpu import step
step.compile_step()
"""


class Needs(NamedTuple):
    """What kernels are compiled for."""

    instruction_set: str
    kv_dtype: str  # "uint16" for bfloat16, or "float32"
    group_size: int  # query heads to a kv head
    head: RowFormat  # of the LM head's rows
    group_scales: bool  # of linears

    @staticmethod
    def of(checkpoint: PackedCheckpoint, instruction_set: str, kv_dtype: str = "uint16") -> "Needs":
        """What a checkpoint's model needs."""
        c = checkpoint.config
        return Needs(instruction_set, kv_dtype, c.num_heads // c.num_kv_heads, checkpoint.head, c.group_scales)

    def kernels(self) -> dict[str, Kernel]:
        """The kernels, not compiled yet."""
        heads = attention.head_tile(self.group_size)
        return kernels_for(
            isa.InstructionSet(self.instruction_set), np.dtype(self.kv_dtype), heads, self.head, self.group_scales
        )


def load_kernels(needs: Needs) -> dict[str, int]:
    """The addresses of kernels by name, all of them and the step compiled, with progress if that takes time."""
    if config.DISABLE_JIT:
        raise BackendError("the CPU backend needs Numba's compiler: unset NUMBA_DISABLE_JIT, or ask for the reference")
    kernels = needs.kernels()
    missing = {name for name, kernel in kernels.items() if not kernel.is_cached}
    step_missing = not step.is_cached()
    progress = CompileProgress("this CPU", len(missing) + step_missing)
    addresses = {}
    with _step_compiled_beside(bool(missing) and step_missing):
        for name, kernel in kernels.items():
            addresses[name] = kernel.address()
            progress.advance(name in missing)
    step.compile_step()
    progress.advance(step_missing)
    progress.close()
    return addresses


@contextlib.contextmanager
def _step_compiled_beside(wanted: bool) -> Iterator[None]:
    """Compiles the step in another process while the body runs, and waits for it; if it fails, nothing is lost."""
    # A frozen program is its own executable: it would start itself.
    frozen = not sys.executable or getattr(sys, "frozen", False)
    if not wanted or frozen or usable_cpus() < 2 or not disk_cache.is_writable():
        yield
        return
    process = None
    with contextlib.suppress(OSError):
        nowhere = subprocess.DEVNULL
        # With this process's own path, and without the folder that it happens to run in, which -m would search first.
        command = [sys.executable, "-c", COMPILE_STEP, *sys.path]
        process = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)
    try:
        yield
        if process is not None:
            process.wait()
    finally:
        if process is not None:
            process.kill()
            process.wait()
