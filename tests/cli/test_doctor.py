"""`bitnet-numba doctor`: what it says of this machine, and of machines where something is broken."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import pytest

import bitnet_numba
from bitnet_numba.cli import doctor, machine, probe
from bitnet_numba.cli.main import main

ANSWER = {"answer": "Hi!", "tokens_per_second": 12.3, "seconds": 1.0}
CPU = {
    "instruction_sets": ["avx2", "portable"],
    "instruction_set": "avx2",
    "threads": 2,
    "kernels": 10,
    "kernels_cached": 10,
}
NO_GPU = {"driver": None, "cuda": None, "cards": [], "extra": None, "problem": "there is no NVIDIA driver"}
CARD = {"name": "NVIDIA H200", "sm": "90", "memory_bytes": 150_000_000_000}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `doctor` on a made-up machine with a CPU: (exit code, standard output, standard error)."""
    for name in ("CACHE", "MODELS"):
        monkeypatch.setenv(f"BITNET_NUMBA_{name}", str(tmp_path / name))
    monkeypatch.setattr(machine, "probe", lambda what: NO_GPU if what == "cuda" else CPU)
    monkeypatch.setattr(machine, "answer", lambda backend: ANSWER)
    monkeypatch.setattr(machine.bandwidth, "__defaults__", (4_000_000, 0.01))
    return lambda *arguments: (main(["doctor", *arguments]), *capsys.readouterr())


def fail(*_: object) -> NoReturn:
    raise RuntimeError("it is\nbroken")


def test_a_screen(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 24 and "problem" not in out
    for text in ("avx2 (used), portable", "2 threads", " GB/s", "no NVIDIA driver", "on cpu", "12 tokens/s", "'Hi!'"):
        assert text in out
    report = json.loads(run("--json")[1])
    assert report["runs"] == {"cpu": ANSWER} and report["caches"]["models"]["writable"] is True


def test_a_gpu_whose_packages_are_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra, cuda in (("cuda12", "12.8"), ("cuda13", "13.0")):
        gpu = {"driver": "580.65.06", "cuda": cuda, "cards": [CARD], "extra": extra, "problem": "not installed"}
        monkeypatch.setattr(machine, "probe", lambda what, gpu=gpu: gpu if what == "cuda" else CPU)
        code, out, _ = run()
        assert code == 0 and f'pip install "bitnet-numba[{extra}]"' in out
        assert "NVIDIA H200, sm_90, 150.00 GB" in out and f"driver 580.65.06, for CUDA {cuda}" in out


def test_a_gpu_that_runs_and_one_that_does_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"driver": None, "cuda": "13.0", "cards": [CARD], "extra": "cuda13", "problem": None}
    monkeypatch.setattr(machine, "probe", lambda what: gpu if what == "cuda" else CPU)
    code, out, _ = run()
    assert code == 0 and "on cuda: " in out and "on cpu: " in out and "pip install" not in out
    monkeypatch.setattr(machine, "probe", lambda what: gpu if what == "cuda" else CPU | {"kernels_cached": 3})
    assert "3 of the built-in model's 10 CPU kernels were, before this run, compiled" in run()[1]
    monkeypatch.setattr(machine, "answer", lambda backend: fail() if backend == "cuda" else ANSWER)
    code, out, _ = run()
    assert code == 0 and "NOT on cuda: it is broken" in out and "on cpu: " in out


@pytest.mark.parametrize("piece", ["software", "processor", "bandwidth", "caches", "probe", "answer"])
def test_one_broken_piece(piece: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, piece, fail)
    for arguments in ([], ["--json"]):
        code, out, err = run(*arguments)
        assert code == (1 if piece == "answer" else 0) and err == ""
        assert "it is broken" in out and "Traceback" not in out
    assert set(json.loads(out)) == {"software", "cpu", "gpu", "caches", "runs", "advice"}


def test_everything_broken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for piece in ("software", "processor", "bandwidth", "caches", "probe", "answer"):
        monkeypatch.setattr(machine, piece, fail)
    code, out, _ = run()
    assert code == 1 and out.count("it is broken") >= 6 and "NOT on reference" in out and "nothing runs: " in out
    monkeypatch.setattr(machine, "answer", lambda backend: ANSWER if backend == "reference" else fail())
    code, out, _ = run()
    assert code == 0 and "only the slow NumPy backend is left" in out and "nothing runs" not in out


def test_missing_packages_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("tokenizers", "numba-cuda"):
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    assert "problem: not installed: tokenizers\n" in run()[1]


def test_cache_folders_that_cannot_be_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "file" / "cache"))
    code, out, _ = run()
    assert code == 0 and "CANNOT BE WRITTEN" in out and "set BITNET_NUMBA_CACHE to a folder" in out
    monkeypatch.delenv("BITNET_NUMBA_MODELS")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    assert "there is no home folder to keep models in" in run()[1]


