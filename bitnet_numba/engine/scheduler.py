"""Continuous batching: admits requests to one batch, and streams each one's text as it is generated.

Each `step` is one round. Waiting requests are admitted in order while they fit, and their prompts are computed, up to
`prefill_chunk` tokens a round so that running answers continue between the chunks of a long prompt; then every running
answer gets one token. The results of a round are collected in the next `step`, after the backend has been given new
work, so the device never waits for the host. Hence a sequence computes one token more than it needs; it is dropped.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bitnet_numba.backends.protocol import NO_TOKEN, Backend
from bitnet_numba.engine.completion import Completion, CompletionBuilder
from bitnet_numba.engine.page_pool import PageLease, PagePool
from bitnet_numba.engine.request import Prompt, Request, as_integer, positive_integer, read_params, read_request
from bitnet_numba.errors import BackendError, RequestError, one_line, shown
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingOverrides, SamplingParams
from bitnet_numba.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.10 has none of its own

MAX_SEQUENCES = 1 << 16
MAX_TOKENS = 1 << 40  # more than any memory holds; the backend tells how many fit
# Tokens of prompts that are computed by one call: with what is left free between prompts, they are a pass of CUDA.
CALL_TOKENS = 1920
PREFILL_CHUNK = 480  # tokens of prompts a round: running answers then stall for 4 ms at most (2B4T, H200)
CLOSED = "this scheduler is closed"


class Update(NamedTuple):
    """What is new for one request. Its last update has either a completion or an error."""

    request: int  # the id that `add` returned
    text: str = ""  # follows the text of earlier updates
    completion: Completion | None = None
    error: BackendError | None = None
    token_ids: Sequence[int] = ()  # those of `text`, after those of earlier updates; together, the completion's
    logprobs: Sequence[TokenLogprob] = ()  # of these, if SamplingParams.logprobs asks for them


@dataclass(eq=False)
class _Sequence:
    """A request that has a slot."""

    id: int
    request: Request
    slot: int
    lease: PageLease
    reused: int  # leading prompt tokens that another sequence has computed
    builder: CompletionBuilder
    max_tokens: int  # tokens of the answer until it is as long as allowed or the context is full
    enqueued: int = 0  # tokens of the answer that the backend has been asked for
    collected: int = 0  # of these, tokens received
    ended: bool = False


class Scheduler:
    """Runs requests together; those that do not fit wait, first come, first served.

    `add`, `cancel` and `close` may be called at any time from any thread, `step` by one thread at a time. An answer
    does not depend on the other requests, and one that fails ends alone.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        vocab_size: int,
        context: int,
        max_sequences: int = 64,
        tokens: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ):
        """context: maximum tokens of one prompt and its answer together.
        max_sequences: how many requests run at once.
        tokens: KV cache capacity for all running requests, rounded up to pages; None: see `Backend.new_batch`.
        prefill_chunk: approximate number of prompt tokens computed per step. More is faster in all, but running answers
        wait for them.

        Raises RequestError if a limit is not a positive integer, BackendError if memory is insufficient.
        """
        max_sequences = positive_integer("max_sequences", max_sequences, MAX_SEQUENCES)
        tokens = None if tokens is None else positive_integer("tokens", tokens, MAX_TOKENS)
        self._backend, self._tokenizer = backend, tokenizer
        self._vocab_size, self._context = vocab_size, context
        self._chunk = positive_integer("prefill_chunk", prefill_chunk)
        self._batch = backend.new_batch(max_sequences, context, tokens)
        self._pool = PagePool(self._batch.num_pages, self._batch.page_size)
        self._free_slots = list(range(self._batch.max_sequences - 1, -1, -1))
        self._num_added = 0  # requests so far; ids count from 0
        self._waiting: OrderedDict[int, Request] = OrderedDict()  # by id, in order of arrival
        self._lock = threading.Lock()  # guards what `add` and `cancel` touch: _num_added, _waiting, _cancelled, _closed
        self._stepping = threading.RLock()  # held by `step` and `close`
        self._cancelled: deque[int] = deque()
        self._prefilling: _Sequence | None = None  # the running sequence whose prompt is being computed, one at a time
        self._running: dict[int, _Sequence] = {}  # by id
        self._calls: deque[list[_Sequence]] = deque()  # sequences of each call whose results are not collected yet
        self._closed = False

    @property
    def running(self) -> int:
        """Number of requests that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of requests that have no slot yet."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do; never after `close`."""
        return bool(self._running or self._waiting or self._cancelled)

    def __repr__(self) -> str:
        return f"<Scheduler: {'closed' if self._closed else f'{self.running} running, {self.waiting} waiting'}>"

    def __enter__(self) -> "Scheduler":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: "Unpack[SamplingOverrides]"
    ) -> int:
        """Adds a request, with the arguments of `Engine.stream`; returns its id, which its updates carry.

        Raises RequestError or ContextFull immediately if the request is invalid or could never fit.
        """
        checked = read_params("add", params, overrides)
        vocab, several = self._vocab_size, "add each of them"
        return self.add_request(read_request(self._tokenizer, vocab, self._context, prompt, checked, several))

    def add_request(self, request: Request) -> int:
        """Adds a request that `read_request` made for this context size. Raises RequestError if it could never fit."""
        if not isinstance(request, Request):
            raise RequestError(f"a request must be one that read_request made, not {shown(request)}")
        tokens = self._max_cached(request)
        if self._pool.pages_for(tokens) > self._pool.num_pages:
            raise RequestError(
                f"the prompt and its answer may take {tokens} tokens, but the batch has room for "
                f"{self._pool.num_pages * self._pool.page_size}: ask for fewer with max_new_tokens"
            )
        with self._lock:
            if self._closed:
                raise RequestError(CLOSED)
            request_id, self._num_added = self._num_added, self._num_added + 1
            self._waiting[request_id] = request
        return request_id

    def cancel(self, request: int) -> None:
        """Ends a request: the next step frees its pages and reports the answer so far, as "interrupted".

        Does nothing if the request has already ended or never was. Raises RequestError if it is not a number.
        """
        number = as_integer(request)
        if number is None:
            raise RequestError(f"request must be a number that add returned, not {shown(request)}")
        with self._lock:
            if not self._closed and 0 <= number < self._num_added:
                self._cancelled.append(number)

    def step(self) -> list[Update]:
        """Runs one round and returns what the last one produced, usually one update for each running request.

        Raises BackendError, and closes the scheduler, if the backend fails as a whole.
        """
        if not self._stepping.acquire(blocking=False):
            raise RequestError("another thread steps or closes this scheduler: one thread runs it")
        try:
            if self._closed:
                raise RequestError(CLOSED)
            try:
                updates = self._end_cancelled()
                uncollected = len(self._calls)
                self._enqueue(updates)
                for _ in range(uncollected):
                    sequences = self._calls.popleft()
                    results = self._batch.collect()
                    logprobs: Sequence[TokenLogprob | None] = [None] * len(results)
                    if any(s.request.params.logprobs is not None for s in sequences):
                        logprobs = self._batch.logprobs()
                    for sequence, (_, token), logprob in zip(sequences, results, logprobs, strict=True):
                        if not sequence.ended:
                            self._receive(sequence, token, logprob, updates)
                return updates
            except BaseException:
                self.close()
                raise
        finally:
            self._stepping.release()

    def close(self) -> None:
        """Frees the batch and drops requests that have not ended. A step of another thread ends first."""
        with self._stepping:
            with self._lock:
                if self._closed:
                    return
                self._closed = True
                self._waiting.clear()
                self._cancelled.clear()
            self._running.clear()
            self._batch.close()

    def _enqueue(self, updates: list[Update]) -> None:
        """Gives the backend the work of one round."""
        self._prefill(updates)
        live = [s for s in self._running.values() if 0 < s.enqueued < s.max_tokens]
        if live:
            self._batch.step([s.slot for s in live])
            self._calls.append(live)
            for s in live:
                s.enqueued += 1

    def _admit(self, updates: list[Update]) -> bool:
        """Starts the request that has waited longest; False if there is none, or too few slots or pages are free."""
        if not self._free_slots:
            return False
        with self._lock:
            if not self._waiting:
                return False
            request_id, request = next(iter(self._waiting.items()))
            max_cached = self._max_cached(request)
            reuse = request.params.prompt_logprobs is None  # which are of all tokens: all have to be computed
            lease = self._pool.take(request.ids, max_cached, reuse)
            if lease is None:
                return False
            del self._waiting[request_id]
        params, slot = request.params, self._free_slots.pop()
        builder = CompletionBuilder(self._tokenizer, request)
        max_tokens = max_cached - len(request.ids) + 1
        s = _Sequence(request_id, request, slot, lease, lease.computed, builder, max_tokens)
        self._prefilling = self._running[request_id] = s
        try:
            self._batch.start(slot, request.ids, params, lease.pages, lease.computed)
        except BackendError:  # as a whole
            raise
        except Exception as error:
            self._fail(s, one_line(error), updates)
        return True

    def _prefill(self, updates: list[Update]) -> None:
        """Enqueues the tokens of prompts that this round computes."""
        budget = self._chunk
        while budget > 0 and (computed := self._prefill_together(min(budget, CALL_TOKENS), updates)):
            budget -= computed

    def _prefill_together(self, budget: int, updates: list[Update]) -> int:
        """One call for about `budget` tokens of prompts; returns how many tokens, 0 if there is nothing to do."""
        parts: list[tuple[int, int]] = []
        completed: list[_Sequence] = []
        left = budget
        while left > 0 and (self._prefilling or self._admit(updates)):
            s = self._prefilling
            if s is None:  # the request just admitted has failed
                continue
            count = self._next_part(s, left)
            left -= count
            parts.append((s.slot, count))
            if s.lease.computed < len(s.request.ids):
                break  # less than a page of the budget is left
            s.enqueued = 1
            completed.append(s)
            self._prefilling = None
        if parts:
            self._batch.prefill(parts)
        if completed:
            self._calls.append(completed)
        return budget - left

    def _next_part(self, s: _Sequence, budget: int) -> int:
        """How many tokens of a prompt to compute next: the rest of it, or as many whole pages as `budget` allows."""
        done, page = s.lease.computed, self._pool.page_size
        count = len(s.request.ids) - done
        if count > budget:
            count = min(count, max(1, budget // page) * page)
        # The backend works in order: requests admitted from now on can share these pages.
        self._pool.mark_computed(s.lease, done + count)
        return count

    def _receive(self, s: _Sequence, token: int, logprob: TokenLogprob | None, updates: list[Update]) -> None:
        """Adds a sampled token to its sequence's answer."""
        if token == NO_TOKEN:
            self._fail(s, self._batch.failure(s.slot), updates)
            return
        builder = s.builder
        if s.collected == 0 and s.request.params.prompt_logprobs is not None:
            builder.prompt_logprobs = [None, *self._batch.prompt_logprobs(s.slot)]
        text = builder.push(token, logprob)
        s.collected += 1
        if builder.reason is None and s.collected == s.max_tokens:
            builder.reason = "context"
        if builder.reason is not None:
            text += builder.finish()
            updates.append(Update(s.id, text, self._end(s), None, *builder.released()))
            return
        token_ids, logprobs = builder.released()
        if text or token_ids:
            updates.append(Update(s.id, text, None, None, token_ids, logprobs))

    def _fail(self, s: _Sequence, reason: str, updates: list[Update]) -> None:
        """Ends a request with an error; the others go on."""
        self._pool.forget(s.lease, s.reused)
        self._end(s)
        updates.append(Update(s.id, error=BackendError(reason)))

    def _end(self, s: _Sequence) -> Completion:
        """Frees slot and pages. The backend works in order, so what is enqueued for them runs before their next use."""
        s.ended = True
        del self._running[s.id]
        if self._prefilling is s:
            self._prefilling = None
        self._free_slots.append(s.slot)
        self._pool.release(s.lease)
        return s.builder.completion(len(s.request.ids), s.reused, self._backend.memory())

    def _end_cancelled(self) -> list[Update]:
        updates = []
        while self._cancelled:
            request_id = self._cancelled.popleft()
            sequence = self._running.get(request_id)
            with self._lock:
                request = self._waiting.pop(request_id, None)
            if sequence is not None:
                updates.append(Update(request_id, completion=self._end(sequence)))
            elif request is not None:
                empty = CompletionBuilder(self._tokenizer, request)
                completion = empty.completion(len(request.ids), 0, self._backend.memory())
                updates.append(Update(request_id, completion=completion))
        return updates

    def _max_cached(self, request: Request) -> int:
        """Most tokens that a request puts into the KV cache: its prompt and its answer but for the last token."""
        limit = request.params.max_new_tokens
        return self._context if limit is None else min(self._context, len(request.ids) + limit - 1)
