"""The disk cache of machine code, for GPUs and for CPUs: where it is, and what an entry depends on."""

import contextlib
import hashlib
import importlib
import os
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path

KERNELS = Path(__file__).parent.parent  # the folder kernels/
# The modules elsewhere that kernels take constants from, which are compiled into them.
CONSTANTS = ("bitnet_numba.packing", "bitnet_numba.quantize", "bitnet_numba.sampling", "bitnet_numba.sampling_params")
COMPILERS = (  # distributions
    "numba", "numba-cuda", "llvmlite", "cuda-bindings", "nvidia-nvvm", "nvidia-nvjitlink",
    "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12",  # the names of the last two in CUDA 12
)  # fmt: skip


@cache
def toolchain_digest() -> bytes:
    """What machine code depends on beside a spec: all source of kernels, constants from elsewhere, the compilers."""
    digest = hashlib.sha256()
    for source in sorted(KERNELS.rglob("*.py")):
        digest.update(f"{source.relative_to(KERNELS).as_posix()};".encode() + source.read_bytes())
    for name in CONSTANTS:
        digest.update(Path(str(importlib.import_module(name).__file__)).read_bytes())
    for name in COMPILERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            digest.update(f"{name} {metadata.version(name)};".encode())
    return digest.digest()


def folder() -> Path:
    """Where machine code is cached: $BITNET_NUMBA_CACHE, or bitnet-numba in the user's cache folder."""
    chosen = os.environ.get("BITNET_NUMBA_CACHE")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitnet-numba"
    except RuntimeError:  # this user has no home: a folder that cannot be written
        return Path(os.devnull) / "bitnet-numba"


def is_writable() -> bool:
    """Whether files can be written to the cache folder, which is made if it is missing."""
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder()):
            return True
    return False


def write(path: Path, data: bytes) -> None:
    """Writes an entry whole or not at all; without a cache that can be written, it is compiled again next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
            os.replace(unfinished, path)
        except BaseException:  # a full disk, or Ctrl-C
            os.unlink(unfinished)
            raise
