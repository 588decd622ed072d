"""The cache's layout, and appending tokens to it.

Contract: `append` stores bit for bit what the reference's rotation gives, rounded to the cache's type, at the word that
the layout says, zeros in the padding, and touches nothing else; NaN for what float16 cannot hold; tokens of slot -1 are
not stored.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.kernels.attention.kv_cache import (
    APPEND_THREADS,
    PAGE,
    LayerCache,
    append,
    append_spec,
    pool_strides,
    sequence_strides,
    token_words,
)
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, HALVES, KV_BYTES, KV_DTYPES, KVDtype
from bitnet_numba.kernels.attention.paged_simt import paged_attention_simt
from bitnet_numba.kernels.attention.parts import HeadShape, RopeTables
from bitnet_numba.kernels.attention.prefill import fits, prefill_attention
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.reference.model import rotate
from tests.kernels.harness import POISON, Out, arch, needs_gpu, run, simulated

NAN_BITS = 0x7FC0  # of either type
DTYPES = st.sampled_from(HALVES)
ALL_DTYPES = st.sampled_from(KV_DTYPES)


def to_bits(x: np.ndarray, dtype: KVDtype) -> np.ndarray:
    """float32 as uint16 bits of the cache; what float16 cannot hold is NaN."""
    if dtype == "bfloat16":
        return from_float32(x)
    fitting = np.where(np.abs(x) < 65520, x, np.float32(np.nan))
    return fitting.astype(np.float16).view(np.uint16)


def from_bits(bits: np.ndarray, dtype: KVDtype) -> np.ndarray:
    """float32 of such bits."""
    return to_float32(bits) if dtype == "bfloat16" else bits.view(np.float16).astype(np.float32)


def float8_scales(x: np.ndarray) -> np.ndarray:
    """The power of two of each vector [..., D], float32 [...]: its largest number is at most 1.75 * 2^8 times that."""
    largest = np.abs(x).max(axis=-1).astype(np.float64)
    power = np.ceil(np.log2(np.maximum(largest, 2.0**-200) / 448))
    return np.where(largest <= 448 * 2.0**7, 2.0 ** np.maximum(power, -100), np.nan).astype(np.float32)


def to_float8(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8 [..., D]: float16 of 2^-8 x / scale, with 3 bits of mantissa, ties to even."""
    with np.errstate(invalid="ignore"):
        bits = (x / scales[..., None] * np.float32(2.0**-8)).astype(np.float16).view(np.uint16).astype(np.int32)
    size = bits & 0x7FFF
    return (bits >> 8 & 0x80 | (size + 0x3F + (size >> 7 & 1)) >> 7).astype(np.uint8)


