"""Tiktoken-style vocabularies (`tokenizer.model`: one line of base64 and rank per token) as a `tokenizers` BPE.

Tiktoken repeatedly merges the leftmost adjacent pair whose joined bytes have the lowest rank; `tokenizers` needs an
explicit list of pairs. Within the bytes that become one token, no merge crosses the token's border, so the merges
happen in the same order as for the token alone, and the pair that makes it is the last merge of its own encoding. One
merge per token, ordered by rank, therefore gives the same encodings. Tokens that no chain of merges produces are only
matched whole, which `ignore_merges` does as tiktoken does.
"""

import base64
import binascii
import json
import os
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from bitnet_numba.errors import TokenizerError
from bitnet_numba.model_folder import FileError, ModelFile
from bitnet_numba.text.chat_template import BITNET_TEMPLATE

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
SPECIAL_TOKENS = 256
_NAMED = {0: BOS, 1: EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: END_OF_TURN}
NO_RANK = 1 << 62


def special_tokens() -> list[str]:
    """The special tokens that follow the vocabulary, in the order of their ids."""
    reserved = iter(range(SPECIAL_TOKENS))
    return [_NAMED.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(SPECIAL_TOKENS)]


def byte_alphabet() -> list[str]:
    """The character for each byte in byte-level vocabularies: itself where it prints, else from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def read_ranks(path: str | os.PathLike[str] | ModelFile) -> dict[bytes, int]:
    """Token bytes -> rank. Raises TokenizerError, naming file and line, for anything but a complete vocabulary."""
    file = ModelFile.of(path)
    try:
        lines = file.read_bytes().splitlines()
    except FileError as error:
        raise TokenizerError(f"{file} cannot be read: {error}") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            if number == 1:
                raise TokenizerError(
                    f"{file} is not a tiktoken vocabulary (sentencepiece?): save the tokenizer as tokenizer.json first"
                ) from None
            raise TokenizerError(f"{file}: line {number} is not a base64 token and its rank") from None
    if sorted(ranks.values()) != list(range(len(lines))):
        raise TokenizerError(f"{file}: the ranks are not 0 to {len(lines) - 1}, each once")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(f"{file}: some single bytes are not tokens")
    return ranks


def last_merge(token: bytes, ranks: dict[bytes, int]) -> int | None:
    """Index of the byte at which the last merge joins the two parts of a token; None if no chain of merges makes it."""
    starts = list(range(len(token) + 1))  # where the parts start, and the end
    pairs = [ranks.get(token[i : i + 2], NO_RANK) for i in range(len(token) - 1)]  # rank of parts i and i + 1 joined
    while len(pairs) > 1:
        lowest = min(pairs)
        if lowest == NO_RANK:
            return None
        i = pairs.index(lowest)
        del starts[i + 1], pairs[i]
        if i < len(pairs):
            pairs[i] = ranks.get(token[starts[i] : starts[i + 2]], NO_RANK)
        if i > 0:
            pairs[i - 1] = ranks.get(token[starts[i - 1] : starts[i + 1]], NO_RANK)
    return starts[1]


def build_tokenizer(path: str | os.PathLike[str] | ModelFile) -> Tokenizer:
    """A `tokenizers` object that encodes as tiktoken does with a vocabulary file. Raises TokenizerError."""
    ranks = read_ranks(path)
    alphabet = byte_alphabet()
    text = {token: "".join([alphabet[byte] for byte in token]) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            border = last_merge(token, ranks)
            if border is not None:
                merges.append((text[token[:border]], text[token[border:]]))
    vocabulary = {text[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special_tokens()])
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[bos]
    )
    return tokenizer


def from_tiktoken(vocabulary: str | os.PathLike[str] | ModelFile, folder: str | os.PathLike[str]) -> None:
    """Writes the tokenizer of a tiktoken-style `tokenizer.model` as tokenizer.json and tokenizer_config.json.

    Split pattern, special tokens and chat template are those of BitNet b1.58 2B4T, which has Llama 3's vocabulary.
    `folder` must exist. Raises TokenizerError if the file is not such a vocabulary (but sentencepiece's, for example),
    OSError if the folder cannot be written.
    """
    folder = Path(folder)
    # Not by the library's `save`, which raises a bare Exception where the disk is full.
    (folder / "tokenizer.json").write_text(build_tokenizer(vocabulary).to_str(), encoding="utf-8")
    config = {
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": BITNET_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
