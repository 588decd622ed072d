"""A float8 cache's pages as float16, for attention of prompts: its kernels copy keys and values to shared memory as
they are, where 8 bits would have to become 16.

One layer's pages of float16 are kept beside the cache, at the same page numbers. Before each layer's attention the
pages of the pass's sequences are expanded, exactly (see `kv_dtype`): 3 bytes of traffic for each number, where
attention of more than a few tokens reads it many times.

    grid     any number of blocks; block b takes entries b, b + grid, ... of a list that the host writes for each pass
    thread   words of four float8: two words of float16
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.kv_cache import PAGE, LayerCache, token_words
from bitnet_numba.kernels.attention.kv_dtype import F8_SHIFT, float8_high, float8_low
from bitnet_numba.kernels.attention.parts import HeadShape, check_head
from bitnet_numba.kernels.operands import checked
from bitnet_numba.kernels.ptx.base import float32, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec

THREADS = 256
BLOCKS_PER_SM = 4


def make_expand(arch: int, head_dim: int, threads: int) -> Callable[..., None]:
    """The kernel for a head size."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    WORDS, WIDE_WORDS = token_words(head_dim, "float8"), token_words(head_dim, "float16")
    STRIDE, HEAD_WORDS, FACTOR = np.int32(threads), PAGE * WORDS, float32(1 << F8_SHIFT)

    def expand(
        pages, block_table, keys, values, page_words, head_words, wide_keys, wide_values, wide_page_words,
        wide_head_words, num_kv_heads,
    ):  # fmt: skip
        release()
        wait()
        num_entries, grid = int32(pages[0]), int32(cuda.gridDim.x)
        for entry in range(int32(cuda.blockIdx.x), num_entries, grid):
            page = int64(block_table[pages[entry + 1]])
            for i in range(int32(cuda.threadIdx.x), int32(2 * num_kv_heads * HEAD_WORDS), STRIDE):
                vector = ptx.udiv(i, int32(HEAD_WORDS))
                within = int32(i - vector * HEAD_WORDS)
                token = ptx.udiv(within, int32(WORDS))
                word = int32(2 * (within - token * WORDS))
                is_key = vector < num_kv_heads
                head = vector if is_key else int32(vector - num_kv_heads)
                rd = page * page_words + int64(head) * head_words
                four = keys[rd + within] if is_key else values[rd + within]
                scale_word = keys[rd + (HEAD_WORDS + token)] if is_key else values[rd + (HEAD_WORDS + token)]
                scale = ptx.mul_rn(ptx.bits_to_float(uint32(scale_word)), FACTOR)
                low, high = float8_low(four), float8_high(four)
                first = ptx.join_f16(ptx.mul_rn(ptx.f16_low(low), scale), ptx.mul_rn(ptx.f16_high(low), scale))
                second = ptx.join_f16(ptx.mul_rn(ptx.f16_low(high), scale), ptx.mul_rn(ptx.f16_high(high), scale))
                wr = page * wide_page_words + int64(head) * wide_head_words + (token * WIDE_WORDS + word)
                if word < WIDE_WORDS:  # what pads a head has other sizes
                    if is_key:
                        wide_keys[wr], wide_keys[wr + 1] = first, second
                    else:
                        wide_values[wr], wide_values[wr + 1] = first, second

    return expand


@cache
def expand_spec(arch: int, head_dim: int, threads: int = THREADS) -> KernelSpec:
    """The variant for a head size. Raises ValueError for one that is odd or over MAX_HEAD_DIM."""
    check_head("expand", head_dim, 1)
    words = types.CPointer(types.int32)
    strides = (types.int32, types.int32)
    signature = (*(words,) * 4, *strides, words, words, *strides, types.int32)
    return KernelSpec(f"expand[{head_dim}, {threads}]", make_expand(arch, head_dim, threads), signature, threads)


def expand(
    device: Device, pages: Any, cache: LayerCache, wide: LayerCache, shape: HeadShape, *, use_pdl: bool = True
) -> Launch:
    """Writes pages of a float8 cache as float16.

    pages int32 [1 + n]: how many entries follow, and places in the block table. cache, wide: of float8 and of float16,
    with the same block table. Raises ValueError if an operand is too small or of another type.
    """
    if (cache.dtype, wide.dtype) != ("float8", "float16"):
        raise ValueError(f"expand makes float16 of float8, not {wide.dtype} of {cache.dtype}")
    problem = f"pages of {shape.num_kv_heads} key-value heads of {shape.head_dim}"
    table_size = cache.block_table_stride
    pages, block_table, keys, values, wide_keys, wide_values = checked(
        "expand",
        problem,
        pages=(pages, 1, "int32"),
        block_table=(cache.block_table, table_size, "int32"),
        keys=(cache.keys, cache.page_words, "int32"),
        values=(cache.values, cache.page_words, "int32"),
        wide_keys=(wide.keys, wide.page_words, "int32"),
        wide_values=(wide.values, wide.page_words, "int32"),
    )
    arguments = (
        pages, block_table, keys, values, cache.page_words, cache.head_words, wide_keys, wide_values, wide.page_words,
        wide.head_words, shape.num_kv_heads,
    )  # fmt: skip
    spec = expand_spec(device.arch, shape.head_dim)
    return device.launch(spec, BLOCKS_PER_SM * device.num_sms, arguments, use_pdl)
