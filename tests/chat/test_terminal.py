"""What the terminal shows, and the commands of the interactive chat."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from bitnet_numba.chat.interactive import COMMANDS, EXAMPLES, Terminal
from bitnet_numba.chat.terminal import WordWrap, clean
from bitnet_numba.engine.request import GenerationOptions
from bitnet_numba.sampling import SamplingParams
from tests.chat.helpers import toy_conversation


@given(st.text(alphabet="ab \n\u4e2d-", max_size=120), st.lists(st.integers(1, 10)), st.integers(2, 20))
def test_wrapping_changes_spaces_and_line_ends_only(text: str, cuts: list[int], width: int) -> None:
    wrap, shown, start = WordWrap(width), "", 0
    for cut in [*cuts, len(text)]:
        shown += wrap.push(text[start : start + cut])
        start += cut
    shown += wrap.finish()
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", text)
    assert all(cell_len(line.rstrip()) <= width + 1 for line in shown.split("\n"))
    assert shown.count("\n") >= text.count("\n")
    whole = WordWrap(width)
    assert whole.push(text) + whole.finish() == shown


def test_wrapping_breaks_between_words() -> None:
    wrap = WordWrap(12)
    assert wrap.push("The dog and the kite.\n\nA new line") + wrap.finish() == "The dog and\nthe kite.\n\nA new line"


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert clean("a\x1b[31mb\r\x07\x9b\tc\nd\u00a0\u4e2d\U0001f642") == (
        "a\ufffd[31mb\ufffd\ufffd\tc\nd\u00a0\u4e2d\U0001f642"
    )


def test_commands_of_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    talk = toy_conversation()
    terminal = Terminal(talk, show_stats=False)

    def shown(line: str, stays: bool = True) -> str:
        assert terminal.handle(line) == stays
        return capsys.readouterr().out

    terminal.greet(None)
    greeting = capsys.readouterr().out
    assert all(example in greeting for example in EXAMPLES) and "/help" in greeting and "toy backend" in greeting
    assert shown("/stats") == "no answer yet\n"
    assert shown("One?") == "Fine.\n"
    assert "answer 4 tokens" in shown("/stats") and "context" in shown("/stats")
    assert shown("/system Be brief.") == shown("/system") == "system message: Be brief.\n"
    assert talk.system == "Be brief."
    assert shown("/system -") == "no system message\n"
    path = tmp_path / "chat.json"
    assert shown(f"/save {path}").startswith("saved 2 messages")
    assert shown("/undo") == "removed: One?\n"
    assert "nothing to remove" in shown("/undo")
    assert "> One?\nFine.\n" in shown(f"/load {path}")
    assert len(talk.messages) == 2
    assert "cannot be read" in shown(f"/load {tmp_path / 'none'}")
    assert shown("/save") == "give a file name, such as chat.json\n"
    assert "unknown command /nonsense" in shown("/nonsense")
    assert shown(" ") == ""
    assert shown(" /nonsense") == "Fine.\n"
    assert all(command.split()[0] in shown("/help") for command in COMMANDS)
    assert shown("/reset") == "a new conversation\n" and talk.messages == []
    assert shown("/exit", stays=False) == ""


def test_a_full_context_is_told_with_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    terminal = Terminal(toy_conversation("on and on " * 50, context=40), show_stats=True)
    assert terminal.handle("Go.")
    out = capsys.readouterr().out
    assert "[cut: the context is full]" in out and "/undo" in out and "/reset" in out and "context 40/40" in out
    assert "larger --context" in out
    assert terminal.handle("Go.")
    out = capsys.readouterr().out
    assert "but the context holds 40: nothing was sent" in out and "/undo" in out
    largest = toy_conversation("on and on " * 2000, context=4096)
    Terminal(largest, show_stats=False).handle("Go.")
    out = capsys.readouterr().out
    assert "/undo" in out and "--context" not in out


def test_commands_that_cannot_be_meant_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation()
    terminal = Terminal(talk, show_stats=False)
    terminal.handle("One?")
    for line in ("/reset now please", "/undo 3", "/RESET\nnow"):
        capsys.readouterr()
        assert terminal.handle(line) and len(talk.messages) == 2
        assert "takes no argument" in capsys.readouterr().out
    assert terminal.handle("/Help") and "/undo" in capsys.readouterr().out
    assert terminal.handle("/Reset") and talk.messages == []
    terminal = Terminal(toy_conversation(raw=True), show_stats=False)
    terminal.handle("One?")
    for line in ("/undo", "/reset", "/save x.json", "/load x.json", "/system x"):
        capsys.readouterr()
        assert terminal.handle(line) and "--raw" in capsys.readouterr().out
    assert not Path("x.json").exists()


def test_a_model_that_breaks_down_is_told_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation()
    terminal = Terminal(talk, show_stats=False)

    def break_down(*_: object) -> Iterator[int]:
        raise ValueError("logits hold NaN")
        yield 0

    context = talk.session._context()
    decode, context.decode = context.decode, break_down  # type: ignore[method-assign]
    assert terminal.handle("Go.") and talk.messages == []
    assert "numbers that are not finite: logits hold NaN" in " ".join(capsys.readouterr().out.split())
    context.decode = decode  # type: ignore[method-assign]
    assert terminal.handle("Go.") and capsys.readouterr().out == "Fine.\n"


def test_a_long_answer_is_cut_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation("on and on " * 50)
    talk.options = GenerationOptions(max_new_tokens=5)
    Terminal(talk, show_stats=False).handle("Go.")
    assert "[cut after 5 tokens: see --max-new-tokens]" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation("on and on " * 50)
    terminal = Terminal(talk, show_stats=False)
    write = terminal.write
    counted: list[str] = []

    def write_and_press(text: str) -> None:
        counted.append(text)
        if len(counted) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        write(text)

    terminal.write = write_and_press  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGINT)
    assert terminal.handle("Go.")
    assert signal.getsignal(signal.SIGINT) is before
    assert "[stopped]" in capsys.readouterr().out
    assert talk.last is not None and talk.last.finish_reason == "interrupted"
    assert 4 <= talk.last.stats.generated_tokens <= 6
    assert terminal.handle("Go on.")


def test_help_says_how_answers_are_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation()
    talk.options = GenerationOptions(SamplingParams(0.5, top_k=40))
    Terminal(talk, show_stats=False).handle("/help")
    assert "temperature 0.5, top-p 1, top-k 40, min-p 0, repetition-penalty 1" in capsys.readouterr().out
