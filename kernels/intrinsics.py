"""Machine instructions that Numba does not offer, each with a plain-Python stand-in for the simulator.

Conventions of every kernel in this folder:
- Kernels are plain Python functions of flat pointers and int32 / float32 scalars. `compilation` and `device` compile
  and launch them; under the simulator (NUMBA_ENABLE_CUDASIM=1) they run on flat NumPy arrays.
- An operand `p, i` is element i of a kernel's pointer or of a shared array. Shared arrays that 16-byte accesses touch
  are made with `cuda.shared.array(size, dtype, SHARED_ALIGN)`.
- What an architecture lacks is chosen when a kernel is built (`stream_load(arch)`, `grid_wait(arch)`, ...), never at
  run time; `arch` is 10 * major + minor of the compute capability, e.g. 90.
- Lanes exchange values with their whole warp: every thread of a warp must reach an exchange; blocks are whole warps.
- Numba widens int32 arithmetic to int64: wrap each result in `int32(...)`, and the compiler narrows it again.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.core import config
from numba.cuda import types

SIMULATED = bool(config.ENABLE_CUDASIM)
SHARED_ALIGN = None if SIMULATED else 16  # bytes; the simulator's arrays refuse to be told
WARP = 32

# Under the simulator types are called as plain conversions, which wrap round as registers do.
if SIMULATED:

    class _Register:
        """A whole-number type: calling it keeps the low bits; `dtype` makes it one that arrays can be made of."""

        def __init__(self, dtype: Any):
            self.dtype = np.dtype(dtype)
            self._least = int(np.iinfo(dtype).min)
            self._mask = (1 << 8 * self.dtype.itemsize) - 1

        def __call__(self, x: Any) -> Any:
            return self.dtype.type(((int(x) - self._least) & self._mask) + self._least)

    int32, uint32, int64 = _Register(np.int32), _Register(np.uint32), _Register(np.int64)
    float32, float64 = np.float32, np.float64
else:
    int32, uint32, int64 = types.int32, types.uint32, types.int64
    float32, float64 = types.float32, types.float64


def device_function(function: Callable) -> Any:
    """Makes a function callable from kernels, always inlined."""
    return cuda.jit(device=True)(function) if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


_ASM_TYPES = {"r": (32, "int32"), "u": (32, "uint32"), "L": (64, "int64"), "f": (32, "float32")}


def _instruction(ptx: str, result: str, operands: str, effects: bool = False) -> Callable[[Callable], Callable]:
    """Makes a kernel instruction of inline PTX; under the simulator the decorated stand-in itself.

    `result` is "", one register letter, or several for a tuple; `operands` one letter each: r int32, u uint32,
    L int64, f float32, p an element's address (which takes two arguments, pointer and index). In `ptx`, $0.. are
    results, then operands. `effects`: touches memory or order, so it is never moved, merged or dropped.
    """

    def decorate(stand_in: Callable) -> Callable:
        if SIMULATED:
            return stand_in
        return _asm_intrinsic(stand_in, ptx, result, operands, effects)

    return decorate


def _asm_intrinsic(stand_in: Callable, ptx: str, result: str, operands: str, effects: bool) -> Callable:
    import inspect

    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    llvm = {"r": ir.IntType(32), "u": ir.IntType(32), "L": ir.IntType(64), "f": ir.FloatType()}
    numba_types = {letter: getattr(types, name) for letter, (_, name) in _ASM_TYPES.items()}
    register = {"r": "r", "u": "r", "L": "l", "f": "f", "p": "l"}

    def definition(typing_context: Any, *arguments: Any) -> Any:
        wanted, position = [], 0
        for letter in operands:
            if letter == "p":
                wanted += [arguments[position], types.int64]
                position += 2
            else:
                wanted.append(numba_types[letter])
                position += 1
        returned = types.void if not result else numba_types[result[0]]
        if len(result) > 1:
            returned = types.UniTuple(returned, len(result))

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            asm_values, position = [], 0
            for letter in operands:
                if letter == "p":
                    asm_values.append(_address(context, builder, signature.args[position], *values[position:][:2]))
                    position += 2
                else:
                    asm_values.append(values[position])
                    position += 1
            outputs = [llvm[letter] for letter in result]
            asm_result = ir.VoidType() if not outputs else outputs[0]
            if len(outputs) > 1:
                asm_result = ir.LiteralStructType(outputs)
            constraints = ["=" + register[letter] for letter in result] + [register[letter] for letter in operands]
            if effects:
                constraints.append("~{memory}")
            function = ir.FunctionType(asm_result, [value.type for value in asm_values])
            call = builder.call(ir.InlineAsm(function, ptx, ",".join(constraints), side_effect=effects), asm_values)
            if len(outputs) > 1:
                parts = [builder.extract_value(call, k) for k in range(len(outputs))]
                return context.make_tuple(builder, signature.return_type, parts)
            return call if outputs else context.get_dummy_value()

        return returned(*wanted), codegen

    names = [inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    names += list(inspect.signature(stand_in).parameters.values())
    definition.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    definition.__name__ = definition.__qualname__ = stand_in.__name__
    definition.__doc__ = stand_in.__doc__
    return intrinsic(definition)


def _address(context: Any, builder: Any, kind: Any, base: Any, index: Any) -> Any:
    """LLVM pointer to element `index` of a pointer or of a flat array."""
    if isinstance(kind, types.Array):
        base = context.make_array(kind)(context, builder, value=base).data
    return builder.gep(base, [index])


# ---- Products -------------------------------------------------------------------------------------------------------


def _bytes(word: Any, signed: bool) -> list[int]:
    return [int(b) for b in np.array([int(word) & 0xFFFFFFFF], "<u4").view(np.int8 if signed else np.uint8)]


@_instruction("dp4a.s32.s32 $0, $1, $2, $3;", "r", "rrr")
def dp4a(a: Any, b: Any, c: Any) -> Any:
    """c + the dot product of four int8 pairs, int32. sm_61."""
    return int32(int(c) + sum(x * y for x, y in zip(_bytes(a, True), _bytes(b, True), strict=True)))


@_instruction("dp4a.u32.s32 $0, $1, $2, $3;", "r", "rrr")
def dp4a_us(a: Any, b: Any, c: Any) -> Any:
    """c + the dot product of four uint8 (a) and int8 (b) pairs, int32. sm_61."""
    return int32(int(c) + sum(x * y for x, y in zip(_bytes(a, False), _bytes(b, True), strict=True)))


# ---- Conversions ----------------------------------------------------------------------------------------------------


@_instruction("cvt.rni.s32.f32 $0, $1;", "r", "f")
def round_to_int(x: Any) -> Any:
    """The nearest int32, half to even; saturates, NaN becomes 0. Any architecture."""
    return np.int32(0) if x != x else np.int32(min(max(np.rint(np.float64(x)), -(2**31)), 2**31 - 1))


@_instruction("cvt.rn.f32.s32 $0, $1;", "f", "r")
def int_to_float(x: Any) -> Any:
    """An int32 as the nearest float32. Any architecture."""
    return np.float32(np.int32(x))


@_instruction("mov.b32 $0, $1;", "f", "u")
def bits_to_float(word: Any) -> Any:
    """The float32 that a 32-bit pattern stands for. Any architecture."""
    return np.array([int(word) & 0xFFFFFFFF], np.uint32).view(np.float32)[0]


@_instruction("mov.b32 $0, $1;", "u", "f")
def float_to_bits(x: Any) -> Any:
    """A float32's bit pattern, uint32. Any architecture."""
    return np.array([x], np.float32).view(np.uint32)[0]


