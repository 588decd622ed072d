"""Continuous batching: admits requests to one batch, and streams each one's text as it is generated.

Each `step` is one round. Running answers get the pages for their next tokens (see `batch_runner`). Waiting requests are
admitted in order while they fit, and their prompts are computed, some tokens a round so that running answers continue
between the chunks of a long prompt (see `prompt_budget`); then every running answer gets one token. If the backend is
asynchronous, the results of a round are collected in the next `step`, after the backend has been given new work, so the
device never waits for the host. Hence a sequence computes one token more than it needs; it is dropped.
"""

import contextlib
import math
import threading
from collections import Counter
from time import monotonic
from typing import TYPE_CHECKING

from bitnet_numba.backends.protocol import NO_TOKEN, Backend
from bitnet_numba.engine.batch_runner import BatchRunner
from bitnet_numba.engine.completion import Completion, CompletionBuilder
from bitnet_numba.engine.prompt_budget import PromptBudget
from bitnet_numba.engine.queue_options import USUAL, QueueOptions
from bitnet_numba.engine.request import Prompt, Request, as_integer, positive_integer, read_params, read_request
from bitnet_numba.engine.request_queue import CLOSED, RequestQueue
from bitnet_numba.engine.sequence import Logprobs, Sequence, Telling, Update
from bitnet_numba.errors import BackendError, BitNetError, QueueTimeout, RequestError, SchedulerClosed, one_line, shown
from bitnet_numba.sampling_params import SamplingOverrides, SamplingParams, as_float
from bitnet_numba.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.10 has none of its own

MAX_SEQUENCES = 1 << 16
MAX_TOKENS = 1 << 40  # more than any memory holds; the backend tells how many fit


