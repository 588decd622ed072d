"""Batches of any model on the host: sequences with pages of a shared KV cache, one after another through the model."""

from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Generic, TypeVar

import numpy as np

from bitnet_numba.backends.host_model import BAD_LOGITS, PAGE_SIZE, C, Floats, HostModel, finite, sample_rows
from bitnet_numba.backends.protocol import NO_TOKEN, NOT_FINITE, CallTimes, Constraint, doubled
from bitnet_numba.errors import BackendError, BitNetError, one_line
from bitnet_numba.sampling import TokenLogprob, token_logprobs
from bitnet_numba.sampling_params import SamplingParams

UNIFORM_PART = 16  # tokens of a prompt that are computed between two steps; fewer are computed at a lower rate

R = TypeVar("R")


class _Sequence(Generic[C]):
    def __init__(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        cache: C,
        pages: int,
        prompt_length: int,
        constraint: Constraint | None,
    ):
        self.ids = list(ids)  # those given at the start, and sampled tokens
        self.num_given = len(ids)
        self.prompt_length = prompt_length
        self.prompt_logprobs: list[TokenLogprob] = []
        self.logprob: TokenLogprob | None = None  # of the last token
        self.params = params
        self.constraint = constraint
        self.cache = cache
        self.room = pages * PAGE_SIZE  # tokens
        self.ready = prompt_length <= cache.length == len(ids) - 1  # to be stepped
        self.failure: BitNetError | None = None  # why it gets no more tokens


