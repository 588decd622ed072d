"""Sequences on the device: tokens, positions, sampling settings, keys and values.

Everything that changes from step to step lies here, in device memory, so that a captured graph serves every step:

    tokens       [slots, capacity + 1]       a slot's tokens by position; samplers write the next one
    position     [slots]                     the position that is fed next
    seen         [slots, vocabulary / 32]    a bit for every token that was fed
    settings     [slots, SETTINGS]           see `sampling.parts`
    block_table  [slots, capacity / PAGE]    the pages of a slot's keys and values, in order (drawn in `kv_cache`)
    slot_ids     [slots, padded]             the slots whose next tokens a step feeds, -1 for none

Of float8 keys and values, one layer's pages as float16 too, which prompts attend to (see `attention.expand`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.config import ModelConfig
from bitnet_numba.kernels.attention import prefill
from bitnet_numba.kernels.attention.kv_cache import PAGE, LayerCache, head_page_words, pool_strides, sequence_strides
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype
from bitnet_numba.kernels.attention.parts import RopeTables
from bitnet_numba.kernels.operands import SequenceArrays
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView
from bitnet_numba.kernels.sampling import parts
from bitnet_numba.reference.rope import rope_tables  # the one definition of the rotary frequencies

MANY, MANY_STEP = 256, 32  # see `step_size`


class Expanded(NamedTuple):
    """Of float8: a layer's pages as float16."""

    pages: DeviceArray  # int32: how many places in the block table follow, whose pages a pass over prompts expands
    cache: LayerCache

    @property
    def arrays(self) -> tuple[DeviceArray, ...]:
        """What it owns."""
        return self.pages, self.cache.keys, self.cache.values


class SequenceState:
    """`slots` sequences of up to `capacity` tokens each."""

    def __init__(
        self,
        device: Device,
        config: ModelConfig,
        capacity: int,
        slots: int = 1,
        pages: int | None = None,
        kv_dtype: KVDtype = DEFAULT,
    ):
        """pages: how many the slots share; None is for one slot, whose tokens are contiguous."""
        self.capacity, self.slots, self.kv_dtype = capacity, slots, kv_dtype
        self.tokens_stride = capacity + 1
        self.block_table_stride = pages_of(capacity)
        self.padded_capacity = self.block_table_stride * PAGE

        def layout(dtype: KVDtype) -> tuple[int, int, int]:
            """(page_words, head_words, words of a layer)."""
            if pages is None:
                page_words, head_words = sequence_strides(self.padded_capacity, config.head_dim, dtype)
                return page_words, head_words, config.num_kv_heads * head_words
            page_words, head_words = pool_strides(config.num_kv_heads, config.head_dim, dtype)
            return page_words, head_words, pages * page_words

        self.page_words, self.head_words, self.layer_words = layout(kv_dtype)
        self.seen_stride = -(-config.vocab_size // 32)
        self.cache = device.zeros(2 * config.num_layers * self.layer_words, np.int32)  # [layers, 2, layer_words]
        self.tokens = device.zeros(slots * self.tokens_stride, np.int32)
        self._positions = device.zeros(1 + slots, np.int32)
        self.position = DeviceView(self._positions.address + 4, slots, np.int32)
        # Of one slot: as the kernels for many sequences take it, slot 0 and its position.
        self.slot_position = DeviceView(self._positions.address, 2, np.int32)
        self.seen = device.zeros(slots * self.seen_stride, np.int32)
        self.settings = device.zeros(slots * parts.SETTINGS, np.float64)
        self.block_table = device.array(np.arange(slots * self.block_table_stride, dtype=np.int32))
        self.expanded: Expanded | None = None
        if kv_dtype == "float8" and prefill.fits(device.arch, config.head_dim, "float16"):
            *strides, words = layout("float16")
            wide = [device.zeros(words, np.int32) for _ in range(2)]
            places = device.zeros(1 + slots * self.block_table_stride, np.int32)
            table = self.block_table, self.block_table_stride
            self.expanded = Expanded(places, LayerCache(wide[0], wide[1], *table, strides[0], strides[1], "float16"))
        self.slot_ids = device.zeros(step_size(slots), np.int32)
        self.rope = upload_rope(device, config, self.block_table_stride * PAGE)
        self.arrays = SequenceArrays(
            self.tokens, self.tokens_stride, self.position, self.seen, self.seen_stride, self.settings
        )

    def layer_cache(self, layer: int) -> LayerCache:
        """A layer's keys and values."""
        words = self.layer_words
        start = self.cache.address + 8 * layer * words
        keys, values = DeviceView(start, words, np.int32), DeviceView(start + 4 * words, words, np.int32)
        return LayerCache(
            keys, values, self.block_table, self.block_table_stride, self.page_words, self.head_words, self.kv_dtype
        )

    def seen_bits(self, ids: Sequence[int]) -> NDArray[np.int32]:
        """What a slot's part of `seen` is after these tokens."""
        seen = np.zeros(self.seen_stride, np.uint32)
        tokens = np.asarray(ids, np.int64)
        np.bitwise_or.at(seen, tokens >> 5, np.uint32(1) << (tokens & 31).astype(np.uint32))
        return seen.view(np.int32)

    def close(self) -> None:
        """Frees the memory."""
        for array in (
            self.cache, self.tokens, self._positions, self.seen, self.settings, self.block_table, self.slot_ids,
            self.rope.cos, self.rope.sin,
        ):  # fmt: skip
            array.close()
        for array in () if self.expanded is None else self.expanded.arrays:
            array.close()


def padded_size(count: int, least: int = 1) -> int:
    """The next power of two, but at least `least`."""
    return max(least, 1 << (count - 1).bit_length())


def padded_sizes(first: int, last: int) -> list[int]:
    """All powers of two from one to another; both are, and are included."""
    return [1 << i for i in range(first.bit_length() - 1, last.bit_length())]


def step_size(count: int) -> int:
    """What a step of so many sequences is padded to: a power of two, or beyond MANY a multiple of MANY_STEP."""
    return padded_size(count) if count <= MANY else -(-count // MANY_STEP) * MANY_STEP


def step_sizes(count: int) -> list[int]:
    """All of them up to that of `count` sequences."""
    return [*padded_sizes(1, min(padded_size(count), MANY)), *range(MANY + MANY_STEP, step_size(count) + 1, MANY_STEP)]


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


def page_bytes(config: ModelConfig, kv_dtype: KVDtype) -> int:
    """Bytes of keys and values of a page, all layers together."""
    layers = 8 * config.num_layers * config.num_kv_heads * head_page_words(config.head_dim, kv_dtype)
    expanded = 8 * config.num_kv_heads * head_page_words(config.head_dim, "float16") if kv_dtype == "float8" else 0
    return layers + expanded


def upload_rope(device: Device, config: ModelConfig, positions: int, local: bool = False) -> RopeTables:
    """Rotary tables of the positions 0 .. positions - 1 on the device; local: of layers with a window."""
    half = config.head_dim // 2  # the second half is a copy of the first
    cos, sin = (device.array(table[:, :half]) for table in rope_tables(config, np.arange(positions), local))
    return RopeTables(cos, sin)


def why_nan(kv_dtype: KVDtype) -> str:
    """What is known of logits that are not finite, in a few words."""
    largest = {"float8": "57344", "float16": "65504, the largest float16"}.get(kv_dtype)
    hint = f" (or a key or value is beyond {largest}: kv_dtype bfloat16 holds it)" if largest else ""
    return f"logits hold NaN or infinity{hint}"
