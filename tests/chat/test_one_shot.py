"""Prompts of the command line, of files and of standard input, answered without a conversation."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitnet_numba import commands
from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.chat.one_shot import Output, answer_all, gather_prompts
from bitnet_numba.sampling_params import SamplingParams
from tests.chat.helpers import toy_conversation

Run = Callable[..., tuple[int, str, str]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard output as a terminal of 20 columns."""
    screen = Terminal()
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "stdout", screen)
    return screen


def asked(out: str) -> list[str]:
    """The prompts in lines of JSON."""
    return [json.loads(line)["prompt"] for line in out.splitlines()]


def test_standard_input_goes_before_the_first_prompt(run: Run) -> None:
    code, out, err = run("--json", "--prompt", "Shorter?", "--prompt", "And now?", stdin=b"A long text.\n")
    assert (code, err, asked(out)) == (0, "", ["A long text.\n\nShorter?", "And now?"])
    assert asked(run("--json", "--prompt", "One?", stdin=b" \n")[1]) == ["One?"]
    assert asked(run("--json", "--prompt", "One?", stdin=b"x", keyboard=True)[1]) == ["One?"], "a keyboard has no end"
    assert asked(run("--json", "--raw", "--prompt", "upon", stdin=b" Once \n")[1]) == [" Once \n\nupon"]


def test_files_go_before_everything(run: Run, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}\n")
    files = ("--file", str(tmp_path / "a.txt"), "--file", str(tmp_path / "b.txt"))
    fenced = "a.txt:\n```\ntext of a.txt\n```\n\nb.txt:\n```\ntext of b.txt\n```"
    assert asked(run("--json", *files, "--prompt", "Why?")[1]) == [f"{fenced}\n\nWhy?"]
    assert asked(run("--json", *files, stdin=b"Why?")[1]) == [f"{fenced}\n\nWhy?"]
    assert asked(run("--json", *files)[1]) == [fenced]
    assert asked(run("--json", "--raw", *files, "--prompt", "so")[1]) == ["text of a.txt\n\ntext of b.txt\n\nso"]
    code, out, err = run("--file", str(tmp_path / "none"), "--prompt", "Why?")
    assert code == 2 and not out and "none cannot be read" in err and err.count("\n") == 1


@pytest.mark.parametrize("prompts", [["One?"], []])
def test_long_silence_on_standard_input_is_told(monkeypatch: pytest.MonkeyPatch, prompts: list[str]) -> None:
    """Who forgot that standard input is read, too, sees what is being waited for."""
    reading, writing = os.pipe()
    screen = Terminal()
    write = screen.write

    def end_input(text: str) -> int:
        length = write(text)
        if text == "\n":
            os.close(writing)
        return length

    monkeypatch.setattr(screen, "write", end_input)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(commands, "PATIENCE", 0.01)
    engine = toy_conversation().engine
    with io.TextIOWrapper(open(reading, "rb")) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert gather_prompts(prompts, [], False, engine, Output("chat")) == (prompts or [""])
    expected = "as well, until it ends (</dev/null: there is none)" if prompts else "until it ends"
    assert screen.getvalue() == f"chat: reading standard input {expected}\n"


def test_answers_are_wrapped_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    words = "one two three four five six seven"
    answer_all(toy_conversation(words), ["Count."], Output("chat", markdown=False))
    assert terminal.getvalue() == "one two three four\nfive six seven\n"
    monkeypatch.setattr(sys, "stdout", piped := io.StringIO())
    answer_all(toy_conversation(words), ["Count."], Output("chat"))
    assert piped.getvalue() == f"{words}\n"


def test_markdown_is_shown_as_such_on_a_terminal_or_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "xterm")
    answer_all(toy_conversation("**bold**"), ["Go."], Output("chat"))
    assert "\x1b[1mbold" in terminal.getvalue()
    for markdown, expected in ((None, "**bold**\n"), (True, "bold\n")):
        monkeypatch.setattr(sys, "stdout", piped := io.StringIO())
        answer_all(toy_conversation("**bold**"), ["Go."], Output("chat", markdown=markdown))
        assert piped.getvalue() == expected
    monkeypatch.setattr(sys, "stdout", raw := Terminal())
    answer_all(toy_conversation("**bold**", raw=True), ["Go."], Output("chat"))
    assert raw.getvalue() == "**bold**\n"


def test_ctrl_c_ends_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)

    def interrupted(talk: Conversation, text: str) -> Iterator[str]:
        yield "Once upon"
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", interrupted)
    for markdown in (False, True):
        with pytest.raises(KeyboardInterrupt):
            answer_all(toy_conversation(), ["Go."], Output("chat", markdown=markdown))
        assert terminal.getvalue().endswith("Once upon\n")


def test_quiet_prints_answers_and_errors_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation("on and on " * 50, context=40)
    answer_all(talk, ["Go."], Output("chat"))
    assert "the context is full" in capsys.readouterr().err
    talk.reset()
    answer_all(talk, ["Go."], Output("chat", quiet=True))
    assert capsys.readouterr().err == ""
    code, out, err = run("--quiet", "--prompt", "")
    assert code == 2 and not out and "the prompt is empty" in err


def test_an_answer_that_was_cut_is_told_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_terminal(monkeypatch)
    talk = toy_conversation("on and on " * 50)
    talk.params = SamplingParams(max_new_tokens=5)
    answer_all(talk, ["Go."], Output("chat"))
    assert capsys.readouterr().err == "chat: cut after 5 tokens; see --max-new-tokens\n"


@pytest.mark.parametrize(
    "flags", [("--raw", "--markdown"), ("--json", "--markdown"), ("--raw", "--system", "x")], ids=" ".join
)
def test_options_that_exclude_each_other(run: Run, flags: tuple[str, ...]) -> None:
    code, out, err = run("--prompt", "x", *flags)
    assert code == 2 and not out and "cannot be combined" in err and err.count("\n") == 1
