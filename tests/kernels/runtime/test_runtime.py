"""Compiling and caching kernels, which need no device; and saying why there is none."""

import io
import os
from pathlib import Path
from typing import Any

import pytest

from bitnet_numba.backends.cuda import warmup
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.engine.engine import DEMO
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.embedding import advance_spec
from bitnet_numba.kernels.runtime import compiler as compilation
from bitnet_numba.kernels.runtime import driver as device
from bitnet_numba.kernels.runtime.spec import ArchSpec
from tests.kernels.harness import why_no_gpu


def test_machine_code_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    spec = advance_spec(90)
    code, compiled = compilation.machine_code(spec, 90)
    assert compiled and code[:4] == b"\x7fELF"
    assert compilation.machine_code(spec, 90) == (code, False)
    # Another architecture, launch bound or name is another entry.
    assert compilation.machine_code(advance_spec(80), 80)[1]
    assert compilation.machine_code(spec._replace(threads=64), 90)[1]
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    assert compilation.machine_code(advance_spec(90), 90)[1]


def test_a_cache_that_is_a_file_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        assert compilation.machine_code(advance_spec(90), 90)[1]


def test_what_does_not_assemble_gives_one_line() -> None:
    with pytest.raises(BackendError, match="does not assemble for sm_90: ") as caught:
        compilation.link_cubin(".version 8.0\n.target sm_90\n.address_size 64\n.entry kernel() { nonsense; }", 90)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU")
def test_without_a_device_there_is_a_reason_in_one_line() -> None:
    from bitnet_numba.backends.cuda.backend import why_unusable

    reason = why_unusable()
    assert reason and "\n" not in reason
    with pytest.raises(BackendError):
        device.usable_device()


def test_processes_compile_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BITNET_NUMBA_COMPILERS", "2")
    config = open_packed(DEMO).config
    needs = warmup.Needs(config, True, ArchSpec(90, 132), None)
    specs = sorted(needs.specs(), key=lambda spec: spec.name)[:9]
    compilation.machine_code(specs[3], 90)
    warmup.compile_together(needs, specs, "a card")
    assert all(compilation.is_cached(spec, 90) for spec in specs)
    assert len(list((tmp_path / "cache").iterdir())) == 9, "only what was asked for"
    assert "Compiling kernels for a card, once: 8 of 8\n" in capsys.readouterr().err
    warmup.compile_together(needs, specs, "a card")
    assert not capsys.readouterr().err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The processes that would have been started; each ends at once and has compiled nothing."""
    processes: list[Any] = []

    class Process:
        def __init__(self, command: Any, **pipes: Any):
            processes.append(command)
            if len(processes) == 3:
                raise OSError("no more processes")
            self.stdin = io.BytesIO()

        def poll(self) -> int:
            return 1

        def kill(self) -> None:
            """It has ended."""

        wait = kill

    monkeypatch.setattr(warmup.subprocess, "Popen", Process)
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    return processes


def test_shares_that_nobody_makes_are_left_to_the_caller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: list[Any]
) -> None:
    needs = warmup.Needs(open_packed(DEMO).config, True, ArchSpec(90, 132), None)
    specs = needs.specs()
    monkeypatch.setenv("BITNET_NUMBA_COMPILERS", "4")
    warmup.compile_together(needs, specs, "a card")  # of four processes one cannot be started
    assert len(started) == 4
    monkeypatch.setenv("BITNET_NUMBA_COMPILERS", "0")
    warmup.compile_together(needs, specs, "a card")
    monkeypatch.setenv("BITNET_NUMBA_COMPILERS", "8")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "file"))  # nothing can be kept there
    warmup.compile_together(needs, specs, "a card")
    assert len(started) == 4
    monkeypatch.setenv("BITNET_NUMBA_COMPILERS", "many")
    with pytest.raises(BackendError, match="BITNET_NUMBA_COMPILERS must be a number of processes, not 'many'"):
        warmup.compile_together(needs, specs, "a card")
