"""How many tokens of prompts a round computes, and that they are one call."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitnet_numba.backends.protocol import CallTimes
from bitnet_numba.engine.prompt_budget import STALL, TOO_LONG, PromptBudget
from tests.engine.toy_backend import tokens_of, toy_engine

PAGE, PASS = 64, 3072
SIZES = [64, 128, 256, 480, 1024, 2048, PASS]
H200 = 1.3e-3, 4.9e-6, 2.4e-3  # seconds of any call, of each token, and of a step of 128 answers


def settle(budget: PromptBudget, fixed: float, each: float, step: float, rounds: int = 40) -> list[int]:
    """The tokens of each round while prompts keep coming in, on a device that takes so many seconds."""
    tokens = []
    for _ in range(rounds):
        tokens.append(budget.tokens(answers_run=True))
        budget.note(CallTimes(tokens[-1], fixed + each * tokens[-1], step))
    return tokens


@given(st.floats(0.0, 0.1), st.floats(1e-7, 0.1), st.floats(1e-4, 1.0))
@example(*H200)
@example(0.0, STALL / 480, 0.0)
def test_it_settles_at_as_many_tokens_as_there_is_time_for(fixed: float, each: float, step: float) -> None:
    *_, before, last = settle(PromptBudget(None, PASS, SIZES), fixed, each, step)
    seconds, allowed = fixed + each * last, max(STALL, step)
    assert before == last and last in SIZES
    assert seconds <= TOO_LONG * allowed or last == PAGE
    assert last == PASS or seconds / last * SIZES[SIZES.index(last) + 1] >= allowed


@pytest.mark.parametrize(
    "slower, tokens", [(0.2, 3072), (0.3, 2048), (0.5, 1024), (1.0, 480), (10.0, 256), (1000.0, 256)]
)
def test_slower_devices_compute_fewer_tokens(slower: float, tokens: int) -> None:
    """Beside steps that are as much slower, they need not be few."""
    fixed, each, step = (slower * seconds for seconds in H200)
    assert settle(PromptBudget(None, PASS, SIZES), fixed, each, step)[-1] == tokens


def test_calls_that_say_nothing_of_the_budget_change_nothing() -> None:
    budget = PromptBudget(None, PASS, SIZES)
    budget.note(CallTimes())
    budget.note(CallTimes(PASS, 10.0, 0.0))  # while no answer ran
    budget.note(CallTimes(100, 1e-4, 0.0))  # far fewer tokens than it might have had
    assert budget.tokens(answers_run=True) == 480 and budget.tokens(answers_run=False) == PASS
    for _ in range(9):
        budget.note(CallTimes(480, 1.0, 0.0))  # the same call again and again
    assert budget.tokens(answers_run=True) == 256


def test_a_call_is_noted_once() -> None:
    """However many steps come after it: one that took too long must not count for each of them."""
    budget = PromptBudget(None, PASS, SIZES)
    for step in (2e-3, 3e-3, 4e-3):
        budget.note(CallTimes(200, 1.0, step))
    assert budget.tokens(answers_run=True) == 256


def test_a_number_that_is_asked_for_stays() -> None:
    assert set(settle(PromptBudget(100, PASS, SIZES), 1.0, 1.0, 1.0)) == {100}
    assert PromptBudget(100, PASS, SIZES).tokens(answers_run=False) == 100


def test_where_a_page_is_all_there_is_to_a_call() -> None:
    """As on a CPU."""
    for seconds in (1e-6, 1.0):
        assert set(settle(PromptBudget(None, PAGE, [PAGE]), seconds, 0.0, 0.0)) == {PAGE}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.sampled_from([1, 2, 4]))
def test_a_round_is_one_call_that_is_not_exceeded(lengths: list[int], granularity: int) -> None:
    """Prompts of any length, beside a running answer: what is less than a page stays for the next round."""
    llm, backend = toy_engine(tokens_of("a"), context=256)
    backend.call_tokens, backend.granularity = 64, granularity
    scheduler = llm.scheduler(max_sequences=len(lengths) + 1)
    batch = backend.batches[0]
    calls: list[list[int]] = []
    prefill = batch.prefill

    def note(parts: Sequence[tuple[int, int]]) -> None:
        calls.append([-(-count // granularity) * granularity for _, count in parts])
        prefill(parts)

    batch.prefill = note  # type: ignore[method-assign]
    scheduler.add([5], max_new_tokens=100)
    for _ in range(2):
        scheduler.step()
    for i, length in enumerate(lengths):
        scheduler.add([100 + i] * length, max_new_tokens=1)
    while scheduler.running + scheduler.waiting > 1:
        before = len(calls)
        scheduler.step()
        assert len(calls) <= before + 1
    assert calls[0] == [granularity] and all(sum(call) <= 16 for call in calls)
    assert sum(batch.prefilled) == 1 + sum(lengths)
    full = [sum(call) > 16 - batch.page_size for call in calls[1:]]
    assert all(full[:-1]), "but for the last, no call leaves a page free"


def test_short_prompts_do_not_keep_a_budget_small() -> None:
    """Not even where the smallest part counts as more tokens than it can have."""
    llm, backend = toy_engine(tokens_of("a"), context=256)
    backend.call_tokens, backend.granularity = 128, 32
    scheduler = llm.scheduler(max_sequences=8)
    batch = backend.batches[0]
    took: list[float] = []  # the last: seconds of each call to come
    calls: list[int] = []
    prefill = batch.prefill

    def timed(parts: Sequence[tuple[int, int]]) -> None:
        calls.append(len(parts))
        batch.call_times = CallTimes(sum(-(-count // 32) * 32 for _, count in parts), took[-1], 0.0)
        prefill(parts)

    batch.prefill = timed  # type: ignore[method-assign]
    took.append(1.0)
    scheduler.add([5], max_new_tokens=200)
    for _ in range(2):
        scheduler.step()
    for seconds, expected in ((1.0, 1), (1e-4, 4)):
        took.append(seconds)
        for i in range(40):
            scheduler.add([i] * 5, max_new_tokens=1)
        while scheduler.running + scheduler.waiting > 1:
            scheduler.step()
        assert max(calls[-20:-1]) == expected
        calls.clear()


def test_without_running_answers_a_round_is_as_much_as_one_call_should_have() -> None:
    llm, backend = toy_engine(tokens_of("a"), context=256)
    backend.call_tokens = 64
    scheduler = llm.scheduler(max_sequences=2)
    for i in range(2):
        scheduler.add([i] * 200, max_new_tokens=9)
    for _ in range(6):
        scheduler.step()
    # The fourth round completes the first prompt, whose answer runs from then on.
    assert backend.batches[0].prefilled == [64, 64, 64, 8, 56, 16, 16]
