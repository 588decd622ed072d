"""Vocabularies in tiktoken's format: the same encodings as tiktoken, and damaged files."""

import base64
import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from bitnet_numba.errors import TokenizerError
from bitnet_numba.text.tiktoken import (
    SPLIT_PATTERN,
    byte_alphabet,
    from_tiktoken,
    last_merge,
    read_ranks,
    special_tokens,
)
from bitnet_numba.text.tokenizer import Tokenizer
from tests.text.conftest import HI


def train_ranks(extra: int, shuffled: bool, seed: int = 3) -> dict[bytes, int]:
    """A vocabulary with tiktoken's ranks: 256 bytes, then merges in the order learned from made-up words.

    extra: as many tokens on top that no merge may reach. shuffled: ranks of merges in random order, as no training
    would leave them; much of the vocabulary is then made by other merges than it was learned by, or by none.
    """
    rng = random.Random(seed)
    syllables = [a + b for a in ["b", "d", "th", "\u00e9", "\u4e2d", "\U0001f642", "'"] for b in "aeiou"] + [
        "  ",
        "\n",
        "12",
    ]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 5))) for _ in range(400)]
    lines = [" ".join(rng.choices(words, k=30)) for _ in range(200)]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    learned = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    merged = [bytes(byte_of[c] for c in text) for text, _ in learned if len(text) > 1]
    if shuffled:
        rng.shuffle(merged)
    tokens = [*(bytes([byte]) for byte in range(256)), *merged]
    while extra:
        token = "".join(rng.choices("abdeouth \u00e9", k=rng.randint(3, 7))).encode()
        if token not in tokens:
            tokens.append(token)
            extra -= 1
    return {token: rank for rank, token in enumerate(tokens)}


def write_ranks(ranks: dict[bytes, int], path: Path) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["trained", "shuffled"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """The same vocabulary opened by us and by tiktoken."""
    folder = tmp_path_factory.mktemp("tiktoken")
    ranks = train_ranks(extra=40, shuffled=request.param)
    from_tiktoken(write_ranks(ranks, folder / "tokenizer.model"), folder)
    ours = Tokenizer.open(folder)
    named = {name: len(ranks) + i for i, name in enumerate(special_tokens())}
    theirs = tiktoken.Encoding("test", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=named)
    return ours, theirs


@given(text=st.one_of(st.text(), st.text(alphabet="abdeouth \u00e9'\n12\u4e2d\U0001f642", max_size=200)))
def test_encodings_equal_tiktokens(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    assert ours.encode(text, add_bos=False) == theirs.encode(text, disallowed_special=(), allowed_special="all")


@pytest.mark.parametrize("plane", range(17))
def test_encodings_equal_tiktokens_in_every_plane(both: tuple[Tokenizer, Any], plane: int) -> None:
    ours, theirs = both
    points = [chr(plane * 0x10000 + i) for i in range(0, 0x10000, 7) if not 0xD800 <= plane * 0x10000 + i < 0xE000]
    for i in range(0, len(points), 50):
        text = "".join(f"a{c}b {c}1 {c}{c}\n" for c in points[i : i + 50])
        assert ours.encode(text, add_bos=False) == theirs.encode(text, disallowed_special=()), (
            f"near {ascii(points[i])}"
        )


@pytest.mark.parametrize(
    "text",
    [
        "I'm he'LL we'Ve they'rE it'S don'T I'D 'x ''s's \u2019s '\u017f",
        "  a   b\t\tc \t d\r\n\r\n  e \n f   \n\n\n",
        "1 12 123 1234 1234567 1.5e-10 \u0663\u0664 \u00bd \u2167",
        "tho" * 3000,
        "ab" * 1000 + "\u00e9" * 500 + "12" * 500,
        " " * 500 + "x" + "\n" * 300,
        "!?...;;;--- (a)[b]{c}<d> ~~~\n!!!\r\n",
        "\u200b\u00a0\u3000\u2028\x85\x0b\x1c\x00",
    ],
    ids=range(8),
)
def test_encodings_equal_tiktokens_on_odd_text(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    assert ours.encode(text, add_bos=False) == theirs.encode(text, disallowed_special=())


def test_every_token_of_a_tiktoken_vocabulary_survives(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    assert ours.size == theirs.n_vocab
    for i in range(theirs.n_vocab - len(special_tokens())):
        assert ours.token_bytes(i) == theirs.decode_single_token_bytes(i)
    assert ours.encode("<|eot_id|>", add_bos=False) == [theirs.encode_single_token("<|eot_id|>")]
    assert ours.bos_id == theirs.encode_single_token("<|begin_of_text|>")
    assert ours.stop_ids == {theirs.encode_single_token(name) for name in ("<|end_of_text|>", "<|eot_id|>")}
    assert ours.apply_chat_template(HI) == "User: Hi.<|eot_id|>Assistant: "


def test_special_tokens_stand_where_llama_3_has_them() -> None:
    names = special_tokens()
    assert len(names) == len(set(names)) == 256
    assert names[:2] == ["<|begin_of_text|>", "<|end_of_text|>"]
    assert names[5:11] == [
        "<|reserved_special_token_3|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_4|>",
        "<|eot_id|>",
        "<|reserved_special_token_5|>",
    ]


def test_the_last_merge_is_found_by_merging() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5, b"cab": 6, b"cc": 7, b"aab": 8}
    assert last_merge(b"abc", ranks) == 1  # b + c has the lower rank, so a waits
    assert last_merge(b"cab", ranks) == 1
    assert last_merge(b"aab", ranks) == 1
    assert last_merge(b"acb", ranks) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece"),
        (b"", "some single bytes are not tokens"),
        (b"IQ== 0\nIg==\n", "line 2 is not"),
        (b"IQ== 0\n!!! 1\n", "line 2 is not"),
        (b"IQ== 0\nIg== 5\n", "ranks are not 0 to 1"),
        (b"IQ== 0\nIQ== 1\n", "ranks are not 0 to 1"),
        (b"IQ== 0\nIg== 1\n", "some single bytes are not tokens"),
    ],
)
def test_damaged_vocabularies_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        read_ranks(path)


def test_a_missing_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="nowhere cannot be read"):
        from_tiktoken(tmp_path / "nowhere", tmp_path)
