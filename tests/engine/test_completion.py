"""Completions: an answer that nobody follows is the one that is followed."""

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_numba.engine.completion import KEPT_BACK, Completion, CompletionBuilder, Stats
from bitnet_numba.logprobs import LogprobList
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams
from tests.engine.toy_backend import TOKENIZER, VOCAB

# Whole words, parts of characters, characters of several bytes, special tokens, ids without a token.
TOKENS = st.integers(0, VOCAB + 2) | st.sampled_from(
    [*TOKENIZER.encode_plain("aé€😀 the\ufffd"), *sorted(TOKENIZER.special_ids)]
)
STOPS = st.lists(st.text(st.sampled_from("ate hé€😀\ufffd"), min_size=1, max_size=3), max_size=3)


def build(
    tokens: list[int], params: SamplingParams, quietly: bool, finish: bool, turn: int = 0, plain: bool = False
) -> tuple[Any, list[Any]]:
    """The completion of these tokens, but for its times, and what was released of them. plain: those that nobody has to
    look at are pushed together."""
    request: Any = SimpleNamespace(params=params, stop=params.stop, dropped_messages=0)
    builder = CompletionBuilder(TOKENIZER, request, turn)
    released: list[Any] = []
    kept: list[int] = []
    num_plain = 0
    for i, token in enumerate(tokens):
        if len(kept) < num_plain and builder.is_plain(token):
            kept.append(token)
            continue
        builder.push_plain(kept, 1.0)
        kept = []
        told = [None, TokenLogprob(token, -float(i), [])]
        if quietly:
            builder.push_quietly(token, told, 1)
        else:
            builder.push(token, told, 1)
            released += builder.released()[1]
        if builder.reason:
            break
        num_plain = builder.num_plain if plain else 0
    builder.push_plain(kept, 1.0)
    if finish or builder.reason:
        builder.reason = builder.reason or "context"
        builder.finish()
        released += builder.released()[1]
    completion = builder.completion(3, 0, {})
    return replace(completion, stats=replace(completion.stats, prefill_seconds=0, decode_seconds=0)), released


@settings(max_examples=400)
@given(
    tokens=st.lists(TOKENS, max_size=40),
    stop=STOPS,
    min_tokens=st.sampled_from([0, 0, 7]),
    ends=st.lists(TOKENS, max_size=2),
    logprobs=st.sampled_from([None, 0]),
    finish=st.booleans(),
    turn=st.integers(0, 50),
)
@example(
    tokens=TOKENIZER.encode_plain("é")[:1] * 3, stop=["\ufffd"], min_tokens=0, ends=[], logprobs=0, finish=True, turn=0
)
def test_quietly_is_the_same(
    tokens: list[int], stop: list[str], min_tokens: int, ends: list[int], logprobs: int | None, finish: bool, turn: int
) -> None:
    params = SamplingParams(stop=stop, min_tokens=min_tokens, stop_token_ids=ends, logprobs=logprobs, max_new_tokens=33)
    followed, released = build(tokens, params, False, finish)
    quiet, _ = build(tokens, params, True, finish, turn)
    assert quiet == followed
    for quietly in (True, False):
        together, _ = build(tokens, params, quietly, finish, turn, plain=True)
        assert together == followed
    assert (quiet.logprobs is None) == (logprobs is None)
    if quiet.logprobs is not None:
        assert isinstance(quiet.logprobs, list) and [each.token_id for each in quiet.logprobs] == quiet.token_ids
        if finish or followed.finish_reason != "interrupted":
            assert released == quiet.logprobs


def test_log_probabilities_are_read_when_they_are_asked_for() -> None:
    class Unread(list[TokenLogprob | None]):
        def __getitem__(self, index: Any) -> Any:
            reads.append(index)
            return super().__getitem__(index)

    reads: list[int] = []
    told = LogprobList([Unread([TokenLogprob(5, -1.0, [])])], [0])
    completion = Completion("a", [5], "stop", Stats(1, 0, 1, 0.0, 0.0, {}), told)
    assert repr(completion) and reads == []
    assert completion.logprobs == [TokenLogprob(5, -1.0, [])] and completion.logprobs is completion.logprobs
    assert reads == [0]
    assert completion.to_dict()["logprobs"] == [{"token_id": 5, "logprob": -1.0, "top": []}]
    assert replace(completion, text="b").logprobs == completion.logprobs


