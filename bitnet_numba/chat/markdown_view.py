"""Answers rendered as Markdown while they come.

Finished blocks (paragraphs, lists, tables, code) are printed once. Only the last one, which still grows, is drawn
again and again, its last lines where it is longer than the screen: so nothing flickers, and what scrolls away stays.
"""

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text

REDRAWS = 12  # a second
MARGIN = 3  # lines of the screen that are left alone

# Without HTML: <b> is shown as it is written, rather than dropped.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class _LeftHeading(Heading):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _IndentedCode(CodeBlock):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, padding=(0, 2))


class _Answer(Markdown):
    elements = {
        **Markdown.elements,
        "heading_open": _LeftHeading,
        "fence": _IndentedCode,
        "code_block": _IndentedCode,
    }


def rendered(text: str) -> Markdown:
    """Markdown as rich prints it. Line ends stay, as in poems and addresses; links show where they lead."""
    answer = _Answer("", code_theme="ansi_dark", hyperlinks=False)
    answer.parsed = _PARSER.parse(text)
    for token in answer.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return answer


def split_blocks(text: str) -> list[str]:
    """The blocks of a text, one after the other: together they are the text. At least one."""
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.nesting >= 0 and token.map]
    lines = text.split("\n")
    ends = [*starts[1:], len(lines)]
    return [
        "\n".join(lines[start:end]) + "\n" * (end < len(lines)) for start, end in zip([0, *ends], ends, strict=False)
    ]


def end_of_code(text: str, height: int) -> str:
    """A block of code with its last lines alone: colours of hundreds of lines, ten times a second, take a core."""
    first, *lines = text.strip("\n").split("\n")
    if len(lines) <= height or not first.startswith(("```", "~~~")):
        return text
    return "\n".join([first, *lines[-height:]])


class _Block:
    """A rendered block of Markdown without empty lines around it, or its last lines."""

    def __init__(self, text: str, width: int, most: int | None = None):
        self._text, self._width, self._most = text, width, most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        options = options.update(width=self._width, height=None)
        lines = [_stripped(line) for line in console.render_lines(rendered(self._text), options, pad=False)]
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
        if not lines:  # an empty answer, or what Markdown does not show, such as the target of a link
            yield Text(self._text.strip())
        for line in lines[-self._most if self._most else 0 :]:
            yield from line
            yield Segment.line()


def _stripped(line: list[Segment]) -> list[Segment]:
    """A line without the spaces that rich fills it with: they would be copied along."""
    while line and not line[-1].text.rstrip():
        line = line[:-1]
    return [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)] if line else []


class MarkdownView:
    """Shows the text of one answer as Markdown; where there is no terminal, each block when it is finished."""

    def __init__(self, console: Console, width: int):
        self._console, self._width = console, width
        self._tail = ""  # the text of the last block
        self._printed = self._stopping = False
        self._live = Live(
            console=console,
            get_renderable=self._growing,
            refresh_per_second=REDRAWS,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="visible",  # it fits: see _growing
        )
        if console.is_terminal:
            self._live.start()

    def push(self, text: str) -> None:
        self._tail += text
        if "\n" not in text:
            return
        *done, self._tail = split_blocks(self._tail)
        if done:
            with self._console:  # redrawn and printed in one go
                if self._live.is_started:
                    self._live.refresh()
                self._print(done)

    def stopping(self) -> None:
        self._stopping = True  # the next redraw says so

    def finish(self) -> None:
        self._live.stop()
        if self._tail.strip() or not self._printed:
            self._print(split_blocks(self._tail))

    def _print(self, blocks: list[str]) -> None:
        for block in blocks:
            if self._printed:
                self._console.print()
            self._printed = True
            self._console.print(_Block(block, self._width))

    def _growing(self) -> RenderableType:
        height = max(self._console.height - MARGIN, 1)
        tail = _Block(end_of_code(self._tail, height), self._width, height)
        parts: list[RenderableType] = [*([Text("")] if self._printed else []), tail]
        if self._stopping:
            parts.append(Text("[stopping ...]", "dim"))
        return Group(*parts)
