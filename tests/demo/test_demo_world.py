"""The text world: the same seed gives the same text, stories are grammatical, and answers follow from them."""

from __future__ import annotations

import itertools
import re
from random import Random

import pytest

from tools.demo.world import nouns, words
from tools.demo.world.conversation import QUESTION, STORY, Conversation, conversation
from tools.demo.world.draw import (
    FEMALE_NAMES,
    MALE_NAMES,
    NEVER_SEEN,
    NOUNS,
    SPELT_NAMES,
    UNSEEN,
    coin_name,
    coin_noun,
    coin_word,
    is_female,
)
from tools.demo.world.grammar import article, capitalise, expand, parse, pattern, plural
from tools.demo.world.lexicon import WORDS, invented, like_a_slip, words_of
from tools.demo.world.plots import PLOTS
from tools.demo.world.requests import draw_request, phrase
from tools.demo.world.stories import Figure, Request, Story, held_out, tell
from tools.demo.world.talk import outside, small_talk

STORIES_PER_PLOT = 30


def stories(plot: str, count: int = STORIES_PER_PLOT) -> list[Story]:
    return [tell(Random(f"{plot}{i}"), Request(plot=plot)) for i in range(count)]


def test_templates_reject_unbalanced_brackets() -> None:
    for bad in ("[a|b", "a]", "{name", "[a|[b]"):
        with pytest.raises(ValueError, match="unbalanced"):
            parse(bad)


def test_expansions_are_those_of_the_template() -> None:
    seen = {expand("[a|b[c|]] {x}", Random(i), {"x": "[1|2]"}) for i in range(200)}
    assert seen == {f"{left} {right}" for left in ("a", "bc", "b") for right in "12"}


def test_articles_and_capitals() -> None:
    assert [article(n) for n in ("owl", "fox", "hourglass", "unicorn", "umbrella", "honest fox", "old unicorn")] == [
        "an owl", "a fox", "an hourglass", "a unicorn", "an umbrella", "an honest fox", "an old unicorn"
    ]  # fmt: skip
    assert (
        capitalise('the owl. "is it?" asked the fox.\n"yes," it said')
        == 'The owl. "Is it?" asked the fox.\n"Yes," it said'
    )


def test_the_world_is_rich() -> None:
    assert len(nouns.ANIMALS) > 250 and len(nouns.PLACES) > 100 and len(NOUNS) > 850
    for ordinary in (
        "dog",
        "T-rex",
        "toy car",
        "fire engine",
        "hot air balloon",
        "pizza",
        "playground",
        "train station",
    ):
        assert ordinary in NOUNS
    assert len(set(words.FEMALE_NAMES) | set(words.MALE_NAMES)) > 150
    assert not set(words.FEMALE_NAMES) & set(words.MALE_NAMES)
    assert len(PLOTS) >= 8
    assert len({plot.name for plot in PLOTS}) == len(PLOTS)


@pytest.mark.parametrize("plot", [plot.name for plot in PLOTS])
def test_stories_are_grammatical(plot: str) -> None:
    for story in stories(plot):
        text = story.text
        assert not re.search(r"[\[\]{}|]|  | [.,!?]|\.\.|,\.", text), text
        for a, following in re.findall(r"\b([Aa]n?) (\w+)", text):
            assert article(following) == f"{a.lower()} {following}", f"{a} {following} in: {text}"
        assert text.count('"') % 2 == 0, text
        assert not re.search(r"\b(\w+) \1\b", re.sub("pulled and pulled|again and again", "", text)), text
        for sentence in re.split(r"(?<=[.!?]) |\n", text):
            assert re.match(r'"?[A-Z]', sentence) or re.match(r'.*[!?]" *$', text[: text.index(sentence)][-3:]), (
                sentence,
                text,
            )
        assert text.endswith((".", "!")), text
        assert 60 <= len(text.split()) <= 260, text
        assert not invented(text), text


