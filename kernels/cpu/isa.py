"""Instruction sets: which there are, which this machine has, and how a kernel is told.

    name      registers                    ternary dot product of four bytes
    vnni512   16 lanes (zmm)               vpdpbusd: AVX512-VNNI (Intel since Ice Lake, AMD since Zen 4)
    vnni256   8 lanes (ymm)                vpdpbusd: AVX-VNNI or AVX512-VNNI (Intel since Alder Lake)
    avx2      8 lanes (ymm)                vpmaddubsw, vpmaddwd: any x86 since 2013 (Haswell, Excavator)
    i8mm      4 lanes (NEON)               usdot: Armv8.6 (Apple M2, Neoverse V1)
    dotprod   4 lanes (NEON)               sdot: Armv8.2 (Apple M1, Neoverse N1)
    portable  whatever LLVM makes of it    multiplications and additions of int32: any CPU

An `InstructionSet` is an argument of compiled functions; its type is its name, so that Numba compiles a version for
each, and `@overload` chooses by it. LLVM ends the process when it must emit an instruction that its target lacks, so
`available` asks LLVM itself, harmlessly: it compiles a plain loop body for the very target that Numba compiles for
(which NUMBA_CPU_NAME and NUMBA_CPU_FEATURES may change) and looks which instruction LLVM chose.
"""

import os
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm
from numba.core import types
from numba.core.datamodel import models
from numba.core.imputils import lower_constant
from numba.core.registry import cpu_target
from numba.extending import NativeValue, register_model, typeof_impl, unbox

from bitnet_numba.errors import BackendError

NAMES = ("vnni512", "vnni256", "avx2", "i8mm", "dotprod", "portable")  # best first, for each family of CPUs


@dataclass(frozen=True)
class InstructionSet:
    """One of NAMES, as an argument for compiled functions. Only those of `available()` may be compiled."""

    name: str


class InstructionSetType(types.Type):
    """The type of an InstructionSet: one for each name."""

    def __init__(self, isa: str):
        self.isa = isa
        super().__init__(name=f"InstructionSet({isa})")


register_model(InstructionSetType)(models.OpaqueModel)


@typeof_impl.register(InstructionSet)
def _typeof(value, _context):
    return InstructionSetType(value.name)


@lower_constant(InstructionSetType)
def _constant(context, _builder, _type, _value):
    return context.get_dummy_value()


@unbox(InstructionSetType)
def _unbox(_type, _value, c):
    return NativeValue(c.context.get_dummy_value())


def _assembly(body: str) -> str:
    """What LLVM makes of some IR for Numba's target."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    module = llvm.parse_assembly(f'target triple = "{triple}"\n{body}')
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=2)
    return machine.emit_assembly(module)


def _dot(n: int) -> str:
    """IR of the sum of n products of an unsigned and a signed byte."""
    return f"""
declare i32 @llvm.vector.reduce.add.v{n}i32(<{n} x i32>)
define i32 @f(<{n} x i8>* %p, <{n} x i8>* %q) {{
  %a = load <{n} x i8>, <{n} x i8>* %p
  %b = load <{n} x i8>, <{n} x i8>* %q
  %wide_a = zext <{n} x i8> %a to <{n} x i32>
  %wide_b = sext <{n} x i8> %b to <{n} x i32>
  %products = mul <{n} x i32> %wide_a, %wide_b
  %sum = call i32 @llvm.vector.reduce.add.v{n}i32(<{n} x i32> %products)
  ret i32 %sum
}}"""


_ADD_256 = """
define <8 x i32> @f(<8 x i32> %a, <8 x i32> %b) {
  %sum = add <8 x i32> %a, %b
  ret <8 x i32> %sum
}"""


_HALVES = """
define <8 x float> @f(<8 x half>* %p) {
  %halves = load <8 x half>, <8 x half>* %p
  %floats = fpext <8 x half> %halves to <8 x float>
  ret <8 x float> %floats
}"""


@cache
def converts_halves() -> bool:
    """Whether Numba's target has an instruction from float16 to float32 (F16C, NEON)."""
    return any(name in line for line in _assembly(_HALVES).splitlines() for name in ("vcvtph2ps", "fcvtl"))


@cache
def available() -> tuple[str, ...]:
    """The instruction sets that Numba's target has, best first. "portable" is always the last."""
    found = []
    if llvm.get_process_triple().startswith(("x86_64", "amd64")):
        # AVX without AVX2 has ymm registers, too, but adds their integers in halves.
        if any("vpaddd" in line and "ymm" in line for line in _assembly(_ADD_256).splitlines()):
            for name, n, register in (("vnni512", 64, "zmm"), ("vnni256", 32, "ymm")):
                if any("vpdpbusd" in line and register in line for line in _assembly(_dot(n)).splitlines()):
                    found.append(name)
            found.append("avx2")
    elif llvm.get_process_triple().startswith(("aarch64", "arm64")):
        if "usdot" in _assembly(_dot(16)):
            found.append("i8mm")
        if "sdot" in _assembly(_dot(16).replace("zext", "sext")):
            found.append("dotprod")
    return (*found, "portable")


def choose(name: str | None = None) -> InstructionSet:
    """The instruction set called `name`, else that of $BITNET_NUMBA_ISA, else the best. Raises BackendError if this
    machine lacks it."""
    name = name or os.environ.get("BITNET_NUMBA_ISA") or available()[0]
    if name not in available():
        raise BackendError(f"instruction set {name!r} is not one of this machine's: {', '.join(available())}")
    return InstructionSet(name)
