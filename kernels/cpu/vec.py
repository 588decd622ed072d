"""SIMD registers as Numba values: a vector type, and one function for each instruction that the CPU kernels need.

A value of type `Vec(n, lane)` is an LLVM vector of n lanes. It lives in a register inside compiled code and never
leaves it. Every operation is an @intrinsic that emits one LLVM instruction, so a kernel written with them reads like
assembly with names and stays pure Python. LLVM splits registers that the machine does not have (16 lanes of float32
are two registers of AVX2, four of NEON), so all but the dot products, which are in `dot`, run on any CPU and give the
same bits on all that can fuse a multiplication and an addition.

Memory is an address, an integer, and an offset in bytes; `address_of` makes the one from an array. `PLAIN` at the end
says in NumPy what each operation computes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic

from bitnet_numba.kernels.cpu.isa import converts_halves

LANES = {
    "i8": ir.IntType(8),
    "i16": ir.IntType(16),
    "i32": ir.IntType(32),
    "i64": ir.IntType(64),
    "f32": ir.FloatType(),
}
DTYPES = {"i8": np.int8, "i16": np.int16, "i32": np.int32, "f32": np.float32}
I32 = ir.IntType(32)
HALF_UNIT = 2.0**112  # of float16's exponent in the place of float32's
# How functions of kernels/cpu are compiled that Python does not call. Division by zero is as in NumPy: inf or NaN.
OPTIONS = {
    "nogil": True,
    "boundscheck": False,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


class Vec(types.Type):
    """n lanes of "i8", "i16", "i32" or "f32"."""

    def __init__(self, n: int, lane: str):
        self.n, self.lane = n, lane
        super().__init__(name=f"Vec({n} x {lane})")


@register_default(Vec)
class VecModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, vector(fe_type.n, fe_type.lane))


def vector(n: int, lane: str) -> ir.VectorType:
    """The LLVM type of n lanes."""
    return ir.VectorType(LANES[lane], n)


def call(builder, name: str, result: ir.Type, args: list[Any]) -> Any:
    """Calls an LLVM intrinsic by name."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def splat_of(builder, value, n: int):
    """The same scalar in all n lanes: LLVM makes a broadcast of it, from memory where it can."""
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, n), ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, n), [0] * n))


