"""Reads the calls of functions in an answer as it arrives: {"name": NAME, "arguments": {...}}, a line each."""

import re
import secrets
from typing import Any, NamedTuple

from bitnet_numba.server.tools import call_start


class CallPart(NamedTuple):
    """A part of a call. The first one of a call has its name."""

    number: int  # of the call in the answer
    id: str
    name: str | None
    arguments: str  # follow the arguments before


class CallReader:
    """Tells text and calls of one answer, which has the form that `tools.call_grammar` gives it."""

    def __init__(self, tags: tuple[str, str]):
        """tags: what stands before and after a call."""
        self._start = call_start(tags)
        self._head = re.compile(re.escape(tags[0]) + r'\{"name": "([a-zA-Z0-9_-]+)", "arguments": ')
        self._is_call: bool | None = None  # None: there is too little of the answer to know
        self._held = ""  # what has arrived and is not read yet
        self._object: ObjectEnd | None = None  # of the arguments under way
        self._number, self._id = -1, ""

    @property
    def has_calls(self) -> bool:
        """Whether a call has begun."""
        return self._number >= 0

    def push(self, text: str) -> tuple[str, list[CallPart]]:
        """What follows: text of the answer, or parts of calls, at most one of each."""
        self._held += text
        if self._is_call is None:
            begun = self._held[1:] if self._held[:1] in (" ", "\n") else self._held
            if len(begun) < len(self._start) and self._start.startswith(begun):
                return "", []
            self._is_call = begun.startswith(self._start)
        if not self._is_call:
            return self.finish(), []
        parts = []
        while (part := self._next_part()) is not None:
            parts.append(part)
        return "", parts

    def finish(self) -> str:
        """The rest of a text, at its end: what might have become a call."""
        rest, self._held = self._held, ""
        return "" if self._is_call else rest

    def _next_part(self) -> CallPart | None:
        name = None
        if self._object is None:
            head = self._head.search(self._held)
            if head is None:
                return None
            self._held, name = self._held[head.end() :], head[1]
            self._object = ObjectEnd()
            self._number, self._id = self._number + 1, f"call_{secrets.token_hex(12)}"
        elif not self._held:
            return None
        end = self._object.find(self._held)
        if end is not None:
            self._object = None
        arguments, self._held = self._held[:end], "" if end is None else self._held[end:]
        return CallPart(self._number, self._id, name, arguments)


class ObjectEnd:
    """Finds where a JSON object ends whose text arrives in pieces."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def find(self, text: str) -> int | None:
        """The place after the object's end in the next piece; None if it does not end there."""
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = character == "\\", character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None


def tool_call(part: CallPart) -> dict[str, Any]:
    """A whole call in a message."""
    return {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}


def tool_call_delta(part: CallPart) -> dict[str, Any]:
    """A part of a call in a chunk."""
    if part.name is not None:
        return {"index": part.number, **tool_call(part)}
    return {"index": part.number, "function": {"arguments": part.arguments}}
