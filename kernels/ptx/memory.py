"""Loads, stores, prefetches and atomics in global memory, and addresses in shared memory.

Names: a number is how many 32-bit elements an access moves (`load4`: 16 bytes); `stream_` loads are for weights, which
are read once; atomics that return nothing compile to `red`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels.ptx.base import (
    SIMULATED,
    device_function,
    element_address,
    float32,
    instruction,
    int32,
    uint32,
)


def _four(p: Any, i: Any) -> tuple:
    values = np.asarray([p[int(i) + k] for k in range(4)])
    if values.dtype.itemsize == 4 and values.dtype.kind in "iu":
        values = values.astype(np.uint32).view(np.int32)
    return tuple(values)


# Global or shared memory. These are LLVM loads and stores, which the compiler may move and merge.

if SIMULATED:

    def pointer(array: Any) -> Any:
        """A shared array as a pointer. Numba wraps negative indices of arrays, which takes five instructions for every
        access; those of pointers it does not. Any architecture."""
        return array

    def load4(p: Any, i: Any) -> Any:
        """Elements i .. i+3 (i a multiple of 4) of 32-bit memory: one 16-byte load. Any architecture."""
        return _four(p, i)

    def load2(p: Any, i: Any) -> Any:
        """Elements i, i + 1 (i even) of 32-bit memory: one 8-byte load. Any architecture."""
        return p[int(i)], p[int(i) + 1]

    def store2(p: Any, i: Any, a: Any, b: Any) -> None:
        """Writes elements i, i + 1 (i even) of 32-bit memory: one 8-byte store. Any architecture."""
        p[int(i)], p[int(i) + 1] = a, b

    def store4(p: Any, i: Any, a: Any, b: Any, c: Any, d: Any) -> None:
        """Writes elements i .. i+3 (i a multiple of 4) of 32-bit memory: one 16-byte store. Any architecture."""
        p[int(i)], p[int(i) + 1], p[int(i) + 2], p[int(i) + 3] = a, b, c, d

else:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    def _vector_pointer(context: Any, builder: Any, count: int, kind: Any, base: Any, index: Any) -> Any:
        address = element_address(context, builder, kind, base, index)
        return builder.bitcast(address, ir.VectorType(address.type.pointee, count).as_pointer())

    def _store_codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        base, index, *elements = values
        target = _vector_pointer(context, builder, len(elements), signature.args[0], base, index)
        vector = ir.Constant(target.type.pointee, ir.Undefined)
        for k, element in enumerate(elements):
            vector = builder.insert_element(vector, element, ir.IntType(32)(k))
        builder.store(vector, target, align=4 * len(elements))
        return context.get_dummy_value()

    @intrinsic
    def pointer(typing_context: Any, array: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return context.make_array(signature.args[0])(context, builder, value=values[0]).data

        return types.CPointer(array.dtype)(array), codegen

    def _load(count: int, p: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            source = _vector_pointer(context, builder, count, signature.args[0], *values)
            vector = builder.load(source, align=4 * count)
            parts = [builder.extract_element(vector, ir.IntType(32)(k)) for k in range(count)]
            return context.make_tuple(builder, signature.return_type, parts)

        return types.UniTuple(p.dtype, count)(p, types.int64), codegen

    @intrinsic
    def load4(typing_context: Any, p: Any, i: Any) -> Any:
        return _load(4, p)

    @intrinsic
    def load2(typing_context: Any, p: Any, i: Any) -> Any:
        return _load(2, p)

    @intrinsic
    def store2(typing_context: Any, p: Any, i: Any, a: Any, b: Any) -> Any:
        return types.void(p, types.int64, p.dtype, p.dtype), _store_codegen

    @intrinsic
    def store4(typing_context: Any, p: Any, i: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return types.void(p, types.int64, p.dtype, p.dtype, p.dtype, p.dtype), _store_codegen


@instruction("{ .reg .u64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t; }", "r", "p")
def shared_address(array: Any, i: Any) -> Any:
    """The 32-bit address, int32, of element i of a shared array of 32-bit elements. Any architecture."""
    return int32(4 * int(i))


# ---- Global memory -----------------------------------------------------------------------------------------------


@instruction("ld.global.v2.f32 {$0, $1}, [$2];", "ff", "p", effects=True)
def load2_f32(p: Any, i: Any) -> Any:
    """float32 elements i, i + 1 (i even): one 8-byte load. Any architecture."""
    return p[int(i)], p[int(i) + 1]


@instruction("st.global.v2.f32 [$0], {$1, $2};", "", "pff", effects=True)
def store2_f32(p: Any, i: Any, a: Any, b: Any) -> None:
    """Writes float32 elements i, i + 1 (i even): one 8-byte store. Any architecture."""
    p[int(i)], p[int(i) + 1] = a, b


# Options of the load, and the first architecture that has them.
_STREAM_OPTIONS = {80: ".L1::no_allocate.L2::256B", 70: ".L1::no_allocate", 60: ""}


def _stream_load(options: str) -> Callable:
    # effects: keeps the loads in program order, so that those which a kernel issues early stay early.
    @instruction(f"ld.global.nc{options}.v4.b32 {{$0, $1, $2, $3}}, [$4];", "rrrr", "p", effects=True)
    def load(p: Any, i: Any) -> Any:
        return _four(p, i)

    return load


def _stream_load2(options: str) -> Callable:
    @instruction(f"ld.global.nc{options}.v2.b32 {{$0, $1}}, [$2];", "rr", "p", effects=True)
    def load(p: Any, i: Any) -> Any:
        return tuple(int32(p[int(i) + k]) for k in range(2))

    return load


_STREAM_LOADS = {first: _stream_load(options) for first, options in _STREAM_OPTIONS.items()}
_STREAM_LOADS2 = {first: _stream_load2(options) for first, options in _STREAM_OPTIONS.items()}


def stream_load(arch: int) -> Callable:
    """`load(p, i)`: words i .. i+3 (i a multiple of 4) of read-only memory, not kept in L1: int32 x 4. Any
    architecture: L1::no_allocate needs sm_70, L2::256B sm_80."""
    return _STREAM_LOADS[max(first for first in _STREAM_LOADS if first <= max(arch, 60))]


def stream_load2(arch: int) -> Callable:
    """`load(p, i)`: words i, i + 1 (i even), as of `stream_load`: int32 x 2. Any architecture."""
    return _STREAM_LOADS2[max(first for first in _STREAM_LOADS2 if first <= max(arch, 60))]


@instruction("ld.global.cg.v2.b32 {$0, $1}, [$2];", "rr", "p", effects=True)
def load2_l2(p: Any, i: Any) -> Any:
    """Words i, i + 1 (i even) as L2 has them, never from L1: int32 x 2. Any architecture."""
    return int32(p[int(i)]), int32(p[int(i) + 1])


@instruction("prefetch.global.L2 [$0];", "", "p", effects=True)
def prefetch_l2(p: Any, i: Any) -> None:
    """Asks for the line of element i to be brought into L2. Any architecture."""


# ---- Atomics in global memory; integer sums are exact, so the same in any order ------------------------------------


@instruction("atom.global.add.u32 $0, [$1], $2;", "u", "pu", effects=True)
def atomic_fetch_add(p: Any, i: Any, value: Any) -> Any:
    """p[i] += value, 32 bits; returns the old value, uint32. Any architecture."""
    old = uint32(p[int(i)])
    p[int(i)] = p.dtype.type(np.uint32((int(old) + int(value)) & 0xFFFFFFFF).view(p.dtype.type))
    return old


@instruction("red.global.or.b32 [$0], $1;", "", "pr", effects=True)
def atomic_or(p: Any, i: Any, value: Any) -> None:
    """p[i] |= value, 32 bits. Any architecture."""
    p[int(i)] = int(p[int(i)]) | int(value)


@instruction("red.global.max.s64 [$0], $1;", "", "pL", effects=True)
def atomic_max_wide(p: Any, i: Any, value: Any) -> None:
    """p[i] = max(p[i], value), int64. Any architecture."""
    p[int(i)] = max(int(p[int(i)]), int(value))


@instruction("red.global.add.u64 [$0], $1;", "", "pL", effects=True)
def atomic_add_wide(p: Any, i: Any, value: Any) -> None:
    """p[i] += value, int64. Any architecture."""
    p[int(i)] = int(p[int(i)]) + int(value)


@instruction("red.global.add.f32 [$0], $1;", "", "pf", effects=True)
def atomic_add_f32(p: Any, i: Any, value: Any) -> None:
    """p[i] += value, float32: exact, so the same in any order, for whole numbers up to 2^24. Any architecture."""
    p[int(i)] = float32(float32(p[int(i)]) + float32(value))


# ---- Order between blocks ------------------------------------------------------------------------------------------


@device_function
def threadfence() -> None:
    """Orders this thread's earlier global writes before its later ones, for the whole device. Any architecture."""
    cuda.threadfence()


@instruction("ld.acquire.gpu.global.u32 $0, [$1];", "u", "p", effects=True)
def load_acquire(p: Any, i: Any) -> Any:
    """p[i], uint32, ordered before every later access of this thread. sm_70."""
    return uint32(p[int(i)])


@instruction("red.release.gpu.global.add.u32 [$0], $1;", "", "pu", effects=True)
def atomic_add_release(p: Any, i: Any, value: Any) -> None:
    """p[i] += value, 32 bits, ordered after every earlier access of this thread. sm_70."""
    atomic_fetch_add(p, i, value)


@instruction("atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;", "u", "pu", effects=True)
def atomic_fetch_add_ordered(p: Any, i: Any, value: Any) -> Any:
    """`atomic_fetch_add`, ordered after every earlier and before every later access of this thread. sm_70."""
    return atomic_fetch_add(p, i, value)
