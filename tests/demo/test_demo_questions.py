"""Questions about a story of the text world: each has one right answer, and it follows from the text."""

from __future__ import annotations

import re
from random import Random

import pytest

from tools.demo.world import questions
from tools.demo.world.draw import THINGS
from tools.demo.world.lexicon import WORDS, words_of
from tools.demo.world.plots import PLOTS
from tools.demo.world.questions import UNKNOWN, Question
from tools.demo.world.stories import Figure, Request, Story, tell

EVERY_PLOT = pytest.mark.parametrize("plot", [plot.name for plot in PLOTS])
# Words that an answer may add to those of the story: the glue of a short sentence.
GLUE = set(
    """it was the a an of and to did not find anything because by in on at had have has been were lived felt liked
    learned they story does say there is nobody called this helped belonged cost for with who worked winner prize
    made out what used his her he she along took talked jokes told asked riddles played counted drew cheer wanted
    share cry heard saw worked hard saved brought home gave back got helping from contest found new know anybody
    others lost way hid storm friends wished traded well again repair lonely opened him them days times went gone
    want met ate yes no hero friend favourite colour years old are two three could yet needed help end happened
    begins looking its mother smile mine at last come true over repaired i don't good shared bring stuck given
    taught about broken first but then says""".split()
)


def stories(plot: str, count: int) -> list[Story]:
    return [tell(Random(f"{plot}{i}"), Request(plot=plot)) for i in range(count)]


def asked(story: Story, seed: int, ways: int) -> list[Question]:
    """Every question of a story, each in so many ways."""
    rng = Random(seed)
    facts = [fact for group in questions.facts_of(story).values() for fact in group]
    return [questions.ask(rng, story, fact) for fact in facts for _ in range(ways)]


def one(story: Story, key: str, seed: int = 0) -> Question:
    fact = next(f for group in questions.facts_of(story).values() for f in group if f.key == key)
    return questions.ask(Random(seed), story, fact)


@EVERY_PLOT
def test_answers_follow_from_the_story(plot: str) -> None:
    for i, story in enumerate(stories(plot, 12)):
        heard = words_of(story.text)
        for question in asked(story, i, 1):
            assert not re.search(r"[\[\]{}|]|  ", question.text + question.answer), question
            assert question.kind in questions.KINDS
            if question.key in ("next", "longer"):
                assert words_of(question.answer) <= WORDS and re.fullmatch(question.pattern, question.answer)
                continue
            told = words_of(question.answer)
            if question.answer.startswith("No, there is no"):
                told -= words_of(question.text)
            assert not told - heard - GLUE, f"{told - heard - GLUE} of {question} not in: {story.text}"


@EVERY_PLOT
def test_a_question_has_one_answer(plot: str) -> None:
    for i, story in enumerate(stories(plot, 6)):
        answers: dict[str, str] = {}
        keys = [fact.key for group in questions.facts_of(story).values() for fact in group]
        assert len(set(keys)) == len(keys)
        for question in asked(story, i, 10):
            assert answers.setdefault(question.text, question.answer) == question.answer, (question, story.text)


@EVERY_PLOT
def test_every_story_answers_the_common_questions(plot: str) -> None:
    for story in stories(plot, 5):
        facts = questions.facts_of(story)
        assert {"names", "yes or no", "number", "reason", "who", "where", "when", "what", "not said"} <= set(facts)
        assert set(questions.RETELLING) <= set(facts)


@EVERY_PLOT
def test_yes_is_true_and_no_is_false(plot: str) -> None:
    """The answer to a question for yes or no ends in what the story says, and "yes" says what was asked."""
    for i, story in enumerate(stories(plot, 6)):
        for question in asked(story, i, 4):
            if question.kind == "yes or no" and question.key.startswith(("is_there", "is_kind", "is_colour")):
                yes = question.answer.startswith("Yes")
                asked_for = re.search(r"(?:there|[Ww]as .*|[Ii]s .*) (an? .*?)(?: in .*)?\?", question.text)
                noun = asked_for[1].split(" ", 1)[1] if asked_for else question.text.rstrip("?").split()[-1]
                assert yes == (noun in story.text), (question, story.text)


def test_what_is_not_said_is_not_known() -> None:
    seen = set()
    for seed in range(60):
        story = tell(Random(seed), Request())
        said = re.search(r"was (\w+|a hundred) years old", story.text)
        question = one(story, "age")
        seen.add(bool(said))
        assert (question.answer == UNKNOWN) == (said is None)
        assert said is None or f" {said[1]} years old" in question.answer
        assert one(story, "unsaid", seed).answer == UNKNOWN
    assert seen == {True, False}


