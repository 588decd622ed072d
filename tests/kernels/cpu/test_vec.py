"""Register operations against what `vec.PLAIN` says, memory at odd addresses, and which instruction sets there are."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import llvmlite.binding as llvm
import numpy as np
import pytest
from numba import njit

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.cpu import dot, isa, vec
from bitnet_numba.kernels.cpu.memory import load_f32, load_i8, store_f32, store_i8, store_i32

ROOT = Path(__file__).parents[3]

SLOT = 64  # bytes of a result
# The order of the results of `on_floats`, `on_ints` and `on_both`.
FLOATS = (
    "add", "sub", "mul", "div", "maximum", "minimum", "absolute", "rint", "fma", "to_ints", "as_ints", "sum_lanes",
    "max_lanes",
)  # fmt: skip
INTS = ("add", "sub", "mul", "and_", "shl", "lshr", "ashr", "to_floats", "to_bytes", "as_floats", "join", "sum_lanes")
LITERAL = 0x0F0F3C5A
MEMORY = ("zero", "load", "broadcast", "splat", "store", "address_of")  # what deals with memory, by its first word


@njit(error_model="numpy")
def on_floats(a, b, c, out):
    x, y, z = vec.load_f32x16(a, 0), vec.load_f32x16(b, 0), vec.load_f32x16(c, 0)
    vec.store(out, 0 * SLOT, vec.add(x, y))
    vec.store(out, 1 * SLOT, vec.sub(x, y))
    vec.store(out, 2 * SLOT, vec.mul(x, y))
    vec.store(out, 3 * SLOT, vec.div(x, y))
    vec.store(out, 4 * SLOT, vec.maximum(x, y))
    vec.store(out, 5 * SLOT, vec.minimum(x, y))
    vec.store(out, 6 * SLOT, vec.absolute(x))
    vec.store(out, 7 * SLOT, vec.rint(x))
    vec.store(out, 8 * SLOT, vec.fma(x, y, z))
    vec.store(out, 9 * SLOT, vec.to_ints(x))
    vec.store(out, 10 * SLOT, vec.as_ints(x))
    store_f32(out, 11 * SLOT, vec.sum_lanes(x))
    store_f32(out, 12 * SLOT, vec.max_lanes(x))


@njit(error_model="numpy")
def on_ints(a, b, out):
    x, y = vec.load_i32x16(a, 0), vec.load_i32x16(b, 0)
    vec.store(out, 0 * SLOT, vec.add(x, y))
    vec.store(out, 1 * SLOT, vec.sub(x, y))
    vec.store(out, 2 * SLOT, vec.mul(x, y))
    vec.store(out, 3 * SLOT, vec.and_(x, LITERAL))
    vec.store(out, 4 * SLOT, vec.shl(x, 5))
    vec.store(out, 5 * SLOT, vec.lshr(x, 5))
    vec.store(out, 6 * SLOT, vec.ashr(x, 5))
    vec.store(out, 7 * SLOT, vec.to_floats(x))
    vec.store(out, 8 * SLOT, vec.to_bytes(x))
    vec.store(out, 9 * SLOT, vec.as_floats(x))
    vec.store(out, 10 * SLOT, vec.join(vec.load_i32x8(a, 0), vec.load_i32x8(b, 4)))
    store_i32(out, 11 * SLOT, vec.sum_lanes(x))


@njit(error_model="numpy")
def through_memory(a, number, out):
    vec.store(out, 0 * SLOT, vec.load_i32x4(a, 4))
    vec.store(out, 1 * SLOT, vec.load_i8x16(a, 5))
    vec.store(out, 2 * SLOT, vec.broadcast_i32x4(a, 8))
    vec.store(out, 3 * SLOT, vec.broadcast_i32x8(a, 8))
    vec.store(out, 4 * SLOT, vec.broadcast_i32x16(a, 8))
    vec.store(out, 5 * SLOT, vec.broadcast_f32x16(a, 8))
    vec.store(out, 6 * SLOT, vec.splat_i32x16(number))
    vec.store(out, 7 * SLOT, vec.splat_f32x16(number))
    vec.store(out, 8 * SLOT, vec.zero_i32x4())
    vec.store(out, 9 * SLOT, vec.zero_i32x8())
    vec.store(out, 10 * SLOT, vec.zero_i32x16())
    vec.store(out, 11 * SLOT, vec.zero_f32x16())
    store_f32(out, 12 * SLOT, load_f32(a, 8))
    store_i32(out, 13 * SLOT, load_i8(a, 9))
    store_i8(out, 14 * SLOT, number)


def odd(values: np.ndarray) -> tuple[np.ndarray, int]:
    """A copy of an array's bytes at an odd address: the memory that holds it, and the address."""
    memory = np.zeros(values.nbytes + 2, np.uint8)
    start = 1 - memory.ctypes.data % 2
    memory[start : start + values.nbytes] = values.view(np.uint8)
    return memory, memory.ctypes.data + start


