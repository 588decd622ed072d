"""The command line tools/convert.py: what it says and returns, whatever stops it."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest
from huggingface_hub.utils import are_progress_bars_disabled

from bitnet_numba.checkpoint import install
from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.install import replacing
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.checkpoint.safetensors_file import TensorFile
from tools.convert import main
from tools.make_checkpoint import PRESETS, make_checkpoint

TOOL = Path(__file__).parent.parent.parent / "tools" / "convert.py"


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder to damage."""
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


def test_report(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert f"{len(TensorFile(source / 'model.safetensors').specs)} tensors" in out
    assert "q_proj 3" in out, "about a third of ternarised normal weights is zero"
    assert f"written to {tmp_path / 'out'}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "out"], "SRC must be a folder, a GGUF file, or a hub id"),
        (["https://example.org/owner/name", "out"], "SRC must be a folder, a GGUF file, or a hub id"),
        (["source", ""], "DST must be a folder"),
    ],
)
def test_odd_names(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_unwritable_target(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(source), str(tmp_path / "file" / "out")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_somebody_else_is_writing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with replacing(tmp_path / "out", lambda: None) as folder:
        assert main([str(source), str(tmp_path / "out")]) == 2
        assert f"convert: another conversion is writing {tmp_path / 'out'} right now\n" == capsys.readouterr().err
        (folder / "first").touch()
    assert os.listdir(tmp_path / "out") == ["first"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            MemoryError("Unable to allocate 9.3 GiB"),
            "not enough memory to convert SRC (4 MB): Unable to allocate 9.3 GiB",
        ),
        (MemoryError(), "not enough memory to convert SRC (4 MB)"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "cannot write DST: Disk quota exceeded"),
        (KeyboardInterrupt(), "interrupted; DST is as it was"),
    ],
)
def test_stopped_in_the_middle(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    message: str,
) -> None:
    def stop(*arguments: object) -> NoReturn:
        raise error

    convert(source, tmp_path / "out")
    monkeypatch.setattr("bitnet_numba.checkpoint.convert.norms_and_linears", stop)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    expected = 130 if isinstance(error, KeyboardInterrupt) else 2
    assert main([str(source), str(tmp_path / "out"), "--head", "int8", "--force"]) == expected
    message = message.replace("SRC", str(source)).replace("DST", str(tmp_path / "out"))
    assert capsys.readouterr().err == f"convert: {message}\n"
    assert open_packed(tmp_path / "out").head == "bf16" and set(os.listdir(tmp_path)) == {"source", "out"}


