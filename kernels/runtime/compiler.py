"""From a Python function to machine code, and keeping that on disk. None of it needs a device.

Numba compiles to PTX, and the linker of the same toolkit makes machine code of it: the driver's own may be older.
"""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from numba.cuda import types

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.runtime.spec import KernelSpec

ENTRY = "kernel"  # what the function is called in PTX and machine code


@contextlib.contextmanager
def _target(arch: int) -> Iterator[None]:
    """While compiling: Numba asks the present device, which may not exist, what architecture to compile callees for."""
    from numba.cuda import dispatcher

    class ArchSpec:
        compute_capability = divmod(arch, 10)

    real = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: ArchSpec
    try:
        yield
    finally:
        dispatcher.get_current_device = real


def compile_ptx(function: Any, signature: Sequence[Any], arch: int, threads: int, blocks_per_sm: int = 1) -> str:
    """PTX of a kernel (a plain Python function, or what cuda.jit made of one) for an architecture such as 90.

    `threads` a block and `blocks_per_sm` bound the registers. No device is needed.
    """
    from numba import cuda

    with _target(arch):
        ptx, _ = cuda.compile(
            getattr(function, "py_func", function),
            types.void(*signature),
            device=False,
            abi="numba",
            cc=divmod(arch, 10),
            launch_bounds=(threads, blocks_per_sm),
        )
    name = re.search(r"\.entry (\w+)\(", ptx)
    assert name is not None
    ptx = ptx.replace(name.group(1), ENTRY)
    if "wgmma." in ptx:  # instructions of this very architecture and no later one
        ptx = ptx.replace(f".target sm_{arch}", f".target sm_{arch}a")
    return ptx


def link_cubin(ptx: str, arch: int) -> bytes:
    """Machine code from PTX, by the linker that matches Numba's compiler (the driver's may be older). No device needed.

    Raises BackendError with the assembler's first complaint.
    """
    from cuda.bindings import nvjitlink

    options = [f"-arch=sm_{arch}{'a' if f'.target sm_{arch}a' in ptx else ''}"]
    handle = nvjitlink.create(len(options), options)
    try:
        code = ptx.encode()
        try:
            nvjitlink.add_data(handle, nvjitlink.InputType.PTX, code, len(code), "kernel.ptx")
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            raise BackendError(f"a kernel does not assemble for sm_{arch}: {log.decode().splitlines()[0]}") from None
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        return bytes(cubin)
    finally:
        nvjitlink.destroy(handle)


@cache
def _toolchain() -> bytes:
    """What machine code depends on beside a kernel's name: every source file of the kernels, and the compilers."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent  # kernels/
    for source in sorted(package.rglob("*.py")):
        digest.update(source.read_bytes())
    import bitnet_numba.packing
    import bitnet_numba.sampling

    for module in (bitnet_numba.packing, bitnet_numba.sampling):
        digest.update(Path(str(module.__file__)).read_bytes())
    for name in ("numba", "numba-cuda", "cuda-bindings", "nvidia-nvvm", "nvidia-nvjitlink"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            digest.update(f"{name} {metadata.version(name)};".encode())
    return digest.digest()


def cache_folder() -> Path:
    """Where machine code is kept: $BITNET_NUMBA_CACHE, or bitnet-numba under the user's cache folder."""
    chosen = os.environ.get("BITNET_NUMBA_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitnet-numba"


def cache_is_writable() -> bool:
    """Whether machine code can be kept."""
    with contextlib.suppress(OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()):
            return True
    return False


def _cache_path(spec: KernelSpec, arch: int) -> Path:
    digest = hashlib.sha256(_toolchain())
    digest.update(repr((spec.name, spec.signature, spec.threads, spec.blocks_per_sm, arch)).encode())
    return cache_folder() / f"{digest.hexdigest()[:32]}.cubin"


def is_cached(spec: KernelSpec, arch: int) -> bool:
    with contextlib.suppress(OSError):
        return _cache_path(spec, arch).exists()
    return False


def machine_code(spec: KernelSpec, arch: int) -> tuple[bytes, bool]:
    """A KernelSpec's machine code, from the disk cache or compiled now; and whether it was compiled."""
    path = _cache_path(spec, arch)
    with contextlib.suppress(OSError):
        return path.read_bytes(), False
    cubin = link_cubin(compile_ptx(spec.kernel, spec.signature, arch, spec.threads, spec.blocks_per_sm), arch)
    with contextlib.suppress(OSError):  # no cache, no harm: it is compiled again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)
    return cubin, True
