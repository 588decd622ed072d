"""Files of saved conversations."""

import errno
import json
import os
import re
import stat
import sys
from pathlib import Path

import pytest

from bitnet_numba.chat import files, saved
from bitnet_numba.chat.interactive import handle
from bitnet_numba.errors import RequestError
from tests.chat.helpers import ask, toy_chat, toy_conversation

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX files")
SAVED = b'{"bitnet_numba_chat": 1, "system": "", "messages": [%s]}'


def test_saved_conversations_come_back(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    talk = toy_conversation(system="Be k\u00efnd.")
    ask(talk, "One?")
    talk.save(path)
    talk.save(path)  # its own kind may be replaced
    other = toy_conversation()
    ask(other, "else")
    other.load(path)
    assert other.system == "Be k\u00efnd."
    assert other.messages == [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Fine."}]
    assert ask(other, "Two?") == "Fine."
    assert list(tmp_path.iterdir()) == [path]


def test_a_loaded_conversation_is_shown_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation()
    ask(talk, "One?")
    ask(talk, "Two?")
    talk.save(tmp_path / "chat.json")
    handle(toy_chat(), f"/load {tmp_path / 'chat.json'}")
    assert capsys.readouterr().out.startswith("> One?\nFine.\n\n> Two?\nFine.\nloaded 4 messages")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"bitnet_numba_chat": 2, "system": "", "messages": []}',
        b'{"bitnet_numba_chat": 1, "system": 3, "messages": []}',
        b'{"bitnet_numba_chat": 1, "system": "", "messages": [{"role": "user", "content": "x"}]}',
        b'{"bitnet_numba_chat": 1, "system": "", "messages": [{"role": "user"}, {"role": "assistant"}]}',
        b'{"bitnet_numba_chat": 1, "system": "", "messages": [[], []]}',
        SAVED % b'{"role": "system", "content": "x"}, {"role": "user", "content": "y"}',
        SAVED % b'{"role": "user", "content": ["x"]}, {"role": "assistant", "content": "y"}',
        SAVED % b'{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}',
        b'{"bitnet_numba_chat": 1, "system": "", "messages": {"a": 1, "b": 2}}',
        b"[" * 100_000,
        b'{"bitnet_numba_chat": ' + b"1" * 5000 + b"}",
    ],
)
def test_other_files_are_neither_loaded_nor_overwritten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "precious"
    path.write_bytes(content)
    talk = toy_conversation()
    ask(talk, "One?")
    for action in (talk.load, talk.save):
        with pytest.raises(RequestError, match="precious"):
            action(path)
    assert path.read_bytes() == content
    assert len(talk.messages) == 2


def test_saving_where_nothing_can_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be written"):
        toy_conversation().save(tmp_path / "no" / "folder")
    with pytest.raises(RequestError, match="cannot be read"):
        toy_conversation().load(tmp_path / "nothing")


@posix
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 256, os.strerror(errno.ENAMETOOLONG)),
        ("file/below", "Not a directory"),
        ("folder", "is a folder"),
        ("pipe", "is not a regular file"),
        ("loop", os.strerror(errno.ELOOP)),
        ("nul\0", "cannot be the name of a file"),
        ("surrogate\ud800", "cannot be the name of a file"),
        ("~nosuchuser/x", "there is no such home folder"),
        ("no/folder", "no such file or directory|there is no folder"),
        ("/dev/zero", "is not a regular file"),
        ("/dev/stdout", "is not a regular file|is not a saved conversation"),
    ],
)
def test_names_that_cannot_be_used_end_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    chat = toy_chat()
    handle(chat, "One?")
    for command in ("/save", "/load"):
        capsys.readouterr()
        assert handle(chat, f"{command} {name}")
        shown = capsys.readouterr().out
        assert re.search(reason, shown, re.IGNORECASE) and shown.count("\n") == 1
        assert len(chat.conversation.messages) == 2
    assert sorted(tmp_path.iterdir()) == before


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_folders_and_files_without_permission_are_refused(tmp_path: Path) -> None:
    folder, talk = tmp_path / "closed", toy_conversation()
    folder.mkdir(mode=0)
    for action in (talk.save, talk.load):
        with pytest.raises(RequestError, match="Permission denied"):
            action(folder / "x")
    path = tmp_path / "chat.json"
    talk.save(path)
    path.chmod(0o400)
    with pytest.raises(RequestError, match="read-only"):
        talk.save(path)


@pytest.mark.parametrize("call", ["stat", "open"])
def test_what_the_system_forbids_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Also where root runs the tests, who may do everything."""
    monkeypatch.setenv("COLUMNS", "1000")
    chat = toy_chat()
    handle(chat, "One?")
    capsys.readouterr()

    def forbidden(*_: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))

    if call == "open":
        monkeypatch.setattr("builtins.open", forbidden)
    else:
        monkeypatch.setattr(Path, call, forbidden)
    for command in ("/save", "/export"):
        assert handle(chat, f"{command} {tmp_path / 'x'}")
    monkeypatch.undo()
    shown = capsys.readouterr().out
    assert shown.count("cannot be written: Permission denied") == shown.count("\n") == 2
    assert len(chat.conversation.messages) == 2


def test_saving_touches_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.part").mkdir()
    (tmp_path / "y.part").write_text("mine")
    talk, longest = toy_conversation(), "z" * (os.pathconf(tmp_path, "PC_NAME_MAX") if hasattr(os, "pathconf") else 99)
    for name in ("x", "y", longest):
        talk.save(tmp_path / name)
        talk.load(tmp_path / name)
    assert (tmp_path / "y.part").read_text() == "mine"
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "taken")
    (tmp_path / ".bitnet-chat-taken").write_text("mine, too")
    with pytest.raises(RequestError, match="File exists"):
        talk.save(tmp_path / "x")
    assert (tmp_path / ".bitnet-chat-taken").read_text() == "mine, too"
    (tmp_path / ".bitnet-chat-taken").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.part", "y", "y.part", longest]


@posix
def test_a_link_stays_and_its_file_is_replaced_with_its_permissions(tmp_path: Path) -> None:
    path, link = tmp_path / "chat.json", tmp_path / "link"
    link.symlink_to(path)
    talk = toy_conversation()
    talk.save(link)  # to nothing yet
    path.chmod(0o640)
    ask(talk, "One?")
    talk.save(link)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    talk.load(path)
    assert len(talk.messages) == 2


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "chat.json"
    talk = toy_conversation()
    talk.save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, step, full)
    ask(talk, "One?")
    with pytest.raises(RequestError, match=r"chat.json cannot be written: No space left"):
        talk.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_surrogates_are_replaced_on_every_way_in(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    talk = toy_conversation(system="a\udcff")
    ask(talk, "b\ud800")
    assert (talk.system, talk.messages[0]["content"]) == ("a\ufffd", "b\ufffd")
    talk.messages[1]["content"] = "c\udc80"  # no way is known
    talk.save(path)
    assert json.loads(path.read_bytes())["messages"][1]["content"] == "c\udc80"
    talk.load(path)
    assert talk.messages[1]["content"] == "c\ufffd"
    assert files.well_formed("\ud83d\ude00 \U0001f600") == "\U0001f600 \U0001f600"


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        file.truncate(saved.MAX_BYTES + 1)
    with pytest.raises(RequestError, match="too large"):
        toy_conversation().load(path)
