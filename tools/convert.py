"""Converts a Hugging Face BitNet checkpoint into the packed checkpoint that bitnet_numba runs.

    python tools/convert.py SRC DST [--head bf16|int8] [--force] [--revision R]

The conversion itself is `bitnet_numba.checkpoint.convert`.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from huggingface_hub import snapshot_download
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from bitnet_numba.checkpoint.convert import Report, convert
from bitnet_numba.checkpoint.packed import EMBEDDING_DTYPES
from bitnet_numba.errors import BitNetError, CheckpointError, one_line

NEEDED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]  # of a hub repository, to be downloaded


def find_source(name: str, revision: str | None) -> Path:
    """The folder that SRC names: itself, or the one that huggingface_hub downloads (or has cached) for a hub id."""
    if not name or "://" in name:
        raise CheckpointError("SRC must be a folder, or a hub id such as owner/name")
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        if revision is not None:
            raise CheckpointError("--revision needs a hub id, not a folder")
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=NEEDED_FILES))
    except Exception as error:  # the library's errors (network, authorisation, no such repository) have no common base
        raise CheckpointError(f"{name} is not a local folder and could not be downloaded: {one_line(error)}") from None


def print_report(console: Console, report: Report, target: Path) -> None:
    """Prints the statistics of a conversion."""
    console.print(f"{report.tensors} tensors, {size(report.bytes_before)} -> {size(report.bytes_after)}")
    shares = [f"{kind} {zeros / weights:.1%}" for kind, (zeros, weights) in report.zeros.items()]
    if shares:
        console.print("zeros: " + ", ".join(shares))
    for note in report.notes:
        console.print(f"note: {note}", markup=False, emoji=False)
    console.print(f"written to {target}")


def size(nbytes: int) -> str:
    """Human-readable size, such as 1.18 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("src", metavar="SRC", help="a Hugging Face model folder, or a hub id such as owner/name")
    parser.add_argument("dst", metavar="DST", help="folder to write")
    parser.add_argument(
        "--head",
        choices=EMBEDDING_DTYPES,
        default="bf16",
        help="dtype of embedding and LM head (default: bf16)",
    )
    parser.add_argument("--force", action="store_true", help="replace DST if it is a packed checkpoint")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the hub repository (default: main)")
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        if not args.dst:
            raise CheckpointError("DST must be a folder to write")
        target = Path(args.dst)
        source = find_source(args.src, args.revision)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("converting", total=None)
            tensors = itertools.count(1)

            def show(written: int, total: int) -> None:
                progress.update(task, completed=written, total=total, description=f"tensor {next(tensors)}")

            report = convert(source, target, args.head, args.force, show)
    except BitNetError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert: interrupted; nothing was written", file=sys.stderr)
        return 130
    print_report(console, report, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
