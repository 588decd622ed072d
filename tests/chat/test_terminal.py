"""Text made safe for a terminal, and wrapped."""

import re

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from bitnet_numba.chat.terminal import WordWrap, clean


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
