"""The thread that runs the model: one scheduler, stepped as long as it has requests.

The event loop is told of an answer's new text at most once per `coalesce` seconds, and at once of its beginning and
end: to make text and wake it for each token would cost more than all else that the server does. Answers take turns, so
that neither the engine's thread nor the event loop ever has the text of all of them to make or to send at once.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic

from bitnet_numba.engine.queue_options import QueueOptions
from bitnet_numba.engine.request import Request
from bitnet_numba.engine.scheduler import Scheduler
from bitnet_numba.engine.sequence import Update
from bitnet_numba.errors import BitNetError, SchedulerClosed, one_line
from bitnet_numba.server.answers import Answers
from bitnet_numba.server.garbage import RoundCollector

_log = logging.getLogger("bitnet_numba.server")
CLOSED = "no more answers are generated"
# Seconds without work after which rounds to come are prepared: whoever has got an answer may ask again at once.
QUIET = 0.25


class EngineLoop:
    """Runs requests. `close` ends the thread, and with it every answer that is open."""

    def __init__(self, loop: asyncio.AbstractEventLoop, open_scheduler: Callable[[], Scheduler], coalesce: float):
        """loop: in which answers are awaited. open_scheduler: called again after a failure of the backend.

        Raises BackendError if there is too little memory.
        """
        self._loop, self._open_scheduler, self._coalesce = loop, open_scheduler, coalesce
        self._scheduler = open_scheduler()
        self._lock = threading.Lock()  # guards the next two, and what they have to do with the scheduler
        self._answers: dict[int, tuple[Answers, int]] = {}  # by number in the scheduler: whose, and which of them
        self._closed = False
        self._stepped_at = monotonic()  # when a step ended, or the first request came after a pause
        self._pause = 0.0  # seconds to wait for work before rounds to come are prepared
        self._collector = RoundCollector()
        self._thread = threading.Thread(target=self._run, name="bitnet_numba engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that have a slot."""
        return self._scheduler.running

    @property
    def alive(self) -> bool:
        """Whether the thread runs; it ends only when it is closed, or if the backend cannot be used any more."""
        return self._thread.is_alive()

    @property
    def silent_for(self) -> float:
        """Seconds since a step has ended although there is work; 0 if there is none."""
        return monotonic() - self._stepped_at if self._scheduler.busy else 0.0

    def open(
        self, requests: Sequence[Request], options: QueueOptions, quiet: bool = False, form: str | None = None
    ) -> Answers:
        """Starts answers; from any thread. quiet: of each, only the end is told. form: as for `Answers`.

        Raises RequestError if one can never fit, SchedulerClosed once closed.
        """
        with self._lock:
            if self._closed:
                raise SchedulerClosed(CLOSED)
            numbers: list[int] = []
            try:
                for request in requests:
                    numbers.append(self._scheduler.add_request(request, options, quiet=quiet))
            except BitNetError:
                for number in numbers:
                    self._scheduler.cancel(number)
                raise
            if not self._answers:
                self._stepped_at = monotonic()
            answers = Answers(requests, numbers, form)
            for index, number in enumerate(numbers):
                self._answers[number] = answers, index
        return answers

    def cancel(self, answers: Answers) -> None:
        """Ends answers that nobody wants any more, before the next step; from any thread."""
        with self._lock:
            for number in answers.numbers:
                found = self._answers.get(number)
                if found is not None and found[0] is answers:  # of another, if the scheduler is a new one
                    del self._answers[number]
                    self._scheduler.cancel(number)

    def close(self) -> None:
        """Ends the thread after the step under way; answers that are open get an error."""
        with self._lock:
            self._closed = True
        self._scheduler.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closed and self._wait():
                self._collector.hold()
                updates = self._scheduler.step(coalesce=self._coalesce)
                self._stepped_at, self._pause = monotonic(), QUIET
                if not self._scheduler.closed:
                    self._deliver(updates, self._answers)
                    self._collector.collect()
                elif not self._start_again(updates):
                    break
        except SchedulerClosed:  # by `close`, which had nothing to tell
            pass
        except Exception:  # a mistake of ours
            _log.exception("the engine's thread has failed")
        finally:
            self._closed = True
            self._collector.release()
            self._scheduler.close()
            self._end_all(SchedulerClosed(CLOSED))

    def _wait(self) -> bool:
        """Waits for work, and prepares what rounds to come will need while there is none; False: for good."""
        if self._scheduler.busy:
            return True
        self._collector.release()
        if self._pause and self._scheduler.wait(self._pause):
            return True
        while not self._closed and not self._scheduler.busy and self._scheduler.prepare():
            pass
        return self._scheduler.wait()

    def _start_again(self, updates: list[Update]) -> bool:
        """Opens another scheduler in place of one that has closed; False if none is wanted, or to be had.

        The last updates of the old one are told only then, so that who asks again finds the new one.
        """
        scheduler: Scheduler | None = None
        if not self._closed:
            _log.error("%s", updates[-1].error if updates else "the backend failed")
            try:
                scheduler = self._open_scheduler()
            except Exception as error:
                _log.error("the backend cannot be used any more: %s", one_line(error))
        with self._lock:
            answers, self._answers = self._answers, {}
            self._scheduler = scheduler or self._scheduler
        self._deliver(updates, answers, failed=True)
        return scheduler is not None

    def _end_all(self, error: BitNetError) -> None:
        with self._lock:
            left, self._answers = self._answers, {}
            for number, (answers, index) in left.items():
                answers.put(index, Update(number, error=error))
                self._loop.call_soon_threadsafe(answers.wake)

    def _deliver(
        self, updates: list[Update], open_answers: dict[int, tuple[Answers, int]], failed: bool = False
    ) -> None:
        """Gives updates to whom they are for. failed: the backend has, so that they all are the same error."""
        changed: list[Answers] = []
        with self._lock:
            for update in updates:
                last = update.completion is not None or update.error is not None
                found = open_answers.pop(update.request, None) if last else open_answers.get(update.request)
                if found is None:  # cancelled
                    continue
                answers, index = found
                answers.put(index, update, failed)
                changed.append(answers)
        if changed:
            self._loop.call_soon_threadsafe(_wake, changed)


def _wake(changed: Sequence[Answers]) -> None:
    for answers in changed:
        answers.wake()
