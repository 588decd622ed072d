"""Pages of float8 as float16: exactly the same numbers, of the pages that the list names and no others; NaN of a vector
that does not fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.attention.expand import THREADS, expand, expand_spec
from bitnet_numba.kernels.attention.kv_cache import PAGE, LayerCache, pool_strides
from bitnet_numba.kernels.attention.parts import HeadShape
from bitnet_numba.kernels.runtime.device import DryRunDevice
from tests.kernels.attention.test_kv_cache import Cache
from tests.kernels.harness import Out, arch, needs_gpu, run, simulated


def check_expand(
    head_dim: int, kv_heads: int, tokens: int, slots: int, grid: int, seed: int, threads: int = THREADS
) -> None:
    rng = np.random.default_rng(seed)
    pooled = slots > 1
    cache = Cache(slots, tokens, kv_heads, head_dim, pooled, rng, "float8")
    wide = Cache(slots, tokens, kv_heads, head_dim, pooled, rng, "float16")
    wide.block_table = cache.block_table
    before = wide.keys.copy(), wide.values.copy()
    for slot in range(slots):
        for token in range(tokens):
            k, v = rng.standard_normal((2, kv_heads, head_dim)).astype(np.float32)
            v *= np.float32(2.0 ** rng.integers(-6, 6))
            cache.store(slot, token, k, v)
    cache.store(slots - 1, 0, np.full((kv_heads, head_dim), 6e4, np.float32), v)
    chosen = rng.permutation(slots)[: max(1, slots - 1)]
    pages = -(-tokens // PAGE)
    places = [int(slot) * cache.block_table_stride + page for slot in chosen for page in range(pages)]
    outs = [Out(array.size, np.int32, array) for array in before]
    strides = wide.page_words, wide.head_words
    list_ = np.array([len(places), *places, 2**30], np.int32)
    own = [cache.keys, cache.values, cache.page_words, cache.head_words]
    run(expand_spec(arch(), head_dim, threads), grid, [list_, cache.block_table, *own, *outs, *strides, kv_heads])
    wide.keys, wide.values = (out.array for out in outs)
    for slot in range(slots):
        if slot in chosen:
            for expected, found in zip(cache.read(slot, tokens), wide.read(slot, tokens), strict=True):
                assert np.array_equal(expected, found, equal_nan=True)
        else:
            for g in range(kv_heads):
                for array, old in zip((wide.keys, wide.values), before, strict=True):
                    assert np.array_equal(array[wide.at(slot, g, 0)], old[wide.at(slot, g, 0)])


@simulated
@settings(max_examples=3)
@given(
    shape=st.sampled_from([(8, 1), (18, 2), (4, 2)]),
    tokens=st.integers(1, 70),
    slots=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_expand(shape: tuple[int, int], tokens: int, slots: int, seed: int) -> None:
    check_expand(*shape, tokens, slots, 2, seed, threads=32)


@needs_gpu
@settings(max_examples=20)
@given(
    shape=st.sampled_from([(128, 5), (100, 3), (256, 2), (18, 2)]),
    tokens=st.integers(1, 200),
    slots=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_expand_on_gpu(shape: tuple[int, int], tokens: int, slots: int, seed: int) -> None:
    check_expand(*shape, tokens, slots, 7, seed)


def test_launch_checks_its_operands() -> None:
    device, shape = DryRunDevice(90, 132), HeadShape(4, 2, 128)
    narrow, wide = (pool_strides(2, 128, dtype) for dtype in ("float8", "float16"))
    table, pages = device.empty(3, np.int32), device.empty(4, np.int32)
    keys, wide_keys = device.empty(3 * narrow[0], np.int32), device.empty(3 * wide[0], np.int32)
    cache = LayerCache(keys, keys, table, 3, *narrow, "float8")
    expanded = LayerCache(wide_keys, wide_keys, table, 3, *wide, "float16")
    assert expand(device, pages, cache, expanded, shape).name.startswith("expand[128")
    with pytest.raises(ValueError, match="expand makes float16 of float8, not float16 of float16"):
        expand(device, pages, expanded, expanded, shape)
    with pytest.raises(ValueError, match="expand: wide_keys holds 4 elements"):
        expand(device, pages, cache, expanded._replace(keys=pages), shape)
