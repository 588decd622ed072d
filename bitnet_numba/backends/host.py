"""Backends whose model runs on the CPU: contexts and batches over any `HostModel`."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.protocol import NO_TOKEN, NOT_FINITE, CallTimes, Constraint
from bitnet_numba.config import ModelConfig
from bitnet_numba.errors import BackendError, one_line
from bitnet_numba.sampling import TokenLogprob, token_logprobs
from bitnet_numba.sampling_params import SamplingParams

PAGE_SIZE = 64  # tokens
UNIFORM_PART = 16  # tokens of a prompt that are computed between two steps; fewer are computed at a lower rate
POOL_BYTES = 1 << 30  # limit of a batch's KV cache, unless a number of tokens is asked for

BAD_LOGITS = "logits hold NaN or infinity"
OUT_OF_MEMORY = (MemoryError, OverflowError, ValueError)  # NumPy's errors for sizes beyond memory, or beyond 64 bits

Floats = NDArray[np.float32]
R = TypeVar("R")


class SequenceCache(Protocol):
    """Keys and values of one sequence."""

    length: int  # tokens; a smaller number forgets those from there on

    def append_nan(self, count: int) -> None:
        """Appends tokens whose keys and values are NaN in all layers."""

    def extend(self, pages: Sequence[int]) -> None:
        """Adds pages, if it is one of a `PagePool`."""


C = TypeVar("C", bound=SequenceCache)
C_co = TypeVar("C_co", bound=SequenceCache, covariant=True)


class PagePool(Protocol[C_co]):
    """Keys and values of many sequences, in pages of PAGE_SIZE tokens."""

    def cache(self, pages: Sequence[int], computed: int) -> C_co:
        """The cache of a sequence in these pages, of which `computed` leading tokens are there already."""


class HostModel(Protocol[C]):
    """What this backend needs of a model.

    A token's numbers must depend on the tokens before it alone: not on other sequences in a call, nor on how they were
    divided into calls, at ends of pages or, if it is `uniform`, anywhere. Numbers that are not finite become NaN, in
    the cache too, and are no error.
    """

    config: ModelConfig
    uniform: bool  # see `protocol.Batch`

    def new_cache(self, capacity: int) -> C:
        """The cache of one sequence of up to `capacity` tokens. Raises MemoryError."""

    def new_pool(self, num_pages: int) -> PagePool[C]:
        """Pages for many sequences. Raises MemoryError."""

    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""

    def scratch_bytes(self, pages: int) -> int:
        """About what computing takes beside the cache, in bytes, for contexts of so many pages."""

    def forward(self, ids: Sequence[int], cache: C) -> Floats:
        """Appends tokens to a cache; their final hidden states, float32 [M, hidden]."""

    def step(self, ids: Sequence[int], caches: Sequence[C]) -> Floats:
        """Appends one token to each of several caches; their final hidden states, float32 [B, hidden]."""

    def logits(self, hidden: Floats) -> Floats:
        """Logits of the next token: float32 [M, hidden] -> [M, vocab]."""

    def sample(
        self,
        hidden: Floats,
        histories: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        prompt_lengths: Sequence[int],
        logits: Floats | None = None,
        masks: Sequence[NDArray[np.uint32] | None] | None = None,
    ) -> list[int]:
        """`sampling.sample` of the next token of each sequence [B, hidden]; NO_TOKEN where logits are NaN.

        logits: float32 [B, vocab], which gets the model's logits, if it is given. masks: see `sampling.sample`.
        """

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


def sample_rows(
    model: HostModel[C],
    hidden: Floats,
    histories: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    prompt_lengths: Sequence[int],
    constraints: Sequence[Constraint | None],
) -> list[tuple[int, TokenLogprob | None]]:
    """The next token of each sequence, and its log probability if it is asked for."""
    vocab = model.config.vocab_size
    masks = [None if constraint is None else mask_of(constraint, vocab) for constraint in constraints]
    logits = None
    if any(own.logprobs is not None for own in params):
        logits = np.empty((len(hidden), vocab), np.float32)
    tokens = model.sample(hidden, histories, params, prompt_lengths, logits, masks)
    for constraint, token in zip(constraints, tokens, strict=True):
        if constraint is not None and token != NO_TOKEN:
            constraint.accept(token)
    if logits is None:
        return [(token, None) for token in tokens]
    return [
        (token, None if own.logprobs is None or token == NO_TOKEN else token_logprobs(row, [token], own.logprobs)[0])
        for row, token, own in zip(logits[:, None], tokens, params, strict=True)
    ]


def mask_of(constraint: Constraint, vocab: int) -> NDArray[np.uint32]:
    """The tokens that a constraint allows next, see `sampling.sample`."""
    mask = np.empty(-(-vocab // 32), np.uint32)
    constraint.allowed(mask)
    return mask


def finite(logits: Floats) -> Floats:
    """The logits. Raises ValueError if they hold NaN or infinity."""
    if not np.isfinite(logits).all():
        raise ValueError(BAD_LOGITS)
    return logits


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
        self.failure: str | None = None  # why it gets no more tokens


class HostBatch(Generic[C]):
    """Sequences with a paged KV cache, see `protocol.Batch`. Calls compute at once and queue their results."""

    page_size = PAGE_SIZE
    asynchronous = False
    call_tokens, granularity = PAGE_SIZE, 1  # a model computes a page at a time as fast as more

    def __init__(self, model: HostModel[C], max_sequences: int, capacity: int, num_pages: int):
        self.max_sequences, self.capacity, self.num_pages = max_sequences, capacity, num_pages
        self.uniform = model.uniform
        self.part_tokens = UNIFORM_PART if model.uniform else PAGE_SIZE
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

    def failure(self, slot: int) -> str:
        """Why the sequence in a slot got NO_TOKEN."""
        return self._sequences[slot].failure or ""

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
                s.failure = f"{NOT_FINITE}: {BAD_LOGITS}"
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
    what = f"memory ran out ({one_line(error)})" if isinstance(error, MemoryError) else one_line(error)
    s.failure = f"{NOT_FINITE}: {what}" if "NaN" in what else what
