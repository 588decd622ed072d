"""Tiles of registers for attention: tuples of vectors [heads][units], and which sizes a machine's registers hold.

Tuples of numbers stand for sizes, by their length: `heads` = (0, 1, 2, 3) makes code for four heads.
"""

from numba import types
from numba.extending import intrinsic, overload

from bitnet_numba.kernels.cpu import vec
from bitnet_numba.kernels.cpu.isa import InstructionSetType
from bitnet_numba.kernels.cpu.kv_cache import FLOATS
from bitnet_numba.kernels.cpu.memory import load_at, pointer_at

# ---- Which tiles the registers hold ---------------------------------------------------------------------------------


def key_blocks(isa):
    """0, 1, ... for the units of a row of keys that are read together."""
    raise NotImplementedError


def value_heads(isa, heads):
    """0, 1, ... for the heads whose outputs are held at once, of 64 dimensions with 32 large registers, else of 32."""
    raise NotImplementedError


def value_units(isa):
    """0, 1, ... for the units of values that are read together."""
    raise NotImplementedError


def _has_large_registers(isa) -> bool:
    return isinstance(isa, InstructionSetType) and isa.isa == "vnni512"


@overload(key_blocks, inline="always")
def _key_blocks(isa):
    return (lambda isa: (0, 1, 2, 3)) if _has_large_registers(isa) else (lambda isa: (0,))


@overload(value_heads, inline="always")
def _value_heads(isa, heads):
    if _has_large_registers(isa):
        return lambda isa, heads: heads
    return (lambda isa, heads: (0,)) if len(heads) % 2 else (lambda isa, heads: (0, 1))


@overload(value_units, inline="always")
def _value_units(isa):
    return (lambda isa: (0, 1)) if _has_large_registers(isa) else (lambda isa: (0,))


# ---- Tiles: tuples of registers -------------------------------------------------------------------------------------


@intrinsic
def zero_tile(typingctx, heads, blocks):
    """[heads][blocks] registers of zeros."""

    def codegen(context, builder, sig, args):
        return context.get_constant_null(sig.return_type)

    return types.UniTuple(FLOATS, len(heads) * len(blocks))(heads, blocks), codegen


def _multiply_add(context, builder, tile, i: int, a, b):
    old = builder.extract_value(tile, i)
    new = vec.call(builder, "llvm.fma.v16f32", old.type, [a, b, old])
    return builder.insert_value(tile, new, i)


@intrinsic
def add_scores(typingctx, tile, keys, q, stride):
    """tile[h][i] += keys[2i] * q[h][0], then keys[2i + 1] * q[h][1]; q: an address of float32, rows a stride apart."""

    def codegen(context, builder, sig, args):
        result, address = args[0], args[2]
        blocks = keys.count // 2
        for h in range(tile.count // blocks):
            for odd in range(2):
                b = vec.splat_of(builder, load_at(builder, address, 4 * odd, vec.LANES["f32"]), 16)
                for i in range(blocks):
                    a = builder.extract_value(args[1], 2 * i + odd)
                    result = _multiply_add(context, builder, result, h * blocks + i, a, b)
            address = builder.add(address, args[3])
        return result

    return tile(tile, keys, types.intp, types.intp), codegen


@intrinsic
def add_weighted(typingctx, tile, values, p, stride):
    """tile[h][i] += values[i] * p[h], with one float32 p at an address, the next a stride away."""

    def codegen(context, builder, sig, args):
        result, address = args[0], args[2]
        n = values.count
        for h in range(tile.count // n):
            b = vec.splat_of(builder, load_at(builder, address, 0, vec.LANES["f32"]), 16)
            for i in range(n):
                result = _multiply_add(context, builder, result, h * n + i, builder.extract_value(args[1], i), b)
            address = builder.add(address, args[3])
        return result

    return tile(tile, values, types.intp, types.intp), codegen


@intrinsic
def scaled_tile(typingctx, heads, units, address, stride, factors):
    """Outputs in memory, rows a stride apart, each times its vector of factors (64 bytes apart)."""
    tile = types.UniTuple(FLOATS, len(heads) * 2 * len(units))

    def codegen(context, builder, sig, args):
        floats, row = vec.vector(16, "f32"), args[2]
        found = []
        for h in range(len(heads)):
            factor = load_at(builder, args[4], 64 * h, floats)
            found += [builder.fmul(load_at(builder, row, 64 * i, floats), factor) for i in range(2 * len(units))]
            row = builder.add(row, args[3])
        return context.make_tuple(builder, sig.return_type, found)

    return tile(heads, units, types.intp, types.intp, types.intp), codegen


@intrinsic
def store_tile(typingctx, heads, tile, address, stride):
    """Writes each head's registers one after the other, heads a stride apart."""

    def codegen(context, builder, sig, args):
        row, n = args[2], tile.count // len(heads)
        for h in range(len(heads)):
            for i in range(n):
                value = builder.extract_value(args[1], h * n + i)
                builder.store(value, pointer_at(builder, row, 64 * i, value.type), align=1)
            row = builder.add(row, args[3])
        return context.get_dummy_value()

    return types.void(heads, tile, types.intp, types.intp), codegen


@intrinsic
def first_lanes(typingctx, v, count, other):
    """Lanes 0 .. count - 1 of v; in the lanes from there on, `other`."""

    def codegen(context, builder, sig, args):
        integers = vec.vector(16, "i32")
        n = vec.splat_of(builder, context.cast(builder, args[1], sig.args[1], types.int32), 16)
        inside = builder.icmp_signed("<", integers([vec.I32(i) for i in range(16)]), n)
        return builder.select(inside, args[0], args[2])

    return v(v, count, other), codegen


@intrinsic
def store_interleaved(typingctx, address, offset, even, odd):
    """Writes 32 float32: even 0, odd 0, even 1, odd 1, ..."""

    def codegen(context, builder, sig, args):
        order = [lane for i in range(16) for lane in (i, 16 + i)]
        mask = vec.vector(32, "i32")([vec.I32(lane) for lane in order])
        both = builder.shuffle_vector(args[2], args[3], mask)
        builder.store(both, vec.pointer_to(context, builder, sig, args, both.type), align=1)
        return context.get_dummy_value()

    return types.void(address, offset, even, odd), codegen
