"""The attention of a prompt's tokens by warpgroups. Contract and tolerance are those of test_prefill.py: the same two
terms of q and p, and sums that tensor cores cut off 16 products at a time.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.attention.kv_cache import LayerCache, pool_strides, token_words
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype
from bitnet_numba.kernels.attention.parts import HeadShape, RopeTables
from bitnet_numba.kernels.attention.prefill import prefill_attention
from bitnet_numba.kernels.attention.prefill_wgmma import (
    ARCH,
    KEYS,
    WARPS,
    block_shape,
    boxes_of_cache,
    fits,
    prefill_wgmma_grid,
    prefill_wgmma_spec,
)
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.spec import KernelSpec
from tests.kernels.attention.test_kv_cache import DTYPES, to_bits
from tests.kernels.attention.test_prefill import Context, check_prefill
from tests.kernels.harness import Out, arch, mapped, needs_gpu, run, simulated, why_no_gpu

only_there = pytest.mark.skipif(not why_no_gpu() and arch() != ARCH, reason=f"this kernel is sm_{ARCH}'s alone")


def run_prefill_wgmma(
    spec: KernelSpec,
    warps: int,
    context: Context,
    group: int,
    inputs: list,
    out: Out,
    num_tokens: int,
    keys: int = KEYS,
) -> None:
    """Runs the kernel. inputs: qkv, cos, sin, slot_positions."""
    cache, words = context.cache, token_words(context.head_dim)
    boxes = boxes_of_cache(cache.size, context.head_dim, keys)
    (k, _owner), (v, _too) = mapped(cache.keys, boxes), mapped(cache.values, boxes)
    arguments: list[Any] = [*inputs, cache.block_table, cache.block_table_stride, k, v]
    arguments += [cache.page_words // words, cache.head_words // words, out, num_tokens, context.kv_heads]
    arguments.append(boxes.shape[0])
    run(spec, prefill_wgmma_grid(num_tokens, context.kv_heads, group, warps), arguments)


def check_prefill_wgmma(
    shape: tuple[int, int, int],
    start: int,
    used: int,
    num_tokens: int,
    pooled: bool,
    seed: int,
    spread: float = 1.0,
    warps: int = WARPS,
    keys: int = KEYS,
    dtype: KVDtype = DEFAULT,
) -> None:
    """`check_prefill` of this kernel, with blocks of `warps` warps and tiles of `keys` keys."""

    def run_kernel(*arguments: Any) -> None:
        run_prefill_wgmma(*arguments, keys=keys)

    spec = prefill_wgmma_spec(arch(), shape[0], shape[1], dtype, warps, keys)
    check_prefill(spec, warps, shape, start, used, num_tokens, pooled, seed, spread, run_kernel, dtype)


@simulated
@settings(max_examples=2)
@example(shape=(32, 4, 1), start=61, used=5, num_tokens=6, pooled=True, seed=1, dtype="float16")  # two pages
@given(
    shape=st.sampled_from([(18, 1, 1), (20, 4, 1), (8, 2, 2)]),
    start=st.integers(0, 40),
    used=st.integers(1, 17),
    num_tokens=st.integers(17, 18),
    pooled=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    dtype=DTYPES,
)
def test_simulated_prefill(
    shape: tuple[int, int, int], start: int, used: int, num_tokens: int, pooled: bool, seed: int, dtype: KVDtype
) -> None:
    check_prefill_wgmma(shape, start, used, num_tokens, pooled, seed, warps=4, keys=16, dtype=dtype)


@simulated
def test_simulated_warpgroups() -> None:
    """Two that take turns, over three tiles of two pages each; panels of two widths."""
    check_prefill_wgmma((72, 8, 1), 259, 2, 2, True, 2, warps=8, keys=128)


@needs_gpu
@only_there
@settings(max_examples=40)
@example(shape=(128, 4, 5), start=0, used=512, num_tokens=512, pooled=False, seed=1, spread=1.0, dtype="float16")
@example(shape=(128, 4, 1), start=3000, used=100, num_tokens=128, pooled=True, seed=2, spread=8.0, dtype="bfloat16")
@example(shape=(128, 4, 1), start=0, used=1, num_tokens=1, pooled=False, seed=3, spread=1.0, dtype="float16")
@given(
    shape=st.sampled_from(
        [(128, 4, 2), (64, 4, 2), (96, 1, 4), (100, 1, 3), (128, 8, 1), (6, 5, 1), (32, 7, 2), (18, 2, 1), (72, 6, 1)]
    ),
    start=st.integers(0, 600),
    used=st.integers(1, 200),
    num_tokens=st.sampled_from([200, 256]),
    pooled=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    dtype=DTYPES,
)
def test_prefill_on_gpu(
    shape: tuple[int, int, int],
    start: int,
    used: int,
    num_tokens: int,
    pooled: bool,
    seed: int,
    spread: float,
    dtype: KVDtype,
) -> None:
    check_prefill_wgmma(shape, start, used, num_tokens, pooled, seed, spread, dtype=dtype)


@needs_gpu
@only_there
def test_launches_that_overlap_on_gpu() -> None:
    """Give the same bits as those alone, over the caches of two layers."""
    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import Stream

    device, stream, rng = usable_device(), Stream(), np.random.default_rng(4)
    shape, count, pages = HeadShape(20, 5, 128), 300, 5
    table = device.array(rng.permutation(pages).astype(np.int32))
    caches = []
    for _ in range(2):
        numbers = rng.standard_normal((2, pages, 5, 64, 128)).astype(np.float32)
        keys, values = (device.array(to_bits(x, DEFAULT).view(np.int32)) for x in numbers)
        caches.append(LayerCache(keys, values, table, pages, *pool_strides(5, 128)))
    angles = rng.uniform(-np.pi, np.pi, (count, 64)).astype(np.float32)
    rope = RopeTables(device.array(np.cos(angles)), device.array(np.sin(angles)))
    qkv = device.array(rng.standard_normal(count * shape.qkv_size).astype(np.float32))
    slot_positions = device.array(np.stack([np.zeros(count), np.arange(count)], -1).astype(np.int32))
    results = []
    for use_pdl in (False, True):
        outs = [device.empty(count * shape.out_size, np.float32) for _ in range(2)]
        for _ in range(3):
            for cache, out in zip(caches, outs, strict=True):
                prefill_attention(device, qkv, rope, slot_positions, cache, out, count, shape, use_pdl=use_pdl)(
                    stream.handle
                )
        stream.synchronize()
        results.append([out.read() for out in outs])
    for alone, overlapping in zip(*results, strict=True):
        assert np.isfinite(alone).all() and alone.tobytes() == overlapping.tobytes()


def test_block_shapes() -> None:
    assert [block_shape(group) for group in (1, 2, 3, 4, 5, 6, 8, 12)] == [
        (1, 8), (2, 4), (1, 8), (4, 2), (1, 8), (2, 4), (8, 1), (4, 2)
    ]  # fmt: skip
    assert prefill_wgmma_grid(33, 5, 4) == (5, 2) and prefill_wgmma_grid(1, 2, 12) == (6, 1)


def test_serves_one_architecture_and_heads_up_to_128() -> None:
    assert [fits(*kind) for kind in ((90, 128), (90, 130), (90, 7), (80, 128), (100, 128))] == [True] + [False] * 4
    with pytest.raises(ValueError, match="compute capability 9.0, not 10.0"):
        prefill_wgmma_spec(100, 128, 4)
    with pytest.raises(ValueError, match="even head sizes up to 128, not 130"):
        prefill_wgmma_spec(90, 130, 4)


@pytest.mark.parametrize("target, head_dim", [(90, 128), (90, 256), (80, 128), (100, 128)])
def test_the_launcher_chooses_the_kernel(target: int, head_dim: int) -> None:
    device, shape, pages = DryRunDevice(target, 132), HeadShape(4, 2, head_dim), 3
    page_words, head_words = pool_strides(2, head_dim)
    keys, values, table = (device.empty(size, np.int32) for size in (pages * page_words,) * 2 + (pages,))
    cache = LayerCache(keys, values, table, pages, page_words, head_words)
    rope = RopeTables(*(device.empty(pages * 64 * head_dim, np.float32) for _ in range(2)))
    operands = device.empty(9 * shape.qkv_size, np.float32), rope, device.empty(18, np.int32)
    out = device.empty(9 * shape.out_size, np.float32)
    launch = prefill_attention(device, *operands, cache, out, 9, shape)
    wgmma = target == 90 and head_dim == 128
    assert launch.name.split("[")[0] == ("prefill_attention_wgmma" if wgmma else "prefill_attention")
    if wgmma:
        with pytest.raises(ValueError, match="prefill_attention: strides of 8193 and 4096 are not tokens of 64 words"):
            prefill_attention(device, *operands, cache._replace(page_words=page_words + 1), out, 9, shape)
