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


def instruction(ptx: str, result: str, operands: str, effects: bool = False) -> Callable[[Callable], Callable]:
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
                    asm_values.append(
                        element_address(context, builder, signature.args[position], *values[position:][:2])
                    )
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


def element_address(context: Any, builder: Any, kind: Any, base: Any, index: Any) -> Any:
    """LLVM pointer to element `index` of a pointer or of a flat array."""
    if isinstance(kind, types.Array):
        base = context.make_array(kind)(context, builder, value=base).data
    return builder.gep(base, [index])


# ---- Products -------------------------------------------------------------------------------------------------------


def _bytes(word: Any, signed: bool) -> list[int]:
    return [int(b) for b in np.array([int(word) & 0xFFFFFFFF], "<u4").view(np.int8 if signed else np.uint8)]


@instruction("dp4a.s32.s32 $0, $1, $2, $3;", "r", "rrr")
def dp4a(a: Any, b: Any, c: Any) -> Any:
    """c + the dot product of four int8 pairs, int32. sm_61."""
    return int32(int(c) + sum(x * y for x, y in zip(_bytes(a, True), _bytes(b, True), strict=True)))


@instruction("dp4a.u32.s32 $0, $1, $2, $3;", "r", "rrr")
def dp4a_us(a: Any, b: Any, c: Any) -> Any:
    """c + the dot product of four uint8 (a) and int8 (b) pairs, int32. sm_61."""
    return int32(int(c) + sum(x * y for x, y in zip(_bytes(a, False), _bytes(b, True), strict=True)))


# ---- Conversions ----------------------------------------------------------------------------------------------------


@instruction("cvt.rni.s32.f32 $0, $1;", "r", "f")
def round_to_int(x: Any) -> Any:
    """The nearest int32, half to even; saturates, NaN becomes 0. Any architecture."""
    return np.int32(0) if x != x else np.int32(min(max(np.rint(np.float64(x)), -(2**31)), 2**31 - 1))


@instruction("cvt.rn.f32.s32 $0, $1;", "f", "r")
def int_to_float(x: Any) -> Any:
    """An int32 as the nearest float32. Any architecture."""
    return np.float32(np.int32(x))


@instruction("mov.b32 $0, $1;", "f", "u")
def bits_to_float(word: Any) -> Any:
    """The float32 that a 32-bit pattern stands for. Any architecture."""
    return np.array([int(word) & 0xFFFFFFFF], np.uint32).view(np.float32)[0]


@instruction("mov.b32 $0, $1;", "u", "f")
def float_to_bits(x: Any) -> Any:
    """A float32's bit pattern, uint32. Any architecture."""
    return np.array([x], np.float32).view(np.uint32)[0]


@instruction("prmt.b32 $0, $1, $2, $3;", "u", "uuu")
def byte_permute(a: Any, b: Any, selector: Any) -> Any:
    """The word whose byte k is byte (selector >> 4k) & 7 of the eight in a (0-3) and b (4-7). Any architecture."""
    source = _bytes(a, False) + _bytes(b, False)
    return np.uint32(sum(source[int(selector) >> 4 * k & 7] << 8 * k for k in range(4)))


@instruction("shl.b32 $0, $1, 16;", "f", "r")
def bf16_low(word: Any) -> Any:
    """float32 of the bfloat16 in a word's lower half (the first of two in memory). Any architecture."""
    return bits_to_float(int(word) << 16)


@instruction("and.b32 $0, $1, 0xffff0000;", "f", "r")
def bf16_high(word: Any) -> Any:
    """float32 of the bfloat16 in a word's upper half (the second of two in memory). Any architecture."""
    return bits_to_float(int(word) & 0xFFFF0000)


@device_function
def to_bf16(x: Any) -> Any:
    """float32 rounded to the nearest bfloat16, ties to even, as a float32; NaN stays NaN. Any architecture."""
    bits = float_to_bits(x)
    rounded = uint32(uint32(bits + uint32(0x7FFF) + (uint32(bits >> uint32(16)) & uint32(1))) & uint32(0xFFFF0000))
    return bits_to_float(rounded) if x == x else x


@device_function
def join_bf16(low: Any, high: Any) -> Any:
    """Two float32 that are bfloat16 already, in one word, the first in the lower half. Any architecture."""
    return int32(byte_permute(float_to_bits(low), float_to_bits(high), 0x7632))


# ---- Approximations; each bound is from the PTX manual --------------------------------------------------------------


@instruction("ex2.approx.ftz.f32 $0, $1;", "f", "f")
def exp2_approx(x: Any) -> Any:
    """2^x within 2 ulp (relative error 2^-22), results under 2^-126 flushed to 0. Any architecture."""
    return np.exp2(np.float32(x))


@instruction("rcp.approx.f32 $0, $1;", "f", "f")
def rcp_approx(x: Any) -> Any:
    """1 / x, to within 1 ulp. Any architecture."""
    return np.float32(1) / np.float32(x)


@instruction("rsqrt.approx.f32 $0, $1;", "f", "f")
def rsqrt_approx(x: Any) -> Any:
    """1 / sqrt(x), relative error at most 2^-22.9. Any architecture."""
    return np.float32(1) / np.sqrt(np.float32(x))


