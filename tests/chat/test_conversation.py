"""Conversations over a toy backend."""

import pytest

from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.errors import ContextFull, RequestError
from bitnet_numba.sampling import SamplingParams
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
