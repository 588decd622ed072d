"""What the messages of a conversion name: the source, never the folder that is written and then gone."""

import base64
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.errors import BitNetError
from tests.gguf_writer import set_keys, write

Spoil = Callable[[Path], object]


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder to damage."""
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


def tiktoken_folder(folder: Path, tokens: int = 0) -> None:
    """Puts a tiktoken vocabulary in the place of tokenizer.json: all single bytes, and so many others."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    lines = [base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)]
    lines += [base64.b64encode(b"a" * (i + 2)) + b" %d" % (256 + i) for i in range(tokens)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines))


def edit_template(folder: Path, template: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def write_as(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


# All are found while the new folder is being written. The first name is what the message is about.
REFUSED: list[tuple[str, Spoil]] = [
    ("source/tokenizer.json", write_as("tokenizer.json", b"{}")),
    ("source/tokenizer.json", write_as("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n")),
    ("source/tokenizer_config.json", write_as("tokenizer_config.json", b"{")),
    ("source/special_tokens_map.json", write_as("special_tokens_map.json", b"[]")),
    ("source/generation_config.json", lambda folder: (folder / "generation_config.json").mkdir()),
    ("source/tokenizer.model", lambda folder: tiktoken_folder(folder, 2000)),
    ("source/tokenizer.model", lambda folder: (tiktoken_folder(folder), (folder / "tokenizer.model").write_text("x"))),
    (
        "source/special_tokens_map.json",
        lambda folder: (tiktoken_folder(folder), (folder / "special_tokens_map.json").write_text("")),
    ),
]
TOLD: list[tuple[str, Spoil]] = [
    ("source/chat_template.jinja", write_as("chat_template.jinja", b"\xff\xfe")),
    ("source/tokenizer_config.json", lambda folder: edit_template(folder, [{"name": []}])),
    ("source/generation_config.json", write_as("generation_config.json", b"{")),
]


@pytest.mark.parametrize(("name", "spoil"), REFUSED)
def test_errors_name_the_source(source: Path, tmp_path: Path, name: str, spoil: Spoil) -> None:
    (source / "generation_config.json").unlink(missing_ok=True)
    spoil(source)
    with pytest.raises(BitNetError) as caught:
        convert(source, tmp_path / "out")
    assert str(caught.value).startswith(str(tmp_path / name)) and ".bitnet-" not in str(caught.value)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(("name", "spoil"), TOLD)
def test_warnings_name_the_source(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, spoil: Spoil
) -> None:
    spoil(source)
    convert(source, tmp_path / "out")
    assert caplog.messages[0].startswith(str(tmp_path / name)) and ".bitnet-" not in caplog.text


def test_errors_name_the_gguf_file(tmp_path: Path) -> None:
    """Which has no file tokenizer.json."""
    file = write(tmp_path / "m.gguf", change=set_keys(tokenizer__ggml__merges=["a zz"]))
    with pytest.raises(BitNetError) as caught:
        convert(file, tmp_path / "out")
    assert str(caught.value).startswith(f"the tokenizer of {file} is damaged: ")


@pytest.mark.parametrize("spoil", [lambda folder: None, tiktoken_folder], ids=["tokenizer.json", "tokenizer.model"])
def test_a_full_disk_is_told_of_the_target(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Spoil
) -> None:
    """Whatever is being written when it is full, and by whom."""
    spoil(source)

    def full(*arguments: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / ".out.bitnet-01234567" / "a"))

    for method in ("write_text", "write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, full)
            with pytest.raises(BitNetError) as caught:
                convert(source, tmp_path / "out")
        assert str(caught.value) == f"cannot write {tmp_path}/out: No space left on device"
        assert os.listdir(tmp_path) == ["source"]
