"""What the terminal shows, and the commands of the interactive chat."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from bitnet_numba.chat.conversation import Conversation, describe
from bitnet_numba.chat.interactive import COMMANDS, EXAMPLES, Terminal
from bitnet_numba.chat.terminal import WordWrap, clean
from bitnet_numba.engine.session import PART
from bitnet_numba.sampling import SamplingParams
from tests.chat.helpers import EOT, toy_conversation
from tests.engine.toy_backend import tokens_of, toy_engine


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
    assert clean("\u202ereversed\u2028\ud800\ufeff") == "\ufffdreversed\ufffd\ufffd\ufffd"
    # What a font may lack but no terminal obeys: joiners in words and emoji, spaces, characters not yet assigned.
    kept = "\u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f52c\ufe0f 1\u202f000\u3000\U0001fae8\U000e0000"
    assert clean(kept) == kept


@given(st.text(max_size=30), st.integers(0, 30))
def test_pieces_are_cleaned_as_the_whole(text: str, cut: int) -> None:
    assert clean(text[:cut]) + clean(text[cut:]) == clean(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", clean(text))


def test_no_control_characters_of_others_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    path = tmp_path / "a\x1b[2Jb"
    talk = toy_conversation("Fi\x1b[2Jne.")
    terminal = Terminal(talk, show_stats=True)
    terminal.greet(str(path))
    lines = ("\x1b[2J\udcff?", "/stats", "/system \x1b[2J", "/undo", "/\x1b[2J", "again \x1b[2J")
    for line in (*lines, f"/save {path}", f"/load {path}", f"/load {path}x", "/load \x1b[2J\0", "/save \udcff\0"):
        assert terminal.handle(line)
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out and "2J" in shown.out and not shown.err


def test_whatever_fails_the_conversation_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = toy_conversation("one two three")
    terminal = Terminal(talk, show_stats=False)
    terminal.handle("One?")

    def fail(error: Exception) -> None:
        write = terminal.write

        def write_once(text: str) -> None:
            terminal.write = write  # type: ignore[method-assign]
            write(text)
            raise error

        terminal.write = write_once  # type: ignore[method-assign]

    for error in (MemoryError("no more"), OSError(5, "a failure"), ValueError("a\x1bb"), RecursionError()):
        fail(error)
        capsys.readouterr()
        assert terminal.handle("Two?") and talk.messages[0]["content"] == "One?"
        shown = capsys.readouterr().out
        assert shown.splitlines()[1].startswith(f"failed: {type(error).__name__}: ") and "\x1b" not in shown
    capsys.readouterr()
    assert terminal.handle("Three?") and capsys.readouterr().out == "one two three\n"


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
    assert shown(f"/save {path}") == "there is nothing to save yet\n"
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
    capsys.readouterr()
    terminal.greet(None)
    assert EXAMPLES[0] not in capsys.readouterr().out  # it is a question, not a text to continue
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

    context = talk.session._held_context
    assert context is not None
    decode, context.decode = context.decode, break_down  # type: ignore[method-assign]
    assert terminal.handle("Go.") and talk.messages == []
    assert "numbers that are not finite: logits hold NaN" in " ".join(capsys.readouterr().out.split())
    context.decode = decode  # type: ignore[method-assign]
    assert terminal.handle("Go.") and capsys.readouterr().out == "Fine.\n"


def test_a_long_answer_is_cut_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation("on and on " * 50)
    talk.params = SamplingParams(max_new_tokens=5)
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
    talk.params = SamplingParams(0.5, top_k=40)
    Terminal(talk, show_stats=False).handle("/help")
    assert "temperature 0.5, top-p 1, top-k 40, min-p 0, repetition-penalty 1" in capsys.readouterr().out


def test_ctrl_c_stops_a_long_prompt_between_its_parts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, backend = toy_engine(
        [*tokens_of("Fine."), EOT], context=4096, ahead=2
    )  # as a backend that works asynchronously
    talk = Conversation(llm, SamplingParams())
    terminal = Terminal(talk, show_stats=False)
    terminal.handle("One?")
    context = talk.session._held_context
    assert context is not None
    decode = context.decode

    def decode_and_press(*arguments: Any) -> Iterator[int]:
        if len(backend.prefilled) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return decode(*arguments)

    context.decode = decode_and_press  # type: ignore[method-assign]
    capsys.readouterr()
    question = "word " * 1000
    assert terminal.handle(question) and len(talk.messages) == 2
    assert "[stopped before the answer began: the question is forgotten]" in " ".join(capsys.readouterr().out.split())
    held = talk.session.held
    assert held == 4 * PART, "the parts that were computed are kept"
    assert "stopped before the answer began" in describe(talk.last, talk)
    assert terminal.handle(question) and capsys.readouterr().out == "Fine.\n"
    assert talk.last.stats.reused_tokens == held and sum(backend.prefilled) < talk.last.stats.prompt_tokens + 100
