"""The reference model behind the engine's interface (see `bitnet_numba.backend`)."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.host_batch import ReferenceBatch, page_bytes
from bitnet_numba.checkpoint.packed import PackedCheckpoint
from bitnet_numba.reference.model import Cache, Model
from bitnet_numba.sampling import SamplingParams, sample

ROOM = 1 << 30  # bytes of keys and values that a batch takes unless asked for a certain room


class ReferenceBackend:
    """NumPy on the CPU."""

    name = "reference"

    def __init__(self, checkpoint: PackedCheckpoint):
        self.model = Model(checkpoint)

    def new_context(self, capacity: int) -> "ReferenceContext":
        """An empty context for up to `capacity` tokens."""
        return ReferenceContext(self.model, capacity)

    def new_batch(self, max_sequences: int, capacity: int, tokens: int | None = None) -> ReferenceBatch:
        """Room for sequences that decode together. Raises BackendError when memory does not suffice."""
        longest = -(-capacity // ReferenceBatch.page_size)  # pages of one sequence
        most = max_sequences * longest
        if tokens is None:
            num_pages = min(most, max(longest, ROOM // page_bytes(self.model.config)))
        else:
            num_pages = -(-tokens // ReferenceBatch.page_size)
        return ReferenceBatch(self.model, max_sequences, capacity, num_pages)

    def memory(self) -> dict[str, int]:
        """Bytes of weights in memory; rows of embedding and head stay in the mapped file."""
        linears = [
            getattr(layer, name) for layer in self.model.layers for name in ("q", "k", "v", "o", "gate", "up", "down")
        ]
        weights = sum(linear.t.nbytes if hasattr(linear, "t") else linear.rows.stored.nbytes for linear in linears)
        rows = self.model.embedding.stored.nbytes + (0 if self.model.config.tied else self.model.head.stored.nbytes)
        return {"weights": weights + rows}


class ReferenceContext:
    """One sequence."""

    def __init__(self, model: Model, capacity: int):
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
