"""What a batch knows of the time that its calls take. No device is needed."""

from typing import Any

import pytest

from bitnet_numba.backends.cuda import call_clock
from bitnet_numba.backends.cuda.call_clock import CallClock
from bitnet_numba.backends.protocol import CallTimes


class FakeStream:
    """A stream that is at a time, in microseconds."""

    def __init__(self) -> None:
        self.enqueued = self.done = 0.0


class FakeGraph:
    """A graph that takes so many microseconds."""

    def __init__(self, us: float):
        self.us = us

    def replay(self, stream: FakeStream) -> None:
        stream.enqueued += self.us


class FakeEvent:
    made = 0

    def __init__(self) -> None:
        FakeEvent.made += 1

    def record(self, stream: Any) -> None:
        self.stream, self.at = stream, stream.enqueued

    def reached(self) -> bool:
        return bool(self.stream.done >= self.at)

    def microseconds_since(self, earlier: "FakeEvent") -> float:
        assert self.reached() and earlier.reached()
        return self.at - earlier.at


def test_calls_are_known_once_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_clock, "Event", FakeEvent)
    stream = FakeStream()
    clock = CallClock(stream)  # type: ignore[arg-type]
    assert clock.times() == CallTimes(0, 0.0, 0.0)
    clock.replay(FakeGraph(4000.0), 512)  # type: ignore[arg-type]
    clock.replay(FakeGraph(2000.0))  # type: ignore[arg-type]
    stream.enqueued += 1e4  # of what is no concern of the clock
    clock.replay(FakeGraph(1500.0), 64)  # type: ignore[arg-type]
    clock.replay(FakeGraph(2500.0))  # type: ignore[arg-type]
    assert clock.times() == CallTimes(0, 0.0, 0.0)
    stream.done = 6000.0
    assert clock.times() == clock.times() == CallTimes(512, 4e-3, 2e-3)
    stream.done = 1e5
    assert clock.times() == CallTimes(64, 1.5e-3, 2.5e-3)
    made = FakeEvent.made
    clock.replay(FakeGraph(1.0))  # type: ignore[arg-type]
    assert FakeEvent.made == made, "events are used again"


def test_calls_whose_times_are_not_asked_for_leave_no_events_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_clock, "Event", FakeEvent)
    stream, made = FakeStream(), FakeEvent.made
    clock = CallClock(stream)  # type: ignore[arg-type]
    for _ in range(100):
        clock.replay(FakeGraph(1.0))  # type: ignore[arg-type]
        stream.done = stream.enqueued - 3.0  # three calls behind
    assert FakeEvent.made - made <= 12
