"""Sequences take pages as they need them, and lose them to those before them: their answers stay what they were."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.engine.batch_runner import BatchRunner
from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.scheduler import Scheduler
from bitnet_numba.engine.sequence import Sequence
from bitnet_numba.sampling import SamplingParams
from tests.engine.toy_backend import ToyBackend, tokens_of, toy_engine
from tests.strategies import sampling

CONTEXT = 48


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of the sequences that are preempted, in order."""
    return watch(monkeypatch)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    ids: list[int] = []
    make_room = BatchRunner.make_room

    def noting(runner: BatchRunner) -> list[Sequence]:
        gone = make_room(runner)
        ids.extend(s.id for s in gone)
        return gone

    monkeypatch.setattr(BatchRunner, "make_room", noting)
    return ids


def answers(scheduler: Scheduler) -> dict[int, Completion]:
    found: dict[int, Completion] = {}
    texts: dict[int, str] = {}
    steps = 0
    while scheduler.busy:
        for update in scheduler.step():
            texts[update.request] = texts.get(update.request, "") + update.text
            assert update.error is None
            if update.completion:
                found[update.request] = update.completion
        steps += 1
        assert steps < 5000, "nothing comes to an end"
    assert {number: completion.text for number, completion in found.items()} == texts
    return found


def check(llm: Engine, backend: ToyBackend, scheduler: Scheduler, asked: list[dict[str, Any]]) -> None:
    """Everyone gets the answer that it would get alone, and all pages and slots are free again."""
    for number, completion in answers(scheduler).items():
        want = llm.generate(**asked[number])
        assert (completion.text, completion.token_ids, completion.finish_reason) == (
            want.text, want.token_ids, want.finish_reason,
        )  # fmt: skip
        assert completion.stats.generated_tokens == want.stats.generated_tokens
        assert (completion.logprobs, completion.prompt_logprobs) == (want.logprobs, want.prompt_logprobs)
    batch, runner = backend.batches[0], scheduler._runner
    assert (scheduler.running, scheduler.waiting) == (0, 0)
    assert runner.pool.free == batch.num_pages and runner.free_slots == batch.max_sequences


prompts = st.builds(
    lambda shared, own: list(range(100, 100 + shared)) + own,
    st.integers(0, 20),
    st.lists(st.integers(0, 1989), min_size=1, max_size=9),
)


all_params = st.builds(
    dataclasses.replace,
    sampling,
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    min_tokens=st.integers(0, 1),
    logprobs=st.sampled_from([None, None, 2]),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
)


@pytest.mark.parametrize("uniform", [True, False])
@settings(max_examples=25)
@given(
    asked=st.lists(
        st.fixed_dictionaries({"prompt": prompts, "params": all_params, "max_new_tokens": st.integers(1, 40)}),
        min_size=2,
        max_size=8,
    ),
    pages=st.integers(12, 20),
    chunk=st.sampled_from([4, 100]),
    priorities=st.lists(st.integers(0, 2), min_size=8, max_size=8),
)
def test_answers_do_not_depend_on_preemptions(
    uniform: bool, asked: list[dict[str, Any]], pages: int, chunk: int, priorities: list[int]
) -> None:
    llm, backend = toy_engine(context=CONTEXT)
    backend.uniform = uniform
    scheduler = llm.scheduler(8, 4 * pages, chunk)
    for request, priority in zip(asked, priorities, strict=False):
        scheduler.add(**request, priority=priority)
    check(llm, backend, scheduler, asked)


@pytest.mark.parametrize("uniform", [True, False])
def test_the_last_to_come_gives_way(uniform: bool, preempted: list[int]) -> None:
    llm, backend = toy_engine(context=CONTEXT)
    backend.uniform = uniform
    scheduler = llm.scheduler(4, 48)
    params = SamplingParams(0.9, seed=3)
    asked = [{"prompt": [i] * 5, "params": params, "max_new_tokens": 36} for i in range(4)]
    for request in asked:
        scheduler.add(**request)
    check(llm, backend, scheduler, asked)
    assert preempted[:3] == [3, 2, 1] and 0 not in preempted


