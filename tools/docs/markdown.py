"""Markdown of this package's docstrings and comments, which are plain text.

A line "name: what it is" about a parameter or attribute, with the lines that follow it, becomes an item of a list. A
comment behind an attribute, as in `K: int  # columns`, or above it stands for its docstring.
"""

import io
import re
import tokenize
from collections.abc import Sequence

_NAMED = re.compile(r"([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): (.+)")


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


def comment_of(lines: Sequence[str], first: int, last: int) -> str:
    """The comment behind the statement in lines `first` to `last` (from 1), or else the one above it; often empty."""
    source = "".join(f"{line.strip()}\n" for line in lines[first - 1 : last])
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    behind = [token.string for token in tokens if token.type == tokenize.COMMENT]
    above: list[str] = []
    while not behind and first > 1 and lines[first - 2].strip().startswith("#"):
        first -= 1
        above.insert(0, lines[first - 1].strip())
    return " ".join(comment.lstrip("# ") for comment in behind or above)
