"""The tokenizer of a GGUF file's metadata, as the files of a Hugging Face folder.

tokenizer.json is put together here, without the library, which a damaged vocabulary may bring down: it is opened in
another process first (`Tokenizer.open`, with a trial).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.checkpoint.gguf_file import Numbers, Value
from bitnet_numba.config_keys import shown
from bitnet_numba.errors import TokenizerError
from bitnet_numba.text.tiktoken import BOS, SPLIT_PATTERN

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
# Of the values of tokenizer.ggml.pre: whether whole words are looked up before merging, whether texts start
# with bos by default, the normaliser, the pattern of words.
_Pre = tuple[bool, bool, str | None, str]
_LLAMA3: _Pre = (True, True, None, SPLIT_PATTERN)
PRE_TOKENIZERS: dict[str, _Pre] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": (False, False, "NFC", SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")),
}
_SPACE = "\u2581"  # what sentencepiece writes for a space
_MAX_SPLITS = 8_000_000  # of all tokens of a sentencepiece vocabulary; one of 262,144 tokens has two million


def write_tokenizer_files(metadata: Mapping[str, Value], folder: Path, where: str) -> list[str]:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json; returns notes for the user.

    where: names the file in messages. Raises TokenizerError, naming the key, for what is missing, damaged or not
    supported.
    """
    vocabulary = _Vocabulary(metadata, where)
    write = {
        "tokenizer.json": vocabulary.tokenizer(),
        "tokenizer_config.json": vocabulary.config(),
        "generation_config.json": vocabulary.generation_config(),
    }
    for name, content in write.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    return vocabulary.notes


