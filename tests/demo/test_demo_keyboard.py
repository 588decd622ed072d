"""Text as people type it: the letters stay the user's, only their look and a few slips change."""

from __future__ import annotations

from random import Random

import pytest

from tools.demo.world.keyboard import CAPITALS, ERRORS, FORMS, LINES, PLAIN, mistyped, over_lines, typed

TEXT = "What did Mira find with the zorbel?"


def test_plain_typing_changes_only_the_look() -> None:
    for seed in range(300):
        text, form = typed(Random(seed), TEXT, PLAIN)
        assert form == PLAIN and "what did mira find with the zorbel" in text.lower()


def test_every_form_is_drawn() -> None:
    assert {typed(Random(seed), TEXT)[1] for seed in range(200)} == set(FORMS)


def test_capitals() -> None:
    text, _ = typed(Random(1), TEXT, CAPITALS)
    assert text == text.upper() and "MIRA" in text


def test_slips_spare_names_and_unknown_words() -> None:
    changed = 0
    for seed in range(200):
        text = mistyped(Random(seed), TEXT)
        assert "Mira" in text and "zorbel" in text and text[0] == "W" and abs(len(text) - len(TEXT)) <= 3
        changed += text != TEXT
    assert changed > 150
    assert mistyped(Random(1), "Mira zorbel dog") == "Mira zorbel dog"


@pytest.mark.parametrize("form", [LINES, ERRORS])
def test_what_is_typed_has_no_blank_edges(form: str) -> None:
    for seed in range(100):
        text, _ = typed(Random(seed), TEXT, form)
        assert text == text.strip() != ""


def test_lines_keep_the_words() -> None:
    for seed in range(100):
        text = over_lines(Random(seed), TEXT)
        assert "\n" in text and TEXT in " ".join(text.split())
