"""Backends whose model runs on the host: contexts and batches over anything that computes like `HostModel`.

Sequences are computed one after the other. Each is computed just as `HostContext` computes it, in products of the same
shapes, so that it gets the same tokens to the bit whatever runs beside it; pages end where the pieces of prompts do.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.protocol import NO_TOKEN
from bitnet_numba.checkpoint.packed import PackedCheckpoint
from bitnet_numba.config import ModelConfig
from bitnet_numba.errors import BackendError
from bitnet_numba.reference.model import PIECE, Cache, Floats, Model
from bitnet_numba.sampling import SamplingParams, sample

POOL_BYTES = 1 << 30  # of keys and values that a batch takes unless asked for a certain number of tokens


class HostModel(Protocol):
    """What a model has to do: the reference's `Model` does, and so can any other."""

    config: ModelConfig

    def extend(self, ids: Sequence[int], cache: Cache) -> Iterator[Floats]:
        """Appends tokens to a cache and yields their final hidden states [M, hidden], in pieces that end where the
        position is a multiple of PIECE."""

    def logits(self, hidden: Floats) -> Floats:
        """Scores of the next token: [M, hidden] -> [M, vocab]."""

    def nbytes(self) -> int:
        """Bytes of weights in memory."""


class HostBackend:
    """A model on the host, behind the engine's interface (see `protocol.Backend`)."""

    def __init__(self, name: str, model: HostModel):
        self.name, self.model = name, model

    def new_context(self, capacity: int) -> "HostContext":
        """An empty context for up to `capacity` tokens."""
        return HostContext(self.model, capacity)

    def new_batch(self, max_sequences: int, capacity: int, tokens: int | None = None) -> "HostBatch":
        """Room for sequences that decode together. Raises BackendError when memory does not suffice."""
        longest = -(-capacity // PIECE)  # pages of one sequence
        if tokens is None:
            num_pages = min(max_sequences * longest, max(longest, POOL_BYTES // page_bytes(self.model.config)))
        else:
            num_pages = -(-tokens // PIECE)
        return HostBatch(self.model, max_sequences, capacity, num_pages)

    def memory(self) -> dict[str, int]:
        """Bytes in use by purpose."""
        return {"weights": self.model.nbytes()}


def reference_backend(checkpoint: PackedCheckpoint) -> HostBackend:
    """The reference model on the CPU."""
    return HostBackend("reference", Model(checkpoint))


class HostContext:
    """One sequence."""

    def __init__(self, model: HostModel, capacity: int):
        self.capacity = capacity
        self.ids: list[int] = []
        self._model = model
        self._cache = Cache(model.config, capacity)

    def truncate(self, length: int) -> None:
        """Forgets every token from position `length` on."""
        if not 0 <= length <= len(self.ids):
            raise ValueError(f"cannot cut a context of {len(self.ids)} tokens to {length}")
        del self.ids[length:]
        self._cache.length = length

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens and returns the logits at each of them, float32 [M, vocab]."""
        return np.concatenate([self._model.logits(hidden) for hidden in self._extend(ids)])

    def decode(self, ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """Appends tokens (at least one), then yields sampled tokens, one a step, until the context is full."""
        while True:
            for hidden in self._extend(ids):
                last = hidden[-1:]
            token = sample(self._model.logits(last)[0], self.ids, params)
            yield token
            if len(self.ids) == self.capacity:
                return
            ids = [token]

    def close(self) -> None:
        """Frees the cache."""
        del self._cache

    def _extend(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Final hidden states of appended tokens, piece by piece."""
        start = len(self.ids)
        if not 1 <= len(ids) <= self.capacity - len(self.ids):
            raise ValueError(f"{len(ids)} tokens do not fit {self.capacity - len(self.ids)} free places")
        for hidden in self._model.extend(ids, self._cache):
            self.ids += ids[len(self.ids) - start :][: len(hidden)]
            yield hidden


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


class HostBatch:
    """Sequences in pages. Calls compute at once; `collect` hands out the results in their order."""

    page_size = PIECE

    def __init__(self, model: HostModel, max_sequences: int, capacity: int, num_pages: int):
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
