"""The attention kernel of batched decoding: grouped-query attention of many rows over a cache of pages.

Contract: each row's output is the reference's attention over its slot's tokens, in float32; its own token is in the
cache afterwards, as `append` would have stored it, and nothing else there has changed; rows of slot -1 are left alone;
and a row's result is the same, to the bit, whatever else is in the batch, in whatever pages, with whatever number of
threads and splits. Tolerance: that of test_attention.py, whose sums these are. Places of tokens that no row has, and of
the rows' own until these are stored, hold NaN, to show if they are read.
"""

from collections.abc import Callable
from importlib import import_module
from threading import current_thread
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import cuda
from numba.cuda import types

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.decode import heads_per_block, padded_head_dim
from bitnet_numba.kernels.attention.kv_cache import APPEND_THREADS, PAGE, LayerCache, append_spec, pool_strides
from bitnet_numba.kernels.attention.paged_decode import (
    attention_batch,
    attention_batch_scratch,
    attention_batch_spec,
    fits,
    most_splits,
    splits_needed,
    work_entries,
)
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.reference.model import attend, rotate
from tests.kernels.harness import SIMULATED, Out, arch, assert_close, needs_gpu, run, simulated

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
    """One launch over rows of (slot, qkv [heads + 2 kv heads, D], keys, values), the last two of the earlier tokens, as
    bfloat16 bits [tokens, kv heads, D]; pages in a random order. Every row is shared by `splits` blocks, or every other
    one by fewer. Returns [rows, heads, D]; rows of slot -1 as poison.

    Checks that the cache then is what `append` makes of it.
    """
    D, group, kv_heads = shape
    rng = np.random.default_rng(seed)
    heads, DP, max_tokens = kv_heads * group, padded_head_dim(D), len(angles)
    stride, slots = -(-max_tokens // PAGE), 1 + max(slot for slot, *_ in rows)
    counts = {slot: len(keys) // PAGE + 1 for slot, _, keys, _ in rows if slot >= 0}
    order = list(rng.permutation(sum(counts.values()) + 2))  # two pages are nobody's
    table = np.full((slots, stride), 2**30, np.int32)
    caches = np.full((2, len(order), kv_heads, PAGE, DP), 0x7FC0, np.uint16)
    where = np.full((len(rows), 2), -1, np.int32)
    for b, (slot, _, *bits) in enumerate(rows):
        if slot >= 0:
            t = np.arange(len(bits[0]))
            where[b] = slot, len(t)
            table[slot, : counts[slot]] = [order.pop() for _ in range(counts[slot])]
            for cache, new in zip(caches, bits, strict=True):
                cache[table[slot, t // PAGE], :, t % PAGE] = np.pad(new, ((0, 0), (0, 0), (0, DP - D)))
    spec = attention_batch_spec(arch(), D, group, threads, least)
    partials, stats, arrivals = attention_batch_scratch(len(rows), max_tokens, heads, kv_heads, D)
    room = most_splits(max_tokens) * (512 // least)
    partials, stats = (size * (512 // least) for size in (partials, stats))
    scratch = (Out(partials, np.float32), Out(stats, np.float32), Out(arrivals, np.int32, np.zeros(arrivals, np.int32)))
    out = Out(len(rows) * heads * D, np.float32)
    qkv = np.stack([row[1] for row in rows])
    words, appended = ([Out(x.size // 2, np.int32, x.view(np.int32)) for x in caches] for _ in range(2))
    begin: list[Any] = [qkv, np.cos(angles), np.sin(angles), where, table, stride]
    arguments = [*begin, *words, *pool_strides(kv_heads, D), *scratch, out, kv_heads, room, slots, max_tokens]
    parts = heads // heads_per_block(group, True)
    shares = [
        (splits if b % 2 == 0 else int(rng.integers(1, splits + 1))) * (row[0] >= 0) for b, row in enumerate(rows)
    ]
    work = rng.permutation([*work_entries(shares), -1]).astype(np.int32)
    run(spec, (len(work), parts), [*arguments[:-4], work, *arguments[-4:], words[0].size])
    assert not scratch[2].array.any(), "the arrival counters are not zero again"
    append = append_spec(arch(), D, 32 if SIMULATED else APPEND_THREADS)
    run(append, len(rows), [*begin, *appended, *pool_strides(kv_heads, D), heads, kv_heads], 1)
    for name, array, expected in zip(("keys", "values"), words, appended, strict=True):
        wrong = np.flatnonzero(array.array != expected.array)
        assert not wrong.size, f"{name}: {wrong.size} words are not as append has them, the first is {wrong[0]}"
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
        bits = from_float32(rng.standard_normal((2, max(0, tokens - 1), kv_heads, D)).astype(np.float32))
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
        own = rotate(qkv[None, heads:][:, :kv_heads], cos, sin), qkv[None, heads + kv_heads :]  # [1, G, D]
        k, v = (to_float32(np.concatenate([x, from_float32(y)])) for x, y in zip(bits, own, strict=True))  # [T, G, D]
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


@simulated
@settings(max_examples=4)
@example(shape=(128, 4, 1), lengths=[70], threads=64, splits=2, seed=1)
@example(shape=(8, 6, 1), lengths=[1, 0, 64], threads=32, splits=1, seed=2)  # own tokens first and last of a page
@example(shape=(8, 8, 2), lengths=[65], threads=64, splits=1, seed=3)  # its own token alone in the second split
@example(shape=(20, 5, 1), lengths=[129, 0], threads=32, splits=2, seed=4)  # a third split, taken by the first block
@example(shape=(34, 1, 1), lengths=[113], threads=64, splits=3, seed=5)  # a warp's second strand, first of a group
@given(
    shape=st.sampled_from([(8, 4, 1), (4, 1, 2), (20, 3, 1), (34, 1, 1), (16, 5, 1)]),
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=2).filter(any),
    threads=st.sampled_from([32, 64, 128]),
    splits=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_attention_batch(
    shape: tuple[int, int, int], lengths: list[int], threads: int, splits: int, seed: int
) -> None:
    check_attention_batch(shape, lengths, threads, splits, 64, seed, other=(64, 1))


@simulated
@pytest.mark.parametrize("tokens", [257, 272])  # in the second group of the first strand, its first and last
def test_simulated_own_token_in_a_later_group(tokens: int) -> None:
    check_attention_batch((4, 1, 1), [tokens], 32, 1, seed=tokens, other=(512, 1))


@simulated
@pytest.mark.parametrize("stale", [(-1, -1), (0, 2), (1, 40), (5, 0), (0, 2**30), (0, 70)])
def test_simulated_where_changes(stale: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other thread, then every thread, looks at `where` before it is written: it must look again."""
    module = import_module("bitnet_numba.kernels.attention.paged_decode")
    for period in (2, 1):

        def read(p: Any, i: Any, period: int = period) -> tuple:
            thread: Any = current_thread()
            early = not hasattr(thread, "looked") and thread.thread_id % period == 0
            thread.looked = True
            return tuple(np.int32(x) for x in (stale if early else (p[int(i)], p[int(i) + 1])))

        monkeypatch.setattr(module.ptx, "load2_l2", read)
        check_attention_batch((8, 4, 1), [30, 66], 64, 2, 64, seed=6)


@needs_gpu
@settings(max_examples=40)
@example(spec=((128, 4, 5), 64), lengths=[4096, 256, 1, 0, 257, 8191], splits=16, seed=2, spread=4.0)
@example(spec=((128, 4, 1), 128), lengths=[32768, 2, 65, 10000], splits=4, seed=3, spread=1.0)
@given(
    spec=st.sampled_from(  # each pair, and its other number of threads, is compiled
        [((128, 4, 5), 64), ((128, 4, 5), 256), ((64, 4, 2), 512), ((96, 1, 3), 128), ((100, 1, 4), 64),
         ((34, 3, 2), 64), ((128, 8, 2), 256), ((6, 5, 3), 256)]
    ),
    lengths=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 3000)), min_size=1, max_size=12).filter(any),
    splits=st.sampled_from([1, 2, 4, 8, 16, 32]),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
)  # fmt: skip
def test_attention_batch_on_gpu(
    spec: tuple[tuple[int, int, int], int], lengths: list[int], splits: int, seed: int, spread: float
) -> None:
    shape, threads = spec
    check_attention_batch(shape, lengths, threads, splits, 512, seed, spread, other=(512 if threads < 256 else 64, 3))


def make_late(arch: int, count: int) -> Callable[..., None]:
    """A kernel that lets the next launch begin, takes its time, and then writes `where` and the rows' products."""
    release = ptx.pdl_trigger(arch)
    DELAY = 100  # trips to L2, some 50 us in all

    def late(where, where_source, qkv, qkv_source, size):
        release()
        tid = cuda.threadIdx.x
        for _ in range(DELAY):
            ptx.load_acquire(where_source, 0)
        if tid < 2 * count:
            where[tid] = where_source[tid]
        for i in range(tid, size, 512):
            qkv[i] = qkv_source[i]

    return late


LATE_SIGNATURE = (*(types.CPointer(types.int32),) * 2, *(types.CPointer(types.float32),) * 2, types.int32)


@needs_gpu
@pytest.mark.parametrize("stale", [-1, 0, 1, 7, 2**31 - 1])
def test_begins_before_the_launches_before_it_have_ended(stale: int) -> None:
    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import Stream
    from bitnet_numba.kernels.runtime.launch import Launch
    from bitnet_numba.kernels.runtime.memory import DeviceArray

    device, (D, group, kv_heads), rng = usable_device(), (128, 4, 2), np.random.default_rng(1)
    lengths, heads, stride = [700, 16, 1, 300, 65], kv_heads * group, 12
    rows = len(lengths)
    table = rng.permutation(rows * stride).astype(np.int32).reshape(rows, stride)
    where = np.array([(b, n - 1) for b, n in enumerate(lengths)], np.int32)
    page_words, head_words = pool_strides(kv_heads, D)
    cached = from_float32(rng.standard_normal((2, rows * stride, kv_heads, PAGE, D)).astype(np.float32))
    for b, n in enumerate(lengths):  # the rows' own tokens are not there yet
        cached[:, table[b, (n - 1) // PAGE], :, (n - 1) % PAGE] = 0x7FC0
    qkv = rng.standard_normal((rows, (heads + 2 * kv_heads) * D)).astype(np.float32)
    angles = rng.uniform(-3, 3, (stride * PAGE, D // 2)).astype(np.float32)
    sizes = attention_batch_scratch(rows, stride * PAGE, heads, kv_heads, D)
    scratch = [DeviceArray(n, t, zero=True) for n, t in zip(sizes, (np.float32, np.float32, np.int32), strict=True)]
    angles_of = [DeviceArray.of(x) for x in (np.cos(angles), np.sin(angles))]
    sources = [DeviceArray.of(x) for x in (where, qkv)]
    late = KernelSpec("late", make_late(device.arch, rows), LATE_SIGNATURE, 512)
    work = DeviceArray.of(np.array(work_entries([3] * rows), np.int32))
    results = []
    for begin in (where, np.full_like(where, stale)):
        for overlap in (False, True):
            now = [DeviceArray.of(x) for x in (begin, np.full_like(qkv, np.nan))]
            pairs = [x for pair in zip(now, sources, strict=True) for x in pair]
            keys, values = (DeviceArray.of(cache.view(np.int32)) for cache in cached)
            cache = LayerCache(keys, values, DeviceArray.of(table), stride, page_words, head_words)
            out = DeviceArray(rows * heads * D, np.float32, zero=True)
            launch = attention_batch(
                device, now[1], *angles_of, now[0], cache, scratch, out, work, rows, work.size, heads, kv_heads, D,
                overlap=overlap,
            )  # fmt: skip
            stream = Stream()
            Launch(late, 1, [*pairs, qkv.size], device, use_pdl=False)(stream.handle)
            launch(stream.handle)
            stream.synchronize()
            results.append(b"".join(array.read().tobytes() for array in (out, keys, values)))
    assert len(set(results)) == 1, "what is read too early shows"
    assert not np.isnan(out.read()).any()


def test_splits() -> None:
    assert [splits_needed(n) for n in (1, 512, 513, 4096, 16384, 16385, 20000, 32768)] == [1, 1, 2, 8, 32, 29, 32, 32]
    for n in range(1, 40000, 37):
        assert splits_needed(n) <= most_splits(n)


def test_what_fits() -> None:
    assert fits(80, 128) and fits(90, 64) and not fits(75, 128) and not fits(90, 256)
    with pytest.raises(ValueError, match="even head sizes up to 128 from sm_80 on, not 256 on sm_90"):
        attention_batch_spec(90, 256, 4, 64)
    with pytest.raises(ValueError, match="at least one query head, not 0"):
        attention_batch_spec(90, 128, 0, 64)
