"""The interface between engine and backends (reference, CUDA): Context, Batch and Backend. Token ids only."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.errors import BitNetError
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams


class Constraint(Protocol):
    """Which tokens one answer may go on with, see `text.constraint.Constraint`. A backend asks for them when it samples
    a token, and tells which it was."""

    group: int  # those of different groups can be asked at the same time, by several threads

    def allowed(self, out: NDArray[np.uint32]) -> None:
        """Writes which tokens may come next, uint32 [at least vocab / 32], as `sampling.sample` reads them."""

    def accept(self, token: int) -> bool:
        """Goes on by a token; False if it is not allowed here."""


class Context(Protocol):
    """One sequence: the KV cache of the tokens so far, up to `capacity`."""

    capacity: int  # tokens

    @property
    def ids(self) -> list[int]:
        """The tokens in the cache; read-only for callers."""

    def truncate(self, length: int) -> None:
        """Removes all tokens from position `length` on. Raises ValueError unless 0 <= length <= len(self.ids)."""

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens and returns the logits at each of them, float32 [T, vocab]."""

    def decode(self, ids: Sequence[int], params: SamplingParams, constraint: Constraint | None = None) -> Iterator[int]:
        """Appends tokens (at least one), then yields sampled tokens, one per step, until the context is full.

        Each token is `sampling.sample(logits, history, params, prompt_length)`, with all tokens before it as the
        history and, as the prompt, those that are there when this call has appended its own. `self.ids` grows as tokens
        are fed back: when the next one is requested, or, in an asynchronous backend, some steps ahead. After closing
        the iterator, `truncate` to what should stay. `params.seed` is set, and params.stop_token_ids are all tokens
        that end the answer. params.prompt_logprobs and params.grammar mean nothing here.

        constraint: of the answer, if its form is given; the tokens yielded have been accepted.
        """

    def logprobs(self) -> TokenLogprob:
        """Of the token that `decode` has yielded last, whose params have `logprobs`."""

    def score(self, ids: Sequence[int], top: int, first: int = 1) -> list[TokenLogprob]:
        """Appends all tokens but the last, and returns log probabilities of ids[first:], given those before them.

        1 <= first < len(ids). top: how many of the most likely tokens each comes with. Takes memory for the logits of
        some tokens only. Raises ValueError if a logit is not finite.
        """

    def close(self) -> None:
        """Frees the context's memory; it cannot be used again."""


NO_TOKEN = -1  # in place of a token: it could not be computed, most often because the logits were NaN
NOT_FINITE = "the model's weights produce numbers that are not finite"


class CallTimes(NamedTuple):
    """How long calls of a batch took, each the last one of its kind that is known; zeros before the first. Seconds of
    the device's work: what a GPU waits for does not count, such as captures and constraints."""

    prefill_tokens: int = 0  # as they count, see `Batch.granularity`
    prefill_seconds: float = 0.0
    step_seconds: float = 0.0


def doubled(least: int, most: int) -> Sequence[int]:
    """`least`, twice as many and so on, and `most`: for `Batch.round_tokens` where no number is better than others."""
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


