"""Getting a model's kernels: from the disk cache, or the first time compiled, by several processes.

Compiling takes one to two seconds a form; a context has some forty, a batch up to thirty more, and Numba compiles one
at a time. So processes of their own, one for every four forms and at most one a core, make a share each and leave it in
the disk cache; a share that fails, or that cannot be kept, is made here, where errors show. $BITNET_NUMBA_COMPILERS is
how many processes there are at most.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from functools import partial
from time import sleep
from typing import NamedTuple

from bitnet_numba.backends.cuda.batch import batch_specs
from bitnet_numba.backends.cuda.decode import kernel_specs
from bitnet_numba.backends.cuda.forward import prompt_specs
from bitnet_numba.config import ModelConfig
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.runtime.compiler import cache_is_writable, is_cached, machine_code
from bitnet_numba.kernels.runtime.device import CudaDevice
from bitnet_numba.kernels.runtime.launch import load_kernels
from bitnet_numba.kernels.runtime.spec import ArchSpec, KernelSpec

MIN_SHARE = 4  # forms; starting a process takes as long as compiling two
POLL = 0.1  # seconds


class Needs(NamedTuple):
    """What forms are made from: those of a context, or with a number of sequences those of a batch beside them."""

    config: ModelConfig
    int8_rows: bool
    target: ArchSpec
    sequences: int | None

    def specs(self) -> list[KernelSpec]:
        """Every form, always in the same order."""
        config, int8_rows, target, sequences = self
        if sequences is not None:
            return batch_specs(config, int8_rows, target, sequences)
        return kernel_specs(config, int8_rows, target) + prompt_specs(config, int8_rows, target)


def load_specs(config: ModelConfig, int8_rows: bool, device: CudaDevice, sequences: int | None = None) -> None:
    """Compiles what is not cached, with a progress line, and loads all. Raises BackendError."""
    needs = Needs(config, int8_rows, ArchSpec(device.arch, device.num_sms), sequences)
    specs = list({spec.name: spec for spec in needs.specs()}.values())
    compile_together(needs, specs, device.name)
    load_kernels(specs, device.arch, partial(_progress, device.name))


def compile_together(needs: Needs, specs: list[KernelSpec], device_name: str) -> None:
    """Has processes compile the forms that are missing, if there are enough to share. Raises BackendError if
    $BITNET_NUMBA_COMPILERS is no number."""
    arch = needs.target.arch
    missing = [spec for spec in specs if not is_cached(spec, arch)]
    count = min(_most_processes(), len(missing) // MIN_SHARE)
    # A frozen program is its own executable: it would start itself.
    if count < 2 or not sys.executable or getattr(sys, "frozen", False) or not cache_is_writable():
        return
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for i in range(count):
            with contextlib.suppress(OSError):  # what this one would have made is compiled here, later
                command = [sys.executable, "-m", "bitnet_numba.backends.cuda.warmup"]
                nowhere = subprocess.DEVNULL
                processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere))
                pipe = processes[-1].stdin
                assert pipe is not None
                pickle.dump((needs, [spec.name for spec in missing[i::count]]), pipe)
                pipe.close()
        while any(process.poll() is None for process in processes):
            done = sum(is_cached(spec, arch) for spec in missing)
            _progress(device_name, min(done, len(missing) - 1), len(missing))
            sleep(POLL)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    if all(is_cached(spec, arch) for spec in missing):
        _progress(device_name, len(missing), len(missing))


def _most_processes() -> int:
    wanted = os.environ.get("BITNET_NUMBA_COMPILERS", "")
    try:
        return int(wanted or os.cpu_count() or 1)
    except ValueError:
        raise BackendError(f"BITNET_NUMBA_COMPILERS must be a number of processes, not {wanted!r}") from None


def compile_share() -> None:
    """Compiles the forms that standard input names, into the disk cache."""
    needs, names = pickle.load(sys.stdin.buffer)
    for spec in needs.specs():
        if spec.name in names:
            machine_code(spec, needs.target.arch)


def _progress(device_name: str, done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\rCompiling kernels for {device_name}, once: {done} of {total}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # Under its own name, since what arrives by pickle is of the module that its sender imported.
    from bitnet_numba.backends.cuda import warmup

    warmup.compile_share()
