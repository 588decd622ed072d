"""How far a conversion is, shown to whoever watches it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TextIO


@contextlib.contextmanager
def progress_bar(name: str, stream: TextIO | None) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that is told the bytes done and all bytes: a bar on a terminal, otherwise one line at once."""
    if stream is None or not stream.isatty():
        with contextlib.suppress(OSError):  # the report will tell
            if stream is not None:
                print(f"converting {name}", file=stream, flush=True)
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=stream, highlight=False, soft_wrap=True)
    columns = (BarColumn(), TextColumn("{task.description}", markup=False), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("opening", total=None)  # without a total, the bar moves to and fro

        def show(done: int, total: int) -> None:
            if done:
                description = f"{size_text(done)} of {size_text(total)}"
                progress.update(task, completed=done, total=total, description=description)
            else:
                progress.update(task, description=f"tokenizer, then {size_text(total)}")

        yield show


def size_text(nbytes: int) -> str:
    """Human-readable size, such as 1.18 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"
