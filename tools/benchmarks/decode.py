"""What tools/bench.py measures of one sequence: decode steps, latency, memory and start; as plain dictionaries."""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bitnet_numba.backends.cuda.backend import CudaBackend
from bitnet_numba.backends.cuda.context import CudaContext
from bitnet_numba.backends.cuda.forward import DecodePass
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.kernels.attention.decode import LONG_CONTEXT
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype
from bitnet_numba.kernels.runtime.device import usable_device
from bitnet_numba.kernels.runtime.driver import Event
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.sampling.parts import pack_settings
from bitnet_numba.sampling import SamplingParams
from tools.benchmarks.inputs import random_ids
from tools.benchmarks.timing import graph_us

LAYER = ("qkv", "attention", "o", "gate_up", "down")  # launches of a layer in a decode step, but for the norm of heads
CONTEXTS = (128, 1024, 4096)
PROMPTS, ANSWERS = (64, 256, 512), (16, 32, 64)


def step_us(context: CudaContext, position: int, steps: int = 60) -> float:
    """Device time of a decode step around a position."""
    stream, state = context._runtime.stream, context._state
    first = min(position - steps // 2, context.capacity - steps - 2)
    state.settings.write(pack_settings(SamplingParams()))
    before, after = Event(), Event()
    times = []
    for _ in range(3):
        state.position.write(np.array([first], np.int32))
        context._replay("decode", position)
        before.record(stream)
        for _ in range(steps):
            context._replay("decode", position)
        after.record(stream)
        after.wait()
        times.append(after.microseconds_since(before) / steps)
    return median(times)


def named_launches(context: CudaContext, long: bool) -> dict[str, list[Launch]]:
    """The launches of a decode step by name."""
    steps, runtime = context._steps, context._runtime
    forward = DecodePass(runtime.model, context._state, runtime.decode_buffers.attention, long)
    layers = [forward.layer(i) for i in range(runtime.model.config.num_layers)]
    names = (LAYER[0], "head_norm", *LAYER[1:]) if runtime.model.config.qk_norm else LAYER
    named = {name: [layer[n] for layer in layers] for n, name in enumerate(names)}
    return {"embed": [forward.embed()], **named, "lm_head": steps.lm_head(), "sampler": steps.sampler()}


def measure_decode(folders: dict[str, Path], bandwidth: float, kv_dtype: KVDtype = DEFAULT) -> dict[str, Any]:
    """Steps at several contexts, by kernel, and the latency of whole answers; for each embedding dtype."""
    result: dict[str, Any] = {}
    device = usable_device()
    for head, folder in folders.items():
        free, _ = device.memory_info()
        backend = CudaBackend(open_packed(folder), kv_dtype)
        config = backend.config
        context = backend.new_context(max(CONTEXTS))
        # Every byte of weights, but only one row of the embedding where it is not the head.
        weights = backend.weights.nbytes
        rows = []
        for position in CONTEXTS:
            us = step_us(context, position)
            read = weights + position * backend.memory()["kv_cache"] // context.capacity
            rows.append(
                {
                    "context": position,
                    "us": us,
                    "tokens/s": 1e6 / us,
                    "ceiling_tokens/s": bandwidth * 1e9 / read,
                    "share_of_ceiling": read / us / 1e3 / bandwidth,
                }
            )
        used = free - device.memory_info()[0]
        kernels = {}
        for position in CONTEXTS:
            context._state.position.write(np.array([position - 2], np.int32))
            named = named_launches(context, position >= LONG_CONTEXT)
            stream = context._runtime.stream
            kernels[position] = {name: graph_us(stream, launches) for name, launches in named.items()}
        latency = []
        for prompt in PROMPTS:
            for answer in ANSWERS:
                ids = random_ids(config.vocab_size, prompt, 2)
                times = []
                for _ in range(3):
                    context.truncate(0)
                    start = perf_counter()
                    steps = context.decode(ids, SamplingParams())
                    for _ in range(answer):
                        next(steps)
                    times.append(perf_counter() - start)
                    steps.close()
                latency.append({"prompt": prompt, "answer": answer, "ms": median(times) * 1e3})
        result[head] = {
            "steps": rows, "kernels_us": kernels, "latency": latency, "memory": backend.memory(), "device_bytes": used,
        }  # fmt: skip
        context.close()
        backend.weights.close()
        del backend, context
        gc.collect()  # else its activations count as the next one's
    return result


FIRST_TOKEN = """
import sys, time
start = time.perf_counter()
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.backends.cuda.backend import CudaBackend
from bitnet_numba.sampling import SamplingParams
backend = CudaBackend(open_packed(sys.argv[1]))
steps = backend.new_context(4096).decode([1], SamplingParams())
next(steps)
print(time.perf_counter() - start)
"""


def measure_load(folder: Path) -> dict[str, Any]:
    """Seconds from the start of Python to the first token, in processes of their own."""
    root = Path(__file__).resolve().parent.parent.parent
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"BITNET_NUMBA_CACHE": cache}
        env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
        times = []
        for _ in range(3):
            start = perf_counter()
            command = [sys.executable, "-c", FIRST_TOKEN, str(folder)]
            subprocess.run(command, check=True, env=env, capture_output=True)
            times.append(perf_counter() - start)
    return {"first_start_s": times[0], "later_starts_s": median(times[1:])}
