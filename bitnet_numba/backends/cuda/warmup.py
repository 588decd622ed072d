"""Getting a model's kernels: from the disk cache, or the first time compiled, by several processes.

Which kernels a model needs is what a dry run of its own steps asks for. Compiling takes one to two seconds a kernel; a
context has some forty, a batch up to thirty more, and Numba compiles one at a time. So processes of their own, one for
every four kernels and at most one a core, compile a share each into the disk cache; a share that fails, or that cannot
be kept, is compiled here, where errors show. $BITNET_NUMBA_COMPILERS is the largest number of processes. Where there
are many, a batch's kernels are compiled and loaded at the start, too, since they take little longer together; where
there are few, when the first batch needs them.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from time import sleep
from typing import NamedTuple

import numpy as np

from bitnet_numba.backends.cores import usable_cpus
from bitnet_numba.backends.cuda.embedding_pass import EmbeddingBuffers, EmbeddingPass
from bitnet_numba.backends.cuda.extras import Asked, Extras
from bitnet_numba.backends.cuda.forward import MAX_TOKENS, BatchPass, CudaModel, PrefillPass
from bitnet_numba.backends.cuda.prompts import MIN_TOKENS, pass_sizes
from bitnet_numba.backends.cuda.state import SequenceState, padded_sizes, step_sizes
from bitnet_numba.backends.cuda.steps import BatchSteps, DecodeBuffers, DecodeSteps
from bitnet_numba.backends.cuda.weights import RowFormats, Weights
from bitnet_numba.backends.progress import CompileProgress
from bitnet_numba.config import ModelConfig
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.attention.kv_cache import PAGE
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype
from bitnet_numba.kernels.runtime import disk_cache
from bitnet_numba.kernels.runtime.compiler import is_cached, machine_code
from bitnet_numba.kernels.runtime.device import CudaDevice, DryRunDevice
from bitnet_numba.kernels.runtime.launch import load_kernels
from bitnet_numba.kernels.runtime.spec import ArchSpec, KernelSpec

MIN_SHARE = 4  # kernels; starting a process takes as long as compiling two
MANY_PROCESSES = 8  # that compile what may be needed later, too
POLL = 0.1  # seconds
# What each process does.
COMPILE_SHARE = """
import sys
sys.path[:] = sys.argv[1:]
from bitnet_numba.backends.cuda import warmup
warmup.compile_share()
"""
MAX_CONTEXT = 8192  # tokens of a dry run's sequences; longer contexts take the same kernels


class Needs(NamedTuple):
    """What needs kernels: a context, or with `max_sequences` a batch beside it; `both`: the two."""

    config: ModelConfig
    rows: RowFormats
    target: ArchSpec
    max_sequences: int | None = None
    both: bool = False
    kv_dtype: KVDtype = DEFAULT

    def specs(self) -> list[KernelSpec]:
        """Every kernel, always in the same order."""
        device = DryRunDevice(self.target.arch, self.target.num_sms)
        config = replace(self.config, num_layers=1)  # every layer takes the same
        if config.embeds:
            _dry_run_embedder(config, self.rows, device)
            return device.specs
        model = CudaModel.dry_run(config, self.rows, device, self.kv_dtype)
        if self.max_sequences is None or self.both:
            _dry_run_context(model)
        if self.max_sequences is not None:
            _dry_run_batch(model, self.max_sequences)
        return device.specs


def _dry_run_context(model: CudaModel) -> None:
    """Asks for every launch of a context, but for logits of several tokens at once."""
    device = model.device
    state = SequenceState(device, model.config, PAGE, kv_dtype=model.kv_dtype)
    steps = DecodeSteps(model, DecodeBuffers(model), state, device.empty(1, np.int64))
    steps.extras = Extras(model, state, 1)
    for long in (False, True):
        steps.decode(long, Asked(edits=True, logprobs=True))
        steps.score(long)
        steps.choose(long)
    for num_tokens in pass_sizes():
        PrefillPass(model, state, num_tokens).launches()


def _dry_run_embedder(config: ModelConfig, rows: RowFormats, device: DryRunDevice) -> None:
    """Asks for every launch of the passes over texts that are not very long."""
    weights, buffers = Weights.shapes_only(config, rows), EmbeddingBuffers(device, config, MAX_TOKENS)
    for num_rows in padded_sizes(MIN_TOKENS, MAX_TOKENS):
        EmbeddingPass(config, device, weights, buffers, num_rows).launches()


def _dry_run_batch(model: CudaModel, max_sequences: int) -> None:
    """Asks for every launch of a batch that a context does not make."""
    capacity = min(model.config.max_context, MAX_CONTEXT)
    state = SequenceState(model.device, model.config, capacity, max_sequences, 1, model.kv_dtype)
    steps = BatchSteps(model, state)
    for num_tokens in step_sizes(max_sequences):
        steps.choose(num_tokens)
        steps.decode(num_tokens, num_tokens)
    for num_blocks in padded_sizes(1, steps.work_list.size):  # attention alone depends on them, and on nothing else
        BatchPass(model, state, 1, steps.contexts(num_blocks)).attention(0)


def load_specs(
    config: ModelConfig,
    rows: RowFormats,
    device: CudaDevice,
    max_sequences: int | None = None,
    ahead: int | None = None,
    kv_dtype: KVDtype = DEFAULT,
) -> int:
    """Compiles what is not cached, with a progress line, and loads all: of a context, or of a batch of `max_sequences`.

    ahead: sequences of a batch whose kernels are got as well if many processes can compile them. Returns the number of
    sequences of the largest batch whose kernels are loaded now. Raises BackendError.
    """
    needs = Needs(config, rows, ArchSpec(device.arch, device.num_sms), max_sequences, kv_dtype=kv_dtype)
    if ahead is not None and _most_processes() >= MANY_PROCESSES:
        needs = needs._replace(max_sequences=ahead, both=True)
    specs = needs.specs()
    missing = sum(not is_cached(spec, device.arch) for spec in specs)
    progress = CompileProgress(device.name, missing)
    compile_together(needs, specs, progress.reach)
    load_kernels(specs, device.arch, lambda done, total: progress.reach(missing - total + done))
    progress.close()
    return needs.max_sequences or 0


def compile_together(needs: Needs, specs: list[KernelSpec], progress: Callable[[int], None]) -> None:
    """Compiles the missing kernels in subprocesses, if there are enough of them to share; `progress` is told how many
    are done. Raises BackendError if $BITNET_NUMBA_COMPILERS is not a number."""
    arch = needs.target.arch
    missing = [spec for spec in specs if not is_cached(spec, arch)]
    count = min(_most_processes(), len(missing) // MIN_SHARE)
    # A frozen program is its own executable: it would start itself.
    if count < 2 or not sys.executable or getattr(sys, "frozen", False) or not disk_cache.is_writable():
        return
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for i in range(count):
            with contextlib.suppress(OSError):  # what this one would have made is compiled here, later
                # With this process's own path, and without the folder that it happens to run in, which -m would search.
                command = [sys.executable, "-c", COMPILE_SHARE, *sys.path]
                nowhere = subprocess.DEVNULL
                processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere))
                pipe = processes[-1].stdin
                assert pipe is not None
                pickle.dump((needs, [spec.name for spec in missing[i::count]]), pipe)
                pipe.close()
        while any(process.poll() is None for process in processes):
            progress(sum(is_cached(spec, arch) for spec in missing))
            sleep(POLL)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    progress(sum(is_cached(spec, arch) for spec in missing))


def _most_processes() -> int:
    wanted = os.environ.get("BITNET_NUMBA_COMPILERS", "")
    try:
        return int(wanted or usable_cpus())
    except ValueError:
        raise BackendError(f"BITNET_NUMBA_COMPILERS must be a number of processes, not {wanted!r}") from None


def compile_share() -> None:
    """Compiles the kernels that standard input names, into the disk cache."""
    needs, names = pickle.load(sys.stdin.buffer)
    for spec in needs.specs():
        if spec.name in names:
            machine_code(spec, needs.target.arch)
