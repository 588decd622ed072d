"""Decoding, at once and as tokens arrive."""

import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.text.stream_decoder import StreamDecoder
from bitnet_numba.text.tokenizer import Tokenizer
from tests.text.conftest import BOS, EOT, FOLDER, TOKENIZER, sentencepiece_like


def sentencepiece_tokenizer() -> Tokenizer:
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(sentencepiece_like(), named_tokens=named, add_bos=True)


any_ids = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 2100), st.sampled_from([BOS, EOT])), max_size=40)


@given(any_ids, st.booleans(), st.booleans())
def test_streamed_pieces_join_to_the_decoded_text(ids: list[int], skip: bool, pieces: bool) -> None:
    tokenizer = sentencepiece_tokenizer() if pieces else TOKENIZER
    stream = StreamDecoder(tokenizer, skip)
    text = ""
    for i in ids:
        piece = stream.push(i)
        text += piece
        piece.encode()  # no half of anything
    assert text + stream.finish() == tokenizer.decode(ids, skip)
    assert not stream.pending


@given(any_ids, st.booleans())
def test_decoding_equals_the_library_even_for_invalid_bytes(ids: list[int], skip: bool) -> None:
    library = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    known = [i for i in ids if i < 2000]
    assert TOKENIZER.decode(ids, skip) == library.decode(known, skip_special_tokens=skip)


@given(st.text())
def test_decoding_inverts_encoding_and_streams_no_half_character(text: str) -> None:
    for tokenizer in (TOKENIZER, sentencepiece_tokenizer()):
        # Special tokens written in the text are tokens, which decoding skips; without their first sign they are text.
        plain = text.replace("<", "")
        ids = tokenizer.encode(plain)
        stream = StreamDecoder(tokenizer)
        shown = ""
        for i in ids:
            shown += stream.push(i)
            assert plain.startswith(shown)
        assert shown == plain and stream.finish() == ""


def test_half_a_character_waits_for_the_other_half() -> None:
    ids = TOKENIZER.encode("\U0001f642", add_bos=False)
    assert len(ids) > 1  # otherwise this test shows nothing
    stream = StreamDecoder(TOKENIZER)
    assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.pending
    assert stream.push(ids[-1]) == "\U0001f642"
    assert StreamDecoder(TOKENIZER).push(ids[0]) == ""
    assert TOKENIZER.decode(ids[:1]) == "\ufffd"


def test_sentencepiece_spaces() -> None:
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer.encode("hello w\u00e9")
    assert ids[0] == 1 and tokenizer.decode(ids) == "hello w\u00e9"
    assert tokenizer.decode(ids[1:]) == " hello w\u00e9"  # what continues a text keeps its space
    library = sentencepiece_like()
    assert library.decode(ids) == "hello w\u00e9"


def test_half_surrogates_become_replacement_characters() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud83db")) == "a\ufffdb"
