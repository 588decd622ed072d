"""The key-value cache: its layout, and the kernel that appends the tokens of a pass.

Keys (rotated) and values have one of the types in `kv_dtype`, two numbers of 16 bits in an int32 word. A sequence lives
in a slot; its tokens lie in pages of PAGE tokens, which its row of the block table lists in order:

    page of token t             block_table[slot * block_table_stride + t // PAGE]
    first word of its head g    page * page_words + g * head_words + t % PAGE * WORDS       WORDS = token_words

    keys (values alike)                    one page, one head: PAGE tokens of WORDS words
    +----------+----------+---             +-------------------------------+
    | page 0   | page 1   | ...            | token 0   d0 d1 | d2 d3 | .. 0 |      a word holds two dimensions, the
    +----------+----------+---             | token 1                       |      first in its lower half; what pads
    |g0|g1|..|G| page_words                | ...                  token 63 |      head_dim to 8 is zero
    +--------+-+                           +-------------------------------+
                                           | float8: PAGE scales, float32  |
                                           +-------------------------------+

Two arrangements follow this one formula:

    a pool that slots share    pages as drawn: page_words = G * PAGE * WORDS, head_words = PAGE * WORDS
    one sequence (`decode`)    [G, capacity, WORDS], capacity a multiple of PAGE: block_table = 0, 1, 2, ...,
                               page_words = PAGE * WORDS, head_words = capacity * WORDS
    (of float8, WORDS + 1 here, for the scales)

`slot_positions`, int32 [num_tokens, 2], says which (slot, position) each token of a pass has; slot -1 marks one that is
not used.

Tokens of a prompt are stored by `append` before attention reads them: a block is a token, a thread a word of its keys
and of its values; of float8, a warp has a whole vector, whose largest number it looks for. `paged_decode` stores its
new tokens itself, the same bits, which spares a launch.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.kv_dtype import (
    DEFAULT,
    KV_BYTES,
    KVDtype,
    float8_inverse,
    float8_scale,
    float8_word,
    magnitude_bits,
    stored_function,
)
from bitnet_numba.kernels.attention.parts import (
    LANE_DIMS,
    HeadShape,
    RopeTables,
    check_head,
    rotate_pair,
)
from bitnet_numba.kernels.operands import checked
from bitnet_numba.kernels.ptx.base import WARP, float32, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec

PAGE = 64  # tokens
PAGE_BITS = PAGE.bit_length() - 1
APPEND_THREADS = 256


def token_words(head_dim: int, dtype: KVDtype = DEFAULT) -> int:
    """int32 words of one token's key, or value, of one head: whole loads of 16 bytes, and of eight numbers."""
    numbers = max(LANE_DIMS, 16 // KV_BYTES[dtype])
    return -(-head_dim // numbers) * numbers * KV_BYTES[dtype] // 4


class LayerCache(NamedTuple):
    """One layer's keys and values, and where each slot's pages are."""

    keys: Any  # int32
    values: Any  # int32, of the same size
    block_table: Any  # int32 [slots, block_table_stride]
    block_table_stride: int  # pages that a slot can have
    page_words: int
    head_words: int
    dtype: KVDtype = DEFAULT


def head_page_words(head_dim: int, dtype: KVDtype) -> int:
    """int32 words of one page of one head's keys, or values."""
    return PAGE * (token_words(head_dim, dtype) + (dtype == "float8"))


def pool_strides(num_kv_heads: int, head_dim: int, dtype: KVDtype = DEFAULT) -> tuple[int, int]:
    """(page_words, head_words) of a pool of pages that slots share."""
    words = head_page_words(head_dim, dtype)
    return num_kv_heads * words, words


def sequence_strides(capacity: int, head_dim: int, dtype: KVDtype = DEFAULT) -> tuple[int, int]:
    """(page_words, head_words) of one sequence of `capacity` tokens, a multiple of PAGE; its block table is 0, 1, 2,
    ...
    Raises ValueError for another capacity."""
    if capacity < PAGE or capacity % PAGE:
        raise ValueError(f"a sequence's capacity is a multiple of {PAGE} tokens, not {capacity}")
    words = head_page_words(head_dim, dtype)
    return words, capacity // PAGE * words


_FLOATS, _WORDS = types.CPointer(types.float32), types.CPointer(types.int32)
PASS_SIGNATURE = (
    *(_FLOATS, _FLOATS, _FLOATS, _WORDS),  # qkv, cos, sin, slot_positions
    *(_WORDS, types.int32, _WORDS, _WORDS),  # block_table, block_table_stride, keys, values
    *(types.int32, types.int32),  # page_words, head_words
)


def pass_arguments(
    kernel: str,
    qkv: Any,
    rope: RopeTables,
    slot_positions: Any,
    cache: LayerCache,
    num_tokens: int,
    shape: HeadShape,
    **others: tuple[Any, int, str],
) -> tuple[tuple[Any, ...], list[DeviceArray]]:
    """Checks the operands of a pass of `num_tokens` tokens over a cache.

    Returns the arguments of PASS_SIGNATURE, and `others`, further operands as of `checked`, as DeviceArrays.
    Raises ValueError in one line that names the kernel.
    """
    shape.check(kernel)
    check_head(kernel, shape.head_dim, shape.group)
    if num_tokens < 1:
        raise ValueError(f"{kernel}: {num_tokens} tokens; at least one is needed")
    layer_words = max(
        cache.page_words, (shape.num_kv_heads - 1) * cache.head_words + head_page_words(shape.head_dim, cache.dtype)
    )
    problem = (
        f"a pass of {num_tokens} x {shape.num_heads} heads of {shape.head_dim}, {shape.num_kv_heads} key-value heads"
    )
    qkv, cos, sin, slot_positions, block_table, keys, values, *rest = checked(
        kernel,
        problem,
        qkv=(qkv, num_tokens * shape.qkv_size, "float32"),
        cos=(rope.cos, shape.head_dim // 2, "float32"),
        sin=(rope.sin, shape.head_dim // 2, "float32"),
        slot_positions=(slot_positions, 2 * num_tokens, "int32"),
        block_table=(cache.block_table, cache.block_table_stride, "int32"),
        keys=(cache.keys, layer_words, "int32"),
        values=(cache.values, layer_words, "int32"),
        **others,
    )
    for name, a, b in (("sin", cos, sin), ("values", keys, values)):
        if a.size != b.size:
            raise ValueError(f"{kernel}: {name} holds {b.size} elements, not {a.size}")
    table = (block_table, cache.block_table_stride, keys, values, cache.page_words, cache.head_words)
    return (qkv, cos, sin, slot_positions, *table), rest


def make_append(arch: int, head_dim: int, threads: int, dtype: KVDtype) -> Callable[..., None]:
    """The kernel for a head size and a type of the cache of 16 or 32 bits."""
    stored = stored_function(dtype)
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    D, HALF, WORDS = head_dim, head_dim // 2, token_words(head_dim, dtype)
    STRIDE, NUMBERS = np.int32(threads), 4 // KV_BYTES[dtype]  # an int32 bound makes an int32 loop
    ZERO = float32(0)

    def append(
        qkv, cos, sin, slot_positions, block_table, block_table_stride, keys, values, page_words, head_words,
        num_heads, num_kv_heads,
    ):  # fmt: skip
        token = int32(cuda.blockIdx.x)
        release()
        wait()
        slot, position = int32(slot_positions[int32(2 * token)]), int32(slot_positions[int32(2 * token + 1)])
        if slot < 0:
            return
        page = int64(block_table[int64(slot) * block_table_stride + (position >> PAGE_BITS)])
        token_wr = page * page_words + (position & (PAGE - 1)) * WORDS
        k_rd = int64(token) * int32(int32(num_heads + 2 * num_kv_heads) * D) + int32(num_heads * D)
        v_rd = k_rd + int32(num_kv_heads * D)
        angle = int64(position) * HALF
        for i in range(int32(cuda.threadIdx.x), int32(num_kv_heads * WORDS), STRIDE):
            head = ptx.udiv(i, int32(WORDS))
            word = int32(i - head * WORDS)
            d = int32(NUMBERS * word)
            k0 = k1 = v0 = v1 = ZERO
            if d < D:
                first = int32(head * D)
                for half in range(NUMBERS):
                    j = int32(d + half)
                    pair = j if j < HALF else int32(j - HALF)
                    x0, x1 = qkv[k_rd + first + pair], qkv[k_rd + first + pair + HALF]
                    y0, y1 = rotate_pair(x0, x1, cos[angle + pair], sin[angle + pair])
                    k = y0 if j < HALF else y1
                    v = qkv[v_rd + first + j]
                    if half == 0:
                        k0, v0 = k, v
                    else:
                        k1, v1 = k, v
            wr = token_wr + int64(head) * head_words + word
            keys[wr] = stored(k0, k1)
            values[wr] = stored(v0, v1)

    return append


def make_append_float8(arch: int, head_dim: int, threads: int) -> Callable[..., None]:
    """The kernel for a cache of float8."""
    wait, release, warp_max = ptx.pdl_wait(arch), ptx.pdl_trigger(arch), ptx.warp_max_int(arch)
    D, HALF, WORDS = head_dim, head_dim // 2, token_words(head_dim, "float8")
    ROUNDS, WARPS = -(-WORDS // WARP), np.int32(threads // WARP)
    REGS = 4 * ROUNDS
    ZERO = float32(0)

    def append_float8(
        qkv, cos, sin, slot_positions, block_table, block_table_stride, keys, values, page_words, head_words,
        num_heads, num_kv_heads,
    ):  # fmt: skip
        x_r = cuda.local.array(REGS, float32)
        token, tid = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        warp, lane = int32(tid >> 5), int32(tid & 31)
        release()
        wait()
        slot, position = int32(slot_positions[int32(2 * token)]), int32(slot_positions[int32(2 * token + 1)])
        if slot < 0:
            return
        page = int64(block_table[int64(slot) * block_table_stride + (position >> PAGE_BITS)])
        within = position & (PAGE - 1)
        first = int64(token) * int32(int32(num_heads + 2 * num_kv_heads) * D) + int32(num_heads * D)
        angle = int64(position) * HALF
        for vector in range(warp, int32(2 * num_kv_heads), WARPS):  # keys, then values
            is_key = vector < num_kv_heads
            rd = first + int32(vector * D)
            largest = int32(0)
            for n in range(ROUNDS):
                for i in range(4):
                    d = int32(4 * (lane + n * WARP) + i)
                    x = ZERO
                    if d < D:
                        x = qkv[rd + d]
                        if is_key:
                            pair = d if d < HALF else int32(d - HALF)
                            y0, y1 = rotate_pair(
                                qkv[rd + pair], qkv[rd + pair + HALF], cos[angle + pair], sin[angle + pair]
                            )
                            x = y0 if d < HALF else y1
                    x_r[4 * n + i] = x
                    largest = max(largest, magnitude_bits(x))
            scale = float8_scale(warp_max(largest))
            inverse = float8_inverse(scale)
            head = vector if is_key else int32(vector - num_kv_heads)
            at = page * page_words + int64(head) * head_words
            for n in range(ROUNDS):
                word = int32(lane + n * WARP)
                if word < WORDS:
                    i = 4 * n
                    packed = float8_word(x_r[i], x_r[i + 1], x_r[i + 2], x_r[i + 3], inverse)
                    if is_key:
                        keys[at + (within * WORDS + word)] = packed
                    else:
                        values[at + (within * WORDS + word)] = packed
            if lane == 0:
                if is_key:
                    keys[at + (PAGE * WORDS + within)] = int32(ptx.float_to_bits(scale))
                else:
                    values[at + (PAGE * WORDS + within)] = int32(ptx.float_to_bits(scale))

    return append_float8


@cache
def append_spec(arch: int, head_dim: int, dtype: KVDtype = DEFAULT, threads: int = APPEND_THREADS) -> KernelSpec:
    """The variant for a head size and a type of the cache. Raises ValueError for a head size that is odd or over
    MAX_HEAD_DIM."""
    check_head("append", head_dim, 1)
    signature = (*PASS_SIGNATURE, types.int32, types.int32)
    if dtype == "float8":
        kernel = make_append_float8(arch, head_dim, threads)
    else:
        kernel = make_append(arch, head_dim, threads, dtype)
    return KernelSpec(f"append[{head_dim}, {dtype}, {threads}]", kernel, signature, threads)


def append(
    device: Device,
    qkv: Any,
    rope: RopeTables,
    slot_positions: Any,
    cache: LayerCache,
    num_tokens: int,
    shape: HeadShape,
    *,
    use_pdl: bool = True,
) -> Launch:
    """Rotates the keys of `num_tokens` tokens and stores their keys and values at their positions.

    qkv float32 [num_tokens, shape.qkv_size]; rope: the angles of every position; slot_positions int32 [num_tokens, 2];
    cache: the block table lists the pages of these positions. Tokens of slot -1 are not stored.
    Raises ValueError if an operand is too small or of another dtype.
    """
    arguments, _ = pass_arguments("append", qkv, rope, slot_positions, cache, num_tokens, shape)
    spec = append_spec(device.arch, shape.head_dim, cache.dtype)
    return device.launch(spec, num_tokens, (*arguments, shape.num_heads, shape.num_kv_heads), use_pdl)
