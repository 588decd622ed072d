"""Tokenizers from the metadata of GGUF files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_numba.checkpoint.gguf_file import Numbers
from bitnet_numba.checkpoint.gguf_tokenizer import write_tokenizer_files
from bitnet_numba.errors import TokenizerError
from bitnet_numba.text.tiktoken import byte_alphabet
from bitnet_numba.text.tokenizer import Tokenizer
from tests.conftest import GOLDEN


def as_read(metadata: dict[str, Any]) -> dict[str, Any]:
    """Keys as a file has them."""
    return {
        key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}": Numbers(of)
        if isinstance(of, np.ndarray)
        else of
        for key, of in metadata.items()
    }


def build(folder: Path, metadata: dict[str, Any], trial: bool = False) -> Tokenizer:
    write_tokenizer_files(as_read(metadata), folder, "m.gguf")
    return Tokenizer.open(folder, trial=trial)


def test_qwen2(tmp_path: Path) -> None:
    """Digits one by one, NFC, no bos; ids by the Hugging Face tokenizer that the file was made of."""
    recorded = json.loads((GOLDEN / "gguf" / "recorded.json").read_text())["qwen2"]
    metadata = recorded["metadata"]
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], np.int32)
    tokenizer = build(tmp_path, metadata)
    assert tokenizer.bos_id is None and 299 in tokenizer.stop_ids
    for case in recorded["tokens"]:
        assert tokenizer.encode(case["text"]) == case["hf_special"], case["text"]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9") != tokenizer.encode("e")


def byte_level(**changes: Any) -> dict[str, Any]:
    """A vocabulary of the 256 bytes, two more tokens, and special tokens before and behind."""
    tokens = ["<s>", *byte_alphabet(), "ab", "abc", "</s>", "<|end|>", "[PAD7]", "<tool>", "[PAD8]"]
    return {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": tokens,
        "token_type": np.array([3] + [1] * 258 + [3, 3, 5, 4, 5], np.int32),
        "merges": ["a b", "ab c"],
        "bos_token_id": 0,
        "eos_token_id": 259,
        "eot_token_id": 260,
    } | changes


def test_ids_are_those_of_the_file_wherever_special_tokens_are(tmp_path: Path) -> None:
    tokenizer = build(tmp_path, byte_level(), trial=True)
    a, abc = 1 + byte_alphabet().index("a"), 258
    assert tokenizer.encode("abca") == [0, abc, a]
    assert tokenizer.encode("<|end|></s><tool>") == [0, 260, 259, 262]
    assert tokenizer.special_ids == {0, 259, 260} and tokenizer.stop_ids == {259, 260}
    assert tokenizer.decode([abc, 262, 261, 263]) == "abc<tool>", "unused tokens are padding"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [259, 260]


def test_whole_words_come_before_merges_in_llama3_only(tmp_path: Path) -> None:
    metadata = byte_level()
    metadata["tokens"] = [*metadata["tokens"][:258], "xyz", *metadata["tokens"][259:]]
    metadata["merges"] = ["a b"]
    assert build(tmp_path, metadata).encode("xyz") == [0, 258]
    assert len(build(tmp_path, metadata | {"pre": "qwen2"}).encode("xyz")) == 3


@pytest.mark.parametrize(
    "changes, bos",
    [
        ({}, 0),
        ({"add_bos_token": False}, None),
        ({"pre": "qwen2"}, None),
        ({"pre": "qwen2", "add_bos_token": True}, 0),
        ({"bos_token_id": 4294967295}, None),
    ],
)
def test_bos(tmp_path: Path, changes: dict[str, Any], bos: int | None) -> None:
    tokenizer = build(tmp_path, byte_level(**changes))
    assert tokenizer.bos_id == bos
    assert tokenizer._backend.encode("a").ids[:-1] == ([] if bos is None else [bos])


@pytest.mark.parametrize("pre", [None, "default"])
def test_words_of_llama3_where_the_file_does_not_name_them(tmp_path: Path, pre: str | None) -> None:
    """Microsoft's files of 2B4T have no tokenizer.ggml.pre."""
    metadata = byte_level(pre=pre)
    metadata["tokens"] = ["<|begin_of_text|>", *metadata["tokens"][1:]]
    assert write_tokenizer_files(as_read(metadata), tmp_path, "m.gguf") == [
        "tokenizer.ggml.pre is missing: read as llama-bpe, since texts start with <|begin_of_text|>"
    ]
    (tmp_path / "named").mkdir()
    assert write_tokenizer_files(as_read(metadata | {"pre": "llama-bpe"}), tmp_path / "named", "m.gguf") == []
    assert (tmp_path / "named" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("bos", ["<s>", "<s><s>"])
def test_special_tokens_with_bos_before_them(tmp_path: Path, bos: str) -> None:
    """As a converter of 2024 wrote those of Llama 3."""
    metadata = byte_level()
    metadata["tokens"] = [bos, *metadata["tokens"][1:259], "<s></s>", "<s><|end|>", *metadata["tokens"][261:]]
    notes = write_tokenizer_files(as_read(metadata), tmp_path, "m.gguf")
    assert notes == [f"{2 + (bos == '<s><s>')} special tokens began with '<s>', which was dropped"]
    (tmp_path / "sound").mkdir()
    assert write_tokenizer_files(as_read(byte_level()), tmp_path / "sound", "m.gguf") == []
    assert (tmp_path / "sound" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def sentencepiece(**changes: Any) -> dict[str, Any]:
    pieces = ["\u2581", "a", "b", "c", "ab", "bc", "\u2581a", "abc"]
    scores = [-9.0, -9, -9, -9, -2, -1, -3, -4]
    return {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", "<0x41>", *pieces],
        "token_type": np.array([2, 3, 3, 6] + [1] * len(pieces), np.int32),
        "scores": np.array([0, 0, 0, 0, *scores], np.float32),
    } | changes


def test_sentencepiece_joins_the_pair_of_the_best_score(tmp_path: Path) -> None:
    tokenizer = build(tmp_path, sentencepiece(), trial=True)
    # " abc": bc is best; then " a" and "a" + "bc" wait: -3 is before -4.
    assert tokenizer.encode("abc") == [1, 10, 9]
    assert tokenizer.encode("A") == [1, 4, 3], "a character without a token is its bytes"
    assert tokenizer.decode([1, 10, 9, 4, 5]) == " abc a".lstrip() and tokenizer.stop_ids == {2}
    bare = build(tmp_path, sentencepiece(add_space_prefix=False))
    assert bare.encode("abc") == [1, 11]


@pytest.mark.parametrize(
    "metadata, reason",
    [
        ({}, "tokenizer.ggml.model = null is not supported"),
        (byte_level(model="t5"), "tokenizer.ggml.model = 't5' is not supported"),
        (byte_level(pre="mood\x1b"), r"tokenizer.ggml.pre = 'mood\\x1b' is not supported .one of llama-bpe,"),
        (byte_level(pre=None), "tokenizer.ggml.pre = null is not supported"),
        (byte_level(pre=["llama-bpe"]), r"tokenizer.ggml.pre = \['llama-bpe'\] is not supported"),
        (byte_level(tokens=5), "tokenizer.ggml.tokens is not a list of texts"),
        (byte_level(tokens=["a"] * 264), "tokenizer.ggml.tokens has 'a' twice"),
        (byte_level(token_type=np.ones(3, np.int32)), "token_type is not one number for each token"),
        (byte_level(token_type=np.ones(264, np.float32)), "token_type is not one number for each token"),
        (byte_level(merges=["ab"]), "merges has 'ab', which is not two tokens"),
        (byte_level(merges=["a b c"]), "merges has 'a b c', which is not two tokens"),
        (byte_level(bos_token_id="a"), "bos_token_id = 'a' is not a token"),
        (byte_level(add_bos_token=1), "add_bos_token = 1 is not true or false"),
        (byte_level() | {"tokenizer.chat_template": 5}, "tokenizer.chat_template is not a string"),
        (sentencepiece(scores=np.full(12, np.nan, np.float32)), "scores holds NaN or infinity"),
        (sentencepiece(scores=None), "scores is missing"),
        (sentencepiece(tokens=[str(i) + "x" * 600 for i in range(12)]), "tokens has too long tokens"),
        (byte_level(merges=["a zz"]), "tokenizer.json is damaged: .*`zz` out of vocabulary"),
    ],
)
def test_what_is_refused(tmp_path: Path, metadata: dict[str, Any], reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason) as caught:
        write_tokenizer_files(as_read(metadata), tmp_path, "m.gguf")
        Tokenizer.open(tmp_path, trial=True)
    assert "\n" not in str(caught.value)
