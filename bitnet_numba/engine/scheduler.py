"""Many requests at once over one batch: who runs, who waits, and each one's text as it is made.

Each `step` is a round: prompts that fit are admitted and computed, up to a number of tokens a round so that answers
under way go on between the pieces of a long prompt; then all answers advance by one token. A round is collected one
round later, while the backend computes the next: it never waits for the host. A sequence that turns out to have ended
has computed one token too many by then, which is dropped.
"""

import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bitnet_numba.backends.protocol import NO_TOKEN, Backend
from bitnet_numba.engine.completion import Answer, Completion
from bitnet_numba.engine.page_pool import PageLease, PagePool
from bitnet_numba.engine.request import Prompt, Request, read_request, whole_number
from bitnet_numba.errors import BackendError, RequestError
from bitnet_numba.sampling import SamplingParams
from bitnet_numba.text.tokenizer import Tokenizer


class Update(NamedTuple):
    """News of one request. The last one that it gets has either a completion or an error."""

    request: int  # what `add` returned
    text: str = ""  # goes on from the texts of earlier updates
    completion: Completion | None = None
    error: BackendError | None = None


@dataclass(eq=False)
class _Sequence:
    """A request that has a slot."""

    number: int
    request: Request
    slot: int
    holding: PageLease
    reused: int  # leading tokens of the prompt that another sequence has computed
    answer: Answer
    most: int  # tokens until the answer is as long as it may be or the context is full
    enqueued: int = 0  # tokens whose sampling has been enqueued
    collected: int = 0
    ended: bool = False


