"""What tools/bench.py measures, as plain dictionaries; see there."""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.backends.cuda.backend import CudaBackend
from bitnet_numba.backends.cuda.context import CudaContext
from bitnet_numba.checkpoint.packed import FORMAT, EmbeddingDtype, open_packed, packed_plan
from bitnet_numba.checkpoint.safetensors_file import write_tensors
from bitnet_numba.config import ModelConfig
from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.decode import LONG_CONTEXT
from bitnet_numba.kernels.linear.gemv import plan, spec, w2a8_gemv
from bitnet_numba.kernels.ptx.base import int32
from bitnet_numba.kernels.runtime.device import Device, usable_device
from bitnet_numba.kernels.runtime.driver import Event, Stream
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.kernels.sampling.parts import pack_settings
from bitnet_numba.packing import BLOCK_ROWS, packed_words
from bitnet_numba.sampling import SamplingParams
from tools.make_checkpoint import PRESETS, QUANTIZATION

SHAPES = [  # N, K: the linears of 2B4T, of the 3B model, and two large ones
    (2560, 2560), (3840, 2560), (13824, 2560), (2560, 6912), (3200, 3200), (4800, 3200), (3200, 10240), (20480, 3200),
    (5120, 27648), (55296, 5120),
]  # fmt: skip
CONTEXTS = (128, 1024, 4096)
PROMPTS, ANSWERS = (64, 256, 512), (16, 32, 64)
REPEATS = 7
READ_THREADS, READ_BYTES = 512, 1 << 30


def random_words(count: int, seed: int = 0) -> np.ndarray:
    """int32 words of random ternary codes: 1, 2 and 3."""
    words = np.random.default_rng(seed).integers(0, 1 << 32, count, np.uint32)
    pairs = np.uint32(0x55555555)
    return (words | (~(words | words >> np.uint32(1)) & pairs)).view(np.int32)


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    """Tokens of a prompt."""
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


def graph_us(stream: Stream, launches: list[Launch]) -> float:
    """Median device time of the launches, replayed as one graph, in microseconds."""
    graph, before, after = stream.capture(launches), Event(), Event()
    graph.replay(stream)
    times = []
    for _ in range(REPEATS):
        before.record(stream)
        graph.replay(stream)
        after.record(stream)
        after.wait()
        times.append(after.microseconds_since(before))
    graph.close()
    return median(times)


def make_read(arch: int) -> Callable[..., None]:
    """A kernel that only reads: what the memory gives at best."""
    load, AHEAD, THREADS = ptx.stream_load(arch), 8, READ_THREADS

    def read(words, out, count):
        thread = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        stride = cuda.gridDim.x * THREADS * 4
        total = int32(0)
        first = thread * 4
        while first + (AHEAD - 1) * stride < count:
            for u in range(AHEAD):
                a, b, c, d = load(words, first + u * stride)
                total = int32(total + a + b + c + d)
            first += AHEAD * stride
        if total == 123456789:  # never mind which; it keeps the loads alive
            out[0] = total

    return read


