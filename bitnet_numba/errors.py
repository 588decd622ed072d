"""Errors that a user can cause. Each message is one clear line, which command lines print before exiting with 2."""

import reprlib
from collections.abc import Iterable, Sequence

_repr = reprlib.Repr()  # of containers, only the first few elements
_repr.maxstring = _repr.maxother = 200


class BitNetError(Exception):
    """Base class of all errors that this package raises for invalid input."""


class ConfigError(BitNetError):
    """A model's config.json is damaged or needs something that is not supported."""


class CheckpointError(BitNetError):
    """A checkpoint folder, file or tensor is missing, damaged or does not match the configuration."""


class TokenizerError(BitNetError):
    """A tokenizer or chat template is missing, damaged or does not match the model."""


class RequestError(BitNetError):
    """A prompt or an option is invalid."""

    def __init__(self, message: str = "", option: str | None = None):
        """option: the field of SamplingParams that is invalid, if only the model or the prompt makes it so."""
        super().__init__(message)
        self.option = option


class ContextFull(RequestError):
    """The prompt does not fit into the context."""


class SchedulerClosed(RequestError):
    """The scheduler takes no requests any more: it has been closed, or is told to finish what it has."""


class QueueFull(BitNetError):
    """As many requests wait as a scheduler lets wait: the same one may be accepted later."""


class QueueTimeout(BitNetError):
    """A request has waited for as long as it was to wait, and has not been started."""


class BackendError(BitNetError):
    """A backend cannot run on this machine, has too little memory, or computed numbers that are not finite."""


def printable(text: str, limit: int = 200) -> str:
    """Text from a file or a user, made safe for one line of a message of at most `limit` characters.

    Longer text loses its middle; what a terminal would obey or not show (control and format characters, lone
    surrogates) becomes an escape.
    """
    if len(text) > limit:  # first, so that a megabyte is not escaped character by character
        text = text[: limit * 2 // 3] + "…" + text[len(text) - limit // 3 + 1 :]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def shown(value: object, limit: int = 60) -> str:
    """Any value that a caller gave, as Python writes it, made safe for one line of a message."""
    try:
        return printable(_repr.repr(value), limit)
    except Exception:  # an integer of thousands of digits, or an object that has a broken __repr__
        return f"a value of type {printable(type(value).__name__, 40)}"


def one_line(error: BaseException) -> str:
    """Another library's message, shortened to one line."""
    return printable(" ".join((str(error) or type(error).__name__).split()))


def suggestion(name: str, known: Iterable[str], cutoff: float = 0.6, surely: Sequence[str] = ()) -> str:
    """The question whether a known name was meant; empty if none is like this one.

    cutoff: how like it has to be, from 0 to 1. surely: known names that were meant for another reason.
    """
    import difflib  # takes as long as a command's start may not, and is seldom needed

    near = surely or difflib.get_close_matches(name[:100], list(known), 1, cutoff)
    return f"did you mean {near[0]}?" if near else ""
