"""The little template language in which the stories are written.

`[a|b|c]` picks one alternative (they nest; an empty one makes a part optional) and `{name}` inserts a slot. A slot's
value is text, or another template that is expanded in its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from functools import cache
from random import Random
from typing import TypeVar

T = TypeVar("T")

# A parsed template is a sequence of parts: plain text, a slot, or a choice between templates.
Slot = tuple[str]
Part = "str | Slot | list[tuple[Part, ...]]"

_TOKEN = re.compile(r"[\[\]|]|\{\w+\}|[^\[\]|{}]+")
_SENTENCE_START = re.compile(r'(^|[.!?] |\n)("?)([^\W\d_])')
_AN = re.compile(r"(?!uni|use|one|eu|uku|ewe)[aeiouáàâäãåąăéèêëęěíìîïóòôöõøőœúùûüůű]|hour|honest", re.IGNORECASE)


def pick(rng: Random, items: Sequence[T]) -> T:
    """One item, uniformly. `Random.random` alone is promised to give the same numbers in every Python version."""
    return items[int(rng.random() * len(items))]


def chance(rng: Random, probability: float) -> bool:
    return rng.random() < probability


def article(noun: str) -> str:
    """`noun` with "a" or "an" before it."""
    return f"an {noun}" if _AN.match(noun) else f"a {noun}"


def capitalise(text: str) -> str:
    """Upper-case the first letter of every sentence, also where the sentence opens with a quotation mark."""
    return _SENTENCE_START.sub(lambda m: m[1] + m[2] + m[3].upper(), text)


_PLURALS = {"mouse": "mice", "goose": "geese", "wolf": "wolves", "calf": "calves", "elf": "elves", "dwarf": "dwarves",
            "child": "children", "loaf of bread": "loaves of bread", "leaf": "leaves", "scarf": "scarves"}  # fmt: skip
_UNCHANGED = frozenset("sheep deer moose elk salmon trout squid shrimp bison reindeer octopus platypus ox carp".split())


def plural(noun: str) -> str:
    """The plural of a noun of the world."""
    if noun in _UNCHANGED:
        return noun
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("man"):
        return noun[:-3] + "men"
    if re.search("(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search("[^aeiou]y$", noun) else noun + "s"


def pattern(template: str, slots: Mapping[str, str], free: Set[str] = frozenset()) -> str:
    """A regular expression that matches every expansion of `template`, whatever the slots in `free` hold."""

    def walk(parts: tuple) -> str:
        out = ""
        for part in parts:
            if isinstance(part, str):
                out += re.escape(part)
            elif isinstance(part, list):
                out += "(?:" + "|".join(walk(alternative) for alternative in part) + ")"
            elif part[0] in free:
                out += ".+"
            else:
                out += walk(parse(slots[part[0]]))
        return out

    return walk(parse(template))


@cache
def parse(template: str) -> tuple:
    tokens = _TOKEN.findall(template)
    if "".join(tokens) != template:
        raise ValueError(f"unbalanced braces in template: {template!r}")
    parts, rest = _parse_sequence(tokens, 0, template)
    if rest != len(tokens):
        raise ValueError(f"unbalanced brackets in template: {template!r}")
    return parts


def _parse_sequence(tokens: list[str], at: int, template: str) -> tuple[tuple, int]:
    parts: list = []
    while at < len(tokens) and tokens[at] not in ("|", "]"):
        token = tokens[at]
        at += 1
        if token == "[":
            choice = []
            while True:
                alternative, at = _parse_sequence(tokens, at, template)
                choice.append(alternative)
                if at == len(tokens):
                    raise ValueError(f"unbalanced brackets in template: {template!r}")
                at += 1
                if tokens[at - 1] == "]":
                    break
            parts.append(choice)
        elif token.startswith("{"):
            parts.append((token[1:-1],))
        else:
            parts.append(token)
    return tuple(parts), at


def expand(template: str, rng: Random, slots: Mapping[str, str], used: set[str] | None = None) -> str:
    """Expand `template`; names of the slots that were inserted are added to `used`. Missing slots raise `KeyError`."""
    out: list[str] = []

    def walk(parts: tuple) -> None:
        for part in parts:
            if isinstance(part, str):
                out.append(part)
            elif isinstance(part, list):
                walk(part[int(rng.random() * len(part))])
            else:
                if used is not None:
                    used.add(part[0])
                value = slots[part[0]]
                if "{" in value or "[" in value:
                    walk(parse(value))
                else:
                    out.append(value)

    walk(parse(template))
    return "".join(out)