def test_priority_says_who_is_last(preempted: list[int]) -> None:
    llm, backend = toy_engine(context=CONTEXT)
    scheduler = llm.scheduler(4, 48)
    asked = [{"prompt": [i] * 5, "max_new_tokens": 36} for i in range(4)]
    for request, priority in zip(asked, (2, 0, 1, -1), strict=True):
        scheduler.add(**request, priority=priority)
    check(llm, backend, scheduler, asked)
    assert preempted[:3] == [0, 2, 1] and 3 not in preempted


def test_pages_are_taken_when_they_are_needed(preempted: list[int]) -> None:
    """Requests that may have long answers run together, and none loses anything when the answers are short."""
    llm, backend = toy_engine([*tokens_of("Fine."), 1999], context=CONTEXT)
    scheduler = llm.scheduler(8, 64)  # 16 pages; reserved for the longest answers, one sequence would take 12
    for i in range(6):
        scheduler.add([i], max_new_tokens=None)
    scheduler.step()
    assert scheduler.running == 6
    assert {completion.text for completion in answers(scheduler).values()} == {"Fine."} and preempted == []


@pytest.mark.parametrize("uniform", [True, False])
def test_pages_that_are_still_there_are_not_computed_again(uniform: bool, preempted: list[int]) -> None:
    llm, backend = toy_engine(context=CONTEXT)
    backend.uniform = uniform
    scheduler = llm.scheduler(2, 44)
    asked = [{"prompt": [i] * 9, "max_new_tokens": n} for i, n in enumerate((15, 30))]
    for request in asked:
        scheduler.add(**request)
    check(llm, backend, scheduler, asked)
    assert preempted == [1]
    batch = backend.batches[0]
    # What the first one did not need was kept: the rest of a page, or nothing but steps.
    assert batch.prefilled == [9, 9, *batch.prefilled[2:]] and sum(batch.prefilled[2:]) < 20
    assert len(batch.started) == 3 and len(batch.started[2]) > 9


def test_a_request_that_is_preempted_can_be_cancelled(preempted: list[int]) -> None:
    llm, backend = toy_engine(tokens_of("abc"), context=CONTEXT)
    scheduler = llm.scheduler(2, 48)
    for i in range(2):
        scheduler.add([i] * 5, max_new_tokens=40)
    while not preempted:
        scheduler.step()
    scheduler.cancel(1)
    (update,) = [update for update in scheduler.step() if update.request == 1]
    assert update.completion is not None and update.completion.finish_reason == "interrupted"
    assert len(update.completion.token_ids) > 10 and scheduler.waiting == 0
    while scheduler.busy:
        ended = scheduler.step()
    assert [(update.request, update.completion is not None) for update in ended] == [(0, True)]
    assert scheduler._runner.pool.free == backend.batches[0].num_pages


def test_a_shared_answer_computed_anew_is_continued(preempted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps round differently, a prompt may share an answer's pages, lose them, and have them computed as a
    prompt: what was told of its own answer stays."""
    llm, backend = toy_engine(context=CONTEXT)
    backend.uniform = False
    scheduler = llm.scheduler(2, 48)
    scheduler.add([5], max_new_tokens=16)
    first = answers(scheduler)[0].token_ids
    continued: list[Sequence] = []
    continue_as_prompt = Scheduler._continue_as_prompt
    monkeypatch.setattr(
        Scheduler, "_continue_as_prompt", lambda self, s: continued.append(s) or continue_as_prompt(self, s)
    )
    scheduler.add([8], max_new_tokens=40, priority=-1)
    scheduler.add([5, *first], max_new_tokens=30)
    done = answers(scheduler)
    assert preempted == [2] and done[2].stats.reused_tokens == 16 and [s.id for s in continued] == [2]
    assert done[1].token_ids == llm.generate([8], max_new_tokens=40).token_ids
    assert len(done[2].token_ids) == 30
    assert scheduler._runner.pool.free == backend.batches[0].num_pages
