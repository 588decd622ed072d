"""Replacing a folder as a whole: two at once, ended at any point, and read meanwhile."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import bitnet_numba
from bitnet_numba.checkpoint import install
from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.install import replacing
from bitnet_numba.engine.loading import load
from bitnet_numba.errors import CheckpointError
from bitnet_numba.model_folder import ModelFolder
from tools.make_checkpoint import PRESETS, make_checkpoint

OLD, NEW = "the old one", "the new one"
FILES = ("config.json", "model.safetensors")


def fill(folder: Path, content: str) -> None:
    for name in FILES:
        (folder / name).write_text(content)


def content(folder: Path) -> str:
    """What a folder was filled with; fails if it is not whole."""
    assert {path.name for path in folder.iterdir()} == {*FILES}
    (found,) = {path.read_text() for path in folder.iterdir()}
    return found


def replace(target: Path) -> None:
    with replacing(target, lambda: None) as folder:
        fill(folder, NEW)


def old_target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", OLD)
    return tmp_path / "out"


@pytest.fixture(params=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of putting a folder in place: file systems that can exchange two folders, and others."""
    if request.param == "two renames":
        monkeypatch.setattr(install, "_exchange", lambda one, other: False)
    return str(request.param)


def test_replaces(tmp_path: Path, exchange: str) -> None:
    for there in (False, True):
        target = old_target(tmp_path) if there else tmp_path / "new" / "out"
        replace(target)
        assert content(target) == NEW and os.listdir(target.parent) == ["out"]
        shutil.rmtree(target.parent if not there else target)


def test_this_system_exchanges_at_once(tmp_path: Path) -> None:
    """On Linux, nothing but the exchange is tested by default: if it silently fell back, this would tell."""
    if not sys.platform.startswith("linux"):
        pytest.skip("renameat2 is Linux's")
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    fill(one, OLD)
    other.mkdir()
    if not install._exchange(one, other):
        pytest.skip("the file system of the temporary folder cannot exchange folders")
    assert content(other) == OLD and os.listdir(one) == []


def test_the_second_of_two_is_refused(tmp_path: Path) -> None:
    target = old_target(tmp_path)
    with replacing(target, lambda: None) as folder:
        fill(folder, NEW)
        with pytest.raises(CheckpointError, match="another conversion is writing .*out right now"):
            replace(target)
        assert content(folder) == NEW, "the refused one has deleted what the first was writing"
    assert content(target) == NEW and os.listdir(tmp_path) == ["out"]


def test_different_targets_do_not_meet(tmp_path: Path) -> None:
    """Not even where the name of one continues the name of the other."""
    with replacing(tmp_path / "out.bitnet-x", lambda: None) as folder:
        replace(tmp_path / "out")
        fill(folder, NEW)
    assert {content(tmp_path / name) for name in os.listdir(tmp_path)} == {NEW}
    assert set(os.listdir(tmp_path)) == {"out", "out.bitnet-x"}


def test_what_was_left_is_cleared_up(tmp_path: Path) -> None:
    target = old_target(tmp_path)
    for name in (".out.bitnet-0123abcd", ".out.bitnet-partial", ".out.bitnet-old", ".out.bitnet-mine", ".other"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, "half")
    (tmp_path / ".out.bitnet-lock").touch()
    replace(target)
    assert content(target) == NEW
    assert set(os.listdir(tmp_path)) == {"out", ".out.bitnet-mine", ".other"}


def test_an_old_folder_without_a_new_one_is_put_back(tmp_path: Path) -> None:
    """What is left if a conversion was killed between two renames. Reading finds it, and the next conversion, too."""
    target = old_target(tmp_path)
    target.rename(tmp_path / ".out.bitnet-old")
    read = install.read_folder(target, FILES, lambda folder: ((folder / FILES[0]).read_text(), str(folder)))
    assert read == (OLD, str(target))

    def check() -> None:
        if target.exists():
            raise CheckpointError("exists")

    with pytest.raises(CheckpointError, match="exists"), replacing(target, check):
        raise AssertionError("not reached")
    assert content(target) == OLD and os.listdir(tmp_path) == ["out"]


def test_checked_again_before_it_is_put_in_place(tmp_path: Path) -> None:
    def check() -> None:
        if (tmp_path / "out").exists():
            raise CheckpointError("exists")

    with pytest.raises(CheckpointError, match="exists"), replacing(tmp_path / "out", check) as folder:
        fill(folder, NEW)
        old_target(tmp_path)  # somebody else's, while the conversion runs
    assert content(tmp_path / "out") == OLD and os.listdir(tmp_path) == ["out"]


def test_long_names(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 127)  # 254 bytes
    replace(target)
    (tmp_path / install._beside(target, "0123abcd").name).mkdir()
    replace(target)
    assert os.listdir(tmp_path) == [target.name]