def check(names: tuple[str, ...], results: np.ndarray, arguments: dict[str, list]) -> None:
    """The slots of `results` against PLAIN, bit for bit (any NaN is as good as another)."""
    for name, slot in zip(names, results.reshape(-1, SLOT), strict=False):
        with np.errstate(all="ignore"):
            expected = np.atleast_1d(vec.PLAIN[name](*arguments[name]))
        got = slot.view(expected.dtype)[: len(expected)]
        np.testing.assert_array_equal(got, expected, err_msg=name)
        assert (slot[expected.nbytes :] == 0xEE).all(), f"{name} wrote more than its lanes"


def numbers(rng: np.random.Generator) -> np.ndarray:
    """float32 numbers of 20 bits near 1: float64 holds x * y + z exactly, so that `fma` is known."""
    return (rng.integers(-(2**20), 2**20, 16) * 2.0 ** rng.integers(-22, -13, 16)).astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_registers_compute_what_numpy_does(seed):
    rng = np.random.default_rng(seed)
    a, b, c = numbers(rng), numbers(rng), numbers(rng)
    if seed >= 10:  # halves, for rint; equal numbers, for maximum
        a, b[::2] = np.rint(a) + np.float32(0.5), a[::2]
    out = np.full(len(FLOATS) * SLOT, 0xEE, np.uint8)
    (_a, at_a), (_b, at_b), (_c, at_c), (memory, to) = odd(a), odd(b), odd(c), odd(out)
    on_floats(at_a, at_b, at_c, to)
    out = memory[to - memory.ctypes.data :][: out.nbytes]
    given = {name: [a] for name in FLOATS} | {name: [a, b] for name in FLOATS[:6]} | {"fma": [a, b, c]}
    check(FLOATS, out, given)

    i, j = (rng.integers(-(2**31), 2**31, 16).astype(np.int32) for _ in range(2))
    out = np.full(len(INTS) * SLOT, 0xEE, np.uint8)
    (_i, at_i), (_j, at_j), (memory, to) = odd(i), odd(j), odd(out)
    on_ints(at_i, at_j, to)
    out = memory[to - memory.ctypes.data :][: out.nbytes]
    given = {name: [i] for name in INTS} | {name: [i, j] for name in INTS[:3]}
    given |= {"and_": [i, LITERAL]} | {name: [i, np.int32(5)] for name in ("shl", "lshr", "ashr")}
    check(INTS, out, given | {"join": [i[:8], j[1:9]]})


