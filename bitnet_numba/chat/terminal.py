"""Terminal output: streaming word wrap, control characters filtered out, deferred Ctrl-C."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from rich.cells import cell_len


def printable(text: str) -> str:
    """Text with control characters, which a terminal would obey, replaced; line ends and tabs stay."""
    return "".join([c if c in "\n\t" or c.isprintable() or c == "\u00a0" else "\ufffd" for c in text])


class WordWrap:
    """Wraps streamed text between words. A word is held back until it is clear that it fits the line."""

    def __init__(self, width: int):
        self._width = max(width, 2)
        self._column = 0
        self._gap = ""  # spaces after the last word
        self._word = ""

    def push(self, text: str) -> str:
        """Adds text; returns what can be shown now."""
        out = []
        for character in text:
            if character in " \t":
                out.append(self._flush())
                self._gap += " "
            elif character == "\n":
                out.append(self._flush() + "\n")
                self._gap, self._column = "", 0
            else:
                self._word += character
                # Lines may break after any wide character, and must break inside a word longer than the line.
                if cell_len(character) > 1 or cell_len(self._word) >= self._width:
                    out.append(self._flush())
        return "".join(out)

    def finish(self) -> str:
        """The word that was held back."""
        return self._flush()

    def _flush(self) -> str:
        if not self._word:
            return ""
        length, gap = cell_len(self._word), self._gap
        if self._column and self._column + len(gap) + length > self._width:
            gap, self._column = "\n", length
        else:
            self._column += len(gap) + length
        text = gap + self._word
        self._word, self._gap = "", ""
        return text


@contextlib.contextmanager
def interruptible() -> Iterator[list[bool]]:
    """Inside, the first Ctrl-C only makes the yielded list truthy; the next one raises KeyboardInterrupt.

    A decode step that is interrupted loses the context; one that runs to its end keeps it.
    """
    interrupted: list[bool] = []

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def silent_keyboard() -> Iterator[None]:
    """Inside, typed keys (and ^C) are not echoed into the answer; they are kept for the next line."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