class HostBatch(Generic[C]):
    """Sequences with a paged KV cache, see `protocol.Batch`. Calls compute at once and queue their results."""

    page_size = PAGE_SIZE
    asynchronous = False
    call_tokens, granularity = PAGE_SIZE, 1  # a model computes a page at a time as fast as more

    def __init__(self, model: HostModel[C], max_sequences: int, capacity: int, num_pages: int):
        self.max_sequences, self.capacity, self.num_pages = max_sequences, capacity, num_pages
        self.uniform = model.uniform
        self.part_tokens = UNIFORM_PART if model.uniform else PAGE_SIZE
        self.round_tokens = doubled(self.part_tokens, self.call_tokens)
        self._model = model
        self._pool = model.new_pool(num_pages)
        self._sequences: dict[int, _Sequence[C]] = {}  # by slot
        self._results: deque[tuple[list[tuple[int, int]], list[TokenLogprob | None]]] = deque()
        self._logprobs: list[TokenLogprob | None] = []  # of the call collected last
        self._times = CallTimes()

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
        """Starts a sequence in a slot."""
        if not 0 <= slot < self.max_sequences:
            raise ValueError(f"there is no slot {slot}")
        if not len(ids) <= len(pages) * PAGE_SIZE or not all(0 <= page < self.num_pages for page in pages):
            raise ValueError(f"a prompt of {len(ids)} tokens does not fit in pages {list(pages)}")
        if computed % PAGE_SIZE or not 0 <= computed < len(ids):
            raise ValueError(f"{computed} computed tokens of {len(ids)} must be full pages and leave at least one")
        if computed and params.prompt_logprobs is not None:
            raise ValueError("a prompt that is scored must be computed as a whole")
        length = len(ids) if prompt_length is None else prompt_length
        cache = self._pool.cache(pages, computed)
        self._sequences[slot] = _Sequence(ids, params, cache, len(pages), length, constraint)

    def extend(self, slot: int, pages: Sequence[int]) -> None:
        """Adds pages to a sequence."""
        if not all(0 <= page < self.num_pages for page in pages):
            raise ValueError(f"there are no pages {list(pages)}")
        s = self._sequences[slot]
        s.cache.extend(pages)
        s.room += len(pages) * PAGE_SIZE

    def prefill(self, parts: Sequence[tuple[int, int]]) -> None:
        """Computes the next tokens of prompts; at the end of each, samples the first token."""
        began = perf_counter()
        slots = [slot for slot, count in parts if self._prefill(slot, count)]
        if slots:
            self._expect(slots)
        tokens, seconds = sum(count for _, count in parts), perf_counter() - began
        self._times = self._times._replace(prefill_tokens=tokens, prefill_seconds=seconds)

    def _prefill(self, slot: int, count: int) -> bool:
        """Whether the prompt is complete, and its first token sampled."""
        s = self._sequences[slot]
        end = s.cache.length + count
        if count < 1 or end > s.num_given or (end < s.num_given and end % self.part_tokens):
            raise ValueError(f"tokens {s.cache.length} to {end} of {s.num_given} end neither a part nor the prompt")
        start = s.cache.length

        def compute(_: Sequence[_Sequence[C]]) -> list[Floats]:
            s.cache.length = start
            hidden = self._model.forward(s.ids[start:end], s.cache)
            if s.params.prompt_logprobs is not None:
                self._score(s, hidden[: s.num_given - 1 - start], start)
            return [hidden[-1]]

        last = self._each([s], compute, end)
        if end < s.num_given:
            return False
        s.ready = True
        self._sample([s], last)
        return True

    def step(self, slots: Sequence[int]) -> None:
        """Samples one more token for each sequence."""
        began = perf_counter()
        sequences = [self._sequences[slot] for slot in slots]
        for slot, s in zip(slots, sequences, strict=True):
            if not s.ready:
                raise ValueError(f"the prompt of slot {slot} is not complete")
            if len(s.ids) > s.room:
                raise ValueError(f"slot {slot} has no page for token {len(s.ids) - 1}")

        def compute(running: Sequence[_Sequence[C]]) -> list[Floats]:
            for s in running:
                s.cache.length = len(s.ids) - 1
            return list(self._model.step([s.ids[-1] for s in running], [s.cache for s in running]))

        self._sample(sequences, self._each(sequences, compute, None))
        self._expect(slots)
        self._times = self._times._replace(step_seconds=perf_counter() - began)

    def _expect(self, slots: Sequence[int]) -> None:
        """Queues what was just sampled for these slots."""
        sequences = [self._sequences[slot] for slot in slots]
        tokens = [(slot, s.ids[-1]) for slot, s in zip(slots, sequences, strict=True)]
        self._results.append((tokens, [s.logprob for s in sequences]))

    def collect(self) -> list[tuple[int, int]]:
        """The results of the oldest call not collected yet."""
        tokens, self._logprobs = self._results.popleft()
        return tokens

    def logprobs(self) -> list[TokenLogprob | None]:
        """Of the tokens that the last `collect` returned."""
        return self._logprobs

    def prompt_logprobs(self, slot: int) -> list[TokenLogprob]:
        """Of all tokens of a prompt but the first."""
        return self._sequences[slot].prompt_logprobs

    def times(self) -> CallTimes:
        """How long the last calls took."""
        return self._times

    def prepare(self) -> bool:
        """There is nothing to prepare."""
        return False

    def failure(self, slot: int) -> BitNetError:
        """Why the sequence in a slot got NO_TOKEN."""
        error = self._sequences[slot].failure
        assert error is not None
        return error

    def close(self) -> None:
        """Frees the pages."""
        del self._pool
        self._sequences.clear()

    def _each(
        self,
        sequences: Sequence[_Sequence[C]],
        compute: Callable[[Sequence[_Sequence[C]]], Sequence[R]],
        end: int | None,
    ) -> dict[int, R]:
        """What `compute` gives each sequence that has not failed, by its place in the list.

        It is asked for all of them at once or, if that raises, for each one alone, so that only those that raise fail.
        end: tokens that the caches then have, or None for all.
        """
        running = [i for i, s in enumerate(sequences) if s.failure is None]
        results: dict[int, R] = {}
        for group in [running] if len(running) < 2 else [running, *([i] for i in running)]:
            try:
                if group:
                    results |= zip(group, compute([sequences[i] for i in group]), strict=True)
                if len(group) > 1:
                    return results
            except Exception as error:  # whatever it is, it ends this sequence alone
                if len(group) == 1:
                    _fail(sequences[group[0]], error)
        for s in sequences:
            if s.failure is not None and (missing := (len(s.ids) if end is None else end) - s.cache.length) > 0:
                # So that sequences that share the page fail, too.
                s.cache.append_nan(missing)
        return results

    def _sample(self, sequences: Sequence[_Sequence[C]], hidden: dict[int, Floats]) -> None:
        """Appends a sampled token to each sequence; NO_TOKEN to those that have failed, or do now."""
        where = {id(s): i for i, s in enumerate(sequences)}

        def compute(running: Sequence[_Sequence[C]]) -> list[tuple[int, TokenLogprob | None]]:
            rows = np.stack([hidden[where[id(s)]] for s in running])
            params, lengths = [s.params for s in running], [s.prompt_length for s in running]
            constraints = [s.constraint for s in running]
            return sample_rows(self._model, rows, [s.ids for s in running], params, lengths, constraints)

        results = self._each(sequences, compute, 0)
        for i, s in enumerate(sequences):
            token, s.logprob = results.get(i, (NO_TOKEN, None))
            if token == NO_TOKEN and s.failure is None:
                s.failure = BackendError(f"{NOT_FINITE}: {BAD_LOGITS}")
            s.ids.append(token)

    def _score(self, s: _Sequence[C], hidden: Floats, start: int) -> None:
        """Notes the log probabilities of the prompt's tokens after those at `start` and following positions."""
        assert s.params.prompt_logprobs is not None
        del s.prompt_logprobs[start:]  # of an earlier attempt
        for first in range(0, len(hidden), PAGE_SIZE):
            part = hidden[first : first + PAGE_SIZE]
            targets = s.ids[start + first + 1 : start + first + 1 + len(part)]
            s.prompt_logprobs += token_logprobs(finite(self._model.logits(part)), targets, s.params.prompt_logprobs)


def _fail(s: _Sequence[C], error: Exception) -> None:
    if isinstance(error, BitNetError):
        s.failure = error
        return
    what = f"memory ran out ({one_line(error)})" if isinstance(error, MemoryError) else one_line(error)
    s.failure = BackendError(f"{NOT_FINITE}: {what}" if "NaN" in what else what)
