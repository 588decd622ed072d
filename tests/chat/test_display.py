"""What is shown before and while an answer comes."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bitnet_numba.chat.display import SAVE_CURSOR, STOPPING, Display, PlainView, Waiting
from tests.chat.helpers import toy_conversation


class ScreenFile(io.TextIOWrapper):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen(path: Path, monkeypatch: pytest.MonkeyPatch, width: int = 40) -> Console:
    """Standard output as a terminal whose output goes to a file."""
    file = ScreenFile(open(path, "wb", buffering=0), encoding="utf-8", write_through=True)
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=file, width=width, force_terminal=True)


def test_stopping_is_said_where_the_cursor_is_and_then_erased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "screen"
    view = PlainView(screen(path, monkeypatch), 40)
    view.push("Once upon ")
    view.stopping()
    assert path.read_text() == f"Once upon{SAVE_CURSOR}{STOPPING}"
    view.push("a time")
    view.finish()
    shown = path.read_text().partition(STOPPING)[2]
    assert shown.startswith("\x1b8\x1b[J") and shown.endswith(" a time\n")
    sys.stdout.close()


def test_stopping_never_scrolls_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal puts the cursor back where it was on the screen, not in the text."""
    path = tmp_path / "screen"
    view = PlainView(screen(path, monkeypatch, 20), 20)
    view.push("nearly full line \n" * 2 + "nearly full line ")
    view.stopping()
    assert STOPPING not in path.read_text()
    sys.stdout.close()


def test_a_long_prompt_says_how_long_it_is_and_how_much_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = toy_conversation(context=4096)
    pieces = talk.ask("word " * 500)
    waiting = Waiting(Console(file=io.StringIO(), force_terminal=True), talk)
    said: list[str] = []
    monkeypatch.setattr(waiting, "_say", said.append)
    waiting.start()
    for piece in pieces:
        if not piece:
            waiting.progress()
    waiting.stop()
    assert said[0] == f"reading {talk.prompt_tokens:,} tokens" and "%" in said[-1] and len(said) > 3
    said.clear()
    next(talk.ask("Short?"))
    waiting.start()
    assert said == []


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)],
)
def test_markdown_is_for_terminals_that_can_redraw(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, environment: str, expected: bool
) -> None:
    monkeypatch.setenv("TERM", environment)
    file = io.StringIO()
    monkeypatch.setattr(file, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", file)
    assert Display().markdown == expected
    assert Display(not expected).markdown != expected


def test_lists_fit_narrow_terminals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    Display().two_columns("/command", "does what takes many words to say", 18)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("  /command") and len(lines) > 1 and all(len(line) <= 30 for line in lines)
