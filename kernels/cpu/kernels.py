"""The kernels that a step calls by address, each compiled by itself: which there are, and for what they are compiled.

Each builder takes the constants that its kernel is compiled for, and returns a function of integers.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from bitnet_numba.kernels.cpu import attention, gemm, gemm_groups, gemv, gemv_groups, kv_cache, lm_head, sampler
from bitnet_numba.kernels.cpu.compiler import Kernel
from bitnet_numba.kernels.cpu.isa import InstructionSet
from bitnet_numba.kernels.cpu.layout import MAX_TOKENS
from bitnet_numba.kernels.cpu.memory import store_i64


def build_gemv(isa: InstructionSet) -> Callable[..., None]:
    """See `gemv.gemv`."""

    def kernel(words, K, q, q_sum, acc, first, last):
        gemv.gemv(isa, words, K, q, q_sum, acc, first, last)

    return kernel


def build_gemm(isa: InstructionSet) -> Callable[..., None]:
    """See `gemv.gemv_tokens` and `gemm.gemm`: which is faster depends on the number of tokens."""
    few = gemv.FEW[isa.name]

    def for_few(words, K, q, q_stride, q_sums, M, acc, acc_stride, first, last, scratch):
        gemv.gemv_tokens(isa, words, K, q, q_stride, q_sums, M, acc, acc_stride, first, last)

    def for_any(words, K, q, q_stride, q_sums, M, acc, acc_stride, first, last, scratch):
        if M <= few:
            gemv.gemv_tokens(isa, words, K, q, q_stride, q_sums, M, acc, acc_stride, first, last)
        else:
            gemm.gemm(isa, words, K, q, q_stride, q_sums, M, acc, acc_stride, first, last, scratch)

    return for_few if few >= MAX_TOKENS else for_any


def build_gemv_groups(isa: InstructionSet) -> Callable[..., None]:
    """See `gemv_groups.gemv_groups`."""

    def kernel(words, scales, K, q, d, offsets, y, first, last):
        gemv_groups.gemv_groups(isa, words, scales, K, q, d, offsets, y, first, last)

    return kernel


def build_gemm_groups(isa: InstructionSet) -> Callable[..., None]:
    """See `gemv_groups.gemv_groups_tokens` and `gemm_groups.gemm_groups`."""
    few = gemv_groups.FEW[isa.name]

    def for_few(words, scales, K, q, q_stride, d, offsets, stride, M, y, y_stride, first, last, scratch):
        gemv_groups.gemv_groups_tokens(
            isa, words, scales, K, q, q_stride, d, offsets, stride, M, y, y_stride, first, last
        )  # fmt: skip

    def for_any(words, scales, K, q, q_stride, d, offsets, stride, M, y, y_stride, first, last, scratch):
        if M <= few:
            gemv_groups.gemv_groups_tokens(
                isa, words, scales, K, q, q_stride, d, offsets, stride, M, y, y_stride, first, last
            )  # fmt: skip
        else:
            gemm_groups.gemm_groups(
                isa, words, scales, K, q, q_stride, d, offsets, stride, M, y, y_stride, first, last, scratch
            )

    return for_few if few >= MAX_TOKENS else for_any


def build_float_rows(isa: InstructionSet, row_format: str) -> Callable[..., None]:
    """The product of `lm_head` for rows of "bf16", "f16" or "f32".

    Rows first .. last - 1 at address `rows`, K columns each, at least MIN_COLUMNS, times the activations of M tokens at
    address x, prepared for this format, x_stride bytes a token. y: address of float32 [M, y_stride]; columns first ..
    last - 1 are written.
    """
    product = lm_head.FLOAT_ROWS[row_format]

    def kernel(rows, K, x, x_stride, M, y, y_stride, first, last):
        product(isa, rows, K, 0, 0, x, x_stride, M, y, y_stride, first, last)

    return kernel


def build_int8_rows(isa: InstructionSet) -> Callable[..., None]:
    """See `lm_head.head_int8`."""

    def kernel(rows, K, scales, sums, x, x_stride, M, y, y_stride, first, last):
        lm_head.head_int8(isa, rows, K, scales, sums, x, x_stride, M, y, y_stride, first, last)

    return kernel


def build_prepare_int8(isa: InstructionSet) -> Callable[..., None]:
    """See `lm_head.prepare_int8`."""

    def kernel(x, K, prepared):
        lm_head.prepare_int8(isa, x, K, prepared)

    return kernel


def build_row_sums(isa: InstructionSet) -> Callable[..., None]:
    """See `lm_head.row_sums`."""

    def kernel(rows, K, sums, first, last):
        lm_head.row_sums(isa, rows, K, sums, first, last)

    return kernel


def build_store_kv(dtype: np.dtype[Any]) -> Callable[..., None]:
    """See `kv_cache.store_kv`."""

    def kernel(layer, page_stride, table, kv_heads, kv_head, D, position, k, v):
        kv_cache.store_kv(dtype, layer, page_stride, table, kv_heads, kv_head, D, position, k, v)

    return kernel


def build_attend(isa: InstructionSet, dtype: np.dtype[Any], heads: tuple[int, ...]) -> Callable[..., None]:
    """See `attention.attend`."""

    def kernel(layer, page_stride, table, kv_heads, kv_head, R, D, q, begin, length, split, partial, scratch):
        attention.attend(
            isa, dtype, heads, layer, page_stride, table, kv_heads, kv_head, R, D, q, begin, length, split, partial,
            scratch,
        )  # fmt: skip

    return kernel


def build_sample() -> Callable[..., None]:
    """See `sampler.sample`; the token goes to an address, as int64."""

    def kernel(logits, vocab, history, history_length, settings, edits, num_edits, mask, scratch, token):
        chosen = sampler.sample(logits, vocab, history, history_length, settings, edits, num_edits, mask, scratch)
        store_i64(token, 0, chosen)

    return kernel


@cache
def shared(build: Callable[..., Any], *constants: Any) -> Kernel:
    """The kernel for these constants: all models of a process use one, since Numba never frees machine code."""
    return Kernel(build, *constants)


def kernels_for(
    isa: InstructionSet, dtype: np.dtype[Any], heads: tuple[int, ...], head: str, group_scales: bool
) -> dict[str, Kernel]:
    """The kernels of a model by their names in `layout.KERNELS`, and "row_sums": not compiled yet.

    dtype: of the KV cache, uint16 for bfloat16 or float32. heads: see `attention.head_tile`. head: format of the LM
    head's rows, one of `layout.ROW_FORMATS`. group_scales: whether linears have them.
    """
    if group_scales:
        products = {"gemv_groups": shared(build_gemv_groups, isa), "gemm_groups": shared(build_gemm_groups, isa)}
    else:
        products = {"gemv": shared(build_gemv, isa), "gemm": shared(build_gemm, isa)}
    kernels = products | {
        "bf16_rows": shared(build_float_rows, isa, "bf16"),
        "store_kv": shared(build_store_kv, dtype),
        "attend": shared(build_attend, isa, dtype, heads),
        "sample": shared(build_sample),
    }
    if head in ("f16", "f32"):
        kernels["float_rows"] = shared(build_float_rows, isa, head)
    if head == "int8":
        kernels["int8_rows"] = shared(build_int8_rows, isa)
        kernels["prepare_int8"] = shared(build_prepare_int8, isa)
        kernels["row_sums"] = shared(build_row_sums, isa)
    return kernels
