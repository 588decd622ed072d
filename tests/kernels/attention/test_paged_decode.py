"""Attention of a batched decode pass: grouped-query attention of many sequences' tokens over a cache of pages.

Contract: each token's output is the reference's attention over its slot's tokens, in float32; it is itself in the cache
afterwards, as `append` would have stored it, and nothing else there has changed; tokens of slot -1 are left alone; and
a token's result is the same, to the bit, whatever else is in the batch, in whatever pages, with whatever number of
threads and splits. Tolerance: that of test_decode.py, whose sums these are. The cache holds NaN slot_positions no token
is, and slot_positions new tokens will be, to show if that is read.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.kv_cache import (
    APPEND_THREADS,
    PAGE,
    LayerCache,
    append_spec,
    pool_strides,
    token_words,
)
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype
from bitnet_numba.kernels.attention.paged_decode import (
    STRIPES,
    PagedScratch,
    cluster_for,
    fits,
    max_splits_of,
    paged_decode_attention,
    paged_decode_spec,
    splits_needed,
    work_entries,
)
from bitnet_numba.kernels.attention.parts import HeadShape, RopeTables, heads_per_block
from bitnet_numba.kernels.ptx.base import WARP, simulated_thread
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.reference.model import attend, rotate
from tests.kernels.attention.test_decode import tolerance
from tests.kernels.attention.test_kv_cache import NAN_BITS, stored_numbers, stored_words, to_bits
from tests.kernels.harness import SIMULATED, Out, arch, assert_close, needs_gpu, run, simulated

PAGED_DTYPES = st.sampled_from(["float16", "bfloat16", "float8"])


def attend_to_pages(
    shape: tuple[int, int, int],
    batch: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]],
    angles: np.ndarray,
    threads: int,
    splits: int,
    min_split: int,
    seed: int,
    dtype: KVDtype,
) -> np.ndarray:
    """One launch over a batch of tokens: (slot, qkv [heads + 2 kv heads, D], keys, values), the last two of the earlier
    tokens, float32 [tokens, kv heads, D]; pages in a random order. Every token is shared by `splits` blocks,
    or every other one by fewer. Returns [len(batch), heads, D]; tokens of slot -1 as poison.

    threads: of a block; -4: of clusters of four, a warp a stripe. Checks that the cache then is what `append` makes
    of it.
    """
    threads, cluster = (threads, 1) if threads > 0 else (-STRIPES * WARP // threads, -threads)
    D, group, kv_heads = shape
    rng = np.random.default_rng(seed)
    heads, max_tokens = kv_heads * group, len(angles)
    stride, slots = -(-max_tokens // PAGE), 1 + max(slot for slot, *_ in batch)
    counts = {slot: len(keys) // PAGE + 1 for slot, _, keys, _ in batch if slot >= 0}
    pages = list(rng.permutation(sum(counts.values()) + 2))  # two pages are nobody's
    block_table = np.full((slots, stride), 2**30, np.int32)
    nothing = 0x7FC00000 if dtype == "float8" else NAN_BITS * 0x10001  # NaN, as a scale too
    caches = np.full((2, len(pages), kv_heads, PAGE, token_words(D, dtype)), nothing, np.int32)
    scales = np.full((2, len(pages), kv_heads, PAGE), nothing, np.int32)
    slot_positions = np.full((len(batch), 2), -1, np.int32)
    for b, (slot, _, *earlier) in enumerate(batch):
        if slot >= 0:
            t = np.arange(len(earlier[0]))
            slot_positions[b] = slot, len(t)
            block_table[slot, : counts[slot]] = [pages.pop() for _ in range(counts[slot])]
            for cache, scale, new in zip(caches, scales, earlier, strict=True):
                of_tokens = block_table[slot, t // PAGE], slice(None), t % PAGE
                cache[of_tokens], factors = stored_words(new, dtype)
                scale[of_tokens] = factors.view(np.int32)
    caches = caches.reshape(*caches.shape[:3], -1)
    if dtype == "float8":
        caches = np.concatenate([caches, scales], axis=-1)
    spec = paged_decode_spec(arch(), D, group, threads, dtype, min_split, cluster)
    partials, stats, arrivals = PagedScratch.sizes(len(batch), max_tokens, HeadShape(heads, kv_heads, D), dtype)
    max_splits = max_splits_of(max_tokens) * (512 // min_split)
    partials, stats = (size * (512 // min_split) for size in (partials, stats))
    scratch = (Out(partials, np.float32), Out(stats, np.float32), Out(arrivals, np.int32, np.zeros(arrivals, np.int32)))
    out = Out(len(batch) * heads * D, np.float32)
    qkv = np.stack([token[1] for token in batch])
    words, appended = ([Out(x.size, np.int32, x) for x in caches] for _ in range(2))
    strides = pool_strides(kv_heads, D, dtype)
    begin: list[Any] = [qkv, np.cos(angles), np.sin(angles), slot_positions, block_table, stride]
    arguments = [*begin, *words, *strides, *scratch, out, kv_heads, max_splits, slots, max_tokens]
    head_blocks = heads // heads_per_block(group)
    shares = [
        (splits if b % 2 == 0 else int(rng.integers(1, splits + 1))) * (token[0] >= 0) for b, token in enumerate(batch)
    ]
    work_list = rng.permutation([*work_entries(shares), -1]).astype(np.int32)
    run(spec, (len(work_list), head_blocks * cluster), [*arguments[:-4], work_list, *arguments[-4:], words[0].size])
    assert not scratch[2].array.any(), "the arrival counters are not zero again"
    append = append_spec(arch(), D, dtype, 32 if SIMULATED else APPEND_THREADS)
    run(append, len(batch), [*begin, *appended, *strides, heads, kv_heads], 1)
    for name, array, expected in zip(("keys", "values"), words, appended, strict=True):
        wrong = np.flatnonzero(array.array != expected.array)
        assert not wrong.size, f"{name}: {wrong.size} words are not as append has them, the first is {wrong[0]}"
    return out.array.reshape(len(batch), heads, D).copy()


def check_paged_decode(
    shape: tuple[int, int, int],
    lengths: list[int],
    threads: int,
    splits: int,
    min_split: int = 512,
    seed: int = 1,
    spread: float = 1.0,
    other: tuple[int, int] | None = None,
    dtype: KVDtype = DEFAULT,
) -> None:
    """Compares tokens with contexts of these lengths (0: an unused token) with the reference; then the longest alone,
    launched with `other` (threads, splits), with its result in company."""
    D, group, kv_heads = shape
    rng = np.random.default_rng(seed)
    heads = kv_heads * group
    angles = rng.uniform(-np.pi, np.pi, (max(*lengths, 1) + 3, D // 2)).astype(np.float32)
    slots = rng.permutation(len(lengths) + 1)
    batch = []
    for b, tokens in enumerate(lengths):
        qkv = (rng.standard_normal((heads + 2 * kv_heads, D)) * spread).astype(np.float32)
        earlier = rng.standard_normal((2, max(0, tokens - 1), kv_heads, D)).astype(np.float32)
        batch.append((int(slots[b]) if tokens else -1, qkv, *earlier))
    actual = attend_to_pages(shape, batch, angles, threads, splits, min_split, seed, dtype)
    untouched = np.full(heads * D * 4, 0xA5, np.uint8).view(np.float32).reshape(heads, D)
    for b, (_, qkv, *earlier) in enumerate(batch):
        tokens = lengths[b]
        if not tokens:
            assert actual[b].tobytes() == untouched.tobytes(), f"unused token {b} was written"
            continue
        cos, sin = (np.concatenate([f(angles[None, tokens - 1])] * 2, axis=-1) for f in (np.cos, np.sin))  # [1, D]
        q = rotate(qkv[None, :heads], cos, sin)
        own = rotate(qkv[None, heads:][:, :kv_heads], cos, sin), qkv[None, heads + kv_heads :]  # [1, G, D]
        whole = [np.concatenate([x, y]) for x, y in zip(earlier, own, strict=True)]
        k, v = (stored_numbers(*stored_words(x, dtype), D, dtype) for x in whole)  # [T, G, D]
        expected = attend(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64))[0]  # [H, D]
        assert_close(actual[b], expected, tolerance(q[0], k, v, dtype), f"token {b} of {lengths}")
    if other is not None and max(lengths):
        b = int(np.argmax(lengths))
        alone = attend_to_pages(shape, [(0, *batch[b][1:])], angles, *other, min_split, seed + 1, dtype)
        assert alone[0].tobytes() == actual[b].tobytes(), f"token {b} of {lengths} differs from itself alone"


@simulated
@settings(max_examples=2)
@example(shape=(128, 4, 1), lengths=[70], threads=64, splits=2, seed=1, dtype="float16")
@example(
    shape=(8, 6, 1), lengths=[1, 0, 64], threads=32, splits=1, seed=2, dtype="bfloat16"
)  # first and last of a page
@example(shape=(8, 8, 2), lengths=[65], threads=64, splits=1, seed=3, dtype="float8")  # alone in the second split
@example(
    shape=(20, 5, 1), lengths=[129, 0], threads=32, splits=2, seed=4, dtype="float16"
)  # a third split, the first block's
@example(
    shape=(34, 1, 1), lengths=[113], threads=64, splits=3, seed=5, dtype="bfloat16"
)  # a second stripe, first of a tile
@given(
    shape=st.sampled_from([(8, 4, 1), (4, 1, 2), (20, 3, 1), (34, 1, 1), (16, 5, 1)]),
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=2).filter(any),
    threads=st.sampled_from([32, 64, 128]),
    splits=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    dtype=PAGED_DTYPES,
)
def test_simulated_paged_decode(
    shape: tuple[int, int, int], lengths: list[int], threads: int, splits: int, seed: int, dtype: KVDtype
) -> None:
    check_paged_decode(shape, lengths, threads, splits, 64, seed, other=(64, 1), dtype=dtype)


@simulated
@pytest.mark.parametrize(
    ("shape", "lengths", "cluster", "splits", "dtype"),
    [
        ((8, 4, 1), [30, 66], 4, 1, "float16"),  # a head a block; a block has both splits
        ((8, 3, 2), [0, 130], 2, 2, "bfloat16"),  # two heads of three; three splits, two of them the first block's
        ((34, 1, 1), [65], 4, 2, "float8"),  # no head but for one block
    ],
)
def test_simulated_clusters(
    shape: tuple[int, int, int], lengths: list[int], cluster: int, splits: int, dtype: KVDtype
) -> None:
    check_paged_decode(shape, lengths, -cluster, splits, 64, seed=7, other=(64, 1), dtype=dtype)


@needs_gpu
@pytest.mark.parametrize("shape", [(128, 4, 5), (96, 1, 3), (128, 8, 2), (34, 3, 2)])
@pytest.mark.parametrize("cluster", [2, 4])
def test_clusters_on_gpu(shape: tuple[int, int, int], cluster: int) -> None:
    for dtype, splits in (("float16", 1), ("bfloat16", 2), ("float8", 3)):
        check_paged_decode(shape, [1, 0, 300, 257, 1500, 17, 5000], -cluster, splits, other=(64, 3), dtype=dtype)


@simulated
@pytest.mark.parametrize("tokens", [257, 272])  # in the second tile of the first stripe, its first and last
def test_simulated_new_token_in_a_later_tile(tokens: int) -> None:
    dtype: KVDtype = "float8" if tokens == 272 else "float16"
    check_paged_decode((4, 1, 1), [tokens], 32, 1, seed=tokens, other=(512, 1), dtype=dtype)


@simulated
@pytest.mark.parametrize("stale", [(-1, -1), (0, 2), (1, 40), (5, 0), (0, 2**30), (0, 70)])
def test_simulated_slot_positions_change(stale: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other thread, then every thread, looks at `slot_positions` before it is written: it must look again."""
    module = import_module("bitnet_numba.kernels.attention.paged_decode")
    for period in (2, 1):

        def read(p: Any, i: Any, period: int = period) -> tuple:
            thread = simulated_thread()
            early = not hasattr(thread, "looked") and thread.thread_id % period == 0
            thread.looked = True
            return tuple(np.int32(x) for x in (stale if early else (p[int(i)], p[int(i) + 1])))

        monkeypatch.setattr(module.ptx, "load2_l2", read)
        check_paged_decode((8, 4, 1), [30, 66], 64, 2, 64, seed=6)


