"""Converts a Hugging Face BitNet checkpoint or a GGUF file into the packed checkpoint that bitnet_numba runs.

    python tools/convert.py SRC DST [--head bf16|int8] [--force] [--revision R] [--i2s-layout x86|arm]

The conversion itself is `bitnet_numba.checkpoint.convert`.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `main` takes over, Ctrl-C would end in the traceback of an import.
    signal.signal(
        signal.SIGINT, lambda *_: (os.write(2, b"convert: interrupted; nothing was written\n"), os._exit(130))
    )

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bitnet_numba.checkpoint.convert import Report, convert
from bitnet_numba.checkpoint.gguf_types import I2S_LAYOUTS
from bitnet_numba.checkpoint.packed import EMBEDDING_DTYPES
from bitnet_numba.errors import BitNetError, CheckpointError, one_line, printable

NEEDED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]  # of a hub repository, to be downloaded
PART = re.compile(r"-\d{5}(-of-\d{5}\.gguf)$")  # of a GGUF file that is one of several


def find_source(name: str, revision: str | None) -> Path:
    """The folder or GGUF file that SRC names: itself, or what huggingface_hub downloads (or has cached)."""
    if not name or "://" in name:
        raise CheckpointError("SRC must be a folder, a GGUF file, or a hub id such as owner/name")
    parts = name.split("/", 2)
    of_hub = len(parts) == (3 if name.endswith(".gguf") else 2)
    if os.path.exists(name) or not of_hub or name.startswith((".", "/", "~")):
        if revision is not None:
            raise CheckpointError("--revision needs a hub id, not a folder or file")
        return Path(name)
    if not sys.stderr.isatty():
        disable_progress_bars()  # otherwise hundreds of lines
    repository, file = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    wanted = NEEDED_FILES if file is None else [PART.sub(r"-*\1", file)]
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the library's errors (network, authorisation, no such repository) have no common base
        local = "folder" if file is None else "file"
        raise CheckpointError(
            f"{printable(name)} is not a local {local} and could not be downloaded: {one_line(error)}"
        ) from None
    if file is None and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{printable(name)} has no config.json; for a GGUF file in it, name {printable(name)}/FILE.gguf"
        )
    if file is not None and not (folder / file).exists():
        raise CheckpointError(f"{printable(repository)} has no file {printable(file)}")
    return folder / (file or "")


@contextlib.contextmanager
def progress_bar(source: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how far a conversion is: a bar in a terminal, otherwise one line at the start."""
    if sys.stdout is None or not sys.stdout.isatty():
        with contextlib.suppress(OSError):  # the report will tell
            print(f"converting {source}", flush=True)
        yield lambda done, total: None
        return
    console = Console(highlight=False, soft_wrap=True)
    columns = (BarColumn(), TextColumn("{task.description}", markup=False), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("opening", total=None)  # without a total, the bar moves to and fro

        def show(done: int, total: int) -> None:
            if done:
                progress.update(task, completed=done, total=total, description=f"{size(done)} of {size(total)}")
            else:
                progress.update(task, description=f"tokenizer, then {size(total)}")

        yield show


def print_report(report: Report, target: str) -> int:
    """Prints the statistics of a conversion; returns the exit code."""
    lines = [f"{report.tensors} tensors, {size(report.bytes_before)} -> {size(report.bytes_after)}"]
    shares = [f"{kind} {zeros / weights:.1%}" for kind, (zeros, weights) in report.zeros.items()]
    if shares:
        lines.append("zeros: " + ", ".join(shares))
    lines += [f"note: {printable(note, 400)}" for note in report.notes]
    lines.append(f"written to {target}")
    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it exits
        complain(f"{target} is written, but standard output is not: {error.strerror}")
        return 1
    return 0


def size(nbytes: int) -> str:
    """Human-readable size, such as 1.18 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"


def complain(text: str) -> None:
    """Prints one line on standard error."""
    with contextlib.suppress(OSError):
        print(f"convert: {text}", file=sys.stderr)


def identity(path: str) -> tuple[int, int] | None:
    """What tells the folder at a path from another one that takes its place; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    target, before = "", None
    try:
        if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
        parser.add_argument(
            "src", metavar="SRC", help="a Hugging Face model folder, a GGUF file, or a hub id such as owner/name"
        )
        parser.add_argument("dst", metavar="DST", help="folder to write")
        parser.add_argument(
            "--head",
            choices=EMBEDDING_DTYPES,
            default="bf16",
            help="dtype of embedding and LM head (default: bf16)",
        )
        parser.add_argument("--force", action="store_true", help="replace DST if it is a packed checkpoint")
        parser.add_argument(
            "--revision", metavar="R", help="branch, tag or commit of the hub repository (default: main)"
        )
        parser.add_argument(
            "--i2s-layout",
            choices=I2S_LAYOUTS,
            help="where a GGUF file with tensors of type I2_S was made, which it does not say (default: x86)",
        )
        args = parser.parse_args(argv)
        if not args.dst:
            raise CheckpointError("DST must be a folder to write")
        target, before = printable(args.dst, 400), identity(args.dst)
        source = find_source(args.src, args.revision)
        with progress_bar(printable(args.src, 400)) as show:
            report = convert(source, Path(args.dst), args.head, args.force, show, args.i2s_layout)
        return print_report(report, target)
    except BitNetError as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if target and identity(args.dst) != before:
            complain(f"interrupted; {target} is written")
        else:
            complain(f"interrupted; {target} is as it was" if before else "interrupted; nothing was written")
        return 130


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have characters that the terminal has not
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # too late for anything but the interpreter's own end
    sys.exit(code)
