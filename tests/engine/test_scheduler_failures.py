"""A scheduler whose requests, or whose backend, fail, or which is closed: who ends, and what is told."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bitnet_numba.errors import BackendError, RequestError, SchedulerClosed
from bitnet_numba.sampling import SamplingParams
from tests.engine.scheduling import BEGINNING, alone, engine, run, same_answer
from tests.engine.toy_backend import tokens_of


def test_numbers_that_are_not_finite_end_one_request_alone() -> None:
    llm, backend = engine()
    backend.bad_token = 1234
    scheduler = llm.scheduler(max_sequences=3)
    params = SamplingParams(1.0, seed=1)
    for ids in ([5, 6], [5, 1234], [7]):
        scheduler.add(ids, params, max_new_tokens=9)
    updates = run(scheduler)
    assert [update.request for update in updates if update.error] == [1]
    assert not any(update.text or update.completion for update in updates if update.request == 1)
    backend.bad_token = None
    for number, ids in ((0, [5, 6]), (2, [7])):
        completion = next(u.completion for u in updates if u.request == number and u.completion)
        assert same_answer(completion, alone(llm, {"prompt": ids, "params": params, "max_new_tokens": 9}))
    assert scheduler._runner.pool.free == backend.batches[0].num_pages
    backend.bad_token = 1234
    with pytest.raises(BackendError, match="prompt 1: the model's weights produce numbers that are not finite"):
        llm.generate_batch([[5], [1234]])
    assert backend.batches[1].closed


def test_a_backend_that_fails_closes_the_scheduler() -> None:
    llm, backend = engine(tokens_of("a"))
    backend.fail_after = 2
    scheduler = llm.scheduler(max_sequences=2)
    for i in (5, 6, 7):
        scheduler.add([i])
    scheduler.step()
    assert scheduler.waiting == 1
    *before, first, second, third = run(scheduler)
    assert {update.request for update in before} == {0, 1} and "".join(update.text for update in before) == "aaaa"
    for number, update in enumerate((first, second, third)):
        assert update.request == number and str(update.error) == "a step failed"
        assert isinstance(update.error, BackendError) and isinstance(update.error.__cause__, ValueError)
    assert backend.batches[0].closed and scheduler.closed and not scheduler.busy
    with pytest.raises(RequestError, match="this scheduler is closed"):
        scheduler.step()
    with pytest.raises(RequestError, match="this scheduler is closed"):
        scheduler.add([5])
    scheduler.close()


@pytest.mark.parametrize("closed", [False, True])
def test_a_request_is_not_cancelled_before_it_is_there(closed: bool) -> None:
    llm, _ = engine(tokens_of("a"))
    scheduler = llm.scheduler()
    for number in (0, 1, -1, 10**400):
        scheduler.cancel(number)
    assert not scheduler.busy and scheduler.step() == []
    if closed:
        scheduler.close()
        scheduler.cancel(0)
        assert not scheduler.busy
    else:
        scheduler.cancel(np.int64(scheduler.add([5], max_new_tokens=3)))  # type: ignore[arg-type]
        scheduler.add([5], max_new_tokens=3)
        reasons = [update.completion.finish_reason for update in run(scheduler) if update.completion]
        assert reasons == ["interrupted", "length"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("drained", [False, True])
def test_a_closed_scheduler_is_busy_until_it_has_told_the_ends(asynchronous: bool, steps: int, drained: bool) -> None:
    llm, backend = engine(tokens_of("a"))
    backend.asynchronous = asynchronous
    scheduler = llm.scheduler(max_sequences=1, prefill_chunk=8)
    numbers = [scheduler.add(BEGINNING[:20]) for _ in range(3)]
    updates = [update for _ in range(steps) for update in scheduler.step()]
    if drained:
        scheduler.drain()
    scheduler.cancel(1)
    scheduler.cancel(0)
    for _ in range(2):
        scheduler.close()
    scheduler.cancel(2)
    assert (scheduler.busy, scheduler.running, scheduler.waiting) == (True, 0, 0) and scheduler.wait(0)
    told = scheduler.step()
    assert not scheduler.busy and not scheduler.wait(), "one step is enough, and nobody waits for what never comes"
    assert sorted(update.request for update in told) == numbers and not any(update.completion for update in updates)
    never_ran = {0, 1} if steps == 0 else {1}  # of those that were cancelled: they have ended before `close`
    assert {update.request for update in told if update.error is None} == never_ran
    assert all(isinstance(update.error, SchedulerClosed) for update in told if update.request not in never_ran)
    with pytest.raises(SchedulerClosed):
        scheduler.step()


def test_a_scheduler_that_is_closed_with_nothing_open_is_not_busy() -> None:
    llm, _ = engine(tokens_of("a"))
    unused, used, left = (llm.scheduler() for _ in range(3))
    used.add([5], max_new_tokens=2)
    run(used)
    with left:
        left.add([5])
        left.step()
    for scheduler in (unused, used):
        scheduler.close()
        assert not scheduler.busy and not scheduler.wait() and run(scheduler) == []
    assert [type(update.error) for update in run(left)] == [SchedulerClosed]
    for scheduler in (unused, used, left):
        assert scheduler.closed and not scheduler.busy
        with pytest.raises(SchedulerClosed):
            scheduler.step()


def test_a_request_that_cannot_start_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, backend = engine()
    scheduler = llm.scheduler(max_sequences=2)
    batch = backend.batches[0]
    start = batch.start

    def refuse(slot: int, ids: Sequence[int], *rest: Any) -> None:
        if list(ids) == [6] * 9:
            raise OverflowError("int too large\nto convert")
        start(slot, ids, *rest)

    monkeypatch.setattr(batch, "start", refuse)
    asked = [[5], [6] * 9, [7], [6] * 9, [6] * 9, [8]]
    for ids in asked:
        scheduler.add(ids, max_new_tokens=9)
    updates = run(scheduler)
    failed = {update.request: str(update.error) for update in updates if update.error}
    assert failed == dict.fromkeys((1, 3, 4), "int too large to convert")
    for number in (0, 2, 5):
        completion = next(u.completion for u in updates if u.request == number and u.completion)
        assert same_answer(completion, alone(llm, {"prompt": asked[number], "max_new_tokens": 9}))
    assert scheduler._runner.pool.free == batch.num_pages and scheduler._runner.free_slots == 2


def test_pages_of_a_failed_request_are_not_used_again() -> None:
    llm, backend = engine(tokens_of("a"))
    scheduler = llm.scheduler(max_sequences=1)
    scheduler.add(BEGINNING[:10], max_new_tokens=2)
    backend.bad_token = BEGINNING[25]
    scheduler.add(BEGINNING, max_new_tokens=2)
    assert [update.error is None for update in run(scheduler) if update.completion or update.error] == [True, False]
    backend.bad_token = None  # as if memory had run out, and is there again
    scheduler.add(BEGINNING, max_new_tokens=2)
    completion = run(scheduler)[-1].completion
    assert completion is not None and completion.stats.reused_tokens == 8  # what the first one computed
    assert scheduler._runner.pool.free == backend.batches[0].num_pages
