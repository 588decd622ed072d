"""How long passes and steps of a batch take on the device, known some time after they were enqueued."""

from collections import deque

from bitnet_numba.backends.protocol import CallTimes
from bitnet_numba.kernels.runtime.driver import Event, Graph, Stream


class CallClock:
    """Events before and after each graph, which are never waited for."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._spare: list[Event] = []
        self._open: deque[tuple[int, Event, Event]] = deque()  # tokens of a pass, 0 for a step; before and after
        self._times = CallTimes()

    def replay(self, graph: Graph, prompt_tokens: int = 0) -> None:
        """Enqueues a pass that computes so many tokens of prompts, or (0) a step."""
        before = self._record()
        graph.replay(self._stream)
        self._open.append((prompt_tokens, before, self._record()))

    def times(self) -> CallTimes:
        """Of the last ones that are done."""
        while self._open and self._open[0][2].reached():
            tokens, before, after = self._open.popleft()
            seconds = after.microseconds_since(before) / 1e6
            if tokens:
                self._times = self._times._replace(prefill_tokens=tokens, prefill_seconds=seconds)
            else:
                self._times = self._times._replace(step_seconds=seconds)
            self._spare += before, after
        return self._times

    def _record(self) -> Event:
        if not self._spare:
            self.times()  # frees those of calls that are done, though nobody asked for their times
        event = self._spare.pop() if self._spare else Event()
        event.record(self._stream)
        return event
