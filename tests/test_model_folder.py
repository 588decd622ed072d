"""Model folders whose files are no files, not the real ones, or not there: converter and loader say so at once."""

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.engine.loading import load
from bitnet_numba.errors import BitNetError, CheckpointError
from bitnet_numba.model_folder import MAX_SIZE, FileError, ModelFolder

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4961251752\n"


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """What waits for a pipe or reads a device to its end fails instead."""

    def give_up(*_: object) -> NoReturn:
        raise TimeoutError("it hangs")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, MAX_SIZE + 1)


SPOILERS: list[tuple[Callable[[Path], object], str]] = [
    (os.mkfifo, "it is not a regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
    (lambda path: path.mkdir(), "it is not a regular file"),
    (lambda path: path.symlink_to(path.name), os.strerror(errno.ELOOP)),
    (lambda path: path.write_text(LFS_POINTER), "it is a Git LFS pointer: run git lfs pull"),
    (sparse, "it is larger than 100 MB"),
]
CONVERTED = ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
CONVERTED += ["tokenizer.model", "special_tokens_map.json", "chat_template.jinja"]
LOADED = ["config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize(("spoil", "reason"), SPOILERS)
def test_files_that_are_none(
    tiny_source: Path, tiny_packed: Path, tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    weights = [] if spoil is sparse else ["model.safetensors"]
    for model, names in ((tiny_source, CONVERTED), (tiny_packed, LOADED)):
        for name in [*names, *weights]:
            folder = Path(shutil.copytree(model, tmp_path / "model"))
            if name == "tokenizer.model":
                (folder / "tokenizer.json").unlink()
            if name == "model.safetensors.index.json":  # beside the single file it is not read
                (folder / "model.safetensors").unlink()
            (folder / name).unlink(missing_ok=True)
            spoil(folder / name)
            with pytest.raises(BitNetError) as caught:
                convert(folder, tmp_path / "out") if model is tiny_source else load(folder, "reference")
            assert str(caught.value).startswith(f"{folder / name} cannot be read: {reason}")
            shutil.rmtree(folder)
            assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("spoil", "reason"), SPOILERS)
def test_a_generation_config_that_is_none_is_ignored(
    tiny_packed: Path, tmp_path: Path, spoil: Callable[[Path], object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny_packed, tmp_path / "model"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    spoil(folder / "generation_config.json")
    assert load(folder, "reference").sampling is None
    told = f"{folder / 'generation_config.json'} cannot be read: {reason}"
    assert any(message.startswith(told) for message in caplog.messages), caplog.messages


@pytest.mark.parametrize(("spoil", "reason"), SPOILERS)
def test_a_template_that_is_none_refuses_chats_alone(
    tiny_packed: Path, tmp_path: Path, spoil: Callable[[Path], object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny_packed, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    spoil(folder / "chat_template.jinja")
    llm = load(folder, "reference")
    assert f"chat_template.jinja cannot be read: {reason}" in caplog.text
    assert llm.generate("x", max_new_tokens=1).token_ids
    with pytest.raises(BitNetError, match="cannot be read"):
        llm.generate([{"role": "user", "content": "x"}], max_new_tokens=1)


def test_no_permission(tiny_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, *arguments: int, **options: int) -> int:
        if str(path) == refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    for refused in LOADED:
        with pytest.raises(BitNetError, match=f"{refused} cannot be read: Permission denied"):
            load(tiny_packed, "reference")
    refused = str(tiny_packed)
    with pytest.raises(CheckpointError, match="cannot be opened: Permission denied"):
        load(tiny_packed, "reference")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/at/all", "nowhere/at/all does not exist"),
        ("loop", "loop cannot be opened: " + os.strerror(errno.ELOOP)),
        ("pipe", "pipe is not a folder"),
        ("x" * 300, "cannot be opened: " + os.strerror(errno.ENAMETOOLONG)),
        ("a\0b", "a\\x00b"),
        ("a\x1b[2Jb\nc", "a\\x1b[2Jb\\nc does not exist"),
    ],
)
def test_paths_that_are_no_folder(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    for use in (ModelFolder, open_packed, load, lambda path: convert(Path(path), Path("out"))):
        with pytest.raises(BitNetError) as caught:
            use(path)
        assert message in str(caught.value) and str(caught.value).isprintable()


def test_files_that_are_held_outlive_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "there").write_text("a\r\nb")
    opened = ModelFolder(folder)
    opened.hold(["there", "missing"])
    assert not opened.replaced()
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "missing").write_text("another folder's")
    assert opened.replaced()
    for _ in range(2):
        assert (opened / "there").exists() and (opened / "there").read_text() == "a\nb"
    assert not (opened / "missing").exists()
    with pytest.raises(FileError, match="No such file"):
        (opened / "missing").read_bytes()
    opened.close()
    assert (opened / "missing").exists() and not (opened / "there").exists()


def test_no_descriptor_is_left_open(tiny_packed: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("open descriptors cannot be counted on this system")
    load(tiny_packed, "reference")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        load(tiny_packed, "reference")
        with pytest.raises(CheckpointError):
            convert(tiny_packed, Path("unused"))
    assert len(os.listdir("/proc/self/fd")) <= before
