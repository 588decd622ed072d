"""What `tools/bench.py cpu` measures: the CPU backend with a whole model, beside a streaming read of memory.

Machines are shared. So everything that is compared takes turns, in short windows, until the time is used up; `best` is
the fastest window of each, and `median` says how far from quiet the machine was.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bitnet_numba.backends.cpu.backend import CpuCache, CpuModel, CpuPool
from bitnet_numba.backends.host import HostBackend
from bitnet_numba.backends.host_model import PAGE_SIZE
from bitnet_numba.backends.protocol import NO_TOKEN
from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.loading import DEMO
from bitnet_numba.sampling import SamplingParams
from bitnet_numba.text.tokenizer import Tokenizer
from tools.benchmarks.cpu_read import READ_BYTES, WINDOW_BYTES, StreamingRead, ones
from tools.benchmarks.inputs import random_ids

CONTEXTS, PROMPTS, BATCHES = (128, 1024, 4096), (64, 512), (2, 8)
BATCH_CONTEXT = 128
STEPS = 4  # in a window
MIN_ROUNDS = 3
STORY = [{"role": "user", "content": "Tell me a story about a fox and a lantern."}]


@dataclass
class Case:
    """Something to measure: `window` returns the seconds of each of its parts, which are judged by themselves."""

    labels: dict[str, Any]
    window: Callable[[], list[float]]
    windows: list[list[float]] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)  # of each window, seconds of the layers alone, where known

    @property
    def best(self) -> float:
        """Seconds of all parts, each in its fastest window."""
        return sum(min(part) for part in zip(*self.windows, strict=True))

    @property
    def median(self) -> float:
        """Seconds of all parts, each in its median window."""
        return sum(median(part) for part in zip(*self.windows, strict=True))


def take_turns(cases: Sequence[Case], seconds: float, clock: Callable[[], float] = perf_counter) -> None:
    """Runs a window of each case after the other, for so many seconds and at least MIN_ROUNDS times."""
    start = clock()
    rounds = 0
    while rounds < MIN_ROUNDS or clock() - start < seconds:
        for case in cases:
            case.windows.append(case.window())
        rounds += 1


def check(tokens: Sequence[int]) -> None:
    """Raises AssertionError if logits were NaN: then the time is that of something else."""
    if NO_TOKEN in tokens:
        raise AssertionError("a step of the benchmark gave NaN")


class Measured:
    """A checkpoint whose models, for instruction sets and numbers of threads, share one pool of keys and values."""

    def __init__(self, name: str, checkpoint: PackedCheckpoint):
        self.name, self.checkpoint, self.config = name, checkpoint, checkpoint.config
        self.models: dict[tuple[str, int], CpuModel] = {}
        self._pool: CpuPool | None = None
        # Of an embedding that is not the head as well, a step reads one row.
        embedding = sum(spec.nbytes for name, spec in checkpoint.file.specs.items() if name.startswith("embed."))
        self.weight_bytes = checkpoint.nbytes() - (0 if self.config.tied else embedding)
        self.greedy = SamplingParams()

    def open(self, isas: Sequence[str], threads: Sequence[int]) -> None:
        """Compiles, and opens a model for each."""
        for isa in isas:
            for count in threads:
                self.models[isa, count] = CpuModel(self.checkpoint, count, isa)
        model = next(iter(self.models.values()))
        longest = min(max(CONTEXTS), self.config.max_context) + STEPS
        batch = max(BATCHES) * pages_of(BATCH_CONTEXT + STEPS)
        self._pool = model.new_pool(max(pages_of(longest), batch))
        fill(self._pool)

    def close(self) -> None:
        """Ends the threads."""
        for model in self.models.values():
            model.close()

    def labels(self, model: CpuModel) -> dict[str, Any]:
        """What a row of a table begins with."""
        return {
            "checkpoint": self.name,
            "head": self.checkpoint.head,
            "isa": model.isa.name,
            "threads": model.threads,
        }

    def cache(self, length: int, number: int = 0) -> CpuCache:
        """The cache of the n-th sequence of a length, with room for a window of steps."""
        assert self._pool is not None
        pages = pages_of(length + STEPS)
        return self._pool.cache(range(number * pages, (number + 1) * pages), length)

    def decode(self, model: CpuModel, contexts: Sequence[int]) -> Case:
        """Steps of sequences whose contexts are so long: the last ones that fit, where that is the model's longest."""
        start_at = [min(length, self.config.max_context - STEPS) for length in contexts]
        caches = [self.cache(length, i) for i, length in enumerate(start_at)]
        start = random_ids(self.config.vocab_size, len(caches), 2)
        histories, params = [[0]] * len(caches), [self.greedy] * len(caches)

        def window() -> list[float]:
            tokens, in_layers = start, 0.0
            for cache, length in zip(caches, start_at, strict=True):
                cache.length = length
            begin = perf_counter()
            for _ in range(STEPS):
                step = perf_counter()
                hidden = model.step(tokens, caches)
                in_layers += perf_counter() - step
                tokens = model.sample(hidden, histories, params, [1] * len(caches))
            seconds = perf_counter() - begin
            check(tokens)
            case.layers.append(in_layers / STEPS)
            return [seconds / STEPS]

        position_bytes = model.page_bytes() // PAGE_SIZE
        read = self.weight_bytes + sum(contexts) * position_bytes
        labels = {"sequences": len(contexts), "context": contexts[0], "bytes": read}
        case = Case(self.labels(model) | labels, window)
        return case

    def prompt(self, model: CpuModel, length: int) -> Case:
        """A prompt, from its ids to the first token out, in passes of a page as the backend makes them."""
        ids = random_ids(self.config.vocab_size, length, 2)
        cache = self.cache(length)

        def window() -> list[float]:
            cache.length = 0
            times = [perf_counter()]
            for first in range(0, length, PAGE_SIZE):
                hidden = model.forward(ids[first : first + PAGE_SIZE], cache)
                times.append(perf_counter())
            check(model.sample(hidden[-1:], [ids], [self.greedy], [length]))
            times.append(perf_counter())
            return np.diff(times).tolist()

        return Case(self.labels(model) | {"prompt": length}, window)


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_SIZE)


