"""Compiling for a device."""

import contextlib
from collections.abc import Iterator
from typing import Any

from numba import cuda


@contextlib.contextmanager
def _target(arch: int) -> Iterator[None]:
    """While compiling: Numba asks the present device, which may not exist, for what architecture to compile callees."""
    from numba.cuda import dispatcher

    class Target:
        compute_capability = divmod(arch, 10)

    real = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: Target
    try:
        yield
    finally:
        dispatcher.get_current_device = real


def compile_ptx(function: Any, signature: tuple, arch: int, threads: int, blocks_per_sm: int = 1) -> str:
    """PTX of a kernel (a plain Python function) for an architecture such as 90; no device is needed."""
    from numba.cuda import types

    with _target(arch):
        ptx, _ = cuda.compile(
            function,
            types.void(*signature),
            device=False,
            abi="numba",
            cc=divmod(arch, 10),
            launch_bounds=(threads, blocks_per_sm),
        )
    return ptx
