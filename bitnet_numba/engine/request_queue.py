"""The requests of a scheduler that have not ended, and what other threads than the one that steps it ask of it."""

import threading
from collections.abc import Callable, Collection, Iterable
from time import monotonic

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.deadlines import Deadlines
from bitnet_numba.engine.queue_options import QueueOptions
from bitnet_numba.engine.request import Request
from bitnet_numba.engine.sequence import Sequence, Update
from bitnet_numba.engine.waiting_queue import WaitingQueue
from bitnet_numba.errors import BitNetError, QueueFull, SchedulerClosed

CLOSED = "this scheduler is closed"
DRAINING = "this scheduler finishes what it has, and takes no more requests"


class RequestQueue:
    """Requests that wait or run. Every method may be called from any thread."""

    def __init__(self, max_waiting: int | None):
        """max_waiting: how many may wait, beside those that there are slots for; None: any number."""
        self.draining = self.closed = False
        self._max_waiting = max_waiting
        self._changed = threading.Condition()  # guards the rest; notified when `wait` may have to return
        self._num_added = 0  # requests so far; ids count from 0
        self._open: dict[int, Sequence] = {}  # by id: those that have not ended
        self._waiting = WaitingQueue()  # of these, those without a slot
        self._deadlines = Deadlines()
        self._cancelled: list[Sequence] = []  # that are to be ended
        self._updates: list[Update] = []  # the last ones of requests that have ended here

    @property
    def waiting(self) -> int:
        """Number of requests without a slot."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a request has not ended, or there are updates to be taken."""
        return bool(self._open or self._updates)

    def add(
        self,
        request: Request,
        options: QueueOptions,
        max_cached: int,
        replayed: bool,
        free_slots: int,
        quiet: bool = False,
    ) -> int:
        """Adds a request, which waits from now on; its id. Raises QueueFull or SchedulerClosed."""
        with self._changed:
            if self.closed or self.draining:
                raise SchedulerClosed(CLOSED if self.closed else DRAINING)
            if self._max_waiting is not None and self.waiting >= self._max_waiting + free_slots:
                many = "1 request is" if self.waiting == 1 else f"{self.waiting} requests are"
                raise QueueFull(f"{many} waiting already: try again later")
            s = Sequence(self._num_added, request, options, max_cached, replayed=replayed, quiet=quiet)
            self._num_added += 1
            self._open[s.id] = s
            self._waiting.put(s)
            self._deadlines.add(s, monotonic())
            self._changed.notify_all()
            return s.id

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        """Lets sequences that have lost their slots wait again."""
        with self._changed:
            for s in sequences:
                self._waiting.put(s)

    def take(self, passed_over: Collection[str], reserve: Callable[[Sequence], bool]) -> Sequence | None:
        """Takes out the first one that waits, but for those of the tenants `passed_over`; None if there is none, or if
        `reserve` finds no room for it."""
        with self._changed:
            s = self._waiting.first(passed_over)
            if s is None or not reserve(s):
                return None
            self._waiting.remove(s)
            return s

    def cancel(self, number: int, complete: Callable[[Sequence], Completion]) -> None:
        """Ends a request that has never been started, with the completion that `complete` makes; the thread that steps
        has to end others (see `take_cancelled`). Does nothing if it has ended, or never was."""
        with self._changed:
            s = self._open.get(number)
            if s is None:
                return
            if s.builder is None and s in self._waiting:
                self.end(s)
                self._updates.append(Update(s.id, completion=complete(s)))
                self._changed.notify_all()
            else:
                self._cancelled.append(s)

    def take_cancelled(self) -> list[Sequence]:
        """The sequences that are to be ended."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
            return [s for s in dict.fromkeys(cancelled) if not s.ended]

    def take_late(self) -> list[tuple[Sequence, bool]]:
        """The sequences whose deadlines have come, and whether that is the one for waiting (see `Deadlines`)."""
        with self._changed:
            return self._deadlines.pop(monotonic())

    def end(self, s: Sequence) -> None:
        """Removes a sequence that ends."""
        with self._changed:
            s.ended = True
            del self._open[s.id]
            if s in self._waiting:
                self._waiting.remove(s)

    def add_updates(self, updates: Iterable[Update]) -> None:
        """Keeps updates for the next step."""
        with self._changed:
            self._updates += updates

    def take_updates(self) -> list[Update]:
        """The updates that have been kept."""
        with self._changed:
            taken, self._updates = self._updates, []
            return taken

    def drain(self) -> None:
        """Lets no more requests in."""
        with self._changed:
            self.draining = True
            self._changed.notify_all()

    def wait(self, timeout: float | None) -> bool:
        """Sleeps until it is `busy`, or for `timeout` seconds, or until it cannot be any more; whether it is."""
        with self._changed:
            self._changed.wait_for(lambda: self.busy or self.draining or self.closed, timeout)
            return self.busy

    def close(self, error: BitNetError) -> None:
        """Ends all requests with an error, and lets no more in."""
        with self._changed:
            self.closed = True
            self._updates += [Update(s.id, error=error) for s in self._open.values()]
            for s in self._open.values():
                s.ended = True
            self._open.clear()
            self._waiting.clear()
            self._cancelled.clear()
            self._changed.notify_all()
