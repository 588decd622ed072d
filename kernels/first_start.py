"""Getting a model's kernels: from the disk cache, or the first time compiled, in as many processes as there are cores.

Compiling takes about a second a form, a model has some sixty, and Numba compiles one at a time. So processes of their
own make a share each and leave it in the disk cache; a share that fails, or that cannot be kept, is made here, where
errors show. $BITNET_NUMBA_COMPILERS is how many processes there are at most.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from time import sleep
from typing import NamedTuple

from bitnet_numba.config import ModelConfig
from bitnet_numba.kernels.batch import batch_forms
from bitnet_numba.kernels.compilation import is_cached, machine_code
from bitnet_numba.kernels.decode import kernel_forms
from bitnet_numba.kernels.device import Device, load_kernels
from bitnet_numba.kernels.forms import KernelForm
from bitnet_numba.kernels.rows import prompt_forms

LEAST_SHARE = 4  # forms; starting a process takes as long as compiling two
POLL = 0.1  # seconds


class Kind(NamedTuple):
    """What forms depend on, of a device."""

    arch: int
    multiprocessors: int


class Needs(NamedTuple):
    """What forms are made from: those of a context, or with a number of sequences those of a batch beside them."""

    config: ModelConfig
    int8_rows: bool
    target: Kind
    sequences: int | None

    def forms(self) -> list[KernelForm]:
        """Every form, always in the same order."""
        config, int8_rows, target, sequences = self
        if sequences is not None:
            return batch_forms(config, int8_rows, target, sequences)
        return kernel_forms(config, int8_rows, target) + prompt_forms(config, int8_rows, target)


def load_forms(config: ModelConfig, int8_rows: bool, device: Device, sequences: int | None = None) -> None:
    """Compiles what is not cached, with a progress line, and loads all. Raises BackendError."""
    needs = Needs(config, int8_rows, Kind(device.arch, device.multiprocessors), sequences)
    forms = list({form.name: form for form in needs.forms()}.values())
    compile_together(needs, forms, device.name)
    load_kernels(forms, device, lambda done, total, _: _progress(done, total, device.name))


def compile_together(needs: Needs, forms: list[KernelForm], device_name: str) -> None:
    """Has processes compile the forms that are missing, if there are enough to share."""
    arch = needs.target.arch
    missing = [form for form in forms if not is_cached(form, arch)]
    most = int(os.environ.get("BITNET_NUMBA_COMPILERS") or os.cpu_count() or 1)
    count = min(most, len(missing) // LEAST_SHARE)
    if count < 2:
        return
    processes = []
    for i in range(count):
        command = [sys.executable, "-m", "bitnet_numba.kernels.first_start"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
        with contextlib.suppress(BrokenPipeError):
            pickle.dump((needs, [form.name for form in missing[i::count]]), process.stdin)
            process.stdin.close()
        processes.append(process)
    try:
        while any(process.poll() is None for process in processes):
            done = sum(is_cached(form, arch) for form in missing)
            _progress(min(done, len(missing) - 1), len(missing), device_name)
            sleep(POLL)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if all(is_cached(form, arch) for form in missing):
        _progress(len(missing), len(missing), device_name)


def compile_share() -> None:
    """Compiles the forms that standard input names, into the disk cache."""
    needs, names = pickle.load(sys.stdin.buffer)
    for form in needs.forms():
        if form.name in names:
            machine_code(form, needs.target.arch)


def _progress(done: int, total: int, device_name: str) -> None:
    end = "\n" if done == total else ""
    print(f"\rCompiling kernels for {device_name}, once: {done} of {total}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # Under its own name, since what arrives by pickle is of the module that its sender imported.
    from bitnet_numba.kernels import first_start

    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        first_start.compile_share()
