"""`modules_to_not_convert`: which modules a list of patterns names, as in transformers, in bounded time."""

import re
from functools import lru_cache
from typing import Any

from bitnet_numba.errors import ConfigError, printable

MAX_PATTERNS = 4096
MAX_LENGTH = 200  # characters of a pattern
MAX_COST = 1_000_000  # steps that matching one name may take, all patterns together
_NAME_LENGTH = 64  # no module has a longer name


def names_module(patterns: tuple[str, ...], module: str) -> bool:
    """Whether one of the patterns names a module: as a suffix, or as a regular expression for a prefix that ends where
    a component of the name ends."""
    return module.endswith(patterns) or any(pattern.match(module) for pattern in _compiled(patterns))


def check_patterns(patterns: Any, where: str) -> tuple[str, ...]:
    """The patterns of a config.json. Raises ConfigError unless they are names or patterns that are matched fast."""
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{where} must be a list of names")
    if len(patterns) > MAX_PATTERNS:
        raise ConfigError(f"{where} has {len(patterns)} entries, over {MAX_PATTERNS}")
    total = 0.0
    for pattern in patterns:
        total += _cost(pattern)
        if total > MAX_COST:
            raise ConfigError(f"{where}: {printable(pattern, 60)!r} is too complex a pattern")
        try:
            re.compile(rf"(?:{pattern})")
        except (re.error, OverflowError, RecursionError):
            raise ConfigError(f"{where}: {printable(pattern, 60)!r} is not a module name or pattern") from None
    return tuple(patterns)


def _cost(pattern: str) -> float:
    """An upper limit of the steps that matching a pattern may take: what each repetition and each choice multiplies.

    Repeated groups have no such limit, and other groups than `(?:` can hide them: they cost infinity.
    """
    if len(pattern) > MAX_LENGTH or re.search(r"\)[*+{]|\(\?[^:]", pattern):
        return float("inf")
    repetitions = sum(pattern.replace("(?:", "(").count(character) for character in "*+?{")
    places = pattern.count("(") + 1
    choices = pattern.count("|") / places + 1  # of a group; the product is largest if all have the same number
    return float(_NAME_LENGTH**repetitions) * choices**places


@lru_cache(maxsize=8)
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))") for pattern in patterns)