def test_answers_that_run_together_make_their_quiet_text_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    request: Any = SimpleNamespace(params=SamplingParams(max_new_tokens=200), stop=(), dropped_messages=0)
    builders = [CompletionBuilder(TOKENIZER, request, turn) for turn in range(100, 100 + KEPT_BACK)]
    made: list[CompletionBuilder] = []
    monkeypatch.setattr(CompletionBuilder, "_catch_up", lambda self, count: made.append(self))
    for _ in range(2 * KEPT_BACK):
        before = len(made)
        for builder in builders:
            builder.push_quietly(100)
        assert len(made) == before + 1
    assert all(made.count(builder) == 2 for builder in builders)


@pytest.mark.parametrize("quietly", [True, False])
def test_an_answer_does_not_keep_what_others_of_its_steps_have(quietly: bool) -> None:
    class Step(list[TokenLogprob | None]):  # which can be referred to weakly
        pass

    request: Any = SimpleNamespace(params=SamplingParams(logprobs=0), stop=(), dropped_messages=0)
    builder = CompletionBuilder(TOKENIZER, request)
    steps = []
    for i in range(200):
        step = Step([None, TokenLogprob(i, -1.0, [])])
        steps.append(weakref.ref(step))
        if quietly:
            builder.push_quietly(i, step, 1)
        else:
            builder.push(i, step, 1)
            builder.released()
    del step
    assert sum(each() is not None for each in steps) < KEPT_BACK
    assert builder.completion(1, 0, {}).logprobs == [TokenLogprob(i, -1.0, []) for i in range(200)]


def test_characters_that_are_never_finished_are_looked_at_once() -> None:
    """Each token begins a character, and so ends the one before as U+FFFD."""

    class Ends(list[int | None]):
        def __getitem__(self, index: Any) -> Any:
            looks.append(index)
            return super().__getitem__(index)

    looks: list[int] = []
    request: Any = SimpleNamespace(params=SamplingParams(), stop=(), dropped_messages=0)
    builder = CompletionBuilder(TOKENIZER, request)
    builder._ends = Ends(builder._ends)
    (begins,) = (token for token in range(VOCAB) if TOKENIZER.token_bytes(token) == b"\xe2")
    for _ in range(100):
        builder.push(begins)
        assert builder.released() == ([], ())
    assert len(looks) < 300
    assert builder.push(TOKENIZER.encode_plain("a")[0]) and len(builder.released()[0]) == 101


def test_most_tokens_need_not_be_looked_at() -> None:
    """But for one in each KEPT_BACK, and the last: whatever is told of them is told together."""

    def looked_at(params: SamplingParams, tokens: list[int]) -> list[int]:
        request: Any = SimpleNamespace(params=params, stop=params.stop, dropped_messages=0)
        builder, places, left = CompletionBuilder(TOKENIZER, request), [], 0
        for place, token in enumerate(tokens):
            if left > 0 and builder.is_plain(token):
                left -= 1
                builder.push_plain([token], 0.0)
                continue
            places.append(place)
            builder.push_quietly(token)
            left = builder.num_plain
        return places

    (a,), (x,) = TOKENIZER.encode_plain("a"), TOKENIZER.encode_plain("x")
    assert looked_at(SamplingParams(max_new_tokens=None), [a] * 100) == [0, KEPT_BACK - 1, 2 * KEPT_BACK - 1]
    assert looked_at(SamplingParams(max_new_tokens=60), [a] * 60) == [0, KEPT_BACK - 1, 59]
    assert looked_at(SamplingParams(stop_token_ids=[x], max_new_tokens=None), [a] * 9 + [x]) == [0, 9]
    assert looked_at(SamplingParams(stop="xyz", max_new_tokens=None), [a, a, a, x, a, a, a]) == [0, 3, 4]
    assert looked_at(SamplingParams(logprobs=0, max_new_tokens=None), [a] * 9) == list(range(9))
