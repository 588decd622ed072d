"""TODO docstring."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels.ptx.base import SIMULATED, device_function, element_address, instruction, int32, uint32

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
def load2_f32(p: Any, i: Any) -> Any:
    """float32 elements i, i + 1 (i even) of global memory: one 8-byte load. Any architecture."""
    return p[int(i)], p[int(i) + 1]


@instruction("st.global.v2.f32 [$0], {$1, $2};", "", "pff", effects=True)
def store2_f32(p: Any, i: Any, a: Any, b: Any) -> None:
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


_STREAM_PTX2 = {
    80: "ld.global.nc.L1::no_allocate.L2::256B.v2.b32 {$0, $1}, [$2];",
    70: "ld.global.nc.L1::no_allocate.v2.b32 {$0, $1}, [$2];",
    60: "ld.global.nc.v2.b32 {$0, $1}, [$2];",
}


def _stream_load2(ptx: str) -> Callable:
    @instruction(ptx, "rr", "p", effects=True)
    def stream_load2(p: Any, i: Any) -> Any:
        """Words i, i + 1 (i even) of read-only global memory, past L1: int32 x 2."""
        return tuple(int32(p[int(i) + k]) for k in range(2))

    return stream_load2


_STREAM_LOADS2 = {arch: _stream_load2(ptx) for arch, ptx in _STREAM_PTX2.items()}


def stream_load2(arch: int) -> Callable:
    """The 8-byte load for weights: `load(p, i) -> (int32, int32)`; see `stream_load`."""
    return _STREAM_LOADS2[max(level for level in _STREAM_LOADS2 if level <= max(arch, 60))]


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
def threadfence() -> None:
    """Orders this thread's global writes before its later ones, for the whole device. Any architecture."""
    cuda.threadfence()


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