class Batch(Protocol):
    """Sequences that decode together, with a paged KV cache. The caller allocates pages and slots.

    A sequence occupies a slot from `start` until the next `start` of that slot; its end is not announced. Calls enqueue
    work, which runs in the order of the calls, and may return before it is done. So a page or slot can be reused as
    soon as the last call that uses it has been made, and a step can be enqueued before the tokens of the step before it
    have been collected: each sequence's sampled token is its own next input. The tokens of a sequence do not depend on
    other sequences, on slots or page numbers, or on how its prompt was divided into calls. The caller must respect the
    limits stated here; an implementation may raise ValueError if it does not.
    """

    uniform: bool  # whether `prefill` and `step` give a token the same keys, values and next token, bit for bit
    asynchronous: bool  # whether calls return before their work is done; if not, their results are there at once

    page_size: int  # tokens per page
    num_pages: int  # pages 0 .. num_pages - 1
    max_sequences: int  # slots 0 .. max_sequences - 1
    capacity: int  # maximum tokens of a sequence in the cache: its prompt and all sampled tokens but the last
    call_tokens: int  # how many tokens of prompts make a good `prefill`: more at once are not computed any faster
    # How many tokens of prompts a round may compute while answers run, in rising order: the scheduler takes as many as
    # there is time for. All of them at most `call_tokens`, and multiples of `granularity`.
    round_tokens: Sequence[int]
    granularity: int  # a part of a `prefill` counts as a multiple of so many tokens
    part_tokens: int  # and one that does not complete its ids has a multiple of so many, at most a page

    def start(
        self,
        slot: int,
        ids: Sequence[int],
        params: SamplingParams,
        pages: Sequence[int],
        computed: int,
        prompt_length: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """Starts a sequence in a slot.

        ids: the prompt, at least one token, and what is known of its answer. All of it is history for the sampler,
        computed here or not.
        params: how tokens are sampled, with the seed set, and all tokens that end the answer as stop_token_ids.
        pages: its pages in order, enough for `ids`; `extend` adds those of later tokens. Token i is in
        pages[i // page_size].
        computed: number of leading tokens that are already in these pages: full pages (which may be shared, and are not
        written), and fewer than len(ids). They may also be still to come, as long as they are computed before any token
        of this sequence: by a call before, or by an earlier part of the same call. 0 with params.prompt_logprobs.
        prompt_length: how many of `ids` are the prompt, if the others are the answer so far: a sequence that is taken
        up again. If all but the last of an answer's ids are computed, `step` may feed that one at once, as after the
        call that sampled it. None: all are the prompt.
        constraint: of the answer after `ids`, if its form is given.
        """

    def extend(self, slot: int, pages: Sequence[int]) -> None:
        """Adds pages for later tokens to a sequence, after those that it has."""

    def prefill(self, parts: Sequence[tuple[int, int]]) -> None:
        """Computes the next of the ids that several sequences were started with, as if one after the other.

        parts: (slot, count): distinct slots, and how many tokens of each: the rest of its ids, or a multiple of
        `part_tokens`. Where that completes ids, also samples the tokens after them: one result for each, in this order.
        """

    def step(self, slots: Sequence[int]) -> None:
        """Feeds each sequence its last sampled token and samples the next: one result per slot, in this order.

        slots: distinct, at least one; their prompts are complete and their pages have room for one more token.
        Sequences in other slots do not change. Stepping a sequence after NO_TOKEN has an undefined result, without
        effect on others.
        """

    def collect(self) -> list[tuple[int, int]]:
        """Waits for the oldest uncollected call with results (`prefill` that completed prompts, or `step`).

        Returns its (slot, token) pairs; token is NO_TOKEN if it could not be computed. At most 2 * (max_sequences + 1)
        such calls may be uncollected, and at most three of one slot.
        """

    def logprobs(self) -> Sequence[TokenLogprob | None]:
        """Of the tokens that the last `collect` returned, in its order; None where params have no `logprobs`, and for
        NO_TOKEN. Called right after that `collect`; the objects may be made when they are read (see `LogprobRows`)."""

    def prompt_logprobs(self, slot: int) -> list[TokenLogprob]:
        """Of all tokens of a prompt but the first, if its params have `prompt_logprobs`; called right after the
        `collect` that returned the slot's first token."""

    def times(self) -> CallTimes:
        """What is known of the time that calls take; never waits."""

    def prepare(self) -> bool:
        """Does some of what calls to come would do when they are first made with so many tokens or sequences; False if
        nothing is left to do. For moments when there is nothing else to do: takes some 20 ms. Raises BackendError,
        after which nothing is left."""

    def failure(self, slot: int) -> BitNetError:
        """Why the sequence in a slot got NO_TOKEN: RequestError where its constraint cannot be followed, else
        BackendError. Called right after the `collect` that returned it."""

    def close(self) -> None:
        """Frees pages and slots, even with uncollected calls; the batch cannot be used again."""


class Backend(Protocol):
    """A loaded model."""

    name: str  # "reference" or "cuda"

    def new_context(self, capacity: int) -> Context:
        """An empty context for up to `capacity` tokens. Raises BackendError if memory is insufficient."""

    def new_batch(self, max_sequences: int, capacity: int, tokens: int | None = None) -> Batch:
        """An empty batch.

        max_sequences: number of slots.
        capacity: maximum tokens of one sequence in the cache.
        tokens: capacity of the whole cache, rounded up to pages; None: enough for all slots at full capacity, or as
        much of that as memory allows, but at least one sequence at full capacity.

        Raises BackendError if memory is insufficient.
        """

    def free_idle(self) -> None:
        """Frees memory that is kept for contexts and batches to come. Keeping none is fine."""

    def memory(self) -> dict[str, int]:
        """Memory in use, in bytes by purpose, e.g. {"weights": ..., "kv_cache": ...}, with what is kept."""


@runtime_checkable
class Embedder(Protocol):
    """A backend that can run embedding models."""

    def last_hidden(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The final hidden state of the last token of each text, float32 [n, hidden]; of one, whatever the others are.

        Raises BackendError if memory is insufficient.
        """
