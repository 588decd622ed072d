"""Questions that can be asked of a story, in many words, each with its one right answer."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from tools.demo.world import polar, words
from tools.demo.world.draw import PEOPLE
from tools.demo.world.grammar import capitalise, chance, expand, pick
from tools.demo.world.plots import COMMON_FACTS, PLOTS, SHARED, Fact, Plot
from tools.demo.world.stories import Story

UNKNOWN = "I don't know, the story does not say."
WHY = "[Why|Why was that|Why is that|But why|And why|Why so|How come|Why did that happen]?"
# Every request to tell a story otherwise is a kind of its own.
LATER = r"[^\n]{40,}"  # matches what happened later, which the model may invent
RETELLING = ("again", "shorter", "longer", "next", "sentence")
KINDS = (
    "names",
    "yes or no",
    "colour",
    "number",
    "wish",
    "reason",
    "who",
    "where",
    "when",
    "what",
    "not said",
    *RETELLING,
    "friends",
)
_NUMBERS = ("age", "siblings", "count", "price", "days", "tries")
_PEOPLE = frozenset(PEOPLE)
_OPTIONAL = {"home": "home", "hobby": "hobby", "moral": "moral", "age": "age", "siblings": "siblings",
             "favourite": "favourite", "wish": "dream", "is_moral": "moral", "is_home": "home", "is_hobby": "hobby",
             "is_siblings": "siblings", "any_siblings": "siblings", "is_wish": "dream", "is_age": "age",
             "is_favourite": "favourite"}  # fmt: skip
_ABOUT_NAMES = re.compile("(is_)?(kind|who|name|hero|friend|cast|count|sex)")
# Whether somebody has friends, company or siblings.
_COMPANY = frozenset("has_friend has_friend_f of_friend_f alone alone_met with with_met any_siblings".split())
_DIFFERING = frozenset("daytime other_trait is_trait like look colour is_colour".split())
_PRONOUNS = {"sex_h": ("he", "him", "his"), "sex_f": ("fhe", "fhim", "fhis")}
_SPOKEN_OF = {"h": ["the hero", "the main character"], "f": ["the friend"]}


@dataclass(frozen=True)
class Question:
    key: str
    kind: str
    text: str
    answer: str
    pattern: str = ""  # matches every right answer where more than one is right


def kind_of(fact: Fact) -> str:
    """To which of `KINDS` a question belongs."""
    key, question = fact.key, fact.question.lstrip("[")
    if key in RETELLING:
        return key
    if fact.answer in (UNKNOWN, "{UNKNOWN}"):
        return "not said"
    if key == "sum":
        return "sentence"
    if key in _COMPANY:
        return "friends"
    if fact.varied is not None or key == "find_none":
        return "yes or no"
    if key.startswith("name"):
        return "names"
    if key in _NUMBERS:
        return "number"
    if key in ("colour", "favourite"):
        return "colour"
    for kind, keys in (("wish", "wish"), ("reason", "why_"), ("when", "when|daytime|weather"), ("where", "setting")):
        if re.match(keys, key):
            return kind
    first = question.split()[0]
    return {"Who": "who", "Whose": "who", "Where": "where", "Why": "reason"}.get(first, "what")


def _suits(fact: Fact, plot: Plot) -> bool:
    """Whether a common question makes sense for the stories of a plot."""
    key, own = fact.key, {fact.key for fact in plot.facts}
    old_friends = "{OLDFRIEND}" in plot.text
    return not (
        key in own
        or (key in ("alone", "with") and not old_friends)
        or (key in ("alone_met", "with_met") and old_friends)
        or (key == "find_none" and any(name.startswith("find") for name in own))
        or (key.startswith("absent_") and plot.name in key.split("_")[1:])
    )


def _facts_of_plot(plot: Plot) -> list[tuple[Fact, str, bool]]:
    """The questions of a plot, their kinds, and whether they differ from story to story."""
    facts = [*plot.facts, *(fact for fact in COMMON_FACTS if _suits(fact, plot))]
    return [(fact, kind_of(fact), _differs(fact.key)) for fact in [*facts, *polar.derive(facts)]]


def _differs(key: str) -> bool:
    return key.endswith("_x") or key.startswith("kind_") or key in _DIFFERING or key in _OPTIONAL or key in _PRONOUNS


_FACTS = {plot.name: _facts_of_plot(plot) for plot in PLOTS}


@lru_cache(maxsize=64)
def facts_of(story: Story) -> dict[str, list[Fact]]:
    """The questions that can be asked of a story, by kind: those of its plot, and the common ones; only to be read."""
    by_kind: dict[str, list[Fact]] = defaultdict(list)
    for fact, kind, differs in _FACTS[story.plot.name]:
        adapted = _adapted(fact, story) if differs else fact
        if adapted is not None:
            by_kind["not said" if adapted.answer == UNKNOWN else kind].append(adapted)
    return by_kind


def _adapted(fact: Fact, story: Story) -> Fact | None:
    """A fact as it holds for a story; None where it makes no sense."""
    key, slots, used = fact.key, story.slots, story.used
    if (key.endswith("_x") and "x" not in used) or (key == "daytime" and slots["daytime"] == "day"):
        return None
    unknown = key in _OPTIONAL and _OPTIONAL[key] not in used and f"{{{_OPTIONAL[key]}}}" in fact.answer
    if (key == "other_trait" and slots["other_trait"] in story.text) or (key == "is_trait" and not slots["h_trait"]):
        return None
    unknown |= key in _PRONOUNS and used.isdisjoint(_PRONOUNS[key])
    unknown |= key == "like" and not slots["h_trait"]
    unknown |= key == "look" and not slots["o_look"]
    unknown |= key in ("colour", "is_colour") and slots["o_look"] not in words.COLOURS
    if unknown:
        if key == "is_colour":
            question = f"Was the {{o}} {pick(Random(story.text), words.COLOURS)}?"
            return replace(fact, question=question, answer=UNKNOWN, varied=None)
        return replace(fact, answer=UNKNOWN, varied=None)
    if key.startswith("kind_") and slots[f"{key[-1]}_kind"] in _PEOPLE:
        return replace(fact, question=fact.question.replace("What kind of [animal|creature] was", "What was"))
    return fact


def _cast(story: Story) -> dict[str, str]:
    slots = story.slots
    figures = [slots[p] for p in ("h", "f", "x") if p != "x" or "x" in story.used]
    described = [f"{slots[p]} the {slots[f'{p}_kind']}" for p in ("h", "f", "x") if p != "x" or "x" in story.used]

    def joined(parts: list[str]) -> str:
        return ", ".join(parts[:-1]) + " and " + parts[-1]

    count = {2: "are two", 3: "are three"}[len(figures)]
    return {"names": joined(figures), "cast": joined(described), "names_are": count}


def _with_pronoun(rng: Random, question: str, story: Story) -> str:
    """Now and then "she" for a name, where that can be one figure only."""
    slots = story.slots
    same = slots["he"] == slots["fhe"]
    for figure, short in (("h", ""), ("f", "f")):
        others = set(re.findall(r"\{([hfx])\}", question)) - {figure}
        if others or f"{{{figure}}}" not in question or (figure == "f" and same) or not chance(rng, 0.25):
            continue
        question = question.replace(f"{{{figure}}}'s", f"{{{short}his}}")
        return re.sub(rf"\b([Dd]id|[Ww]as|[Dd]oes|[Ii]s|[Cc]ould) {{{figure}}}", rf"\1 {{{short}he}}", question)
    return question


def ask(rng: Random, story: Story, fact: Fact) -> Question:
    """One way to ask for `fact`, with the answer."""
    question, slots, answer = fact.question, story.slots, fact.answer
    if fact.varied is not None:
        question, slots, answer = polar.ask(rng, fact, story)
    slots = slots | _cast(story) | {"UNKNOWN": UNKNOWN}
    if "{UNSAID}" in question:
        question = question.replace("{UNSAID}", SHARED["UNSAID"])
    if not _ABOUT_NAMES.match(fact.key) and fact.key not in RETELLING and fact.varied not in ("h", "f", "x"):
        question = _with_pronoun(rng, question, story)
        if chance(rng, 0.25):
            called = {f: f"the {slots[f'{f}_kind']}" for f in ("h", "f")}
            if chance(rng, 0.3):
                called = {f: pick(rng, names) for f, names in _SPOKEN_OF.items()}
            asked = expand(question, rng, slots | called)
        else:
            asked = expand(question, rng, slots)
    else:
        asked = expand(question, rng, slots)
    told = story.slots | _cast(story) | {"UNKNOWN": UNKNOWN}
    right = ""
    if fact.key in ("longer", "next"):
        right = (re.escape(story.text) + r"\n" if fact.key == "longer" else "") + LATER
    answer = story.longer().text if fact.key == "longer" else expand(answer, rng, told)
    return Question(fact.key, kind_of(fact), capitalise(asked), capitalise(answer), right)


def ask_any(rng: Random, story: Story, kinds: tuple[str, ...] | None = None) -> Question:
    """A question of a kind drawn from `kinds`; without, of any kind that suits the story."""
    facts = facts_of(story)
    if kinds is None:
        if chance(rng, 0.4):
            plain = [fact for kind, group in facts.items() if kind not in RETELLING for fact in group]
            return ask(rng, story, pick(rng, plain))
        kinds = tuple(kind for kind in KINDS if kind not in ("again", "longer") or chance(rng, 0.5))
    kinds = tuple(kind for kind in kinds if facts.get(kind))
    return ask(rng, story, pick(rng, facts[pick(rng, kinds)]))


def reason(rng: Random, story: Story, key: str) -> Question:
    """A bare "why?" after the answer to the question `key`."""
    for facts in facts_of(story).values():
        for fact in facts:
            if fact.key == f"why_{key}":
                answer = expand(fact.answer, rng, story.slots)
                return Question("why", "reason", expand(WHY, rng, {}), capitalise(answer))
    return Question("why", "reason", expand(WHY, rng, {}), UNKNOWN)


def ask_for_stranger(rng: Random, story: Story, name: str) -> Question:
    """A question about somebody who is not in the story."""
    facts = [f for group in facts_of(story).values() for f in group if f.key not in RETELLING]
    facts = [f for f in facts if f.varied not in ("h", "f", "x")]  # "Was it Bert?" is no, whoever Bert may be
    unsaid = next(f for f in facts if f.key == "unsaid")
    slots_of_questions = _cast(story) | {"UNSAID": SHARED["UNSAID"]}
    while True:
        figure, used = pick(rng, ["h", "f"]), set[str]()
        slots = story.slots | slots_of_questions | {figure: name}
        asked = expand(unsaid.question if chance(rng, 0.2) else pick(rng, facts).question, rng, slots, used)
        if figure in used:
            return Question("stranger", "not said", capitalise(asked), f"There is nobody called {name} in this story.")