def test_who_is_with_the_hero() -> None:
    old = tell(Random(1), Request(hero=Figure("fox", "Ada"), friend=Figure("owl", "Pip"), plot="lost"))
    assert one(old, "alone").answer == "No, Pip was with Ada." and one(old, "with").answer == "Pip was with Ada."
    met = tell(Random(1), Request(hero=Figure("fox", "Ada"), friend=Figure("owl", "Pip"), plot="found"))
    assert (
        one(met, "alone_met").answer == "At first, but then Ada met Pip."
        and one(met, "with_met").answer == "Ada met Pip."
    )
    for story, other in ((old, "alone_met"), (met, "alone")):
        assert other not in {fact.key for group in questions.facts_of(story).values() for fact in group}
        assert one(story, "of_friend_f").answer == "Pip's friend was Ada."
        ways = {one(story, "has_friend", seed).text for seed in range(200)}
        assert {"Did Ada have a friend?", "Did the fox have a friend?"} <= ways
        assert {one(story, "has_friend", seed).answer for seed in range(200)} == {"Yes, Ada's friend was Pip."}


def test_he_or_she_is_what_the_story_says() -> None:
    answers = set()
    for seed in range(60):
        story = tell(Random(seed), Request(hero=Figure("fox", "Zorb"), friend=Figure("owl", "Plinth")))
        for key, name in (("sex_h", "Zorb"), ("sex_f", "Plinth")):
            question = one(story, key, seed)
            said = story.slots["he" if key == "sex_h" else "fhe"]
            assert question.answer in (UNKNOWN, f'The story says "{said}" of {name}.')
            assert not re.search(r"\b(he|she|him|her)\b", re.sub("a he or a she", "", question.text)), question
            answers.add(question.answer == UNKNOWN)
            if question.answer != UNKNOWN:
                assert re.search(rf"\b({said}|{'her' if said == 'she' else 'him|his'})\b", story.text, re.IGNORECASE)
    assert answers == {True, False}


def test_whether_there_are_siblings() -> None:
    answers = set()
    for seed in range(60):
        story = tell(Random(seed), Request())
        question = one(story, "any_siblings", seed)
        known = "siblings" in story.used
        assert question.answer == (f"Yes, {story.slots['h']} had {story.slots['siblings']}." if known else UNKNOWN)
        answers.add(known)
    assert answers == {True, False}


def test_a_bare_why_asks_for_the_reason_of_the_last_answer() -> None:
    story = tell(Random(1), Request(hero=Figure("fox", "Ada"), thing="kite", plot="lost"))
    assert questions.reason(Random(1), story, "feel").answer == "Because the kite was gone."
    assert questions.reason(Random(1), story, "go").answer == UNKNOWN


def test_nobody_knows_a_stranger() -> None:
    asked = set()
    for seed in range(200):
        story = tell(Random(seed), Request())
        question = questions.ask_for_stranger(Random(seed), story, "Xanthippe")
        assert "Xanthippe" in question.text and question.answer == "There is nobody called Xanthippe in this story."
        # Whether the hero is Xanthippe can be answered: no, it is somebody else.
        assert not re.match("(Was|Is) (it|the .*called|Xanthippe the (hero|main|friend))", question.text)
        asked.add(question.text.split()[0])
    assert {"What", "Who", "Was", "Did"} <= asked


def test_a_story_told_again_shorter_longer_and_in_a_sentence() -> None:
    story = tell(Random(3), Request(hero=Figure("fox", "Ada"), thing="kite", plot="found"))
    assert one(story, "again").answer == story.text
    assert one(story, "sentence").answer == f"Ada found {story.slots['o_a']} and gave it back to {story.slots['f']}."
    shorter, longer = one(story, "shorter").answer, one(story, "longer").answer
    assert one(story, "sentence").answer in shorter and len(shorter) < len(story.text) / 2
    assert longer.startswith(story.text + "\n") and story.longer().text == longer
    assert longer == f"{story.text}\n{one(story, 'next').answer}"


def test_the_same_facts_for_unknown_words() -> None:
    request = Request(hero=Figure("zorbel", "Quix"), thing="plinth")
    assert "plinth" not in THINGS
    story = tell(Random(5), request)
    assert one(story, "name_hero").answer == "The hero was called Quix."
    assert one(story, "is_there_o", 1).answer.startswith(("Yes, there is a plinth", "No, there is no"))