def lanes_from(builder, a, b, first: int, count: int):
    """Lanes first .. first + count of a and b, laid one after the other."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, count), list(range(first, first + count))))


def pointer_to(context, builder, sig, args, pointee: ir.Type):
    """The pointer that the first two arguments, an address and an offset in bytes, mean."""
    address = context.cast(builder, args[0], sig.args[0], types.intp)
    at = builder.add(address, context.cast(builder, args[1], sig.args[1], types.intp))
    return builder.inttoptr(at, pointee.as_pointer())


def _constant(n: int, lane: str):
    """zero() -> n lanes of 0."""

    @intrinsic
    def zero(typingctx):
        def codegen(context, builder, sig, args):
            return ir.Constant(vector(n, lane), None)

        return Vec(n, lane)(), codegen

    return zero


def _load(n: int, lane: str):
    """load(address, offset) -> n lanes from memory, at any alignment."""

    @intrinsic
    def load(typingctx, address, offset):
        def codegen(context, builder, sig, args):
            return builder.load(pointer_to(context, builder, sig, args, vector(n, lane)), align=1)

        return Vec(n, lane)(address, offset), codegen

    return load


def emit_halves(builder, address, offset: int, n: int):
    """The LLVM value of n finite float16 numbers in memory as float32 lanes.

    On a CPU without an instruction for it, exponent and mantissa are shifted into place, and the difference of the
    exponents' biases is multiplied away, which is exact.
    """
    at = builder.inttoptr(builder.add(address, address.type(offset)), vector(n, "i16").as_pointer())
    stored = builder.load(at, align=1)
    if converts_halves():
        return builder.fpext(builder.bitcast(stored, ir.VectorType(ir.HalfType(), n)), vector(n, "f32"))
    bits = builder.shl(builder.sext(stored, vector(n, "i32")), ir.Constant(vector(n, "i32"), [13] * n))
    bits = builder.and_(bits, ir.Constant(bits.type, [0x8FFFFFFF] * n))
    floats = builder.bitcast(bits, vector(n, "f32"))
    return builder.fmul(floats, ir.Constant(floats.type, [HALF_UNIT] * n))


@intrinsic(prefer_literal=True)
def load_f16x16(typingctx, address, offset):
    """load(address, literal offset) -> 16 finite float16 numbers as float32 lanes."""

    def codegen(context, builder, sig, args):
        at = context.cast(builder, args[0], sig.args[0], types.intp)
        return emit_halves(builder, at, offset.literal_value, 16)

    return Vec(16, "f32")(address, offset), codegen


def _broadcast(n: int, lane: str):
    """broadcast(address, offset) -> one lane of memory in all n lanes."""

    @intrinsic
    def broadcast(typingctx, address, offset):
        def codegen(context, builder, sig, args):
            value = builder.load(pointer_to(context, builder, sig, args, LANES[lane]), align=1)
            return splat_of(builder, value, n)

        return Vec(n, lane)(address, offset), codegen

    return broadcast


def _splat(n: int, lane: str):
    """splat(value) -> a scalar in all n lanes."""

    @intrinsic
    def splat(typingctx, value):
        scalar = types.float32 if lane == "f32" else types.int32

        def codegen(context, builder, sig, args):
            return splat_of(builder, context.cast(builder, args[0], sig.args[0], scalar), n)

        return Vec(n, lane)(value), codegen

    return splat


zero_i32x4, zero_i32x8, zero_i32x16 = _constant(4, "i32"), _constant(8, "i32"), _constant(16, "i32")
zero_f32x16 = _constant(16, "f32")
load_i32x4, load_i32x8, load_i32x16 = _load(4, "i32"), _load(8, "i32"), _load(16, "i32")
load_i8x16, load_f32x16 = _load(16, "i8"), _load(16, "f32")
broadcast_i32x4, broadcast_i32x8 = _broadcast(4, "i32"), _broadcast(8, "i32")
broadcast_i32x16, broadcast_f32x16 = _broadcast(16, "i32"), _broadcast(16, "f32")
splat_i32x4, splat_i32x8 = _splat(4, "i32"), _splat(8, "i32")
splat_i32x16, splat_f32x16 = _splat(16, "i32"), _splat(16, "f32")


@intrinsic
def store(typingctx, address, offset, v):
    """Writes a vector to memory, at any alignment."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], pointer_to(context, builder, sig, args, args[2].type), align=1)
        return context.get_dummy_value()

    return types.void(address, offset, v), codegen


@intrinsic
def address_of(typingctx, array):
    """Address of an array's first element."""

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.intp(array), codegen


def _lanewise(integer: str | None, floating: str | None, meaning: str):
    """op(a, b), lane by lane: the LLVM instructions' names for integer and float lanes."""

    @intrinsic
    def op(typingctx, a, b):
        name = floating if a.lane == "f32" else integer
        if a != b or name is None:
            return None

        def codegen(context, builder, sig, args):
            return getattr(builder, name)(args[0], args[1])

        return a(a, b), codegen

    op.__doc__ = meaning
    return op


add = _lanewise("add", "fadd", "a + b; integers wrap around.")
sub = _lanewise("sub", "fsub", "a - b; integers wrap around.")
mul = _lanewise("mul", "fmul", "a * b; integers wrap around.")
div = _lanewise(None, "fdiv", "a / b, rounded once.")


def _with_literal(name: str, meaning: str):
    """op(v, literal) of integer lanes."""

    @intrinsic(prefer_literal=True)
    def op(typingctx, v, literal):
        if not isinstance(literal, types.IntegerLiteral):
            return None
        value = literal.literal_value

        def codegen(context, builder, sig, args):
            ty = args[0].type
            return getattr(builder, name)(args[0], ir.Constant(ty, [ir.Constant(ty.element, value)] * ty.count))

        return v(v, literal), codegen

    op.__doc__ = meaning
    return op


and_ = _with_literal("and_", "Every lane & a literal.")
shl = _with_literal("shl", "Every lane << a literal.")
lshr = _with_literal("lshr", "Every lane >> a literal, zeros coming in.")
ashr = _with_literal("ashr", "Every lane >> a literal, the sign coming in.")


def _of_floats(name: str, meaning: str):
    """op(v) of float32 lanes by an LLVM intrinsic."""

    @intrinsic
    def op(typingctx, v):
        def codegen(context, builder, sig, args):
            return call(builder, f"llvm.{name}.v{v.n}f32", args[0].type, [args[0]])

        return v(v), codegen

    op.__doc__ = meaning
    return op


