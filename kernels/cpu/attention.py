"""Attention of one token at a time over the cache of `kv_cache`.

A sequence is cut into splits of SPLIT tokens, a multiple of PAGE; (kv head, split) is a task for a thread. `attend`
leaves a split's maximum, sum and output (softmax page by page, rescaled when the maximum grows: Milakov and
Gimelshein, 2018); `combine` joins the splits of a token. The order of additions is fixed by the token's number alone:
its result is the same bits whatever is computed beside it, by however many threads, on every CPU.

    partial   of one head and split: 16 x maximum, 16 x sum, then Dp floats, in units as float32 values are

Arguments: `dtype` is np.uint16 or np.float32, `heads` = head_tile(R) for R query heads to a kv head. Both are types to
the compiler, as `isa` is: each has its own machine code. The rest are addresses and sizes.
"""

import numpy as np
from numba import njit
from numba.extending import register_jitable

from bitnet_numba.kernels.cpu import math, vec
from bitnet_numba.kernels.cpu.attention_tiles import (
    add_scores,
    add_weighted,
    first_lanes,
    key_blocks,
    scaled_tile,
    store_interleaved,
    store_tile,
    value_heads,
    value_units,
    zero_tile,
)
from bitnet_numba.kernels.cpu.kv_cache import PAGE, load_pairs, page_of, units_of
from bitnet_numba.kernels.cpu.memory import load_f32, prefetch, store_f32

SPLIT = 512  # tokens
MAX_TILE = 4  # query heads at a time
SCRATCH_BYTES = MAX_TILE * (PAGE + 16) * 4  # for each thread: weights of a page, and factors of what went before
STATE_BYTES = 128  # maximum and sum, before a partial output
LOWEST = -np.inf


def head_tile(R: int) -> tuple[int, ...]:
    """0, 1, ... for the query heads that share one reading of the cache: a divisor of R, at most MAX_TILE."""
    return tuple(range(max(n for n in range(1, MAX_TILE + 1) if R % n == 0)))


@register_jitable
def partial_bytes(D):
    """Bytes of the partial result of one query head and split."""
    return STATE_BYTES + units_of(D) * 128


# ---- Attention ------------------------------------------------------------------------------------------------------


