"""What tools/bench.py measures of the engine end to end: answers per second beside the device's own time for them, how
long running answers stall while prompts come in, and what of a core the host takes; as plain dictionaries."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import numpy as np

from bitnet_numba.engine.engine import Engine
from bitnet_numba.grammar import Grammar
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.server.garbage import RoundCollector, spare_collector
from tools.benchmarks.inputs import random_ids

STOPS = ("\nUser:", "</s>")
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=1, stop=STOPS)
RECORDS = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["fox", "dog", "cat", "bear"]},
            "age": {"type": "integer", "maximum": 120},
            "known": {"type": "boolean"},
        },
        "required": ["name", "kind", "age", "known"],
        "additionalProperties": False,
    },
}
REPEATS = 3  # runs of each case, the first of the process beside them
MANY = 0.75  # of the most answers that run at once: rounds with at least so many are compared


class Sizes(NamedTuple):
    """How much is asked for."""

    requests: int = 128  # of one length
    prompt: int = 128
    answer: int = 256
    formed: int = 32  # requests whose answers have a form
    mixed: int = 400  # requests of any length
    mixed_prompts: tuple[int, int] = (20, 900)
    mixed_answer: int = 200
    mixed_sequences: int = 400  # at once, and with prompts that come in while others run:
    stalled_sequences: int = 256


FULL = Sizes()
SMALL = Sizes(8, 32, 32, 4, 12, (5, 90), 20, 8, 8)


def measure_engine(llm: Engine, sizes: Sizes) -> dict[str, Any]:
    """All cases. No token of an answer ends it: all are of the same length."""
    stop_ids, llm.tokenizer.stop_ids = llm.tokenizer.stop_ids, frozenset()
    try:
        return measure_cases(llm, sizes, stop_ids or frozenset([llm.config.vocab_size - 1]))
    finally:
        llm.tokenizer.stop_ids = stop_ids


def measure_cases(llm: Engine, sizes: Sizes, ends: frozenset[int]) -> dict[str, Any]:
    """See `measure_engine`. ends: tokens by which an answer of a form could end, were it not so long."""
    vocab, form = llm.config.vocab_size, Grammar.json_schema(RECORDS)
    prompts = [random_ids(vocab, sizes.prompt, seed) for seed in range(sizes.requests)]
    lengths = np.random.default_rng(7).integers(*sizes.mixed_prompts, sizes.mixed, endpoint=True)
    mixed = [random_ids(vocab, int(length), seed) for seed, length in enumerate(lengths)]

    def batch(params: SamplingParams) -> Callable[[], int]:
        params = replace(params, max_new_tokens=sizes.answer)
        return lambda: count(llm.generate_batch(prompts, params, max_sequences=sizes.requests))

    def free() -> int:
        params = SamplingParams(temperature=1.0, seed=1, max_new_tokens=sizes.answer)
        return count(llm.generate_batch(prompts[: sizes.formed], params, max_sequences=sizes.formed))

    def formed() -> int:
        llm.tokenizer.stop_ids = ends
        (quote,) = llm.tokenizer.encode_plain('"')
        # Random weights would never end a name.
        params = SamplingParams(temperature=1.0, seed=1, max_new_tokens=sizes.answer, logit_bias={quote: 100})
        params = replace(params, grammar=form)
        try:
            return count(llm.generate_batch(prompts[: sizes.formed], params, max_sequences=sizes.formed))
        finally:
            llm.tokenizer.stop_ids = frozenset()

    def of_any_length() -> int:
        params = SamplingParams(max_new_tokens=sizes.mixed_answer)
        return count(llm.generate_batch(mixed, params, max_sequences=sizes.mixed_sequences))

    def one() -> int:
        return count([llm.generate(prompts[0], max_new_tokens=sizes.answer)])

    low, high = sizes.mixed_prompts
    cases = {
        f"{sizes.requests} x ({sizes.prompt} in, {sizes.answer} out), greedy": batch(SamplingParams()),
        "the same, temperature, top-p, two stop strings": batch(SAMPLED),
        "the same, and log probabilities of 5 tokens": batch(replace(SAMPLED, logprobs=5)),
        f"{sizes.formed} x ({sizes.prompt} in, {sizes.answer} out), temperature": free,
        "the same, and records in JSON": formed,
        f"{sizes.mixed} of {low} to {high} in, {sizes.mixed_answer} out": of_any_length,
        f"one of {sizes.prompt} in, {sizes.answer} out": one,
    }
    rows = [{"case": name, **measure_case(run)} for name, run in cases.items()]
    return {"backend": llm.backend, "rows": rows, "stalls": measure_stalls(llm, mixed, sizes)}


def count(completions: list[Any]) -> int:
    """Tokens of answers."""
    return sum(completion.stats.generated_tokens for completion in completions)


def measure_case(run: Callable[[], int]) -> dict[str, Any]:
    """Seconds of the first run and of the best one after it, with the host's share of a core and the device's time."""
    times = []
    for _ in range(1 + REPEATS):
        start, cpu = perf_counter(), process_time()
        tokens = run()
        seconds = perf_counter() - start
        times.append((seconds, (process_time() - cpu) / seconds))
    best, host = min(times[1:])
    with device_time() as busy:
        run()
    return {
        "tokens": tokens, "first_s": times[0][0], "s": best, "tokens/s": tokens / best, "host_share": host,
        "device_s": sum(busy) if busy else None,
    }  # fmt: skip


@contextlib.contextmanager
def device_time() -> Iterator[list[float]]:
    """Fills the list with the device's seconds for each graph replayed meanwhile; leaves it empty without a GPU."""
    from bitnet_numba.kernels.runtime.driver import Event, Graph, Stream

    pairs: list[tuple[Event, Event]] = []
    replay = Graph.replay

    def timed(self: Graph, stream: Stream) -> None:
        pairs.append((Event(), Event()))
        pairs[-1][0].record(stream)
        replay(self, stream)
        pairs[-1][1].record(stream)

    seconds: list[float] = []
    Graph.replay = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Graph.replay = replay  # type: ignore[method-assign]
    for before, after in pairs:
        after.wait()
        seconds.append(after.microseconds_since(before) / 1e6)


