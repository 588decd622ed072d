"""Evaluate a model of the text world (default: the built-in model) on what it has never seen.

    python tools/eval_demo.py --backend reference --stories 1000

`tools/demo/evaluate.py` describes what is measured.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitnet_numba.engine.loading import BACKENDS, load
from bitnet_numba.errors import BitNetError
from tools.demo.evaluate import below, judge, report
from tools.docs.help_text import DefaultsFormatter


def main(argv: list[str] | None = None) -> int:
    """The command line; exit code 0 if all thresholds are met, 1 if not, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=DefaultsFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a packed checkpoint (default: the built-in model)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what runs the model")
    parser.add_argument("-n", "--number", type=int, default=100, help="number of questions of each kind")
    parser.add_argument(
        "--stories", type=int, default=1000, help="number of stories told, and a tenth more with accents"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of questions and stories")
    parser.add_argument("--samples", type=int, default=100, help="number of stories sampled for one request")
    parser.add_argument(
        "--conversations",
        type=int,
        default=24,
        help="number of conversations, each filling the context, for the perplexity",
    )
    parser.add_argument("--against", metavar="FOLDER", help="second checkpoint, to compare its perplexity")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args(argv)
    if min(args.number, args.stories, args.samples, args.conversations) < 1 or args.seed < 0:
        parser.error("-n, --stories, --samples and --conversations must be at least 1, --seed at least 0")
    try:
        llm = load(args.checkpoint, args.backend)
        other = load(args.against, args.backend) if args.against else None
        figures = judge(llm, other, args)
    except BitNetError as error:
        print(f"eval_demo: {error}", file=sys.stderr)
        return 2
    print(report(llm, figures))
    if args.json:
        args.json.write_text(json.dumps({"backend": llm.backend, **figures}, indent=1) + "\n")
    missed = below(figures)
    if missed:
        print(f"below the threshold: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
