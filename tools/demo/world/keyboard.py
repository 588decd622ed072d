"""Text as people type it: without capitals or marks, all in capitals, with typing errors, over several lines."""

from __future__ import annotations

import re
from random import Random

from tools.demo.world.grammar import chance, pick
from tools.demo.world.lexicon import CONTENT, MISTYPED

PLAIN, CAPITALS, ERRORS, LINES = "plain", "capitals", "typing errors", "several lines"
FORMS = (PLAIN, CAPITALS, ERRORS, LINES)

_OPENERS = frozenset(
    "What Where Who How Why Tell Can Could Would May Was Were Which A An Another Do Does Did Is One Whose Make Give "
    "Let Write Invent Then When In Again Repeat Continue Shorter Longer".split()
)
_NEIGHBOURS = {
    a: row[max(0, i - 1) : i] + row[i + 1 : i + 2]
    for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    for i, a in enumerate(row)
}
_BEFORE = [
    "Hello!",
    "Hi,",
    "Hi there!",
    "Please:",
    "I have a question.",
    "One question:",
    "Hello, storyteller!",
    "Okay.",
]
_AFTER = ["Thank you!", "Thanks.", "Please.", "Thank you in advance!", "I am curious."]


def _mistype(rng: Random, word: str) -> str:
    """`word` with one slip of the fingers behind its first letter."""
    at = 1 + int(rng.random() * (len(word) - 2))
    slip = rng.random()
    if slip < 0.35:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if slip < 0.65:
        return word[:at] + word[at + 1 :]
    if slip < 0.85:
        return word[:at] + word[at] + word[at:]
    return word[:at] + pick(rng, _NEIGHBOURS[word[at].lower()]) + word[at + 1 :]


def mistyped(rng: Random, text: str, hard: bool = False) -> str:
    """`text` with one to three slips in words of the world, never in names or words that nobody knows.

    With `hard`, a word of the lists (a noun, a colour, a trait, ...) is the first to be hit.
    """
    words = re.split(r"([^\W\d_]+)", text)
    candidates = [i for i in range(1, len(words), 2) if words[i].lower() in MISTYPED]
    first = [i for i in candidates if words[i].lower() in CONTENT] if hard else []
    for _ in range(pick(rng, [1, 1, 2, 3])):
        if candidates:
            i = pick(rng, first or candidates)
            first = []
            candidates.remove(i)
            word = _mistype(rng, words[i])
            words[i] = word if word.lower() not in MISTYPED else words[i]
    return "".join(words)


def over_lines(rng: Random, text: str) -> str:
    """`text` broken into lines, or with a line before or after it."""
    lines = [text]
    if chance(rng, 0.5) and " " in text:
        spaces = [match.start() for match in re.finditer(" ", text)]
        at = pick(rng, spaces)
        lines = [text[:at], text[at + 1 :]]
    if len(lines) == 1 or chance(rng, 0.3):
        if chance(rng, 0.5):
            lines.insert(0, pick(rng, _BEFORE))
        else:
            lines.append(pick(rng, _AFTER))
    return pick(rng, ["\n", "\n", "\n\n"]).join(lines)


def typed(rng: Random, text: str, form: str = "", hard: bool = False) -> tuple[str, str]:
    """`text` in the given form or, without one, in one of `FORMS`, most often the plain one; and the form's name.

    A text that is `hard` to read by letters, since one word of it decides, is in capitals or mistyped more often.
    """
    slip_decides = False
    if not form:
        share = 0.25 if hard else 0.16
        draw = rng.random()
        form = CAPITALS if draw < share else ERRORS if draw < 2 * share else LINES if draw < 2 * share + 0.05 else PLAIN
        slip_decides = hard and chance(rng, 0.6)
    if chance(rng, 0.06):
        before = pick(rng, ["So", "Okay", "And", "Hey", "Well", "Now", "Hmm", "Listen", "One more thing", "Please"])
        text = f"{before}, {text[0].lower() + text[1:] if text.split()[0] in _OPENERS else text}"
    if chance(rng, 0.3):
        text = text.lower()
    if chance(rng, 0.3):
        text = text.rstrip(".?!")
    elif chance(rng, 0.04):
        text += " please" if text[-1].isalnum() else ""
    elif chance(rng, 0.05):
        text += pick(rng, ["!", "?", "!!", "??", " :)", "..."])
    if form == CAPITALS:
        text = text.upper()
    elif form == ERRORS:
        text = mistyped(rng, text, slip_decides)
    elif form == LINES:
        text = over_lines(rng, text)
    return text.strip() or "?", form
