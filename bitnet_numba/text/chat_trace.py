"""Tells which characters of a rendered conversation come from its messages, whatever the template does with them.

The conversation is rendered as it is, which gives the text, and again with signs in it, which lone surrogates are: no
content can hold them, and each takes the place of one character. If the second text equals the first but for the signs,
they show where the messages' characters went. Where a template looks at what it is given (it splits an answer at
'</think>', for example), the text is the template's, but only if it has no control token more for it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bitnet_numba.errors import TokenizerError
from bitnet_numba.text.chat_template import map_strings

Messages = Sequence[dict[str, Any]]
Render = Callable[[Messages], str]

_FIRST_SHADOW = 0xDC00  # low surrogates only: no two of them join to one character
_MAX_SHADOWS = 1000
_MARK = "\udfff"
_SIGNS = re.compile(r"[\ud800-\udfff]")
_MARKS = re.compile(f"{_MARK}(\\d+){_MARK}")


@dataclass(frozen=True)
class Trace:
    """A rendered conversation. `traced` is as long as `text`, with signs where `text` has a message's own hot
    characters; `starts` is where the contents of marked messages begin, and `end` is that of the last content, if
    asked for."""

    text: str
    traced: str
    starts: list[tuple[int, int]]  # index of the message, place in the text of its content's first visible character
    end: int | None = None

    def up_to_end(self, content: str) -> "Trace":
        """The same up to the end of the last content, with the white space behind it if the template kept that.

        Raises TokenizerError if the end was not found.
        """
        if self.end is None:
            raise TokenizerError("the chat template changes the last answer, so it cannot be continued")
        end, space = self.end, content[len(content.rstrip()) :]
        end += len(space) if self.text.startswith(space, end) else 0
        return Trace(self.text[:end], self.traced[:end], self.starts, end)

    def is_foreign(self, start: int, end: int) -> bool:
        """Whether a message wrote a part of this control token."""
        return _SIGNS.search(self.traced, start, end) is not None


class Tracer:
    """Renders and traces conversations for a set of control tokens, given by their texts."""

    def __init__(self, controls: Sequence[str]):
        longest_first = sorted(filter(None, controls), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        hot = sorted(set("".join(map(_hot_characters, longest_first))))
        if len(hot) > _MAX_SHADOWS:
            raise TokenizerError("chat: the special tokens begin and end with too many different characters")
        self._shadows = {ord(character): _FIRST_SHADOW + i for i, character in enumerate(hot)}
        self._originals = {shadow: character for character, shadow in self._shadows.items()}
        self._hot = re.compile("[" + re.escape("".join(hot)) + "]" if hot else r"(?!)")

    def controls(self, trace: Trace) -> list[tuple[int, int, bool]]:
        """Start and end of every control token in the text, and whether it is a message's and only reads like one."""
        found, position = [], 0
        while match := self._pattern.search(trace.text, position):
            start, end = match.span()
            foreign = trace.is_foreign(start, end)
            found.append((start, end, foreign))
            position = start + 1 if foreign else end  # the template's own may begin inside it
        return found

    def trace(self, render: Render, messages: Messages, marked: Sequence[int] = (), to_end: bool = False) -> Trace:
        """Renders the conversation; `marked` are the messages whose starts are wanted.

        to_end: also finds the end of the last message's content. Raises TokenizerError if the template fails.
        """
        text = _SIGNS.sub("\ufffd", render(messages))
        text, traced = self._traced(render, messages, text)
        starts, end = self._marks(render, messages, text, marked, to_end) if marked or to_end else ([], None)
        return Trace(text, traced, starts, end)

    def _traced(self, render: Render, messages: Messages, text: str) -> tuple[str, str]:
        """The text to use, and the same with shadows for the messages' hot characters."""
        hot = {message["role"] for message in messages if self._shadow(message) != message}
        if not hot:
            return text, text
        everything = self._shadowed(render, messages, hot)
        if self._light(everything) == text:
            return text, everything
        # The template looks at these characters in the messages of some roles.
        calm = {role for role in hot if self._light(self._try_shadowed(render, messages, {role})) == text}
        partly = self._try_shadowed(render, messages, calm)
        if self._light(partly) == text and self._pattern.findall(partly) == self._pattern.findall(everything):
            return text, partly
        # What it does with them lets control tokens through: it gets to see the shadows instead.
        return _SIGNS.sub("\ufffd", self._light(everything)), everything

    def _marks(
        self, render: Render, messages: Messages, text: str, marked: Sequence[int], to_end: bool
    ) -> tuple[list[tuple[int, int]], int | None]:
        copies = list(messages)
        for i in marked:
            copies[i] = copies[i] | {"content": _put_mark(copies[i]["content"], i, at_end=False)}
        if to_end:
            copies[-1] = copies[-1] | {"content": _put_mark(copies[-1]["content"], len(copies), at_end=True)}
        try:
            pieces = _MARKS.split(render(copies))
        except TokenizerError:
            return [], None
        if _SIGNS.sub("\ufffd", "".join(pieces[::2])) != text:
            return [], None  # the template counts characters, or looks at them
        starts, end, position = [], None, 0
        for piece, number in zip(pieces[::2], pieces[1::2], strict=False):
            position += len(piece)
            if int(number) == len(copies):
                end = position
            else:
                starts.append((int(number), position))
        return starts, end

    def _shadow(self, message: dict[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in message.items() if key not in ("role", "token_ids")}
        return message | map_strings(own, lambda text: text.translate(self._shadows))

    def _shadowed(self, render: Render, messages: Messages, roles: set[str]) -> str:
        return render([self._shadow(message) if message["role"] in roles else message for message in messages])

    def _try_shadowed(self, render: Render, messages: Messages, roles: set[str]) -> str:
        try:
            return self._shadowed(render, messages, roles)
        except TokenizerError:
            return ""

    def _light(self, traced: str) -> str:
        return traced.translate(self._originals)


def _hot_characters(control: str) -> str:
    """Characters without which a text cannot be this control token: those that ordinary text has least often."""
    ends = [character for character in (control[0], control[-1]) if not character.isalnum() and not character.isspace()]
    inside = [character for character in control if not character.isalnum() and not character.isspace()]
    return "".join(ends or inside[:1] or control[:1])


def _put_mark(content: str, number: int, at_end: bool) -> str:
    place = len(content.rstrip()) if at_end else len(content) - len(content.lstrip())
    return f"{content[:place]}{_MARK}{number}{_MARK}{content[place:]}"
