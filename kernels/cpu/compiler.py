"""Compiling for the CPU, with a disk cache that is never stale and never of another CPU.

Numba's own cache looks at the file of the cached function alone: with a changed helper module it serves old code. Here
an entry depends on all source of kernels/, on the compilers' versions, on the CPU and its features, and on the types of
the arguments.
"""

import contextlib
import hashlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import serialize
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult

from bitnet_numba.kernels.cpu.vec import OPTIONS
from bitnet_numba.kernels.runtime import disk_cache


def entry(function: Callable[..., Any]) -> Any:
    """Decorator of a function that Python calls: it runs without the GIL.

    Numba compiles it on the first call for some types of arguments; what it calls is cached on disk with it.
    """
    dispatcher = njit(**(OPTIONS | {"no_cpython_wrapper": False}))(function)
    dispatcher._cache = _DiskCache(function)
    return dispatcher


class _DiskCache(NullCache):
    """The interface that Numba's dispatchers have to a cache: load and save what was compiled for a signature."""

    def __init__(self, function: Callable[..., Any]):
        self._name = f"{function.__module__}.{function.__qualname__}"

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """The compiled function from the disk; None if it is not there, or damaged."""
        target_context.refresh()
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError, AttributeError, pickle.UnpicklingError):
            data = self.path(signature, target_context.codegen()).read_bytes()
            digest, payload = data[:32], data[32:]
            if hashlib.sha256(payload).digest() == digest:
                return CompileResult._rebuild(target_context, *pickle.loads(payload))
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Writes a compiled function to the disk, if there is a folder for it."""
        payload = serialize.dumps(compiled._reduce())
        disk_cache.write(self.path(signature, compiled.codegen), hashlib.sha256(payload).digest() + payload)

    def path(self, signature: Any, codegen: Any) -> Path:
        """The file of an entry."""
        digest = hashlib.sha256(disk_cache.toolchain_digest())
        digest.update(repr((self._name, signature, codegen.magic_tuple(), sys.version_info[:3])).encode())
        return disk_cache.folder() / f"{digest.hexdigest()[:32]}.cpu"


def is_cached(dispatcher: Any, signature: tuple[Any, ...]) -> bool:
    """Whether the disk has what `dispatcher` would compile for argument types."""
    codegen = dispatcher.targetctx.codegen()
    with contextlib.suppress(OSError):
        return dispatcher._cache.path(signature, codegen).exists()
    return False
