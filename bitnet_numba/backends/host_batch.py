"""The reference model's batch (see `bitnet_numba.backend`): one sequence after the other, keys and values in pages.

Each sequence is computed just as `ReferenceContext` computes it, in products of the same shapes, so that it gets the
same tokens to the bit; pages end where the pieces of prompts do.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.protocol import NO_TOKEN
from bitnet_numba.config import ModelConfig
from bitnet_numba.errors import BackendError
from bitnet_numba.reference.model import PIECE, Cache, Floats, Model
from bitnet_numba.sampling import SamplingParams, sample


class PagedCache(Cache):
    """Keys and values of one sequence, in pages of a pool that it shares with others."""

    def __init__(self, pool: Floats, pages: Sequence[int], computed: int):
        """pool: [num_pages, layers, 2, PIECE, G, D]. computed: leading tokens that the pages hold."""
        self._pool = pool
        self._pages: NDArray[np.int64] = np.asarray(pages, np.int64)
        self.length = computed

    def append(self, layer: int, keys: Floats, values: Floats) -> tuple[Floats, Floats]:
        """Stores the next tokens' keys and values [M, G, D] of a layer; returns those of all tokens [T, G, D]."""
        end = self.length + len(keys)
        positions = np.arange(self.length, end)
        pages, places = self._pages[positions // PIECE], positions % PIECE
        self._pool[pages, layer, 0, places], self._pool[pages, layer, 1, places] = keys, values
        used = self._pool[self._pages[: -(-end // PIECE)], layer]  # [pages, 2, PIECE, G, D]
        shape = (-1, *keys.shape[1:])
        return used[:, 0].reshape(shape)[:end], used[:, 1].reshape(shape)[:end]

    def spoil(self, count: int) -> None:
        """Makes the next tokens' keys and values NaN in all layers."""
        positions = np.arange(self.length, self.length + count)
        self._pool[self._pages[positions // PIECE], :, :, positions % PIECE] = np.nan
        self.length += count


class _Sequence:
    def __init__(self, ids: Sequence[int], params: SamplingParams, cache: PagedCache):
        self.ids = list(ids)  # prompt and sampled tokens
        self.prompt = len(ids)  # tokens
        self.params = params
        self.cache = cache


class ReferenceBatch:
    """Sequences in pages. Calls compute at once; `collect` hands out the results in their order."""

    page_size = PIECE

    def __init__(self, model: Model, max_sequences: int, capacity: int, num_pages: int):
        self.max_sequences, self.capacity, self.num_pages = max_sequences, capacity, num_pages
        self._model = model
        c = model.config
        try:
            self._pool = np.empty((num_pages, c.num_layers, 2, PIECE, c.num_kv_heads, c.head_dim), np.float32)
        except MemoryError:
            size = num_pages * page_bytes(c)
            raise BackendError(
                f"room for {num_pages * PIECE} tokens takes {size / 1e9:.2f} GB of memory, which are not free"
            ) from None
        self._sequences: dict[int, _Sequence] = {}  # by slot
        self._results: deque[list[tuple[int, int]]] = deque()

    def start(self, slot: int, ids: Sequence[int], params: SamplingParams, pages: Sequence[int], computed: int) -> None:
        """A new sequence takes a slot."""
        if not 0 <= slot < self.max_sequences:
            raise ValueError(f"there is no slot {slot}")
        if not len(ids) <= len(pages) * PIECE or not all(0 <= page < self.num_pages for page in pages):
            raise ValueError(f"a prompt of {len(ids)} tokens cannot lie in pages {list(pages)}")
        if computed % PIECE or not 0 <= computed < len(ids):
            raise ValueError(f"{computed} tokens computed of {len(ids)} are not whole pages or leave none")
        self._sequences[slot] = _Sequence(ids, params, PagedCache(self._pool, pages, computed))

    def prefill(self, slot: int, count: int) -> None:
        """Computes the next tokens of a prompt; at its end, samples."""
        s = self._sequences[slot]
        end = s.cache.length + count
        if count < 1 or end > s.prompt or (end < s.prompt and end % PIECE):
            raise ValueError(f"tokens {s.cache.length} to {end} of {s.prompt} end neither a page nor the prompt")
        self._feed(s, s.ids[s.cache.length : end], then_sample=end == s.prompt)
        if end == s.prompt:
            self._results.append([(slot, s.ids[-1])])

    def step(self, slots: Sequence[int]) -> None:
        """One more token of each sequence."""
        results = []
        for slot in slots:
            s = self._sequences[slot]
            if len(s.ids) == s.prompt:
                raise ValueError(f"slot {slot} has not computed its prompt")
            if s.ids[-1] != NO_TOKEN:
                self._feed(s, s.ids[-1:], then_sample=True)
            results.append((slot, s.ids[-1]))
        self._results.append(results)

    def collect(self) -> list[tuple[int, int]]:
        """The results of the oldest call that has some."""
        return self._results.popleft()

    def close(self) -> None:
        """Frees the pages."""
        del self._pool
        self._sequences.clear()

    def _feed(self, s: _Sequence, ids: Sequence[int], then_sample: bool) -> None:
        """Computes the next tokens of a sequence and, if asked to, samples the one after them."""
        end = s.cache.length + len(ids)
        token = NO_TOKEN
        try:
            with np.errstate(all="ignore"):  # NO_TOKEN says all that NumPy's warnings would
                for hidden in self._model.extend(ids, s.cache):
                    last = hidden[-1:]
                if then_sample:
                    token = sample(self._model.logits(last)[0], s.ids, s.params)
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            # Tokens that could not be computed are as if NaN had gone through: whoever shares them fares alike.
            s.cache.spoil(end - s.cache.length)
        if then_sample:
            s.ids.append(token)


def page_bytes(config: ModelConfig) -> int:
    """Bytes of one page, all layers."""
    return 4 * 2 * PIECE * config.num_layers * config.num_kv_heads * config.head_dim
