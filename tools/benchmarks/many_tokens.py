"""What tools/bench.py measures of many tokens at a time: products, prompts and batches; plain dictionaries."""

from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bitnet_numba.backends.cuda.backend import CudaBackend
from bitnet_numba.kernels.attention.kv_cache import PAGE
from bitnet_numba.kernels.linear.gemm import gemm
from bitnet_numba.kernels.linear.operands import PackedLinear, QuantizedActivations
from bitnet_numba.kernels.runtime.device import usable_device
from bitnet_numba.kernels.runtime.driver import Event, Stream
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView
from bitnet_numba.packing import packed_words
from bitnet_numba.sampling import SamplingParams
from tools.benchmarks.inputs import random_ids, random_words
from tools.benchmarks.timing import REPEATS, cold_copies, graph_us, torch_graph_us

SHAPES = [(2560, 2560), (3840, 2560), (13824, 2560), (2560, 6912)]  # N, K: the linears of 2B4T
TOKENS = (8, 32, 128, 512)  # M
PROMPTS = (64, 512, 4096)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXT, STEPS = 256, 64  # tokens before the middle of a batch's measured steps; steps
MIXED = [CONTEXT] * 127 + [4096]  # contexts
TURNS, TURN_TOKENS, ANSWER_TOKENS = 20, 50, 100  # 3,000 tokens in the end
GREEDY = SamplingParams()


def measure_products() -> list[dict[str, Any]]:
    """Products of several tokens with cold L2, in a graph, and cuBLAS bf16 beside them."""
    device, stream, rng = usable_device(), Stream(), np.random.default_rng(4)
    most = max(TOKENS)
    cublas = cublas_products(device.l2_bytes)
    s, count = DeviceArray.of(np.full(most, 50, np.float32)), DeviceArray(1, np.int32)
    scales = DeviceArray.of(np.full(1, 0.02, np.float32))
    rows = []
    for N, K in SHAPES:
        size = packed_words(N, K)
        copies = cold_copies(4 * size, device.l2_bytes)
        weights = DeviceArray.of(random_words(size * copies))
        values = rng.integers(-127, 128, (most, K)).astype(np.int8)
        q, q_sum = DeviceArray.of(values), DeviceArray.of(values.sum(axis=1, dtype=np.int32))
        out = DeviceArray(most * N, np.float32)
        x = QuantizedActivations(q, s, q_sum)
        words = [DeviceView(weights.address + 4 * i * size, size, np.int32) for i in range(copies)]
        linears = [PackedLinear(matrix, scales, (N,), K) for matrix in words]
        for M in TOKENS:
            count.write(np.array([M], np.int32))
            times = {}
            for use_pdl in (True, False):
                launches = [gemm(device, linear, x, count, out, M, use_pdl=use_pdl) for linear in linears]
                times[use_pdl] = graph_us(stream, launches) / copies
            rows.append(
                {
                    "N": N,
                    "K": K,
                    "M": M,
                    "us": times[True],
                    "us_alone": times[False],
                    "TOPS": 2 * M * N * K / times[True] / 1e6,
                    "cublas_bf16_us": cublas.get((N, K, M)),
                }
            )
        for array in (weights, q, q_sum, out):
            array.close()
    return rows


def cublas_products(l2_bytes: int) -> dict[tuple[int, int, int], float]:
    """Microseconds of the same products by cuBLAS, bfloat16, through torch; empty without it."""
    try:
        import torch
    except ImportError:
        return {}
    result = {}
    for N, K in SHAPES:
        copies = max(4, -(-3 * l2_bytes // (2 * N * K)))
        weights = torch.randn(copies, N, K, dtype=torch.bfloat16, device="cuda")
        for M in TOKENS:
            x = torch.randn(M, K, dtype=torch.bfloat16, device="cuda")
            y = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
            result[N, K, M] = torch_graph_us([partial(torch.mm, x, w.T, out=y) for w in weights]) / copies
        del weights
        torch.cuda.empty_cache()
    return result


def measure_prefill(backend: CudaBackend) -> dict[str, Any]:
    """Wall-clock time from a prompt's ids to the first token out; and of the turns of a long conversation."""
    context = backend.new_context(max(PROMPTS) + 1)
    rows = []
    for prompt in PROMPTS:
        ids = random_ids(backend.config.vocab_size, prompt, 5)
        times = []
        for _ in range(REPEATS + 1):
            context.truncate(0)
            start = perf_counter()
            steps = context.decode(ids, GREEDY)
            next(steps)
            times.append(perf_counter() - start)
            steps.close()
        ms = median(times[1:]) * 1e3
        rows.append({"prompt": prompt, "ms": ms, "first_ms": times[0] * 1e3, "tokens/s": prompt / ms * 1e3})
    context.truncate(0)
    turns = []
    for turn in range(TURNS):
        held = len(context.ids)
        start = perf_counter()
        steps = context.decode(random_ids(backend.config.vocab_size, TURN_TOKENS, turn), GREEDY)
        next(steps)
        ms = (perf_counter() - start) * 1e3
        for _ in range(ANSWER_TOKENS):
            next(steps)
        steps.close()
        context.truncate(held + TURN_TOKENS + ANSWER_TOKENS)
        turns.append({"held": held, "new": TURN_TOKENS, "answer": ANSWER_TOKENS, "ms": ms})
    context.close()
    return {"prompts": rows, "conversation": turns}


def measure_batch(backend: CudaBackend) -> list[dict[str, Any]]:
    """Steps of batches of growing size around a context, each sequence with a prompt of its own."""
    return [step_of_batch(backend, [CONTEXT] * size) for size in BATCHES]


def measure_mixed(backend: CudaBackend) -> dict[str, Any]:
    """A large batch in which one sequence has a long context."""
    return {"contexts": MIXED} | step_of_batch(backend, MIXED)


def step_of_batch(backend: CudaBackend, contexts: list[int]) -> dict[str, Any]:
    """A step of sequences around these contexts."""
    size, capacity = len(contexts), max(contexts) + STEPS
    batch = backend.new_batch(size, capacity, sum(contexts) + size * (STEPS + PAGE))
    pages = 0
    for slot, context in enumerate(contexts):
        prompt = context - STEPS // 2
        ids = random_ids(backend.config.vocab_size, prompt, slot)
        own = range(pages, pages + -(-(context + STEPS) // batch.page_size))
        pages = own.stop
        batch.start(slot, ids, GREEDY, own, 0)
        batch.prefill([(slot, prompt)])
    for _ in range(size):
        batch.collect()
    slots = list(range(size))
    batch.step(slots)  # captures
    batch.collect()
    before, after = Event(), Event()
    before.record(backend.stream)
    start = perf_counter()
    batch.step(slots)
    for _ in range(STEPS - 2):
        batch.step(slots)  # one step ahead, as the scheduler does
        batch.collect()
    batch.collect()
    wall = (perf_counter() - start) / (STEPS - 1)
    after.record(backend.stream)
    after.wait()
    device = after.microseconds_since(before) / (STEPS - 1)
    batch.close()
    return {"sequences": size, "us": wall * 1e6, "device_us": device, "tokens/s": size / wall}