@njit(**vec.OPTIONS)
def score_page(isa, dtype, heads, keys, q, D, count, scores, ahead):
    """Scores of a page's first `count` tokens, float32 [heads][PAGE]; -inf for others of their blocks of 16 tokens.

    `ahead`: an address from which as much is fetched as is read here, for what comes next."""
    blocks = key_blocks(isa)
    scale = vec.splat_f32x16(np.float32(1 / np.sqrt(np.float64(D))))
    lowest = vec.splat_f32x16(LOWEST)
    for block in range(0, (count + 15) // 16, len(blocks)):
        tile = zero_tile(heads, blocks)
        for j in range(D // 2):
            prefetch(ahead + 64 * (4 * j + block), blocks)
            tile = add_scores(tile, load_pairs(dtype, keys, 4 * j + block, blocks), q + 8 * j, 4 * D)
        store_tile(heads, tile, scores + 64 * block, 4 * PAGE)
    for h in range(len(heads)):
        for at in range(0, count, 16):
            v = vec.mul(vec.load_f32x16(scores, 4 * (h * PAGE + at)), scale)
            vec.store(scores, 4 * (h * PAGE + at), first_lanes(v, count - at, lowest))


@njit(**vec.OPTIONS)
def weigh_page(scores, count, state, factor):
    """Scores of one head become weights e^(score - maximum); maximum and sum of the state take the page in.

    factor: address of 16 floats: what the outputs so far are to be multiplied by."""
    largest = vec.load_f32x16(scores, 0)
    for at in range(64, 4 * count, 64):
        largest = vec.maximum(largest, vec.load_f32x16(scores, at))
    before = vec.load_f32x16(state, 0)
    now = vec.maximum(before, vec.splat_f32x16(vec.max_lanes(largest)))
    total = vec.zero_f32x16()
    for at in range(0, 4 * count, 64):
        weights = math.exp(vec.sub(vec.load_f32x16(scores, at), now))
        vec.store(scores, at, weights)
        total = vec.add(total, weights)
    rescale = math.exp(vec.sub(before, now))
    vec.store(factor, 0, rescale)
    vec.store(state, 0, now)
    total = vec.fma(vec.load_f32x16(state, 64), rescale, vec.splat_f32x16(vec.sum_lanes(total)))
    vec.store(state, 64, total)


@njit(**vec.OPTIONS)
def add_units(dtype, heads, units, values, unit, row_units, count, weights, factors, out, stride, ahead):
    """`add_values` of the units from `unit` that `units` counts."""
    tile = scaled_tile(heads, units, out + 128 * unit, stride, factors)
    for t in range(count):
        prefetch(ahead + 64 * (PAGE * unit + t * len(units)), units)
        tile = add_weighted(tile, load_pairs(dtype, values, t * row_units + unit, units), weights + 4 * t, 4 * PAGE)
    store_tile(heads, tile, out + 128 * unit, stride)


@njit(**vec.OPTIONS)
def add_values(isa, dtype, heads, values, row_units, count, weights, factors, out, stride, ahead):
    """out = out * factor + the sum of weight * value over a page's first `count` tokens, for some heads.

    `ahead`: an address from which as much is fetched as is read here."""
    together, alone = value_units(isa), (0,)
    whole = row_units - row_units % len(together)
    for unit in range(0, whole, len(together)):
        add_units(dtype, heads, together, values, unit, row_units, count, weights, factors, out, stride, ahead)
    for unit in range(whole, row_units):
        add_units(dtype, heads, alone, values, unit, row_units, count, weights, factors, out, stride, ahead)


@njit(**vec.OPTIONS)
def attend(
    isa, dtype, heads, layer, page_stride, table, kv_heads, kv_head, R, D, q, begin, length, split, partial, scratch
):  # fmt: skip
    """Attention of R query heads of one token to a split of the tokens begin .. length - 1 of one kv head. (Splits are
    cut from token 0 on.)

    layer, page_stride, table: see `store_kv`. q: float32 [R, D], rotated. partial: R * partial_bytes(D) bytes for the
    result. scratch: SCRATCH_BYTES of this thread's. What lies in the cache behind the tokens does not matter.
    """
    row = partial_bytes(D)
    for h in range(R):
        vec.store(partial, h * row, vec.splat_f32x16(LOWEST))
        for at in range(64, row, 64):
            vec.store(partial, h * row + at, vec.zero_f32x16())
    factors = scratch + MAX_TILE * PAGE * 4
    units = units_of(D)
    held = value_heads(isa, heads)
    last = min(length, (split + 1) * SPLIT)
    for first in range(max(split * SPLIT, begin // PAGE * PAGE), last, PAGE):
        count = min(PAGE, last - first)
        keys, values = page_of(dtype, layer, page_stride, table, kv_heads, kv_head, D, first)
        next_keys, _ = page_of(dtype, layer, page_stride, table, kv_heads, kv_head, D, min(first + PAGE, last - 1))
        for head in range(0, R, len(heads)):
            state = partial + head * row
            score_page(isa, dtype, heads, keys, q + head * 4 * D, D, count, scratch, values)
            for h in range(len(heads) if first < begin else 0):
                for t in range(begin - first):
                    store_f32(scratch, 4 * (h * PAGE + t), np.float32(LOWEST))
            for h in range(len(heads)):
                weigh_page(scratch + h * PAGE * 4, count, state + h * row, factors + 64 * h)
            for h in range(0, len(heads), len(held)):
                weights, out = scratch + h * PAGE * 4, state + h * row + STATE_BYTES
                add_values(isa, dtype, held, values, units, count, weights, factors + 64 * h, out, row, next_keys)


@njit(**vec.OPTIONS)
def combine(partial, stride, length, D, out, scratch):
    """The output of one query head, float32 [D], from its partial results of all splits, `stride` bytes apart.

    scratch: 128 bytes of this thread's.
    """
    splits = (length + SPLIT - 1) // SPLIT
    largest = vec.load_f32x16(partial, 0)
    for s in range(1, splits):
        largest = vec.maximum(largest, vec.load_f32x16(partial, s * stride))
    total = vec.zero_f32x16()
    for s in range(splits):
        factor = math.exp(vec.sub(vec.load_f32x16(partial, s * stride), largest))
        total = vec.fma(vec.load_f32x16(partial, s * stride + 64), factor, total)
    for unit in range(units_of(D)):
        at = STATE_BYTES + 128 * unit
        even, odd = vec.zero_f32x16(), vec.zero_f32x16()
        for s in range(splits):
            factor = math.exp(vec.sub(vec.load_f32x16(partial, s * stride), largest))
            even = vec.fma(vec.load_f32x16(partial, s * stride + at), factor, even)
            odd = vec.fma(vec.load_f32x16(partial, s * stride + at + 64), factor, odd)
        even, odd = vec.div(even, total), vec.div(odd, total)
        if D >= 32 * (unit + 1):
            store_interleaved(out, 128 * unit, even, odd)
        else:
            vec.store(scratch, 0, even)
            vec.store(scratch, 64, odd)
            for d in range(32 * unit, D):
                store_f32(out, 4 * d, load_f32(scratch, d % 2 * 64 + d % 32 // 2 * 4))
