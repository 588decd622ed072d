"""What the engine asks of a backend. Each backend (reference, CUDA, ...) provides these two objects; token ids only."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.sampling import SamplingParams


class Context(Protocol):
    """One sequence: the keys and values of the tokens fed so far, with room for `capacity` of them."""

    capacity: int  # tokens
    ids: list[int]  # the tokens held; read it, do not change it

    def truncate(self, length: int) -> None:
        """Forgets every token from position `length` on. Raises ValueError unless 0 <= length <= len(self.ids)."""

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens and returns the logits at each of them, float32 [T, vocab]."""

    def decode(self, ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """Appends tokens (at least one), then yields sampled tokens, one a step, until the context is full.

        Each token is `sampling.sample(logits, history, params)`, with all the tokens before it as the history.
        `self.ids` grows as tokens are fed back: when the next one is asked for, or some steps ahead of that where a
        backend works asynchronously. After closing the iterator, `truncate` to what should stay. `params.seed` is set.
        """

    def close(self) -> None:
        """Frees the memory of this context; it cannot be used again."""


class Backend(Protocol):
    """A loaded model."""

    name: str  # what really runs, e.g. "reference" or "cuda"

    def new_context(self, capacity: int) -> Context:
        """An empty context for up to `capacity` tokens. Raises BackendError when memory does not suffice."""

    def memory(self) -> dict[str, int]:
        """Bytes in use by purpose, e.g. {"weights": ..., "kv_cache": ...}."""
