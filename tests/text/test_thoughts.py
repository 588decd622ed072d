"""Thoughts are told from answers, in whatever pieces the text arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.errors import RequestError
from bitnet_numba.text.thoughts import ThoughtReader, split_thought

# text, whether the prompt has begun the thought, thought, answer
CASES = [
    ("<think>\nHm, 2 < 3.\n</think>\n\nYes.\n", False, "Hm, 2 < 3.", "Yes.\n"),
    ("\n<think>a</think>b", False, "a", "b"),
    ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
    ("Hm.\n</think>\nYes.", True, "Hm.", "Yes."),
    ("<think>\nHm, and then ", False, "Hm, and then", ""),
    ("Hm </thin", True, "Hm </thin", ""),
    ("<thinking> is no tag", False, "", "<thinking> is no tag"),
    ("Yes. <think>no</think>", False, "", "Yes. <think>no</think>"),
    ("<think>a</think> b </think> c", False, "a", "b </think> c"),
    ("  Yes.", False, "", "  Yes."),
    ("<thin", False, "", "<thin"),
    ("  ", False, "", "  "),
    ("", True, "", ""),
    ("", False, "", ""),
]


@pytest.mark.parametrize(("text", "opened", "thought", "answer"), CASES)
@given(data=st.data())
def test_any_pieces(text: str, opened: bool, thought: str, answer: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    reader = ThoughtReader(opened)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = [*(reader.push(piece) for piece in pieces), reader.finish()]
    assert "".join(part for part, _ in found) == thought
    assert "".join(part for _, part in found) == answer


@pytest.mark.parametrize(("text", "opened", "thought", "answer"), CASES)
def test_a_whole_text(text: str, opened: bool, thought: str, answer: str) -> None:
    """Whether the prompt has begun the thought shows in the text, if the thought has ended."""
    assert split_thought(text) == ((thought, answer) if not opened or "</think>" in text else ("", text))


@pytest.mark.parametrize("text", [None, 3, b"<think>", ["<think>"]])
def test_what_is_no_text(text: object) -> None:
    with pytest.raises(RequestError, match="^split_thought takes the text of an answer, not "):
        split_thought(text)  # type: ignore[arg-type]


@given(st.text(st.sampled_from("</think>a \n"), max_size=40), st.booleans())
def test_nothing_visible_is_lost(text: str, opened: bool) -> None:
    reader = ThoughtReader(opened)
    found = [*(reader.push(character) for character in text), reader.finish()]
    thought, answer = ("".join(parts) for parts in zip(*found, strict=True))
    tags = text
    if opened or text.lstrip().startswith("<think>"):
        tags = text if opened else text.lstrip().removeprefix("<think>")
        tags = tags.replace("</think>", "", 1)
    assert "".join((thought + answer).split()) == "".join(tags.split())
