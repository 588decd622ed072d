"""Machine instructions that Numba does not offer, each with a plain-Python stand-in for the simulator.

Conventions of every kernel in this folder:
- Kernels are plain Python functions of flat pointers and int32 / float32 scalars. `compilation` and `device` compile
  and launch them; under the simulator (NUMBA_ENABLE_CUDASIM=1) they run on flat NumPy arrays.
- An operand `p, i` is element i of a kernel's pointer or of a shared array. Shared arrays that 16-byte accesses touch
  are made with `cuda.shared.array(size, dtype, SHARED_ALIGN)`.
- What an architecture lacks is chosen when a kernel is built (`stream_load(arch)`, `pdl_wait(arch)`, ...), never at
  run time; `arch` is 10 * major + minor of the compute capability, e.g. 90.
- Lanes exchange values with their whole warp: every thread of a warp must reach an exchange; blocks are whole warps.
- Numba widens int32 arithmetic to int64: wrap each result in `int32(...)`, and the compiler narrows it again.
"""

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


@instruction(r".pragma \22nounroll\22;", "", "", effects=True)  # \22: LLVM's way to write a quotation mark
def no_unroll() -> None:
    """At the start of a loop's body: the assembler does not unroll it, which would take registers. Any architecture."""
