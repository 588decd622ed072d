"""The line editor of the interactive chat: keys, blocks of several lines, and a history that cannot stop the chat."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import Completer
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output

from bitnet_numba.chat.attachments import is_open
from bitnet_numba.chat.files import well_formed

UNDO_CHARACTERS = 200  # kept per key


def open_line_editor(
    completer: Completer, keyboard: Input | None = None, screen: Output | None = None
) -> "PromptSession[str]":
    """An editor of lines, for the terminal if no other keyboard and screen are given."""
    editor: PromptSession[str] = PromptSession(
        history=open_history(),
        completer=completer,
        complete_while_typing=True,
        key_bindings=_keys(),
        multiline=True,
        prompt_continuation="  ",
        reserve_space_for_menu=6,
        enable_open_in_editor=True,
        input=keyboard,
        output=screen,
    )
    bound_undo(editor.default_buffer)
    return editor


def bound_undo(buffer: Buffer) -> None:
    """Makes undo steps of several keys in a long text.

    Every key saves the whole text: a long line that arrives key by key, because its terminal has no bracketed paste,
    would take memory that grows with the square of its length.
    """
    save, keys = buffer.save_to_undo_stack, 0

    def save_sometimes(clear_redo_stack: bool = True) -> None:
        nonlocal keys
        keys += 1
        if keys * UNDO_CHARACTERS >= len(buffer.text):
            keys = 0
            save(clear_redo_stack)

    buffer.save_to_undo_stack = save_sometimes  # type: ignore[method-assign]


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add(Keys.Vt100MouseEvent)
    def ignore(event: KeyPressEvent) -> None:
        """The mouse is not used. Pasted text with colours can look like a mouse's report, and the library's own handler
        ends in a traceback where that is malformed."""

    return keys


class _FileHistory(FileHistory):
    """Input history in a file. What cannot be read or written there is in memory alone."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            yield from super().load_history_strings()

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(well_formed(string))


def open_history() -> History:
    """Input history in a file of the user's state folder; in memory alone if there is no place for that."""
    folder = _state_folder()
    if folder is None:
        return InMemoryHistory()
    path = folder / "bitnet-numba" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        if not path.is_file():  # a pipe, which would not open
            return InMemoryHistory()
        path.open("ab").close()
    except (OSError, ValueError):
        return InMemoryHistory()
    return _FileHistory(str(path))


def _state_folder() -> Path | None:
    for variable in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        folder = os.environ.get(variable, "")
        if os.path.isabs(folder):
            return Path(folder)
    home = Path(os.path.expanduser("~"))
    return home / ".local" / "state" if home.is_absolute() and home.is_dir() else None  # a missing home is not made