def measure_bandwidth(device: Device, stream: Stream) -> float:
    """GB/s of a streaming read of 1 GiB."""
    pointer = types.CPointer(types.int32)
    kernel = KernelSpec("read", make_read(device.arch), (pointer, pointer, types.int64), READ_THREADS)
    words, out = DeviceArray(READ_BYTES // 4, np.int32, zero=True), DeviceArray(1, np.int32)
    launch = Launch(kernel, device.num_sms, (words, out, READ_BYTES // 4), device, use_pdl=False)
    return READ_BYTES / graph_us(stream, [launch]) / 1e3


def measure_kernels() -> dict[str, Any]:
    """Every product of SHAPES with cold L2, in a graph with and without early launch, and as single calls."""
    device, stream = usable_device(), Stream()
    bandwidth = measure_bandwidth(device, stream)
    cublas = cublas_products(device.l2_bytes)
    q = DeviceArray.of(np.random.default_rng(3).integers(-127, 128, 1 << 15).astype(np.int8))
    quantization = DeviceArray.of(np.array([1, 0], np.float32))
    scales, out = DeviceArray.of(np.ones(1, np.float32)), DeviceArray(1 << 16, np.float32)
    rows = []
    for N, K in SHAPES:
        size = 4 * packed_words(N, K)
        copies = max(20, -(-5 * device.l2_bytes // size))
        weights = DeviceArray.of(random_words(packed_words(N, K) * copies))
        split = plan(N, K, device.num_sms)
        kernel = spec(device.arch, K, split, "int8", "store")
        times = {}
        for overlap in (True, False):
            sizes = (N, -(-N // BLOCK_ROWS), 0, N, N)
            launches = []
            for i in range(copies):
                arguments = (weights.address + i * size, q, quantization, 0.0, scales, None, out, *sizes)
                launches.append(Launch(kernel, split.grid, arguments, device, overlap))
            times[overlap] = graph_us(stream, launches) / copies
        call = w2a8_gemv(device, weights, q, quantization, scales, out, N, K)
        rows.append(
            {
                "N": N,
                "K": K,
                "us": times[True],
                "us_alone": times[False],
                "host_us_per_call": host_us(call, stream),
                "GB/s": size / times[True] / 1e3,
                "share_of_bandwidth": size / times[True] / 1e3 / bandwidth,
                "plan": list(split),
                "cublas_bf16_us": cublas.get((N, K)),
            }
        )
        weights.close()
    return {"bandwidth_GB/s": bandwidth, "products": rows}


def host_us(call: Launch, stream: Stream, count: int = 500) -> float:
    """Median host time of one prepared launch, in microseconds."""
    times = []
    for _ in range(REPEATS):
        start = perf_counter()
        for _ in range(count):
            call(stream.handle)
        times.append((perf_counter() - start) / count * 1e6)
        stream.synchronize()
    return median(times)


def cublas_products(l2_bytes: int) -> dict[tuple[int, int], float]:
    """Microseconds of the same products by cuBLAS, bfloat16, through torch; empty without it."""
    try:
        import torch
    except ImportError:
        return {}
    result = {}
    for N, K in SHAPES:
        copies = max(4, -(-3 * l2_bytes // (2 * N * K)))
        weights = torch.randn(copies, N, K, dtype=torch.bfloat16, device="cuda")
        x = torch.randn(K, 1, dtype=torch.bfloat16, device="cuda")
        y = torch.empty(N, 1, dtype=torch.bfloat16, device="cuda")
        result[N, K] = torch_graph_us([partial(torch.mm, w, x, out=y) for w in weights]) / copies
        del weights
        torch.cuda.empty_cache()
    return result


def torch_graph_us(calls: list[Callable[[], Any]]) -> float:
    """Median device time of torch calls, replayed as one graph, in microseconds."""
    import torch

    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPEATS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3)
    return median(times)


def write_random_packed(folder: Path, head: EmbeddingDtype) -> None:
    """A packed 2B4T of random weights, made directly, without the way through a Hugging Face checkpoint."""
    _, raw = PRESETS["2b-4t"]
    raw = raw | {"quantization_config": QUANTIZATION["offline"], "bitnet_numba": {"format": FORMAT, "head": head}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    plan_ = packed_plan(ModelConfig.from_hf(raw), head)
    words = random_words(1 << 22)
    rng = np.random.default_rng(1)
    halves = (rng.standard_normal(1 << 22).astype(np.float32) * np.float32(0.02)).view(np.uint32) >> np.uint32(16)
    kinds = {"I32": words, "BF16": halves.astype(np.uint16), "I8": rng.integers(-127, 128, 1 << 22).astype(np.int8)}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in plan_.items():
            size = int(np.prod(tensor.shape))
            if tensor.dtype == "F32":
                yield name, np.full(tensor.shape, 1.0 if "norm" in name else 2e-4, np.float32)
            else:
                yield name, np.resize(kinds[tensor.dtype], size).reshape(tensor.shape)

    with open(folder / "model.safetensors", "wb") as file:
        write_tensors(file, plan_, tensors(), {})


def step_us(context: CudaContext, position: int, steps: int = 60) -> float:
    """Device time of a decode step around a position."""
    stream, state = context._stream, context._state
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


def measure_decode(folders: dict[str, Path], bandwidth: float) -> dict[str, Any]:
    """Steps at several contexts, by kernel, and the latency of whole answers; for each kind of head."""
    result: dict[str, Any] = {}
    device = usable_device()
    for head, folder in folders.items():
        free, _ = device.memory_info()
        backend = CudaBackend(open_packed(folder))
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
            named = context._step.launches(position >= LONG_CONTEXT)
            kernels[position] = {name: graph_us(context._stream, launches) for name, launches in named.items()}
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
from bitnet_numba.checkpoint import open_packed
from bitnet_numba.backends.cuda.backend import CudaBackend
from bitnet_numba.sampling import SamplingParams
backend = CudaBackend(open_packed(sys.argv[1]))
steps = backend.new_context(4096).decode([1], SamplingParams())
next(steps)
print(time.perf_counter() - start)
"""


def measure_load(folder: Path) -> dict[str, Any]:
    """Seconds from the start of Python to the first token, in processes of their own."""
    root = Path(__file__).resolve().parent.parent
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