# ---- Memory ---------------------------------------------------------------------------------------------------------


def _four(p: Any, i: Any) -> tuple:
    values = np.asarray([p[int(i) + k] for k in range(4)])
    if values.dtype.itemsize == 4 and values.dtype.kind in "iu":
        values = values.astype(np.uint32).view(np.int32)
    return tuple(values)


def _vector_pointer(context: Any, builder: Any, count: int, kind: Any, base: Any, index: Any) -> Any:
    from llvmlite import ir

    address = element_address(context, builder, kind, base, index)
    return builder.bitcast(address, ir.VectorType(address.type.pointee, count).as_pointer())


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
            vector = builder.load(_vector_pointer(context, builder, 4, signature.args[0], *values), align=16)
            parts = [builder.extract_element(vector, ir.IntType(32)(k)) for k in range(4)]
            return context.make_tuple(builder, signature.return_type, parts)

        return types.UniTuple(p.dtype, 4)(p, types.int64), codegen

    return load4


def _store_codegen(count: int) -> Callable:
    from llvmlite import ir

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _vector_pointer(context, builder, count, signature.args[0], *values[:2])
        vector = ir.Constant(pointer.type.pointee, ir.Undefined)
        for k in range(count):
            vector = builder.insert_element(vector, values[2 + k], ir.IntType(32)(k))
        builder.store(vector, pointer, align=4 * count)
        return context.get_dummy_value()

    return codegen


