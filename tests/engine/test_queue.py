"""Waiting: how many may, for how long, in which order, and what wakes whoever runs the scheduler."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.engine import request_queue
from bitnet_numba.engine.deadlines import Deadlines
from bitnet_numba.engine.queue_options import QueueOptions
from bitnet_numba.engine.request import Request
from bitnet_numba.engine.scheduler import Scheduler
from bitnet_numba.engine.sequence import Sequence as Scheduled
from bitnet_numba.engine.sequence import Update
from bitnet_numba.engine.waiting_queue import WaitingQueue
from bitnet_numba.errors import QueueFull, QueueTimeout, RequestError, SchedulerClosed
from bitnet_numba.sampling import SamplingParams
from tests.engine.toy_backend import TOKENIZER, tokens_of, toy_engine


class Clock:
    """What the scheduler takes for the time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(request_queue, "monotonic", clock)
    return clock


def run(scheduler: Scheduler) -> list[Update]:
    updates = []
    while scheduler.busy:
        updates += scheduler.step()
    return updates


def sequence(number: int, **options: Any) -> Scheduled:
    return Scheduled(number, Request([1], SamplingParams(seed=0), ()), QueueOptions(**options), 5)


def test_a_full_queue_refuses() -> None:
    llm, _ = toy_engine(tokens_of("a"))
    scheduler = llm.scheduler(max_sequences=2, max_waiting=3)
    for i in range(5):  # two of them will find slots free
        scheduler.add([i], max_new_tokens=2)
    with pytest.raises(QueueFull, match="5 requests are waiting already"):
        scheduler.add([5])
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 3)
    with pytest.raises(QueueFull):
        scheduler.add([5])
    one = llm.scheduler(max_sequences=1, max_waiting=1)
    for _ in range(2):
        one.add([5])
    one.step()
    with pytest.raises(QueueFull, match="^1 request is waiting already: try again later$"):
        one.add([5])
    scheduler.cancel(4)  # leaves the queue at once
    assert scheduler.waiting == 2
    assert scheduler.add([6], max_new_tokens=2) == 5  # numbers are not lost
    ended = [update.request for update in run(scheduler) if update.completion]
    assert sorted(ended) == list(range(6)) and ended[0] == 4


def test_who_waits_too_long_is_told_so(clock: Clock) -> None:
    llm, _ = toy_engine(tokens_of("a"))
    scheduler = llm.scheduler(max_sequences=1)
    scheduler.add([5], max_new_tokens=40, queue_timeout=0)  # there is room for it at once
    scheduler.add([6], queue_timeout=3)
    scheduler.add([7], max_new_tokens=1, queue_timeout=30)
    scheduler.step()
    clock.now += 3.5
    (error,) = [update.error for update in scheduler.step() if update.request == 1]
    assert isinstance(error, QueueTimeout) and str(error) == "the request was not started within 3 seconds"
    assert scheduler.waiting == 1
    clock.now += 20
    assert sorted(update.request for update in run(scheduler) if update.completion) == [0, 2]


def test_an_answer_ends_with_its_time(clock: Clock) -> None:
    llm, backend = toy_engine(tokens_of("one two three"))
    scheduler = llm.scheduler(max_sequences=1)
    scheduler.add([5], timeout=10, stop="threeone twox")
    scheduler.add([6], timeout=5)
    updates = [update for _ in range(5) for update in scheduler.step()]
    clock.now += 6
    updates += scheduler.step()
    (waited,) = [update.completion for update in updates if update.request == 1]
    assert waited is not None and (waited.text, waited.finish_reason) == ("", "timeout")
    clock.now += 6
    updates += run(scheduler)
    last = updates[-1].completion
    assert last is not None and last.finish_reason == "timeout" and len(last.token_ids) >= 4
    assert "".join(update.text for update in updates if update.request == 0) == last.text
    assert last.text == TOKENIZER.decode(last.token_ids), "what might have been a stop string is not held back"
    assert scheduler._runner.pool.free == backend.batches[0].num_pages


def test_lower_numbers_go_first() -> None:
    llm, backend = toy_engine(tokens_of("a"))
    scheduler = llm.scheduler(max_sequences=1)
    for number, priority in enumerate((0, 5, -1, 0, 5, -1)):
        scheduler.add([number], max_new_tokens=2, priority=priority)
    run(scheduler)
    assert [ids[0] for ids in backend.batches[0].started] == [2, 5, 0, 3, 1, 4]


def test_a_tenant_does_not_take_all_slots() -> None:
    llm, backend = toy_engine(tokens_of("a"))
    scheduler = llm.scheduler(max_sequences=4, max_per_tenant=2)
    for i in range(6):
        scheduler.add([i], max_new_tokens=5, tenant="greedy")
    scheduler.add([50], max_new_tokens=5, tenant="modest")
    scheduler.step()
    assert [ids[0] for ids in backend.batches[0].started] == [0, 1, 50]
    running = []
    while scheduler.busy:
        scheduler.step()
        running.append(sum(s.options.tenant == "greedy" for s in scheduler._runner.running.values()))
    assert max(running) == 2 and len(backend.batches[0].started) == 7


