"""Attention over the paged cache against the reference; the same bits for every tile, neighbour and order."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.kernels.cpu import attention, isa, kv_cache, vec
from bitnet_numba.reference import model

HEAD_DIMS = (2, 34, 64, 96, 100, 128, 256)
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 100, 129, 511, 512, 513, 575, 577, 1024, 1025)
BEST, PLAIN = isa.available()[0], "portable"
# Each is compiled: large and small tiles, every tile of heads, both dtypes.
VARIANTS = [
    (BEST, np.uint16, (4, 8)),
    (PLAIN, np.uint16, (4,)),
    (BEST, np.float32, (3, 6)),
    (PLAIN, np.float32, (1, 5, 7)),
    (BEST, np.uint16, (2,)),
]


@njit(error_model="numpy")
def _store_all(dtype, layer, page_stride, table, D, k, v):
    T, G, _ = k.shape
    for t in range(T):
        for g in range(G):
            at = (t * G + g) * D * 4
            kv_cache.store_kv(
                *(dtype, vec.address_of(layer), page_stride, vec.address_of(table), G, g, D, t),
                *(vec.address_of(k) + at, vec.address_of(v) + at),
            )


@njit(error_model="numpy")
def _attend(isa, dtype, heads, layer, page_stride, table, G, R, q, begin, length, backwards, partial, scratch, out):
    D = q.shape[1]
    splits = (length + attention.SPLIT - 1) // attention.SPLIT
    row = attention.partial_bytes(D)
    for g in range(G):
        for s in range(splits):
            split = splits - 1 - s if backwards else s
            attention.attend(
                *(isa, dtype, heads, vec.address_of(layer), page_stride, vec.address_of(table), G, g, R, D),
                *(vec.address_of(q) + g * R * D * 4, begin, length, split),
                *(vec.address_of(partial) + split * R * row, vec.address_of(scratch)),
            )
        for h in range(R):
            at = vec.address_of(out) + (g * R + h) * D * 4
            attention.combine(vec.address_of(partial) + h * row, R * row, length, D, at, vec.address_of(scratch))


@dataclass
class Cache:
    """Two layers of pages full of NaN, in which the second layer holds a sequence."""

    dtype: Any
    G: int
    D: int
    table: np.ndarray

    def __post_init__(self) -> None:
        self.layer_bytes = kv_cache.layer_bytes(self.dtype, self.G, self.D)
        self.bytes = np.full((len(self.table) + 2) * 2 * self.layer_bytes, 0xFF, np.uint8)
        self.layer = self.bytes[self.layer_bytes :]

    def store(self, k: np.ndarray, v: np.ndarray) -> None:
        """Keys and values [T, G, D]."""
        _store_all(self.dtype, self.layer, 2 * self.layer_bytes, self.table, self.D, k, v)

    def attend(self, name: str, q: np.ndarray, length: int, backwards: bool = False, begin: int = 0) -> np.ndarray:
        """The output [H, D] of a query [H, D] over tokens begin .. length - 1. All that is written to is poisoned, and
        its ends are guarded."""
        H, D = q.shape
        R = H // self.G
        splits = -(-length // attention.SPLIT)
        partial = np.full(splits * R * attention.partial_bytes(D) + 64, 0xFF, np.uint8)
        scratch = np.full(attention.SCRATCH_BYTES + 64, 0xFF, np.uint8)
        out = np.full(H * D + 16, np.nan, np.float32)
        before = q.copy()
        sizes = (2 * self.layer_bytes, self.table, self.G, R)
        heads = attention.head_tile(R)
        _attend(
            isa.choose(name), self.dtype, heads, self.layer, *sizes, q, begin, length, backwards, partial, scratch, out
        )
        assert (partial[-64:] == 0xFF).all() and (scratch[-64:] == 0xFF).all() and np.isnan(out[-16:]).all()
        np.testing.assert_array_equal(q, before)
        return out[:-16].reshape(H, D)


def sequence(rng: np.random.Generator, T: int, G: int, D: int) -> tuple[np.ndarray, np.ndarray]:
    k, v = rng.standard_normal((2, T, G, D)).astype(np.float32)
    return k, v


def as_stored(x: np.ndarray, dtype: Any) -> np.ndarray:
    return to_float32(from_float32(x)) if dtype is np.uint16 else x


@pytest.mark.parametrize("name, dtype, groups", VARIANTS)
@given(data=st.data())
def test_equals_the_reference(name: str, dtype: Any, groups: tuple[int, ...], data: st.DataObject) -> None:
    D, R, G = data.draw(st.sampled_from(HEAD_DIMS)), data.draw(st.sampled_from(groups)), data.draw(st.integers(1, 2))
    length, behind = data.draw(st.sampled_from(LENGTHS)), data.draw(st.integers(0, 70))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    pages = -(-(length + behind) // kv_cache.PAGE)
    cache = Cache(dtype, G, D, (rng.permutation(pages + 2)[:pages]).astype(np.int32))
    k, v = sequence(rng, length + behind, G, D)
    v[length:] = np.nan
    cache.store(k, v)
    q = rng.standard_normal((G * R, D)).astype(np.float32)
    expected = model.attend(q[None], as_stored(k[:length], dtype), as_stored(v[:length], dtype))[0]
    out = cache.attend(name, q, length)
    worst = np.unravel_index(np.abs(out - expected).argmax(), out.shape)
    assert abs(out[worst] - expected[worst]) <= 1e-5 * np.abs(v[:length]).max(), (worst, out[worst], expected[worst])


@pytest.mark.parametrize("name, dtype, groups", VARIANTS[2:4])
@given(data=st.data(), length=st.sampled_from(LENGTHS), seed=st.integers(0, 2**32 - 1))
def test_windows(name: str, dtype: Any, groups: tuple[int, ...], data: st.DataObject, length: int, seed: int) -> None:
    """As if the tokens before the window were not there."""
    window, R = data.draw(st.integers(1, length + 1)), data.draw(st.sampled_from(groups))
    rng, begin = np.random.default_rng(seed), max(0, length - window)
    k, v = sequence(rng, length, 1, 64)
    q = rng.standard_normal((R, 64)).astype(np.float32)
    expected = model.attend(q[None], k, v, window)[0]
    alone = model.attend(q[None], k[begin:], v[begin:])[0]
    np.testing.assert_allclose(expected, alone, rtol=0, atol=1e-5 * np.abs(v).max())
    cache = Cache(dtype, 1, 64, np.arange(-(-length // 64), dtype=np.int32))
    cache.store(k, v)
    out = cache.attend(name, q, length, begin=begin)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(v).max())


@pytest.mark.parametrize("name", dict.fromkeys([BEST, PLAIN]))
@given(length=st.sampled_from(LENGTHS), seed=st.integers(0, 2**32 - 1))
def test_steep_scores(name: str, length: int, seed: int) -> None:
    """Scores over hundreds, growing or falling from page to page: maxima change, weights vanish or begin anew."""
    rng = np.random.default_rng(seed)
    _, v = sequence(rng, length, 1, 64)
    k = np.zeros_like(v)
    k[:, 0, 0] = rng.integers(-100, 101, length) + rng.integers(-2, 3) * np.arange(length)  # scores: exact integers
    q = np.zeros((4, 64), np.float32)
    q[:, 0] = 8, 8, -8, 0
    cache = Cache(np.uint16, 1, 64, np.arange(-(-length // 64), dtype=np.int32))
    k = as_stored(k, np.uint16)
    cache.store(k, v)
    expected = model.attend(q[None], k, as_stored(v, np.uint16))[0]
    np.testing.assert_allclose(cache.attend(name, q, length), expected, rtol=0, atol=1e-5 * np.abs(v).max())


@given(D=st.sampled_from(HEAD_DIMS), length=st.sampled_from(LENGTHS), seed=st.integers(0, 2**32 - 1))
def test_same_bits_in_every_surrounding(D: int, length: int, seed: int) -> None:
    """A token alone, in a longer prompt, in other pages, its splits in another order, with tiles of another machine."""
    rng = np.random.default_rng(seed)
    k, v = sequence(rng, length + 100, 2, D)
    q = rng.standard_normal((8, D)).astype(np.float32)
    pages = -(-(length + 100) // 64)
    alone = Cache(np.uint16, 2, D, np.arange(pages, dtype=np.int32))
    alone.store(k[:length], v[:length])
    out = alone.attend(BEST, q, length)
    longer = Cache(np.uint16, 2, D, rng.permutation(pages).astype(np.int32))
    longer.store(k, v)
    np.testing.assert_array_equal(longer.attend(BEST, q, length), out)
    np.testing.assert_array_equal(longer.attend(BEST, q, length, backwards=True), out)
    np.testing.assert_array_equal(longer.attend(PLAIN, q, length), out)


def test_nan_of_a_token_is_not_hidden() -> None:
    k, v = sequence(np.random.default_rng(0), 70, 1, 64)
    k[3, 0, 5] = np.nan
    cache = Cache(np.uint16, 1, 64, np.arange(2, dtype=np.int32))
    cache.store(k, v)
    assert np.isnan(cache.attend(BEST, np.ones((4, 64), np.float32), 70)).all()


def test_head_tiles() -> None:
    assert [len(attention.head_tile(R)) for R in range(1, 13)] == [1, 2, 3, 4, 1, 3, 1, 4, 3, 2, 1, 4]
