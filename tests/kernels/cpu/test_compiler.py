"""The disk cache of compiled kernels: what several processes have compiled goes together in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Compiles or loads a kernel for each of its arguments, and prints what they write. Kernels of one builder differ by a
# constant, and so do the functions that they call.
SCRIPT = """
import ctypes, json, os, sys
from numba import njit, types
from numba.extending import intrinsic
from bitnet_numba.kernels.cpu.compiler import Kernel
from bitnet_numba.kernels.cpu.vec import OPTIONS

@intrinsic
def store(typingctx, address, value):
    def codegen(context, builder, sig, args):
        number = context.cast(builder, args[1], sig.args[1], types.int64)
        builder.store(number, builder.inttoptr(args[0], number.type.as_pointer()))
        return context.get_dummy_value()
    return types.void(types.int64, value), codegen

@intrinsic
def keep_apart(typingctx):
    def codegen(context, builder, sig, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()
    return types.void(), codegen

def build(constant):
    @njit(**OPTIONS)
    def times(x):
        keep_apart()
        return x * constant

    def kernel(address):
        store(address, times(100))

    return kernel

def run(constant):
    kernel = Kernel(build, constant)
    cached, out = kernel.is_cached, ctypes.c_int64()
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(kernel.address())(ctypes.addressof(out))
    return [cached, out.value]

constants = json.loads(sys.argv[1])
if sys.argv[2] == "forked":
    for constant in constants:
        if os.fork() == 0:
            run(constant)
            os._exit(0)
        assert os.wait()[1] == 0
else:
    print(json.dumps([run(constant) for constant in constants]))
"""


def run(cache: Path, constants: list[int], how: str = "here") -> list[list[int]]:
    environment = os.environ | {"BITNET_NUMBA_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, json.dumps(constants), how]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout else []  # type: ignore[no-any-return]


def test_kernels_of_several_processes_go_together(tmp_path: Path) -> None:
    for constant in (1, 2):
        assert run(tmp_path, [constant]) == [[False, 100 * constant]]
    assert run(tmp_path, [1, 2, 3]) == [[True, 100], [True, 200], [False, 300]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_kernels_of_forked_processes_go_together(tmp_path: Path) -> None:
    run(tmp_path, [1, 2], "forked")
    assert run(tmp_path, [1, 2]) == [[True, 100], [True, 200]]
