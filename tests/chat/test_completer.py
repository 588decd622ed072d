"""The menu of commands."""

from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import fragment_list_to_text, to_formatted_text

from bitnet_numba.chat.chat_commands import COMMANDS, SETTINGS, offered
from bitnet_numba.chat.completer import CommandCompleter


def menu(text: str, raw: bool = False) -> dict[str, str]:
    """What completes a text, and the description that stands beside it."""
    completer = CommandCompleter(offered(raw), SETTINGS)
    found = completer.get_completions(Document(text), CompleteEvent())
    return {
        text[: len(text) + c.start_position] + c.text: fragment_list_to_text(to_formatted_text(c.display_meta or ""))
        for c in found
    }


def test_commands_with_their_descriptions() -> None:
    assert menu("/") == {command.name: command.description for command in COMMANDS}
    assert list(menu("/SA")) == ["/save"] and list(menu("/re")) == ["/regen", "/retry", "/reset"]
    assert "/undo" not in menu("/", raw=True)
    for text in ("", "hello /", "/file", "/undo ", "/nonsense ", "a\n/s", "/save\n"):
        assert len(menu(text)) <= 1


def test_settings() -> None:
    assert menu("/set ") == {f"/set {name}": meaning for name, meaning in SETTINGS.items()}
    assert list(menu("/set te")) == ["/set temperature"] and menu("/set seed ") == {}


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my notes.txt").touch()
    (tmp_path / "other").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(menu(f"/file {tmp_path}/my")) == [f"/file {tmp_path}/my notes.txt"]
    assert list(menu("/load ~/oth")) == ["/load ~/other"]
    assert menu("/system ~/oth") == {}
