"""Each command of the interactive chat."""

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bitnet_numba.chat.chat import Chat
from bitnet_numba.chat.chat_commands import COMMANDS, SETTINGS, find_command, offered
from bitnet_numba.chat.interactive import handle
from bitnet_numba.engine.engine import Engine
from bitnet_numba.sampling_params import SamplingParams
from tests.chat.helpers import toy_chat, toy_conversation
from tests.engine.toy_backend import toy_engine

Shown = Callable[[Chat, str], str]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Has a chat do what a line says; returns what is printed."""
    monkeypatch.setenv("COLUMNS", "300")

    def call(chat: Chat, line: str) -> str:
        capsys.readouterr()
        assert handle(chat, line)
        return capsys.readouterr().out

    return call


def random_chat(**options: object) -> Chat:
    """A chat whose answers depend on the seed."""
    llm: Engine = toy_engine([], 256)[0]
    chat = toy_chat(toy_conversation(**options))  # type: ignore[arg-type]
    chat.conversation.session = llm.session()
    chat.conversation.params = SamplingParams(1.0, max_new_tokens=6)
    return chat


def test_names_are_unique_and_every_command_is_in_the_help(shown: Shown) -> None:
    names = [name for command in COMMANDS for name in (command.name, *command.aliases)]
    assert len(set(names)) == len(names)
    help_text = shown(toy_chat(), "/help")
    assert all(name in help_text for name in names) and shown(toy_chat(), "/?") == help_text


def test_system_undo_save_load_and_stats(shown: Shown, tmp_path: Path) -> None:
    chat = toy_chat()
    talk, path = chat.conversation, tmp_path / "chat.json"
    assert shown(chat, "/stats") == "no answer yet\n"
    assert shown(chat, "One?") == "Fine.\n"
    assert "answer 4 tokens" in shown(chat, "/stats") and "context" in shown(chat, "/stats")
    assert shown(chat, "/system Be brief.") == shown(chat, "/system") == "system message: Be brief.\n"
    assert talk.system == "Be brief."
    assert shown(chat, "/system -") == "no system message\n"
    assert shown(chat, f"/save {path}").startswith("saved 2 messages")
    assert shown(chat, "/undo") == "removed: One?\n"
    assert "nothing to remove" in shown(chat, "/undo")
    assert shown(chat, f"/save {path}") == "there is nothing to save yet\n"
    assert "> One?\nFine.\n" in shown(chat, f"/load {path}")
    assert len(talk.messages) == 2
    assert "cannot be read" in shown(chat, f"/load {tmp_path / 'none'}")
    assert shown(chat, "/save") == "give a file name, such as chat.json\n"
    assert shown(chat, "/clear") == "a new conversation\n" and talk.messages == []


def test_set_shows_and_changes_how_answers_are_made(shown: Shown) -> None:
    chat = toy_chat()
    listed = shown(chat, "/set")
    assert all(f"  {name} " in listed for name in SETTINGS)
    for line, value in (
        ("temperature 0.5", "temperature 0.5"),
        ("TEMPERATURE=0.25", "temperature 0.25"),
        ("top_k 40", "top-k 40"),
        ("seed 7", "seed 7"),
        ("length 9", "length 9"),
        ("max-new-tokens none", "length none"),
        ("stop The end", "stop 'The end'"),
        ("stats on", "stats on"),
        ("markdown on", "markdown on"),
    ):
        assert f"  {value} " in shown(chat, f"/set {line}")
    assert chat.conversation.params == SamplingParams(0.25, top_k=40, seed=7, max_new_tokens=None, stop="The end")
    assert chat.show_stats and chat.display.markdown
    shown(chat, "/set seed random")
    shown(chat, "/set stop none")
    assert chat.conversation.params == SamplingParams(0.25, top_k=40, max_new_tokens=None)
    before = chat.conversation.params
    for line, message in (
        ("temperature hot", "temperature must be a number or default, not hot"),
        ("temperature -1", "temperature must be"),
        ("seed x", "seed must be a whole number, random or default, not x"),
        ("stats 3", "stats must be on or off, not 3"),
        ("colour 3", "there is no setting colour: there are temperature"),
        ("temp 3", "there is no setting temp: did you mean temperature?"),
        ("Temprature 3", "there is no setting temprature: did you mean temperature?"),
        ("max_tokens 3", "there is no setting max-tokens: did you mean max-new-tokens?"),
    ):
        assert message in shown(chat, f"/set {line}") and chat.conversation.params == before


def test_set_default_is_what_the_chat_began_with(shown: Shown) -> None:
    chat = toy_chat()
    first = chat.conversation.params
    for line in ("temperature 0.75", "top-k 3", "seed 7", "length 9"):
        shown(chat, f"/set {line}")
    assert "  top-k 0 " in shown(chat, "/set top-k default") and chat.conversation.params.temperature == 0.75
    for name in ("temperature", "seed", "length"):
        shown(chat, f"/set {name} Default")
    assert chat.conversation.params == first


def test_the_last_question_is_answered_again(shown: Shown) -> None:
    chat = random_chat()
    talk = chat.conversation
    assert "there is no question yet" in shown(chat, "/regen") + shown(chat, "/edit")
    talk.params = SamplingParams(1.0, max_new_tokens=6, seed=5)
    shown(chat, "One?")
    first = talk.messages[1]["content"]
    shown(chat, "/regen")
    assert len(talk.messages) == 2 and talk.messages[1]["content"] == first
    others = [(shown(chat, "/retry"), talk.messages[1]["content"])[1] for _ in range(3)]
    assert {first} != {*others} and len(talk.messages) == 2 and talk.params.seed == 5
    shown(chat, "/set temperature 0")
    assert "no seed changes the answer" in shown(chat, "/retry")


def test_edit_puts_the_last_question_into_the_line_which_replaces_it(shown: Shown) -> None:
    chat = toy_chat()
    shown(chat, "One?")
    shown(chat, "Two?")
    assert shown(chat, "/edit") == "" and chat.draft == "Two?"
    shown(chat, "Two, please?")
    assert [m["content"] for m in chat.conversation.messages] == ["One?", "Fine.", "Two, please?", "Fine."]
    assert chat.draft == ""
    shown(chat, "/edit")
    shown(chat, "/stats")  # another command: nothing is edited
    shown(chat, "Three?")
    assert len(chat.conversation.messages) == 6


def test_files_go_with_the_next_question(shown: Shown, tmp_path: Path) -> None:
    path = tmp_path / "my notes.txt"
    path.write_bytes(b"\xef\xbb\xbfRed.\n```\nBlue.\n")
    chat = toy_chat()
    assert shown(chat, f"/file {path}").startswith("my notes.txt, 14 characters")
    shown(chat, "Which?")
    assert chat.conversation.question == "my notes.txt:\n````\nRed.\n```\nBlue.\n````\n\nWhich?"
    shown(chat, "And now?")
    assert chat.conversation.question == "And now?"
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "huge").write_text("x" * 1_000_000)
    for name, message in (("", "is a folder"), ("none", "cannot be read"), ("empty", "is empty"),
                          ("binary", "is not a text file"), ("huge", "too large for the context")):  # fmt: skip
        assert message in shown(chat, f"/file {tmp_path / name}") and not chat.attachments
    assert "give a file name" in shown(chat, "/file")
    path.write_text("word " * 200)
    shown(chat, f"/file {path}")
    assert "nothing was sent" in shown(chat, "Which?") and not chat.attachments


def test_copy_writes_osc_52(shown: Shown) -> None:
    chat = toy_chat(toy_conversation("Fi\u00f1e.\x1b"))
    assert "there is no answer yet" in shown(chat, "/copy")
    shown(chat, "One?")
    found = re.match(r"\x1b\]52;c;([A-Za-z0-9+/=]*)\x07copied 6 characters", shown(chat, "/copy"))
    assert found and base64.b64decode(found[1]).decode() == "Fi\u00f1e.\x1b"


def test_export_writes_markdown_and_replaces_only_its_own(shown: Shown, tmp_path: Path) -> None:
    chat, path = toy_chat(), tmp_path / "chat.md"
    assert "nothing to export" in shown(chat, f"/export {path}")
    shown(chat, "/system Be\nkind.")
    shown(chat, "One?")
    assert shown(chat, f"/export {path}").startswith("exported 2 messages")
    assert path.read_text().split("\n", 1)[1] == (
        "\n# A conversation with toy\n\n**System message**\n\n> Be\n> kind.\n\n## You\n\nOne?\n\n## Model\n\nFine.\n"
    )
    shown(chat, "Two?")
    assert shown(chat, f"/export {path}").startswith("exported 4 messages")
    path.write_text("mine")
    assert "nothing was written" in shown(chat, f"/export {path}") and path.read_text() == "mine"


def test_continue_needs_an_answer_that_was_cut(shown: Shown) -> None:
    chat = toy_chat()
    assert "no answer that was cut" in shown(chat, "/continue")
    shown(chat, "One?")
    assert "no answer that was cut" in shown(chat, "/continue")


def test_raw_offers_only_what_makes_sense(shown: Shown, tmp_path: Path) -> None:
    chat = random_chat(raw=True)
    chat.conversation.params = replace(chat.conversation.params, ignore_eos=True)  # chance ends no answer early
    help_text = shown(chat, "/help")
    for command in COMMANDS:
        assert (command.usage in help_text) != command.turns
    for line in ("/undo", "/clear", "/save x.json", "/load x.json", "/system x", "/export x.md"):
        assert "--raw" in shown(chat, line)
    assert not Path("x.json").exists() and "markdown" not in shown(chat, "/set")
    path = tmp_path / "begun.txt"
    path.write_text("Once upon\n")
    shown(chat, f"/file {path}")
    assert chat.conversation.question == "Once upon" and not chat.attachments
    length = len(chat.conversation._ids)
    assert "[cut after 6 tokens" in shown(chat, "/continue")
    assert len(chat.conversation._ids) == length + 6 and chat.conversation.question == "Once upon"
    shown(chat, "/regen")
    assert len(chat.conversation._ids) == length
    shown(chat, "/edit")
    assert chat.draft == "Once upon"
    assert "copied" in shown(chat, "/copy")


def test_commands_are_found_by_every_name() -> None:
    assert all(find_command(name.upper()) is c for c in offered(False) for name in (c.name, *c.aliases))
    assert find_command("/nonsense") is None and find_command("hello") is None
