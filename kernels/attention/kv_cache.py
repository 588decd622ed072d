"""The key-value cache of many sequences: its layout, and the kernel that appends the tokens of a pass.

Keys (rotated) and values are bfloat16, two in an int32 word. A sequence ("slot") has its tokens in pages of PAGE:

    page of token t             table[slot * table_stride + t // PAGE]
    first word of its head g    page * page_words + g * head_words + t % PAGE * WORDS       WORDS = padded_head_dim / 2

    keys (values alike)                    one page, one head: PAGE tokens of WORDS words
    +----------+----------+---             +-------------------------------+
    | page 0   | page 1   | ...            | token 0   d0 d1 | d2 d3 | .. 0 |      a word holds two dimensions, the
    +----------+----------+---             | token 1                       |      first in its lower half; what pads
    |g0|g1|..|G| page_words                | ...                  token 63 |      head_dim to 8 is zero
    +--------+-+                           +-------------------------------+

Two arrangements follow the one formula. A pool that slots share: pages as drawn, page_words = G * PAGE * WORDS and
head_words = PAGE * WORDS. One sequence alone, as kernels/attention.py has it: [G, capacity, WORDS], capacity a multiple
of PAGE; its table is 0, 1, 2, ..., page_words = PAGE * WORDS and head_words = capacity * WORDS.

Which token a row of a pass is, `where` tells: int32 [rows, 2], (slot, position); slot -1 is a row that nobody uses.

Tokens of a prompt are stored by `append`, before attention reads them. A block is a row, a thread a word of a head, of
its key and of its value. It moves 20 bytes a word; its time is that of a launch. In a pass of one new token a sequence
that launch is spared: there `attention_batch` stores the tokens itself, the same bits (`rotate_pair`, `stored_word`).
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.decode import MAX_HEAD_DIM, padded_head_dim
from bitnet_numba.kernels.ptx.base import device_function, float32, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec

PAGE = 64  # tokens
APPEND_THREADS = 256


def token_words(head_dim: int) -> int:
    """int32 words of one token's key, or value, of one head."""
    return padded_head_dim(head_dim) // 2


class LayerCache(NamedTuple):
    """One layer's cache, as launchers take it: keys and values int32, table int32 [slots, table_stride]."""

    keys: DeviceArray
    values: DeviceArray
    table: DeviceArray
    table_stride: int  # pages that a slot can have
    page_words: int
    head_words: int


def pool_strides(kv_heads: int, head_dim: int) -> tuple[int, int]:
    """(page_words, head_words) of a pool of pages that slots share."""
    return kv_heads * PAGE * token_words(head_dim), PAGE * token_words(head_dim)


def sequence_strides(capacity: int, head_dim: int) -> tuple[int, int]:
    """(page_words, head_words) of one sequence of `capacity` tokens, a multiple of PAGE; its table is 0, 1, 2, ..."""
    if capacity < PAGE or capacity % PAGE:
        raise ValueError(f"a sequence's capacity is a multiple of {PAGE} tokens, not {capacity}")
    return PAGE * token_words(head_dim), capacity * token_words(head_dim)