def test_interrupted_at_the_very_end(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before and after the moment at which DST appears: it is said which."""

    def stop(*arguments: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    for step, message in (
        ("_put_in_place", "nothing was written"),
        ("_sync_entries", f"{tmp_path / 'out'} is written"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(install, "_write_through", lambda folder: None)
            patched.setattr(install, step, stop)
            assert main([str(source), str(tmp_path / "out")]) == 130
        assert capsys.readouterr().err == f"convert: interrupted; {message}\n"
        assert (tmp_path / "out").exists() == (step == "_sync_entries")
    open_packed(tmp_path / "out")


def run_tool(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_disk_full(source: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the write fails in the middle of the tensors."""
    done = run_tool(
        source,
        tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("convert: cannot write") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and {path.name for path in tmp_path.iterdir()} == {"source"}


def test_odd_names_and_an_ascii_terminal(source: Path, tmp_path: Path) -> None:
    """Markup, characters that standard output cannot show, and escapes; and no bar where nobody watches it."""
    target = tmp_path / "a[/b]c é \x1b[2J"
    done = run_tool(source, target, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"converting {source}" and len(lines) == 4
    assert lines[-1] == f"written to {tmp_path}/a[/b]c \\xe9 \\x1b[2J"
    open_packed(target)


def test_full_standard_output(source: Path, tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, TOOL, source, tmp_path / "out"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == (
        f"convert: {tmp_path / 'out'} is written, but standard output is not: No space left on device\n"
    )
    open_packed(tmp_path / "out")


def interrupted(source: Path, started: str) -> tuple[int, list[str]]:
    """Exit code and messages of a converter that gets a Ctrl-C when it imports, or when its output appears."""
    command = [sys.executable, "-v", TOOL, source, source.parent / "out"]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # who runs tests may ignore it
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if started == "import" and line.startswith("import 'argparse'"):
                break
            if started == "convert" and any(source.parent.glob(".out*")):
                break
        child.send_signal(signal.SIGINT)
        # Ctrl-C may come while Python writes a line about an import, which then goes on with ours.
        said = re.findall(r"(?:convert: |Traceback).*", child.stderr.read())
    return child.returncode, said


@pytest.mark.parametrize("started", ["import", "convert"])
def test_interrupted(tmp_path: Path, started: str) -> None:
    """A real Ctrl-C: while libraries are imported, and in the middle."""
    for layers in (24, 96, 384):  # on a busy machine a small conversion can end before the signal comes
        make_checkpoint(tmp_path / "source", PRESETS["tiny"][1] | {"num_hidden_layers": layers}, "online")
        outcome = interrupted(tmp_path / "source", started)
        if outcome != (0, []):
            break
        shutil.rmtree(tmp_path / "source")
        shutil.rmtree(tmp_path / "out")
    assert outcome == (130, ["convert: interrupted; nothing was written"])
    assert os.listdir(tmp_path) == ["source"]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL as the converter works: DST is not there, or whole; and the next run clears up and succeeds."""
    make_checkpoint(tmp_path / "source", PRESETS["tiny"][1] | {"num_hidden_layers": 24}, "online")
    seen_partial = False
    for delay in (0.0, 0.01, 0.03, 0.1):
        child = subprocess.Popen(
            [sys.executable, TOOL, tmp_path / "source", tmp_path / "out"], stdout=subprocess.DEVNULL
        )
        while child.poll() is None and not any(tmp_path.glob(".out*")):
            time.sleep(0.001)
        time.sleep(delay)
        child.kill()
        child.wait()
        seen_partial |= any(tmp_path.glob(".out*"))
        if (tmp_path / "out").exists():
            open_packed(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
    assert seen_partial, "no kill came in the middle of a conversion"
    assert run_tool(tmp_path / "source", tmp_path / "out").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def cache_as_downloaded(source: Path, cache: Path, name: str) -> None:
    """Lays a folder out as huggingface_hub's cache holds a downloaded repository."""
    repository = cache / ("models--" + name.replace("/", "--"))
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(source, repository / "snapshots" / revision)


def test_hub_id_from_the_cache(source: Path, tmp_path: Path) -> None:
    cache_as_downloaded(source, tmp_path / "cache", "someone/tiny-bitnet")
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = run_tool("someone/tiny-bitnet", tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr
    assert open_packed(tmp_path / "out").config.hidden_size == 256
    done = run_tool("someone/other", tmp_path / "out2", env=env)
    assert done.returncode == 2 and "could not be downloaded" in done.stderr and done.stderr.count("\n") == 1
    done = run_tool("someone/tiny-bitnet", tmp_path / "out2", "--revision", "v9", env=env)
    assert done.returncode == 2 and "could not be downloaded" in done.stderr


def test_downloads_show_bars_in_terminals_only(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, hundreds of lines would be left of each."""

    def snapshot_download(name: str, **options: object) -> str:
        assert are_progress_bars_disabled()
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert main(["someone/tiny-bitnet", str(tmp_path / "out")]) == 0
    assert not are_progress_bars_disabled(), "other downloads of the process are left alone"
    assert capsys.readouterr().out.startswith("converting someone/tiny-bitnet\n")


def test_revision_needs_a_hub_id(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), str(tmp_path / "out"), "--revision", "main"]) == 2
    assert "--revision needs a hub id" in capsys.readouterr().err