def test_requests_are_honoured() -> None:
    for seed in range(600):
        rng = Random(seed)
        request = draw_request(rng, set(), evaluation=seed % 2 == 0)
        story = tell(rng, request, evaluation=seed % 2 == 0)
        asked = phrase(rng, request)
        for word in request.mentions():
            assert word in story.text, (word, asked, story.text)
        for noun in [request.hero.kind, request.friend.kind, request.third.kind, request.thing, request.gift]:
            assert noun.lower() in asked.lower() or plural(noun).lower() in asked.lower(), (noun, asked)
        for word in (request.place, request.theme, request.hero.name):
            assert word in asked, (word, asked)
        assert not request.long or len(story.text.split("\n")) > 3


def test_unknown_things_are_taken_as_they_come() -> None:
    story = tell(Random(3), Request(hero=Figure(kind="zorbel"), thing="quixatron"))
    assert "zorbel" in story.text and "quixatron" in story.text


def test_plurals() -> None:
    assert [plural(n) for n in ("dog", "fox", "mouse", "fairy", "monkey", "snowman", "sheep", "wolf", "finch")] == [
        "dogs", "foxes", "mice", "fairies", "monkeys", "snowmen", "sheep", "wolves", "finches"
    ]  # fmt: skip


def test_patterns_match_every_expansion() -> None:
    template, slots = "[Hi|Hello[| there]], {who}! {free}", {"who": "[Ann|Bo]", "free": "x"}
    matching = re.compile(pattern(template, slots, free={"free"}))
    for seed in range(50):
        assert matching.fullmatch(expand(template, Random(seed), slots))
    assert not matching.fullmatch("Hi, Cleo! x") and matching.fullmatch("Hi, Bo! anything")


def test_coined_words_are_new() -> None:
    coined = [coin_word(Random(seed)) for seed in range(500)]
    assert len(set(coined)) > 450
    assert not set(coined) & (NOUNS | UNSEEN)


def test_coined_nouns_have_one_word_or_two_of_which_some_are_known() -> None:
    coined = [coin_noun(Random(seed)) for seed in range(500)]
    pairs = [noun.split() for noun in coined if " " in noun]
    assert not set(coined) & (NOUNS | UNSEEN)
    assert 100 < len(pairs) < 200 and all(len(pair) == 2 for pair in pairs)
    for place in (0, 1):
        assert 0.2 < sum(pair[place] in NOUNS for pair in pairs) / len(pairs) < 0.6


def test_some_coined_words_have_accents_and_all_can_be_read_from_capitals() -> None:
    rng = Random(2)
    coined = [coin_word(rng) for _ in range(1000)]
    assert 0.05 < sum(not word.isascii() for word in coined) / len(coined) < 0.15
    names = [coin_name(rng) for _ in range(1000)]
    assert all(text.upper().lower() == text.lower() for text in coined + names)
    assert not any(like_a_slip(word) for word in coined if word.isascii())


def test_coined_names_are_common_ones_new_ones_and_double_ones() -> None:
    rng = Random(3)
    names = [coin_name(rng) for _ in range(1000)]
    assert 0.3 < sum(name in SPELT_NAMES for name in names) / len(names) < 0.5
    assert 50 < sum("-" in name or " " in name for name in names) < 200
    assert 10 < sum(not re.search("[A-Za-z]", name) for name in names) < 100


def test_names_to_spell_are_nowhere_else() -> None:
    assert len(set(SPELT_NAMES)) == len(SPELT_NAMES) > 300
    lower = {name.lower() for name in SPELT_NAMES}
    assert not lower & (WORDS | UNSEEN) and not set(SPELT_NAMES) & set(words.FEMALE_NAMES + words.MALE_NAMES)
    assert not FEMALE_NAMES & MALE_NAMES


@pytest.mark.parametrize("ends_like_a_girls_name", [True, False])
def test_the_letters_of_a_coined_name_do_not_tell_she_or_he(ends_like_a_girls_name: bool) -> None:
    rng = Random(4)
    coined = {name for name in (coin_name(rng) for _ in range(6000)) if name not in SPELT_NAMES}
    told = [is_female(name, "fox") for name in coined if name.endswith(("a", "e", "i")) == ends_like_a_girls_name]
    assert len(told) > 400 and 0.4 < sum(told) / len(told) < 0.6
    assert is_female("Blorba", "king") is False and is_female("Blorb", "queen") is True