absolute = _of_floats("fabs", "|v|.")
rint = _of_floats("rint", "v rounded to an integer, half to even.")


def _larger(ordering: str, meaning: str):
    @intrinsic
    def op(typingctx, a, b):
        def codegen(context, builder, sig, args):
            return builder.select(builder.fcmp_ordered(ordering, args[0], args[1]), args[0], args[1])

        return a(a, b), codegen

    op.__doc__ = meaning
    return op


maximum = _larger(">", "a where a > b, else b, of float32 lanes; so b where either is NaN.")
minimum = _larger("<", "a where a < b, else b, of float32 lanes; so b where either is NaN.")


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c of float32 lanes, rounded once."""

    def codegen(context, builder, sig, args):
        return call(builder, f"llvm.fma.v{a.n}f32", args[0].type, list(args))

    return a(a, b, c), codegen


def _conversion(name: str, lane: str, meaning: str):
    """op(v) -> as many lanes of another kind, by one LLVM instruction."""

    @intrinsic
    def op(typingctx, v):
        def codegen(context, builder, sig, args):
            return getattr(builder, name)(args[0], vector(v.n, lane))

        return Vec(v.n, lane)(v), codegen

    op.__doc__ = meaning
    return op


to_floats = _conversion("sitofp", "f32", "Integer lanes as float32 lanes of the same values, rounded to nearest.")
to_ints = _conversion("fptosi", "i32", "float32 lanes within int32's range as int32 lanes, towards zero.")
to_bytes = _conversion("trunc", "i8", "The low byte of int32 lanes.")
as_floats = _conversion("bitcast", "f32", "The bits of int32 lanes as float32 lanes.")
as_ints = _conversion("bitcast", "i32", "The bits of float32 lanes as int32 lanes.")


@intrinsic
def join(typingctx, a, b):
    """Two vectors one after the other: 256 + 256 -> 512 bits."""

    def codegen(context, builder, sig, args):
        return lanes_from(builder, args[0], args[1], 0, 2 * a.n)

    return Vec(2 * a.n, a.lane)(a, b), codegen


def _fold(context_op: Callable[[Any, Any, Any], Any], meaning: str):
    """fold(v) -> a scalar: the upper half of the lanes is folded onto the lower until one is left."""

    @intrinsic
    def fold(typingctx, v):
        def codegen(context, builder, sig, args):
            x, n = args[0], v.n
            while n > 1:
                n //= 2
                x = context_op(builder, lanes_from(builder, x, x, 0, n), lanes_from(builder, x, x, n, n))
            return builder.extract_element(x, I32(0))

        return (types.float32 if v.lane == "f32" else types.int32)(v), codegen

    fold.__doc__ = meaning
    return fold


def _add_any(builder, a, b):
    return builder.fadd(a, b) if a.type.element == LANES["f32"] else builder.add(a, b)


sum_lanes = _fold(_add_any, "The sum of all lanes, int32 or float32; in halves, which fixes the order of float sums.")
max_lanes = _fold(
    lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b), "The largest of float32 lanes."
)


def _plain_fold(op: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    def fold(v):
        while len(v) > 1:
            v = op(v[: len(v) // 2], v[len(v) // 2 :])
        return v[0]

    return fold


def _plain_fma(a, b, c):
    # float64 holds the product exactly; its sum may be rounded twice, which the test's numbers avoid.
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


# What the operations on registers compute, on arrays [n] of the lanes.
PLAIN: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "and_": lambda v, literal: (v.view(np.uint32) & np.uint32(literal)).view(np.int32),
    "shl": lambda v, literal: v << literal,
    "lshr": lambda v, literal: (v.view(np.uint32) >> np.uint32(literal)).view(np.int32),
    "ashr": lambda v, literal: v >> literal,
    "absolute": np.abs,
    "rint": np.rint,
    "maximum": lambda a, b: np.where(a > b, a, b),
    "minimum": lambda a, b: np.where(a < b, a, b),
    "fma": _plain_fma,
    "to_floats": lambda v: v.astype(np.float32),
    "to_ints": lambda v: v.astype(np.int32),
    "to_bytes": lambda v: v.astype(np.int8),
    "as_floats": lambda v: v.view(np.float32),
    "as_ints": lambda v: v.view(np.int32),
    "join": lambda a, b: np.concatenate([a, b]),
    "sum_lanes": _plain_fold(lambda a, b: a + b),
    "max_lanes": _plain_fold(np.maximum),
}