@_instruction("prmt.b32 $0, $1, $2, $3;", "u", "uuu")
def byte_permute(a: Any, b: Any, selector: Any) -> Any:
    """The word whose byte k is byte (selector >> 4k) & 7 of the eight in a (0-3) and b (4-7). Any architecture."""
    source = _bytes(a, False) + _bytes(b, False)
    return np.uint32(sum(source[int(selector) >> 4 * k & 7] << 8 * k for k in range(4)))


@_instruction("shl.b32 $0, $1, 16;", "f", "r")
def bf16_low(word: Any) -> Any:
    """float32 of the bfloat16 in a word's lower half (the first of two in memory). Any architecture."""
    return bits_to_float(int(word) << 16)


@_instruction("and.b32 $0, $1, 0xffff0000;", "f", "r")
def bf16_high(word: Any) -> Any:
    """float32 of the bfloat16 in a word's upper half (the second of two in memory). Any architecture."""
    return bits_to_float(int(word) & 0xFFFF0000)


# ---- Approximations; each bound is from the PTX manual --------------------------------------------------------------


@_instruction("ex2.approx.ftz.f32 $0, $1;", "f", "f")
def exp2_approx(x: Any) -> Any:
    """2^x within 2 ulp (relative error 2^-22), results under 2^-126 flushed to 0. Any architecture."""
    return np.exp2(np.float32(x))


@_instruction("rsqrt.approx.f32 $0, $1;", "f", "f")
def rsqrt_approx(x: Any) -> Any:
    """1 / sqrt(x), relative error at most 2^-22.9. Any architecture."""
    return np.float32(1) / np.sqrt(np.float32(x))


# ---- Memory ---------------------------------------------------------------------------------------------------------


def _four(p: Any, i: Any) -> tuple:
    values = np.asarray([p[int(i) + k] for k in range(4)])
    if values.dtype.itemsize == 4 and values.dtype.kind in "iu":
        values = values.astype(np.uint32).view(np.int32)
    return tuple(values)


def _vector_pointer(context: Any, builder: Any, kind: Any, base: Any, index: Any) -> Any:
    from llvmlite import ir

    address = _address(context, builder, kind, base, index)
    return builder.bitcast(address, ir.VectorType(address.type.pointee, 4).as_pointer())


