"""`bitnet-numba convert SRC DST`: converts a BitNet checkpoint into the packed checkpoint that runs.

The conversion itself is `bitnet_numba.checkpoint.convert`.
"""

import argparse
import io
import os
import sys
from pathlib import Path

from bitnet_numba.checkpoint.convert import Report, convert
from bitnet_numba.checkpoint.gguf_types import I2S_LAYOUTS
from bitnet_numba.checkpoint.progress import progress_bar, size_text
from bitnet_numba.checkpoint.rows import HEAD_FORMATS
from bitnet_numba.commands import complain, drop_output, ignore_ctrl_c, make_parser
from bitnet_numba.errors import BitNetError, CheckpointError, printable
from bitnet_numba.hub.download import download
from bitnet_numba.hub.fetch import as_hub_model, find_gguf, is_gguf


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    what = (
        "Write a BitNet model, of Hugging Face or in a GGUF file, as a folder that every other command takes. A model "
        "that is named by hub id or GGUF file needs none of this: it is converted when it is first used."
    )
    parser = make_parser(prog, description=what)
    add = parser.add_argument
    add(
        "src",
        metavar="SRC",
        help="a Hugging Face model folder, a GGUF file, or of the hub owner/name or owner/name/FILE.gguf",
    )
    add("dst", metavar="DST", help="folder to write")
    add(
        "--head",
        choices=HEAD_FORMATS,
        default="source",
        help="format of embedding and LM head (default: source, which keeps them as they are)",
    )
    add("--force", action="store_true", help="replace DST if it is a packed checkpoint")
    add("--revision", metavar="R", help="branch, tag or commit of the hub repository (default: main)")
    add(
        "--i2s-layout",
        choices=I2S_LAYOUTS,
        help="where a GGUF file with tensors of type I2_S was made, which it does not say (default: x86)",
    )
    return parser


def run(argv: list[str] | None = None, prog: str = "bitnet-numba convert") -> int:
    """The command line; returns the exit code: 0, 1 if only the report failed, 2 for a mistake, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have characters that the terminal has not
    target, before = "", None
    try:
        args = build_parser(prog).parse_args(argv)
        if not args.dst:
            raise CheckpointError("DST must be a folder to write")
        target, before = printable(args.dst, 400), identity(args.dst)
        source = find_source(args.src, args.revision)
        with progress_bar(printable(args.src, 400), sys.stdout) as show:
            report = convert(source, Path(args.dst), args.head, args.force, show, args.i2s_layout)
        return print_report(report, target, prog)
    except BitNetError as error:
        complain(prog, str(error))
        return 2
    except KeyboardInterrupt:
        ignore_ctrl_c()
        if target and identity(args.dst) != before:
            complain(prog, f"interrupted; {target} is written")
        else:
            complain(prog, f"interrupted; {target} is as it was" if before else "interrupted; nothing was written")
        return 130


def find_source(name: str, revision: str | None) -> Path:
    """The folder or GGUF file that SRC names, or what is downloaded (or in the cache) for a hub id."""
    if not name or "://" in name:
        raise CheckpointError("SRC must be a folder, a GGUF file, or a hub id such as owner/name")
    if is_gguf(name):
        return find_gguf(name, revision)
    model = as_hub_model(name, revision)
    if model is not None:
        return download(model)
    if revision is not None:
        raise CheckpointError("--revision needs a hub id, not a folder or file")
    return Path(name)


def print_report(report: Report, target: str, prog: str) -> int:
    """Prints the statistics of a conversion; returns the exit code."""
    lines = [f"{report.tensors} tensors, {size_text(report.bytes_before)} -> {size_text(report.bytes_after)}"]
    shares = [f"{kind} {zeros / weights:.1%}" for kind, (zeros, weights) in report.zeros.items()]
    if shares:
        lines.append("zeros: " + ", ".join(shares))
    lines += [f"note: {printable(note, 400)}" for note in report.notes]
    lines.append(f"written to {target}")
    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        drop_output()
        complain(prog, f"{target} is written, but standard output is not: {error.strerror}")
        return 1
    return 0


def identity(path: str) -> tuple[int, int] | None:
    """What tells the folder at a path from another one that takes its place; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
