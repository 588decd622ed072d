"""The thread that runs the model: one scheduler, stepped as long as it has requests.

The event loop is told of new text at most once per `coalesce` seconds, and at once of an answer's beginning and end: to
wake it for each token would cost more than all else that the server does.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from bitnet_numba.engine.request import Request
from bitnet_numba.engine.scheduler import Scheduler, Update
from bitnet_numba.errors import BackendError, BitNetError, one_line
from bitnet_numba.server.answers import Answers

_log = logging.getLogger("bitnet_numba.server")
CLOSED = "the server is shutting down"


class EngineLoop:
    """Runs requests. `close` ends the thread, and with it every answer that is open."""

    def __init__(self, loop: asyncio.AbstractEventLoop, open_scheduler: Callable[[], Scheduler], coalesce: float):
        """loop: in which answers are awaited. open_scheduler: called again after a failure of the backend.

        Raises BackendError if there is too little memory.
        """
        self._loop, self._open_scheduler, self._coalesce = loop, open_scheduler, coalesce
        self._scheduler = open_scheduler()
        self._work = threading.Condition()  # guards the rest, which `open` and the thread share
        self._answers: dict[int, tuple[Answers, int]] = {}  # by number in the scheduler: whose, and which of them
        self._closed = False
        self._changed: deque[Answers] = deque()  # which the loop will be told of with the next flush
        self._flush_planned = False
        self._flushed_at = self._loop.time()
        self._thread = threading.Thread(target=self._run, name="bitnet_numba engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that have a slot."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Answers that have none yet."""
        return self._scheduler.waiting

    @property
    def alive(self) -> bool:
        """Whether the thread runs; it ends only when it is closed, or if the backend cannot be used any more."""
        return self._thread.is_alive()

    def open(self, requests: Sequence[Request]) -> Answers:
        """Starts answers; from any thread. Raises RequestError if one can never fit, and BackendError once closed."""
        with self._work:
            if self._closed:
                raise BackendError(CLOSED)
            numbers: list[int] = []
            try:
                for request in requests:
                    numbers.append(self._scheduler.add_request(request))
            except BitNetError:
                for number in numbers:
                    self._scheduler.cancel(number)
                raise
            answers = Answers(requests, numbers)
            for index, number in enumerate(numbers):
                self._answers[number] = answers, index
            self._work.notify()
        return answers

    def cancel(self, answers: Answers) -> None:
        """Ends answers that nobody wants any more, before the next step; from any thread."""
        with self._work:
            for number in answers.numbers:
                found = self._answers.get(number)
                if found is not None and found[0] is answers:  # of another, if the scheduler is a new one
                    del self._answers[number]
                    self._scheduler.cancel(number)
            self._work.notify()

    def close(self) -> None:
        """Ends the thread after the step under way; answers that are open get an error."""
        with self._work:
            self._closed = True
            self._work.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._scheduler.busy and not self._closed:
                    self._work.wait()
                if self._closed:
                    break
            try:
                updates = self._scheduler.step()
            except Exception as error:  # which has closed the scheduler
                _log.error("the backend failed: %s", one_line(error))
                if not self._start_again(BackendError(f"the backend failed: {one_line(error)}")):
                    return
            else:
                self._deliver(updates)
        self._scheduler.close()
        self._fail_all(BackendError(CLOSED))

    def _start_again(self, error: BackendError) -> bool:
        """Ends what is open with an error and opens another scheduler; False if there is none to be had."""
        with self._work:
            self._fail_all(error)
            try:
                self._scheduler = self._open_scheduler()
            except Exception as again:
                _log.error("the backend cannot be used any more: %s", one_line(again))
                self._closed = True
                return False
        return True

    def _fail_all(self, error: BackendError) -> None:
        with self._work:
            left, self._answers = self._answers, {}
        for answers, index in left.values():
            answers.put(index, error)
            self._tell_now(answers)

    def _deliver(self, updates: list[Update]) -> None:
        plan = False
        with self._work:
            for update in updates:
                last = update.completion is not None or update.error is not None
                found = self._answers.pop(update.request, None) if last else self._answers.get(update.request)
                if found is None:  # cancelled
                    continue
                answers, index = found
                first = not answers.started
                answers.put(index, update)
                if last or first:
                    self._tell_now(answers)
                elif not answers.announced:
                    answers.announced = plan = True
                    self._changed.append(answers)
        if plan and not self._flush_planned:
            self._flush_planned = True
            self._loop.call_soon_threadsafe(self._plan_flush)

    def _tell_now(self, answers: Answers) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(answers.wake)

    def _plan_flush(self) -> None:
        self._loop.call_at(self._flushed_at + self._coalesce, self._flush)

    def _flush(self) -> None:
        self._flush_planned, self._flushed_at = False, self._loop.time()
        while self._changed:
            answers = self._changed.popleft()
            answers.announced = False  # before it looks: what comes from now on is announced again
            answers.wake()
