"""What a terminal needs: words that wrap as they stream, control characters kept out, Ctrl-C that can wait."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from rich.cells import cell_len


def printable(text: str) -> str:
    """Text without control characters, which a terminal would obey; line ends and tabs stay."""
    return "".join([c if c in "\n\t" or c.isprintable() or c == "\u00a0" else "\ufffd" for c in text])


class WordWrap:
    """Breaks streamed text between words. A word is held back until it is known to fit its line."""

    def __init__(self, width: int):
        self._width = max(width, 2)
        self._column = 0
        self._gap = ""  # spaces after the last word
        self._word = ""

    def push(self, text: str) -> str:
        """What can be shown now."""
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
                # Wide characters may be parted anywhere; a word longer than a line has to be.
                if cell_len(character) > 1 or cell_len(self._word) >= self._width:
                    out.append(self._flush())
        return "".join(out)

    def finish(self) -> str:
        """What was held back."""
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
    """While inside, the first Ctrl-C only makes the yielded list true; the next raises KeyboardInterrupt.

    A step of the model that is cut short loses the context; one that may finish keeps it.
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
    """While inside, keys do not show up amid the answer, nor does ^C; what is typed waits for the next line."""
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
