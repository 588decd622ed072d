"""Sequences on the device: tokens, positions, sampling settings, keys and values.

Everything that changes from step to step lies here, in device memory, so that a captured step serves them all:

    tokens    [slots, capacity + 1]       a slot's tokens by position; samplers write the next one
    position  [slots]                     the position that is fed next
    seen      [slots, vocabulary / 32]    a bit for every token that was fed
    settings  [slots, SETTINGS]           see `sampler`
    table     [slots, capacity / PAGE]    the pages of a slot's keys and values, in order (drawn in `kv_cache`)
    order     [at least slots]            which slot each row of the next pass is (of a prompt's: the first entry)
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.config import ModelConfig
from bitnet_numba.kernels.attention.kv_cache import PAGE, LayerCache, pool_strides, sequence_strides, token_words
from bitnet_numba.kernels.operands import SequenceArrays
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView
from bitnet_numba.kernels.sampling import parts
from bitnet_numba.reference.model import rope_tables  # the one definition of the rotary frequencies


class SequenceState:
    """`slots` sequences of up to `capacity` tokens each."""

    def __init__(self, config: ModelConfig, capacity: int, slots: int = 1, pages: int | None = None):
        """`pages`: how many the slots share; None is for one slot, whose tokens lie side by side."""
        self.capacity, self.slots = capacity, slots
        self.stride = capacity + 1  # of tokens
        self.table_stride = pages_of(capacity)
        if pages is None:
            self.padded = self.table_stride * PAGE  # tokens from one head's keys to the next's
            self.page_words, self.head_words = sequence_strides(self.padded, config.head_dim)
            self.cache_words = config.num_kv_heads * self.head_words
        else:
            self.page_words, self.head_words = pool_strides(config.num_kv_heads, config.head_dim)
            self.cache_words = pages * self.page_words
        self.cache = DeviceArray(2 * config.num_layers * self.cache_words, np.int32, zero=True)
        self.tokens = DeviceArray(slots * self.stride, np.int32, zero=True)
        self.position = DeviceArray(slots, np.int32, zero=True)
        self.seen_words = -(-config.vocab_size // 32)
        self.seen = DeviceArray(slots * self.seen_words, np.int32, zero=True)
        self.settings = DeviceArray(slots * parts.SETTINGS, np.float64, zero=True)
        self.table = DeviceArray.of(np.arange(slots * self.table_stride, dtype=np.int32))
        self.order = DeviceArray(padded_size(slots), np.int32, zero=True)
        positions = np.arange(self.table_stride * PAGE)
        cos, sin = rope_tables(config, positions)  # [positions, D], the second half a copy of the first
        half = config.head_dim // 2
        self.cos, self.sin = DeviceArray.of(cos[:, :half]), DeviceArray.of(sin[:, :half])

    @property
    def arrays(self) -> SequenceArrays:
        """What kernels of tokens take."""
        return SequenceArrays(self.tokens, self.stride, self.position, self.seen, self.seen_words, self.settings)

    def keys_values(self, layer: int) -> tuple[DeviceView, DeviceView]:
        """A layer's part of the cache."""
        start = self.cache.address + 8 * layer * self.cache_words
        words = self.cache_words
        return DeviceView(start, words, np.int32), DeviceView(start + 4 * words, words, np.int32)

    def layer_cache(self, layer: int) -> LayerCache:
        """A layer's part of the cache, as passes of many rows take it."""
        return LayerCache(
            *self.keys_values(layer), self.table, self.table_stride, self.page_words, self.head_words
        )  # fmt: skip

    def seen_bits(self, ids: Sequence[int]) -> NDArray[np.int32]:
        """A slot's `seen` after these tokens."""
        seen = np.zeros(self.seen_words, np.uint32)
        tokens = np.asarray(ids, np.int64)
        np.bitwise_or.at(seen, tokens >> 5, np.uint32(1) << (tokens & 31).astype(np.uint32))
        return seen.view(np.int32)

    def close(self) -> None:
        """Frees the memory."""
        for array in (
            self.cache, self.tokens, self.position, self.seen, self.settings, self.table, self.order, self.cos, self.sin
        ):  # fmt: skip
            array.close()


def padded_size(rows: int, least: int = 1) -> int:
    """The captured size of a pass that serves so many rows: the next power of two."""
    return max(least, 1 << (rows - 1).bit_length())


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


def page_bytes(config: ModelConfig) -> int:
    """Bytes of keys and values of a page, all layers together."""
    return 8 * config.num_layers * config.num_kv_heads * token_words(config.head_dim) * PAGE
