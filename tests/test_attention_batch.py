"""The attention kernel of batched decoding: grouped-query attention of many rows over a cache of pages.

Contract: each row's output is the reference's attention over its slot's tokens, in float32; rows of slot -1 are left
alone; and a row's result is the same, to the bit, whatever else is in the batch, in whatever pages, with whatever
number of threads and splits. Tolerance: that of test_attention.py, whose sums these are; tokens that no row has read
NaN, to show if they are read.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import cuda
from numba.cuda import types

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.kernels.attention import heads_per_block, padded_head_dim
from bitnet_numba.kernels.attention_batch import (
    attention_batch,
    attention_batch_form,
    attention_batch_scratch,
    fits,
    most_splits,
    splits_needed,
)
from bitnet_numba.kernels.forms import KernelForm
from bitnet_numba.kernels.intrinsics import grid_release, load_acquire
from bitnet_numba.kernels.kv_cache import PAGE, LayerCache, pool_strides
from bitnet_numba.reference.model import attend, rotate
from tests.kernel_harness import Out, arch, assert_close, needs_gpu, run, run_simulated

EPSILON = 2.0**-24


def attention_of_rows(
    shape: tuple[int, int, int],
    rows: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]],
    angles: np.ndarray,
    threads: int,
    splits: int,
    least: int,
    seed: int,
) -> np.ndarray:
    """One launch over rows of (slot, qkv [heads + 2 kv heads, D], keys, values [tokens, kv heads, D] as bfloat16 bits),
    their pages in a random order. Returns [rows, heads, D]; rows of slot -1 as poison."""
    D, group, kv_heads = shape
    rng = np.random.default_rng(seed)
    heads, DP, max_tokens = kv_heads * group, padded_head_dim(D), len(angles)
    stride, slots = -(-max_tokens // PAGE), 1 + max(slot for slot, *_ in rows)
    counts = {slot: -(-len(keys) // PAGE) for slot, _, keys, _ in rows if slot >= 0}
    order = list(rng.permutation(sum(counts.values()) + 2))  # two pages are nobody's
    table = np.full((slots, stride), 2**30, np.int32)
    caches = np.full((2, len(order), kv_heads, PAGE, DP), 0x7FC0, np.uint16)
    where = np.full((len(rows), 2), -1, np.int32)
    for b, (slot, _, *bits) in enumerate(rows):
        if slot >= 0:
            t = np.arange(len(bits[0]))
            where[b] = slot, len(t) - 1
            table[slot, : counts[slot]] = [order.pop() for _ in range(counts[slot])]
            for cache, new in zip(caches, bits, strict=True):
                cache[table[slot, t // PAGE], :, t % PAGE] = np.pad(new, ((0, 0), (0, 0), (0, DP - D)))
    form = attention_batch_form(arch(), D, group, threads, least)
    partials, stats, arrivals = attention_batch_scratch(len(rows), max_tokens, heads, kv_heads, D)
    room = most_splits(max_tokens) * (512 // least)
    partials, stats = (size * (512 // least) for size in (partials, stats))
    scratch = (Out(partials, np.float32), Out(stats, np.float32), Out(arrivals, np.int32, np.zeros(arrivals, np.int32)))
    out = Out(len(rows) * heads * D, np.float32)
    qkv = np.stack([row[1] for row in rows])
    words = [cache.view(np.int32) for cache in caches]
    arguments: list[Any] = [qkv, np.cos(angles), np.sin(angles), where, table, stride, *words]
    arguments += [*pool_strides(kv_heads, D), *scratch, out, kv_heads, room, slots, max_tokens, words[0].size]
    parts = heads // heads_per_block(group, True)
    run(form, (splits, len(rows) * parts), arguments)
    assert not scratch[2].array.any(), "the arrival counters are not zero again"
    return out.array.reshape(len(rows), heads, D).copy()


def check_attention_batch(
    shape: tuple[int, int, int],
    lengths: list[int],
    threads: int,
    splits: int,
    least: int = 512,
    seed: int = 1,
    spread: float = 1.0,
    other: tuple[int, int] | None = None,
) -> None:
    """Compares rows of so many tokens (0: an unused row) with the reference; then the longest row alone, launched with
    `other` (threads, splits), with its result in company."""
    D, group, kv_heads = shape
    rng = np.random.default_rng(seed)
    heads = kv_heads * group
    angles = rng.uniform(-np.pi, np.pi, (max(*lengths, 1) + 3, D // 2)).astype(np.float32)
    slots = rng.permutation(len(lengths) + 1)
    rows = []
    for b, tokens in enumerate(lengths):
        qkv = (rng.standard_normal((heads + 2 * kv_heads, D)) * spread).astype(np.float32)
        bits = from_float32(rng.standard_normal((2, tokens, kv_heads, D)).astype(np.float32))
        rows.append((int(slots[b]) if tokens else -1, qkv, *bits))
    actual = attention_of_rows(shape, rows, angles, threads, splits, least, seed)
    untouched = np.full(heads * D * 4, 0xA5, np.uint8).view(np.float32).reshape(heads, D)
    for b, (_, qkv, *bits) in enumerate(rows):
        tokens = lengths[b]
        if not tokens:
            assert actual[b].tobytes() == untouched.tobytes(), f"unused row {b} was written"
            continue
        cos, sin = (np.concatenate([f(angles[None, tokens - 1])] * 2, axis=-1) for f in (np.cos, np.sin))  # [1, D]
        q = rotate(qkv[None, :heads], cos, sin)
        k, v = (to_float32(x) for x in bits)  # [T, G, D]
        expected = attend(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64))[0]  # [H, D]
        grouped = np.abs(q[0]).reshape(kv_heads, group, D)
        largest = np.einsum("ghd,tgd->tgh", grouped, np.abs(k)).max() * D**-0.5
        r = 2 * (D + 3) * EPSILON * largest + 2**8 * EPSILON
        bound = (2 * r + 4 * tokens * EPSILON) * np.abs(v).max()
        assert_close(actual[b], expected, bound, f"row {b} of {lengths}")
    if other is not None and max(lengths):
        b = int(np.argmax(lengths))
        alone = attention_of_rows(shape, [(0, *rows[b][1:])], angles, *other, least, seed + 1)
        assert alone[0].tobytes() == actual[b].tobytes(), f"row {b} of {lengths} differs from itself alone"


@settings(max_examples=4)
@example(shape=(128, 4, 1), lengths=[70], threads=64, splits=2, seed=1)
@given(
    shape=st.sampled_from([(8, 4, 1), (4, 1, 2), (20, 3, 1), (34, 1, 1), (16, 5, 1)]),
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=2).filter(any),
    threads=st.sampled_from([32, 64, 128]),
    splits=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def simulate_attention_batch(
    shape: tuple[int, int, int], lengths: list[int], threads: int, splits: int, seed: int
) -> None:
    check_attention_batch(shape, lengths, threads, splits, 64, seed, other=(64, 1))


def test_simulated() -> None:
    run_simulated(__file__)


@needs_gpu
@settings(max_examples=40)
@example(form=((128, 4, 5), 64), lengths=[4096, 256, 1, 0, 257, 8191], splits=16, seed=2, spread=4.0)
@example(form=((128, 4, 1), 128), lengths=[32768, 2, 65, 10000], splits=4, seed=3, spread=1.0)
@given(
    form=st.sampled_from(  # each pair, and its other number of threads, is compiled
        [((128, 4, 5), 64), ((128, 4, 5), 256), ((64, 4, 2), 512), ((96, 1, 3), 128), ((100, 1, 4), 64),
         ((34, 3, 2), 64), ((128, 8, 2), 256), ((6, 5, 3), 256)]
    ),
    lengths=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 3000)), min_size=1, max_size=12).filter(any),
    splits=st.sampled_from([1, 2, 4, 8, 16, 32]),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
)  # fmt: skip
def test_attention_batch_on_gpu(
    form: tuple[tuple[int, int, int], int], lengths: list[int], splits: int, seed: int, spread: float
) -> None:
    shape, threads = form
    check_attention_batch(shape, lengths, threads, splits, 512, seed, spread, other=(512 if threads < 256 else 64, 3))


def make_late(arch: int, count: int) -> Callable[..., None]:
    """A kernel that lets the next launch begin, takes its time, and then writes `where` and the rows' own tokens."""
    release = grid_release(arch)
    DELAY = 100  # trips to L2, some 50 us in all

    def late(where, where_source, keys, keys_source, values, values_source, words):
        release()
        tid = cuda.threadIdx.x
        for _ in range(DELAY):
            load_acquire(where_source, 0)
        if tid < 2 * count:
            where[tid] = where_source[tid]
        for i in range(tid, words, 512):
            keys[i], values[i] = keys_source[i], values_source[i]

    return late


