"""When requests have no more time."""

import heapq

from bitnet_numba.engine.sequence import Sequence


class Deadlines:
    """The deadlines of sequences, in order of time. Those of sequences that have ended are forgotten now and then."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, bool, Sequence]] = []  # (when, id, whether for waiting, whose)
        self._compact_at = 64  # entries

    def add(self, s: Sequence, now: float) -> None:
        """Adds the deadlines that its options set, from `now` in seconds."""
        for seconds, for_waiting in ((s.options.queue_timeout, True), (s.options.timeout, False)):
            if seconds is not None:
                heapq.heappush(self._heap, (now + seconds, s.id, for_waiting, s))
        if len(self._heap) > self._compact_at:
            self._heap = [entry for entry in self._heap if not entry[3].ended]
            heapq.heapify(self._heap)
            self._compact_at = 2 * len(self._heap) + 64

    def pop(self, now: float) -> list[tuple[Sequence, bool]]:
        """Takes out the deadlines that have come: whose each is, and whether it is that for waiting."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            _, _, for_waiting, s = heapq.heappop(self._heap)
            if not s.ended:
                due.append((s, for_waiting))
        return due
