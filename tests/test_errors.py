"""Messages: what stands in them, whoever wrote it, is one short line of visible characters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.errors import one_line, printable, shown

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


class Broken:
    def __repr__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    "value, text",
    [
        (0.5, "0.5"),
        ("tpu", "'tpu'"),
        ("\x1b[2J", "'\\x1b[2J'"),
        (10**5000, "a value of type int"),
        (Broken(), "<Broken instance at "),
        (list(range(10**6)), "[0, 1, 2, 3, 4, 5, ...]"),
        ("a" * 10**6, "'aaaa"),
        ([[]] * 3, "[[], [], []]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_shown_in_one_short_line(value, text):
    assert shown(value).startswith(text)
    assert len(shown(value)) <= 60 and shown(value).isprintable()
