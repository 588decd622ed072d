"""Texts that commands read: files and standard input, and what whoever has forgotten an argument is told."""

import io
import os
import sys
import threading
from pathlib import Path

import pytest

from bitnet_numba import commands
from bitnet_numba.cli.main import main
from bitnet_numba.cli.text_input import read_text
from bitnet_numba.errors import RequestError


class Keyboard(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_a_file_and_standard_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a f\u00f6x\n", "utf-8")
    assert read_text(str(tmp_path / "a.txt"), "p") == "a f\u00f6x\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("an \u00f6wl\r\n".encode()), "latin-1"))
    assert read_text("-", "p") == "an \u00f6wl\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"\xff", "standard input is not a text in UTF-8"), (b"", "standard input is empty"), (None, "closed: give FILE")],
)
def test_standard_input_without_a_text(monkeypatch: pytest.MonkeyPatch, data: bytes | None, message: str) -> None:
    monkeypatch.setattr(sys, "stdin", None if data is None else io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(RequestError, match=message):
        read_text("-", "p")


def test_what_is_awaited_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At a keyboard at once; of a pipe that stays silent, after a while."""
    monkeypatch.setattr(sys, "stdin", Keyboard(io.BytesIO(b"a fox")))
    assert read_text("-", "p") == "a fox"
    assert capsys.readouterr().err == "p: type the text; Ctrl-D on a line of its own ends it\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    reading, writing = os.pipe()
    told = threading.Event()
    monkeypatch.setattr(commands, "PATIENCE", 0.01)
    monkeypatch.setattr("bitnet_numba.cli.text_input.complain", lambda prog, message: (print(message), told.set()))

    def write() -> None:
        told.wait(30)
        with open(writing, "wb") as file:
            file.write(b"late")

    writer = threading.Thread(target=write)
    writer.start()
    with io.TextIOWrapper(open(reading, "rb")) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_text("-", "p") == "late"
    writer.join()
    assert capsys.readouterr().out == "reading the text from standard input, until it ends\n"


def test_embed_without_its_model_is_told_before_a_text_is_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_packed: Path
) -> None:
    """`embed FILE`: FILE is in the place of the model, and standard input, where the text would be, is not read."""
    (tmp_path / "a.txt").write_text("a fox")
    monkeypatch.setattr(sys, "stdin", None)
    for model, message in (
        (tmp_path / "a.txt", "is a file, not a model: MODEL stands before FILE"),
        (tiny_packed, "this is no embedding model"),
    ):
        assert main(["embed", str(model), "--backend", "reference"]) == 2
        out, err = capsys.readouterr()
        assert not out and message in err and err.count("\n") == 1


def test_embed_tells_its_own_types_of_keys_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["embed", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--kv-dtype {bfloat16,float32} type of keys and values on the CPU (default: float32)" in out