def from_float8(bits: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 of such numbers."""
    halves = (bits.astype(np.uint16) & 0x80) << 8 | (bits.astype(np.uint16) & 0x7F) << 7
    return halves.view(np.float16).astype(np.float32) * np.float32(256) * scales[..., None]


def stored_words(x: np.ndarray, dtype: KVDtype) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., D] as the cache's words, int32 [..., WORDS]; and of float8 the scales, float32 [...]."""
    scales = float8_scales(x)
    if dtype == "float8":
        bits = to_float8(x, scales)
    else:
        bits = np.ascontiguousarray(x, np.float32) if dtype == "float32" else to_bits(x, dtype)
    padded = np.zeros(
        (*x.shape[:-1], token_words(x.shape[-1], dtype) * KV_BYTES["float32"] // KV_BYTES[dtype]), bits.dtype
    )
    padded[..., : x.shape[-1]] = bits
    return padded.view(np.int32), scales


def stored_numbers(words: np.ndarray, scales: np.ndarray, head_dim: int, dtype: KVDtype) -> np.ndarray:
    """float32 [..., D] of such words."""
    kind = {"float8": np.uint8, "float32": np.float32}.get(dtype, np.uint16)
    bits = words.view(kind)[..., :head_dim].copy()
    if dtype == "float8":
        return from_float8(bits, scales)
    return from_bits(bits, dtype) if dtype in HALVES else bits


class Cache:
    """A cache on the host, by the layout's text: `at(slot, kv_head, token)` is where a token's words start."""

    def __init__(
        self,
        slots: int,
        tokens: int,
        kv_heads: int,
        head_dim: int,
        pooled: bool,
        rng: np.random.Generator,
        dtype: KVDtype = DEFAULT,
    ):
        pages, self.dtype = -(-tokens // PAGE), dtype
        self.kv_heads, self.head_dim, self.words = kv_heads, head_dim, token_words(head_dim, dtype)
        self.block_table_stride = pages + 1
        self.block_table = np.full((slots, self.block_table_stride), -1, np.int32)
        if pooled:
            self.block_table[:, :pages] = rng.permutation(slots * pages + 2)[: slots * pages].reshape(slots, pages)
            self.page_words, self.head_words = pool_strides(kv_heads, head_dim, dtype)
            self.size = (slots * pages + 2) * self.page_words
        else:
            assert slots == 1
            self.block_table[0, :pages] = np.arange(pages)
            self.page_words, self.head_words = sequence_strides(pages * PAGE, head_dim, dtype)
            self.size = kv_heads * self.head_words
        self.keys, self.values = (np.full(self.size, POISON * 0x1010101, np.uint32).view(np.int32) for _ in range(2))

    def at(self, slot: int, kv_head: int, token: int) -> slice:
        start = int(self.block_table[slot, token // PAGE]) * self.page_words
        start += kv_head * self.head_words + token % PAGE * self.words
        return slice(start, start + self.words)

    def scale_at(self, slot: int, kv_head: int, token: int) -> int:
        """Of float8: where the scale of a token is."""
        first = self.at(slot, kv_head, token).start - token % PAGE * self.words
        return first + PAGE * self.words + token % PAGE

    def store(self, slot: int, token: int, k: np.ndarray, v: np.ndarray) -> None:
        """k, v: float32 [kv_heads, head_dim], k rotated."""
        for words, x in ((self.keys, k), (self.values, v)):
            stored, scales = stored_words(x, self.dtype)
            for g in range(self.kv_heads):
                words[self.at(slot, g, token)] = stored[g]
                if self.dtype == "float8":
                    words[self.scale_at(slot, g, token)] = scales[g : g + 1].view(np.int32)[0]

    def read(self, slot: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """A slot's keys and values as they are stored: float64 [end, kv_heads, head_dim] each."""
        both = []
        for words in (self.keys, self.values):
            stored = np.array([[words[self.at(slot, g, t)] for g in range(self.kv_heads)] for t in range(end)])
            scales = np.ones(stored.shape[:2], np.float32)
            if self.dtype == "float8":
                places = [[self.scale_at(slot, g, t) for g in range(self.kv_heads)] for t in range(end)]
                scales = words[np.array(places)].view(np.float32)
            both.append(stored_numbers(stored, scales, self.head_dim, self.dtype).astype(np.float64))
        return both[0], both[1]

    def arguments(self, keys: object, values: object) -> list:
        """What the kernels take, with these as keys and values."""
        return [self.block_table, self.block_table_stride, keys, values, self.page_words, self.head_words]


def random_slot_positions(num_tokens: int, slots: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """(slot, position) of tokens of a pass: none twice, some unused."""
    chosen = rng.permutation(slots * tokens)[:num_tokens]
    slot_positions = np.stack([chosen // tokens, chosen % tokens], -1).astype(np.int32)
    slot_positions[rng.random(num_tokens) < 0.2] = (-1, 2**30)
    return slot_positions


def check_append(
    head_dim: int,
    heads: int,
    kv_heads: int,
    num_tokens: int,
    slots: int,
    tokens: int,
    seed: int,
    dtype: KVDtype,
    threads: int = APPEND_THREADS,
) -> None:
    """Compares one launch with the reference; the whole cache, so that nothing else may have been written."""
    rng, spec = np.random.default_rng(seed), append_spec(arch(), head_dim, dtype, threads)
    cache = Cache(slots, tokens, kv_heads, head_dim, slots > 1, rng, dtype)
    slot_positions = random_slot_positions(num_tokens, slots, tokens, rng)
    qkv = rng.standard_normal((num_tokens, heads + 2 * kv_heads, head_dim)).astype(np.float32)
    if dtype != "float8":
        qkv[rng.random(qkv.shape) < 0.1] *= np.float32(1e5)  # mostly beyond float16
    else:  # whole vectors, since the bytes of one that is beyond the range may be anything
        qkv *= np.exp2(rng.integers(-12, 12, qkv.shape[:2]))[..., None].astype(np.float32)
    angles = rng.uniform(-np.pi, np.pi, (tokens, head_dim // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    keys, values = (Out(cache.size, np.int32, words) for words in (cache.keys, cache.values))
    run(spec, num_tokens, [qkv, cos, sin, slot_positions, *cache.arguments(keys, values), heads, kv_heads])
    for row, (slot, position) in enumerate(slot_positions):
        if slot >= 0:
            cos2, sin2 = (np.concatenate([table[position]] * 2)[None] for table in (cos, sin))
            k = rotate(qkv[row : row + 1, heads : heads + kv_heads], cos2, sin2)[0]
            cache.store(slot, position, k, qkv[row, heads + kv_heads :])
    for name, array, expected in (("keys", keys, cache.keys), ("values", values, cache.values)):
        kind = {"float8": np.uint8, "float32": np.uint32}.get(dtype, np.uint16)
        bits, expected_bits = (words.view(kind) for words in (array.array, expected))
        wrong = np.flatnonzero(bits != expected_bits)
        if dtype in HALVES:  # one NaN is as good as another
            numbers = [from_bits(each[wrong].copy(), dtype) for each in (bits, expected_bits)]
            wrong = wrong[~np.isnan(numbers[0]) | ~np.isnan(numbers[1])]
        assert not wrong.size, f"{name}: {wrong.size} numbers differ, the first is {wrong[0]}"


@simulated
@settings(max_examples=8)
@given(
    shape=st.sampled_from([(8, 4, 2), (4, 1, 1), (6, 2, 2), (34, 2, 1), (16, 3, 3)]),
    num_tokens=st.integers(1, 5),
    slots=st.integers(1, 3),
    tokens=st.integers(6, 130),
    seed=st.integers(0, 2**32 - 1),
    dtype=ALL_DTYPES,
)
def test_simulated_append(
    shape: tuple[int, int, int], num_tokens: int, slots: int, tokens: int, seed: int, dtype: KVDtype
) -> None:
    check_append(*shape, num_tokens, slots, tokens, seed, dtype, threads=32)


@needs_gpu
@given(
    shape=st.sampled_from([(128, 20, 5), (100, 32, 32), (96, 16, 16), (256, 12, 4), (64, 32, 8), (34, 2, 1)]),
    num_tokens=st.integers(1, 200),
    slots=st.integers(1, 9),
    tokens=st.integers(200, 700),
    seed=st.integers(0, 2**32 - 1),
    dtype=ALL_DTYPES,
)
def test_append_on_gpu(
    shape: tuple[int, int, int], num_tokens: int, slots: int, tokens: int, seed: int, dtype: KVDtype
) -> None:
    check_append(*shape, num_tokens, slots, tokens, seed, dtype)


def check_numbers_beyond_float8(threads: int) -> None:
    """Give the whole vector NaN for its scale; the largest that fits does not."""
    spec, (D, heads, kv_heads) = append_spec(arch(), 8, "float8", threads), (8, 1, 2)
    cache = Cache(1, 1, kv_heads, D, False, np.random.default_rng(1), "float8")
    qkv = np.ones((1, heads + 2 * kv_heads, D), np.float32)
    qkv[0, 3, 2], qkv[0, 4, 5] = 57344.0, np.nextafter(np.float32(57344), np.float32(1e9))
    qkv[0, 1, 7], qkv[0, 2, 0] = np.nan, np.inf
    keys, values = (Out(cache.size, np.int32, words) for words in (cache.keys, cache.values))
    ones, zeros = np.ones(D // 2, np.float32), np.zeros(D // 2, np.float32)
    positions = np.zeros((1, 2), np.int32)
    run(spec, 1, [qkv, ones, zeros, positions, *cache.arguments(keys, values), heads, kv_heads])
    scales = [array.array[cache.scale_at(0, g, 0)].view(np.float32) for array in (keys, values) for g in range(2)]
    assert scales[2] == 128 and np.isnan([scales[i] for i in (0, 1, 3)]).all()


@simulated
def test_simulated_numbers_beyond_float8() -> None:
    check_numbers_beyond_float8(32)


@needs_gpu
def test_numbers_beyond_float8_on_gpu() -> None:
    check_numbers_beyond_float8(APPEND_THREADS)


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
                words = cache.at(slot, g, token)
                assert words.stop <= cache.size
                taken[words] += 1
    assert taken.max() == 1 and taken.sum() == slots * kv_heads * tokens * cache.words


def test_one_sequence_is_contiguous() -> None:
    """The arrangement of `decode`: [kv_heads, capacity, words]."""
    cache = Cache(1, 2 * PAGE, 3, 8, False, np.random.default_rng(1))
    assert [cache.at(0, g, t).start for g, t in ((0, 1), (0, 65), (2, 64))] == [4, 260, (2 * 128 + 64) * 4]


def test_refuses() -> None:
    with pytest.raises(ValueError, match="a multiple of 64 tokens, not 100"):
        sequence_strides(100, 128)
    with pytest.raises(ValueError, match="even head sizes up to 256, not 7"):
        append_spec(90, 7)


def test_launches_check_their_operands() -> None:
    shape, count, pages = HeadShape(20, 5, 128), 16, 4
    page_words, head_words = pool_strides(5, 128)
    for target, prefill in ((90, "prefill_attention"), (75, "paged_attention_simt")):
        device = DryRunDevice(target, 132)
        keys, values = (device.empty(2 * page_words, np.int32) for _ in range(2))
        cache = LayerCache(keys, values, device.empty(pages, np.int32), pages, page_words, head_words)
        rope = RopeTables(*(device.empty(pages * PAGE * 64, np.float32) for _ in range(2)))
        qkv, out = device.empty(count * 3840, np.float32), device.empty(count * 2560, np.float32)
        slot_positions = device.empty(2 * count, np.int32)
        assert append(device, qkv, rope, slot_positions, cache, count, shape).spec is append_spec(target, 128, DEFAULT)
        attention = prefill_attention if fits(target, 128) else paged_attention_simt
        assert attention(device, qkv, rope, slot_positions, cache, out, count, shape).name.startswith(prefill)
        with pytest.raises(ValueError, match=f"{prefill}: out holds 3 elements, a pass of 16 x 20 heads of 128"):
            attention(device, qkv, rope, slot_positions, cache, device.empty(3, np.float32), count, shape)
        with pytest.raises(ValueError, match="append: slot_positions must be int32, not float32"):
            append(device, qkv, rope, qkv, cache, count, shape)
        with pytest.raises(ValueError, match="append: 0 tokens; at least one is needed"):
            append(device, qkv, rope, slot_positions, cache, 0, shape)
        with pytest.raises(ValueError, match=f"append: values holds {page_words} elements, not {2 * page_words}"):
            short = device.empty(page_words, np.int32)
            append(device, qkv, rope, slot_positions, cache._replace(values=short), count, shape)
        with pytest.raises(ValueError, match="even head sizes up to 256, not 7"):
            append(device, qkv, rope, slot_positions, cache, count, HeadShape(20, 5, 7))
