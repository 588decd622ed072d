"""From a Python function to machine code of a GPU. Nothing here needs a device.

Numba compiles to PTX, and nvJitLink of the same toolkit makes machine code (a cubin) of that: the driver may have an
older assembler. For a GPU that is newer than the toolkit, the driver has the newer one, and gets PTX.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numba.cuda import types

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.runtime import disk_cache
from bitnet_numba.kernels.runtime.spec import KernelSpec

ENTRY = "kernel"  # the function's name in PTX and machine code


@contextlib.contextmanager
def _target(arch: int) -> Iterator[None]:
    """While it is active, Numba compiles device functions for this architecture, not for that of the current device,
    which may not exist."""
    from numba.cuda import dispatcher

    class Target:
        compute_capability = divmod(arch, 10)

    real = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: Target
    try:
        yield
    finally:
        dispatcher.get_current_device = real


def compile_ptx(
    function: Any, signature: Sequence[Any], arch: int, threads: int, blocks_per_sm: int = 1, registers: int = 0
) -> str:
    """PTX of a kernel (a plain Python function, or what cuda.jit made of one) for an architecture such as 90.

    `threads` per block and resident `blocks_per_sm` bound the registers; or, of one block an SM, `registers` a thread.
    An architecture that the compiler does not know yet gets the PTX of the last before it. Raises BackendError for one
    that it does not know any more.
    """
    from numba import cuda
    from numba.cuda.cudadrv.error import CCSupportError

    try:
        with _target(arch):
            ptx, _ = cuda.compile(
                getattr(function, "py_func", function),
                types.void(*signature),
                device=False,
                abi="numba",
                cc=divmod(arch, 10),
                launch_bounds=(threads, blocks_per_sm),
            )
    except CCSupportError as error:
        raise BackendError(f"the CUDA packages that are installed do not compile for sm_{arch}: {error}") from None
    name = re.search(r"\.entry (\w+)\(", ptx)
    assert name is not None
    ptx = ptx.replace(name.group(1), ENTRY)
    if registers:  # one bound or the other
        ptx = ptx.replace(".minnctapersm 1", f".maxnreg {registers}")
        assert ".maxnreg" in ptx
    if "wgmma." in ptx:  # an instruction of this architecture alone, not of later ones
        ptx = ptx.replace(f".target sm_{arch}", f".target sm_{arch}a")
    return ptx


def link_cubin(ptx: str, arch: int) -> bytes:
    """Machine code from PTX; for an architecture that the assembler does not know, the PTX as the driver takes it.

    Raises BackendError with the assembler's first error.
    """
    from cuda.bindings import nvjitlink

    options = [f"-arch=sm_{arch}{'a' if f'.target sm_{arch}a' in ptx else ''}"]
    try:
        handle = nvjitlink.create(len(options), options)
    except nvjitlink.nvJitLinkError:
        return ptx.encode() + b"\0"
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


def _cache_path(spec: KernelSpec, arch: int) -> Path:
    digest = hashlib.sha256(disk_cache.toolchain_digest())
    digest.update(repr((spec.name, spec.signature, spec.threads, spec.blocks_per_sm, spec.registers, arch)).encode())
    return disk_cache.folder() / f"{digest.hexdigest()[:32]}.cubin"


def is_cached(spec: KernelSpec, arch: int) -> bool:
    """Whether the disk cache has a spec's machine code."""
    with contextlib.suppress(OSError):
        return _cache_path(spec, arch).exists()
    return False


def machine_code(spec: KernelSpec, arch: int) -> tuple[bytes, bool]:
    """A spec's machine code (see `link_cubin`), from the disk cache or compiled now; and whether it was compiled.

    Raises BackendError.
    """
    path = _cache_path(spec, arch)
    with contextlib.suppress(OSError):
        return path.read_bytes(), False
    ptx = compile_ptx(spec.kernel, spec.signature, arch, spec.threads, spec.blocks_per_sm, spec.registers)
    cubin = link_cubin(ptx, arch)
    disk_cache.write(path, cubin)
    return cubin, True
