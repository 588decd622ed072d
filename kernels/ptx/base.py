"""How instructions are made, and what all kernels agree on.

Numba does not expose most of PTX. Each instruction that a kernel needs is a Python function made by `instruction` of
inline PTX; the decorated function itself is its emulation, which runs under Numba's CUDA simulator.

Conventions of every kernel
- Kernels are plain Python functions of flat pointers and int32 / float32 scalars. `runtime.compiler` and
  `runtime.launch` compile and launch them; under the simulator (NUMBA_ENABLE_CUDASIM=1) they run on flat NumPy arrays.
- A pair of parameters `p, i` is element i of a kernel's pointer or of a shared array. A parameter `address` is a 32-bit
  address in shared memory (`shared_address`). In the simulator that is a byte offset from the start of a shared array,
  so instructions that access the memory take the array too: `array, address`.
- Shared arrays that 16-byte accesses touch are made with `cuda.shared.array(size, dtype, SHARED_ALIGN)`.
- What an architecture lacks is chosen when a kernel is built (`stream_load(arch)`, `pdl_wait(arch)`, ...), never at
  run time; `arch` is 10 * major + minor of the compute capability, e.g. 90.
- Shuffles, `mma` and `ldmatrix` concern whole warps: every thread of a warp must execute them, and blocks are whole
  warps.
- Numba widens int32 arithmetic to int64: wrap each result in `int32(...)`, and the compiler narrows it again.
- A docstring names the first compute capability that has the instruction, or says "Any architecture".
"""

import inspect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, types  # numba.cuda.types are the same, but lack names where numba-cuda is not installed
from numba.core import config

SIMULATED = bool(config.ENABLE_CUDASIM)
SHARED_ALIGN = None if SIMULATED else 16  # bytes; the simulator's arrays take no alignment
WARP = 32  # lanes

# Kernels convert by calling types. Under the simulator these wrap around as registers do.
if SIMULATED:

    class _Integer:
        """An integer type: calling it keeps the low bits. NumPy takes it as a dtype."""

        def __init__(self, dtype: Any):
            self.dtype = np.dtype(dtype)
            self._type = self.dtype.type
            self._min = int(np.iinfo(dtype).min)
            self._mask = (1 << 8 * self.dtype.itemsize) - 1

        def __call__(self, x: Any) -> Any:
            return x if type(x) is self._type else self._type(((int(x) - self._min) & self._mask) + self._min)

    int32, uint32, int64 = _Integer(np.int32), _Integer(np.uint32), _Integer(np.int64)
    float32, float64 = np.float32, np.float64
else:
    int32, uint32, int64 = types.int32, types.uint32, types.int64
    float32, float64 = types.float32, types.float64


def device_function(function: Callable) -> Any:
    """Makes a function callable from kernels, where it is always inlined."""
    return cuda.jit(device=True)(function) if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def simulated_thread() -> Any:
    """The running thread of the tests' simulator (tests/kernels/simulator.py), for emulations: it has `thread_id`,
    `gather_in_warp`, `exchange_in_warp`, `syncthreads`, ... One simulated thread runs at a time."""
    return threading.current_thread()


def instruction(ptx: str, result: str, operands: str, effects: bool = False) -> Callable[[Callable], Callable]:
    """Makes a kernel instruction of inline PTX; under the simulator it is the decorated function, the emulation.

    `result` is "", one register letter, or several for a tuple; `operands` one letter for each: r int32, u uint32,
    L int64, f float32, d float64, p an element's address (two parameters, pointer and index), s a shared array that
    only the emulation reads (one parameter, no register). In `ptx`, $0 .. are the results, then the operands.
    `effects`: the instruction touches memory or orders accesses, so it is never moved, merged or dropped.
    """

    def decorate(emulation: Callable) -> Callable:
        if SIMULATED:
            return emulation
        return _asm_intrinsic(emulation, ptx, result, operands, effects)

    return decorate


def _asm_intrinsic(emulation: Callable, ptx: str, result: str, operands: str, effects: bool) -> Callable:
    from llvmlite import ir

    llvm = {"r": ir.IntType(32), "u": ir.IntType(32), "L": ir.IntType(64), "f": ir.FloatType(), "d": ir.DoubleType()}
    numba_types = {"r": types.int32, "u": types.uint32, "L": types.int64, "f": types.float32, "d": types.float64}
    register = {"r": "r", "u": "r", "L": "l", "f": "f", "d": "d", "p": "l"}

    def definition(typing_context: Any, *arguments: Any) -> Any:
        parameters, position = [], 0
        for letter in operands:
            parameters += [arguments[position]] if letter in "ps" else [numba_types[letter]]
            parameters += [types.int64] if letter == "p" else []
            position += 2 if letter == "p" else 1
        returned = types.void if not result else numba_types[result[0]]
        if len(result) > 1:
            returned = types.UniTuple(returned, len(result))

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            asm_values, position = [], 0
            for letter in operands:
                if letter == "p":
                    kind, (base, index) = signature.args[position], values[position:][:2]
                    asm_values.append(element_address(context, builder, kind, base, index))
                elif letter != "s":
                    asm_values.append(values[position])
                position += 2 if letter == "p" else 1
            outputs = [llvm[letter] for letter in result]
            asm_result = ir.VoidType() if not outputs else outputs[0]
            if len(outputs) > 1:
                asm_result = ir.LiteralStructType(outputs)
            constraints = ["=" + register[letter] for letter in result]
            constraints += [register[letter] for letter in operands if letter != "s"]
            if effects:
                constraints.append("~{memory}")
            function = ir.FunctionType(asm_result, [value.type for value in asm_values])
            call = builder.call(ir.InlineAsm(function, ptx, ",".join(constraints), side_effect=effects), asm_values)
            if len(outputs) > 1:
                parts = [builder.extract_value(call, k) for k in range(len(outputs))]
                return context.make_tuple(builder, signature.return_type, parts)
            return call if outputs else context.get_dummy_value()

        return returned(*parameters), codegen

    return as_intrinsic(definition, emulation)


def as_intrinsic(definition: Callable, emulation: Callable) -> Callable:
    """A Numba intrinsic of `definition(typing_context, *arguments)` with the emulation's name, parameters and
    docstring: Numba looks at the signature."""
    from numba.cuda.extending import intrinsic

    names = [inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    names += list(inspect.signature(emulation).parameters.values())
    definition.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    definition.__name__ = definition.__qualname__ = emulation.__name__
    definition.__doc__ = emulation.__doc__
    return intrinsic(definition)


def element_address(context: Any, builder: Any, kind: Any, base: Any, index: Any) -> Any:
    """LLVM pointer to element `index` of a pointer or of a flat array."""
    if isinstance(kind, types.Array):
        base = context.make_array(kind)(context, builder, value=base).data
    return builder.gep(base, [index])


@instruction(r".pragma \22nounroll\22;", "", "", effects=True)  # \22: LLVM's escape for a quotation mark
def no_unroll() -> None:
    """First in a loop's body: ptxas does not unroll the loop, which would take registers. Any architecture."""