class Scheduler:
    """Requests come and go between steps; those that do not fit wait, first come first served.

    `add` and `cancel` may be called at any time and from any thread; `step` and `close` by one thread at a time. What a
    request is answered does not depend on the others.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        vocab_size: int,
        context: int,
        max_sequences: int = 64,
        tokens: int | None = None,
        prefill_chunk: int = 1024,
    ):
        """context: tokens of one prompt and its answer together.
        max_sequences: how many requests run at a time; more wait.
        tokens: room for the tokens of all that run, rounded up to pages; None: see `Backend.new_batch`.
        prefill_chunk: about how many prompt tokens are computed in one step.

        Raises RequestError for numbers that are none, BackendError when memory does not suffice.
        """
        max_sequences = _at_least_one("max_sequences", max_sequences)
        tokens = None if tokens is None else _at_least_one("tokens", tokens)
        self._backend, self._tokenizer = backend, tokenizer
        self._vocab_size, self._context = vocab_size, context
        self._chunk = _at_least_one("prefill_chunk", prefill_chunk)
        self._batch = backend.new_batch(max_sequences, context, tokens)
        self._pool = PagePool(self._batch.num_pages, self._batch.page_size)
        self._slots = list(range(self._batch.max_sequences - 1, -1, -1))  # free ones
        self._numbers = itertools.count()
        self._waiting: OrderedDict[int, Request] = OrderedDict()  # by number, the first to come first
        self._lock = threading.Lock()  # of what waits
        self._cancelled: deque[int] = deque()
        self._prefilling: _Sequence | None = None  # the one whose prompt is being computed: others wait for their turn
        self._running: dict[int, _Sequence] = {}  # by request, that one included
        self._calls: deque[list[_Sequence]] = deque()  # for each call with results not collected yet, whose they are
        self._closed = False

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether there is anything to step for."""
        return bool(self._running or self._waiting or self._cancelled)

    def __enter__(self) -> "Scheduler":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> int:
        """A new request, with the arguments of `Session.stream`; returns its number, by which updates name it.

        Raises RequestError or ContextFull, at once, for what cannot be done or could never fit.
        """
        return self.add_request(
            read_request(self._tokenizer, self._vocab_size, self._context, prompt, params, max_new_tokens, stop)
        )

    def add_request(self, request: Request) -> int:
        """The same for a request that has been read, for this context. Raises RequestError if it could never fit."""
        if self._closed:
            raise RequestError("this scheduler is closed")
        fed = self._fed(request)
        if self._pool.pages_for(fed) > self._pool.num_pages:
            raise RequestError(
                f"the prompt and its answer may take {fed} tokens, but there is room for "
                f"{self._pool.num_pages * self._pool.page_size} in all: ask for fewer with max_new_tokens"
            )
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = request
        return number

    def cancel(self, request: int) -> None:
        """Ends a request: the next step frees its room and reports what there is of it, finish_reason "interrupted".

        Nothing happens if it has already ended.
        """
        self._cancelled.append(request)

    def step(self) -> list[Update]:
        """One round; returns what is new since the last one, in order: often one update for each running request.

        Raises BackendError, and closes the scheduler, when the backend fails as a whole.
        """
        if self._closed:
            raise RequestError("this scheduler is closed")
        try:
            updates = self._cancel()
            earlier = len(self._calls)
            self._enqueue()
            for _ in range(earlier):
                sequences = self._calls.popleft()
                for sequence, (_, token) in zip(sequences, self._batch.collect(), strict=True):
                    if not sequence.ended:
                        self._take(sequence, token, updates)
            return updates
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Frees the batch; requests that have not ended are dropped."""
        if not self._closed:
            self._closed = True
            self._running.clear()
            self._waiting.clear()
            self._batch.close()

    # A round

    def _enqueue(self) -> None:
        budget = self._chunk
        while budget > 0 and (self._prefilling or self._admit()):
            budget -= self._prefill(budget)
        live = [s for s in self._running.values() if 0 < s.enqueued < s.most]
        if live:
            self._batch.step([s.slot for s in live])
            self._calls.append(live)
            for s in live:
                s.enqueued += 1

    def _admit(self) -> bool:
        """Gives the request that has waited longest a slot and pages, if there are any."""
        if not self._waiting or not self._slots:
            return False
        with self._lock:
            number, request = next(iter(self._waiting.items()))
            holding = self._pool.take(request.ids, self._fed(request))
            if holding is None:
                return False
            del self._waiting[number]
        answer = Answer(self._tokenizer, request.stops, request.limit)
        slot, reused, most = self._slots.pop(), holding.computed, self._fed(request) - len(request.ids) + 1
        self._prefilling = _Sequence(number, request, slot, holding, reused, answer, most)
        self._running[number] = self._prefilling
        self._batch.start(slot, request.ids, request.params, holding.pages, reused)
        return True

    def _prefill(self, budget: int) -> int:
        """Enqueues about `budget` more tokens of a prompt, whole pages or up to its end; returns how many they are."""
        s = self._prefilling
        assert s is not None
        done, page = s.holding.computed, self._pool.page_size
        count = min(len(s.request.ids) - done, max(1, budget // page) * page)
        self._batch.prefill(s.slot, count)
        # Calls are carried out in order, so whoever is admitted from now on finds these pages computed.
        self._pool.computed(s.holding, done + count)
        if done + count == len(s.request.ids):
            s.enqueued = 1
            self._calls.append([s])
            self._prefilling = None
        return count

    def _take(self, s: _Sequence, token: int, updates: list[Update]) -> None:
        """What a token that was collected makes of its sequence."""
        if token == NO_TOKEN:
            self._end(s)
            error = BackendError("the model's weights make numbers that are not finite: logits hold NaN")
            updates.append(Update(s.number, error=error))
            return
        answer = s.answer
        text = answer.push(token)
        s.collected += 1
        if answer.reason is None and s.collected == s.most:
            answer.reason = "context"
        if answer.reason is not None:
            text += answer.finish()
            updates.append(Update(s.number, text, self._end(s)))
        elif text:
            updates.append(Update(s.number, text))

    def _end(self, s: _Sequence) -> Completion:
        """Frees slot and pages: what is enqueued for them is done before anything that is enqueued from now on."""
        s.ended = True
        del self._running[s.number]
        if self._prefilling is s:
            self._prefilling = None
        self._slots.append(s.slot)
        self._pool.release(s.holding)
        return s.answer.completion(len(s.request.ids), s.reused, self._backend.memory())

    def _cancel(self) -> list[Update]:
        updates = []
        while self._cancelled:
            number = self._cancelled.popleft()
            sequence = self._running.get(number)
            with self._lock:
                request = self._waiting.pop(number, None)
            if sequence is not None:
                updates.append(Update(number, completion=self._end(sequence)))
            elif request is not None:
                nothing = Answer(self._tokenizer, (), None)
                completion = nothing.completion(len(request.ids), 0, self._backend.memory())
                updates.append(Update(number, completion=completion))
        return updates

    def _fed(self, request: Request) -> int:
        """How many tokens a request may feed: its prompt and its answer but for the last token, which is not fed."""
        most = self._context
        return most if request.limit is None else min(most, len(request.ids) + request.limit - 1)


def _at_least_one(name: str, value: int) -> int:
    number = whole_number(value)
    if number is None or number < 1:
        raise RequestError(f"{name} must be a whole number of at least 1, not {value!r}")
    return number
