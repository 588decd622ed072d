"""A progress line on standard error while kernels are compiled."""

import contextlib
import sys
from collections.abc import Callable, Iterator

_shower: Callable[[str | None], None] | None = None


@contextlib.contextmanager
def shown_by(show: Callable[[str | None], None]) -> Iterator[None]:
    """Inside, progress is not printed, but given to `show`, line by line, and None at the end: for a status line.

    What redraws a line of the terminal would otherwise make a line of its own of each count.
    """
    global _shower
    before, _shower = _shower, show
    try:
        yield
    finally:
        _shower = before


class CompileProgress:
    """Says how many of `total` kernels are compiled; nothing if there are none to compile.

    On a terminal, one line that counts; elsewhere, in a log, one line at the start and one at the end.
    """

    def __init__(self, device_name: str, total: int):
        self._text, self._total, self._done = f"Compiling kernels for {device_name}, once:", total, 0
        self._shower = _shower
        self._on_terminal = sys.stderr is not None and sys.stderr.isatty()
        if total and not self._on_terminal and self._shower is None:
            self._print(f"{self._text} 0 of {total} ...\n")
        else:
            self._show()

    def advance(self, count: int = 1) -> None:
        """So many more are compiled."""
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        """So many are compiled."""
        if done != self._done:
            self._done = done
            self._show()

    def close(self) -> None:
        """All are compiled."""
        if self._total and self._shower is not None:
            self._shower(None)
        elif self._total:
            self._print("\n" if self._on_terminal else f"{self._text} done\n")

    def _show(self) -> None:
        line = f"{self._text} {min(self._done, self._total)} of {self._total}"
        if self._total and self._shower is not None:
            self._shower(line)
        elif self._total and self._on_terminal:
            self._print(f"\r{line}")

    def _print(self, text: str) -> None:
        if sys.stderr is not None:
            print(text, end="", file=sys.stderr, flush=True)