LATE_SIGNATURE = (*(types.CPointer(types.int32),) * 6, types.int32)


@needs_gpu
@pytest.mark.parametrize("stale", [-1, 0, 1, 7, 2**31 - 1])
def test_begins_before_the_launches_before_it_have_ended(stale: int) -> None:
    from bitnet_numba.kernels.device import DeviceArray, Launch, Stream, usable_device

    device, (D, group, kv_heads), rng = usable_device(), (128, 4, 2), np.random.default_rng(1)
    lengths, heads, stride = [700, 16, 1, 300, 65], kv_heads * group, 12
    rows = len(lengths)
    table = rng.permutation(rows * stride).astype(np.int32).reshape(rows, stride)
    where = np.array([(b, n - 1) for b, n in enumerate(lengths)], np.int32)
    page_words, head_words = pool_strides(kv_heads, D)
    full = from_float32(rng.standard_normal((2, rows * stride, kv_heads, PAGE, D)).astype(np.float32))
    partly = full.copy()  # without the rows' own tokens
    for b, n in enumerate(lengths):
        partly[:, table[b, (n - 1) // PAGE], :, (n - 1) % PAGE] = 0x7FC0
    qkv = rng.standard_normal((rows, (heads + 2 * kv_heads) * D)).astype(np.float32)
    angles = rng.uniform(-3, 3, (stride * PAGE, D // 2)).astype(np.float32)
    sizes = attention_batch_scratch(rows, stride * PAGE, heads, kv_heads, D)
    scratch = [DeviceArray(n, t, zero=True) for n, t in zip(sizes, (np.float32, np.float32, np.int32), strict=True)]
    inputs = [DeviceArray.of(x) for x in (qkv, np.cos(angles), np.sin(angles))]
    sources = [DeviceArray.of(x) for x in (where, *(cache.view(np.int32) for cache in full))]
    late = KernelForm("late", make_late(device.arch, rows), LATE_SIGNATURE, 512)
    results = []
    for begin in (where, np.full_like(where, stale)):
        now = [DeviceArray.of(x) for x in (begin, *(cache.view(np.int32) for cache in partly))]
        pairs = [x for pair in zip(now, sources, strict=True) for x in pair]
        cache = LayerCache(now[1], now[2], DeviceArray.of(table), stride, page_words, head_words)
        for overlap in (False, True):
            now[0].write(begin)
            for array, part in zip(now[1:], partly, strict=True):
                array.write(part.view(np.int32).reshape(-1))
            out = DeviceArray(rows * heads * D, np.float32, zero=True)
            launch = attention_batch(
                device, *inputs, now[0], cache, scratch, out, rows, 3, heads, kv_heads, D, overlap=overlap
            )
            stream = Stream()
            Launch(late, 1, [*pairs, full[0].size // 2], device, overlap=False)(stream.handle)
            launch(stream.handle)
            stream.synchronize()
            results.append(out.read().tobytes())
    assert len(set(results)) == 1, "what is read too early shows"
    assert not np.isnan(np.frombuffer(results[0], np.float32)).any()


def test_splits() -> None:
    assert [splits_needed(n) for n in (1, 512, 513, 4096, 16384, 16385, 20000, 32768)] == [1, 1, 2, 8, 32, 29, 32, 32]
    for n in range(1, 40000, 37):
        assert splits_needed(n) <= most_splits(n)


def test_what_fits() -> None:
    assert fits(80, 128) and fits(90, 64) and not fits(75, 128) and not fits(90, 256)
    with pytest.raises(ValueError, match="even head sizes up to 128 from sm_80 on, not 256 on sm_90"):
        attention_batch_form(90, 256, 4, 64)
    with pytest.raises(ValueError, match="at least one query head, not 0"):
        attention_batch_form(90, 128, 0, 64)
