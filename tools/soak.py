"""Random events on a scheduler for as long as you like, with the checks of `tests/engine/soak.py` after each.

    python tools/soak.py --events 1000000               on a backend without a model
    python tools/soak.py --minutes 10 --backend cpu     on the built-in model

Prints what has happened, and ends with an error at the first thing that is wrong.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.loading import load
from bitnet_numba.engine.request import Request
from tests.engine.soak import Soak
from tests.engine.toy_soak import toy_soak

PART = 1000  # events between looks at the clock


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--backend", choices=("toy", "cpu", "reference", "cuda"), default="toy", help="what computes")
    parser.add_argument("--events", type=int, default=1_000_000, help="number of events, at most")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the events")
    args = parser.parse_args(argv)
    soak = toy_soak(args.seed) if args.backend == "toy" else model_soak(args.backend, args.seed)
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


def model_soak(backend: str, seed: int) -> Soak:
    """A soak of the built-in model, with so few pages that there are preemptions."""
    llm = load(None, backend, context=256)

    def alone(request: Request) -> Completion:
        with llm.session() as session:
            return session.stream_request(request).result()

    def fail() -> None:
        """It does not fail."""

    return Soak(llm, 256, alone, fail, seed)


if __name__ == "__main__":
    sys.exit(main())
