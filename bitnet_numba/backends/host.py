"""Backends whose model runs on the CPU: contexts and batches over any `HostModel`.

Prompts are computed in chunks that end at multiples of PAGE_SIZE, and the sequences of a batch one after another. So
every matrix product of a sequence has the same shape in a batch as in a context of its own, however its prompt is
divided into calls, and its tokens are the same, bit for bit.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.protocol import NO_TOKEN, NOT_FINITE
from bitnet_numba.checkpoint.packed import PackedCheckpoint
from bitnet_numba.config import ModelConfig
from bitnet_numba.errors import BackendError, one_line
from bitnet_numba.reference.model import Cache, Floats, Model
from bitnet_numba.sampling import SamplingParams, sample

PAGE_SIZE = 64  # tokens per page and per prompt chunk, which also bounds the memory for attention scores
POOL_BYTES = 1 << 30  # limit of a batch's KV cache, unless a number of tokens is asked for
# Memory that computing takes beside the cache and attention scores. Half of it is OpenBLAS's, which ends the process if
# it cannot have it.
WORKSPACE_BYTES = 1 << 26
OUT_OF_MEMORY = (MemoryError, OverflowError, ValueError)  # NumPy's errors for sizes beyond memory, or beyond 64 bits


class HostModel(Protocol):
    """What the host backend needs of a model; the reference's `Model` is one."""

    config: ModelConfig

    def forward(self, ids: NDArray[np.int64], cache: Cache) -> Floats:
        """Appends tokens [M] to a cache, calling its `append` for each layer, and returns their final hidden states,
        float32 [M, hidden]."""

    def logits(self, hidden: Floats) -> Floats:
        """Logits of the next token: [M, hidden] -> [M, vocab]."""

    def nbytes(self) -> int:
        """Bytes of all weights."""


def extend(model: HostModel, ids: Sequence[int], cache: Cache) -> Iterator[Floats]:
    """Appends any number of tokens to a cache; yields their final hidden states [M, hidden], chunk by chunk."""
    start = 0
    while start < len(ids):
        end = start + PAGE_SIZE - cache.length % PAGE_SIZE
        yield model.forward(np.asarray(ids[start:end], np.int64), cache)
        start = end