def test_a_word_with_another_letter_is_invented() -> None:
    assert words_of("Zoë's kite") == {"zoë", "kite"}
    assert invented("A fox called Zo.", "a fox called Zoë") == {"zo"}
    assert invented("A fox called Łukasz.", "A FOX CALLED ŁUKASZ") == set()
    assert article("éclair") == "an éclair" and capitalise("łukasz ran. étienne ran.") == "Łukasz ran. Étienne ran."


def test_training_knows_no_unseen_word() -> None:
    assert not WORDS & {word for word in UNSEEN if " " not in word}
    for seed in range(150):
        for turn in itertools.islice(conversation(Random(seed)), 12):
            assert not words_of(f"{turn.user} {turn.assistant}") & UNSEEN, turn


def test_a_story_of_unseen_words() -> None:
    story = tell(Random(1), draw_request(Random(1), set(), True, NEVER_SEEN), evaluation=True, pool=NEVER_SEEN)
    assert story.slots["o"] in UNSEEN and story.slots["h"].lower() in UNSEEN
    turns = list(itertools.islice(conversation(Random(2), evaluation=True, unseen=NEVER_SEEN), 3))
    assert not turns[0].learned and invented(turns[0].assistant)


def test_held_out_pairs_stay_out_of_training() -> None:
    kept = 0
    for seed in range(600):
        evaluation = seed % 3 == 0
        rng = Random(seed)
        request = draw_request(rng, set(), evaluation)
        story = tell(rng, request, evaluation=evaluation)
        assert held_out(story.slots["h_kind"], story.slots["o"]) == evaluation, (request, story.text)
        kept += evaluation
    assert kept == 200


def test_names_are_not_used_twice_in_a_conversation() -> None:
    for seed in range(30):
        names: set[str] = set()
        for _ in range(8):
            before = len(names)
            story = tell(Random(f"{seed}/{len(names)}"), Request(), names)
            assert len(names) == before + 3
            assert {story.slots["h"], story.slots["f"], story.slots["x"]} <= names


def test_conversations_depend_on_the_seed_alone() -> None:
    def turns(seed: int) -> list:
        return list(itertools.islice(conversation(Random(seed)), 40))

    assert turns(5) == turns(5)
    assert turns(5) != turns(6)


def test_a_question_comes_after_a_story() -> None:
    for seed in range(200):
        told = False
        for turn in itertools.islice(conversation(Random(seed)), 15):
            assert turn.user.strip() == turn.user != "" and turn.assistant.strip() == turn.assistant != ""
            assert "<|" not in turn.user + turn.assistant
            told |= turn.kind == STORY
            assert turn.kind != QUESTION or told or turn.key == "early"


def test_an_accepted_offer_is_kept() -> None:
    kinds = set()
    for seed in range(60):
        talked = Conversation(Random(seed), evaluation=False)
        (turn,) = talked.answer_to_an_offer("I like all animals! Shall I tell you a story about an owl?")
        kinds.add(turn.kind)
        assert "owl" in turn.assistant if turn.kind == STORY else turn.assistant.startswith("All right!")
    assert len(kinds) == 2


def test_evaluation_asks_two_questions_per_story() -> None:
    for seed in range(50):
        turns = list(itertools.islice(conversation(Random(seed), evaluation=True), 30))
        asked = [
            sum(turn.kind == QUESTION for turn in group)
            for first, group in itertools.groupby(turns, lambda t: t.kind == STORY)
            if not first
        ]
        assert turns[0].kind == STORY and all(2 <= number <= 4 for number in asked[:-1])


def test_small_talk_and_outside_requests_are_answered() -> None:
    for seed in range(800):
        exchange = small_talk(Random(seed))
        assert exchange.said and re.fullmatch(exchange.pattern, exchange.reply)
        assert not re.search(r"[\[\]{}|]|  ", exchange.reply)
        exchange = outside(Random(seed))
        assert exchange.said == exchange.said.strip() and re.fullmatch(exchange.pattern, exchange.reply)
        assert "stories" in exchange.reply and "Tell me a story about" in exchange.reply