def test_larger_and_smaller_of_nan_are_the_second():
    a, b = np.ones(16, np.float32), np.full(16, 2, np.float32)
    a[3], b[5] = np.nan, np.nan
    out = np.empty((len(FLOATS), SLOT // 4), np.float32)
    on_floats(a.ctypes.data, b.ctypes.data, b.ctypes.data, out.ctypes.data)
    for name in ("maximum", "minimum"):
        np.testing.assert_array_equal(out[FLOATS.index(name)], vec.PLAIN[name](a, b), err_msg=name)
    assert np.isnan(out[4:6, 5]).all() and (out[4:6, 3] == 2).all()


def test_every_operation_has_a_plain_twin_and_is_tested():
    operations = {name for name, value in vars(vec).items() if type(value) is type(vec.add)}
    registers = {name for name in operations if not name.startswith(MEMORY)}
    assert registers == set(vec.PLAIN) == set(FLOATS) | set(INTS)


def test_memory():
    a = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    _a, at = odd(a)
    out = np.full((15, SLOT), 0xEE, np.uint8)
    memory, to = odd(out.reshape(-1))
    through_memory(at, -3, to)
    slots = memory[to - memory.ctypes.data :][: out.nbytes].reshape(out.shape)
    ints, data = a.view(np.int32), a.tobytes()
    expected = [
        ints[1:5], data[5:21], np.repeat(ints[2], 4), np.repeat(ints[2], 8), np.repeat(ints[2], 16),
        np.repeat(a[2], 16), np.full(16, -3, np.int32), np.full(16, -3, np.float32), bytes(16), bytes(32), bytes(64),
        bytes(64), a[2], np.int32(a.view(np.int8)[9]), np.int8(-3),
    ]  # fmt: skip
    for slot, values in zip(slots, expected, strict=True):
        wanted = values if isinstance(values, bytes) else values.tobytes()
        assert slot.tobytes() == wanted + b"\xee" * (SLOT - len(wanted))


@njit(error_model="numpy")
def one_dot4(isa, acc, codes, q, out):
    vec.store(out, 0, dot.dot4(isa, vec.load_i32x16(acc, 0), vec.load_i32x16(codes, 0), vec.load_i32x16(q, 0)))
    vec.store(out, 64, dot.dot4(isa, vec.load_i32x8(acc, 0), vec.load_i32x8(codes, 0), vec.load_i32x8(q, 0)))


@pytest.mark.parametrize("name", isa.available())
def test_dot_products_of_bytes_are_exact(name):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 128 if name == "dotprod" else 256, 64).astype(np.uint8)
    codes[:8] = codes.max()
    q, acc = rng.integers(-128, 128, 64).astype(np.int8), rng.integers(-(2**30), 2**30, 16).astype(np.int32)
    q[:4], q[4:8] = -128, 127
    out = np.zeros(24, np.int32)
    one_dot4(isa.choose(name), acc.ctypes.data, codes.ctypes.data, q.ctypes.data, out.ctypes.data)
    expected = acc + (codes.astype(np.int32) * q).reshape(16, 4).sum(1)
    np.testing.assert_array_equal(out, np.concatenate([expected, expected[:8]]))


X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"


@pytest.mark.parametrize(
    "triple, cpu, features, expected",
    [
        (X86, "x86-64", "", ("portable",)),
        (X86, "sandybridge", "", ("portable",)),
        (X86, "haswell", "", ("avx2", "portable")),
        (X86, "haswell", "-avx2", ("portable",)),
        (X86, "skylake-avx512", "", ("avx2", "portable")),
        (X86, "alderlake", "", ("vnni256", "avx2", "portable")),
        (X86, "icelake-server", "", ("vnni512", "vnni256", "avx2", "portable")),
        (X86, "znver4", "", ("vnni512", "vnni256", "avx2", "portable")),
        (ARM, "cortex-a72", "", ("portable",)),
        (ARM, "neoverse-n1", "", ("dotprod", "portable")),
        (ARM, "apple-m1", "", ("dotprod", "portable")),
        (ARM, "neoverse-v1", "", ("i8mm", "dotprod", "portable")),
    ],
)
def test_what_cpus_have(triple, cpu, features, expected, monkeypatch):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this LLVM does not compile for {triple}")
    target = SimpleNamespace(codegen=lambda: SimpleNamespace(magic_tuple=lambda: (triple, cpu, features)))
    monkeypatch.setattr(isa, "cpu_target", SimpleNamespace(target_context=target))
    monkeypatch.setattr(llvm, "get_process_triple", lambda: triple)
    assert isa.available.__wrapped__() == expected


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(BackendError, match=r"instruction set 'vnni1024' is not one of this machine's: .*portable"):
        isa.choose("vnni1024")
    assert isa.choose() == isa.choose(isa.available()[0])


OLD_CPU = """
import numpy as np
from bitnet_numba.kernels.cpu import isa
from tests.kernels.cpu.test_gemm import product
assert isa.available() == ("portable",), isa.available()
rng = np.random.default_rng(0)
w, q = rng.integers(-1, 2, (40, 96), dtype=np.int8), rng.integers(-128, 128, (3, 96), dtype=np.int8)
assert (product("portable", w, q, 0, 3)[:, :40] == q.astype(np.int32) @ w.T.astype(np.int32)).all()
"""


def test_an_old_cpu_computes_the_same():
    x86 = llvm.get_process_triple().startswith(("x86_64", "amd64"))
    target = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse2" if x86 else "+neon"}
    done = subprocess.run(
        [sys.executable, "-c", OLD_CPU], cwd=ROOT, env=os.environ | target, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("by_instruction", [True, False])
def test_float16_numbers_are_read_exactly(by_instruction, monkeypatch):
    """All that are finite, at odd addresses, with the machine's instruction (if it has one) and without."""
    if by_instruction and not isa.converts_halves():
        pytest.skip("this machine has no instruction for it")
    monkeypatch.setattr(vec, "converts_halves", lambda: by_instruction)

    @njit(error_model="numpy")
    def halves(a, out):
        vec.store(out, 0, vec.load_f16x16(a, 2))

    bits = np.arange(0x7C00, dtype=np.uint16)
    bits = np.concatenate([bits, bits | 0x8000])
    out = np.zeros(16, np.float32)
    for start in range(0, len(bits), 16):
        memory, at = odd(np.concatenate([[0x3C00], bits[start : start + 16]]).astype(np.uint16))
        halves(at, out.ctypes.data)
        assert len(memory)
        np.testing.assert_array_equal(out, bits[start : start + 16].view(np.float16).astype(np.float32))