def _pointer_intrinsic() -> Callable:
    from numba.cuda.extending import intrinsic

    @intrinsic
    def pointer(typing_context: Any, array: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return context.make_array(signature.args[0])(context, builder, value=values[0]).data

        return types.CPointer(array.dtype)(array), codegen

    return pointer


def _pointer(array: Any) -> Any:
    """A shared array as a pointer: Numba wraps an array's negative indices round, five instructions an access."""
    return array


def _load4_intrinsic() -> Callable:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    @intrinsic
    def load4(typing_context: Any, p: Any, i: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            vector = builder.load(_vector_pointer(context, builder, signature.args[0], *values), align=16)
            parts = [builder.extract_element(vector, ir.IntType(32)(k)) for k in range(4)]
            return context.make_tuple(builder, signature.return_type, parts)

        return types.UniTuple(p.dtype, 4)(p, types.int64), codegen

    return load4


def _store4_intrinsic() -> Callable:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    @intrinsic
    def store4(typing_context: Any, p: Any, i: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pointer = _vector_pointer(context, builder, signature.args[0], *values[:2])
            vector = ir.Constant(pointer.type.pointee, ir.Undefined)
            for k in range(4):
                vector = builder.insert_element(vector, values[2 + k], ir.IntType(32)(k))
            builder.store(vector, pointer, align=16)
            return context.get_dummy_value()

        return types.void(p, types.int64, *(p.dtype,) * 4), codegen

    return store4


def _load4(p: Any, i: Any) -> Any:
    """Elements i .. i+3 (i a multiple of 4) of 32-bit memory, global or shared: one 16-byte load. Any architecture."""
    return _four(p, i)


def _store4(p: Any, i: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """Writes elements i .. i+3 (i a multiple of 4) of 32-bit memory in one 16-byte store. Any architecture."""
    p[int(i)], p[int(i) + 1], p[int(i) + 2], p[int(i) + 3] = a, b, c, d


pointer = _pointer if SIMULATED else _pointer_intrinsic()
load4 = _load4 if SIMULATED else _load4_intrinsic()
store4 = _store4 if SIMULATED else _store4_intrinsic()

_STREAM_PTX = {
    80: "ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];",
    70: "ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];",
    60: "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
}


def _stream_load(ptx: str) -> Callable:
    # No reordering barrier, but "effects" would pin the loads in program order, which is what early loads want.
    @_instruction(ptx, "rrrr", "p", effects=True)
    def stream_load(p: Any, i: Any) -> Any:
        """Words i .. i+3 (i a multiple of 4) of read-only global memory that is used once, past L1: int32 x 4."""
        return _four(p, i)

    return stream_load


_STREAM_LOADS = {arch: _stream_load(ptx) for arch, ptx in _STREAM_PTX.items()}


def stream_load(arch: int) -> Callable:
    """The 16-byte load for weights: `load(p, i) -> (int32,) * 4`. L1::no_allocate needs sm_70, L2::256B sm_80."""
    return _STREAM_LOADS[max(level for level in _STREAM_LOADS if level <= max(arch, 60))]


_STREAM_PAIR_PTX = {
    80: "ld.global.nc.L1::no_allocate.L2::256B.v2.b32 {$0, $1}, [$2];",
    70: "ld.global.nc.L1::no_allocate.v2.b32 {$0, $1}, [$2];",
    60: "ld.global.nc.v2.b32 {$0, $1}, [$2];",
}


def _stream_pair(ptx: str) -> Callable:
    @_instruction(ptx, "rr", "p", effects=True)
    def stream_pair(p: Any, i: Any) -> Any:
        """Words i, i + 1 (i even) of read-only global memory, past L1: int32 x 2."""
        return tuple(int32(p[int(i) + k]) for k in range(2))

    return stream_pair


_STREAM_PAIRS = {arch: _stream_pair(ptx) for arch, ptx in _STREAM_PAIR_PTX.items()}


def stream_pair(arch: int) -> Callable:
    """The 8-byte load for weights: `load(p, i) -> (int32, int32)`; see `stream_load`."""
    return _STREAM_PAIRS[max(level for level in _STREAM_PAIRS if level <= max(arch, 60))]


@_instruction("griddepcontrol.wait;", "", "", effects=True)
def _grid_wait() -> None:
    return None


@_instruction("griddepcontrol.launch_dependents;", "", "", effects=True)
def _grid_release() -> None:
    return None


@device_function
def _nothing() -> None:
    return None


def grid_wait(arch: int) -> Callable:
    """`wait()`: blocks until the launches before this one have finished and their writes are visible. sm_90; else
    nothing, since there the launch itself waits."""
    return _grid_wait if arch >= 90 else _nothing


def grid_release(arch: int) -> Callable:
    """`release()`: lets the next launch start before this one ends (it still waits for data). sm_90; else nothing."""
    return _grid_release if arch >= 90 else _nothing


@_instruction("prefetch.global.L2 [$0];", "", "p", effects=True)
def prefetch_l2(p: Any, i: Any) -> None:
    """Asks for the line of element i to be brought into L2. Any architecture."""


_atomic_lock = threading.Lock()


@_instruction("atom.global.add.u32 $0, [$1], $2;", "u", "pu", effects=True)
def atomic_fetch_add(p: Any, i: Any, value: Any) -> Any:
    """p[i] += value, 32 bits in global memory; returns what was there. Any architecture."""
    with _atomic_lock:
        old = uint32(p[int(i)])
        p[int(i)] = p.dtype.type(np.uint32((int(old) + int(value)) & 0xFFFFFFFF).view(p.dtype.type))
        return old


@_instruction("red.global.or.b32 [$0], $1;", "", "pr", effects=True)
def atomic_or(p: Any, i: Any, value: Any) -> None:
    """p[i] |= value, 32 bits in global memory. Any architecture."""
    with _atomic_lock:
        p[int(i)] = int(p[int(i)]) | int(value)


@device_function
def fence() -> None:
    """Orders this thread's global writes before its later ones, for the whole device. Any architecture."""
    cuda.threadfence()


# Asynchronous copies, global to shared memory: a thread's copies since its last commit are a group, and it waits for
# groups. Under the simulator a copy arrives when it is waited for, and no earlier.


@_instruction(
    "{ .reg .u64 to; cvta.to.shared.u64 to, $0; cp.async.cg.shared.global [to], [$1], 16, $2; }",
    "",
    "ppr",
    effects=True,
)
def async_copy4(to: Any, i: Any, source: Any, j: Any, size: Any) -> None:
    """Starts copying 32-bit elements j .. j+3 of global memory to i .. i+3 of a shared array (multiples of 4); `size`
    is 16, or 0 for zeros without reading; the address must lie in the source all the same, see `async_fill4`. sm_80."""
    if not 0 <= int(j) <= len(source) - 4:
        raise IndexError(f"a copy from elements {int(j)} .. {int(j) + 3} of {len(source)}")
    thread: Any = threading.current_thread()
    thread.__dict__.setdefault("async_copies", [[]])[-1].append((to, int(i), source, int(j), int(size)))


@_instruction("cp.async.commit_group;", "", "", effects=True)
def async_commit() -> None:
    """Ends a group of this thread's copies. sm_80."""
    threading.current_thread().__dict__.setdefault("async_copies", [[]]).append([])


def _async_wait(pending: int) -> Callable:
    @_instruction(f"cp.async.wait_group {pending};", "", "", effects=True)
    def wait() -> None:
        groups = threading.current_thread().__dict__.setdefault("async_copies", [[]])
        while len(groups) - 1 > pending:
            for to, i, source, j, size in groups.pop(0):
                to[i : i + 4] = source[j : j + 4] if size else 0

    return wait


_ASYNC_WAITS = [_async_wait(pending) for pending in range(6)]


def async_wait(pending: int) -> Callable:
    """`wait()`: until at most `pending` (0 to 5) of this thread's latest groups have not arrived. sm_80."""
    return _ASYNC_WAITS[pending]


@_instruction(r".pragma \22nounroll\22;", "", "", effects=True)  # \22: LLVM's way to write a quotation mark
def keep_loop() -> None:
    """At the start of a loop's body: the assembler does not unroll it, which would take registers. Any architecture."""


# ---- Exchange inside a warp -----------------------------------------------------------------------------------------


class _SimulatedWarp:
    """The meeting point of a simulated warp's 32 threads, kept on the block that they run in."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(WARP, timeout=60)
        self.values: list[Any] = [None] * WARP


def _exchange(value: Any, source: Callable[[int], int]) -> Any:
    thread: Any = threading.current_thread()
    if hasattr(thread, "exchange_in_warp"):  # the tests' own scheduler (tests/simulator.py)
        return thread.exchange_in_warp(value, source)
    warp, lane = divmod(thread.thread_id, WARP)
    with _atomic_lock:
        warps = thread._manager.__dict__.setdefault("warps", {})
        meeting = warps.setdefault(warp, _SimulatedWarp())
    meeting.values[lane] = value
    meeting.barrier.wait()
    result = meeting.values[source(lane)]
    meeting.barrier.wait()  # nobody writes the next value before all have read this one
    return result


if SIMULATED:

    def shuffle_xor(value: Any, mask: Any) -> Any:
        """The value of lane `lane ^ mask`. Any architecture."""
        return _exchange(value, lambda lane: lane ^ int(mask))

    def shuffle(value: Any, source: Any) -> Any:
        """The value of lane `source`. Any architecture."""
        return _exchange(value, lambda lane: int(source))

else:
    _ALL_LANES = 0xFFFFFFFF

    @device_function
    def shuffle_xor(value: Any, mask: Any) -> Any:
        return cuda.shfl_xor_sync(_ALL_LANES, value, mask)

    @device_function
    def shuffle(value: Any, source: Any) -> Any:
        return cuda.shfl_sync(_ALL_LANES, value, source)

# The butterfly leaves the same value, to the bit, in every lane: each step adds the same pair in both orders.


@device_function
def warp_sum(x: Any) -> Any:
    """The sum of float32 x over the warp, in every lane."""
    for step in range(5):
        x = float32(x + shuffle_xor(x, 1 << step))
    return x


@device_function
def warp_max(x: Any) -> Any:
    """The largest x, float32 or int32, of the warp, in every lane."""
    for step in range(5):
        x = max(x, shuffle_xor(x, 1 << step))
    return x


@device_function
def warp_sum_int(x: Any) -> Any:
    """The sum of int32 x over the warp, in every lane."""
    for step in range(5):
        x = int32(x + shuffle_xor(x, 1 << step))
    return x


# ---- Arithmetic that must round exactly as NumPy does: the compiler may not fuse it ---------------------------------


@_instruction("mul.rn.f32 $0, $1, $2;", "f", "ff")
def mul_rn(a: Any, b: Any) -> Any:
    """a * b rounded to float32, never fused into a multiply-add. Any architecture."""
    return np.float32(a) * np.float32(b)


@_instruction("add.rn.f32 $0, $1, $2;", "f", "ff")
def add_rn(a: Any, b: Any) -> Any:
    """a + b rounded to float32, never fused into a multiply-add. Any architecture."""
    return np.float32(a) + np.float32(b)


@_instruction("div.rn.f32 $0, $1, $2;", "f", "ff")
def div_rn(a: Any, b: Any) -> Any:
    """a / b, correctly rounded. Any architecture."""
    return np.float32(a) / np.float32(b)


@_instruction("rcp.rn.f32 $0, $1;", "f", "f")
def rcp_rn(x: Any) -> Any:
    """1 / x, correctly rounded. Any architecture."""
    return np.float32(1) / np.float32(x)


@_instruction("sqrt.rn.f32 $0, $1;", "f", "f")
def sqrt_rn(x: Any) -> Any:
    """The square root, correctly rounded. Any architecture."""
    return np.sqrt(np.float32(x))


@_instruction("mul.hi.u32 $0, $1, $2;", "u", "uu")
def mul_high(a: Any, b: Any) -> Any:
    """The upper half of a 32 x 32 bit product, uint32. Any architecture."""
    return uint32(int(a) * int(b) >> 32)


@_instruction("mul.lo.u32 $0, $1, $2;", "u", "uu")
def mul_low(a: Any, b: Any) -> Any:
    """The lower half of a 32 x 32 bit product, uint32. Any architecture."""
    return uint32(int(a) * int(b))


# ---- Between blocks -------------------------------------------------------------------------------------------------


@_instruction("ld.acquire.gpu.global.u32 $0, [$1];", "u", "p", effects=True)
def load_acquire(p: Any, i: Any) -> Any:
    """p[i], uint32, ordered before every later access of this thread. sm_70."""
    return uint32(p[int(i)])


@_instruction("red.release.gpu.global.add.u32 [$0], $1;", "", "pu", effects=True)
def atomic_add_release(p: Any, i: Any, value: Any) -> None:
    """p[i] += value, 32 bits, ordered after every earlier access of this thread. sm_70."""
    atomic_fetch_add(p, i, value)


@_instruction("red.global.max.s64 [$0], $1;", "", "pL", effects=True)
def atomic_max_wide(p: Any, i: Any, value: Any) -> None:
    """p[i] = max(p[i], value), int64 in global memory. Any architecture."""
    with _atomic_lock:
        p[int(i)] = max(int(p[int(i)]), int(value))


@_instruction("red.global.add.u64 [$0], $1;", "", "pL", effects=True)
def atomic_add_wide(p: Any, i: Any, value: Any) -> None:
    """p[i] += value, int64 in global memory; exact, so the same in any order. Any architecture."""
    with _atomic_lock:
        p[int(i)] = int(p[int(i)]) + int(value)


@_instruction("ld.global.cg.v2.b32 {$0, $1}, [$2];", "rr", "p", effects=True)
def load2_l2(p: Any, i: Any) -> Any:
    """Words i, i + 1 (i even) of global memory as L2 has them, never from L1: int32 x 2. Any architecture."""
    return int32(p[int(i)]), int32(p[int(i) + 1])


@_instruction("ld.global.cg.v4.b32 {$0, $1, $2, $3}, [$4];", "rrrr", "p", effects=True)
def load4_l2(p: Any, i: Any) -> Any:
    """Words i .. i + 3 (i a multiple of 4) of global memory as L2 has them: int32 x 4. Any architecture."""
    return _four(p, i)


# ---- Tensor cores ---------------------------------------------------------------------------------------------------


@_instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "r", "ff")
def pack_bf16(low: Any, high: Any) -> Any:
    """Two float32 rounded to bfloat16, ties to even, as a word. sm_80."""

    def rounded(x: Any) -> int:
        bits = int(float_to_bits(x))
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if x == x else 0x7FFF

    return int32(rounded(high) << 16 | rounded(low))


@_instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    "ffff",
    "rrrrrrffff",
)
def mma_bf16(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple:
    """The warp's C [16, 8] += A [16, 16] . B [16, 8], bfloat16 in, float32 sums; returns c0 .. c3. sm_80.

    With g = lane // 4, c = lane % 4, a lane holds of A rows g (a0, a2) and g + 8 (a1, a3), columns 2c, 2c + 1 (a0, a1)
    and 2c + 8, 2c + 9 (a2, a3); of B column g, rows 2c, 2c + 1 (b0) and 2c + 8, 2c + 9 (b1); of C rows g (c0, c1) and
    g + 8 (c2, c3), columns 2c and 2c + 1.
    """
    thread: Any = threading.current_thread()
    lanes = thread.gather_in_warp((a0, a1, a2, a3, b0, b1))
    words = np.array(lanes, np.int64).astype(np.uint32)  # [32, 6]
    halves = np.stack([words << np.uint32(16), words & np.uint32(0xFFFF0000)], -1).view(np.float32)  # [32, 6, 2]
    quads = halves.reshape(8, 4, 6, 2)
    a = np.empty((16, 16), np.float64)  # [row, k]
    b = np.empty((16, 8), np.float64)  # [k, column]
    for c in range(4):
        for half in range(2):
            a[:8, 2 * c + half], a[8:, 2 * c + half] = quads[:, c, 0, half], quads[:, c, 1, half]
            a[:8, 2 * c + 8 + half], a[8:, 2 * c + 8 + half] = quads[:, c, 2, half], quads[:, c, 3, half]
            b[2 * c + half], b[2 * c + 8 + half] = quads[:, c, 4, half], quads[:, c, 5, half]
    g, c = divmod(thread.thread_id % WARP, 4)
    rows = a[[g, g, g + 8, g + 8]] * b[:, [2 * c, 2 * c + 1] * 2].T
    return tuple(np.float32(np.float64(start) + row.sum()) for start, row in zip((c0, c1, c2, c3), rows, strict=True))


_MMA_SMALL = "mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32"
_MMA_CODES = {
    80: "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    # Four of eight rows and sixteen columns each: their operands' registers are the larger one's, one by one.
    75: "{ .reg .s32 s<4>; "
    f"{_MMA_SMALL} {{s0, s1}}, {{$4}}, {{$8}}, {{$10, $11}}; {_MMA_SMALL} {{s2, s3}}, {{$5}}, {{$8}}, {{$12, $13}}; "
    f"{_MMA_SMALL} {{s0, s1}}, {{$6}}, {{$9}}, {{s0, s1}}; {_MMA_SMALL} {{s2, s3}}, {{$7}}, {{$9}}, {{s2, s3}}; "
    "mov.b32 $0, s0; mov.b32 $1, s1; mov.b32 $2, s2; mov.b32 $3, s3; }",
}


def _mma_codes(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple:
    thread: Any = threading.current_thread()
    lanes = np.array([[int(x) & 0xFFFFFFFF for x in lane] for lane in thread.gather_in_warp((a0, a1, a2, a3, b0, b1))])
    quads = lanes.astype("<u4").view(np.uint8).reshape(8, 4, 6, 4)  # [g, c, register, byte]
    a = np.empty((16, 32), np.int64)  # [row, k]
    b = np.empty((32, 8), np.int64)  # [k, column]
    for half in range(2):
        a[:8, 16 * half :][:, :16] = quads[:, :, 2 * half].reshape(8, 16)
        a[8:, 16 * half :][:, :16] = quads[:, :, 2 * half + 1].reshape(8, 16)
        b[16 * half :][:16] = quads[:, :, 4 + half].view(np.int8).reshape(8, 16).T
    g, c = divmod(thread.thread_id % WARP, 4)
    sums = (a[[g, g, g + 8, g + 8]] * b[:, [2 * c, 2 * c + 1] * 2].T).sum(axis=1)
    return tuple(int32(int(start) + int(more)) for start, more in zip((c0, c1, c2, c3), sums, strict=True))


_MMA_OF = {least: _instruction(ptx, "rrrr", "rrrrrrrrrr")(_mma_codes) for least, ptx in _MMA_CODES.items()}


def mma_codes(arch: int) -> Callable:
    """`mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)`: the warp's C [16, 8] += A [16, 32] . B [32, 8], uint8 . int8,
    int32 sums; returns c0 .. c3. sm_75 (there in four parts).

    With g = lane // 4, c = lane % 4, a lane holds of A rows g (a0, a2) and g + 8 (a1, a3), columns 4c .. 4c + 3 (a0,
    a1) and 4c + 16 .. 4c + 19 (a2, a3); of B column g, rows 4c .. 4c + 3 (b0) and 4c + 16 .. 4c + 19 (b1); of C rows
    g (c0, c1) and g + 8 (c2, c3), columns 2c and 2c + 1.
    """
    return _MMA_OF[max(least for least in _MMA_OF if least <= max(arch, 75))]


_MMA_BF16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


@_instruction(
    "{ .reg .f32 s<4>; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$4, $5, $6, $7}}, {{$20, $21}}, {{$24, $25, $26, $27}}; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$8, $9, $10, $11}}, {{$20, $21}}, {{s0, s1, s2, s3}}; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$12, $13, $14, $15}}, {{$22, $23}}, {{s0, s1, s2, s3}}; "
    f"{_MMA_BF16} {{$0, $1, $2, $3}}, {{$16, $17, $18, $19}}, {{$22, $23}}, {{s0, s1, s2, s3}}; }}",
    "ffff",
    "r" * 20 + "ffff",
)
def mma_bf16_terms(
    h0: Any, h1: Any, h2: Any, h3: Any, l0: Any, l1: Any, l2: Any, l3: Any,
    h4: Any, h5: Any, h6: Any, h7: Any, l4: Any, l5: Any, l6: Any, l7: Any,
    b0: Any, b1: Any, b2: Any, b3: Any, c0: Any, c1: Any, c2: Any, c3: Any,
) -> tuple:  # fmt: skip
    """`mma_bf16` over 32 columns with A a sum of two terms: h and l 0 .. 3 with b0, b1, then 4 .. 7 with b2, b3. sm_80.

    One for the compiler, which weighs how much a loop holds before it unrolls it.
    """
    c0, c1, c2, c3 = mma_bf16(h0, h1, h2, h3, b0, b1, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_bf16(l0, l1, l2, l3, b0, b1, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_bf16(h4, h5, h6, h7, b2, b3, c0, c1, c2, c3)
    return mma_bf16(l4, l5, l6, l7, b2, b3, c0, c1, c2, c3)


@_instruction("fma.rn.bf16x2 $0, $1, $2, $3;", "r", "rrr")
def fma_bf16(a: Any, b: Any, c: Any) -> Any:
    """a * b + c for two bfloat16 in each word, one rounding. sm_80."""
    low = bf16_low(a) * np.float64(bf16_low(b)) + bf16_low(c)
    high = bf16_high(a) * np.float64(bf16_high(b)) + bf16_high(c)
    return pack_bf16(np.float32(low), np.float32(high))


# Warpgroups (sm_90a alone): four neighbouring warps multiply what the copy engine has brought to shared memory. A panel
# there is int8 [tokens, 64 columns], 64 bytes a token; of token t the 16-byte piece c lies at c ^ (t / 2 % 4) ("64-byte
# swizzle"): eight tokens' pieces touch every bank once.
PANEL_COLUMNS = 64
PANEL_ALIGN = None if SIMULATED else 512  # bytes


@dataclass
class SimulatedPanels:
    """What stands for a tensor map under the simulator."""

    q: np.ndarray  # int8 [M, KP]
    tokens: int


@_instruction(
    "{ .reg .u64 t; .reg .u32 b; cvta.to.shared.u64 t, $0; cvt.u32.u64 b, t; mbarrier.init.shared::cta.b64 [b], 1; "
    "fence.mbarrier_init.release.cluster; }",
    "",
    "p",
    effects=True,
)
def arrival_init(p: Any, i: Any) -> None:
    """Makes p[i], int64 in shared memory, count the bytes that copies bring. One thread, then a barrier. sm_90."""


@_instruction(
    "{ .reg .u64 t; .reg .u32 b; cvta.to.shared.u64 t, $0; cvt.u32.u64 b, t; "
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], $1; }",
    "",
    "pr",
    effects=True,
)
def arrival_expect(p: Any, i: Any, count: Any) -> None:
    """Says how many bytes the copies that report to p[i] will bring: then its phase is over. One thread. sm_90."""


@_instruction(
    "{ .reg .u64 t; .reg .u32 b; .reg .pred done; cvta.to.shared.u64 t, $0; cvt.u32.u64 b, t; "
    "again: mbarrier.try_wait.parity.shared::cta.b64 done, [b], $1; @!done bra again; }",
    "",
    "pr",
    effects=True,
)
def arrival_wait(p: Any, i: Any, parity: Any) -> None:
    """Until the phase of p[i] with this parity (0, 1, 0, ...) is over. All threads of a block together. sm_90."""
    thread: Any = threading.current_thread()
    thread.syncthreads()  # simulated copies arrive at once; but the thread that starts them must have come by


@_instruction(
    "{ .reg .u64 t; .reg .u32 b, d; cvta.to.shared.u64 t, $1; cvt.u32.u64 d, t; cvta.to.shared.u64 t, $2; "
    "cvt.u32.u64 b, t; cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
    "[d], [$0, {$3, $4}], [b]; }",
    "",
    "ppprr",
    effects=True,
)
def copy_panel(panels: Any, z: Any, to: Any, i: Any, p: Any, j: Any, column: Any, token: Any) -> None:
    """Starts copying the panel of q at (token, column) to shared memory from element i of int32 `to` on, zeros beyond
    q's end; p[j] counts the bytes. panels: a `tensor_map`, z: 0. One thread. sm_90."""
    q, tokens = panels.q, panels.tokens
    panel = np.zeros((tokens, PANEL_COLUMNS), np.int8)
    part = q[int(token) : int(token) + tokens, int(column) : int(column) + PANEL_COLUMNS]
    panel[: part.shape[0], : part.shape[1]] = part
    pieces = panel.view(np.int32).reshape(tokens, 4, 4)
    for t in range(tokens):
        for c in range(4):
            at = int(i) + 16 * t + 4 * (c ^ t >> 1 & 3)
            to[at : at + 4] = pieces[t, c]


def _warpgroup_mma_stand_in(tokens: int, blocks: int) -> Callable:
    def warpgroup_mma(sums: Any, codes: Any, shared: Any, i: Any) -> None:
        thread: Any = threading.current_thread()
        g, c = divmod(thread.thread_id % WARP, 4)
        words = np.asarray(shared[int(i) : int(i) + 32 * tokens]).astype(np.int32).reshape(2, tokens, 4, 4)
        order = np.arange(4) ^ np.arange(tokens)[:, None] >> 1 & 3
        words = np.take_along_axis(words, order[None, :, :, None], axis=2)
        b = words.reshape(2, tokens, 16).view(np.int8).astype(np.int64)  # [panel, token, column]
        for u in range(blocks):
            own = tuple(codes[16 * u + r] for r in range(16))
            lanes = np.array([[int(x) & 0xFFFFFFFF for x in lane] for lane in thread.gather_in_warp(own)])
            quads = lanes.astype("<u4").view(np.uint8).reshape(8, 4, 4, 2, 2, 4)[g].astype(np.int64)
            for r in range(2):  # quads: [c, step, half, row, byte]
                row = quads[:, :, :, r].transpose(1, 2, 0, 3).reshape(2, 64)
                for t in range(tokens // 8):
                    for odd in range(2):
                        at = tokens // 2 * u + 4 * t + 2 * r + odd
                        more = (row * b[:, 8 * t + 2 * c + odd]).sum()
                        sums[at] = int32(int(sums[at]) + int(more))

    return warpgroup_mma


def _warpgroup_mma_intrinsic(tokens: int, blocks: int) -> Callable:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    each = tokens // 2  # sums of a lane and row-block
    sums_count, codes_count = each * blocks, 16 * blocks
    # The operand's descriptor: place / 16; distance of 8 tokens / 16; code of the 64-byte swizzle.
    constant = 1 << 16 | (512 >> 4) << 32 | 2 << 62
    lines = [
        "{ .reg .pred yes; .reg .u64 at, b0, b1, b2, b3;",
        "setp.eq.u32 yes, 0, 0;",
        f"cvta.to.shared.u64 at, ${2 * sums_count + codes_count};",
        "and.b64 at, at, 0x3ffff; shr.u64 at, at, 4;",
        f"or.b64 b0, at, 0x{constant:x}; add.u64 b1, b0, 2;",
        f"add.u64 b2, b0, {64 * tokens >> 4}; add.u64 b3, b2, 2;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(4):
        for u in range(blocks):
            into = ", ".join(f"${each * u + n}" for n in range(each))
            left = ", ".join(f"${sums_count + 16 * u + 4 * step + r}" for r in range(4))
            shape = f"m64n{tokens}k32.s32.u8.s8"
            lines.append(f"wgmma.mma_async.sync.aligned.{shape} {{{into}}}, {{{left}}}, b{step}, yes;")
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0; }"]
    # Operands: results, codes, sums (tied to the results), address.
    ptx = " ".join(lines)

    @intrinsic
    def warpgroup_mma(typing_context: Any, sums: Any, codes: Any, shared: Any, i: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            word = ir.IntType(32)

            def element(kind: Any, base: Any, n: int) -> Any:
                return _address(context, builder, kind, base, ir.IntType(64)(n))

            into = [element(signature.args[0], values[0], n) for n in range(sums_count)]
            left = [builder.load(element(signature.args[1], values[1], n)) for n in range(codes_count)]
            address = _address(context, builder, signature.args[2], values[2], values[3])
            operands = left + [builder.load(a) for a in into] + [address]
            result = ir.LiteralStructType([word] * sums_count)
            constraints = ["=r"] * sums_count + ["r"] * codes_count + [str(n) for n in range(sums_count)] + ["l"]
            function = ir.FunctionType(result, [value.type for value in operands])
            asm = ir.InlineAsm(function, ptx, ",".join([*constraints, "~{memory}"]), side_effect=True)
            sums_after = builder.call(asm, operands)
            for n, a in enumerate(into):
                builder.store(builder.extract_value(sums_after, n), a)
            return context.get_dummy_value()

        return types.void(sums, codes, shared, types.int64), codegen

    return warpgroup_mma


@cache
def warpgroup_mma(tokens: int, blocks: int) -> Callable:
    """`mma(sums, codes, shared, i)`: C [16 rows, tokens] += A [16, 128] . B [128, tokens] for each of `blocks`
    row-blocks of each of the four warps of a warpgroup, uint8 . int8, int32 sums. sm_90a; all four warps together.

    sums, codes: local arrays. As of `mma_codes`, of a row-block u: codes[16 u + 4 s ..] are a0, a1, a2, a3 of columns
    32 s .., sums[tokens / 2 * u + 4 t ..] are c0 .. c3 of tokens 8 t ... B: two panels in shared memory from element i
    on.
    """
    return (_warpgroup_mma_stand_in if SIMULATED else _warpgroup_mma_intrinsic)(tokens, blocks)


@_instruction("div.u32 $0, $1, $2;", "r", "rr")
def divide(a: Any, b: Any) -> Any:
    """a // b for int32 a >= 0, b > 0: Numba's own divides 64 bits, ten times the instructions. Any architecture."""
    return int32(int(a) // int(b))


@_instruction("atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;", "u", "pu", effects=True)
def atomic_fetch_add_ordered(p: Any, i: Any, value: Any) -> Any:
    """`atomic_fetch_add`, ordered after every earlier and before every later access of this thread. sm_70."""
    return atomic_fetch_add(p, i, value)


# Matrices of 8 x 8 bfloat16 from shared memory. The place of a row is a 32-bit address, `shared_address`; under
# the simulator it is an offset in bytes, so the array comes along.

if SIMULATED:

    def shared_address(p: Any, i: Any) -> Any:
        """The place of element i of a shared array of 32-bit elements, int32, for the functions below."""
        return int32(4 * int(i))

    def _matrices(p: Any, at: Any) -> np.ndarray:
        rows = threading.current_thread().gather_in_warp(int(at) // 4)  # type: ignore[attr-defined]
        words = np.array([[int(p[row + k]) & 0xFFFFFFFF for k in range(4)] for row in rows], np.uint32)
        return words.view(np.uint16).reshape(4, 8, 8)  # [matrix, row, column]

    def load_matrices(p: Any, at: Any) -> tuple:
        """Four 8 x 8 matrices of bfloat16, int32 x 4: lane 8 i + r gives the place of row r of matrix i (16 bytes, a
        multiple of 16), and receives of each matrix row lane // 4, columns 2 (lane % 4) and the next. sm_75."""
        g, c = divmod(threading.current_thread().thread_id % WARP, 4)  # type: ignore[attr-defined]
        return tuple(int32(int(m[g, 2 * c]) | int(m[g, 2 * c + 1]) << 16) for m in _matrices(p, at))

    def load_matrices_transposed(p: Any, at: Any) -> tuple:
        """The same, but each lane receives column lane // 4, rows 2 (lane % 4) and the next. sm_75."""
        g, c = divmod(threading.current_thread().thread_id % WARP, 4)  # type: ignore[attr-defined]
        return tuple(int32(int(m[2 * c, g]) | int(m[2 * c + 1, g]) << 16) for m in _matrices(p, at))

    def async_fill4(to: Any, at: Any, source: Any, j: Any, size: Any) -> None:
        """`async_copy4` to the place `at` of a shared array; of the 16 bytes the first `size` are copied, 0 or 16, and
        the others zero: with 0 the source is not read. The address must lie in it all the same: memcheck before
        2026.4 has false alarms about zeros. sm_80."""
        if not 0 <= int(j) <= source.size - 4:
            raise IndexError(f"a copy from elements {int(j)} .. {int(j) + 3} of {source.size}")
        async_copy4(to, int(at) // 4, source, j, size)

else:

    @_instruction("{ .reg .u64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t; }", "r", "p")
    def _shared_address(p: Any, i: Any) -> Any: ...

    @device_function
    def shared_address(p: Any, i: Any) -> Any:
        return _shared_address(p, i)

    @_instruction("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", "rrrr", "r", effects=True)
    def _load_matrices(at: Any) -> Any: ...

    @_instruction("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];", "rrrr", "r", effects=True)
    def _load_matrices_transposed(at: Any) -> Any: ...

    @_instruction("cp.async.cg.shared.global [$0], [$1], 16, $2;", "", "rpr", effects=True)
    def _async_fill4(at: Any, source: Any, j: Any, size: Any) -> Any: ...

    @device_function
    def load_matrices(p: Any, at: Any) -> Any:
        return _load_matrices(at)

    @device_function
    def load_matrices_transposed(p: Any, at: Any) -> Any:
        return _load_matrices_transposed(at)

    @device_function
    def async_fill4(to: Any, at: Any, source: Any, j: Any, size: Any) -> None:
        _async_fill4(at, source, j, size)


@_instruction("ld.global.v2.f32 {$0, $1}, [$2];", "ff", "p", effects=True)
def load_pair(p: Any, i: Any) -> Any:
    """float32 elements i, i + 1 (i even) of global memory: one 8-byte load. Any architecture."""
    return p[int(i)], p[int(i) + 1]


@_instruction("st.global.v2.f32 [$0], {$1, $2};", "", "pff", effects=True)
def store_pair(p: Any, i: Any, a: Any, b: Any) -> None:
    """Writes float32 elements i, i + 1 (i even) of global memory in one 8-byte store. Any architecture."""
    p[int(i)], p[int(i) + 1] = a, b