def test_without_locks(tmp_path: Path, exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none: two conversions still do not mix, the last one wins."""

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(install.fcntl, "flock", flock)
    target = old_target(tmp_path)
    with replacing(target, lambda: None) as folder:
        fill(folder, "the first")
        replace(target)
        assert content(target) == NEW
    assert content(target) == "the first" and os.listdir(tmp_path) == ["out"]


def test_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may be missing then, because the old folder is being deleted: the new one is read."""
    target, real, replacements = old_target(tmp_path), ModelFolder.hold, iter(range(1))

    def hold(folder: ModelFolder, names: Iterable[str]) -> None:
        if next(replacements, None) is not None:
            replace(target)
        real(folder, names)

    monkeypatch.setattr(ModelFolder, "hold", hold)
    assert install.read_folder(target, FILES, lambda folder: (folder / FILES[1]).read_text()) == NEW
    monkeypatch.setattr(install, "ATTEMPTS", 5)
    replacements = iter(range(99))
    with pytest.raises(CheckpointError, match="out is being replaced again and again"):
        install.read_folder(target, FILES, lambda folder: (folder / FILES[1]).read_text())


class Stopped(BaseException):
    pass


def stop_at(line: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that raises before the `line`-th line that runs in install.py."""
    left = line

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != install.__file__:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise Stopped
        return trace

    return trace


@pytest.mark.filterwarnings("ignore:unclosed file")  # which the interruption has left to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("exchange", "there"), [("exchange", True), ("exchange", False), ("two renames", True)], indirect=["exchange"]
)
def test_stopped_at_every_line(tmp_path: Path, exchange: str, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception such as KeyboardInterrupt, wherever it comes: the old folder or the new one, none is lost."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # slow
    previous, lines, seen = sys.gettrace(), 0, set()
    for lines in range(1, 1000):
        target = old_target(tmp_path) if there else tmp_path / "out"
        sys.settrace(stop_at(lines))
        try:
            replace(target)
        except Stopped:
            pass
        else:
            break
        finally:
            sys.settrace(previous)
        if not there and not target.exists():
            seen.add("")
        else:
            seen.add(install.read_folder(target, FILES, lambda folder: (folder / FILES[0]).read_text()))
        if target.exists():
            content(target)
        replace(target)
        assert content(target) == NEW and os.listdir(tmp_path) == ["out"]
        shutil.rmtree(target)
    assert lines > 50 and seen == {NEW, OLD if there else ""}


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from bitnet_numba.checkpoint import install
from pathlib import Path
target, left = Path(sys.argv[2]), int(sys.argv[3])
if sys.argv[4] == "two renames":
    install._exchange = lambda one, other: False
os.fsync = lambda fd: None  # slow
def count(event, arguments):
    global left
    if event.startswith(("os.", "shutil.", "fcntl.", "ctypes.dlsym")) or event == "open":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
with install.replacing(target, lambda: None) as folder:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("the new one")
    sys.addaudithook(count)  # the last steps
"""


def test_killed_before_every_call(tmp_path: Path, exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL before every call to the system in the last steps: what is read is whole, and so is the next run's."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # slow
    root, calls, seen = str(Path(bitnet_numba.__file__).parent.parent), 0, set()
    for calls in range(1, 100):
        target = old_target(tmp_path)
        command = [sys.executable, "-S", "-c", KILLED, root, str(target), str(calls), exchange]
        if (done := subprocess.run(command, capture_output=True)).returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        seen.add(
            install.read_folder(target, FILES, lambda folder: {(folder / name).read_text() for name in FILES}.pop())
        )
        assert exchange == "two renames" or content(target) in (OLD, NEW), "an exchange is never seen half done"
        replace(target)
        assert content(target) == NEW and os.listdir(tmp_path) == ["out"]
        shutil.rmtree(target)
    assert calls > 10 and seen == {OLD, NEW}


REPLACER = """
import os, shutil, sys
sys.path.insert(0, sys.argv[1])
from bitnet_numba.checkpoint import install
from pathlib import Path
target, sources = Path(sys.argv[2]), sys.argv[4:]
if sys.argv[3] == "two renames":
    install._exchange = lambda one, other: False
os.fsync = lambda fd: None  # slow
print("started", flush=True)
while True:
    for source in sources:
        with install.replacing(target, lambda: None) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
"""


def test_readers_see_one_checkpoint(tiny_packed: Path, tmp_path: Path, exchange: str) -> None:
    """While another process replaces a checkpoint by another one again and again, each load is wholly one of them."""
    one, other, target = tmp_path / "one", tmp_path / "other", tmp_path / "target"
    shutil.copytree(tiny_packed, one)
    (one / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 5}))
    make_checkpoint(tmp_path / "source", PRESETS["tiny"][1] | {"rms_norm_eps": 1e-6}, "online", seed=8)
    convert(tmp_path / "source", other)
    (other / "generation_config.json").unlink()
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|begin_of_text|>"}))

    def parts(folder: Path) -> tuple[object, ...]:
        """What config, weights, tokenizer and generation_config say."""
        llm = load(folder, "reference")
        weights = np.argsort(llm.logits([5, 6])[1])[-5:].tolist()
        return llm.config.rms_norm_eps, tuple(weights), llm.tokenizer.stop_ids, llm.sampling

    whole = {parts(one), parts(other)}
    assert all(a != b for a, b in zip(*whole, strict=True)), "each part tells the two apart"
    shutil.copytree(one, target)
    root = str(Path(bitnet_numba.__file__).parent.parent)
    command = [sys.executable, "-S", "-c", REPLACER, root, str(target), exchange, str(other), str(one)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == b"started\n"
            seen = {parts(target) for _ in range(40)}
        finally:
            writer.kill()
    assert seen <= whole
    assert seen == whole, "the folder was not replaced while it was read"
