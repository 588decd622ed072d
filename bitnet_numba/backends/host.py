"""Backends whose model runs on the CPU: contexts and batches over any `HostModel`."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.protocol import NO_TOKEN
from bitnet_numba.config import ModelConfig
from bitnet_numba.errors import BackendError
from bitnet_numba.sampling import SamplingParams

PAGE_SIZE = 64  # tokens
POOL_BYTES = 1 << 30  # limit of a batch's KV cache, unless a number of tokens is asked for

Floats = NDArray[np.float32]


class SequenceCache(Protocol):
    """Keys and values of one sequence."""

    length: int  # tokens; a smaller number forgets those from there on


C = TypeVar("C", bound=SequenceCache)
C_co = TypeVar("C_co", bound=SequenceCache, covariant=True)


class PagePool(Protocol[C_co]):
    """Keys and values of many sequences, in pages of PAGE_SIZE tokens."""

    def cache(self, pages: Sequence[int], computed: int) -> C_co:
        """The cache of a sequence in these pages, of which `computed` leading tokens are there already."""


class HostModel(Protocol[C]):
    """What this backend needs of a model.

    A token's numbers must depend on the tokens before it alone: not on how they were divided into calls, nor on other
    sequences in a call. Numbers that are not finite become NaN, in the cache too, and are no error.
    """

    config: ModelConfig

    def new_cache(self, capacity: int) -> C:
        """The cache of one sequence of up to `capacity` tokens. Raises MemoryError."""

    def new_pool(self, num_pages: int) -> PagePool[C]:
        """Pages for many sequences. Raises MemoryError."""

    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""

    def forward(self, ids: Sequence[int], cache: C) -> Floats:
        """Appends tokens to a cache; their final hidden states, float32 [M, hidden]."""

    def step(self, ids: Sequence[int], caches: Sequence[C]) -> Floats:
        """Appends one token to each of several caches; their final hidden states, float32 [B, hidden]."""

    def logits(self, hidden: Floats) -> Floats:
        """Logits of the next token: float32 [M, hidden] -> [M, vocab]."""

    def sample(self, hidden: Floats, histories: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[int]:
        """`sampling.sample` of the next token of each sequence [B, hidden]; NO_TOKEN where logits are NaN."""

    def nbytes(self) -> int:
        """Bytes of all weights."""

    def close(self) -> None:
        """Ends what the model runs beside the caller."""


class HostBackend(Generic[C]):
    """A model on the CPU (see `protocol.Backend`)."""

    def __init__(self, name: str, model: HostModel[C]):
        self.name, self.model = name, model

    def new_context(self, capacity: int) -> "HostContext[C]":
        """An empty context for up to `capacity` tokens. Raises BackendError if memory is insufficient."""
        return HostContext(self.model, capacity)

    def new_batch(self, max_sequences: int, capacity: int, tokens: int | None = None) -> "HostBatch[C]":
        """An empty batch, see `protocol.Backend`. Raises BackendError if memory is insufficient."""
        sequence_pages = -(-capacity // PAGE_SIZE)  # of one sequence at full capacity
        if tokens is None:
            affordable = POOL_BYTES // self.model.page_bytes()
            num_pages = min(max_sequences * sequence_pages, max(sequence_pages, affordable))
        else:
            num_pages = -(-tokens // PAGE_SIZE)
        return HostBatch(self.model, max_sequences, capacity, num_pages)

    def memory(self) -> dict[str, int]:
        """Memory in use, in bytes by purpose."""
        return {"weights": self.model.nbytes()}


def _no_memory(tokens: int, model: HostModel[C]) -> BackendError:
    size = -(-tokens // PAGE_SIZE) * model.page_bytes()
    return BackendError(f"a KV cache for {tokens} tokens needs {size / 1e9:.2f} GB of memory, which are not free")


class HostContext(Generic[C]):
    """One sequence, see `protocol.Context`."""

    def __init__(self, model: HostModel[C], capacity: int):
        self.capacity = capacity
        self.ids: list[int] = []
        self._model = model
        try:
            self._cache = model.new_cache(capacity)
        except MemoryError:
            raise _no_memory(capacity, model) from None

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
            (token,) = self._model.sample(last, [self.ids], [params])
            if token == NO_TOKEN:
                raise ValueError("logits hold NaN")
            yield token
            if len(self.ids) == self.capacity:
                return
            ids = [token]

    def close(self) -> None:
        """Frees the cache."""
        del self._cache

    def _extend(self, ids: Sequence[int]) -> Iterator[Floats]:
        """Appends tokens and yields their final hidden states, at most a page at a time, so that a long prompt can be
        interrupted."""
        start = len(self.ids)
        if not 1 <= len(ids) <= self.capacity - start:
            raise ValueError(f"{len(ids)} tokens do not fit: {start} of {self.capacity} are in use")
        end = start + len(ids)
        while len(self.ids) < end:
            first = len(self.ids)
            part = ids[first - start : first - start + PAGE_SIZE - first % PAGE_SIZE]
            hidden = self._model.forward(part, self._cache)
            self.ids += part
            yield hidden


class _Sequence(Generic[C]):
    def __init__(self, ids: Sequence[int], params: SamplingParams, cache: C):
        self.ids = list(ids)  # prompt and sampled tokens
        self.prompt_length = len(ids)
        self.params = params
        self.cache = cache


class HostBatch(Generic[C]):
    """Sequences with a paged KV cache, see `protocol.Batch`. Calls compute at once and queue their results."""

    page_size = PAGE_SIZE

    def __init__(self, model: HostModel[C], max_sequences: int, capacity: int, num_pages: int):
        self.max_sequences, self.capacity, self.num_pages = max_sequences, capacity, num_pages
        self._model = model
        try:
            self._pool = model.new_pool(num_pages)
        except MemoryError:
            raise _no_memory(num_pages * PAGE_SIZE, model) from None
        self._sequences: dict[int, _Sequence[C]] = {}  # by slot
        self._results: deque[list[tuple[int, int]]] = deque()

    def start(self, slot: int, ids: Sequence[int], params: SamplingParams, pages: Sequence[int], computed: int) -> None:
        """Starts a sequence in a slot."""
        if not 0 <= slot < self.max_sequences:
            raise ValueError(f"there is no slot {slot}")
        if not len(ids) <= len(pages) * PAGE_SIZE or not all(0 <= page < self.num_pages for page in pages):
            raise ValueError(f"a prompt of {len(ids)} tokens does not fit in pages {list(pages)}")
        if computed % PAGE_SIZE or not 0 <= computed < len(ids):
            raise ValueError(f"{computed} computed tokens of {len(ids)} must be full pages and leave at least one")
        self._sequences[slot] = _Sequence(ids, params, self._pool.cache(pages, computed))

    def prefill(self, slot: int, count: int) -> None:
        """Computes the next tokens of a prompt; at its end, samples the first token."""
        s = self._sequences[slot]
        end = s.cache.length + count
        if count < 1 or end > s.prompt_length or (end < s.prompt_length and end % PAGE_SIZE):
            raise ValueError(f"tokens {s.cache.length} to {end} of {s.prompt_length} end neither a page nor the prompt")
        hidden = self._model.forward(s.ids[s.cache.length : end], s.cache)
        if end == s.prompt_length:
            self._sample([slot], hidden[-1:])

    def step(self, slots: Sequence[int]) -> None:
        """Samples one more token for each sequence."""
        for slot in slots:
            if len(self._sequences[slot].ids) == self._sequences[slot].prompt_length:
                raise ValueError(f"the prompt of slot {slot} is not complete")
        running = [slot for slot in slots if self._sequences[slot].ids[-1] != NO_TOKEN]
        if running:
            sequences = [self._sequences[slot] for slot in running]
            hidden = self._model.step([s.ids[-1] for s in sequences], [s.cache for s in sequences])
            self._sample(running, hidden, slots)
        else:
            self._results.append([(slot, NO_TOKEN) for slot in slots])

    def collect(self) -> list[tuple[int, int]]:
        """The results of the oldest call not collected yet."""
        return self._results.popleft()

    def close(self) -> None:
        """Frees the pages."""
        del self._pool
        self._sequences.clear()

    def _sample(self, running: Sequence[int], hidden: Floats, slots: Sequence[int] | None = None) -> None:
        """Samples for the running slots and queues the results of `slots`, some of which may have ended with NaN."""
        sequences = [self._sequences[slot] for slot in running]
        tokens = self._model.sample(hidden, [s.ids for s in sequences], [s.params for s in sequences])
        for s, token in zip(sequences, tokens, strict=True):
            s.ids.append(token)
        self._results.append([(slot, self._sequences[slot].ids[-1]) for slot in slots or running])
