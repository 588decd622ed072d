"""Files of saved conversations."""

from pathlib import Path

import pytest

from bitnet_numba.errors import RequestError
from tests.chat.helpers import ask, toy_conversation


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
