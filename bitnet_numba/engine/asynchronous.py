"""Streams for asyncio: the requests of all tasks share one scheduler, which one worker thread runs step by step.

The thread steps while a task waits for text. Between two steps it starts and ends requests, so a cancelled task
stops costing anything after the step under way. The scheduler is closed, and its memory freed, with the last request.
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.queue_options import QueueOptions
from bitnet_numba.engine.request import MODEL_CLOSED, Request
from bitnet_numba.engine.scheduler import Scheduler
from bitnet_numba.errors import BackendError, RequestError, SchedulerClosed


class _Answer:
    """What the worker knows of one request, and has found out for it."""

    def __init__(
        self,
        open_scheduler: Callable[[], Scheduler],
        read: Callable[[], Request],
        options: QueueOptions,
        quiet: bool,
    ):
        self.open_scheduler, self.read, self.options, self.quiet = open_scheduler, read, options, quiet
        self.number: int | None = None  # in the scheduler, once it has been added
        self.dropped = False  # nobody wants the rest of it
        self.pieces: deque[str] = deque()  # text that has not been taken
        self.completion: Completion | None = None
        self.error: BaseException | None = None
        self.ended = False  # set after the last piece, completion and error
        self.waiter: Future[None] | None = None  # resolved when there is something new

    def end(self, completion: Completion | None = None, error: BaseException | None = None) -> None:
        self.completion, self.error = completion, error
        self.ended = True

    @property
    def waiting(self) -> bool:
        return self.waiter is not None and not self.waiter.done()

    def wake(self) -> None:
        """Tells the task that waits, if one does and there is something new."""
        waiter = self.waiter
        if waiter is not None and (self.pieces or self.ended):
            self.waiter = None
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)


class AsyncWorker:
    """The thread and its scheduler. Its public methods may be called from any thread; the rest runs in its own."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._executor = ThreadPoolExecutor(1, "bitnet_numba")  # starts the thread with the first job
        self._scheduler: Scheduler | None = None
        self._answers: dict[int, _Answer] = {}  # those in the scheduler, by number
        self._stepping = False  # whether a step is in the executor's queue

    def advance(self, answer: _Answer, waiter: "Future[None]") -> None:
        """Resolves `waiter` as soon as the answer has a piece or has ended; starts it if it has not been started."""
        self._submit(self._advance, answer, waiter)

    def drop(self, answer: _Answer) -> "Future[None]":
        """Ends an answer before the next step. The future is done when it has ended."""
        return self._submit(self._drop, answer)

    def _submit(self, work: Callable[..., None], *arguments: object) -> "Future[None]":
        if os.getpid() != self._pid:  # a fork: the thread stayed in the parent
            left, message = list(self._answers.values()), "this stream was started before os.fork: start it again"
            self._start()
            for answer in left:
                answer.end(error=BackendError(message))
        return self._executor.submit(work, *arguments)

    def _advance(self, answer: _Answer, waiter: "Future[None]") -> None:
        answer.waiter = waiter
        if not answer.ended and answer.number is None:
            try:
                request = answer.read()
                if self._scheduler is None:
                    self._scheduler = answer.open_scheduler()
                answer.number = self._scheduler.add_request(request, answer.options, quiet=answer.quiet)
                self._answers[answer.number] = answer
            except BaseException as error:
                answer.end(error=error)
                self._close_if_idle()
        answer.wake()
        if answer.waiting and not self._stepping:
            self._stepping = True
            self._submit(self._step_while_waited_for)

    def _step_while_waited_for(self) -> None:
        # A step at a time, so that requests are started and ended between them.
        self._step()
        self._stepping = any(answer.waiting for answer in self._answers.values())
        if self._stepping:
            self._submit(self._step_while_waited_for)

    def _drop(self, answer: _Answer) -> None:
        if answer.ended:
            return
        if answer.number is None or self._scheduler is None:
            answer.end()
            answer.wake()
        else:
            self._scheduler.cancel(answer.number)
            self._step()

    def _step(self) -> None:
        if self._scheduler is None:  # all have ended meanwhile
            return
        for answer in self._answers.values():
            if answer.dropped and answer.number is not None:
                self._scheduler.cancel(answer.number)
        changed = []
        for update in self._scheduler.step():
            answer = self._answers[update.request]
            changed.append(answer)
            if update.text:
                answer.pieces.append(update.text)
            if update.completion is not None or update.error is not None:
                del self._answers[update.request]
                closed = isinstance(update.error, SchedulerClosed)  # with the model
                answer.end(update.completion, RequestError(MODEL_CLOSED) if closed else update.error)
        self._close_if_idle()
        for answer in changed:
            answer.wake()

    def _close_if_idle(self) -> None:
        if self._scheduler is not None and not self._answers:
            self._scheduler.close()
            self._scheduler = None


