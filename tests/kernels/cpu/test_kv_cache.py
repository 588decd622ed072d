"""The cache's layout, what is written to it, and rotary embedding."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from bitnet_numba.bfloat16 import from_float32
from bitnet_numba.kernels.cpu import kv_cache, vec
from bitnet_numba.reference import model

HEAD_DIMS = (2, 34, 64, 96, 100, 128, 256)
DTYPES = [np.uint16, np.float32]


@njit(error_model="numpy")
def _store(dtype, layer, page_stride, table, D, positions, k, v):
    M, G, _ = k.shape
    for t in range(M):
        for g in range(G):
            at = (t * G + g) * D * 4
            kv_cache.store_kv(
                *(dtype, vec.address_of(layer), page_stride, vec.address_of(table), G, g, D, positions[t]),
                *(vec.address_of(k) + at, vec.address_of(v) + at),
            )


@njit(error_model="numpy")
def _rotate(x, y, cos, sin):
    M, H, D = x.shape
    for t in range(M):
        for h in range(H):
            at, angle = (t * H + h) * D * 4, t * cos.shape[1] * 4
            kv_cache.rotate(
                *(vec.address_of(x) + at, vec.address_of(y) + at, D),
                *(vec.address_of(cos) + angle, vec.address_of(sin) + angle),
            )


def from_cache(dtype: Any, pages: np.ndarray, G: int, D: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [pages * PAGE, G, D] in the stored dtype, out of one layer's bytes [pages, layer_bytes]."""
    n = len(pages)
    split = G * kv_cache.key_bytes(dtype, D)
    units = []
    for part in (pages[:, :split], pages[:, split:]):
        numbers = np.ascontiguousarray(part).view(dtype).reshape(n, G, -1, 32)
        if dtype is np.float32:  # [2][16] -> [16][2]
            numbers = numbers.reshape(n, G, -1, 2, 16).swapaxes(-1, -2)
        units.append(numbers.reshape(n, G, -1, 2))
    keys = units[0].reshape(n, G, D // 2, kv_cache.PAGE, 2).transpose(0, 3, 1, 2, 4)
    values = units[1].reshape(n, G, kv_cache.PAGE, -1).transpose(0, 2, 1, 3)[..., :D]
    return keys.reshape(n * kv_cache.PAGE, G, D), values.reshape(n * kv_cache.PAGE, G, D)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_store_writes_one_token_and_nothing_else(dtype: Any, data: st.DataObject) -> None:
    D, G = data.draw(st.sampled_from(HEAD_DIMS)), data.draw(st.integers(1, 3))
    num_layers, num_pages = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    layer, position = data.draw(st.integers(0, num_layers - 1)), data.draw(st.integers(0, num_pages * 64 - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    layer_bytes = kv_cache.layer_bytes(dtype, G, D)
    table = rng.permutation(num_pages).astype(np.int32)
    cache = rng.integers(0, 256, (num_pages, num_layers, layer_bytes), np.uint8)
    k, v = rng.standard_normal((2, 1, G, D)).astype(np.float32)
    before = cache.copy()
    at = cache.reshape(-1)[layer * layer_bytes :]
    _store(dtype, at, num_layers * layer_bytes, table, D, np.array([position]), k, v)
    keys, values = from_cache(dtype, cache[table, layer], G, D)
    stored = (lambda x: from_float32(x)) if dtype is np.uint16 else (lambda x: x)
    np.testing.assert_array_equal(keys[position], stored(k[0]))
    np.testing.assert_array_equal(values[position], stored(v[0]))
    size = np.dtype(dtype).itemsize
    assert (cache != before).sum() <= 2 * G * D * size
    cache[table[position // 64], layer] = before[table[position // 64], layer]
    np.testing.assert_array_equal(cache, before)
    old_keys, old_values = from_cache(dtype, before[table, layer], G, D)
    others = np.arange(len(keys)) != position
    np.testing.assert_array_equal(keys[others].view(np.uint8), old_keys[others].view(np.uint8))
    np.testing.assert_array_equal(values[others].view(np.uint8), old_values[others].view(np.uint8))


def test_bfloat16_rounds_to_even_and_keeps_nan() -> None:
    rng = np.random.default_rng(3)
    bits = np.concatenate([
        rng.integers(0, 2**32, 8192 - 64 * 8, np.uint64),  # any pattern, NaN among them
        np.repeat(rng.integers(0, 2**16, 64 * 4, np.uint64) << 16, 2) + np.tile([0x8000, 0x7FFF], 64 * 4),  # ties
    ]).astype(np.uint32)  # fmt: skip
    bits[:6] = [0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0x80000000]
    x = bits.view(np.float32).reshape(64, 1, 128)
    cache = np.zeros((1, kv_cache.layer_bytes(np.uint16, 1, 128)), np.uint8)
    _store(np.uint16, cache, cache.shape[1], np.zeros(1, np.int32), 128, np.arange(64), x, x)
    keys, values = from_cache(np.uint16, cache, 1, 128)
    np.testing.assert_array_equal(keys, from_float32(x))
    np.testing.assert_array_equal(values, from_float32(x))


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_rotate_equals_the_reference(D: int) -> None:
    rng = np.random.default_rng(D)
    x = rng.standard_normal((3, 2, D)).astype(np.float32)
    angles = rng.uniform(0, 1000, (3, D // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    expected = model.rotate(x, np.tile(cos, 2), np.tile(sin, 2))
    y = np.full_like(x, np.nan)
    before = x.copy()
    _rotate(x, y, cos, sin)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(x, before)
    _rotate(x, x, cos, sin)  # in place
    np.testing.assert_array_equal(x, expected)
