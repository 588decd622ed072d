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
from bitnet_numba.text.template_process import TemplateLimit

Messages = Sequence[dict[str, Any]]
Render = Callable[[Messages], str]

_FIRST_SHADOW = 0xDC00  # low surrogates only: no two of them join to one character
_MAX_SHADOWS = 1000
_MARK = "\udfff"
_SIGNS = re.compile(r"[\ud800-\udfff]")
_MARKS = re.compile(f"{_MARK}(\\d+){_MARK}")


@dataclass(frozen=True)
class Trace:
    """A rendered conversation.

    traced: as long as `text`, with signs where `text` has a message's own hot characters.
    places: where the contents of marked messages stand, in order: index of the message, start and end in the text, from
    the first visible character to the last. Contents that the template changes have none.
    """

    text: str
    traced: str
    places: list[tuple[int, int, int]]

    def up_to_end_of(self, message: int, content: str) -> "Trace":
        """The same up to the end of a message's content, with the white space behind it if the template kept that.

        Raises TokenizerError if the message has no place.
        """
        ends = [end for number, _, end in self.places if number == message]
        if not ends:
            raise TokenizerError("the chat template changes the last answer, so it cannot be continued")
        end = space_behind(self.text, ends[-1], content)
        return Trace(self.text[:end], self.traced[:end], self.places)

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

    def trace(self, render: Render, messages: Messages, marked: Sequence[int] = ()) -> Trace:
        """Renders the conversation; `marked` are the messages whose places are wanted.

        Raises TokenizerError if the template fails.
        """
        text = _SIGNS.sub("\ufffd", render(messages))
        text, traced = self._traced(render, messages, text)
        return Trace(text, traced, self._places(render, messages, text, marked) if marked else [])

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

    def _places(
        self, render: Render, messages: Messages, text: str, marked: Sequence[int]
    ) -> list[tuple[int, int, int]]:
        copies = list(messages)
        for i in marked:
            content = copies[i]["content"]
            visible, behind = content.strip(), len(content.rstrip())
            start, end = f"{_MARK}{2 * i}{_MARK}", f"{_MARK}{2 * i + 1}{_MARK}"
            before = content[: behind - len(visible)]
            copies[i] = copies[i] | {"content": before + start + visible + end + content[behind:]}
        try:
            pieces = _MARKS.split(render(copies))
        except TemplateLimit:
            raise
        except TokenizerError:
            return []
        if _SIGNS.sub("\ufffd", "".join(pieces[::2])) != text:
            return []  # the template counts characters, or looks at them
        places: list[tuple[int, int, int]] = []
        position, opened = 0, (-1, 0)  # number and place of the mark before
        for piece, number in zip(pieces[::2], pieces[1::2], strict=False):
            position += len(piece)
            if int(number) % 2 and int(number) == opened[0] + 1:
                places.append((int(number) // 2, opened[1], position))
            opened = (int(number), position)
        return places

    def _shadow(self, message: dict[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in message.items() if key not in ("role", "token_ids")}
        return message | map_strings(own, lambda text: text.translate(self._shadows))

    def _shadowed(self, render: Render, messages: Messages, roles: set[str]) -> str:
        return render([self._shadow(message) if message["role"] in roles else message for message in messages])

    def _try_shadowed(self, render: Render, messages: Messages, roles: set[str]) -> str:
        try:
            return self._shadowed(render, messages, roles)
        except TemplateLimit:
            raise
        except TokenizerError:
            return ""

    def _light(self, traced: str) -> str:
        return traced.translate(self._originals)


def _hot_characters(control: str) -> str:
    """Characters without which a text cannot be this control token: those that ordinary text has least often."""
    ends = [character for character in (control[0], control[-1]) if not character.isalnum() and not character.isspace()]
    inside = [character for character in control if not character.isalnum() and not character.isspace()]
    return "".join(ends or inside[:1] or control[:1])


def space_behind(text: str, end: int, content: str) -> int:
    """The end of a content whose last visible character ends at `end`, with its white space if that stands there."""
    space = content[len(content.rstrip()) :]
    return end + len(space) if text.startswith(space, end) else end
