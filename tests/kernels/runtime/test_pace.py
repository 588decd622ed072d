"""How the host waits for steps: told soon, without polling all the time. The clock is a fake; no device is needed."""

import ctypes
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from bitnet_numba.kernels.runtime import driver
from bitnet_numba.kernels.runtime.driver import Pace

QUERY, WAKE, OVERSLEPT = 1e-6, 80e-6, 15e-6  # seconds: a look; how late the driver wakes a sleeper, and the system does


class FakeClock:
    """Time that goes on only while somebody looks or sleeps."""

    def __init__(self) -> None:
        self.now = self.polled = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds + OVERSLEPT


class FakeEvent:
    """Is reached at a time."""

    def __init__(self, clock: FakeClock, at: float):
        self.clock, self.at = clock, at

    def reached(self) -> bool:
        self.clock.now += QUERY
        self.clock.polled += QUERY
        return self.clock.now >= self.at

    def wait(self) -> None:
        self.clock.now = max(self.clock.now, self.at + WAKE)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(driver, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(driver, "sleep_exactly", clock.sleep)
    return clock


def follow(
    clock: FakeClock, pace: Pace, distances: list[float], work: Callable[[int], float], kinds: bool = False
) -> list[float]:
    """Waits for events at these distances, with some work after each; how late each was noticed. kinds: each distance
    is of a kind of its own."""
    at, late = clock.now, []
    for i, distance in enumerate(distances):
        at += distance
        pace.wait(FakeEvent(clock, at), distance if kinds else None)  # type: ignore[arg-type]
        late.append(clock.now - at)
        clock.now += work(i)
    return late


@pytest.mark.parametrize("distance", [600e-6, 2.4e-3, 20e-3])
def test_steps_at_equal_distances(clock: FakeClock, distance: float) -> None:
    pace = Pace()
    late = follow(clock, pace, [distance] * 100, lambda i: 0.2 * distance)
    assert max(late[5:]) <= 2 * QUERY
    assert clock.polled <= 0.2 * clock.now


def test_steps_that_become_shorter_and_longer(clock: FakeClock) -> None:
    pace = Pace()
    for distance in (2e-3, 1e-3, 5e-3, 0.6e-3):
        late = follow(clock, pace, [distance] * 60, lambda i: 1e-5)
        assert max(late) <= driver.NAP + OVERSLEPT + 2 * QUERY
        assert max(late[30:]) <= 2 * QUERY
    # Rounds that compute prompts, too: a short one that comes unexpectedly is hardly slept through.
    rounds = [2.4e-3, 6.4e-3, 6.4e-3, 6.4e-3, 2.4e-3, 2.4e-3, 6.4e-3, 2.4e-3] * 10
    late = follow(clock, pace, rounds, lambda i: 1e-4)
    assert max(late[10:]) <= driver.NAP + OVERSLEPT and np.mean(late[10:]) <= 100e-6
    before, polled = clock.now, clock.polled
    follow(clock, pace, [1.0], lambda i: 0.0)
    assert clock.polled - polled <= 3e-3 and clock.now - before <= 1.0 + WAKE + 2 * QUERY


def test_each_kind_of_work_has_a_distance_of_its_own(clock: FakeClock) -> None:
    """Rounds with prompts and without, in any order: each is slept through nearly to its end."""
    pace = Pace()
    rounds = [2.4e-3, 2.9e-3, 2.4e-3, 5.3e-3, 5.3e-3, 2.4e-3, 2.9e-3, 2.9e-3] * 10
    late = follow(clock, pace, rounds, lambda i: 1e-4, kinds=True)
    assert max(late[8:]) <= 2 * QUERY and clock.polled <= 0.08 * clock.now
    # One that was reached while the host did something else does not set the next one's estimate back.
    polled, before = clock.polled, clock.now
    late = follow(clock, pace, rounds, lambda i: 4e-3 if i % 8 == 1 else 1e-4, kinds=True)
    on_time = [each for i, each in enumerate(late) if i % 8 not in (2, 3)]
    assert max(on_time) <= driver.NAP + OVERSLEPT + 2 * QUERY and np.median(on_time) <= 2 * QUERY
    assert clock.polled - polled <= 0.1 * (clock.now - before)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's timers")
def test_sleeping_leaves_a_threads_timers_as_they_were() -> None:
    libc = ctypes.CDLL(None)
    usual = libc.prctl(driver.GET_TIMER_SLACK)
    for before in (70_000, usual):
        libc.prctl(driver.SET_TIMER_SLACK, before)
        began = time.perf_counter()
        driver.sleep_exactly(2e-3)
        assert time.perf_counter() - began >= 2e-3
        assert libc.prctl(driver.GET_TIMER_SLACK) == before > 0


@pytest.mark.parametrize(("slack", "result"), [(-1, 0), (0, 0), (50_000, -1)])
def test_a_slack_that_is_unknown_or_cannot_be_set_stays(
    monkeypatch: pytest.MonkeyPatch, slack: int, result: int
) -> None:
    """A sandbox may forbid either call; -1 put back would be the longest slack there is."""
    calls: list[tuple[int, int]] = []

    def prctl(option: int, value: int) -> int:
        calls.append((option, value))
        return slack if option == driver.GET_TIMER_SLACK else result

    monkeypatch.setattr(driver, "_prctl", lambda: prctl)
    driver.sleep_exactly(1e-4)
    assert [value for option, value in calls if option == driver.SET_TIMER_SLACK] == [driver.SLACK] * (slack > 0)


def test_what_is_reached_already_is_not_waited_for(clock: FakeClock) -> None:
    pace = Pace()
    follow(clock, pace, [2e-3] * 5, lambda i: 0.0)
    before = clock.now
    pace.wait(FakeEvent(clock, 0.0))  # type: ignore[arg-type]
    assert clock.now - before <= 2 * QUERY
    assert max(follow(clock, pace, [2e-3] * 5, lambda i: 0.0)) <= 2 * QUERY


def test_a_pause_says_nothing_of_the_steps_after_it(clock: FakeClock) -> None:
    """As between two answers of one token each."""
    pace = Pace()
    follow(clock, pace, [2e-3], lambda i: 3600.0)
    polled = clock.polled
    late = follow(clock, pace, [50e-3, *[2e-3] * 9], lambda i: 0.0)
    assert max(late[:2]) <= WAKE + 2 * QUERY and max(late[2:]) <= 2 * QUERY
    assert clock.polled - polled <= 3e-3
