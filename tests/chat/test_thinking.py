"""Thinking models in the chat: the switch, and thoughts that are told from answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.chat.interactive import handle
from bitnet_numba.chat.saved import write_conversation
from bitnet_numba.sampling_params import SamplingParams
from tests.chat.helpers import toy_chat, toy_conversation
from tests.engine.test_thinking import ALWAYS, SWITCH, thinking_engine

DIM, PLAIN = "\x1b[2m", "\x1b[22m"


def thinking_chat(
    template: str = SWITCH,
    said: str = "<think>\nHm.\n</think>\n\nYes.",
    terminal: bool = True,
    tokens: int | None = None,
):
    chat = toy_chat(Conversation(thinking_engine(template, said), SamplingParams(max_new_tokens=tokens)))
    if terminal:
        chat.display.console = Console(force_terminal=True, width=60, highlight=False)
    return chat


def shown_after_spinner(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.rpartition("\x1b[2K")[2]


@pytest.mark.parametrize(
    ("template", "said"), [(SWITCH, "<think>\nHm.\n</think>\n\nYes."), (ALWAYS, "Hm.\n</think>\n\nYes.")]
)
def test_a_thought_is_dim(template: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat = thinking_chat(template, said)
    assert handle(chat, "Well?")
    shown = shown_after_spinner(capsys)
    assert "think>" not in shown
    assert shown == f"{DIM}Hm.\n{PLAIN}\nYes.\n"
    assert chat.conversation.messages[-1]["content"] == said  # as the model wrote it, for the next turn


def test_a_thought_that_is_cut_and_continued(capsys: pytest.CaptureFixture[str]) -> None:
    chat = thinking_chat(said="<think>\nOne two three four five.\n</think>\n\nYes.", tokens=8)
    handle(chat, "Well?")
    capsys.readouterr()
    handle(chat, "/continue")
    shown = shown_after_spinner(capsys)
    # The toy model begins anew, with a tag; in the middle of a thought that is text like any other.
    assert shown.startswith(f"{DIM}<think>"), "what goes on with a thought is one"


def test_text_for_other_programs_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert handle(thinking_chat(terminal=False), "Well?")
    assert capsys.readouterr().out.startswith("<think>\nHm.\n</think>\n\nYes.")


def test_an_empty_thought_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert handle(thinking_chat(said="<think>\n\n</think>\n\nYes."), "Well?")
    assert shown_after_spinner(capsys) == "Yes.\n"


def test_copy_takes_the_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chat = thinking_chat()
    handle(chat, "Well?")
    handle(chat, "/copy")
    assert "copied 4 characters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("template", "said"), [(SWITCH, "<think>\nHm.\n</think>\n\nYes."), (ALWAYS, "Hm.\n</think>\n\nYes.")]
)
def test_thoughts_of_files(template: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = thinking_chat(template, said)
    handle(chat, "Well? <think>")
    handle(chat, f"/export {tmp_path / 'chat.md'}")
    exported = (tmp_path / "chat.md").read_text()
    assert exported.endswith("## You\n\nWell? <think>\n\n## Model\n\n> *Thought*\n>\n> Hm.\n\nYes.\n")
    handle(chat, f"/save {tmp_path / 'chat.json'}")
    loading = thinking_chat(template, said)
    capsys.readouterr()
    handle(loading, f"/load {tmp_path / 'chat.json'}")
    shown = capsys.readouterr().out
    assert "\x1b[2mHm.\x1b[0m\n\nYes.\n" in shown and "</think>" not in shown and "Well? <think>" in shown
    assert loading.conversation.messages[-1]["content"] == said
    handle(loading, "/copy")
    assert "copied 4 characters" in capsys.readouterr().out
    plain = thinking_chat(template, said, terminal=False)
    handle(plain, f"/load {tmp_path / 'chat.json'}")
    assert said in capsys.readouterr().out


def test_a_loaded_answer_goes_on_as_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its template begins a thought before each new answer, but not before the rest of one."""
    chat = thinking_chat(ALWAYS, "and more.")
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes, "}]
    write_conversation(tmp_path / "chat.json", "", turns)
    handle(chat, f"/load {tmp_path / 'chat.json'}")
    capsys.readouterr()
    handle(chat, "/continue")
    assert shown_after_spinner(capsys).startswith("and more.")


def test_the_switch(capsys: pytest.CaptureFixture[str]) -> None:
    chat = thinking_chat()
    assert handle(chat, "/set thinking off") and chat.conversation.params.thinking is False
    assert "thinking off" in capsys.readouterr().out
    handle(chat, "Well?")
    with_tags = chat.conversation.prompt_tokens
    assert handle(chat, "/set thinking Default") and chat.conversation.params.thinking is None
    handle(chat, "/regen")
    assert chat.conversation.prompt_tokens < with_tags
    capsys.readouterr()
    handle(chat, "/set thinking maybe")
    assert "thinking must be on, off or default, not maybe" in capsys.readouterr().out


def test_models_without_the_switch(capsys: pytest.CaptureFixture[str]) -> None:
    chat = toy_chat()
    handle(chat, "/set thinking on")
    assert "no switch for thinking" in capsys.readouterr().out and chat.conversation.params.thinking is None
    handle(toy_chat(toy_conversation(raw=True)), "/set thinking on")
    assert "there is no setting thinking" in capsys.readouterr().out


def test_the_command_line(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("--no-thinking", "--prompt", "Hi.")
    assert code == 2 and not out and len(err.splitlines()) == 1 and "no switch for thinking" in err
    code, _, err = run("--raw", "--thinking", "--prompt", "Hi.")
    assert code == 2 and "--thinking cannot be combined with --raw" in err
