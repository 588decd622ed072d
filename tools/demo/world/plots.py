"""The plots, read from `plots.txt` beside this file.

A plot is a header, the text of its stories as a template, and the questions which that text answers, as
`key: question => answer`; of these, `sum` tells the story in a sentence, `because` is a clause that says why its end is
a glad one, and `why_x` is the reason of what `x` answers. Sections are separated by lines of four equals signs,
paragraphs by a blank line; a line that begins with spaces goes on with the one before. `questions.txt` holds the
questions that can be asked of any story, `unsaid.txt` those that none answers.

`key: question => answer ~ slot` is a question for yes or no. Asked with the story's own value of the slot the answer is
"Yes, ...", with another value "No, ..."; the rest is the answer given here, which is true either way.

Slots: `h` the hero's name, `h_a` "a shy young fox", `he`, `him`, `his` the pronouns; `f`, `f_a`, `fhe`, ... the same
for the friend and `x`, ... for a third one; `o_a` "a red kite", `o_full` "red kite", `o` "kite"; `g_a`, `g_full`, `g`
a second thing; `p_to` "to the forest", `p_in` "in the forest". Upper-case slots are passages shared by the plots. A
plot's own slots are drawn from the lists of `words.py`; where an entry is a pair, it fills `name` and `name_2`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tools.demo.world import words
from tools.demo.world.draw import FOOD, THING


@dataclass(frozen=True)
class Fact:
    key: str
    question: str  # a template; empty for the clauses `sum` and `because`
    answer: str
    varied: str | None = None  # of a question for yes or no: the slot in which a wrong value may stand, or ""


@dataclass(frozen=True)
class Plot:
    name: str
    topic: str  # how a user may ask for it: "a story about ..."
    text: str
    facts: tuple[Fact, ...]
    clauses: dict[str, str]
    things: tuple[str, ...]  # classes of things that may stand in the slot `o`
    gifts: tuple[str, ...]  # and in the slot `g`; empty where the plot has no second thing
    slots: dict[str, list]


def join_lines(text: str) -> str:
    """Undo line breaks: a space, except after the bar between two alternatives."""
    return "\n".join(line.strip() for line in text.strip().split("\n")).replace("|\n", "|").replace("\n", " ")


def _parse_facts(text: str) -> tuple[Fact, ...]:
    facts = []
    for entry in re.split(r"\n(?! )", text.strip()):
        left, answer = join_lines(entry).split(" => ")
        key, _, question = left.partition(": ")
        answer, tilde, varied = answer.partition(" ~")
        facts.append(Fact(key, question, answer, varied.strip() if tilde else None))
    return tuple(facts)


def _parse_plot(section: str) -> Plot:
    header, rest = section.split("\n\n", 1)
    text, facts = rest.rsplit("\n\n", 1)
    parsed = _parse_facts(facts)
    lines = dict(line.split(": ", 1) for line in header.split("\n"))
    title = next(key for key in lines if key.startswith("plot "))
    slots = dict(item.split("=") for item in lines.get("slots", "").split(", ") if item)
    return Plot(
        name=title.removeprefix("plot "),
        topic=lines[title],
        text="\n\n".join(join_lines(paragraph) for paragraph in text.split("\n\n")),
        facts=tuple(fact for fact in parsed if fact.question),
        clauses={fact.key: fact.answer for fact in parsed if not fact.question},
        things=tuple(lines.get("things", f"{THING}, {FOOD}").split(", ")),
        gifts=tuple(lines.get("gifts", f"{THING}, {FOOD}").split(", ")) if "{g" in text else (),
        slots={name: getattr(words, source) for name, source in slots.items()},
    )


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _read() -> tuple[dict[str, str], list[Plot]]:
    shared = {"UNSAID": join_lines(_text("unsaid.txt"))}
    plots: list[Plot] = []
    for section in _text("plots.txt").split("\n\n====\n\n"):
        title, text = section.split("\n", 1)
        if title.startswith("shared "):
            shared[title.removeprefix("shared ")] = join_lines(text)
        else:
            plots.append(_parse_plot(section.strip()))
    return shared, plots


COMMON_FACTS = _parse_facts(_text("questions.txt"))
SHARED, PLOTS = _read()
