"""What the engine asks of a backend: each (reference, CUDA, ...) provides these three objects. Token ids only."""

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


NO_TOKEN = -1  # in a batch, instead of a token: the sequence's logits held NaN


class Batch(Protocol):
    """Many sequences that decode together, their keys and values in pages. Which page is whose is the caller's affair.

    A sequence occupies a slot from `start` until the next `start` of that slot; nothing needs to be said when it ends.
    Calls enqueue work and may return before it is done; it is done in the order of the calls. So a page or slot may be
    given to another sequence as soon as the last call that used it has been made, and a step may be enqueued before the
    tokens of the step before it have been collected: sequences feed themselves. What a sequence gets does not depend on
    the others, on slots or page numbers, or on how its prompt was divided into calls. The caller keeps to the bounds
    given here; ValueError where an implementation notices that it did not.
    """

    page_size: int  # tokens that a page holds
    num_pages: int  # pages 0 .. num_pages - 1
    max_sequences: int  # slots 0 .. max_sequences - 1
    capacity: int  # the most tokens that a sequence may feed: its prompt and all tokens sampled but the last

    def start(self, slot: int, ids: Sequence[int], params: SamplingParams, pages: Sequence[int], computed: int) -> None:
        """A new sequence takes a slot.

        ids: its prompt, at least one token. All of them count as history for the sampler, computed or not.
        params: how its tokens are sampled, with the seed set.
        pages: its pages in order, enough for every token it will feed. Token i lies in pages[i // page_size].
        computed: how many leading tokens these pages already hold: whole pages (they may be other sequences' too, and
        are not written), and fewer than len(ids). Other calls may have been made to compute them but not be done yet.
        """

    def prefill(self, slot: int, count: int) -> None:
        """Computes the next `count` >= 1 tokens of a prompt: up to its end, or to the end of a page.

        Where that completes the prompt, samples the first token, too: one result.
        """

    def step(self, slots: Sequence[int]) -> None:
        """Feeds each sequence its last sampled token and samples the next: one result a slot, in this order.

        slots: distinct, at least one; each of a sequence whose prompt is complete and that has room for one more token.
        Others that are live are left as they are. A sequence that had NO_TOKEN may be stepped; what it gets then is
        undefined, and the others are not disturbed.
        """

    def collect(self) -> list[tuple[int, int]]:
        """Waits for the oldest call with results (`prefill` that completed a prompt, or `step`) not collected yet.

        Returns its (slot, token) pairs; token is NO_TOKEN where logits held NaN. The caller keeps at most
        2 * (max_sequences + 1) such calls uncollected, and of one slot at most three.
        """

    def close(self) -> None:
        """Frees pages and slots, collected or not; the batch cannot be used again."""


class Backend(Protocol):
    """A loaded model."""

    name: str  # what really runs, e.g. "reference" or "cuda"

    def new_context(self, capacity: int) -> Context:
        """An empty context for up to `capacity` tokens. Raises BackendError when memory does not suffice."""

    def new_batch(self, max_sequences: int, capacity: int, tokens: int | None = None) -> Batch:
        """Room for sequences that decode together.

        max_sequences: how many at a time.
        capacity: the most tokens that one of them may feed.
        tokens: how many they may feed in all, rounded up to whole pages; None: as many as all could need at once, or
        as many of them as memory allows, but no fewer than one sequence could.

        Raises BackendError when memory does not suffice.
        """

    def memory(self) -> dict[str, int]:
        """Bytes in use by purpose, e.g. {"weights": ..., "kv_cache": ...}."""
