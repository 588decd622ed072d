"""Dot products of bytes: the one operation for which instruction sets differ.

    dot4(isa, acc, codes, q)    acc + codes . q, four bytes a 32-bit lane, exact, by the instruction that `isa` names
    pairs_avx2, add16, widen16  the same in three steps of AVX2, which has no such instruction: sums of two products in
                                16 bits, more of those added, and at last two of these sums added to 32 bits

`codes` are unsigned bytes up to 192 (a code as it lies in its byte, masked: code * 64 is the largest), `q` signed
ones; both are int32 lanes of four bytes. Exceptions, where codes must stay below 128: "dotprod" reads them as signed
bytes, and `pairs_avx2` saturates its sums of two products (2 * 127 * 128 = 32,512 just fits).
"""

from llvmlite import ir
from numba.extending import intrinsic

from bitnet_numba.kernels.cpu import vec

# LLVM has taken vpdpbusd's bytes as lanes of int32 or of int8, by version; it understands the former in every version.
_INSTRUCTIONS = {  # name in LLVM, lanes of the widest register, lane of its operands
    "vnni512": ("llvm.x86.avx512.vpdpbusd.{bits}", 16, "i32"),
    "vnni256": ("llvm.x86.avx512.vpdpbusd.{bits}", 8, "i32"),
    "i8mm": ("llvm.aarch64.neon.usdot.v4i32.v16i8", 4, "i8"),
    "dotprod": ("llvm.aarch64.neon.sdot.v4i32.v16i8", 4, "i8"),
}
_HALVES, _BYTES = ir.VectorType(ir.IntType(16), 16), ir.VectorType(ir.IntType(8), 32)  # of a ymm register


def emit_dot4(builder, isa: str, acc, codes, q):
    """The LLVM value of acc + codes . q; registers wider than the machine's are taken apart and put together."""
    if isa not in _INSTRUCTIONS:
        return _plain_dot4(builder, acc, codes, q)
    name, lanes, operand = _INSTRUCTIONS[isa]
    n = acc.type.count
    if n > lanes:
        parts = [
            emit_dot4(builder, isa, *(vec.lanes_from(builder, v, v, first, n // 2) for v in (acc, codes, q)))
            for first in (0, n // 2)
        ]
        return vec.lanes_from(builder, parts[0], parts[1], 0, n)
    if operand == "i8":
        codes, q = (builder.bitcast(v, vec.vector(4 * n, "i8")) for v in (codes, q))
    return vec.call(builder, name.format(bits=32 * n), acc.type, [acc, codes, q])


def _plain_dot4(builder, acc, codes, q):
    """Any CPU: even and odd bytes as 16-bit lanes, products in 32 bits, neighbours added (x86: pmaddwd)."""
    n = acc.type.count
    halves, wide = vec.vector(2 * n, "i16"), vec.vector(2 * n, "i32")
    eight, low = (ir.Constant(halves, [value] * (2 * n)) for value in (8, 0x00FF))
    codes, q = builder.bitcast(codes, halves), builder.bitcast(q, halves)
    bytes_of = (
        (builder.and_(codes, low), builder.ashr(builder.shl(q, eight), eight)),
        (builder.lshr(codes, eight), builder.ashr(q, eight)),
    )
    for a, b in bytes_of:
        products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
        for first in (0, 1):
            every_second = ir.Constant(ir.VectorType(vec.I32, n), list(range(first, 2 * n, 2)))
            acc = builder.add(acc, builder.shuffle_vector(products, products, every_second))
    return acc


@intrinsic
def dot4(typingctx, isa, acc, codes, q):
    """acc + the sum of four products of unsigned bytes (codes, up to 192) and signed bytes (q) in every int32 lane."""

    def codegen(context, builder, sig, args):
        return emit_dot4(builder, isa.isa, *args[1:])

    return acc(isa, acc, codes, q), codegen


def emit_pairs_avx2(builder, codes, q):
    """The LLVM value of `pairs_avx2`."""
    operands = [builder.bitcast(v, _BYTES) for v in (codes, q)]
    return builder.bitcast(vec.call(builder, "llvm.x86.avx2.pmadd.ub.sw", _HALVES, operands), codes.type)


def emit_add16(builder, a, b):
    """The LLVM value of `add16`."""
    halves = vec.vector(2 * a.type.count, "i16")
    return builder.bitcast(builder.add(*(builder.bitcast(v, halves) for v in (a, b))), a.type)


def emit_widen16(builder, acc, pairs):
    """The LLVM value of `widen16`."""
    operands = [builder.bitcast(pairs, _HALVES), ir.Constant(_HALVES, [1] * 16)]
    return builder.add(acc, vec.call(builder, "llvm.x86.avx2.pmadd.wd", acc.type, operands))


@intrinsic
def pairs_avx2(typingctx, codes, q):
    """codes . q in pairs of bytes: sixteen 16-bit sums, saturated, in eight int32 lanes. vpmaddubsw."""

    def codegen(context, builder, sig, args):
        return emit_pairs_avx2(builder, *args)

    return codes(codes, q), codegen


@intrinsic
def add16(typingctx, a, b):
    """a + b as 16-bit lanes, two in an int32 lane."""

    def codegen(context, builder, sig, args):
        return emit_add16(builder, *args)

    return a(a, b), codegen


@intrinsic
def widen16(typingctx, acc, pairs):
    """acc + the two signed 16-bit halves of every int32 lane of pairs. vpmaddwd with ones, vpaddd."""

    def codegen(context, builder, sig, args):
        return emit_widen16(builder, *args)

    return acc(acc, pairs), codegen
