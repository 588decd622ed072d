"""Backends whose model runs on the CPU: contexts and batches over any `HostModel`."""

from collections.abc import Iterator, Sequence
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.host_batch import HostBatch
from bitnet_numba.backends.host_model import BAD_LOGITS, PAGE_SIZE, C, Floats, HostModel, finite, sample_rows
from bitnet_numba.backends.protocol import NO_TOKEN, Constraint
from bitnet_numba.errors import BackendError
from bitnet_numba.sampling import TokenLogprob, token_logprobs
from bitnet_numba.sampling_params import SamplingParams

POOL_BYTES = 1 << 30  # limit of a batch's KV cache, unless a number of tokens is asked for
OUT_OF_MEMORY = (MemoryError, OverflowError, ValueError)  # NumPy's errors for sizes beyond memory, or beyond 64 bits


class HostBackend(Generic[C]):
    """A model on the CPU (see `protocol.Backend`)."""

    def __init__(self, name: str, model: HostModel[C]):
        self.name, self.model = name, model

    def new_context(self, capacity: int) -> "HostContext[C]":
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

    def last_hidden(self, texts: Sequence[Sequence[int]]) -> Floats:
        """The final hidden states of the last tokens of texts, see `protocol.Embedder`."""
        result = np.empty((len(texts), self.model.config.hidden_size), np.float32)
        for i, ids in enumerate(texts):
            context = self.new_context(len(ids))
            try:
                result[i] = context.last_hidden(ids)
            finally:
                context.close()
        return result

    def new_batch(self, max_sequences: int, capacity: int, tokens: int | None = None) -> "HostBatch[C]":
        """An empty batch, see `protocol.Backend`. Raises BackendError if memory is insufficient."""
        sequence_pages = pages_of(capacity)  # of one sequence at full capacity
        if tokens is None:
            affordable = POOL_BYTES // self.model.page_bytes()
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
        return num_pages * self.model.page_bytes() + self.model.scratch_bytes(sequence_pages)

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

    def free_idle(self) -> None:
        """Nothing is kept."""

    def memory(self) -> dict[str, int]:
        """Memory in use, in bytes by purpose."""
        return {"weights": self.model.nbytes()}


def pages_of(tokens: int) -> int:
    """Number of pages for `tokens` tokens."""
    return -(-tokens // PAGE_SIZE)


class HostContext(Generic[C]):
    """One sequence, see `protocol.Context`."""

    def __init__(self, model: HostModel[C], capacity: int):
        self.capacity = capacity
        self.ids: list[int] = []
        self._model = model
        self._cache = model.new_cache(capacity)
        self._logprob: TokenLogprob | None = None

    def truncate(self, length: int) -> None:
        """Removes all tokens from position `length` on."""
        if not 0 <= length <= len(self.ids):
            raise ValueError(f"cannot truncate a context of {len(self.ids)} tokens to {length}")
        del self.ids[length:]
        self._cache.length = length

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens and returns the logits at each of them, float32 [M, vocab]."""
        return np.concatenate([self._model.logits(hidden) for hidden in self._extend(ids)])

    def last_hidden(self, ids: Sequence[int]) -> Floats:
        """Appends tokens (at least one) and returns the final hidden state of the last, float32 [hidden]."""
        for hidden in self._extend(ids):
            last: Floats = hidden[-1]
        return last

    def decode(self, ids: Sequence[int], params: SamplingParams, constraint: Constraint | None = None) -> Iterator[int]:
        """Appends tokens (at least one), then yields sampled tokens, one per step, until the context is full."""
        prompt_length = len(self.ids) + len(ids)
        while True:
            for hidden in self._extend(ids):
                last = hidden[-1:]
            ((token, self._logprob),) = sample_rows(
                self._model, last, [self.ids], [params], [prompt_length], [constraint]
            )
            if token == NO_TOKEN:
                raise ValueError(BAD_LOGITS)
            yield token
            if len(self.ids) == self.capacity:
                return
            ids = [token]

    def logprobs(self) -> TokenLogprob:
        """Of the token that `decode` has yielded last."""
        assert self._logprob is not None
        return self._logprob

    def score(self, ids: Sequence[int], top: int, first: int = 1) -> list[TokenLogprob]:
        """Appends all tokens but the last, and returns log probabilities of ids[first:]."""
        result: list[TokenLogprob] = []
        target = 1  # of `ids`: the token after the next hidden state
        for hidden in self._extend(ids[:-1]):
            targets = ids[max(first, target) : target + len(hidden)]
            target += len(hidden)
            if targets:
                logits = finite(self._model.logits(hidden[-len(targets) :]))
                result += token_logprobs(logits, targets, top)
        return result

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
            self._cache.length = first  # also after a call that Ctrl-C ended amid its bookkeeping
            hidden = self._model.forward(part, self._cache)
            self.ids += part
            yield hidden
