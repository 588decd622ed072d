"""`bitnet-numba perplexity FILE`: how well a model predicts a text."""

import argparse
import json
import sys
from time import perf_counter

from bitnet_numba.cli.text_input import read_text
from bitnet_numba.commands import complain, make_parser, output
from bitnet_numba.engine.loading import load
from bitnet_numba.engine.scoring import MAX_WINDOW
from bitnet_numba.errors import BitNetError, RequestError
from bitnet_numba.model_options import add_run_options, load_options


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(
        prog,
        description="Print a model's perplexity on a text: exp of the mean negative log probability of its tokens, "
        "each given those before it. A text longer than a window is scored in windows that overlap, each token once.",
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="a text in UTF-8; - reads standard input")
    add("--model", metavar="MODEL", help="a model as `bitnet-numba chat` takes it (default: the built-in model)")
    add_run_options(parser)
    add(
        "--window",
        type=int,
        metavar="N",
        help=f"tokens that are looked at together (default: the model's context, at most {MAX_WINDOW})",
    )
    add("--stride", type=int, metavar="N", help="by how many tokens windows are apart (default: half a window)")
    add("--max-tokens", type=int, metavar="N", help="score only the first N tokens (default: all)")
    add("--json", action="store_true", help="print JSON")
    return parser


def run(argv: list[str] | None = None, prog: str = "bitnet-numba perplexity") -> int:
    """The command line; returns the exit code: 0, or 2 for a user's mistake."""
    args = build_parser(prog).parse_args(argv)
    try:
        if args.max_tokens is not None and args.max_tokens < 2:
            raise RequestError("--max-tokens must be at least 2")
        text = read_text(args.file, prog)
        with load(args.model, revision=args.revision, **load_options(args)) as llm:
            ids = llm.tokenizer.encode(text)[: args.max_tokens]
            window = min(llm.context, MAX_WINDOW) if args.window is None else args.window
            stride = window // 2 if args.stride is None else args.stride
            start = perf_counter()
            score = llm.score(ids, window=window, stride=stride, progress=show_progress)
            seconds = perf_counter() - start
            report = {"perplexity": score.perplexity, "tokens": len(ids), "window": window, "stride": stride}
            report |= {"seconds": round(seconds, 3), "backend": llm.backend}
    except BitNetError as error:
        complain(prog, str(error))
        return 2
    if args.json:
        return output(prog, json.dumps(report) + "\n")
    facts = f"{len(ids):,} tokens in {seconds:.1f} s on {report['backend']}, window {window}, stride {stride}"
    return output(prog, f"perplexity {score.perplexity:.4f}  ({facts})\n")


def show_progress(done: int, total: int) -> None:
    """A line that counts, on a terminal; it is gone in the end."""
    if sys.stderr is not None and sys.stderr.isatty():
        text = f"{done:,} of {total:,} tokens" if done < total else ""
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
