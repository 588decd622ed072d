"""Blocks of three quotes, and files that go with a question."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.chat import files
from bitnet_numba.chat.attachments import Attachment, is_open, unquoted, with_attachments
from bitnet_numba.errors import RequestError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ('say """', False),
        ('"""', True),
        ('""""', True),
        ('"""one', True),
        ('"""one\ntwo', True),
        ('"""one"""', False),
        ('"""one\n""" ', False),
        ('""""""', False),
        ('/system """one', True),
        ('/system """one\n"""', False),
        ("/system", False),
    ],
)
def test_a_block_stays_open_until_its_quotes_come(text: str, expected: bool) -> None:
    assert is_open(text) == expected


@given(st.text(alphabet='ab \n"', max_size=12))
def test_quotes_around_a_text_are_removed(text: str) -> None:
    assert unquoted(f'"""{text}"""') == text.strip("\n")
    assert not is_open(f'"""{text}"""')
    if not text.lstrip().startswith('"""'):
        assert unquoted(text) == text


@given(st.lists(st.text(alphabet="a`\n", max_size=20), min_size=1, max_size=3))
def test_no_file_ends_its_fence(texts: list[str]) -> None:
    question = with_attachments([Attachment("x", text) for text in texts], "Why?")
    for text in texts:
        before, _, after = question.partition(":\n")
        fence, _, rest = after.partition("\n")
        assert before == "x" and set(fence) == {"`"} and fence not in text and rest.startswith(f"{text}\n{fence}\n\n")
        question = rest.removeprefix(f"{text}\n{fence}\n\n")
    assert question == "Why?"


def test_a_file_of_nothing_but_fences() -> None:
    text = "`" * 10**5  # to try fence after fence would take minutes
    assert with_attachments([Attachment("a", text)], "") == f"a:\n{text}`\n{text}\n{text}`"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_file_that_only_seems_regular_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # so that a reader would wait
    try:
        monkeypatch.setattr(files.stat, "S_ISREG", lambda mode: True)
        with pytest.raises(RequestError, match="pipe is not a regular file"):
            files.read_bytes(pipe, 100, "the context")
    finally:
        os.close(writer)
