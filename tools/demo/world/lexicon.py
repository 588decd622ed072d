"""All words that the world's stories and replies may use; whatever else a model says, it has invented or copied."""

from __future__ import annotations

import re
from pathlib import Path

from tools.demo.world import nouns, words
from tools.demo.world.grammar import plural

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def words_of(text: str) -> set[str]:
    """The words of a text in lower case, without possessive endings."""
    return {word.removesuffix("'s") for word in _WORD.findall(text.lower())}


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    return [text for part in value for text in _strings(part)] if isinstance(value, (list, tuple)) else []


_NAMES = words_of(" ".join(words.FEMALE_NAMES + words.MALE_NAMES))
_LISTS = " ".join(
    text
    for module in (words, nouns)
    for name, value in vars(module).items()
    if name.isupper() and not name.startswith("UNSEEN")
    for text in _strings(value)
)
_TEXTS = " ".join(
    re.sub(r"\{\w+\}", " ", file.read_text(encoding="utf-8")) for file in sorted(Path(__file__).parent.glob("*.txt"))
)
WORDS = frozenset(
    words_of(_LISTS)
    | words_of(_TEXTS)
    | words_of(" ".join(plural(noun) for noun in nouns.ANIMALS))
    | {"an", "young", "she", "her", "he", "him", "his"}
)
MISTYPED = frozenset(word for word in WORDS - _NAMES if len(word) > 3 and word.isalpha())


def invented(reply: str, request: str = "") -> set[str]:
    """Words of a reply that neither the world nor the request has."""
    return words_of(reply) - WORDS - words_of(request)
