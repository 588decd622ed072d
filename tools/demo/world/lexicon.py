"""All words that the world's stories and replies may use; whatever else a model says, it has invented or copied."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from tools.demo.world import nouns, words
from tools.demo.world.grammar import plural

_WORD = re.compile(r"[^\W\d_]+(?:'[a-z]+)?")


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


def _entries(module: ModuleType) -> list[str]:
    """The entries of a module's lists, without names that are spelt and words that are held out."""
    lists = vars(module).items()
    return _strings([v for name, v in lists if name.isupper() and not name.startswith(("UNSEEN", "SPELT"))])


_NOUNS, _LISTS = _entries(nouns), _entries(words)
_TEXTS = " ".join(
    re.sub(r"\{\w+\}", " ", file.read_text(encoding="utf-8")) for file in sorted(Path(__file__).parent.glob("*.txt"))
)
WORDS = frozenset(
    words_of(" ".join(_NOUNS + _LISTS))
    | words_of(_TEXTS)
    | words_of(" ".join(plural(noun) for noun in nouns.ANIMALS))
    | {"an", "young", "she", "her", "he", "him", "his"}
)
MISTYPED = frozenset(word for word in WORDS - _NAMES if len(word) > 3 and word.isalpha())
# Nouns, colours, traits and the like, on which an answer may depend.
CONTENT = MISTYPED & words_of(" ".join(_NOUNS + [entry for entry in _LISTS if " " not in entry]))


def _without_one_letter(word: str) -> set[str]:
    return {word[:i] + word[i + 1 :] for i in range(1, len(word))}


# Short words have too many neighbours that are words themselves: "bull" and "bulb".
_NEAR = frozenset(near for word in MISTYPED if len(word) > 4 for near in (word, *_without_one_letter(word)))


def like_a_slip(word: str) -> bool:
    """Whether a word may be a longer one of the world's with a letter too many, missing, other or out of place."""
    return not _NEAR.isdisjoint({word, *_without_one_letter(word)})


def invented(reply: str, request: str = "") -> set[str]:
    """Words of a reply that neither the world nor the request has."""
    return words_of(reply) - WORDS - words_of(request)