@needs_gpu
@pytest.mark.long
@settings(max_examples=40)
@example(spec=((128, 4, 5), 64, "float16"), lengths=[4096, 256, 1, 0, 257, 8191], splits=16, seed=2, spread=4.0)
@example(spec=((128, 4, 1), 128, "bfloat16"), lengths=[32768, 2, 65, 10000], splits=4, seed=3, spread=1.0)
@example(spec=((128, 4, 5), 512, "float8"), lengths=[700, 3000, 17], splits=4, seed=4, spread=1.0)
@given(
    spec=st.sampled_from(  # each, and its other number of threads, is compiled
        [((128, 4, 5), 64, "float16"), ((128, 4, 5), 256, "bfloat16"), ((64, 4, 2), 512, "float8"),
         ((96, 1, 3), 128, "float16"), ((100, 1, 4), 64, "bfloat16"), ((34, 3, 2), 64, "float8"),
         ((128, 8, 2), 256, "float16"), ((6, 5, 3), 256, "bfloat16")]
    ),
    lengths=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 3000)), min_size=1, max_size=12).filter(any),
    splits=st.sampled_from([1, 2, 4, 8, 16, 32]),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
)  # fmt: skip
def test_paged_decode_on_gpu(
    spec: tuple[tuple[int, int, int], int, KVDtype], lengths: list[int], splits: int, seed: int, spread: float
) -> None:
    shape, threads, dtype = spec
    other = 512 if threads < 256 else 64, 3
    check_paged_decode(shape, lengths, threads, splits, 512, seed, spread, other, dtype)


