"""Lines in any order: nothing fails, and the messages stay those of a conversation."""

import contextlib
import io

from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.chat.interactive import handle
from tests.chat.helpers import toy_chat, toy_conversation

LINES = (
    "Count.", "A longer question about nothing at all.", "/continue", "/regen", "/retry", "/edit", "/undo", "/clear",
    "/system Be kind.", "/system -", "/set length 3", "/set length none", "/set temperature 1", "/set seed 5", "/stats",
    "/copy", "/help", "/set", '"""a\nb"""', "/file nothing", "/load nothing", "word " * 200,
)  # fmt: skip


@given(st.lists(st.sampled_from(LINES), max_size=25), st.booleans())
def test_lines_in_any_order(lines: list[str], raw: bool) -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        chat = toy_chat(toy_conversation("one two three four five", context=100, raw=raw))
        talk = chat.conversation
        for line in lines:
            before = [dict(message) for message in talk.messages]
            assert handle(chat, line)
            assert [m["role"] for m in talk.messages] == ["user", "assistant"] * (len(talk.messages) // 2)
            assert talk.unread % 2 == 0 and talk.unread <= len(talk.messages)
            assert talk.session.held <= talk.session.capacity
            if line == "/continue" and before:
                assert talk.messages[:-1] == before[:-1]
                assert talk.messages[-1]["content"].startswith(before[-1]["content"])
            elif line in ("/regen", "/retry"):
                assert talk.messages[:-1] == before[:-1]
            elif line in LINES[:2] and not raw:
                assert talk.question == line
    assert "failed:" not in shown.getvalue() and "Traceback" not in shown.getvalue()
