"""The sequences of one batch: their slots and pages, and the calls whose results have not been collected.

A sequence gets pages for the tokens that are known of it when it is started, and one more whenever its next token needs
one. If none is free, the sequence that comes last (see `Sequence.order`) is preempted: it loses its slot and pages, and
is later started again. So the first one always goes on, and no number of sequences can block each other. What is
computed again is the same, bit for bit, hence the answer is, too:

- Where `Batch.uniform`, the answer's tokens are computed as part of the prompt, in large pieces.
- Elsewhere they are replayed: each is sampled again by the calls that sampled it before, and the result dropped. Pages
  that are still in the prefix cache are skipped in both cases.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

from bitnet_numba.backends.protocol import Batch, CallTimes
from bitnet_numba.engine.page_pool import PagePool
from bitnet_numba.engine.sequence import Logprobs, Sequence, Telling
from bitnet_numba.errors import BitNetError
from bitnet_numba.sampling import TokenLogprob


class BatchRunner:
    """Runs sequences in a batch, for one thread at a time."""

    def __init__(self, batch: Batch):
        self._batch = batch
        self.pool = PagePool(batch.num_pages, batch.page_size)
        self.asynchronous = batch.asynchronous
        self.call_tokens, self.part_tokens, self._granularity = batch.call_tokens, batch.part_tokens, batch.granularity
        self.running: dict[int, Sequence] = {}  # by id
        self.prefilling: Sequence | None = None  # the running sequence that is being prefilled, one at a time
        self._num_asking = 0  # of these, how many ask for log probabilities
        self._free_slots = list(range(batch.max_sequences - 1, -1, -1))
        # Each call's sequences, how often each had been started when it was made, and whether one asks for log
        # probabilities.
        self._calls: deque[tuple[list[Sequence], list[int], bool]] = deque()

    @property
    def free_slots(self) -> int:
        """How many more sequences there are slots for."""
        return len(self._free_slots)

    @property
    def uncollected(self) -> int:
        """Number of calls whose results have not been collected."""
        return len(self._calls)

    @property
    def answers_run(self) -> bool:
        """Whether there is a sequence that `step` would give its next token."""
        return any(_can_be_stepped(s) for s in self.running.values())

    def times(self) -> CallTimes:
        """See `Batch.times`."""
        return self._batch.times()

    def prepare(self) -> bool:
        """See `Batch.prepare`."""
        return self._batch.prepare()

    def reserve(self, s: Sequence) -> bool:
        """Gives a sequence a slot and pages; False if too few are free.

        A page is left for every running sequence that may need more, lest the new one be preempted at once.
        """
        if not self._free_slots:
            return False
        tokens = min(len(s.ids) + 1, s.max_cached)
        # Log probabilities of the prompt are of all tokens: all have to be computed.
        reuse = s.request.params.prompt_logprobs is None or len(s.ids) > s.prompt_length
        lease = self.pool.take(s.ids, tokens, s.options.cache_salt, self._growing(), reuse)
        if lease is None:
            return False
        s.lease, s.slot = lease, self._free_slots.pop()
        s.room = len(lease.pages) * self.pool.page_size
        s.starts += 1
        s.plain_below = 0
        s.known = len(s.ids)
        if s.replayed:
            s.known = max(s.prompt_length, lease.computed + 1)
        s.enqueued = s.received = s.known - s.prompt_length
        s.ready = s.replayed and s.received > 0
        self.running[s.id] = s
        self._num_asking += s.request.params.logprobs is not None
        return True

    def start(self, s: Sequence) -> None:
        """Starts a sequence that has just got its slot."""
        assert s.lease is not None
        if not s.ready:
            self.prefilling = s
        ids, lease, params = s.ids[: s.known], s.lease, s.request.params
        if len(s.ids) > s.prompt_length:
            params = replace(params, prompt_logprobs=None)  # they have been received
        constraint = s.request.constraint(ids[s.prompt_length :])
        self._batch.start(s.slot, ids, params, lease.pages, lease.computed, s.prompt_length, constraint)

    def prefill(self, budget: int, admit: Callable[[], bool]) -> int:
        """Makes one call for up to `budget` tokens of prompts, but at least a part, in the order of their starts.
        Returns how many tokens, as they count (see `Batch.granularity`).

        admit: starts one more sequence; False if there is none to be started now.
        """
        parts: list[tuple[int, int]] = []
        completed: list[Sequence] = []
        left = budget
        while left > 0 and (self.prefilling or admit()):
            s = self.prefilling
            if s is None:  # the one just admitted has failed, or has nothing to compute
                continue
            count = self._next_part(s, left, at_least=0 if parts else 1)
            if count == 0:
                break
            left -= -(-count // self._granularity) * self._granularity
            parts.append((s.slot, count))
            if s.lease is not None and s.lease.computed < s.known:
                break  # less than a part of the budget is left
            s.ready = True
            s.enqueued += 1
            completed.append(s)
            self.prefilling = None
        if parts:
            self._batch.prefill(parts)
        if completed:
            self._note_call(completed)
        return budget - left

    def _next_part(self, s: Sequence, budget: int, at_least: int) -> int:
        """How many tokens of a prompt to compute next: the rest of it, or as many times `part_tokens` as `budget`
        allows, or `at_least` so many times."""
        assert s.lease is not None
        done, part = s.lease.computed, self.part_tokens
        count = s.known - done
        if count > budget:
            count = min(count, max(at_least, budget // part) * part)
        # The backend works in order: sequences started from now on can share these pages.
        self.pool.mark_computed(s.lease, done + count)
        return count

    def make_room(self) -> list[Sequence]:
        """Gives each sequence that can be stepped the page for its next token; returns those preempted for that."""
        preempted: list[Sequence] = []
        growing = [s for s in self._steppable() if s.prompt_length + s.enqueued > s.room]
        for s in sorted(growing, key=lambda s: s.order):
            while s.lease is not None:
                page = self.pool.grow(s.lease)
                if page is not None:
                    self._batch.extend(s.slot, [page])
                    s.room += self.pool.page_size
                    break
                last = max(self.running.values(), key=lambda s: s.order)
                self.leave(last)
                preempted.append(last)
        return preempted

    def step(self) -> None:
        """Enqueues the next token of every sequence that can be stepped."""
        live = self._steppable()
        if live:
            self._batch.step([s.slot for s in live])
            self._note_call(live)
            for s in live:
                s.enqueued += 1

    def collect(
        self,
        telling: Telling,
        receive: Callable[[Sequence, int, Logprobs | None, int], None],
        tell: Callable[[Sequence], None],
    ) -> None:
        """Calls `receive` for each result of the oldest call not collected: with the sequence, the token, and the log
        probabilities of the whole call, if a request asks for some, and the token's place among them.

        Most results are plain (see `Sequence.plain_below`): these are only noted, and `tell` is called for sequences
        whose turn it is.
        """
        (sequences, starts, asked), results = self._calls.popleft(), self._batch.collect()
        logprobs: Logprobs | None = None
        if asked:
            logprobs = self._batch.logprobs()
        at = perf_counter()
        for row, (s, start, (_, token)) in enumerate(zip(sequences, starts, results, strict=True)):
            if s.starts != start:
                continue
            if len(s.ids) >= s.plain_below or s.builder is None or not s.builder.is_plain(token):
                receive(s, token, logprobs, row)
                continue
            s.ids.append(token)
            s.received += 1
            s.plain_at = at
            if telling.has_turn(s):
                tell(s)

    def prompt_logprobs(self, s: Sequence) -> list[TokenLogprob]:
        """Of all tokens of a prompt but the first; called when its first token is received."""
        return self._batch.prompt_logprobs(s.slot)

    def let_pass(self, s: Sequence) -> None:
        """After a token: finds out of how many to come nothing but those that are not plain has to be received."""
        assert s.builder is not None
        count, size = len(s.ids), self.pool.page_size
        # A page's last token and the next page's first are looked at, see `note_computed`.
        in_page = size - 1 - count % size if count % size else 0
        s.plain_below = count + max(0, min(s.builder.num_plain, s.max_tokens - s.received - 1, in_page))

    def note_computed(self, s: Sequence) -> None:
        """Lets others share the pages that the answer's tokens received so far have filled."""
        if s.lease is not None and s.ready:
            computed = min(len(s.ids), s.prompt_length + s.enqueued - 1)
            if computed // self.pool.page_size > s.lease.computed // self.pool.page_size:
                self.pool.mark_computed(s.lease, computed)

    def failure(self, s: Sequence) -> BitNetError:
        """Why a sequence got NO_TOKEN; called right after."""
        return self._batch.failure(s.slot)

    def leave(self, s: Sequence) -> None:
        """Frees a sequence's slot and pages. What is enqueued for them runs before their next use, in order."""
        s.plain_below = 0
        if s.lease is None:
            return
        self.pool.release(s.lease)
        s.lease = None
        self._free_slots.append(s.slot)
        del self.running[s.id]
        self._num_asking -= s.request.params.logprobs is not None
        if self.prefilling is s:
            self.prefilling = None

    def close(self) -> None:
        """Frees the batch."""
        self.running.clear()
        self._calls.clear()
        self.prefilling = None
        self._batch.close()

    def _note_call(self, sequences: list[Sequence]) -> None:
        asked = self._num_asking > 0 and any(s.request.params.logprobs is not None for s in sequences)
        self._calls.append((sequences, [s.starts for s in sequences], asked))

    def _steppable(self) -> list[Sequence]:
        return [s for s in self.running.values() if _can_be_stepped(s)]

    def _growing(self) -> int:
        """How many running sequences may need more pages than they have."""
        return sum(s.max_cached > s.room for s in self.running.values())


def _can_be_stepped(s: Sequence) -> bool:
    return s.ready and s.enqueued < s.max_tokens