def _store4_intrinsic() -> Callable:
    from numba.cuda.extending import intrinsic

    @intrinsic
    def store4(typing_context: Any, p: Any, i: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return types.void(p, types.int64, *(p.dtype,) * 4), _store_codegen(4)

    return store4


def _store2_intrinsic() -> Callable:
    from numba.cuda.extending import intrinsic

    @intrinsic
    def store2(typing_context: Any, p: Any, i: Any, a: Any, b: Any) -> Any:
        return types.void(p, types.int64, *(p.dtype,) * 2), _store_codegen(2)

    return store2


def _load4(p: Any, i: Any) -> Any:
    """Elements i .. i+3 (i a multiple of 4) of 32-bit memory, global or shared: one 16-byte load. Any architecture."""
    return _four(p, i)


def _store4(p: Any, i: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """Writes elements i .. i+3 (i a multiple of 4) of 32-bit memory in one 16-byte store. Any architecture."""
    p[int(i)], p[int(i) + 1], p[int(i) + 2], p[int(i) + 3] = a, b, c, d


def _store2(p: Any, i: Any, a: Any, b: Any) -> None:
    """Writes elements i and i+1 (i even) of 32-bit memory in one 8-byte store. Any architecture."""
    p[int(i)], p[int(i) + 1] = a, b


pointer = _pointer if SIMULATED else _pointer_intrinsic()
load4 = _load4 if SIMULATED else _load4_intrinsic()
store2 = _store2 if SIMULATED else _store2_intrinsic()
store4 = _store4 if SIMULATED else _store4_intrinsic()


@instruction("ld.global.v2.f32 {$0, $1}, [$2];", "ff", "p", effects=True)
def load_pair(p: Any, i: Any) -> Any:
    """float32 elements i, i + 1 (i even) of global memory: one 8-byte load. Any architecture."""
    return p[int(i)], p[int(i) + 1]


@instruction("st.global.v2.f32 [$0], {$1, $2};", "", "pff", effects=True)
def store_pair(p: Any, i: Any, a: Any, b: Any) -> None:
    """Writes float32 elements i, i + 1 (i even) of global memory in one 8-byte store. Any architecture."""
    p[int(i)], p[int(i) + 1] = a, b


_STREAM_PTX = {
    80: "ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];",
    70: "ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];",
    60: "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
}


def _stream_load(ptx: str) -> Callable:
    # No reordering barrier, but "effects" would pin the loads in program order, which is what early loads want.
    @instruction(ptx, "rrrr", "p", effects=True)
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
    @instruction(ptx, "rr", "p", effects=True)
    def stream_pair(p: Any, i: Any) -> Any:
        """Words i, i + 1 (i even) of read-only global memory, past L1: int32 x 2."""
        return tuple(int32(p[int(i) + k]) for k in range(2))

    return stream_pair


_STREAM_PAIRS = {arch: _stream_pair(ptx) for arch, ptx in _STREAM_PAIR_PTX.items()}


def stream_pair(arch: int) -> Callable:
    """The 8-byte load for weights: `load(p, i) -> (int32, int32)`; see `stream_load`."""
    return _STREAM_PAIRS[max(level for level in _STREAM_PAIRS if level <= max(arch, 60))]


@instruction("griddepcontrol.wait;", "", "", effects=True)
def _grid_wait() -> None:
    return None


@instruction("griddepcontrol.launch_dependents;", "", "", effects=True)
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


@instruction("prefetch.global.L2 [$0];", "", "p", effects=True)
def prefetch_l2(p: Any, i: Any) -> None:
    """Asks for the line of element i to be brought into L2. Any architecture."""


_atomic_lock = threading.Lock()


@instruction("atom.global.add.u32 $0, [$1], $2;", "u", "pu", effects=True)
def atomic_fetch_add(p: Any, i: Any, value: Any) -> Any:
    """p[i] += value, 32 bits in global memory; returns what was there. Any architecture."""
    with _atomic_lock:
        old = uint32(p[int(i)])
        p[int(i)] = p.dtype.type(np.uint32((int(old) + int(value)) & 0xFFFFFFFF).view(p.dtype.type))
        return old


@instruction("red.global.or.b32 [$0], $1;", "", "pr", effects=True)
def atomic_or(p: Any, i: Any, value: Any) -> None:
    """p[i] |= value, 32 bits in global memory. Any architecture."""
    with _atomic_lock:
        p[int(i)] = int(p[int(i)]) | int(value)


@device_function
def fence() -> None:
    """Orders this thread's global writes before its later ones, for the whole device. Any architecture."""
    cuda.threadfence()


@instruction(r".pragma \22nounroll\22;", "", "", effects=True)  # \22: LLVM's way to write a quotation mark
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


@instruction("mul.rn.f32 $0, $1, $2;", "f", "ff")
def mul_rn(a: Any, b: Any) -> Any:
    """a * b rounded to float32, never fused into a multiply-add. Any architecture."""
    return np.float32(a) * np.float32(b)


@instruction("add.rn.f32 $0, $1, $2;", "f", "ff")
def add_rn(a: Any, b: Any) -> Any:
    """a + b rounded to float32, never fused into a multiply-add. Any architecture."""
    return np.float32(a) + np.float32(b)


@instruction("div.rn.f32 $0, $1, $2;", "f", "ff")
def div_rn(a: Any, b: Any) -> Any:
    """a / b, correctly rounded. Any architecture."""
    return np.float32(a) / np.float32(b)


@instruction("rcp.rn.f32 $0, $1;", "f", "f")
def rcp_rn(x: Any) -> Any:
    """1 / x, correctly rounded. Any architecture."""
    return np.float32(1) / np.float32(x)


@instruction("sqrt.rn.f32 $0, $1;", "f", "f")
def sqrt_rn(x: Any) -> Any:
    """The square root, correctly rounded. Any architecture."""
    return np.sqrt(np.float32(x))


@instruction("mul.hi.u32 $0, $1, $2;", "u", "uu")
def mul_high(a: Any, b: Any) -> Any:
    """The upper half of a 32 x 32 bit product, uint32. Any architecture."""
    return uint32(int(a) * int(b) >> 32)


@instruction("mul.lo.u32 $0, $1, $2;", "u", "uu")
def mul_low(a: Any, b: Any) -> Any:
    """The lower half of a 32 x 32 bit product, uint32. Any architecture."""
    return uint32(int(a) * int(b))


@instruction("div.u32 $0, $1, $2;", "r", "rr")
def divide(a: Any, b: Any) -> Any:
    """a // b for int32 a >= 0, b > 0: Numba's own divides 64 bits, ten times the instructions. Any architecture."""
    return int32(int(a) // int(b))


# ---- Between blocks -------------------------------------------------------------------------------------------------


@instruction("ld.acquire.gpu.global.u32 $0, [$1];", "u", "p", effects=True)
def load_acquire(p: Any, i: Any) -> Any:
    """p[i], uint32, ordered before every later access of this thread. sm_70."""
    return uint32(p[int(i)])


@instruction("red.release.gpu.global.add.u32 [$0], $1;", "", "pu", effects=True)
def atomic_add_release(p: Any, i: Any, value: Any) -> None:
    """p[i] += value, 32 bits, ordered after every earlier access of this thread. sm_70."""
    atomic_fetch_add(p, i, value)


@instruction("red.global.max.s64 [$0], $1;", "", "pL", effects=True)
def atomic_max_wide(p: Any, i: Any, value: Any) -> None:
    """p[i] = max(p[i], value), int64 in global memory. Any architecture."""
    with _atomic_lock:
        p[int(i)] = max(int(p[int(i)]), int(value))


@instruction("red.global.add.u64 [$0], $1;", "", "pL", effects=True)
def atomic_add_wide(p: Any, i: Any, value: Any) -> None:
    """p[i] += value, int64 in global memory; exact, so the same in any order. Any architecture."""
    with _atomic_lock:
        p[int(i)] = int(p[int(i)]) + int(value)


@instruction("ld.global.cg.v2.b32 {$0, $1}, [$2];", "rr", "p", effects=True)
def load2_l2(p: Any, i: Any) -> Any:
    """Words i, i + 1 (i even) of global memory as L2 has them, never from L1: int32 x 2. Any architecture."""
    return int32(p[int(i)]), int32(p[int(i) + 1])


@instruction("atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;", "u", "pu", effects=True)
def atomic_fetch_add_ordered(p: Any, i: Any, value: Any) -> Any:
    """`atomic_fetch_add`, ordered after every earlier and before every later access of this thread. sm_70."""
    return atomic_fetch_add(p, i, value)
