"""Random events on a scheduler for as long as you like, with the checks of `tests/engine/soak.py`.

    python tools/soak.py --events 1000000               on a backend without a model
    python tools/soak.py --minutes 10 --backend cpu     on the built-in model
    python tools/soak.py --http --events 100000         over HTTP, with the checks of `tests/server/soak.py`

Prints what has happened, and ends with an error at the first thing that is wrong.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.loading import load
from bitnet_numba.engine.request import Request
from tests.engine.soak import Soak
from tests.engine.toy_soak import toy_soak
from tools.docs.help_text import DefaultsFormatter

PART = 1000  # events between looks at the clock
PARTS = 50  # of an HTTP soak: a line each


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=DefaultsFormatter)
    parser.add_argument(
        "--backend", choices=("toy", "cpu", "reference", "cuda"), help="what computes (default: toy, with --http cpu)"
    )
    parser.add_argument("--events", type=int, default=1_000_000, help="number of events, at most")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the events")
    parser.add_argument("--http", action="store_true", help="requests over HTTP, to a server that is started")
    parser.add_argument("--connections", type=int, default=64, help="with --http: at a time")
    args = parser.parse_args(argv)
    if args.http:
        if args.backend == "toy":
            parser.error("--http needs a backend with a model")
        return http_soak(args.backend or "cpu", args)
    backend = args.backend or "toy"
    soak = toy_soak(args.seed) if backend == "toy" else model_soak(backend, args.seed)
    start, done = time.monotonic(), 0
    while done < args.events and time.monotonic() - start < 60 * args.minutes:
        part = min(PART, args.events - done)
        soak.run(part)
        done += part
        if sys.stderr.isatty():
            print(f"\r{done:,} events", end="", file=sys.stderr, flush=True)
    soak.finish()
    print(f"{done:,} events in {time.monotonic() - start:.0f} s")
    for what, count in sorted(soak.counts.items()):
        print(f"{count:12,} {what}")
    return 0


def http_soak(backend: str, args: argparse.Namespace) -> int:
    """Asks a server of the built-in model, and prints what has become of its memory and its open files."""
    from tests.server.soak import HttpSoak
    from tools.benchmarks.serve import own_server, resident

    with own_server(["--backend", backend, "--max-waiting", str(2 * args.connections)]) as server:
        soak = HttpSoak(server.url, args.connections, args.seed)
        start, done = time.monotonic(), 0
        while done < args.events and time.monotonic() - start < 60 * args.minutes:
            part = min(args.events // PARTS or 1, args.events - done)
            soak.run(part)
            done += part
            memory, files = resident(server.pid), len(os.listdir(f"/proc/{server.pid}/fd"))
            print(
                f"{done:12,} requests in {time.monotonic() - start:,.0f} s; {memory:,.1f} MB, {files} open files",
                flush=True,
            )
        cpu = os.times()
    print(
        f"{done:,} requests in {time.monotonic() - start:.0f} s; client {cpu.user + cpu.system:.0f} s of processor time"
    )
    for what, count in sorted(soak.counts.items()):
        print(f"{count:12,} {what}")
    return 0


def model_soak(backend: str, seed: int) -> Soak:
    """A soak of the built-in model, with so few pages that there are preemptions."""
    llm = load(None, backend, context=256)

    def alone(request: Request) -> Completion:
        """By the kernels of batches: on CUDA, those of one sequence round otherwise."""
        return llm._answer_together([request])[0]

    def fail() -> None:
        """It does not fail."""

    return Soak(llm, 256, alone, fail, seed)


if __name__ == "__main__":
    sys.exit(main())