def test_draining_finishes_what_was_accepted() -> None:
    llm, _ = toy_engine(tokens_of("a"))
    scheduler = llm.scheduler(max_sequences=1)
    for i in range(3):
        scheduler.add([i], max_new_tokens=3)
    scheduler.step()
    scheduler.drain()
    with pytest.raises(SchedulerClosed, match="takes no more requests"):
        scheduler.add([9])
    ended = []
    while scheduler.wait():
        ended += [update.request for update in scheduler.step() if update.completion]
    assert ended == [0, 1, 2] and not scheduler.closed


def test_a_thread_that_waits_is_woken() -> None:
    llm, _ = toy_engine(tokens_of("a"))
    scheduler = llm.scheduler()
    assert not scheduler.wait(0)
    updates: list[Update] = []

    def serve() -> None:
        while scheduler.wait():
            updates.extend(scheduler.step())

    thread = threading.Thread(target=serve)
    thread.start()
    scheduler.add([5], max_new_tokens=3)
    while scheduler.busy:
        threading.Event().wait(0.001)
    scheduler.add([6], max_new_tokens=3)
    scheduler.drain()
    thread.join(60)
    assert not thread.is_alive()
    assert [update.request for update in updates if update.completion] == [0, 1]


def test_closing_wakes_and_answers() -> None:
    llm, _ = toy_engine(tokens_of("a"), context=4096)
    scheduler = llm.scheduler(max_sequences=1)
    updates: list[Update] = []

    def serve() -> None:
        while scheduler.wait():
            updates.extend(scheduler.step())

    thread = threading.Thread(target=serve)
    thread.start()
    for i in range(2):
        scheduler.add([i], max_new_tokens=None)
    while scheduler.running == 0:
        threading.Event().wait(0.001)
    scheduler.close()
    thread.join(60)
    assert not thread.is_alive() and scheduler.closed
    assert [update.request for update in updates if isinstance(update.error, SchedulerClosed)] == [0, 1]


def test_a_request_cancelled_amid_a_round_frees_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a long round goes to others: here, while another prompt is computed."""
    llm, backend = toy_engine(tokens_of("a"), context=256)
    backend.call_tokens = 40
    scheduler = llm.scheduler(max_sequences=1, prefill_chunk=80)
    batch = backend.batches[0]
    for i in range(2):
        scheduler.add([i] * 60, max_new_tokens=3)
    prefill = batch.prefill

    def prefill_and_cancel(parts: Sequence[tuple[int, int]]) -> None:
        prefill(parts)
        scheduler.cancel(0)

    monkeypatch.setattr(batch, "prefill", prefill_and_cancel)
    updates = scheduler.step()
    assert [(update.request, update.completion is not None) for update in updates] == [(0, True)]
    assert batch.started == [[0] * 60, [1] * 60] and batch.prefilled == [40, 40]


@pytest.mark.parametrize(
    "options",
    [{"priority": 1.5}, {"priority": True}, {"tenant": None}, {"cache_salt": 5}, {"timeout": -1}, {"timeout": "5"},
     {"timeout": float("nan")}, {"queue_timeout": 1e300}, {"queue_timeout": True}, {"timeout": 10**400}],
    ids=str,
)  # fmt: skip
def test_options_are_checked(options: dict[str, Any]) -> None:
    llm, _ = toy_engine()
    scheduler = llm.scheduler()
    with pytest.raises(RequestError, match=rf"{next(iter(options))} must be ") as caught:
        scheduler.add([5], **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 150
    assert not scheduler.busy


@given(
    st.lists(st.tuples(st.integers(-2, 2), st.sampled_from("abc"), st.booleans()), max_size=40),
    st.sets(st.sampled_from("abc")),
)
def test_the_queue_is_in_order(events: list[tuple[int, str, bool]], passed_over: set[str]) -> None:
    """As sorting all that wait would have it."""
    queue, waiting = WaitingQueue(), []
    for number, (priority, tenant, take) in enumerate(events):
        s = sequence(number, priority=priority, tenant=tenant)
        assert s not in queue
        queue.put(s)
        waiting.append(s)
        eligible = sorted((s for s in waiting if s.options.tenant not in passed_over), key=lambda s: s.order)
        first = queue.first(passed_over)
        assert first is (eligible[0] if eligible else None)
        if take and first is not None:
            queue.remove(first)
            waiting.remove(first)
        assert len(queue) == len(waiting) and set(map(id, queue)) == set(map(id, waiting))
        assert all(s in queue for s in waiting)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans(), st.integers(0, 3)), max_size=200))
def test_deadlines_come_in_time_and_are_forgotten(events: list[tuple[int, int, bool, int]]) -> None:
    deadlines, now, due = Deadlines(), 0.0, {}
    for number, (waiting, answering, ends, passes) in enumerate(events):
        s = sequence(number, queue_timeout=waiting, timeout=answering)
        deadlines.add(s, now)
        if ends:
            s.ended = True
        else:
            due[number, True], due[number, False] = now + waiting, now + answering
        now += passes
        got = {(s.id, for_waiting) for s, for_waiting in deadlines.pop(now)}
        assert got == {key for key, when in due.items() if when <= now}
        due = {key: when for key, when in due.items() if when > now}
        assert len(deadlines._heap) <= 2 * len(due) + 130
