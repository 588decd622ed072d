"""Timing that all parts of tools/bench.py share: launches are replayed as one graph, and weights take turns so that
none is in L2 when it is read."""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

from bitnet_numba.kernels.runtime.driver import Event, Stream
from bitnet_numba.kernels.runtime.launch import Launch

REPEATS = 7


def cold_copies(nbytes: int, l2_bytes: int) -> int:
    """How many matrices of a size take turns: by the time one comes round again, L2 has forgotten it."""
    return max(20, -(-5 * l2_bytes // nbytes))


def graph_us(stream: Stream, launches: Sequence[Callable[[Any], None]]) -> float:
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