def test_settings_are_shown_safely(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_NUMBA_ISA", "\x1b[2Javx\n")
    out = run()[1]
    assert "BITNET_NUMBA_ISA=\\x1b[2Javx\\n\n" in out and "\x1b" not in out


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os; os.abort()", "its process was ended by SIGABRT"),
        ("print('no JSON')", "exit code 0"),
        ("import sys; sys.exit('bitnet-chat: no model')", "no model"),
        ("raise ValueError('odd')", "ValueError: odd"),
        ("import time; time.sleep(60)", "no answer after 1 seconds"),
    ],
)
def test_processes_that_break(code: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RUN", code)
    monkeypatch.setattr(machine, "PROBE_SECONDS", 1 if "sleep" in code else 60)
    assert machine.guarded(machine.probe, "cpu") == {"problem": problem}


def test_what_a_broken_numba_looks_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own meets it, and its reason is shown."""
    (tmp_path / "numba.py").write_text("raise ImportError('libllvm is\\nmissing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert machine.guarded(machine.probe, "cpu") == {"problem": "libllvm is missing"}


def test_an_install_in_which_nothing_can_be_imported(tmp_path: Path) -> None:
    for name in ("numpy", "numba", "tokenizers", "huggingface_hub"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is broken')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "bitnet_numba", "doctor"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "") and "Traceback" not in done.stdout
    for text in ("CPU", "numpy is broken", "NOT on cpu: cannot start: ", "NOT on reference", "advice "):
        assert text in done.stdout


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.probe("cpu")
    assert "problem" not in found and found["instruction_sets"][-1] == "portable" and found["threads"] >= 1
    assert 0 <= found["kernels_cached"] <= found["kernels"]
    assert {"cards", "problem", "extra"} <= set(machine.probe("cuda"))
    answered = machine.answer("reference")
    assert answered["answer"] and answered["tokens_per_second"] > 0
    monkeypatch.setenv("BITNET_NUMBA_ISA", "mmx")
    assert "'mmx' is not one of this machine's" in machine.probe("cpu")["problem"]


def test_reading_memory_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.perf_counter()
    found = machine.bandwidth(2, 20_000_000, 0.05)
    assert found["read_bytes_per_second"] > 1e6 and time.perf_counter() - start < 30


def test_driver_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    for text, version in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\nGCC 13.2", "580.65.06"),
        ("nothing of the kind", None),
    ):
        file.write_text(text)
        assert probe.driver_version(str(file)) == version
    assert probe.driver_version(str(tmp_path / "none")) is None


class FakeDriver:
    """libcuda with one card."""

    def __init__(self, version: int, init: int = 0):
        self.version, self.init = version, init

    def __getattr__(self, name: str) -> Callable[..., int]:
        values = {"cuDriverGetVersion": self.version, "cuDeviceGetCount": 1, "cuDeviceTotalMem_v2": 8_000_000_000}

        def call(*arguments: Any) -> int:
            if name == "cuInit":
                return self.init
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"no CUDA-capable device is detected"
            elif name == "cuDeviceGetName":
                arguments[0].value = b"Card"
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = 8 if arguments[1] == 75 else 6
            elif name in values:
                arguments[0]._obj.value = values[name]
            return 0

        return call


@pytest.mark.parametrize(
    ("driver", "extra", "problem"),
    [
        (FakeDriver(11080), None, "the driver is for CUDA 11.8; CUDA 12 or newer is needed"),
        (FakeDriver(12040), "cuda12", "the CUDA packages are for CUDA 99, the driver is for CUDA 12"),
        (FakeDriver(13000, 100), "cuda13", "the driver cannot start: no CUDA-capable device is detected (error 100)"),
    ],
)
def test_drivers(driver: FakeDriver, extra: str | None, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(metadata, "version", lambda name: "99.0")
    monkeypatch.setattr(probe.util, "find_spec", lambda name: True)
    found = probe.cuda()
    assert (found["extra"], found["problem"]) == (extra, problem)
    if extra == "cuda12":
        assert found["cards"] == [{"name": "Card", "sm": "86", "memory_bytes": 8_000_000_000}]


def test_packages_for_the_gpu_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.ctypes, "CDLL", lambda name: FakeDriver(13000))
    monkeypatch.setattr(probe.util, "find_spec", lambda name: None)
    found = probe.cuda()
    assert found["problem"] == "the CUDA packages are not installed" and found["extra"] == "cuda13"
    assert doctor.advice({"gpu": found, "caches": {}, "runs": {"cpu": ANSWER}}) == [
        'to use the GPU: pip install "bitnet-numba[cuda13]"'
    ]


def test_its_processes_find_the_package_wherever_they_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("import sys; print(sys.argv[1:])")
    monkeypatch.setattr(bitnet_numba, "__file__", str(tmp_path / "bitnet_numba" / "__init__.py"))
    done = machine._child("only_here", ["--a", "b"], 60)
    assert (done.returncode, done.stdout) == (0, "['--a', 'b']\n"), done.stderr
