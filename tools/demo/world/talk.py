"""Small talk, and requests from outside the text world with friendly answers that say what the model can do.

Both are read from `talk.txt` beside this file: blocks of `user:` and `reply:` (or `sorry:`, which an offer follows),
as templates in lower case; a line that begins with spaces goes on with the one before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from tools.demo.world import nouns, words
from tools.demo.world.draw import ASKED, KNOWN, PEOPLE, THINGS, coin_word
from tools.demo.world.grammar import article, capitalise, expand, pattern, pick, plural
from tools.demo.world.plots import join_lines

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
    return f"Tell me a story about {article(pick(rng, nouns.ANIMALS))} and {article(pick(rng, THINGS))}."


def _slots(rng: Random) -> dict[str, str]:
    thing, kind = KNOWN.thing(rng), pick(rng, nouns.ANIMALS)
    food = pick(rng, nouns.FOODS)
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
        "food": food,
        "a_food": article(food),
        "kind": kind,
        "kinds": plural(kind),
        "a_kind": article(kind),
        "person": pick(rng, PEOPLE),
        "name": ASKED.name(rng, "", set()),
        "colour": pick(rng, words.COLOURS),
        "country": pick(rng, COUNTRIES),
        "famous": pick(rng, FAMOUS),
        "junk": coin_word(rng),
    }


@dataclass(frozen=True)
class Exchange:
    """What a user says and a reply; `pattern` matches every right reply."""

    said: str
    reply: str
    pattern: str
    kind: str


def _read() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Small talk as (what the user says, reply), and outside requests as (what the user says, apology)."""
    talk: dict[str, list[tuple[str, str]]] = {"reply": [], "sorry": []}
    for block in Path(__file__).with_name("talk.txt").read_text(encoding="utf-8").split("\n\n"):
        said, answer = (join_lines(entry) for entry in re.split(r"\n(?! )", block.strip()))
        kind, answer = answer.split(": ", 1)
        talk[kind].append((said.removeprefix("user: "), answer))
    return talk["reply"], talk["sorry"]


SMALL_TALK, OUTSIDE = _read()
_ABOUT_A_STORY = ("[Thank you|I am glad that you liked", "[I am sorry|I am sorry to hear that you did not like")
_DECLINED = "[No|No, thank you|No, thanks|Not now|Maybe later|No thanks, not today|Nope|Not yet|Later][.|!|]"
_ACCEPTED = (
    "[Yes|Yes, please|Sure|Okay|Ok|Yes please|Of course|Please do|Yes, I would like that|Go ahead|Yeah|Yep|Why not|"
    "Yes, tell me]"
)


def _exchange(rng: Random, said: str, reply: str, kind: str, mark: str = "") -> Exchange:
    slots = _slots(rng)
    asked = " ".join(expand(said, rng, slots).split()) + mark
    return Exchange(asked, expand(reply, rng, slots), pattern(reply, slots, free={"example", "a_food"}), kind)


def small_talk(rng: Random, before_a_story: bool = False) -> Exchange:
    """Something friendly that a user may say, and the reply."""
    while True:
        said, reply = pick(rng, SMALL_TALK)
        if not (before_a_story and reply.startswith(_ABOUT_A_STORY)):
            exchange = _exchange(rng, said, reply, "small talk")
            return replace(exchange, said=capitalise(exchange.said))


def outside(rng: Random) -> Exchange:
    """A request from outside the text world, and a friendly answer that says what the model can do."""
    said, sorry = pick(rng, OUTSIDE)
    mark = pick(rng, ["", "", ".", "?"]) if sorry != UNCLEAR else ""
    return _exchange(rng, said, sorry + " {CAN} {TRY}", "outside", mark)


def declined(rng: Random) -> Exchange:
    """A "no" to the offer of a story."""
    return _exchange(rng, _DECLINED, "All right! Just say when you would like a story.", "small talk")


def accepted(rng: Random) -> str:
    """A "yes" to the offer of a story."""
    return expand(_ACCEPTED, rng, {}) + pick(rng, ["", ".", "!"])
