"""What `bitnet-numba doctor` finds out. Each function says what it found as a dict; a broken piece is a "problem"."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import bitnet_numba
from bitnet_numba.errors import one_line, printable

PACKAGES = ("numpy", "numba", "llvmlite", "tokenizers", "huggingface_hub", "numba-cuda", "cuda-bindings")  # shown
REQUIRED = (*PACKAGES[:5], "safetensors", "jinja2", "rich", "markdown-it-py", "prompt_toolkit", "shtab")
PROMPT = "Hello!"
PROBE_SECONDS, ANSWER_SECONDS = 120, 900  # a first answer compiles kernels, on a slow machine for minutes
READ_BYTES, PIECE_BYTES = 400_000_000, 2_000_000  # more than most processors cache; what a thread reads at a time
# Runs a module as -m does, of this very package, wherever it was imported from.
RUN = """
import runpy, sys
sys.path.append(sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""

Facts = dict[str, Any]


def guarded(look: Callable[..., Facts], *arguments: object) -> Facts:
    """What a function finds; if it fails in any way, one line of why."""
    try:
        return look(*arguments)
    except Exception as error:  # whatever is broken here, the rest is still shown
        return {"problem": one_line(error)}


def software() -> Facts:
    """Versions of Python and of the packages that matter; None for one that is not installed."""
    versions = {name: _version(name) for name in PACKAGES}
    missing = [name for name in REQUIRED if _version(name) is None]
    found: Facts = {
        "bitnet_numba": bitnet_numba.__version__,
        "location": str(Path(bitnet_numba.__file__).parent),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "packages": versions,
        "settings": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("BITNET_NUMBA_")},
    }
    return found | ({"problem": f"not installed: {', '.join(missing)}"} if missing else {})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor() -> Facts:
    """The CPU's name, and the machine's memory."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    memory = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"name": name, "memory_bytes": memory}


def bandwidth(threads: int, nbytes: int = READ_BYTES, seconds: float = 0.4) -> Facts:
    """How fast several threads together read memory: what decoding on the CPU waits for.

    Takes about twice `seconds`, even where memory is short and a page takes long.
    """
    import numpy as np

    memory = np.empty(nbytes // 8, np.int64)
    pieces, end = [], time.perf_counter() + seconds
    for piece in np.array_split(memory, max(threads, nbytes // PIECE_BYTES)):
        piece.fill(1)  # memory that nobody has written is not there
        pieces.append(piece)
        if len(pieces) >= threads and time.perf_counter() > end:
            break

    def read(mine: list[Any]) -> int:
        done = 0
        while time.perf_counter() < end:
            for piece in mine:
                piece.max()
                done += piece.nbytes
                if time.perf_counter() > end:
                    break
        return done

    start = time.perf_counter()
    end = start + seconds
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(read, [pieces[i::threads] for i in range(threads)]))
    return {"read_bytes_per_second": done / (time.perf_counter() - start)}


def caches() -> Facts:
    """The cache folders: where they are, whether they can be written, their size."""

    def kernels() -> Path:
        from bitnet_numba.kernels.runtime import disk_cache

        return disk_cache.folder()

    def models() -> Path:
        from bitnet_numba.hub.store import cache_folder

        return cache_folder()

    def hugging_face() -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def of_files(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())  # models may be in it

    def of_all(folder: Path) -> int | None:
        from bitnet_numba.hub.store import size_on_disk

        return size_on_disk(folder, seconds=1.0)

    return {
        "kernels": guarded(_folder, kernels, of_files),
        "models": guarded(_folder, models, of_all),
        "hugging_face": guarded(_folder, hugging_face, of_all),
    }


def _folder(where: Callable[[], Path], nbytes: Callable[[Path], int | None]) -> Facts:
    path = where()
    existing = next((folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder)), path)
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return {"path": str(path), "writable": writable, "nbytes": nbytes(path)}


def probe(what: str) -> Facts:
    """What `probe` finds of the "cpu" or of "cuda"."""
    return _json_of(_child("bitnet_numba.cli.probe", [what], PROBE_SECONDS))


def answer(backend: str) -> Facts:
    """Whether the built-in model answers on a backend, and how fast."""
    arguments = ["--backend", backend, "--json", "--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "64"]
    start = time.perf_counter()
    found = _json_of(_child("bitnet_numba.chat", arguments, ANSWER_SECONDS))
    return {
        "answer": printable(str(found["text"]), 60),
        "tokens_per_second": found["tokens_per_second"],
        "seconds": time.perf_counter() - start,  # with the start of a process, and compilation the first time
    }


def _child(module: str, arguments: list[str], seconds: float) -> "subprocess.CompletedProcess[str]":
    root = str(Path(bitnet_numba.__file__).parent.parent)
    command = [sys.executable, "-c", RUN, root, module, *arguments]
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no answer after {seconds:.0f} seconds") from None


def _json_of(done: "subprocess.CompletedProcess[str]") -> Facts:
    """The JSON object in the last line of a process's output. Raises RuntimeError with the reason if there is none."""
    if done.returncode == 0:
        with contextlib.suppress(ValueError, IndexError):
            found = json.loads(done.stdout.splitlines()[-1])
            if isinstance(found, dict):
                return found
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        with contextlib.suppress(ValueError):
            raise RuntimeError(f"its process was ended by {signal.Signals(-done.returncode).name}")
    raise RuntimeError(said[-1].removeprefix("bitnet-chat: ") if said else f"exit code {done.returncode}")
