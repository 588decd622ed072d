"""`bitnet-numba bench [MODEL]`: how fast a model runs on this machine, in figures that can be shared."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import bitnet_numba
from bitnet_numba.chat.files import read_bytes, write_file
from bitnet_numba.checkpoint.progress import size_text
from bitnet_numba.cli import machine
from bitnet_numba.commands import complain, make_parser, output
from bitnet_numba.engine.completion import Stats
from bitnet_numba.engine.engine import Engine
from bitnet_numba.errors import BitNetError, RequestError, printable
from bitnet_numba.hub.fetch import as_hub_model
from bitnet_numba.model_options import add_model_options, open_model

FORMAT = 1
PROMPT_TOKENS, ANSWER_TOKENS, SHORT_PROMPT = 512, 128, 16
MIN_RUNS, MAX_RUNS = 2, 50
SHARED = "it tells hardware, versions and speeds, and nothing of you"


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(
        prog,
        usage="%(prog)s [MODEL] [options]",
        description="Measure how fast a model reads prompts and writes answers on this machine. Nothing else should "
        "be running.",
    )
    add_model_options(parser)
    add = parser.add_argument_group("measurement").add_argument
    add("--seconds", type=float, default=5.0, metavar="S", help="time for each of the two speeds (default: 5)")
    add("--json", action="store_true", help="print the figures as JSON")
    add("--share", metavar="FILE", help="write the figures to a small JSON file, to compare machines")
    return parser


def run(argv: list[str] | None = None, prog: str = "bitnet-numba bench") -> int:
    """The command line; returns the exit code: 0, or 2 for a user's mistake."""
    args = build_parser(prog).parse_args(argv)
    try:
        if not 0 < args.seconds <= 3600:
            raise RequestError("--seconds must be above 0 and at most 3600")
        figures = measure(args)
        code = output(prog, json.dumps(figures, indent=2) + "\n" if args.json else describe(figures))
        if args.share is not None and code == 0:
            write_file(Path(args.share), (json.dumps(figures, indent=2) + "\n").encode(), _check_ours)
            complain(prog, f"{printable(args.share)} is written: {SHARED}")
    except BitNetError as error:
        complain(prog, str(error))
        return 2
    return code


