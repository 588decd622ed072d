"""What a line does in the interactive chat, whatever the model, the user or the machine do."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.chat.interactive import EXAMPLES, greet, handle, title_of
from bitnet_numba.chat.report import describe
from bitnet_numba.engine.session import PART
from bitnet_numba.sampling_params import SamplingParams
from tests.chat.helpers import EOT, before_writing, toy_chat, toy_conversation
from tests.engine.toy_backend import tokens_of, toy_engine


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.mark.parametrize("markdown", [False, True])
def test_no_control_characters_of_others_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, markdown: bool
) -> None:
    path = tmp_path / "a\x1b[2Jb"
    chat = toy_chat(toy_conversation("Fi\x1b[2Jne."), show_stats=True, markdown=markdown)
    chat.title = title_of(str(path))
    greet(chat, built_in=False)
    lines = ("\x1b[2J\udcff?", "/stats", "/system \x1b[2J", "/undo", "/\x1b[2J", "again \x1b[2J", "/set \x1b[2J 3")
    files = (f"/save {path}", f"/load {path}", f"/load {path}x", "/load \x1b[2J\0", "/save \udcff\0", f"/file {path}")
    for line in (*lines, *files, f"/export {path}.md", "/set stop \x1b[2J", "/set seed \x1b[2J", "/regen"):
        assert handle(chat, line)
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out and "2J" in shown.out and not shown.err


def test_whatever_fails_the_conversation_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = toy_conversation("one two three")
    chat = toy_chat(talk)
    handle(chat, "One?")
    for error in (MemoryError("no more"), OSError(5, "a failure"), ValueError("a\x1bb"), RecursionError()):
        capsys.readouterr()

        def fail(count: int, error: Exception = error) -> None:
            if count == 2:
                raise error

        with monkeypatch.context() as patched:
            before_writing(patched, fail)
            assert handle(chat, "Two?") and talk.messages[0]["content"] == "One?"
        shown = capsys.readouterr().out
        assert shown.splitlines()[1].startswith(f"failed: {type(error).__name__}: ") and "\x1b" not in shown
    assert handle(chat, "Three?") and capsys.readouterr().out == "one two three\n"


def test_the_greeting_names_model_backend_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    greet(toy_chat(), built_in=True)
    greeting = capsys.readouterr().out
    assert all(example in greeting for example in EXAMPLES) and "/help" in greeting and "toy backend" in greeting
    greet(toy_chat(toy_conversation(raw=True)), built_in=True)
    assert EXAMPLES[0] not in capsys.readouterr().out  # it is a question, not a text to continue
    quiet = toy_chat()
    quiet.display.quiet = True
    greet(quiet, built_in=True)
    assert capsys.readouterr().out == ""


def test_commands_that_cannot_be_meant_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    chat = toy_chat()
    handle(chat, "One?")
    for line in ("/reset now please", "/undo 3", "/CLEAR\nnow", "/exit now"):
        capsys.readouterr()
        assert handle(chat, line) and len(chat.conversation.messages) == 2
        assert "takes no argument" in capsys.readouterr().out
    assert handle(chat, "/nonsense") and "unknown command /nonsense; /help lists" in capsys.readouterr().out
    assert handle(chat, "/Hlep me") and "unknown command /Hlep; did you mean /help?" in capsys.readouterr().out
    assert handle(chat, "/quitt") and "unknown command /quitt; did you mean /quit?" in capsys.readouterr().out
    assert handle(chat, " ") and capsys.readouterr().out == ""
    assert handle(chat, " /nonsense") and capsys.readouterr().out == "Fine.\n"


@pytest.mark.parametrize("line", ["/exit", "/bye", "/quit", "exit", " Quit ", "/EXIT"])
def test_ways_out(line: str) -> None:
    assert not handle(toy_chat(), line)


def test_words_that_begin_like_a_way_out_are_sent(capsys: pytest.CaptureFixture[str]) -> None:
    assert handle(toy_chat(), "exit strategies, please") and capsys.readouterr().out == "Fine.\n"


def test_a_block_of_several_lines_is_one_question() -> None:
    chat = toy_chat()
    handle(chat, '"""\none\n  two\n"""')
    handle(chat, '/system """be\nbrief"""')
    assert chat.conversation.question == "one\n  two" and chat.conversation.system == "be\nbrief"


def test_a_full_context_is_told_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    chat = toy_chat(toy_conversation("on and on " * 50, context=40), show_stats=True)
    assert handle(chat, "Go.")
    out = capsys.readouterr().out
    assert "[cut: the context is full]" in out and "/undo" in out and "/clear" in out and "context 40/40" in out
    assert "larger --context" in out
    assert handle(chat, "word " * 100)
    out = capsys.readouterr().out
    assert "but the context holds 40: nothing was sent" in out
    assert "ask something shorter; or restart" in out and "/undo" not in out and "/system" not in out
    handle(chat, "/system Be brief.")
    capsys.readouterr()
    assert handle(chat, "word " * 100) and "shorten the system message with /system" in capsys.readouterr().out
    largest = toy_conversation("on and on " * 2000, context=4096)
    handle(toy_chat(largest), "Go.")
    out = capsys.readouterr().out
    assert "/undo" in out and "--context" not in out


def test_old_exchanges_that_go_are_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    chat = toy_chat(toy_conversation("one two three four five", context=120))
    shown = ""
    while "no longer read" not in shown:
        assert handle(chat, "Count.") and len(chat.conversation.messages) < 60
        shown = capsys.readouterr().out
    assert shown.splitlines()[1:] == ["one two three four five"], "the answer comes all the same"


def test_a_model_that_breaks_down_is_told_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation()
    chat = toy_chat(talk)

    def break_down(*_: object) -> Iterator[int]:
        raise ValueError("logits hold NaN")
        yield 0

    context = talk.session._held_context
    assert context is not None
    decode, context.decode = context.decode, break_down  # type: ignore[method-assign]
    assert handle(chat, "Go.") and talk.messages == []
    assert "numbers that are not finite: logits hold NaN" in capsys.readouterr().out
    context.decode = decode  # type: ignore[method-assign]
    assert handle(chat, "Go.") and capsys.readouterr().out == "Fine.\n"


def test_a_long_answer_is_cut_says_so_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation("on and on " * 50)
    talk.params = SamplingParams(max_new_tokens=5)
    chat = toy_chat(talk)
    handle(chat, "Go.")
    assert "[cut after 5 tokens: /continue goes on, /set length changes the limit]" in capsys.readouterr().out
    handle(chat, "/continue")
    assert "[cut after 5 tokens" in capsys.readouterr().out
    assert len(talk.messages) == 2 and len(talk.messages[1]["token_ids"]) == 10


@pytest.mark.parametrize("markdown", [False, True])
def test_ctrl_c_stops_the_answer_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, markdown: bool
) -> None:
    talk = toy_conversation("on and on " * 50)
    chat = toy_chat(talk, markdown=markdown)
    count = 0
    pieces = talk._answer

    def press(*arguments: Any) -> Iterator[str]:
        nonlocal count
        for piece in pieces(*arguments):
            count += 1
            if count == 4:
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    monkeypatch.setattr(talk, "_answer", press)
    before = signal.getsignal(signal.SIGINT)
    assert handle(chat, "Go.")
    assert signal.getsignal(signal.SIGINT) is before
    assert "on and" in (out := capsys.readouterr().out) and "[stopped; /continue goes on]" in out
    assert talk.last is not None and talk.last.finish_reason == "interrupted"
    assert 4 <= talk.last.stats.generated_tokens <= 6
    assert handle(chat, "Go on.")


def test_ctrl_c_stops_a_long_prompt_between_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    llm, backend = toy_engine(
        [*tokens_of("Fine."), EOT], context=4096, ahead=2
    )  # as a backend that works asynchronously
    talk = Conversation(llm, SamplingParams())
    chat = toy_chat(talk)
    handle(chat, "One?")
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
    assert handle(chat, question) and len(talk.messages) == 2
    assert "[stopped before the answer began]" in capsys.readouterr().out
    held = talk.session.held
    assert held == 4 * PART, "the parts that were computed are kept"
    assert talk.last is not None and "stopped before the answer began" in describe(talk.last, talk)
    assert handle(chat, question) and capsys.readouterr().out == "Fine.\n"
    assert talk.last.stats.reused_tokens == held and sum(backend.prefilled) < talk.last.stats.prompt_tokens + 100