def make_late(arch: int, count: int) -> Callable[..., None]:
    """A kernel that lets the next launch begin, takes its time, and then writes `slot_positions` and the tokens'
    qkv."""
    release = ptx.pdl_trigger(arch)
    DELAY = 100  # trips to L2, some 50 us in all

    def late(slot_positions, slot_positions_source, qkv, qkv_source, size):
        release()
        tid = cuda.threadIdx.x
        for _ in range(DELAY):
            ptx.load_acquire(slot_positions_source, 0)
        if tid < 2 * count:
            slot_positions[tid] = slot_positions_source[tid]
        for i in range(tid, size, 512):
            qkv[i] = qkv_source[i]

    return late


LATE_SIGNATURE = (*(types.CPointer(types.int32),) * 2, *(types.CPointer(types.float32),) * 2, types.int32)


@needs_gpu
@pytest.mark.parametrize("stale", [-1, 0, 1, 7, 2**31 - 1])
def test_begins_before_the_launches_before_it_have_ended(stale: int) -> None:
    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import Stream
    from bitnet_numba.kernels.runtime.memory import DeviceArray

    device, (D, group, kv_heads), rng = usable_device(), (128, 4, 2), np.random.default_rng(1)
    lengths, heads, stride = [700, 16, 1, 300, 65], kv_heads * group, 12
    num_tokens = len(lengths)
    block_table = rng.permutation(num_tokens * stride).astype(np.int32).reshape(num_tokens, stride)
    slot_positions = np.array([(b, n - 1) for b, n in enumerate(lengths)], np.int32)
    page_words, head_words = pool_strides(kv_heads, D)
    cached = to_bits(rng.standard_normal((2, num_tokens * stride, kv_heads, PAGE, D)).astype(np.float32), DEFAULT)
    for b, n in enumerate(lengths):  # the new tokens are not there yet
        cached[:, block_table[b, (n - 1) // PAGE], :, (n - 1) % PAGE] = NAN_BITS
    qkv = rng.standard_normal((num_tokens, (heads + 2 * kv_heads) * D)).astype(np.float32)
    angles = rng.uniform(-3, 3, (stride * PAGE, D // 2)).astype(np.float32)
    shape = HeadShape(heads, kv_heads, D)
    scratch = PagedScratch.allocate(device, num_tokens, stride * PAGE, shape)
    rope = RopeTables(*(DeviceArray.of(x) for x in (np.cos(angles), np.sin(angles))))
    sources = [DeviceArray.of(x) for x in (slot_positions, qkv)]
    late = KernelSpec("late", make_late(device.arch, num_tokens), LATE_SIGNATURE, 512)
    work_list = DeviceArray.of(np.array(work_entries([3] * num_tokens), np.int32))
    results = []
    for begin in (slot_positions, np.full_like(slot_positions, stale)):
        for use_pdl in (False, True):
            now = [DeviceArray.of(x) for x in (begin, np.full_like(qkv, np.nan))]
            pairs = [x for pair in zip(now, sources, strict=True) for x in pair]
            keys, values = (DeviceArray.of(cache.view(np.int32)) for cache in cached)
            cache = LayerCache(keys, values, DeviceArray.of(block_table), stride, page_words, head_words)
            out = DeviceArray(num_tokens * heads * D, np.float32, zero=True)
            launch = paged_decode_attention(
                device,
                now[1],
                rope,
                now[0],
                cache,
                work_list,
                work_list.size,
                scratch,
                out,
                num_tokens,
                shape,
                use_pdl=use_pdl,
            )
            stream = Stream()
            device.launch(late, 1, [*pairs, qkv.size], use_pdl=False)(stream.handle)
            launch(stream.handle)
            stream.synchronize()
            results.append(b"".join(array.read().tobytes() for array in (out, keys, values)))
    assert len(set(results)) == 1, "what is read too early shows"
    assert not np.isnan(out.read()).any()


def test_launch_checks_its_operands() -> None:
    device, shape = DryRunDevice(90, 132), HeadShape(20, 5, 128)
    slots, pages, count = 8, 64, 6
    page_words, head_words = pool_strides(5, 128)
    keys, values = (device.empty(slots * pages * page_words, np.int32) for _ in range(2))
    cache = LayerCache(keys, values, device.empty(slots * pages, np.int32), pages, page_words, head_words)
    rope = RopeTables(*(device.empty(pages * PAGE * 64, np.float32) for _ in range(2)))
    scratch = PagedScratch.allocate(device, count, pages * PAGE, shape)
    assert scratch.nbytes == sum(array.nbytes for array in scratch.arrays)
    qkv, out = device.empty(count * 30 * 128, np.float32), device.empty(count * 20 * 128, np.float32)
    slot_positions, work_list = device.empty(2 * count, np.int32), device.empty(12, np.int32)

    def launch(qkv: Any = qkv, num_blocks: int = 12, num_tokens: int = count, shape: HeadShape = shape) -> Any:
        return paged_decode_attention(
            device, qkv, rope, slot_positions, cache, work_list, num_blocks, scratch, out, num_tokens, shape
        )

    assert launch().spec is paged_decode_spec(90, 128, 4, 512, DEFAULT)
    with pytest.raises(ValueError, match="paged_decode_attention: qkv holds 23040 elements, a pass of 7 x 20 heads"):
        launch(num_tokens=7)
    with pytest.raises(ValueError, match="qkv must be float32, not int32"):
        launch(qkv=device.empty(count * 30 * 128, np.int32))
    with pytest.raises(ValueError, match="work_list holds 12 elements, .* takes 13"):
        launch(num_blocks=13)
    with pytest.raises(ValueError, match="0 blocks for 6 tokens"):
        launch(num_blocks=0)
    with pytest.raises(ValueError, match="20 heads cannot share 3 key-value heads evenly"):
        launch(shape=HeadShape(20, 3, 128))


def test_few_tokens_take_clusters() -> None:
    for arch_, tokens, blocks, cluster in (
        (90, 4, 20, 4), (90, 1, 99, 4), (90, 1, 100, 1), (90, 5, 25, 1), (100, 4, 20, 1), (80, 1, 5, 1)
    ):  # fmt: skip
        assert cluster_for(arch_, tokens, blocks, 132) == cluster, (arch_, tokens, blocks)


def test_splits() -> None:
    tokens = np.array([1, 512, 513, 4096, 16384, 16385, 20000, 32768])
    assert splits_needed(tokens).tolist() == [1, 1, 2, 8, 32, 29, 32, 32]
    for n in range(1, 40000, 37):
        assert splits_needed(np.array([n])) <= max_splits_of(n)


def test_what_fits() -> None:
    assert fits(80, 128) and fits(90, 64) and not fits(75, 128) and not fits(90, 256)
    with pytest.raises(ValueError, match="even head sizes up to 128 from sm_80 on, not 256 on sm_90"):
        paged_decode_spec(90, 256, 4, 64)
    with pytest.raises(ValueError, match="at least one query head, not 0"):
        paged_decode_spec(90, 128, 0, 64)
