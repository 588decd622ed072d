"""The cache of keys and values: its layout, and storing a token.

A page holds PAGE tokens of every layer; the block table of a sequence (int32) says which page holds its tokens
64 i .. 64 i + 63. Neighbouring dimensions 2j and 2j + 1 are a pair; 16 pairs are a unit, which is read at once.

    page      layer 0 | layer 1 | ...      layer      keys of head 0 | head 1 | ... | values of head 0 | head 1 | ...
    keys      of one page and head: pairs [D / 2][64 tokens]    lanes are tokens: no sums across lanes for scores
    values    of one page and head: pairs [64 tokens][Dp / 2]   lanes are dimensions; Dp is D rounded up to 32

    unit      bfloat16 (uint16):  d0 d1 | d0 d1 | ... 16 words of 32 bits      << 16 makes a float32 of the even one,
              float32:            16 x d0, then 16 x d1                        & 0xffff0000 of the odd one

All sizes are multiples of 64 bytes. Start the cache at one: reading twice as many cache lines takes twice the time.
Nothing need be initialised, but subnormal garbage behind D would be slow on some CPUs, so zeros are best.

`dtype` is np.uint16 (bfloat16 bits) or np.float32: a type to the compiler, which makes machine code for each.
"""

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload, register_jitable

from bitnet_numba.kernels.cpu import vec
from bitnet_numba.kernels.cpu.memory import load_at, load_f32, load_i32, store_f32, store_i32

PAGE = 64  # tokens
PAIRS = 16  # to a unit
FLOATS = vec.Vec(16, "f32")


# ---- Sizes, for the host and for kernels ----------------------------------------------------------------------------


def pair_bytes(dtype):
    """Bytes of a pair of numbers."""
    return 2 * np.dtype(dtype).itemsize


@overload(pair_bytes, inline="always")
def _pair_bytes(dtype):
    return (lambda dtype: 4) if dtype.dtype == types.uint16 else (lambda dtype: 8)


@register_jitable
def units_of(D):
    """Units that hold one token's value."""
    return (D + 31) // 32


@register_jitable
def key_bytes(dtype, D):
    """Bytes of the keys of one page and head."""
    return PAGE * (D // 2) * pair_bytes(dtype)


@register_jitable
def value_bytes(dtype, D):
    """Bytes of the values of one page and head."""
    return PAGE * units_of(D) * PAIRS * pair_bytes(dtype)


@register_jitable
def layer_bytes(dtype, kv_heads, D):
    """Bytes of one layer in a page. Layer i starts i times that after the page's address."""
    return kv_heads * (key_bytes(dtype, D) + value_bytes(dtype, D))


# ---- Reading and writing pairs --------------------------------------------------------------------------------------


@intrinsic
def load_pairs(typingctx, dtype, base, unit, blocks):
    """Units unit, unit + 1, ... of a page's keys or values: (even 0, odd 0, even 1, odd 1, ...), float32."""
    half = dtype.dtype == types.uint16

    def codegen(context, builder, sig, args):
        words, floats = vec.vector(16, "i32"), vec.vector(16, "f32")
        index = context.cast(builder, args[2], sig.args[2], types.intp)
        address = builder.add(args[1], builder.mul(index, index.type(64 if half else 128)))
        found = []
        for i in range(len(blocks)):
            if half:
                w = load_at(builder, address, 64 * i, words)
                even = builder.shl(w, words([vec.I32(16)] * 16))
                odd = builder.and_(w, words([vec.I32(0xFFFF0000)] * 16))
                found += [builder.bitcast(even, floats), builder.bitcast(odd, floats)]
            else:
                found += [load_at(builder, address, 128 * i, floats), load_at(builder, address, 128 * i + 64, floats)]
        return context.make_tuple(builder, sig.return_type, found)

    return types.UniTuple(FLOATS, 2 * len(blocks))(dtype, types.intp, unit, blocks), codegen


@njit(**vec.OPTIONS)
def to_bfloat16(x):
    """The bits of the nearest bfloat16, ties to even, in an int32; NaN stays NaN."""
    bits = np.float32(x).view(np.uint32)
    if x != x:
        return np.int32(bits >> np.uint32(16) | np.uint32(0x40))
    odd = bits >> np.uint32(16) & np.uint32(1)
    return np.int32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


def store_pair(dtype, base, index, even, odd):
    """Writes pair number `index` of a page's keys or values."""
    raise NotImplementedError


@overload(store_pair)
def _store_pair(dtype, base, index, even, odd):
    def as_bfloat16(dtype, base, index, even, odd):
        store_i32(base, 4 * index, to_bfloat16(odd) << 16 | to_bfloat16(even))

    def as_float32(dtype, base, index, even, odd):
        at = index // PAIRS * 128 + index % PAIRS * 4
        store_f32(base, at, even)
        store_f32(base, at + 64, odd)

    return as_bfloat16 if dtype.dtype == types.uint16 else as_float32


# ---- A token --------------------------------------------------------------------------------------------------------


@njit(**vec.OPTIONS)
def rotate(source, target, D, cos, sin):
    """Rotary embedding of one head: float32 [D] at `source` to `target`, which may be the same.

    cos, sin: addresses of the D / 2 values of the token's position, of pairs (x[j], x[j + D / 2])."""
    half = D // 2
    whole = half - half % 16
    for at in range(0, 4 * whole, 64):
        x0, x1 = vec.load_f32x16(source, at), vec.load_f32x16(source, at + 4 * half)
        c, s = vec.load_f32x16(cos, at), vec.load_f32x16(sin, at)
        vec.store(target, at, vec.sub(vec.mul(x0, c), vec.mul(x1, s)))
        vec.store(target, at + 4 * half, vec.add(vec.mul(x1, c), vec.mul(x0, s)))
    for at in range(4 * whole, 4 * half, 4):
        y0, y1 = load_f32(source, at), load_f32(source, at + 4 * half)
        c0, s0 = load_f32(cos, at), load_f32(sin, at)
        store_f32(target, at, y0 * c0 - y1 * s0)
        store_f32(target, at + 4 * half, y1 * c0 + y0 * s0)


@njit(**vec.OPTIONS)
def page_of(dtype, layer, page_stride, table, kv_heads, kv_head, D, position):
    """Addresses of the keys and of the values of the page that holds a position, of one kv head."""
    page = layer + load_i32(table, position // PAGE * 4) * page_stride
    values = page + kv_heads * key_bytes(dtype, D) + kv_head * value_bytes(dtype, D)
    return page + kv_head * key_bytes(dtype, D), values


@njit(**vec.OPTIONS)
def store_kv(dtype, layer, page_stride, table, kv_heads, kv_head, D, position, k, v):
    """Writes the key (rotated already) and the value of one token and kv head to the cache.

    layer: address of the layer in page 0; page_stride: bytes of a page; table: address of the sequence's pages, int32;
    k, v: addresses of float32 [D].
    """
    keys, values = page_of(dtype, layer, page_stride, table, kv_heads, kv_head, D, position)
    token = position % PAGE
    for i in range(D // 2):
        store_pair(dtype, keys, i * PAGE + token, load_f32(k, 8 * i), load_f32(k, 8 * i + 4))
    first = token * units_of(D) * PAIRS
    for i in range(D // 2):
        store_pair(dtype, values, first + i, load_f32(v, 8 * i), load_f32(v, 8 * i + 4))
