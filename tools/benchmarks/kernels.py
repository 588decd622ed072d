"""What `tools/bench.py kernels` measures: the GEMV on full-size matrices, and the steps from a loop to it."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.gemv import gemv, plan
from bitnet_numba.kernels.linear.gemv_simple import four_codes_at_a_time, four_rows_at_a_time, one_code_at_a_time
from bitnet_numba.kernels.linear.operands import PackedLinear, QuantizedActivations
from bitnet_numba.kernels.ptx.base import int32
from bitnet_numba.kernels.runtime.device import CudaDevice, Device, usable_device
from bitnet_numba.kernels.runtime.driver import Stream
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import BLOCK_ROWS, packed_words
from tools.benchmarks.inputs import random_words
from tools.benchmarks.timing import cold_copies, graph_us, host_us, torch_graph_us

SHAPES_2B4T = [(2560, 2560), (3840, 2560), (13824, 2560), (2560, 6912)]  # N, K: its linears
SHAPES = [  # those, the 3B model's, and two large ones
    *SHAPES_2B4T, (3200, 3200), (4800, 3200), (3200, 10240), (20480, 3200), (5120, 27648), (55296, 5120),
]  # fmt: skip
MAX_K = max(K for _, K in SHAPES)
READ_THREADS, READ_BYTES = 512, 1 << 30
LADDER = [  # a step's name, its kernel of gemv_simple, threads a block, rows a block (None: a row a thread)
    ("one code at a time", one_code_at_a_time, 32, None),
    ("four codes at a time (dp4a)", four_codes_at_a_time, 32, None),
    ("four rows at a time, a warp 16 rows", four_rows_at_a_time, 32, BLOCK_ROWS),
    ("four rows at a time, 4 warps 16 rows", four_rows_at_a_time, 128, BLOCK_ROWS),
]
FAST, FAST_PDL = "gemv.py", "gemv.py with PDL"


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
        if total == 123456789:  # any number: it keeps the loads from being dropped
            out[0] = total

    return read


def measure_bandwidth(device: Device, stream: Stream) -> float:
    """GB/s of a streaming read of 1 GiB."""
    pointer = types.CPointer(types.int32)
    kernel = KernelSpec("read", make_read(device.arch), (pointer, pointer, types.int64), READ_THREADS)
    words, out = device.zeros(READ_BYTES // 4, np.int32), device.empty(1, np.int32)
    launch = device.launch(kernel, device.num_sms, (words, out, READ_BYTES // 4), use_pdl=False)
    return READ_BYTES / graph_us(stream, [launch]) / 1e3


def example_activations(device: Device) -> QuantizedActivations:
    """int8 activations of one token, enough for every shape. (Their scale and sum make no difference to the time.)"""
    q = np.random.default_rng(3).integers(-127, 128, MAX_K).astype(np.int8)
    return QuantizedActivations(
        device.array(q), device.array(np.ones(1, np.float32)), device.array(np.zeros(1, np.int32))
    )


def gemv_launches(device: Device, weights: DeviceArray, N: int, K: int, copies: int, use_pdl: bool) -> list[Launch]:
    """The GEMV with each of several matrices that lie one behind the other, given int8 activations."""
    count, x = packed_words(N, K), example_activations(device)
    scales, out = device.array(np.ones(1, np.float32)), device.empty(N, np.float32)
    matrices = [DeviceView(weights.address + 4 * i * count, count, np.int32) for i in range(copies)]
    return [gemv(device, PackedLinear(words, scales, (N,), K), x, out, use_pdl=use_pdl) for words in matrices]


def measure_kernels() -> dict[str, Any]:
    """Every product of SHAPES, in a graph with and without PDL, and as single calls; and the ladder."""
    device, stream = usable_device(), Stream()
    bandwidth = measure_bandwidth(device, stream)
    cublas = cublas_products(device.l2_bytes)
    rows = []
    for N, K in SHAPES:
        size = 4 * packed_words(N, K)
        copies = cold_copies(size, device.l2_bytes)
        weights = device.array(random_words(packed_words(N, K) * copies))
        launches = {use_pdl: gemv_launches(device, weights, N, K, copies, use_pdl) for use_pdl in (True, False)}
        times = {use_pdl: graph_us(stream, launches[use_pdl]) / copies for use_pdl in launches}
        rows.append(
            {
                "N": N,
                "K": K,
                "us": times[True],
                "us_alone": times[False],
                "host_us_per_call": host_us(launches[True][0], stream),
                "GB/s": size / times[True] / 1e3,
                "share_of_bandwidth": size / times[True] / 1e3 / bandwidth,
                "plan": list(plan(N, K, device.num_sms)),
                "cublas_bf16_us": cublas.get((N, K)),
            }
        )
        weights.close()
    return {"bandwidth_GB/s": bandwidth, "products": rows, "ladder": measure_ladder(device, stream)}


def measure_ladder(device: CudaDevice, stream: Stream) -> list[dict[str, Any]]:
    """Microseconds of each kernel of gemv_simple and of the GEMV, on the same words and activations."""
    rows = []
    for N, K in SHAPES_2B4T:
        count = packed_words(N, K)
        copies = cold_copies(4 * count, device.l2_bytes)
        weights = device.array(random_words(count * copies))
        steps: dict[str, float] = {}
        for name, kernel, threads, block_rows in LADDER:
            blocks = -(-N // (block_rows or threads))
            launches = numba_launches(device, kernel, blocks, threads, weights, N, K, copies)
            launches[0](stream.handle)  # compiles and loads it, which a capture must not
            stream.synchronize()
            steps[name] = graph_us(stream, launches) / copies
        for name, use_pdl in ((FAST, False), (FAST_PDL, True)):
            steps[name] = graph_us(stream, gemv_launches(device, weights, N, K, copies, use_pdl)) / copies
        rows.append({"N": N, "K": K, "bytes": 4 * count, "us": steps})
        weights.close()
    return rows


def numba_launches(
    device: Device, kernel: Any, blocks: int, threads: int, weights: DeviceArray, N: int, K: int, copies: int
) -> list[Callable[[Any], None]]:
    """Launches by Numba itself, `kernel[blocks, threads, stream](words, q, out)`, one with each matrix."""
    count, activations = packed_words(N, K), example_activations(device).q
    words_of_q = kernel is not one_code_at_a_time
    q_view = DeviceView(activations.address, K // 4 if words_of_q else K, np.int32 if words_of_q else np.int8)
    q_view.owner = activations
    views = [DeviceView(weights.address + 4 * i * count, count, np.int32) for i in range(copies)]
    *matrices, q, out = (cuda.as_cuda_array(array) for array in (*views, q_view, device.empty(N, np.int32)))

    def launch(words: Any, handle: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grid size")  # Numba warns of few blocks
            kernel[blocks, threads, cuda.external_stream(int(handle))](words, q, out)

    return [partial(launch, words) for words in matrices]


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