def fill(pool: CpuPool) -> None:
    """Writes bfloat16 numbers to all pages: what was never written lies in one page of zeros, and in the cache."""
    floats = np.random.default_rng(4).standard_normal(1 << 20, np.float32)
    numbers = (floats.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    halves = pool.memory[: len(pool.memory) // 2 * 2].view(np.uint16)
    for first in range(0, len(halves), len(numbers)):
        part = halves[first : first + len(numbers)]
        part[:] = numbers[: len(part)]


def demo_case(isa: str, threads: int) -> tuple[Case, CpuModel]:
    """A story of the built-in model through `generate`: a window is the time from its first token to its last."""
    checkpoint = open_packed(DEMO)
    model, config = CpuModel(checkpoint, threads, isa), checkpoint.config
    tokenizer = Tokenizer.open(DEMO, config.vocab_size)
    engine = Engine(HostBackend("cpu", model), tokenizer, config, config.max_context)

    def window() -> list[float]:
        stats = engine.generate(STORY, seed=1).stats
        case.labels["tokens"] = stats.generated_tokens - 1
        return [stats.decode_seconds]

    case = Case({"isa": isa, "threads": threads}, window)
    return case, model


def load_average() -> float | None:
    """Programs that ran or waited for a CPU in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def measure_part(
    part: str, measured: Sequence[Measured], isas: Sequence[str], threads: Sequence[int], seconds: float
) -> dict[str, Any]:
    """The rows of a part, and the streaming read between its windows."""
    memory = [("memory", StreamingRead(ones(), WINDOW_BYTES // READ_BYTES))]
    if part == "decode":
        memory += [(m.name, mapped_read(m.checkpoint)) for m in measured]
    reads = [read_case(name, read, count) for name, read in memory for count in threads]
    opened: list[CpuModel] = []
    cases: list[Case] = []
    if part == "demo":
        for isa in isas:
            for count in threads:
                case, model = demo_case(isa, count)
                cases.append(case)
                opened.append(model)
    for m in measured if part != "demo" else ():
        fitting = m.config.max_context
        for model in m.models.values():
            if part == "decode":
                cases += [m.decode(model, [length]) for length in CONTEXTS if length <= fitting]
            elif part == "batch":
                cases += [m.decode(model, [BATCH_CONTEXT] * n) for n in BATCHES if fitting >= BATCH_CONTEXT]
            else:
                cases += [m.prompt(model, length) for length in PROMPTS if length <= fitting]
    print(f"bench.py: {part}: {len(cases)} cases take turns, {seconds:.0f} s", file=sys.stderr, flush=True)
    load = [load_average()]
    try:
        take_turns([*reads, *cases], seconds)
    finally:
        for _, read in memory:
            read.close()
        for model in opened:
            model.close()
    load.append(load_average())
    of_memory = {read.labels["threads"]: read for read in reads if read.labels["of"] == "memory"}
    return {
        "load": load,
        "rounds": len(reads[0].windows),
        "read": [
            {"of": read.labels["of"], "threads": read.labels["threads"], "GB/s": rate(read, read.best),
             "median_GB/s": rate(read, read.median)}
            for read in reads
        ],
        "rows": [row_of(case, of_memory) for case in cases],
    }  # fmt: skip


def mapped_read(checkpoint: PackedCheckpoint) -> StreamingRead:
    """A read of the largest tensor of a checkpoint, where it is mapped."""
    name = max(checkpoint.names, key=lambda name: checkpoint.file.specs[name].nbytes)
    flat = checkpoint.tensor(name).reshape(-1).view(np.uint8)
    words = flat[: len(flat) // 4 * 4].view(np.int32)
    return StreamingRead(words, -(-WINDOW_BYTES // words.nbytes))


def read_case(name: str, read: StreamingRead, threads: int) -> Case:
    """A streaming read by some threads."""
    labels = {"of": name, "threads": threads, "bytes": read.nbytes(threads)}
    return Case(labels, lambda: [read.seconds(threads)])


def rate(case: Case, seconds: float) -> float:
    """GB/s of what a case reads in some time."""
    return case.labels["bytes"] / seconds / 1e9


def head_seconds(case: Case) -> list[float]:
    """Seconds of LM head and sampler, in each window of a case of decoding."""
    return [window[0] - layers for window, layers in zip(case.windows, case.layers, strict=True)]


def row_of(case: Case, reads: dict[int, Case]) -> dict[str, Any]:
    """The figures of a case. reads: the streaming read of memory, by number of threads."""
    labels = case.labels
    tokens = labels.get("tokens") or labels.get("sequences") or labels["prompt"]
    row = labels | {
        "ms": 1e3 * case.best,
        "median_ms": 1e3 * case.median,
        "tokens/s": tokens / case.best,
        "median_tokens/s": tokens / case.median,
    }
    if "bytes" in labels:
        read = reads[labels["threads"]]
        row |= {
            "GB/s": rate(case, case.best),
            "share_of_read": rate(case, case.best) / rate(read, read.best),
            "median_share_of_read": rate(case, case.median) / rate(read, read.median),
        }
        # Each in its own fastest window, so together a little less than `ms`.
        row |= {"layers_ms": 1e3 * min(case.layers), "head_ms": 1e3 * min(head_seconds(case))}
    return row


def measure_cpu(
    folders: dict[str, Path],
    isas: Sequence[str],
    threads: Sequence[int],
    parts: Sequence[str],
    seconds: float,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The figures of some parts. folders: packed checkpoints by their names in the tables. save: called after each
    part with all figures so far, so that a run that is interrupted loses no more than one part."""
    measured: list[Measured] = []
    try:
        for name, folder in folders.items():
            measured.append(Measured(name, open_packed(folder)))
            measured[-1].open(isas, threads)
        figures: dict[str, Any] = {"date": time.strftime("%Y-%m-%d", time.gmtime())}
        for part in parts:
            figures[part] = measure_part(part, measured, isas, threads, seconds)
            save(figures)
        return figures
    finally:
        for m in measured:
            m.close()
