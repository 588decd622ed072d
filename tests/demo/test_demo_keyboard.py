"""Text as people type it: the letters stay the user's, only their look and a few slips change."""

from __future__ import annotations

from random import Random

import pytest

from tools.demo.world.keyboard import CAPITALS, ERRORS, FORMS, LINES, PLAIN, mistyped, over_lines, typed
from tools.demo.world.lexicon import CONTENT, MISTYPED, like_a_slip

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


def test_a_hard_text_is_hit_where_it_decides() -> None:
    text = "Please tell me another story about something with Mira and the kettle."
    assert "kettle" in CONTENT and "please" not in CONTENT
    hit = [sum("kettle" not in mistyped(Random(seed), text, hard) for seed in range(200)) for hard in (False, True)]
    assert hit[0] < 80 and hit[1] > 170


def test_a_hard_text_is_in_capitals_or_mistyped_more_often() -> None:
    def plain(hard: bool) -> int:
        return sum(typed(Random(seed), TEXT, hard=hard)[1] == PLAIN for seed in range(1000))

    assert plain(True) < 550 < plain(False)


def test_letters_with_accents_belong_to_their_word() -> None:
    assert all(mistyped(Random(seed), "Renécouldé kiteñ") == "Renécouldé kiteñ" for seed in range(50))


def test_every_slip_looks_like_one() -> None:
    words = sorted(word for word in MISTYPED if len(word) > 4)
    for seed, word in enumerate(words[::3]):
        assert like_a_slip(mistyped(Random(seed), word)), word
    assert not any(map(like_a_slip, ("zorbel", "quixatron", "blarf", "bulb")))


@pytest.mark.parametrize("form", [LINES, ERRORS])
def test_what_is_typed_has_no_blank_edges(form: str) -> None:
    for seed in range(100):
        text, _ = typed(Random(seed), TEXT, form)
        assert text == text.strip() != ""


def test_lines_keep_the_words() -> None:
    for seed in range(100):
        text = over_lines(Random(seed), TEXT)
        assert "\n" in text and TEXT in " ".join(text.split())
