"""The cases by which the model is judged: every group, held-out pairs and unseen words, each right by itself."""

from __future__ import annotations

import pytest

from tools.demo.cases import GROUPS, exact_shares, invented_words, lacking, question_cases, request_cases
from tools.demo.evaluate import THRESHOLDS, below, messages
from tools.demo.world.draw import UNSEEN
from tools.demo.world.keyboard import FORMS
from tools.demo.world.lexicon import words_of

SEED = 1 << 42


@pytest.mark.parametrize("group", GROUPS)
def test_the_right_reply_is_right_and_another_is_not(group: str) -> None:
    cases = question_cases(6, SEED, (group,))
    assert len(cases) == 6 and {case.group for case in cases} == {group}
    for case in cases:
        assert case.turn.right(case.turn.assistant), case
        assert not case.turn.right("A cow.")
    assert exact_shares([(case, case.turn.assistant) for case in cases]) == {group: 1.0}
    assert exact_shares([(case, "A cow.") for case in cases]) == {group: 0.0}


def test_half_of_the_cases_have_unseen_words() -> None:
    cases = question_cases(10, SEED, ("names",))
    unseen = [case for case in cases if not case.before[0].learned]
    assert len(unseen) == 5
    assert all(any(word in case.before[0].assistant.lower() for word in UNSEEN) for case in unseen)


def test_accents() -> None:
    for case in question_cases(10, SEED, ("accents",)):
        assert not case.before[0].learned
        assert any(word in UNSEEN and not word.isascii() for word in words_of(case.before[0].assistant)), case


def test_cases_depend_on_the_seed_alone() -> None:
    assert question_cases(3, SEED) == question_cases(3, SEED)
    assert question_cases(3, SEED) != question_cases(3, SEED + 1)


def test_requests_in_every_form() -> None:
    cases = request_cases(24, SEED)
    assert len(cases) == 26 and {case.group for case in cases} == {*FORMS, "accents"}
    for case in cases:
        assert lacking(case, case.turn.assistant) == [] and lacking(case, "A cow.") == list(case.turn.mentions)
        assert messages(case) == [{"role": "user", "content": case.turn.user}]
        if case.turn.learned:
            assert not invented_words(case, case.turn.assistant)
            assert invented_words(case, case.turn.assistant + " Flurbish!") == {"flurbish"}


def test_what_misses_its_threshold_is_named() -> None:
    good = {"exact": {"names": 1.0}, "honoured": {"plain": 1.0}, "distinct": 1.0, "inventing": 0}
    assert below(good) == []
    assert below(good | {"exact": {"names": THRESHOLDS["exact"] - 0.01}, "inventing": 1}) == ["names", "invented words"]
