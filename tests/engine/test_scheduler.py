"""The scheduler over a toy backend: every request is answered as a session would answer it alone."""

import threading
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.engine.sequence import Update
from bitnet_numba.errors import BackendError, ContextFull, RequestError
from bitnet_numba.sampling import SamplingParams
from tests.engine.scheduling import BEGINNING, EOT, alone, engine, requests, run, same_answer
from tests.engine.toy_backend import ToyBatch, tokens_of


@given(
    st.lists(st.one_of(requests, st.none(), st.integers(0, 12)), max_size=25),
    st.integers(1, 5),
    st.sampled_from([None, 60, 100]),
    st.sampled_from([None, 1, 8, 100]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
)
def test_every_request_is_answered_as_if_alone(
    events: list[dict[str, Any] | int | None],
    max_sequences: int,
    tokens: int | None,
    chunk: int | None,
    uniform: bool,
    asynchronous: bool,
    part_tokens: int,
) -> None:
    """Events: a request comes, or (None) a step, or (a number) the request of that number is cancelled. With few tokens
    some are preempted."""
    llm, backend = engine()
    backend.uniform, backend.asynchronous = uniform, asynchronous
    backend.call_tokens, backend.part_tokens = 40, part_tokens
    scheduler = llm.scheduler(max_sequences, tokens, chunk)
    batch = backend.batches[0]
    asked: list[dict[str, Any]] = []
    cancelled: set[int] = set()
    updates: list[Update] = []
    for event in events:
        if isinstance(event, dict):
            assert scheduler.add(**event) == len(asked)
            asked.append(event)
        elif event is not None:
            cancelled.add(event)
            scheduler.cancel(event)
        else:
            updates += scheduler.step()
        assert scheduler.running <= max_sequences
    updates += run(scheduler)

    for number, request in enumerate(asked):
        own = [update for update in updates if update.request == number]
        *before, last = own
        assert last.completion is not None and all(u.completion is None and (u.text or u.token_ids) for u in before)
        assert "".join(update.text for update in own) == last.completion.text
        assert [token for update in own for token in update.token_ids] == last.completion.token_ids
        expected = alone(llm, request)
        if last.completion.finish_reason == "interrupted":
            assert number in cancelled
            ids = last.completion.token_ids
            assert ids == expected.token_ids[: len(ids)] and expected.text.startswith(last.completion.text)
        else:
            assert same_answer(last.completion, expected)
    assert len({update.request for update in updates}) == len(asked)
    # Nothing is left behind, and nothing was computed twice or for nobody.
    assert (scheduler.running, scheduler.waiting, scheduler.busy) == (0, 0, False)
    assert scheduler._runner.pool.free == batch.num_pages and scheduler._runner.free_slots == max_sequences
    ended = [update.completion.stats for update in updates if update.completion]
    if not cancelled and tokens is None:
        assert sum(batch.prefilled) == sum(stats.prompt_tokens - stats.reused_tokens for stats in ended)
        assert batch.started == [request["prompt"] for request in asked]  # first come, first served
    scheduler.close()
    assert batch.closed


# Room


def test_those_that_do_not_fit_wait_their_turn() -> None:
    llm, backend = engine(tokens_of("a"))
    scheduler = llm.scheduler(max_sequences=3, tokens=40)
    big = scheduler.add([5] * 20, max_new_tokens=5)  # 6 pages of 10
    also_big = scheduler.add([6] * 20, max_new_tokens=5)
    small = scheduler.add([7], max_new_tokens=1)  # would fit, but came later
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (1, 2)
    ended: list[int] = []
    while scheduler.waiting:
        ended += [update.request for update in scheduler.step() if update.completion]
    assert ended == [big] and scheduler.running == 2
    assert sorted(update.request for update in run(scheduler) if update.completion) == [also_big, small]
    assert [ids[0] for ids in backend.batches[0].started] == [5, 6, 7]


def test_a_cancelled_request_makes_room_in_the_same_step() -> None:
    llm, backend = engine(tokens_of("a"))
    scheduler = llm.scheduler(max_sequences=1)
    first, second, third = (scheduler.add([i], max_new_tokens=9) for i in (5, 6, 7))
    for _ in range(3):
        scheduler.step()
    scheduler.cancel(third)
    scheduler.cancel(first)
    scheduler.cancel(99)
    updates = scheduler.step()
    assert [(update.request, update.completion.finish_reason) for update in updates if update.completion] == [
        (third, "interrupted"),
        (first, "interrupted"),
    ]
    assert len(backend.batches[0].started) == 2 and scheduler.running == 1
    completion = run(scheduler)[-1].completion
    assert completion is not None and len(completion.token_ids) == 9
    scheduler.cancel(second)  # it has ended
    assert not scheduler.busy and scheduler.step() == []


def test_a_request_cancelled_amid_its_prompt_frees_its_room() -> None:
    llm, backend = engine(tokens_of("a"), context=200)
    scheduler = llm.scheduler(max_sequences=2, prefill_chunk=20)
    batch = backend.batches[0]
    first = scheduler.add(list(range(100)), max_new_tokens=3)
    for _ in range(2):
        scheduler.step()
    scheduler.cancel(first)
    (update,) = scheduler.step()
    assert update.completion is not None and update.completion.finish_reason == "interrupted"
    assert (update.completion.text, update.completion.token_ids) == ("", [])
    assert scheduler._runner.pool.free == batch.num_pages and sum(batch.prefilled) == 40
    scheduler.add(list(range(50)), max_new_tokens=3)  # what had been computed is still of use
    completion = run(scheduler)[-1].completion
    assert completion is not None and completion.stats.reused_tokens == 40
    assert len(completion.token_ids) == 3 and sum(batch.prefilled) == 50


def test_what_could_never_fit_is_refused_at_once() -> None:
    llm, _ = engine()
    scheduler = llm.scheduler(max_sequences=2, tokens=30)  # 8 pages of 4
    with pytest.raises(RequestError, match="may take 48 tokens, but the batch has room for 32"):
        scheduler.add([5] * 3)
    with pytest.raises(RequestError, match="may take 33 tokens"):
        scheduler.add([5] * 30, max_new_tokens=4)
    scheduler.add([5] * 30, max_new_tokens=3)
    with pytest.raises(ContextFull, match="the prompt has 49 tokens, but the context holds 48"):
        scheduler.add([5] * 49)
    assert scheduler.waiting == 1


@pytest.mark.parametrize("sizes", [(0, None, 1), (1, 0, 1), (1, None, 0), (True, None, 1), (1, 2.5, 1)], ids=str)
def test_limits_must_be_positive_integers(sizes: tuple[Any, Any, Any]) -> None:
    llm, backend = engine()
    with pytest.raises(RequestError, match="must be a positive integer"):
        llm.scheduler(*sizes)
    assert backend.batches == []


# Rounds


def test_it_stays_a_step_ahead_and_never_shows_what_follows_a_stop() -> None:
    llm, backend = engine([*tokens_of("Fine."), EOT, *tokens_of("never")])
    scheduler = llm.scheduler(max_sequences=2)
    scheduler.add([5])
    updates = run(scheduler)
    assert "".join(update.text for update in updates) == "Fine."
    log = backend.batches[0].log
    assert log[:3] == ["start", "prefill", "step"]
    assert log[3:7] == ["step", "collect", "collect", "step"]  # the next step before the first results
    assert log.count("step") == len(tokens_of("Fine.")) + 1  # the last of them for nothing


def test_results_that_are_there_at_once_are_told_at_once() -> None:
    llm, backend = engine([*tokens_of("Fine."), EOT, *tokens_of("never")])
    backend.asynchronous = False
    scheduler = llm.scheduler(max_sequences=2)
    scheduler.add([5])
    first = scheduler.step()
    assert [token for update in first for token in update.token_ids] == tokens_of("Fine.")[:2]
    updates = first + run(scheduler)
    assert "".join(update.text for update in updates) == "Fine."
    log = backend.batches[0].log
    assert log[:5] == ["start", "prefill", "step", "collect", "collect"]
    assert log.count("step") == len(tokens_of("Fine."))  # none for nothing


def test_no_step_is_enqueued_beyond_a_known_end() -> None:
    llm, backend = engine(tokens_of("a"))
    scheduler = llm.scheduler(max_sequences=2)
    scheduler.add([5], max_new_tokens=4)
    scheduler.add([5] * 46)
    reasons = {update.request: update.completion.finish_reason for update in run(scheduler) if update.completion}
    assert reasons == {0: "length", 1: "context"}
    assert backend.batches[0].log.count("step") == 3


def test_long_prompts_are_computed_in_pieces_while_others_go_on() -> None:
    llm, backend = engine(tokens_of("a"), context=1000)
    scheduler = llm.scheduler(max_sequences=2, prefill_chunk=100)
    scheduler.add([5], max_new_tokens=50)
    for _ in range(3):
        scheduler.step()
    long = scheduler.add(list(range(730)), max_new_tokens=1)
    rounds = []
    while scheduler.running + scheduler.waiting == 2:
        rounds.append([update.request for update in scheduler.step()])
    assert backend.batches[0].prefilled[1:] == [100] * 7 + [30]
    assert rounds == [[0]] * 8 + [[long, 0]] or rounds == [[0]] * 8 + [[0, long]]


def test_preparing_is_done_in_pieces() -> None:
    llm, backend = engine()
    backend.to_prepare = 3
    scheduler = llm.scheduler(max_sequences=2)
    assert [scheduler.prepare() for _ in range(5)] == [True] * 3 + [False] * 2
    backend.to_prepare = 3
    other = llm.scheduler(max_sequences=2)
    other.close()
    assert not other.prepare()


def test_what_cannot_be_prepared_does_not_end_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(self: ToyBatch) -> bool:
        raise BackendError("out of memory")

    monkeypatch.setattr(ToyBatch, "prepare", prepare)
    scheduler = engine()[0].scheduler(max_sequences=2)
    assert not scheduler.prepare() and not scheduler.closed
    assert scheduler.add([5], max_new_tokens=1) in [update.request for _ in range(3) for update in scheduler.step()]


def test_many_short_prompts_share_a_round() -> None:
    llm, backend = engine(tokens_of("a"))
    scheduler = llm.scheduler(max_sequences=20, prefill_chunk=100)
    for i in range(20):
        scheduler.add([i] * 10, max_new_tokens=5)
    scheduler.step()
    assert scheduler.running == 10 and sum(backend.batches[0].prefilled) == 100


def test_a_common_beginning_is_computed_once() -> None:
    llm, backend = engine(tokens_of("a"))
    scheduler = llm.scheduler(max_sequences=8)
    for i in range(8):
        scheduler.add([*BEGINNING, i], max_new_tokens=3)
    completions = [update.completion for update in run(scheduler) if update.completion]
    assert [completion.stats.reused_tokens for completion in completions] == [0] + [28] * 7  # whole pages of 4
    assert sum(backend.batches[0].prefilled) == 31 + 7 * 3
    scheduler.add([*BEGINNING, 9], max_new_tokens=3)  # all have ended, but it is still known
    assert run(scheduler)[-1].completion.stats.reused_tokens == 28  # type: ignore[union-attr]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("length", [16, 19, 20, 21])
def test_a_second_turn_finds_all_that_the_first_computed(asynchronous: bool, length: int) -> None:
    llm, backend = engine()
    backend.asynchronous = asynchronous
    scheduler = llm.scheduler(max_sequences=2)
    scheduler.add(BEGINNING[:9], SamplingParams(0.9, seed=1), max_new_tokens=length)
    first = run(scheduler)[-1].completion
    assert first is not None and len(first.token_ids) == length
    turn = [*BEGINNING[:9], *first.token_ids, 7, 8]
    scheduler.add(turn, max_new_tokens=5)
    second = run(scheduler)[-1].completion
    assert second is not None
    assert second.stats.reused_tokens == (9 + length - 1) // 4 * 4  # all full pages of 4; the last token is not fed
    assert same_answer(second, alone(llm, {"prompt": turn, "max_new_tokens": 5}))


def test_tenants_with_different_salts_share_nothing() -> None:
    llm, backend = engine(tokens_of("a"))
    scheduler = llm.scheduler(max_sequences=4)
    reused = {}
    for salt in ("", "x", "y", "x", ""):
        number = scheduler.add(BEGINNING, max_new_tokens=3, cache_salt=salt)
        completion = run(scheduler)[-1].completion
        assert completion is not None
        reused[number] = completion.stats.reused_tokens
    assert list(reused.values()) == [0, 0, 0, 28, 28]


def test_requests_may_come_from_any_thread() -> None:
    llm, _ = engine(tokens_of("abc"))
    scheduler = llm.scheduler(max_sequences=4)
    numbers: list[int] = []

    def ask(first: int) -> None:
        for i in range(25):
            number = scheduler.add([first + i], max_new_tokens=3)
            numbers.append(number)
            if i % 5 == 0:
                scheduler.cancel(number)

    threads = [threading.Thread(target=ask, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    updates = []
    while any(thread.is_alive() for thread in threads):
        updates += scheduler.step()
    updates += run(scheduler)
    ended = [update.request for update in updates if update.completion]
    assert sorted(ended) == sorted(numbers) == list(range(100))


def test_seeds_are_drawn_once_a_request() -> None:
    llm, _ = engine()
    scheduler = llm.scheduler()
    for seed in (None, 5, 5):
        scheduler.add("x", replace(SamplingParams(1.2), seed=seed), max_new_tokens=10)
    texts = {update.request: update.completion.text for update in run(scheduler) if update.completion}
    assert texts[1] == texts[2] != texts[0]


def test_answers_take_turns_in_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that start together too: their texts are not all made, and sent, in one round."""
    now = 5.0
    monkeypatch.setattr("bitnet_numba.engine.scheduler.monotonic", lambda: now)
    llm, _ = engine(tokens_of("once upon a time"))
    scheduler = llm.scheduler(max_sequences=12)
    for first in range(12):
        scheduler.add([100 + first], max_new_tokens=40)
    told: dict[int, list[int]] = {number: [] for number in range(12)}  # rounds in which an answer's text came
    texts, ends = dict.fromkeys(told, ""), dict.fromkeys(told, "")
    for round_ in range(100):
        for update in scheduler.step(coalesce=0.05):
            texts[update.request] += update.text
            if update.completion is None:
                told[update.request].append(round_)
            else:
                ends[update.request] = update.completion.text
        now += 0.01 + 1e-9
        if not scheduler.busy:
            break
    assert texts == ends and all(texts.values())
    for rounds in told.values():
        gaps = np.diff(rounds).tolist()
        assert 0 <= gaps[0] <= 5 and set(gaps[1:]) == {5}, rounds
    last_start = max(rounds[0] for rounds in told.values())
    each_round = np.bincount([r for rounds in told.values() for r in rounds if last_start < r < 35])[last_start + 1 :]
    assert each_round.size >= 20 and each_round.min() >= 1 and each_round.max() <= 4, each_round


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", [1], True, b"1"])
def test_how_long_is_waited_is_a_number(timeout: Any) -> None:
    scheduler = engine()[0].scheduler()
    for _ in range(2):  # idle, and with something to do
        with pytest.raises(RequestError, match="timeout must be a number of seconds, not"):
            scheduler.wait(timeout)
        scheduler.add([5], max_new_tokens=1)
    assert scheduler.wait(10**400) and scheduler.wait(float("inf")) and scheduler.wait(Fraction(1, 2))  # type: ignore[arg-type]
    run(scheduler)
    assert not scheduler.wait(0) and not scheduler.wait(1e-3)


@pytest.mark.parametrize("coalesce", [-1, float("nan"), float("inf"), "1", None, True])
def test_how_long_text_is_kept_is_a_number(coalesce: Any) -> None:
    scheduler = engine()[0].scheduler()
    scheduler.add([5], max_new_tokens=2)
    with pytest.raises(RequestError, match="coalesce must be a number of seconds, not"):
        scheduler.step(coalesce=coalesce)
    assert run(scheduler)[-1].completion is not None  # nothing is lost
