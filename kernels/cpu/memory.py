"""Single numbers in memory, and prefetches; see `vec` for addresses and offsets."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_numba.kernels.cpu import vec

L2 = 2  # LLVM's locality of a prefetch: the second cache (into the first, it was a third slower)


def _scalar_load(ty: ir.Type, result: types.Type):
    """load(address, offset) -> one number from memory."""

    @intrinsic
    def load(typingctx, address, offset):
        def codegen(context, builder, sig, args):
            value = builder.load(vec.pointer_to(context, builder, sig, args, ty), align=1)
            return builder.sext(value, ir.IntType(64)) if ty == vec.I32 else value

        return result(address, offset), codegen

    return load


load_i32 = _scalar_load(vec.I32, types.int64)
load_i64, load_f64 = _scalar_load(ir.IntType(64), types.int64), _scalar_load(ir.DoubleType(), types.float64)


@intrinsic
def store_integer(typingctx, address, offset, value):
    """Writes one integer of its own size to memory."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], vec.pointer_to(context, builder, sig, args, args[2].type), align=1)
        return context.get_dummy_value()

    return types.void(address, offset, value), codegen


@intrinsic
def prefetch(typingctx, address, lines):
    """Asks for as many cache lines, which are needed soon, as `lines` has numbers. Any address is allowed."""

    def codegen(context, builder, sig, args):
        ty = ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [ty, vec.I32, vec.I32, vec.I32])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0i8")
        for i in range(len(lines)):
            line = pointer_at(builder, args[0], 64 * i, ir.IntType(8))
            builder.call(function, [line, vec.I32(0), vec.I32(L2), vec.I32(1)])  # for reading, as data
        return context.get_dummy_value()

    return types.void(types.intp, lines), codegen


def pointer_at(builder, address, offset: int, ty):
    """A pointer to what lies a constant offset behind an address."""
    return builder.inttoptr(builder.add(address, address.type(offset)), ty.as_pointer())


def load_at(builder, address, offset: int, ty):
    """Loads at a constant offset behind an address."""
    return builder.load(pointer_at(builder, address, offset, ty), align=1)
