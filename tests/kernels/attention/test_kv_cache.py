"""The cache's layout, and appending rows to it.

Contract: `append` stores bit for bit what the reference's rotation gives, rounded to bfloat16, at the place that the
layout says, zeros in the padding, and touches nothing else; rows of slot -1 store nothing.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.bfloat16 import from_float32
from bitnet_numba.kernels.attention.kv_cache import PAGE, append_spec, pool_strides, sequence_strides, token_words
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.reference.model import rotate
from tests.kernels.harness import POISON, Out, arch, needs_gpu, run, simulated


class Cache:
    """A cache on the host, by the layout's text: `at(slot, kv_head, token)` is where a token's words start."""

    def __init__(self, slots: int, tokens: int, kv_heads: int, head_dim: int, pooled: bool, rng: np.random.Generator):
        pages = -(-tokens // PAGE)
        self.kv_heads, self.head_dim, self.words = kv_heads, head_dim, token_words(head_dim)
        self.table_stride = pages + 1
        self.table = np.full((slots, self.table_stride), -1, np.int32)
        if pooled:
            self.table[:, :pages] = rng.permutation(slots * pages + 2)[: slots * pages].reshape(slots, pages)
            self.page_words, self.head_words = pool_strides(kv_heads, head_dim)
            self.size = (slots * pages + 2) * self.page_words
        else:
            assert slots == 1
            self.table[0, :pages] = np.arange(pages)
            self.page_words, self.head_words = sequence_strides(pages * PAGE, head_dim)
            self.size = kv_heads * self.head_words
        self.keys, self.values = (np.full(self.size, POISON * 0x1010101, np.uint32).view(np.int32) for _ in range(2))

    def at(self, slot: int, kv_head: int, token: int) -> slice:
        start = int(self.table[slot, token // PAGE]) * self.page_words
        start += kv_head * self.head_words + token % PAGE * self.words
        return slice(start, start + self.words)

    def store(self, slot: int, token: int, k: np.ndarray, v: np.ndarray) -> None:
        """k, v: float32 [kv_heads, head_dim], k rotated."""
        for words, x in ((self.keys, k), (self.values, v)):
            padded = np.zeros((self.kv_heads, 2 * self.words), np.uint16)
            padded[:, : self.head_dim] = from_float32(x)
            for g in range(self.kv_heads):
                words[self.at(slot, g, token)] = padded[g].view(np.int32)

    def arguments(self, keys: object, values: object) -> list:
        """What the kernels take, with these as keys and values."""
        return [self.table, self.table_stride, keys, values, self.page_words, self.head_words]


def random_where(rows: int, slots: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """(slot, position) of rows: no token twice, some rows unused."""
    chosen = rng.permutation(slots * tokens)[:rows]
    where = np.stack([chosen // tokens, chosen % tokens], -1).astype(np.int32)
    where[rng.random(rows) < 0.2] = (-1, 2**30)
    return where


def check_append(
    spec: KernelSpec, head_dim: int, heads: int, kv_heads: int, rows: int, slots: int, tokens: int, seed: int
) -> None:
    """Compares one launch with the reference; the whole cache, so that nothing else may have been written."""
    rng = np.random.default_rng(seed)
    cache = Cache(slots, tokens, kv_heads, head_dim, slots > 1, rng)
    where = random_where(rows, slots, tokens, rng)
    qkv = rng.standard_normal((rows, heads + 2 * kv_heads, head_dim)).astype(np.float32)
    angles = rng.uniform(-np.pi, np.pi, (tokens, head_dim // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    keys, values = (Out(cache.size, np.int32, words) for words in (cache.keys, cache.values))
    run(spec, rows, [qkv, cos, sin, where, *cache.arguments(keys, values), heads, kv_heads])
    for row, (slot, position) in enumerate(where):
        if slot >= 0:
            cos2, sin2 = (np.concatenate([table[position]] * 2)[None] for table in (cos, sin))
            k = rotate(qkv[row : row + 1, heads : heads + kv_heads], cos2, sin2)[0]
            cache.store(slot, position, k, qkv[row, heads + kv_heads :])
    for name, array, expected in (("keys", keys, cache.keys), ("values", values, cache.values)):
        wrong = np.flatnonzero(array.array != expected)
        assert not wrong.size, f"{name}: {wrong.size} words differ, the first is {wrong[0]}"


@simulated
@settings(max_examples=8)
@given(
    shape=st.sampled_from([(8, 4, 2), (4, 1, 1), (6, 2, 2), (34, 2, 1), (16, 3, 3)]),
    rows=st.integers(1, 5),
    slots=st.integers(1, 3),
    tokens=st.integers(6, 130),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_append(shape: tuple[int, int, int], rows: int, slots: int, tokens: int, seed: int) -> None:
    head_dim, heads, kv_heads = shape
    check_append(append_spec(arch(), head_dim, 32), head_dim, heads, kv_heads, rows, slots, tokens, seed)


@needs_gpu
@given(
    shape=st.sampled_from([(128, 20, 5), (100, 32, 32), (96, 16, 16), (256, 12, 4), (64, 32, 8), (34, 2, 1)]),
    rows=st.integers(1, 200),
    slots=st.integers(1, 9),
    tokens=st.integers(200, 700),
    seed=st.integers(0, 2**32 - 1),
)
def test_append_on_gpu(shape: tuple[int, int, int], rows: int, slots: int, tokens: int, seed: int) -> None:
    head_dim, heads, kv_heads = shape
    check_append(append_spec(arch(), head_dim), head_dim, heads, kv_heads, rows, slots, tokens, seed)


@settings(max_examples=20)
@given(
    slots=st.integers(1, 4),
    tokens=st.integers(1, 200),
    kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6, 8, 34]),
    seed=st.integers(0, 2**32 - 1),
)
def test_tokens_do_not_overlap(slots: int, tokens: int, kv_heads: int, head_dim: int, seed: int) -> None:
    cache = Cache(slots, tokens, kv_heads, head_dim, slots > 1, np.random.default_rng(seed))
    taken = np.zeros(cache.size, np.int32)
    for slot in range(slots):
        for g in range(kv_heads):
            for token in range(tokens):
                place = cache.at(slot, g, token)
                assert place.stop <= cache.size
                taken[place] += 1
    assert taken.max() == 1 and taken.sum() == slots * kv_heads * tokens * cache.words


def test_one_sequence_is_contiguous() -> None:
    """The arrangement of kernels/attention.py: [kv_heads, capacity, words]."""
    cache = Cache(1, 2 * PAGE, 3, 8, False, np.random.default_rng(1))
    assert [cache.at(0, g, t).start for g, t in ((0, 1), (0, 65), (2, 64))] == [4, 260, (2 * 128 + 64) * 4]


def test_refuses() -> None:
    with pytest.raises(ValueError, match="a multiple of 64 tokens, not 100"):
        sequence_strides(100, 128)
    with pytest.raises(ValueError, match="even head sizes up to 256, not 7"):
        append_spec(90, 7)
