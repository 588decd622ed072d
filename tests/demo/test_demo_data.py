"""What a conversation weighs in the training: what can be right or wrong counts more than what is easy."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest
from tokenizers import Tokenizer

from bitnet_numba.engine.loading import DEMO
from tools.demo.data import (
    ANSWER_WEIGHT,
    ASKED_WEIGHT,
    DECIDING_WEIGHT,
    WordEncoder,
    encode_conversation,
    encode_reply,
    make_rows,
)
from tools.demo.size import BOS, CONTEXT, END, EOT
from tools.demo.world.conversation import OTHER, QUESTION, STORY, Turn, conversation


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def test_words_are_encoded_as_the_tokenizer_does(tokenizer: Tokenizer) -> None:
    encoder = WordEncoder(tokenizer)
    texts = [
        text
        for seed in range(60)
        for turn in islice(conversation(Random(seed)), 12)
        for text in (turn.user, turn.assistant)
    ]
    texts += ["Zoë's DON'T don't  two  spaces \n\n\n x_y 12345 a1b ?!\n :) 東京 Łukasz'll \t tab ", "", " ", "\n"]
    for text in texts:
        assert encoder.ids(text) == tokenizer.encode(text, add_special_tokens=False).ids, text
        assert [end for end, _ in encoder.words(text)][-1:] == ([len(text)] if text else [])


def weighed(tokenizer: Tokenizer, turn: Turn, before: str = "") -> list[tuple[str, int]]:
    ids, weights = encode_reply(WordEncoder(tokenizer), turn, before + turn.assistant)
    assert tokenizer.decode(ids) == before + turn.assistant
    return [(tokenizer.decode([token]), weight) for token, weight in zip(ids, weights, strict=True)]


@pytest.mark.parametrize("before", ["", " "])
def test_yes_and_no_decide(tokenizer: Tokenizer, before: str) -> None:
    turn = Turn("Was Ada a fox?", "No, Ada was an owl.", QUESTION)
    parts = weighed(tokenizer, turn, before)
    deciding = "".join(text for text, weight in parts if weight == DECIDING_WEIGHT)
    assert deciding.strip() == "No" and {weight for _, weight in parts} == {DECIDING_WEIGHT, ANSWER_WEIGHT}


def test_he_and_she_weigh_more_where_a_story_is_told_again(tokenizer: Tokenizer) -> None:
    text = "Zorb was a fox. She ran there, and her friend gave her this." + " They sang." * 80
    parts = weighed(tokenizer, Turn("Again.", text, QUESTION, topic="again"))
    assert [text.strip() for text, weight in parts if weight == ASKED_WEIGHT and text.strip()] == ["She", "her", "her"]
    assert {weight for _, weight in parts} == {1, ASKED_WEIGHT}


@pytest.mark.parametrize(("learned", "heavy"), [(True, "zorbel"), (False, "")])
def test_what_a_story_must_have(tokenizer: Tokenizer, learned: bool, heavy: str) -> None:
    turn = Turn("A zorbel.", "He was a zorbel here.", STORY, mentions=("zorbel",), learned=learned)
    parts = weighed(tokenizer, turn)
    assert "".join(text for text, weight in parts if weight == ASKED_WEIGHT).strip() == heavy
    assert {weight for _, weight in parts} == ({1, ASKED_WEIGHT} if learned else {0})


def test_a_row_counts_what_the_assistant_says(tokenizer: Tokenizer) -> None:
    turns = [Turn("Hello!", "Hi there!", OTHER), Turn("Bye.", "Goodbye!", OTHER)]
    ids, weights = encode_conversation(WordEncoder(tokenizer), Random(1), iter(turns))
    counted = tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight])
    assert ids[0] == BOS and ids.count(EOT) == 4 and counted.split() == ["Hi", "there!Goodbye!"]


def test_rows_depend_on_their_seed_alone(tokenizer: Tokenizer) -> None:
    encoder = WordEncoder(tokenizer)
    both, one = make_rows((7, 2, False), encoder), make_rows((8, 1, False), encoder)
    assert (both[0][1] == one[0][0]).all() and (both[1][1] == one[1][0]).all()
    assert both[0].shape == (2, CONTEXT + 1) and (both[1][both[0] == END] == 0).all()
