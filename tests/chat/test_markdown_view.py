"""Markdown answers, drawn while they come."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bitnet_numba.chat.markdown_view import MarkdownView, end_of_code, split_blocks

ANSWER = """# A title

Some **bold** words and `code`,
second line <b>kept</b>, [a link](https://example.org).

1. one
2. two

   more of two
3. three

| a | b |
|---|---|
| 1 | 2 |

```python
def f():

    return 1
```
End.
"""


def show(text: str, cuts: list[int], terminal: bool = False, height: int = 12) -> str:
    """What is printed of an answer that comes in pieces."""
    file = io.StringIO()
    console = Console(file=file, width=60, height=height, force_terminal=terminal, color_system=None)
    view = MarkdownView(console, 60)
    start = 0
    for cut in [*cuts, len(text)]:
        view.push(text[start : start + cut])
        start += cut
    view.finish()
    return file.getvalue()


def test_blocks_are_rendered() -> None:
    shown = show(ANSWER, [])
    for part in ("A title\n", "bold words and code,", "second line <b>kept</b>, a link (https://example.org)."):
        assert part in shown
    for part in (" 1 one", " 2 two", " 3 three", "def f():", "    return 1", "End."):
        assert part in shown
    assert "**" not in shown and "```" not in shown and "|" not in shown


@given(st.text(alphabet="ab *`_#->|1.\n[](<&~", max_size=80))
def test_blocks_together_are_the_text(text: str) -> None:
    assert "".join(split_blocks(text)) == text


@given(st.lists(st.integers(1, 12), max_size=40))
def test_pieces_give_what_the_whole_gives(cuts: list[int]) -> None:
    assert show(ANSWER, cuts) == show(ANSWER, [])


@given(st.text(alphabet="ab *`_#->|1.\n[](<&~", max_size=80), st.lists(st.integers(1, 12), max_size=20))
def test_no_text_breaks_it(text: str, cuts: list[int]) -> None:
    assert show(text, cuts).endswith("\n")


def test_of_long_code_only_the_end_is_drawn_again() -> None:
    code = "```python\n" + "".join(f"{i}\n" for i in range(500))
    assert end_of_code(code, 3) == "```python\n497\n498\n499"
    assert end_of_code(code, 500) == code
    prose = "word\n" * 500
    assert end_of_code(prose, 3) == prose


@pytest.mark.parametrize("height", [4, 50])
def test_a_terminal_shows_each_block_once_in_the_end(height: int) -> None:
    """What was drawn while a block grew is erased: what is left is what a file would get."""
    screen = Screen()
    screen.feed(show(ANSWER, [3] * 100, terminal=True, height=height))
    assert screen.text() == "\n".join(line.rstrip() for line in show(ANSWER, []).splitlines())


class Screen:
    """As much of a terminal as redrawing needs: no height, so that nothing scrolls away."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        for found in re.finditer(r"\x1b\[([0-9;?]*)([A-Za-z])|(.|\n)", text):
            number, code, character = found.groups()
            if code == "A":
                self.row = max(self.row - int(number or 1), 0)
            elif code == "K":
                self.lines[self.row] = ""
            elif character == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif character == "\r":
                self.column = 0
            elif character:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).rstrip("\n")