def measure_stalls(llm: Engine, prompts: list[list[int]], sizes: Sizes) -> dict[str, Any]:
    """Rounds of a scheduler with requests of any length: how long answers wait for their next token while prompts come
    in, and how long they do when none come any more, of which no round computes one.

    Half of the requests come at once, the others one in each round. Only rounds with nearly as many answers as ever run
    together count. As in a server, the graphs have been captured before, and the garbage collector leaves alone what
    there is of the model and runs between rounds.
    """
    spare_collector()
    collector = RoundCollector()
    collector.hold()
    try:
        return time_rounds(llm, prompts, sizes, collector)
    finally:
        collector.release()
        gc.unfreeze()


def time_rounds(llm: Engine, prompts: list[list[int]], sizes: Sizes, collector: RoundCollector) -> dict[str, Any]:
    """See `measure_stalls`."""
    params = SamplingParams(max_new_tokens=sizes.mixed_answer)
    rounds: list[tuple[int, bool, float]] = []  # answers that run, whether prompts come in, ms
    begun: set[int] = set()  # requests whose prompts have been computed
    with llm.scheduler(sizes.stalled_sequences) as scheduler:
        while scheduler.prepare():
            pass
        late = list(prompts)
        for _ in range(len(prompts) // 2):
            scheduler.add(late.pop(), params)
        last = None  # when tokens last came
        while scheduler.busy:
            if late:
                scheduler.add(late.pop(), params)
            running, coming = scheduler.running, len(begun) < len(prompts)
            updates = scheduler.step()
            now = perf_counter()
            begun.update(update.request for update in updates)
            if updates and last is not None:
                rounds.append((running, coming, (now - last) * 1e3))
            last = now if updates else None
            collector.collect()
    most = max(running for running, _, _ in rounds)

    def times(prompts_come: bool) -> list[float]:
        own = [(running, ms) for running, coming, ms in rounds if coming == prompts_come]
        return [ms for running, ms in own if running >= MANY * most] or [ms for _, ms in own]

    with_prompts, alone = times(True), times(False)
    return {
        "rounds": len(with_prompts), "running": most, "alone_ms": median(alone), "median_ms": median(with_prompts),
        "p99_ms": float(np.percentile(with_prompts, 99)), "longest_ms": max(with_prompts),
    }  # fmt: skip
