"""The engine's own rate for the requests of `bench.py serve`: a process that opens what a server would, without HTTP.

Its command line is the server's. It prints a line once it could answer; then, for each load that it reads, its figures.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import isnan
from time import perf_counter, process_time
from typing import Any

from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.loading import load as load_model
from bitnet_numba.engine.scheduler import Scheduler
from bitnet_numba.model_options import find_first, load_options
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.server.command_line import build_parser, read_settings
from tools.benchmarks.serve_load import Answered, Load, figures


def main(argv: Sequence[str] | None = None) -> int:
    """Answers loads until standard input ends."""
    args = build_parser().parse_args(argv)
    settings = read_settings(args)
    path, revision = find_first(args.model, args.revision)
    with load_model(path, revision=revision, **load_options(args)) as engine:
        with engine.scheduler(settings.max_sequences, settings.tokens, settings.prefill_chunk) as scheduler:
            print(json.dumps({"backend": engine.backend, "context": engine.context}), flush=True)
            for line in sys.stdin:
                load = Load(**json.loads(line))
                run(engine, scheduler, load.warm_up())
                cpu, began = process_time(), perf_counter()
                answers = run(engine, scheduler, load)
                print(json.dumps(figures(answers, perf_counter() - began, process_time() - cpu)), flush=True)
    return 0


def run(engine: Engine, scheduler: Scheduler, load: Load) -> list[Answered]:
    """Answers the requests of one load."""
    due = [0.0] * load.requests if load.clients is not None else load.times()
    at_once = load.requests if load.clients is None else load.clients
    bodies, done = load.bodies(), 0
    open_answers: dict[int, tuple[float, Answered]] = {}
    answers: list[Answered] = []
    start = perf_counter()
    while done < load.requests:
        while len(answers) < load.requests and len(open_answers) < at_once:
            if perf_counter() - start < due[len(answers)]:
                break
            began = perf_counter()
            body = bodies[len(answers)]
            answers.append(Answered(200))
            open_answers[scheduler.add(body["prompt"], params(engine, body))] = began, answers[-1]
        late = None if len(answers) == load.requests else max(0.0, due[len(answers)] - (perf_counter() - start))
        if not scheduler.wait(None if open_answers else late):
            continue
        for update in scheduler.step():
            began, answer = open_answers[update.request]
            if update.text:
                answer.last = perf_counter() - began
                answer.first = answer.last if isnan(answer.first) else answer.first
            if update.error is not None:
                answer.status = 500
            if update.completion is not None:
                answer.tokens = update.completion.stats.generated_tokens
            if update.completion is not None or update.error is not None:
                del open_answers[update.request]
                done += 1
    return answers


def params(engine: Engine, body: dict[str, Any]) -> SamplingParams:
    """How a server would sample the answer to such a request."""
    values = {"seed": body["seed"], "max_new_tokens": body["max_tokens"], "ignore_eos": body["ignore_eos"]}
    if "temperature" in body:
        values["temperature"] = body["temperature"]
    return replace(engine.sampling or SamplingParams(temperature=1.0), **values)


if __name__ == "__main__":
    sys.exit(main())
