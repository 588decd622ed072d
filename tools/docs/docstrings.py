"""A Griffe extension: what the documentation site shows of docstrings and comments.

Docstrings here are plain text. A line "name: what it is" about a parameter or attribute, with the lines that follow it, becomes
an item of a list; a comment behind an attribute, as in `K: int  # columns`, or above it becomes its docstring.
"""

import functools
import io
import re
import tokenize
from pathlib import Path
from typing import Any

import griffe

_NAMED = re.compile(r"([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): (.+)")


class Docstrings(griffe.Extension):
    """Griffe calls these methods for each object that it has read from source."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        _list_names(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        _list_names(cls, set(cls.attributes))

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        if "class-attribute" not in attr.labels and "instance-attribute" in attr.labels:
            attr.value = None  # self.x = x says nothing
        if attr.docstring is None and attr.lineno and isinstance(attr.filepath, Path):
            comment = comment_of(_lines(attr.filepath), attr.lineno, attr.endlineno or attr.lineno)
            if comment:
                attr.docstring = griffe.Docstring(comment, parent=attr)


def _list_names(item: griffe.Function | griffe.Class, names: set[str]) -> None:
    if item.docstring is not None:
        item.docstring.value = as_markdown(item.docstring.value, names)


def as_markdown(text: str, names: set[str]) -> str:
    """A docstring in which lines about one of `names` are items of a list. Other text stays as it is."""
    lines: list[str] = []
    listed = False
    for line in text.splitlines():
        found = _NAMED.fullmatch(line)
        if found and set(found[1].split(", ")) <= names:
            if not listed and lines and lines[-1]:
                lines.append("")
            listed = True
            lines.append(f"- `{found[1]}`: {found[2]}")
        elif listed and line.strip():
            lines.append("  " + line.strip())
        else:
            listed = False
            lines.append(line)
    return "\n".join(lines)


def comment_of(lines: tuple[str, ...], first: int, last: int) -> str:
    """The comment behind the statement in lines `first` to `last` (from 1), or else the one above it; often empty."""
    source = "".join(f"{line.strip()}\n" for line in lines[first - 1 : last])
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    behind = [token.string for token in tokens if token.type == tokenize.COMMENT]
    above: list[str] = []
    while not behind and first > 1 and lines[first - 2].strip().startswith("#"):
        first -= 1
        above.insert(0, lines[first - 1].strip())
    return " ".join(comment.lstrip("# ") for comment in behind or above)


@functools.cache
def _lines(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8").splitlines())