class HostBackend:
    """A model on the CPU (see `protocol.Backend`)."""

    def __init__(self, name: str, model: HostModel):
        self.name, self.model = name, model

    def new_context(self, capacity: int) -> "HostContext":
        """An empty context for up to `capacity` tokens. Raises BackendError if memory is insufficient."""
        pages = pages_of(capacity)
        try:
            self._probe(pages, pages)
            return HostContext(self.model, capacity)
        except OUT_OF_MEMORY:
            fits = PAGE_SIZE * self._fitting_pages(pages, None)
            raise BackendError(
                f"a context of {capacity} tokens takes {self._bytes(pages, pages) / 1e9:.2f} GB of memory, which are "
                f"not free: {f'--context {fits}' if fits else 'no context'} would fit"
            ) from None

    def new_batch(self, max_sequences: int, capacity: int, tokens: int | None = None) -> "HostBatch":
        """An empty batch, see `protocol.Backend`. Raises BackendError if memory is insufficient."""
        sequence_pages = pages_of(capacity)  # of one sequence at full capacity
        if tokens is None:
            affordable = POOL_BYTES // page_bytes(self.model.config)
            num_pages = min(max_sequences * sequence_pages, max(sequence_pages, affordable))
        else:
            num_pages = pages_of(tokens)
        try:
            self._probe(num_pages, sequence_pages)
            return HostBatch(self.model, max_sequences, capacity, num_pages)
        except OUT_OF_MEMORY:
            fits = self._fitting_pages(num_pages, sequence_pages)
            if tokens is None and fits >= sequence_pages:
                return HostBatch(self.model, max_sequences, capacity, fits)
            raise BackendError(
                f"a batch of {num_pages * PAGE_SIZE} tokens takes "
                f"{self._bytes(num_pages, sequence_pages) / 1e9:.2f} GB of memory, which are not free: "
                f"{fits * PAGE_SIZE} tokens would fit"
            ) from None

    def _bytes(self, num_pages: int, sequence_pages: int) -> int:
        """About what a cache takes together with computing from it, for sequences of up to `sequence_pages` each."""
        scores = 4 * 4 * self.model.config.num_heads * PAGE_SIZE**2  # float32, four copies at a time, for each page
        return num_pages * page_bytes(self.model.config) + sequence_pages * scores + WORKSPACE_BYTES

    def _probe(self, num_pages: int, sequence_pages: int) -> None:
        """Raises one of OUT_OF_MEMORY if that much cannot be allocated now."""
        np.empty(self._bytes(num_pages, sequence_pages), np.uint8)

    def _fitting_pages(self, most: int, sequence_pages: int | None) -> int:
        """The most pages, up to `most`, that `_probe` allows; sequence_pages None: all of them for one sequence."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            try:
                self._probe(middle, middle if sequence_pages is None else sequence_pages)
                low = middle
            except OUT_OF_MEMORY:
                high = middle - 1
        return low

    def memory(self) -> dict[str, int]:
        """Memory in use, in bytes by purpose."""
        return {"weights": self.model.nbytes()}


def reference_backend(checkpoint: PackedCheckpoint) -> HostBackend:
    """The NumPy reference as a backend. Raises BackendError if memory is insufficient."""
    try:
        return HostBackend("reference", Model(checkpoint))
    except MemoryError:
        # Ternary weights are int8 there, four times the size of the file's two bits.
        sizes = [spec.nbytes * (4 if name.endswith(".words") else 1) for name, spec in checkpoint.file.specs.items()]
        raise BackendError(f"the model takes {sum(sizes) / 1e9:.2f} GB of memory, which are not free") from None


def pages_of(tokens: int) -> int:
    """Number of pages for `tokens` tokens."""
    return -(-tokens // PAGE_SIZE)


class HostContext:
    """One sequence, see `protocol.Context`."""

    def __init__(self, model: HostModel, capacity: int):
        self.capacity = capacity
        self.ids: list[int] = []
        self._model = model
        self._cache = Cache(model.config, capacity)

    def truncate(self, length: int) -> None:
        """Removes all tokens from position `length` on."""
        if not 0 <= length <= len(self.ids):
            raise ValueError(f"cannot truncate a context of {len(self.ids)} tokens to {length}")
        del self.ids[length:]
        self._cache.length = length

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens and returns the logits at each of them, float32 [M, vocab]."""
        return np.concatenate([self._model.logits(hidden) for hidden in self._extend(ids)])

    def decode(self, ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """Appends tokens (at least one), then yields sampled tokens, one per step, until the context is full."""
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
        """Appends tokens and yields their final hidden states, chunk by chunk."""
        start = len(self.ids)
        if not 1 <= len(ids) <= self.capacity - start:
            raise ValueError(f"{len(ids)} tokens do not fit: {start} of {self.capacity} are in use")
        for hidden in extend(self._model, ids, self._cache):
            self.ids += ids[len(self.ids) - start :][: len(hidden)]
            yield hidden


class PagedCache(Cache):
    """Keys and values of one sequence, in pages of a shared pool."""

    def __init__(self, pool: Floats, pages: Sequence[int], computed: int):
        """pool: float32 [num_pages, layers, 2, PAGE_SIZE, G, D]. computed: leading tokens already in the pages."""
        self._pool = pool
        self._pages: NDArray[np.int64] = np.asarray(pages, np.int64)
        self.length = computed

    def append(self, layer: int, keys: Floats, values: Floats) -> tuple[Floats, Floats]:
        """Stores the next tokens' keys and values [M, G, D] of a layer; returns those of all tokens [T, G, D]."""
        end = self.length + len(keys)
        positions = np.arange(self.length, end)
        pages, offsets = self._pages[positions // PAGE_SIZE], positions % PAGE_SIZE
        self._pool[pages, layer, 0, offsets], self._pool[pages, layer, 1, offsets] = keys, values
        used = self._pool[self._pages[: -(-end // PAGE_SIZE)], layer]  # [pages, 2, PAGE_SIZE, G, D]
        shape = (-1, *keys.shape[1:])
        return used[:, 0].reshape(shape)[:end], used[:, 1].reshape(shape)[:end]

    def append_nan(self, count: int) -> None:
        """Appends tokens whose keys and values are NaN in all layers."""
        positions = np.arange(self.length, self.length + count)
        self._pool[self._pages[positions // PAGE_SIZE], :, :, positions % PAGE_SIZE] = np.nan
        self.length += count


class _Sequence:
    def __init__(self, ids: Sequence[int], params: SamplingParams, cache: PagedCache):
        self.ids = list(ids)  # prompt and sampled tokens
        self.prompt_length = len(ids)
        self.params = params
        self.cache = cache
        self.failure: str | None = None  # why it gets no more tokens


class HostBatch:
    """Sequences with a paged KV cache, see `protocol.Batch`. Calls compute at once and queue their results."""

    page_size = PAGE_SIZE

    def __init__(self, model: HostModel, max_sequences: int, capacity: int, num_pages: int):
        self.max_sequences, self.capacity, self.num_pages = max_sequences, capacity, num_pages
        self._model = model
        c = model.config
        self._pool = np.empty((num_pages, c.num_layers, 2, PAGE_SIZE, c.num_kv_heads, c.head_dim), np.float32)
        self._sequences: dict[int, _Sequence] = {}  # by slot
        self._results: deque[list[tuple[int, int]]] = deque()

    def start(self, slot: int, ids: Sequence[int], params: SamplingParams, pages: Sequence[int], computed: int) -> None:
        """Starts a sequence in a slot."""
        if not 0 <= slot < self.max_sequences:
            raise ValueError(f"there is no slot {slot}")
        if not len(ids) <= len(pages) * PAGE_SIZE or not all(0 <= page < self.num_pages for page in pages):
            raise ValueError(f"a prompt of {len(ids)} tokens does not fit in pages {list(pages)}")
        if computed % PAGE_SIZE or not 0 <= computed < len(ids):
            raise ValueError(f"{computed} computed tokens of {len(ids)} must be full pages and leave at least one")
        self._sequences[slot] = _Sequence(ids, params, PagedCache(self._pool, pages, computed))

    def prefill(self, slot: int, count: int) -> None:
        """Computes the next tokens of a prompt; at its end, samples the first token."""
        s = self._sequences[slot]
        end = s.cache.length + count
        if count < 1 or end > s.prompt_length or (end < s.prompt_length and end % PAGE_SIZE):
            raise ValueError(f"tokens {s.cache.length} to {end} of {s.prompt_length} end neither a page nor the prompt")
        self._feed(s, s.ids[s.cache.length : end], then_sample=end == s.prompt_length)
        if end == s.prompt_length:
            self._results.append([(slot, s.ids[-1])])

    def step(self, slots: Sequence[int]) -> None:
        """Samples one more token for each sequence."""
        results = []
        for slot in slots:
            s = self._sequences[slot]
            if len(s.ids) == s.prompt_length:
                raise ValueError(f"the prompt of slot {slot} is not complete")
            if s.ids[-1] != NO_TOKEN:
                self._feed(s, s.ids[-1:], then_sample=True)
            results.append((slot, s.ids[-1]))
        self._results.append(results)

    def collect(self) -> list[tuple[int, int]]:
        """The results of the oldest call not collected yet."""
        return self._results.popleft()

    def failure(self, slot: int) -> str:
        """Why the sequence in a slot got NO_TOKEN."""
        return self._sequences[slot].failure or ""

    def close(self) -> None:
        """Frees the pages."""
        del self._pool
        self._sequences.clear()

    def _feed(self, s: _Sequence, ids: Sequence[int], then_sample: bool) -> None:
        """Computes the next tokens of a sequence and, if `then_sample`, samples the one after them."""
        end = s.cache.length + len(ids)
        token = NO_TOKEN
        try:
            if s.failure is None:
                with np.errstate(all="ignore"):  # NO_TOKEN replaces NumPy's warnings
                    for hidden in extend(self._model, ids, s.cache):
                        last = hidden[-1:]
                    if then_sample:
                        token = sample(self._model.logits(last)[0], s.ids, s.params)
        except Exception as error:  # whatever it is, it ends this sequence alone
            what = f"memory ran out ({one_line(error)})" if isinstance(error, MemoryError) else one_line(error)
            s.failure = f"{NOT_FINITE}: {what}" if "NaN" in what else what
        if s.cache.length < end:
            # Keys and values that could not be computed become NaN, so that sequences that share the page fail, too.
            s.cache.append_nan(end - s.cache.length)
        if then_sample:
            s.ids.append(token)


def page_bytes(config: ModelConfig) -> int:
    """Bytes of one page in all layers."""
    return 4 * 2 * PAGE_SIZE * config.num_layers * config.num_kv_heads * config.head_dim
