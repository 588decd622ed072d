"""Compiling for the CPU, with a disk cache that is never stale and never of another CPU.

A kernel is compiled by itself, as a function of integers (addresses and sizes) that `call` calls by its address. So
each is compiled once for all that call it, and what calls it need not be compiled for every instruction set.

Numba's own cache looks at the file of the cached function alone: with a changed helper module it serves old code. Here
an entry depends on all source of kernels/, on the compilers' versions, on the CPU and its features, and on the kernel's
constants and types.

Numba names a function in machine code by its number, and numbers functions from 1 in every process. Entries that two
processes compiled would have functions of one name, and where a third process loads both, the linker takes the first
for both: wrong numbers, in silence. So the numbers begin at random here.
"""

import contextlib
import hashlib
import inspect
import itertools
import os
import pickle
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import serialize, types
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from bitnet_numba.kernels.cpu.vec import OPTIONS
from bitnet_numba.kernels.runtime import disk_cache


def _number_functions_anew() -> None:
    FunctionIdentity._unique_ids = itertools.count(secrets.randbits(60))


_number_functions_anew()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_number_functions_anew)


def entry(function: Callable[..., Any]) -> Any:
    """Decorator of a function that Python calls: it runs without the GIL.

    Numba compiles it on the first call for some types of arguments; what it calls is cached on disk with it.
    """
    dispatcher = njit(**(OPTIONS | {"no_cpython_wrapper": False}))(function)
    dispatcher._cache = DiskCache(function, ())
    return dispatcher


class Kernel:
    """A kernel for some constants: `build(*constants)` returns the function, of int64 arguments, without a result."""

    def __init__(self, build: Callable[..., Callable[..., None]], *constants: Any):
        self.name = build.__name__
        self._function = build(*constants)
        signature = types.void(*[types.int64] * len(inspect.signature(self._function).parameters))
        options = {name: OPTIONS[name] for name in ("boundscheck", "error_model")} | {"nopython": True}
        self._compiled = CFunc(self._function, (signature.args, signature.return_type), {}, options)
        self._cache = DiskCache(build, constants)
        self._compiled._cache = self._cache  # type: ignore[attr-defined]
        self._signature = signature

    @property
    def is_cached(self) -> bool:
        """Whether it is loaded, or the disk has it."""
        return self._compiled.address is not None or self._cache.has(self._signature)

    def address(self) -> int:
        """The address of its machine code, which is loaded from the disk or compiled by the first call."""
        if self._compiled.address is None:
            self._compiled.compile()
        address = self._compiled.address
        assert address is not None
        return address


@intrinsic
def call(typingctx, kernel, arguments):
    """Calls the kernel at an address with a tuple of integers."""

    def codegen(context, builder, sig, args):
        numbers = [
            context.cast(builder, builder.extract_value(args[1], i), ty, types.int64)
            for i, ty in enumerate(sig.args[1])
        ]
        function = ir.FunctionType(ir.VoidType(), [number.type for number in numbers])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), numbers)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


class DiskCache(NullCache):
    """The interface that Numba has to a cache: load and save what was compiled for a signature."""

    def __init__(self, function: Callable[..., Any], constants: tuple[Any, ...]):
        self._name = f"{function.__module__}.{function.__qualname__}{constants}"

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

    def has(self, signature: Any) -> bool:
        """Whether the disk has what was compiled for a signature, or for a tuple of arguments' types."""
        with contextlib.suppress(OSError):
            return self.path(signature, cpu_target.target_context.codegen()).exists()
        return False

    def path(self, signature: Any, codegen: Any) -> Path:
        """The file of an entry."""
        digest = hashlib.sha256(disk_cache.toolchain_digest())
        arguments = getattr(signature, "args", signature)
        digest.update(repr((self._name, arguments, codegen.magic_tuple(), sys.version_info[:3])).encode())
        return disk_cache.folder() / f"{digest.hexdigest()[:32]}.cpu"
