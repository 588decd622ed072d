"""What a terminal shows and how it is asked: text made safe, streaming word wrap, deferred Ctrl-C."""

import contextlib
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from types import FrameType

from rich.cells import cell_len

from bitnet_numba import errors

# Control, format, surrogate and separator characters: a terminal obeys them, or they hide or reorder what is shown.
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_SAFE = "\n\t\u200c\u200d"  # the joiners, which are format characters, make up words and emoji


def clean(text: str) -> str:
    """Text of a model, a file or a user as a terminal may get it: line ends and tabs stay, carriage returns vanish, and
    other characters that a terminal would obey become U+FFFD. Each character on its own, so any pieces will do."""
    if text.isprintable():
        return text
    text = text.replace("\r", "")
    return "".join([c if c in _SAFE or unicodedata.category(c) not in _UNSAFE else "\ufffd" for c in text])


def note(message: str) -> None:
    """Prints one line on standard error, unless that is closed or full."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(errors.printable(message, 1000), file=sys.stderr, flush=True)


class WordWrap:
    """Wraps streamed text between words. A word is held back until it is clear that it fits the line."""

    def __init__(self, width: int):
        self._width = max(width, 2)
        self._column = 0
        self._gap = ""  # spaces after the last word
        self._word = ""

    @property
    def room(self) -> int:
        """Columns that are left in the line."""
        return self._width - self._column

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


class Interrupt:
    """Ctrl-C while `interruptible`."""

    def __init__(self) -> None:
        self.pressed = False
        self.ending = False  # set it when what can be interrupted is over, and only what must be done is left


@contextlib.contextmanager
def interruptible(told: Callable[[], None]) -> Iterator[Interrupt]:
    """Inside, the first Ctrl-C is only noted and `told`; the next raises KeyboardInterrupt, unless all is ending.

    A step that is interrupted loses the context; one that runs to its end keeps it.
    """
    interrupt = Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.ending:
            return
        if interrupt.pressed:
            raise KeyboardInterrupt
        interrupt.pressed = True
        told()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def silent_keyboard() -> Iterator[None]:
    """Inside, typed keys (and ^C) are not echoed into the answer; they are kept for the next line."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    try:
        before = termios.tcgetattr(sys.stdin)
        silent = [*before]
        silent[3] &= ~termios.ECHO
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
    except termios.error as error:  # the terminal is gone
        raise OSError(*error.args) from None
