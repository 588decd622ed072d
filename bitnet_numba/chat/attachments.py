"""Files and blocks as parts of a question."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from bitnet_numba.chat.files import file_path, read_text
from bitnet_numba.engine.engine import Engine

QUOTES = '"""'


class Attachment(NamedTuple):
    """A file's text that goes with a question."""

    name: str
    text: str


def read_attachment(name: str, engine: Engine) -> Attachment:
    """The text file that a user named. Raises RequestError if it cannot be read, or cannot fit the model's context."""
    path = file_path(name.strip("\"'"))
    return Attachment(path.name, read_text(path, engine.context * engine.tokenizer.longest_token))


def with_attachments(attachments: Sequence[Attachment], question: str) -> str:
    """The question after the files' texts, each in a fence longer than any in it."""
    parts = []
    for name, text in attachments:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        parts.append(f"{name}:\n{fence}\n{text}\n{fence}")
    return "\n\n".join([*parts, question] if question.strip() else parts)


def is_open(text: str) -> bool:
    """Whether a text, or a command's argument, begins a block of three quotes that has not ended yet."""
    body = _body(text)
    return body.startswith(QUOTES) and not _ends(body)


def unquoted(text: str) -> str:
    """The content of a block of three quotes; any other text as it is."""
    body = text.strip()
    return body[3:-3].strip("\n") if body.startswith(QUOTES) and _ends(body) else text


def _body(text: str) -> str:
    text = text.lstrip()
    return (text.split(None, 1) + [""])[1] if text.startswith("/") else text


def _ends(body: str) -> bool:
    body = body.rstrip()
    return len(body) >= 2 * len(QUOTES) and body.endswith(QUOTES)
