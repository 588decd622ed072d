"""Questions for yes or no: asked with what the story says, or with a wrong value in its place."""

from __future__ import annotations

import re
from random import Random

from tools.demo.world import nouns, words
from tools.demo.world.draw import KNOWN, PLACES
from tools.demo.world.grammar import article, chance, pick
from tools.demo.world.plots import Fact
from tools.demo.world.stories import Story

PAST_TO_BASE = dict(
    pair.split("/")
    for pair in words.items("""found/find, lost/lose, took/take, gave/give, got/get, went/go, brought/bring, heard/hear,
    wished/wish, ate/eat, had/have, learned/learn, tried/try, helped/help, used/use, worked/work, met/meet,
    traded/trade, shared/share, hid/hide, lived/live, cost/cost, saved/save, opened/open, carried/carry, taught/teach,
    won/win,
    wanted/want, broke/break, liked/like, showed/show""")
)
_STATEMENT = re.compile(r"(\{[hfx]\}|They|It|The \{o\}) (\w+)( along)? (.*\{(\w+)\}.*)\.")
_WHO = re.compile(r"\[?Who (\w+) ([^|\[\]]*)\?")
_FIGURES = ("h", "f", "x")


def derive(facts: list[Fact]) -> list[Fact]:
    """Questions for yes or no from the plain ones whose answer is a statement: "They went {p_to}." and the like."""
    derived = []
    for fact in facts:
        if fact.varied is not None:
            continue
        statement = _STATEMENT.fullmatch(fact.answer)
        who = _WHO.match(fact.question)
        if statement and statement[2] in PAST_TO_BASE and not fact.key.startswith("feel"):
            subject, past, along, rest, slot = statement.groups()
            subject = subject[0].lower() + subject[1:] if subject in ("They", "It") else subject
            question = f"Did {subject.replace('The', 'the')} {PAST_TO_BASE[past]}{along or ''} {rest}?"
            derived.append(Fact(f"is_{fact.key}", question, fact.answer, slot))
        elif who and who[1] in PAST_TO_BASE and fact.answer in ("It was {h}.", "It was {f}."):
            subject = fact.answer[7:-1]
            question, answer = f"Did {subject} {PAST_TO_BASE[who[1]]} {who[2]}?", f"{subject} {who[1]} {who[2]}."
            derived.append(Fact(f"is_{fact.key}", question, answer, subject[1]))
    return derived


def _other_thing(rng: Random, text: str, food: bool) -> str:
    while True:
        noun = pick(rng, nouns.FOODS) if food else KNOWN.thing(rng)
        if noun not in text:
            return article(noun)


def wrong_value(rng: Random, slot: str, story: Story) -> str | None:
    """Another value for `slot`, which makes a statement about `story` false; None where there is none."""
    slots, text = story.slots, story.text
    if slot in ("o_a", "g_a"):
        return _other_thing(rng, text, slots[slot[0]] in nouns.FOODS)
    if slot.endswith("_kind_a"):
        kind = KNOWN.kind(rng)
        return article(kind) if kind not in text else None
    if slot in ("p_in", "p_to"):
        place = KNOWN.place(rng)
        return None if place in text else f"to the {place}" if slot == "p_to" else f"{PLACES[place]} the {place}"
    fixed = {
        "o_look": words.COLOURS,
        "feel": words.SAD,
        "moral": list(words.MORALS.values()),
        "weather": [words.OTHER_WEATHER[slots["weather"]]],
        "home": words.HOMES,
        "hobby": words.HOBBIES,
        "favourite": words.COLOURS,
        "age": words.AGES,
        "siblings": words.SIBLINGS,
        "dream": words.DREAMS,
    }
    name, _, second = slot.partition("_")
    options = fixed.get(slot) or story.plot.slots.get(name)
    if options is None:
        return None
    value = pick(rng, options)
    value = (value[1 if second == "2" else 0]) if isinstance(value, tuple) else value
    value = article(value) if second == "a" else value
    return None if value.lower() in text.lower() or "{" in value else value


def swapped(question: str, slot: str, rng: Random, story: Story) -> str:
    """`question` with the figure in `slot` exchanged for another one of the story."""
    other = pick(rng, [f for f in _FIGURES if f != slot and (f != "x" or "x" in story.used)])
    places = {slot: other, other: slot}
    return re.sub(r"\{([hfx])\}", lambda m: "{" + places.get(m[1], m[1]) + "}", question)


def ask(rng: Random, fact: Fact, story: Story) -> tuple[str, dict[str, str], str]:
    """A question template, the slots to expand it with, and the answer's template."""
    slots, slot = story.slots, fact.varied or ""
    if not slot or chance(rng, 0.5):
        return fact.question, slots, f"Yes, {_inside(fact.answer)}"
    question = fact.question
    if slot in _FIGURES:
        question = swapped(question, slot, rng, story)
    else:
        value = wrong_value(rng, slot, story)
        if value is None:
            return fact.question, slots, f"Yes, {_inside(fact.answer)}"
        slots = slots | {slot: value}
        if slot == "weather":
            slots["weather_day"] = article(f"{value} {slots['daytime']}")
    if fact.key.startswith("is_there"):
        return question, slots, f"No, there is no {slots[slot].split(' ', 1)[1]} in the story."
    return question, slots, f"No, {_inside(fact.answer)}"


def _inside(answer: str) -> str:
    """An answer's template as it stands after "Yes, "."""
    first = answer.split()[0]
    return answer[0].lower() + answer[1:] if first in ("They", "It", "The", "Because", "There") else answer
