"""Single numbers in memory, and prefetches; see `vec` for addresses and offsets."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_numba.kernels.cpu import vec

L2 = 2  # LLVM's locality of a prefetch: the second cache (into the first, it was a third slower)
F64 = ir.DoubleType()


def _load(ty: ir.Type, number: types.Type):
    """load(address, offset) -> one number from memory."""

    @intrinsic
    def load(typingctx, address, offset):
        def codegen(context, builder, sig, args):
            return builder.load(vec.pointer_to(context, builder, sig, args, ty), align=1)

        return number(address, offset), codegen

    return load


def _store(ty: ir.Type, number: types.Type):
    """store(address, offset, value): one number to memory; integers keep their low bits."""

    @intrinsic
    def store(typingctx, address, offset, value):
        def codegen(context, builder, sig, args):
            converted = context.cast(builder, args[2], sig.args[2], number)
            builder.store(converted, vec.pointer_to(context, builder, sig, args, ty), align=1)
            return context.get_dummy_value()

        return types.void(address, offset, value), codegen

    return store


load_i8, load_u16 = _load(vec.LANES["i8"], types.int8), _load(vec.LANES["i16"], types.uint16)
load_i32, load_i64 = _load(vec.I32, types.int32), _load(ir.IntType(64), types.int64)
load_f32, load_f64 = _load(vec.LANES["f32"], types.float32), _load(F64, types.float64)
store_i8, store_i32 = _store(vec.LANES["i8"], types.int8), _store(vec.I32, types.int32)
store_i64 = _store(ir.IntType(64), types.int64)
store_f32, store_f64 = _store(vec.LANES["f32"], types.float32), _store(F64, types.float64)


@intrinsic
def prefetch(typingctx, address, lines):
    """Asks for as many cache lines, which are needed soon, as `lines` has numbers. Any address is allowed."""

    def codegen(context, builder, sig, args):
        emit_prefetch(builder, args[0], len(lines))
        return context.get_dummy_value()

    return types.void(types.intp, lines), codegen


def emit_prefetch(builder, address, lines: int):
    """Asks for so many cache lines from an address on."""
    signature = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), vec.I32, vec.I32, vec.I32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    for i in range(lines):
        line = pointer_at(builder, address, 64 * i, ir.IntType(8))
        builder.call(function, [line, vec.I32(0), vec.I32(L2), vec.I32(1)])  # for reading, as data


def pointer_at(builder, address, offset: int, ty):
    """A pointer to what lies a constant offset behind an address."""
    return builder.inttoptr(builder.add(address, address.type(offset)), ty.as_pointer())


def load_at(builder, address, offset: int, ty):
    """Loads at a constant offset behind an address."""
    return builder.load(pointer_at(builder, address, offset, ty), align=1)