def _check_ours(path: Path) -> None:
    """Raises RequestError unless a file was written by --share."""
    try:
        found = json.loads(read_bytes(path, 1 << 20, "figures"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or "bitnet_numba_bench" not in found:
        raise RequestError(f"{printable(str(path))} is there already, and does not hold such figures")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, as JSON has it. Raises BitNetError if the model does not run."""
    start = time.perf_counter()
    llm = open_model(args)
    load_seconds = time.perf_counter() - start
    config = llm.config
    start = time.perf_counter()
    llm.generate(_prompt(llm, SHORT_PROMPT), max_new_tokens=2)  # compiles what is not compiled yet
    first_seconds = time.perf_counter() - start
    prompt_tokens = min(PROMPT_TOKENS, llm.context - 1)
    answer_tokens = min(ANSWER_TOKENS, llm.context - SHORT_PROMPT)
    long, short = _prompt(llm, prompt_tokens), _prompt(llm, min(SHORT_PROMPT, llm.context - 1))

    def read() -> float:
        return llm.generate(long, max_new_tokens=1).stats.prefill_tokens_per_second

    last: list[Stats] = []

    def write() -> float:
        last[:] = [llm.generate(short, max_new_tokens=answer_tokens, ignore_eos=True).stats]
        return last[0].tokens_per_second

    prompt, answer = _speeds(read, args.seconds, "prompts"), _speeds(write, args.seconds, "answers")
    hub = as_hub_model(args.checkpoint, args.revision) if args.checkpoint else None
    return {
        "bitnet_numba_bench": FORMAT,
        "version": bitnet_numba.__version__,
        "model": {
            "name": "built-in" if not args.checkpoint else hub.name if hub is not None else "local",
            "parameters": {
                "layers": config.num_layers,
                "hidden_size": config.hidden_size,
                "mlp_size": config.intermediate_size,
                "vocabulary": config.vocab_size,
            },
        },
        "backend": llm.backend,
        **{name: value for name in ("kv_dtype", "activations") if (value := getattr(args, name)) is not None},
        "machine": _machine(llm.backend, args.threads),
        "load_seconds": round(load_seconds, 3),
        "first_answer_seconds": round(first_seconds, 3),
        "prompt": {"tokens": prompt_tokens, **prompt},
        "answer": {"tokens": last[0].generated_tokens, **answer},
        "memory_bytes": last[0].memory,
    }


def _prompt(llm: Engine, tokens: int) -> list[int]:
    """Token ids that look like a text to the model, the same on each machine."""
    ordinary = [i for i in range(llm.tokenizer.size) if i not in llm.tokenizer.special_ids]
    picked = np.random.default_rng(0).integers(0, len(ordinary), tokens)
    return [ordinary[i] for i in picked]


def _speeds(run_once: Callable[[], float], seconds: float, what: str) -> dict[str, Any]:
    """Tokens per second, the best and the median of as many runs as fit the time."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < MIN_RUNS or (time.perf_counter() < end and len(found) < MAX_RUNS):
        _waiting(f"measuring {what}, run {len(found) + 1} ...")
        found.append(run_once())
    _waiting("")
    best, median = round(max(found), 1), round(statistics.median(found), 1)
    return {"runs": len(found), "best_tokens_per_second": best, "median_tokens_per_second": median}


def _machine(backend: str, threads: int | None) -> dict[str, Any]:
    """What the figures depend on, and nothing that tells whose machine it is."""
    software = machine.guarded(machine.software)
    facts: dict[str, Any] = {"python": software.get("python"), "packages": software.get("packages")}
    cpu = machine.guarded(machine.processor) | machine.guarded(machine.probe, "cpu")
    facts["cpu"] = {key: cpu.get(key) for key in ("name", "memory_bytes", "instruction_set", "threads")}
    if threads is not None:
        facts["cpu"]["threads"] = threads
    if backend == "cuda":
        gpu = machine.guarded(machine.probe, "cuda")
        facts["gpu"] = {**(gpu.get("cards") or [{}])[0], "driver": gpu.get("driver"), "cuda": gpu.get("cuda")}
    return facts


def describe(figures: dict[str, Any]) -> str:
    """The figures as lines of text."""
    cpu, gpu = figures["machine"]["cpu"], figures["machine"].get("gpu")
    sizes = figures["model"]["parameters"]
    where = f"{cpu['name']}, {cpu['threads']} thread{'' if cpu['threads'] == 1 else 's'}, {cpu['instruction_set']}"
    if gpu is not None:
        where = f"{gpu.get('name')}, driver {gpu.get('driver')}"
    lines = [
        ("model", f"{figures['model']['name']}: {sizes['layers']} layers of {sizes['hidden_size']}"),
        ("machine", f"{figures['backend']} backend, {where}"),
        ("start", f"{figures['load_seconds']:.1f} s to load, {figures['first_answer_seconds']:.1f} s to a first token"),
    ]
    for name, title in (("prompt", "reads"), ("answer", "writes")):
        found = figures[name]
        best, median = found["best_tokens_per_second"], found["median_tokens_per_second"]
        lines.append((title, f"{median:,.1f} tokens/s (best {best:,.1f}); {name} of {found['tokens']} tokens"))
    memory = ", ".join(f"{name.replace('_', ' ')} {size_text(n)}" for name, n in figures["memory_bytes"].items())
    lines.append(("memory", memory))
    return "".join(f"{title:9}{printable(text, 240)}\n" for title, text in lines)


def _waiting(text: str) -> None:
    """A line that says what is being done, on a terminal; the next one takes its place."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