class Scheduler:
    """Runs requests together; those that do not fit wait, by priority, then first come, first served.

    `add`, `cancel`, `drain`, `wait` and `close` may be called at any time from any thread, `step` by one thread at a
    time. An answer does not depend on the other requests, and one that fails ends alone.

        while scheduler.wait():
            for update in scheduler.step():
                ...
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        vocab_size: int,
        context: int,
        max_sequences: int = 64,
        tokens: int | None = None,
        prefill_chunk: int | None = None,
        max_waiting: int | None = None,
        max_per_tenant: int | None = None,
    ):
        """context: maximum tokens of one prompt and its answer together.
        max_sequences: how many requests run at once.
        tokens: KV cache capacity for all running requests, rounded up to pages; None: enough for all of them at full
            context, or as much of that as memory allows, but at least one at full context.
        prefill_chunk: approximate number of prompt tokens computed per step. More is faster in all, but running answers
            wait for them. None: as many as take 5 ms, or as long as the answers' own step where that is longer, but at
            least 64 on a GPU (128 for some models) and 16 on a CPU.
        max_waiting: how many requests may wait, beside those that free slots are there for; None: any number.
        max_per_tenant: how many requests of one tenant run at once; None: any number.

        Raises RequestError if a limit is not a positive integer, BackendError if memory is insufficient.
        """
        max_sequences = positive_integer("max_sequences", max_sequences, MAX_SEQUENCES)
        tokens = None if tokens is None else positive_integer("tokens", tokens, MAX_TOKENS)
        max_waiting = None if max_waiting is None else positive_integer("max_waiting", max_waiting)
        self._max_per_tenant = None if max_per_tenant is None else positive_integer("max_per_tenant", max_per_tenant)
        chunk = None if prefill_chunk is None else positive_integer("prefill_chunk", prefill_chunk)
        self._backend, self._tokenizer = backend, tokenizer
        self._vocab_size, self._context = vocab_size, context
        batch = backend.new_batch(max_sequences, context, tokens)
        self._replayed = not batch.uniform
        self._runner = BatchRunner(batch)
        self._budget = PromptBudget(chunk, batch.call_tokens, batch.round_tokens)
        self._stepping = threading.RLock()  # held by `step` and `close`
        self._queue = RequestQueue(max_waiting)
        self._closing = False

    @property
    def running(self) -> int:
        """Number of requests that have a slot."""
        return len(self._runner.running)

    @property
    def waiting(self) -> int:
        """Number of requests that have no slot: not yet, or not at the moment."""
        return self._queue.waiting

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell; after `close`, until it has told how open requests ended."""
        return self._queue.busy

    @property
    def closed(self) -> bool:
        """Whether it has been closed, by `close` or by a failure of the backend."""
        return self._queue.closed

    def __repr__(self) -> str:
        return f"<Scheduler: {'closed' if self.closed else f'{self.running} running, {self.waiting} waiting'}>"

    def __enter__(self) -> "Scheduler":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
        queue_timeout: float | None = None,
        timeout: float | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> int:
        """Adds a request; returns its id, which its updates carry.

        prompt, params, overrides: as for `Engine.stream`. The others are fields of `QueueOptions`.

        Raises RequestError or ContextFull immediately if the request is invalid or could never fit, QueueFull if as
        many wait as may, SchedulerClosed after `close` or `drain`.
        """
        checked = read_params("add", params, overrides)
        options = QueueOptions(priority, tenant, cache_salt, queue_timeout, timeout)
        vocab, several = self._vocab_size, "add each of them"
        return self.add_request(read_request(self._tokenizer, vocab, self._context, prompt, checked, several), options)

    def add_request(self, request: Request, options: QueueOptions | None = None, *, quiet: bool = False) -> int:
        """Adds a request that `read_request` made for this context size; errors as for `add`.

        quiet: only its end is told, by one update that has the completion or the error, and no other text.
        """
        options = options or USUAL
        if not isinstance(request, Request):
            raise RequestError(f"a request must be one that read_request made, not {shown(request)}")
        if not isinstance(options, QueueOptions):
            raise RequestError(f"options of a request must be QueueOptions, not {shown(options)}")
        tokens, pool = self._max_cached(request), self._runner.pool
        if pool.pages_for(tokens) > pool.num_pages:
            raise RequestError(
                f"the prompt and its answer may take {tokens} tokens, but the batch has room for "
                f"{pool.num_pages * pool.page_size}: ask for fewer with max_new_tokens"
            )
        return self._queue.add(request, options, tokens, self._replayed, self._runner.free_slots, quiet)

    def cancel(self, request: int) -> None:
        """Ends a request; the next step reports the answer so far, as "interrupted".

        One that has never run leaves the queue at once. Slot and pages of the others are freed by the step under way,
        between two calls for prompts, or by the next one. Does nothing if the request has already ended or never was.
        Raises RequestError if it is not a number.
        """
        number = as_integer(request)
        if number is None:
            raise RequestError(f"request must be a number that add returned, not {shown(request)}")
        self._queue.cancel(number, self._completion)

    def drain(self) -> None:
        """Accepts no more requests; those that have been accepted go on to their ends. Then `wait` returns False."""
        self._queue.drain()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleeps until `step` has something to do or to tell, and returns True.

        False: nothing came within `timeout` seconds, or nothing will come, after `close` or `drain`. Raises
        RequestError if that is no number of seconds.
        """
        if timeout is not None:
            seconds = as_float(timeout)
            if seconds is None or not seconds >= 0.0:
                raise RequestError(f"timeout must be a number of seconds, not {shown(timeout)}")
            timeout = min(seconds, threading.TIMEOUT_MAX)
        return self._queue.wait(timeout)

    def step(self, *, coalesce: float = 0.0) -> list[Update]:
        """Runs one round and returns what the last one produced, usually one update for each running request.

        coalesce: seconds for which the text of an answer that goes on is kept: of many tokens at once, it costs less.
        Each round tells of some of the answers. What begins or ends is told at once. Raises RequestError if it is no
        such number.

        If the backend fails as a whole, every open request ends with the error, and the scheduler is closed: another
        one can take its place. After `close`, the next step tells that the requests which were open have ended with
        SchedulerClosed; the one after it raises that.
        """
        seconds = as_float(coalesce)
        if seconds is None or not 0.0 <= seconds < math.inf:
            raise RequestError(f"coalesce must be a number of seconds, not {shown(coalesce)}")
        if not self._stepping.acquire(blocking=False):
            if not self._closing:
                raise RequestError("another thread steps this scheduler: one thread runs it")
            self._stepping.acquire()
        try:
            if not self.busy and self.closed:
                raise SchedulerClosed(CLOSED)
            updates = self._queue.take_updates()
            if not self.closed:
                try:
                    self._run_round(updates, Telling(monotonic(), seconds))
                except Exception as failure:
                    error = failure if isinstance(failure, BackendError) else BackendError(one_line(failure))
                    error.__cause__ = failure if error is not failure else failure.__cause__
                    with contextlib.suppress(Exception):  # of a device that does not work any more
                        self._end_all(error)
                except BaseException:
                    self._queue.add_updates(updates)
                    self.close()
                    raise
            return updates + self._queue.take_updates()
        finally:
            self._stepping.release()

    def prepare(self) -> bool:
        """Does some of what rounds to come would do when so many requests are first run together; False if nothing is
        left to do. For the thread that calls `step`, while there is nothing to step: takes some 20 ms.

        On a GPU, captures CUDA graphs, which otherwise make the first rounds of each size longer. If that fails, there
        is nothing left to do: the round that needs it tells.
        """
        with self._stepping:
            try:
                return not self.closed and self._runner.prepare()
            except Exception:  # noqa: BLE001 - as in a round
                return False

    def close(self) -> None:
        """Ends open requests, which the next step tells, and frees the batch. A step of another thread ends first."""
        self._closing = True
        with self._stepping:
            if not self.closed:
                self._end_all(SchedulerClosed(CLOSED))

    def _end_all(self, error: BitNetError) -> None:
        self._queue.close(error)
        self._runner.close()

    def _run_round(self, updates: list[Update], telling: Telling) -> None:
        runner = self._runner
        self._end_cancelled(updates)
        of_last_round = runner.uncollected
        preempted = runner.make_room()
        self._queue.put_back(preempted)
        for s in preempted:
            self._tell(s, updates)  # it may be long until their next tokens
        # Whoever was preempted comes first, and there is no room for it now.
        self._prefill(updates, admit=not preempted)
        self._end_late(updates)
        runner.step()
        for _ in range(of_last_round if runner.asynchronous else runner.uncollected):
            runner.collect(
                telling,
                lambda s, token, logprobs, row: self._receive(s, token, logprobs, row, updates, telling),
                lambda s: self._tell(s, updates),
            )

    def _prefill(self, updates: list[Update], admit: bool) -> None:
        """Enqueues the tokens of prompts that this round computes; `admit`: starts requests that wait, too."""
        runner = self._runner
        self._budget.note(runner.times())
        left, least = self._budget.tokens(runner.answers_run), 1
        while left >= least:
            count = runner.prefill(min(left, runner.call_tokens), lambda: admit and self._admit(updates))
            if count == 0:
                break
            left, least = left - count, runner.part_tokens  # less is not worth another call
            self._end_cancelled(updates)  # while a long round goes on

    def _admit(self, updates: list[Update]) -> bool:
        """Starts the first of the waiting requests; False if there is none, or too few slots or pages are free."""
        full: set[str] = set()
        if self._max_per_tenant is not None:
            counts = Counter(s.options.tenant for s in self._runner.running.values())
            full = {tenant for tenant, count in counts.items() if count >= self._max_per_tenant}
        s = self._queue.take(full, self._runner.reserve)
        if s is None:
            return False
        if s.builder is None:
            s.builder = self._new_builder(s)
            s.reused = s.lease.computed if s.lease else 0
        try:
            self._runner.start(s)
        except BackendError:  # as a whole
            raise
        except Exception as error:
            updates.append(self._fail(s, error if isinstance(error, BitNetError) else BackendError(one_line(error))))
        return True

    def _receive(
        self, s: Sequence, token: int, logprobs: Logprobs | None, row: int, updates: list[Update], telling: Telling
    ) -> None:
        """Adds a sampled token to its sequence's answer; its log probability is in a row of logprobs."""
        if s.ended:
            return
        if token == NO_TOKEN:
            updates.append(self._fail(s, self._runner.failure(s)))
            return
        place = s.prompt_length + s.received
        s.received += 1
        if place < len(s.ids):
            if token != s.ids[place]:
                # Its prompt shared pages of an answer, which have been computed as a prompt since: see `Batch.uniform`.
                self._continue_as_prompt(s)
            return
        builder = s.caught_up()
        of_prompt: Logprobs = []
        if len(s.ids) == s.prompt_length and s.request.params.prompt_logprobs is not None:
            of_prompt = builder.prompt_logprobs = [None, *self._runner.prompt_logprobs(s)]
        s.ids.append(token)
        if len(s.ids) % self._runner.pool.page_size <= 1:  # this token itself may not be computed yet
            self._runner.note_computed(s)
        text, tell = "", telling.has_turn(s)
        if tell:
            text = builder.push(token, logprobs, row)
        else:
            builder.push_quietly(token, logprobs, row)
        if builder.reason is None and s.received == s.max_tokens:
            builder.reason = "context"
        if builder.reason is not None:
            updates.append(self._finish(s, text)._replace(prompt_logprobs=of_prompt))
            return
        self._runner.let_pass(s)
        if tell or text or of_prompt:
            self._tell(s, updates, text, of_prompt)

    def _tell(self, s: Sequence, updates: list[Update], text: str = "", of_prompt: Logprobs = ()) -> None:
        """Adds an update with what is new in an answer, `text` first; a quiet answer has none."""
        if s.quiet or s.builder is None:
            return
        builder = s.caught_up()
        text += builder.take()
        token_ids, logprobs = builder.released()
        if text or token_ids or of_prompt:
            updates.append(Update(s.id, text, None, None, token_ids, logprobs, of_prompt))

    def _continue_as_prompt(self, s: Sequence) -> None:
        """Starts a sequence again with what has been told of its answer as part of the prompt."""
        s.starts += 1  # what it has been enqueued for is not wanted
        s.replayed = False
        if s.lease is not None:
            self._runner.leave(s)
            self._queue.put_back([s])

    def _finish(self, s: Sequence, text: str = "") -> Update:
        """Ends a request whose builder has a reason; `text` comes before what the builder held back."""
        text += s.caught_up().finish()
        update = self._end(s)
        return update if s.quiet else update._replace(text=text)

    def _fail(self, s: Sequence, error: BitNetError) -> Update:
        """Ends a request with an error; the others go on."""
        self._runner.pool.forget(s.ids, s.reused, s.options.cache_salt)
        return self._end(s)._replace(completion=None, error=error)

    def _end(self, s: Sequence) -> Update:
        """Frees what a request holds; its last update, with the answer so far."""
        self._queue.end(s)
        self._runner.leave(s)
        completion = self._completion(s)
        if s.quiet or s.builder is None:
            return Update(s.id, completion=completion)
        builder = s.caught_up()
        return Update(s.id, builder.take(), completion, None, *builder.released())

    def _completion(self, s: Sequence) -> Completion:
        builder = self._new_builder(s) if s.builder is None else s.caught_up()
        return builder.completion(s.prompt_length, s.reused, self._backend.memory())

    def _new_builder(self, s: Sequence) -> CompletionBuilder:
        return CompletionBuilder(self._tokenizer, s.request, turn=s.id)

    def _end_cancelled(self, updates: list[Update]) -> None:
        updates += [self._end(s) for s in self._queue.take_cancelled()]

    def _end_late(self, updates: list[Update]) -> None:
        """Ends the requests that have no more time."""
        for s, for_waiting in self._queue.take_late():
            if s.ended:  # by the other deadline
                continue
            if not for_waiting:
                s.builder = s.builder or self._new_builder(s)
                s.builder.reason = "timeout"
                updates.append(self._finish(s))
            elif s.builder is None:
                error = QueueTimeout(f"the request was not started within {s.options.queue_timeout:g} seconds")
                updates.append(self._end(s)._replace(completion=None, error=error))

    def _max_cached(self, request: Request) -> int:
        """Most tokens that a request puts into the KV cache: its prompt and its answer but for the last token."""
        limit = request.params.max_new_tokens
        return self._context if limit is None else min(self._context, len(request.ids) + limit - 1)