class AsyncStream(AsyncIterator[str]):
    """An asynchronous iterator over pieces of text as they are generated; `completion` is set when it ends.

    One task at a time waits for it. It is started by the first piece that is asked for, and ends when that task is
    cancelled, when it is closed, or when nothing refers to it any more.
    """

    def __init__(
        self,
        worker: AsyncWorker,
        open_scheduler: Callable[[], Scheduler],
        read: Callable[[], Request],
        options: QueueOptions,
        quiet: bool = False,
    ):
        """read: makes the request; called in the worker's thread, since a long text takes a while to encode.
        quiet: the stream has no pieces, only a result."""
        self._worker = worker
        self._answer = _Answer(open_scheduler, read, options, quiet)
        self._loop: asyncio.AbstractEventLoop | None = None  # in which it was started
        self._busy = False

    @property
    def completion(self) -> Completion | None:
        """The answer once it has ended; None before that."""
        return self._answer.completion

    def __repr__(self) -> str:
        if self.completion is not None:
            return f"<AsyncStream: {self.completion.finish_reason}>"
        return f"<AsyncStream: {'ended' if self._answer.ended else 'under way'}>"

    async def __anext__(self) -> str:
        if self._busy:
            raise RequestError("another task is waiting for this stream")
        self._busy, self._loop = True, asyncio.get_running_loop()
        answer = self._answer
        try:
            while True:
                ended = answer.ended  # before the pieces: they come first
                if answer.pieces:
                    return answer.pieces.popleft()
                if ended:
                    break
                waiter: Future[None] = Future()
                self._worker.advance(answer, waiter)
                await asyncio.wrap_future(waiter)
        except BaseException:
            answer.dropped = True
            self._worker.drop(answer)
            raise
        finally:
            self._busy = False
        error, answer.error = answer.error, None
        if error is not None:
            raise error
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Stops generating, after the step under way; the completion may have text that nobody has taken."""
        self._answer.dropped = True
        await asyncio.shield(asyncio.wrap_future(self._worker.drop(self._answer)))
        self._answer.pieces.clear()

    async def result(self) -> Completion:
        """Generates to the end and returns the whole answer. Raises RequestError if the stream was closed before it
        began, and what ended the answer if that was an error."""
        async for _ in self:
            pass
        if self.completion is None:
            raise RequestError("this stream was closed before it generated anything: there is no answer")
        return self.completion

    def __del__(self) -> None:
        answer = self._answer
        if self._loop is None or answer.ended:
            return
        answer.dropped = True
        # By way of the loop: the garbage collector may have come amid a call of the executor, which has locks.
        with contextlib.suppress(RuntimeError):  # the loop is closed: the next step of another request ends it
            self._loop.call_soon_threadsafe(self._worker.drop, answer)


async def results(streams: Sequence[AsyncStream]) -> list[Completion]:
    """The answers of several streams, which are generated together. If one fails, the others are ended."""
    tasks = [asyncio.ensure_future(stream.result()) for stream in streams]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
