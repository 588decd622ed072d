"""`bitnet-numba embed`: lines of text in, a vector for each out."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from bitnet_numba.cli.text_input import STANDARD_INPUT, read_text
from bitnet_numba.commands import complain, make_parser, output
from bitnet_numba.engine.embedding import NO_EMBEDDINGS
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.loading import KV_DTYPES, load
from bitnet_numba.errors import BitNetError, ContextFull, RequestError, printable
from bitnet_numba.hub.fetch import is_gguf
from bitnet_numba.model_options import add_run_options, load_options

LINES = 64  # whose vectors are computed together


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(
        prog,
        description="Print what each line of a text means, as a vector of length 1 of an embedding model: a line of "
        "JSON for each, a list of numbers. The dot product of two of them is how alike their texts are.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="an embedding model, as `bitnet-numba chat` takes its models")
    add("file", metavar="FILE", nargs="?", default="-", help="a text in UTF-8 (default: -, standard input)")
    add("--prompt", metavar="TEXT", default="", help="stands before each line, such as 'query: ' (default: nothing)")
    add("--dimensions", type=int, metavar="N", help="only the first N numbers, scaled to length 1 (default: all)")
    kv_help = "type of keys and values on the CPU (default: float32)"
    add_run_options(parser, KV_DTYPES["cpu"], kv_help, activations=False)
    return parser


def vectors(llm: Engine, lines: list[str], dimensions: int | None, prompt: str) -> Iterator[list[float]]:
    """The lines' vectors, some lines at a time. Raises RequestError for one that is too long, after those before it."""
    for start in range(0, len(lines), LINES):
        together = lines[start : start + LINES]
        try:
            yield from llm.embed(together, dimensions, prompt=prompt).tolist()
        except ContextFull:
            for number, line in enumerate(together, start + 1):
                try:
                    yield from llm.embed([line], dimensions, prompt=prompt).tolist()
                except ContextFull as error:
                    raise RequestError(f"line {number} is too long: {str(error).removeprefix('text 0: ')}") from None


def run(argv: list[str] | None = None, prog: str = "bitnet-numba embed") -> int:
    """The command line; returns the exit code: 0, or 2 for a user's mistake."""
    args = build_parser(prog).parse_args(argv)
    try:
        if args.file == STANDARD_INPUT and Path(args.model).is_file() and not is_gguf(args.model):
            raise RequestError(f"{printable(args.model, 400)} is a file, not a model: MODEL stands before FILE")
        text = None if args.file == STANDARD_INPUT else read_text(args.file, prog)
        with load(args.model, revision=args.revision, **load_options(args)) as llm:
            if not llm.config.embeds:
                raise RequestError(NO_EMBEDDINGS)
            if text is None:  # whose reader is asked for it when nothing else can be wrong, such as MODEL forgotten
                text = read_text(STANDARD_INPUT, prog)
            lines = text.removesuffix("\n").split("\n")
            for vector in vectors(llm, lines, args.dimensions, args.prompt):
                if (code := output(prog, json.dumps(vector) + "\n")) != 0:
                    return code
    except BitNetError as error:
        complain(prog, str(error))
        return 2
    return 0