def check_sizes(
    what: str,
    qkv: DeviceArray,
    cos: DeviceArray,
    sin: DeviceArray,
    where: DeviceArray,
    cache: LayerCache,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    **others: tuple[DeviceArray, int],
) -> None:
    """What the launchers over this cache ask of their arguments; raises ValueError with the sizes that do not fit.

    others: further arrays, each with the elements that it needs.
    """
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{what} takes even head sizes up to {MAX_HEAD_DIM}, not {head_dim}")
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"{what}: {heads} heads cannot share {kv_heads} key-value heads evenly")
    if rows < 1:
        raise ValueError(f"{what}: {rows} rows; at least one is needed")
    if cache.keys.size != cache.values.size:
        raise ValueError(f"{what}: keys hold {cache.keys.size} words, values {cache.values.size}")
    last = PAGE * token_words(head_dim)
    least = max(cache.page_words, (kv_heads - 1) * cache.head_words + last)
    sizes = {
        "qkv": (qkv, rows * (heads + 2 * kv_heads) * head_dim),
        "where": (where, 2 * rows),
        "cos": (cos, head_dim // 2),
        "sin": (sin, cos.size),
        **others,
        "keys": (cache.keys, least),
        "table": (cache.table, cache.table_stride),
    }
    for name, (array, size) in sizes.items():
        if array.size < size:
            raise ValueError(f"{what}: {name} holds {array.size} elements, {size} are needed")


@device_function
def rotate_pair(x0, x1, cos, sin):
    """Two dimensions of a query or key that are half a head apart, turned by their angle."""
    return ptx.add_rn(ptx.mul_rn(x0, cos), ptx.mul_rn(-x1, sin)), ptx.add_rn(ptx.mul_rn(x1, cos), ptx.mul_rn(x0, sin))


@device_function
def stored_word(x0, x1):
    """Two neighbouring dimensions as a word of the cache."""
    return ptx.join_bf16(ptx.to_bf16(x0), ptx.to_bf16(x1))


def make_append(arch: int, head_dim: int, threads: int) -> Callable[..., None]:
    """The kernel for a head size."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    D, HALF, WORDS = head_dim, head_dim // 2, token_words(head_dim)
    STEP = np.int32(threads)
    ZERO = float32(0)

    def append(qkv, cos, sin, where, table, table_stride, keys, values, page_words, head_words, heads, kv_heads):
        row = int32(cuda.blockIdx.x)
        release()
        wait()
        slot, position = int32(where[int32(2 * row)]), int32(where[int32(2 * row + 1)])
        if slot < 0:
            return
        page = int64(table[int64(slot) * table_stride + (position >> 6)])
        token_wr = page * page_words + (position & (PAGE - 1)) * WORDS
        k_rd = int64(row) * int32(int32(heads + 2 * kv_heads) * D) + int32(heads * D)
        v_rd = k_rd + int32(kv_heads * D)
        angles = int64(position) * HALF
        for i in range(int32(cuda.threadIdx.x), int32(kv_heads * WORDS), STEP):
            head = ptx.udiv(i, int32(WORDS))
            word = int32(i - head * WORDS)
            d = int32(2 * word)
            k0 = k1 = v0 = v1 = ZERO
            if d < D:
                first = int32(head * D)
                for half in range(2):
                    j = int32(d + half)
                    turned = j if j < HALF else int32(j - HALF)
                    x0, x1 = qkv[k_rd + first + turned], qkv[k_rd + first + turned + HALF]
                    y0, y1 = rotate_pair(x0, x1, cos[angles + turned], sin[angles + turned])
                    k = y0 if j < HALF else y1
                    v = qkv[v_rd + first + j]
                    if half == 0:
                        k0, v0 = k, v
                    else:
                        k1, v1 = k, v
            wr = token_wr + int64(head) * head_words + word
            keys[wr] = stored_word(k0, k1)
            values[wr] = stored_word(v0, v1)

    assert PAGE == 64  # position >> 6
    return append


_FLOATS, _WORDS = types.CPointer(types.float32), types.CPointer(types.int32)
CACHE_SIGNATURE = (_WORDS, types.int32, _WORDS, _WORDS, types.int32, types.int32)  # table .. head_words
APPEND_SIGNATURE = (_FLOATS, _FLOATS, _FLOATS, _WORDS, *CACHE_SIGNATURE, types.int32, types.int32)


def cache_arguments(cache: LayerCache) -> tuple[DeviceArray, int, DeviceArray, DeviceArray, int, int]:
    """The kernels' arguments table, table_stride, keys, values, page_words, head_words."""
    return cache.table, cache.table_stride, cache.keys, cache.values, cache.page_words, cache.head_words


@cache
def append_spec(arch: int, head_dim: int, threads: int = APPEND_THREADS) -> KernelSpec:
    """The compiled form for a head size. Raises ValueError for an odd one, or one that attention does not take."""
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"append takes even head sizes up to {MAX_HEAD_DIM}, not {head_dim}")
    kernel = make_append(arch, head_dim, threads)
    return KernelSpec(f"append[{head_dim}, {threads}]", kernel, APPEND_SIGNATURE, threads)


def append(
    device: Device,
    qkv: DeviceArray,
    cos: DeviceArray,
    sin: DeviceArray,
    where: DeviceArray,
    cache: LayerCache,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    use_pdl: bool = True,
) -> Launch:
    """The launch that rotates the keys of `rows` rows and stores their keys and values at the rows' positions.

    qkv float32 [rows, (heads + 2 * kv_heads) * head_dim]; cos, sin float32 [positions, head_dim / 2]; where int32
    [rows, 2]; cache: pages of every position in `where` must be in its table. Rows of slot -1 store nothing.
    Raises ValueError with the sizes if they do not fit together.
    """
    check_sizes("append", qkv, cos, sin, where, cache, rows, heads, kv_heads, head_dim)
    arguments = (qkv, cos, sin, where, *cache_arguments(cache), heads, kv_heads)
    return device.launch(append_spec(device.arch, head_dim), rows, arguments, use_pdl)
