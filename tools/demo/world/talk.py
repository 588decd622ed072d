"""Small talk, and requests from outside the text world with friendly answers that say what the model can do.

Both are read from `talk.txt` beside this file: blocks of `user:` and `reply:` (or `sorry:`, which an offer follows),
as templates in lower case; a line that begins with spaces goes on with the one before.
"""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

from tools.demo.world import words
from tools.demo.world.grammar import article, capitalise, expand, pick
from tools.demo.world.plots import join_lines
from tools.demo.world.stories import PEOPLE, THINGS, coin_word

MODEL_NAME = "Trit"

CAN = (
    "[I can tell short stories and answer questions about them|I tell short stories and answer questions about them"
    "|I only know how to tell short stories and to answer questions about them]."
)
TRY = '[Try: "{example}"|You could say: "{example}"|For example, say: "{example}"|Just say: "{example}"]'
OFFER = "[Would you like a story|Shall I tell you a story|What should the next story be about]?"

COUNTRIES = words.items("""France, Germany, Italy, Spain, Norway, Japan, China, India, Brazil, Canada, Egypt, Kenya,
Peru, Mexico, Russia, Poland, Greece, Turkey, London, Paris, Berlin, Rome, Tokyo, New York, Australia, America,
England, Chile""")
FAMOUS = words.items("""Einstein, Napoleon, Mozart, Cleopatra, Shakespeare, Newton, Darwin, Beethoven, Columbus,
Gandhi, Picasso, Galileo, Plato, Julius Caesar, Marie Curie, Alan Turing, Ada Lovelace, Goethe, Aristotle,
Leonardo da Vinci""")

UNCLEAR = "I am not sure what you mean."
NO_STORY_YET = "I have not told you a story yet. What should it be about?"


def example_request(rng: Random) -> str:
    return f"Tell me a story about {article(pick(rng, words.ANIMALS))} and {article(pick(rng, THINGS))}."


def _slots(rng: Random) -> dict[str, str]:
    thing, kind = pick(rng, THINGS + words.FOODS), pick(rng, words.ANIMALS)
    return {
        "model": MODEL_NAME,
        "CAN": CAN,
        "TRY": TRY,
        "OFFER": OFFER,
        "example": example_request(rng),
        "n": str(int(10 ** (4 * rng.random()))),
        "year": str(1000 + int(1030 * rng.random())),
        "thing": thing,
        "a_thing": article(thing),
        "rare": pick(rng, words.RARE_THINGS),
        "kind": kind,
        "a_kind": article(kind),
        "person": pick(rng, PEOPLE),
        "name": pick(rng, words.MALE_NAMES),
        "colour": pick(rng, words.COLOURS),
        "country": pick(rng, COUNTRIES),
        "famous": pick(rng, FAMOUS),
        "junk": coin_word(rng),
    }


def _read() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Small talk as (what the user says, reply), and outside requests as (what the user says, apology)."""
    talk: dict[str, list[tuple[str, str]]] = {"reply": [], "sorry": []}
    for block in Path(__file__).with_name("talk.txt").read_text(encoding="utf-8").split("\n\n"):
        said, answer = (join_lines(entry) for entry in re.split(r"\n(?! )", block.strip()))
        kind, answer = answer.split(": ", 1)
        talk[kind].append((said.removeprefix("user: "), answer))
    return talk["reply"], talk["sorry"]


SMALL_TALK, OUTSIDE = _read()


def small_talk(rng: Random) -> tuple[str, str]:
    """Something friendly that a user may say, and the reply."""
    said, reply = pick(rng, SMALL_TALK)
    slots = _slots(rng)
    return capitalise(expand(said, rng, slots)), expand(reply, rng, slots)


def outside(rng: Random) -> tuple[str, str]:
    """A request from outside the text world, and a friendly answer that says what the model can do."""
    said, sorry = pick(rng, OUTSIDE)
    slots = _slots(rng)
    mark = pick(rng, ["", "", ".", "?"]) if sorry != UNCLEAR else ""
    return " ".join(expand(said, rng, slots).split()) + mark, expand(sorry + " {CAN} {TRY}", rng, slots)
