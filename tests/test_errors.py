"""Messages: what stands in them, whoever wrote it, is one short line of visible characters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.errors import one_line, printable

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # surrogates and control characters, too


@given(ANY_TEXT, st.integers(3, 300))
def test_printable_text_is_one_short_visible_line(text, limit):
    shown = printable(text, limit)
    assert shown.isprintable() and len(shown) <= limit
    assert shown == text or not text.isprintable() or len(text) > limit


@pytest.mark.parametrize(
    "text, shown",
    [
        ("layers.0.wörter 漢 🙂", "layers.0.wörter 漢 🙂"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nconvert: done", "a\\nconvert: done"),
        ("\u202eabc\ud800", "\\u202eabc\\ud800"),
        ("a" * 5000, "a" * 133 + "…" + "a" * 65),
    ],
)
def test_printable_text(text, shown):
    assert printable(text) == shown


def test_messages_of_libraries_become_one_line():
    assert one_line(ValueError("a\n  b\x1b")) == "a b\\x1b"
    assert one_line(ValueError()) == "ValueError"
