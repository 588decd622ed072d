"""Conversations over a toy backend."""

from dataclasses import replace
from pathlib import Path

import pytest

from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.errors import ContextFull, RequestError
from bitnet_numba.sampling_params import SamplingParams
from tests.chat.helpers import ask, toy_conversation
from tests.engine.toy_backend import tokens_of, toy_engine


def test_turns_are_remembered_undone_and_forgotten() -> None:
    talk = toy_conversation(system="Be kind.")
    assert ask(talk, "One?") == ask(talk, "Two?") == "Fine."
    assert [m["content"] for m in talk.messages] == ["One?", "Fine.", "Two?", "Fine."]
    assert talk.undo() == "Two?"
    assert [m["content"] for m in talk.messages] == ["One?", "Fine."]
    assert talk.undo() == "One?" and talk.undo() is None
    ask(talk, "Three?")
    talk.reset()
    assert talk.messages == [] and talk.last is None and talk.session.held == 0 and talk.system == "Be kind."


def test_after_undo_only_the_new_question_is_computed() -> None:
    talk = toy_conversation()
    ask(talk, "One?")
    held = talk.session.held
    ask(talk, "Two?")
    talk.undo()
    ask(talk, "Four?")
    assert talk.last is not None and talk.last.stats.reused_tokens >= held


def test_a_question_that_does_not_fit_is_forgotten() -> None:
    talk = toy_conversation(context=40)
    ask(talk, "One?")
    before = list(talk.messages)
    with pytest.raises(ContextFull):
        talk.ask("word " * 60)
    with pytest.raises(RequestError, match="the prompt is empty"):
        talk.ask("  \n")
    assert talk.messages == before
    assert ask(talk, "Two?") == "Fine."


def test_an_interrupted_answer_is_kept_as_far_as_it_was_shown() -> None:
    talk = toy_conversation("one two three four")
    pieces = talk.ask("Count.")
    shown = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert talk.messages[-1]["content"] == shown
    assert ask(talk, "On.") == "one two three four"


def test_an_answer_that_fails_leaves_no_trace() -> None:
    llm, backend = toy_engine(tokens_of("one two three"))
    talk = Conversation(llm, SamplingParams())
    backend.fail_after = 1
    with pytest.raises(ValueError, match="failed"):
        ask(talk, "Count.")
    assert talk.messages == []


def test_raw_texts_are_continued_on_their_own() -> None:
    talk = toy_conversation(raw=True)
    assert ask(talk, "Once upon") == "Fine."
    assert talk.messages == []
    assert talk.last is not None and talk.last.stats.prompt_tokens == len(tokens_of("Once upon")) + 1


def test_old_exchanges_are_no_longer_read_when_the_context_is_full() -> None:
    talk = toy_conversation("one two three", context=160, system="Be kind.")
    rolled = 0
    for turn in range(40):
        before = talk.unread
        assert ask(talk, f"Question {turn}?") == "one two three"
        assert talk.unread >= before and talk.unread % 2 == 0 and talk.prompt_tokens <= 160
        rolled += talk.unread > before
    assert len(talk.messages) == 80 and 0 < talk.unread < 78
    assert rolled < 15, "each time, more goes than has to, because what stays is computed anew"
    assert "Be kind." in talk.engine.tokenizer.decode(talk.session._held_context.ids)  # type: ignore[union-attr]
    while talk.undo():
        pass
    assert talk.unread == 0 and ask(talk, "On?") == "one two three"


def test_a_loaded_conversation_may_be_longer_than_the_context(tmp_path: Path) -> None:
    long = toy_conversation("one two three", context=4096)
    for turn in range(30):
        ask(long, f"Question {turn}?")
    long.save(tmp_path / "chat.json")
    talk = toy_conversation("one two three", context=120)
    talk.load(tmp_path / "chat.json")
    assert ask(talk, "On?") == "one two three" and talk.unread > 40


def test_an_answer_goes_on_where_it_was_cut() -> None:
    llm, _ = toy_engine([], 256)
    params = SamplingParams(max_new_tokens=12, seed=3)
    whole, parts = Conversation(llm, params), Conversation(llm, replace(params, max_new_tokens=4))
    ask(whole, "Go.")
    shown = ask(parts, "Go.") + "".join(parts.go_on()) + "".join(parts.go_on())
    assert parts.messages[1]["token_ids"] == whole.messages[1]["token_ids"]
    assert parts.messages[1]["content"] == shown == whole.messages[1]["content"]
    assert parts.last is not None and parts.last.stats.prompt_tokens - parts.last.stats.reused_tokens == 1


def test_raw_text_goes_on_where_it_was_cut() -> None:
    llm, _ = toy_engine([], 256)
    params = SamplingParams(max_new_tokens=12, seed=3)
    whole, parts = Conversation(llm, params, raw=True), Conversation(llm, replace(params, max_new_tokens=6), raw=True)
    assert ask(parts, "Once") + "".join(parts.go_on()) == ask(whole, "Once")


def test_a_question_is_replaced_only_by_an_answer() -> None:
    talk = toy_conversation("one two three four")
    ask(talk, "One?")
    before = list(talk.messages)
    pieces = talk.ask("Two?", replacing=True)
    pieces.close()  # type: ignore[attr-defined]
    assert talk.messages == before
    with pytest.raises(RequestError, match="the prompt is empty"):
        talk.ask(" ", replacing=True)
    assert "".join(talk.ask_again()) == "one two three four" and len(talk.messages) == 2
    pieces = talk.ask("Two?", replacing=True)
    shown = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert [m["content"] for m in talk.messages] == ["Two?", shown] and talk.can_continue
    assert "".join(talk.go_on())
    talk.undo()
    with pytest.raises(RequestError, match="no question yet"):
        talk.ask_again()
    with pytest.raises(RequestError, match="no answer that was cut"):
        talk.go_on()