class _Vocabulary:
    """The keys of a tokenizer, checked."""

    def __init__(self, metadata: Mapping[str, Value], where: str):
        self._metadata, self._where = metadata, where
        model = self._get("model")
        if model not in ("gpt2", "llama"):
            raise self._error("model", f"= {shown(model)} is not supported (gpt2 or llama)")
        self.sentencepiece = model == "llama"
        self.notes: list[str] = []
        self.tokens = self._texts("tokens")
        self.types = self._numbers("token_type", "iu") if "token_type" in self else np.ones(len(self.tokens), np.int32)
        self._drop_bos_before_special_tokens()
        self._pre: _Pre = (False, True, None, "") if self.sentencepiece else self._pre_tokenizer()
        self.scores = self._numbers("scores", "f") if self.sentencepiece else np.zeros(0, np.float32)
        self.add_bos = self._boolean("add_bos_token", self._pre[1])
        self.bos = self._token("bos_token_id", 1 if self.sentencepiece else None)
        self.eos = self._token("eos_token_id", 2 if self.sentencepiece else None)
        self.unknown = self._token("unknown_token_id", 0 if self.sentencepiece else None)
        self._ids: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            if self.types[i] != UNUSED and self._ids.setdefault(token, i) != i:
                raise self._error("tokens", f"has {shown(token)} twice")

    def _drop_bos_before_special_tokens(self) -> None:
        """Some converters wrote special tokens as <|begin_of_text|><|eot_id|>: encoded, which adds bos, and decoded."""
        bos = self._token("bos_token_id", None)
        if bos is None or not self.tokens[bos]:
            return
        half = self.tokens[bos][: len(self.tokens[bos]) // 2]
        start = half if half * 2 == self.tokens[bos] else self.tokens[bos]
        changed = {
            i: token[len(start) :]
            for i, token in enumerate(self.tokens)
            if self.types[i] == CONTROL and len(token) > len(start) and token.startswith(start)
        }
        if changed:
            self.tokens = [changed.get(i, token) for i, token in enumerate(self.tokens)]
            self.notes.append(f"{len(changed)} special tokens began with {shown(start)}, which was dropped")

    def _pre_tokenizer(self) -> _Pre:
        pre, start = self._get("pre"), self._text(self._token("bos_token_id", None))
        if pre in (None, "default") and start == BOS:
            # Microsoft's files of 2B4T do not say it, and bitnet.cpp then splits words in another way than in training.
            pre = "llama-bpe"
            self.notes.append(f"tokenizer.ggml.pre is missing: read as {pre}, since texts start with {BOS}")
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise self._error("pre", f"= {shown(pre)} is not supported (one of {known})")
        return PRE_TOKENIZERS[pre]

    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        special = [self._added(i) for i in range(len(self.tokens)) if self.types[i] in (UNKNOWN, CONTROL, USER_DEFINED)]
        bos, post_processor = self._text(self.bos), None
        if self.add_bos and bos is not None:
            start = {"SpecialToken": {"id": bos, "type_id": 0}}
            post_processor = {
                "type": "TemplateProcessing",
                "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [start, *({"Sequence": {"id": part, "type_id": 0}} for part in "AB")],
                "special_tokens": {bos: {"id": bos, "ids": [self.bos], "tokens": [bos]}},
            }
        parts = self._sentencepiece() if self.sentencepiece else self._byte_level()
        shared = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        model = {"type": "BPE", **shared, **parts.pop("model"), "vocab": self._model_vocabulary()}
        outer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special}
        return {**outer, **parts, "post_processor": post_processor, "model": model}

    def config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        padding = self._token("padding_token_id", None)
        for name, i in (("bos", self.bos), ("eos", self.eos), ("unk", self.unknown), ("pad", padding)):
            if i is not None:
                config[f"{name}_token"] = self.tokens[i]
        config["add_bos_token"] = self.add_bos and self.bos is not None
        template = self._metadata.get("tokenizer.chat_template")
        if template is not None:
            if not isinstance(template, str):
                raise TokenizerError(f"{self._where}: tokenizer.chat_template is not a string")
            config["chat_template"] = template
        return config

    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json: the tokens that end an answer."""
        ends = [self.eos, *(self._token(key, None) for key in ("eot_token_id", "eom_token_id"))]
        config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(i for i in ends if i is not None))}
        return config if self.bos is None else {"bos_token_id": self.bos, **config}

    def _byte_level(self) -> dict[str, Any]:
        ignore_merges, _, normalizer, pattern = self._pre
        merges = []
        for merge in self._texts("merges"):
            left, _, right = merge.partition(" ")
            if not left or not right or " " in right:
                raise self._error("merges", f"has {shown(merge)}, which is not two tokens")
            merges.append((left, right))
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        model = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges}
        return {
            "normalizer": normalizer and {"type": normalizer},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {**model, "merges": merges},
        }

    def _sentencepiece(self) -> dict[str, Any]:
        prefix = self._boolean("add_space_prefix", True)
        space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
        decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
        model = {"unk_token": self._text(self.unknown), "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
        return {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [*([{"type": "Prepend", "prepend": _SPACE}] if prefix else []), space],
            },
            "pre_tokenizer": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    *decoders,
                    *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
                ],
            },
            "model": {**model, "merges": self._merges_by_score()},
        }

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """Every pair of tokens that makes a token, the best score of what it makes first.

        Sentencepiece joins whatever neighbours make the token with the best score.
        """
        if not np.isfinite(self.scores).all():
            raise self._error("scores", "holds NaN or infinity")
        made = [i for i, token in enumerate(self.tokens) if self.types[i] == NORMAL and len(token) > 1]
        if (
            sum(len(self.tokens[i]) for i in made) > _MAX_SPLITS
            or max((len(self.tokens[i]) for i in made), default=0) > 512
        ):
            raise self._error("tokens", "has too long tokens")
        ids, found = self._ids, []
        for i in made:
            token, score = self.tokens[i], -float(self.scores[i])
            for at in range(1, len(token)):
                left, right = ids.get(token[:at]), ids.get(token[at:])
                if left is not None and right is not None:
                    found.append((score, left, right))
        return [(self.tokens[left], self.tokens[right]) for _, left, right in sorted(found)]

    def _model_vocabulary(self) -> dict[str, int]:
        """The tokens of the model itself: without the added ones where these simply follow."""
        added = [i for i in self._ids.values() if self.types[i] in (CONTROL, USER_DEFINED)]
        others = len(self._ids) - len(added)
        follow = added == list(range(others, len(self._ids)))
        if self.sentencepiece or not follow:
            return self._ids
        return {token: i for token, i in self._ids.items() if i < others}

    def _added(self, i: int) -> dict[str, Any]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return {"id": i, "content": self.tokens[i], **flags, "special": bool(self.types[i] != USER_DEFINED)}

    def _text(self, i: int | None) -> str | None:
        return None if i is None else self.tokens[i]

    def __contains__(self, key: str) -> bool:
        return f"tokenizer.ggml.{key}" in self._metadata

    def _get(self, key: str) -> Value | None:
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def _error(self, key: str, what: str) -> TokenizerError:
        return TokenizerError(f"{self._where}: tokenizer.ggml.{key} {what}")

    def _texts(self, key: str) -> list[str]:
        value = self._get(key)
        if not isinstance(value, list) or not value:
            raise self._error(key, "is missing" if value is None else "is not a list of texts")
        return value

    def _numbers(self, key: str, kinds: str) -> NDArray[Any]:
        value = self._get(key)
        values = value.values if isinstance(value, Numbers) else np.zeros(0)
        if values.dtype.kind not in kinds or len(values) != len(self.tokens):
            raise self._error(key, "is missing" if value is None else "is not one number for each token")
        return values

    def _boolean(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is not None and not isinstance(value, bool):
            raise self._error(key, f"= {shown(value)} is not true or false")
        return default if value is None else value

    def _token(self, key: str, default: int | None) -> int | None:
        """The id of a token, None if there is none; llama.cpp writes -1 or a number too large for it, too."""
        value = self._get(key)
        if value is not None and type(value) is not int:
            raise self._error(key, f"= {shown(value)} is not a token")
        i = default if value is None else value
        return i if i is not None and 0 <= i < len(self.tokens) else None
