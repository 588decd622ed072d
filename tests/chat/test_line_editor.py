"""The line editor: memory of long lines, and a history that cannot stop the chat."""

import os
import sys
from pathlib import Path

import pytest
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import DummyCompleter
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from bitnet_numba.chat.line_editor import UNDO_CHARACTERS, bound_undo, open_history, open_line_editor


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder for the history."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "bitnet-numba"


def test_undo_of_a_long_line_takes_linear_memory() -> None:
    buffer = Buffer()
    bound_undo(buffer)
    keys = 20_000
    for _ in range(keys):
        buffer.save_to_undo_stack()
        buffer.insert_text("x")
    assert sum(len(text) for text, _ in buffer._undo_stack) < keys * UNDO_CHARACTERS
    while buffer.text:  # back to the beginning, in steps
        length = len(buffer.text)
        buffer.undo()
        assert length - len(buffer.text) <= 1 + length // UNDO_CHARACTERS


def test_short_lines_are_undone_key_by_key() -> None:
    buffer = Buffer()
    bound_undo(buffer)
    for character in "abc":
        buffer.save_to_undo_stack()
        buffer.insert_text(character)
    buffer.undo()
    assert buffer.text == "ab"


def test_the_editor_bounds_what_is_typed(state: Path) -> None:
    with create_pipe_input() as keyboard:
        editor = open_line_editor(DummyCompleter(), keyboard, DummyOutput())
        keyboard.send_text("word " * 400 + "\x1b\rnext\r")
        assert editor.prompt("> ") == "word " * 400 + "\nnext"
        assert sum(len(text) for text, _ in editor.default_buffer._undo_stack) < 2000 * UNDO_CHARACTERS


def test_enter_within_a_block_starts_a_line(state: Path) -> None:
    with create_pipe_input() as keyboard:
        editor = open_line_editor(DummyCompleter(), keyboard, DummyOutput())
        keyboard.send_text('"""one\rtwo\r"""\r')
        assert editor.prompt("> ") == '"""one\ntwo\n"""'
        keyboard.send_text('"" is """ not a block\r')
        assert editor.prompt("> ") == '"" is """ not a block'


def test_coloured_text_is_pasted_without_its_colours(state: Path) -> None:
    """What begins like the report of a mouse and is none ended the chat, in a terminal without bracketed paste."""
    with create_pipe_input() as keyboard:
        editor = open_line_editor(DummyCompleter(), keyboard, DummyOutput())
        keyboard.send_text("a\x1b[31mred\x1b[0m \x1b[1;32mgreen\x1b[0m \x1b[<0;5mb\x1b[<0;1;2M\r")
        assert editor.prompt("> ") == "ared green b"


def test_pasted_lines_are_one_text_and_are_not_sent(state: Path) -> None:
    with create_pipe_input() as keyboard:
        editor = open_line_editor(DummyCompleter(), keyboard, DummyOutput())
        keyboard.send_text("\x1b[200~one\rtwo\r\x1b[201~three\r")
        assert editor.prompt("> ", default="zero ") == "zero one\ntwo\nthree"


def test_what_was_typed_comes_back_at_the_next_start(state: Path) -> None:
    history = open_history()
    history.append_string("one\ntwo")
    history.append_string("bad \udcff")  # invalid UTF-8 from the keyboard
    assert list(open_history().load_history_strings()) == ["bad \ufffd", "one\ntwo"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_the_history_in_memory(state: Path) -> None:
    history = open_history()
    (state / "history").unlink()
    (state / "history").symlink_to("/dev/full")
    history.append_string("one")
    assert history.get_strings() == ["one"]


def test_a_history_that_goes_away_is_no_error(state: Path) -> None:
    history = open_history()
    (state / "history").unlink()
    (state / "history").mkdir()
    history.append_string("one")
    assert list(history.load_history_strings()) == []


@pytest.mark.parametrize("place", ["a file", "a pipe", "a folder", "no home"])
def test_without_a_place_the_history_is_in_memory(
    state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    if place == "a file":
        state.write_text("mine")
    elif place == "a pipe":
        if sys.platform == "win32":
            pytest.skip("needs POSIX files")
        state.mkdir()
        os.mkfifo(state / "history")
    elif place == "a folder":
        (state / "history").mkdir(parents=True)
    else:
        for variable in ("XDG_STATE_HOME", "LOCALAPPDATA", "HOMEDRIVE", "HOMEPATH"):
            monkeypatch.delenv(variable, raising=False)
        for variable in ("HOME", "USERPROFILE"):
            monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    assert isinstance(open_history(), InMemoryHistory)
    assert not (tmp_path / "nowhere").exists()
