"""What the chat prints: lines of its own, the model's text as it comes, and a spinner before that."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.padding import Padding
from rich.status import Status
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.chat.terminal import WordWrap, clean, interruptible, silent_keyboard
from bitnet_numba.engine.session import PART
from bitnet_numba.text.thoughts import ThoughtReader

MAX_WIDTH = 100  # columns; longer lines are hard to read
STYLES = Theme({"markdown.code": "cyan"})  # rich's has a black background, whatever the terminal has
STOPPING = " [stopping ...]"
SAVE_CURSOR, RESTORE_AND_ERASE = "\x1b7", "\x1b8\x1b[J"


class View(Protocol):
    """Shows the text of one answer."""

    def push(self, text: str) -> None:
        """Adds text, with nothing in it that a terminal would obey."""

    def stopping(self) -> None:
        """Says that the answer will stop; called by a signal handler."""

    def finish(self) -> None:
        """Shows what is left, and ends the line."""


class PlainView:
    """The text as it is, wrapped between words on a terminal."""

    def __init__(self, console: Console, width: int):
        self._console = console
        self._wrap = WordWrap(width)
        self._told = False

    def push(self, text: str) -> None:
        self._write(self._wrap.push(text))

    def stopping(self) -> None:
        # The standard stream may be in the middle of writing; this line must not scroll, or the cursor gets lost.
        if self._console.is_terminal and not self._console.is_dumb_terminal and self._wrap.room > len(STOPPING):
            self._told = True
            with contextlib.suppress(OSError):
                os.write(sys.stdout.fileno(), (SAVE_CURSOR + STOPPING).encode())

    def finish(self) -> None:
        self._write(self._wrap.finish() + "\n")

    def _write(self, text: str) -> None:
        if self._told:
            self._told, text = False, RESTORE_AND_ERASE + text
        write(text)


class DimView(PlainView):
    """The same in the dim style of a terminal."""

    def _write(self, text: str) -> None:
        super()._write(text if self._console.is_dumb_terminal or not text else f"\x1b[2m{text}\x1b[22m")


class ThoughtView:
    """A thought in one view and, below it, the answer in another."""

    def __init__(self, reader: ThoughtReader, thought: View, new_answer: Callable[[], View]):
        self._reader, self._thought, self._new_answer = reader, thought, new_answer
        self._view: View | None = None  # that is written to

    def push(self, text: str) -> None:
        self._show(*self._reader.push(text))

    def stopping(self) -> None:
        if self._view is not None:
            self._view.stopping()

    def finish(self) -> None:
        self._show(*self._reader.finish())
        if self._view is not None:
            self._view.finish()

    def _show(self, thought: str, answer: str) -> None:
        if thought:
            self._view = self._thought
            self._view.push(thought)
        if answer:
            if self._view is self._thought:
                self._view.finish()
                write("\n")
            if self._view in (None, self._thought):
                self._view = self._new_answer()
            self._view.push(answer)


class Display:
    """Where a conversation is shown."""

    def __init__(self, markdown: bool | None = None, quiet: bool = False):
        """markdown: whether answers are rendered; None: on a terminal that can redraw lines. quiet: no hints."""
        self.console = Console(highlight=False, theme=STYLES)
        console = self.console
        redraws = console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows
        self.markdown = redraws if markdown is None else markdown
        self.quiet = quiet

    @property
    def width(self) -> int:
        return min(self.console.width, MAX_WIDTH)

    def note(self, text: str, style: str = "dim") -> None:
        """Prints a line of the program, in another style than the model's text."""
        self.console.print(Text(clean(text), style))

    def hint(self, text: str) -> None:
        """`note`, unless `quiet`."""
        if not self.quiet:
            self.note(text)

    def two_columns(self, left: str, right: str, width: int) -> None:
        """Prints a line of a list: a name, and what it means."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=min(width, self.console.width // 2 - 2), style="cyan")
        grid.add_row(Text(clean(left)), Text(right))
        self.console.print(Padding(grid, (0, 0, 0, 2)))

    def new_view(self, thoughts: ThoughtReader | None = None) -> View:
        """For the text of one answer. thoughts: tells its thought apart, which a terminal shows dim."""
        if thoughts is not None and self.console.is_terminal:
            return ThoughtView(thoughts, DimView(self.console, self.width), self.new_view)
        if self.markdown:
            from bitnet_numba.chat.markdown_view import MarkdownView  # it imports much

            return MarkdownView(self.console, self.width)
        return PlainView(self.console, self.width)


class Waiting:
    """A spinner that says how much of a long prompt has been read; nothing where there is no terminal."""

    def __init__(self, console: Console, conversation: Conversation):
        self._conversation = conversation
        self._status: Status | None = console.status("") if console.is_terminal else None

    def start(self) -> None:
        talk = self._conversation
        if talk.prompt_tokens - talk.session.held > PART:
            self._say(f"reading {talk.prompt_tokens:,} tokens")
        if self._status is not None:
            self._status.start()

    def progress(self) -> None:
        """A part of the prompt has been read."""
        talk = self._conversation
        self._say(f"reading {talk.prompt_tokens:,} tokens: {talk.session.held / talk.prompt_tokens:.0%}")

    def stopping(self) -> None:
        self._say("stopping after this part of the prompt; Ctrl-C again stops at once")

    def stop(self) -> None:
        if self._status is not None:
            self._status.stop()

    def _say(self, text: str) -> None:
        if self._status is not None:
            self._status.update(f"[dim]{text}[/dim]")


def show_answer(display: Display, conversation: Conversation, pieces: Iterator[str]) -> tuple[bool, bool]:
    """Shows an answer as it comes: (whether there was any text, whether Ctrl-C stopped it).

    The first Ctrl-C stops it after the current token, a second one at once.
    """
    waiting = Waiting(display.console, conversation)
    view: View | None = None

    def told() -> None:
        if view is None:
            waiting.stopping()
        else:
            view.stopping()

    with silent_keyboard(), interruptible(told) as interrupt:
        waiting.start()
        try:
            for piece in pieces:
                if piece:
                    if view is None:
                        waiting.stop()
                        view = display.new_view(conversation.thoughts)
                    view.push(clean(piece))
                elif not interrupt.pressed:
                    waiting.progress()
                if interrupt.pressed:
                    break
        except KeyboardInterrupt:
            pass  # the second one
        finally:
            interrupt.ending = True
            waiting.stop()
            pieces.close()  # type: ignore[attr-defined]
            if view is not None:
                view.finish()
    return view is not None, interrupt.pressed


def write(text: str) -> None:
    """Prints text of a model, unstyled."""
    sys.stdout.write(text)
    sys.stdout.flush()
