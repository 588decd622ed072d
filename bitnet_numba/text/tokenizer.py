"""Text <-> token ids: `tokenizers` with a chat template, stop ids and a streaming detokeniser.

Decoding is done here, from the bytes of each token, so that decoding at once and decoding as tokens arrive are the same
function: the bytes are joined and decoded as UTF-8, with U+FFFD for invalid bytes.
"""

import codecs
import contextlib
import functools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from bitnet_numba.errors import ContextFull, TokenizerError, one_line
from bitnet_numba.json_file import read_json
from bitnet_numba.model_folder import FileError, ModelFile, ModelFolder
from bitnet_numba.text.chat_template import (
    BITNET_TEMPLATE,
    PLAIN_STOP,
    PLAIN_TEMPLATE,
    ChatTemplate,
    Message,
    check_messages,
    find_template,
)
from bitnet_numba.text.tiktoken import BOS, EOS, build_tokenizer, byte_alphabet

_log = logging.getLogger("bitnet_numba")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_AFFIX = re.compile(rb'"(continuing_subword_prefix|end_of_word_suffix)"\s*:\s*"[^"]')
_MARKS = [chr(c) for c in range(0xFDD0, 0xFDF0)]  # noncharacters, which Unicode reserves for internal use


class Tokenizer:
    """A model's tokenizer. Created by `Tokenizer.open`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: str | None = None,
        named_tokens: dict[str, str] | None = None,
        add_bos: bool | None = None,
        stop_ids: Iterable[int] = (),
    ):
        """
        template: Jinja source; None falls back to plain "User: ..." turns.
        named_tokens: the text of bos_token, eos_token, ... as templates see them.
        add_bos: whether texts start with bos_token; None: as the tokenizer's own post-processor does it.
        stop_ids: tokens that end an answer, in addition to eos_token and the template's end of turn.
        """
        self._backend = backend
        named_tokens = named_tokens or {}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        texts = sorted((added[i].content for i in self.special_ids if added[i].content), key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        self._byte_level = _is_byte_level(backend)
        self._bytes: dict[int, bytes] = {}
        self._byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        self.size = max(backend.get_vocab_size(), 1 + max(added, default=-1))  # ids are below this
        self.has_chat_template = template is not None
        self._template = ChatTemplate(PLAIN_TEMPLATE if template is None else template, named_tokens)
        self.chat_stop: tuple[str, ...] = () if self.has_chat_template else (PLAIN_STOP,)
        self.bos_id = self._find_bos(named_tokens.get("bos_token"), add_bos)
        eos = backend.token_to_id(named_tokens.get("eos_token", ""))
        self.stop_ids = frozenset({*stop_ids, *(() if eos is None else (eos,)), *self._end_of_turn()})

    @staticmethod
    def open(folder: str | os.PathLike[str] | ModelFolder, vocab_size: int | None = None) -> "Tokenizer":
        """Reads tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json of a folder.

        Only the first is required. Raises TokenizerError if a file is missing or damaged, or if the tokenizer has ids
        for which a model of `vocab_size` has no embedding.
        """
        folder = ModelFolder.of(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{folder} has no tokenizer.json: convert the model again from a folder that has one")
        config = _read_object(folder / "tokenizer_config.json")
        named = {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                named[key] = _no_surrogates(value)
        add_bos = config.get("add_bos_token")
        generation = _read_object(folder / "generation_config.json")
        tokenizer = Tokenizer(
            _load(path),
            find_template(folder, config),
            named,
            add_bos if isinstance(add_bos, bool) else None,
        )
        tokenizer.stop_ids |= _known_ids(generation.get("eos_token_id"), vocab_size or tokenizer.size)
        if vocab_size is not None and tokenizer.size > vocab_size:
            raise TokenizerError(f"{path} has {tokenizer.size} tokens, but the model has embeddings for {vocab_size}")
        return tokenizer

    def encode(self, text: str, add_bos: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text. Special tokens written in it are parsed as such; there is exactly one bos, at the start.

        Raises ContextFull, before any work, if a text this long cannot fit into `max_tokens` tokens.
        """
        self._check_length(text, max_tokens)
        ids = self._encode(_no_surrogates(text), add_special_tokens=False)
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids. Ids without a token (padding of the embedding) decode to nothing."""
        stream = StreamDecoder(self, skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text that the template makes of [{"role": ..., "content": ...}, ...]. Raises TokenizerError."""
        return self._template.render(messages, add_generation_prompt)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """Token ids of a conversation, including bos; `max_tokens` as for `encode`.

        Special tokens inside a content are read as plain text, so that no message can end its turn or forge another. A
        message with "token_ids" is inserted as exactly these ids, its content is not encoded again: the model's own
        answers stay token for token as it generated them, and the KV cache that holds them can be reused.
        """
        check_messages(messages)
        contents = [message["content"] for message in messages]
        unused = [mark for mark in _MARKS if not any(mark in content for content in contents)]
        if len(unused) < 2:
            raise TokenizerError("the conversation uses up the code points U+FDD0 to U+FDEF, which are not characters")
        cut, slot = unused[:2]
        given: list[Sequence[int]] = []
        marked: list[dict[str, Any]] = []
        for message in messages:
            if message.get("token_ids"):
                content = f"{slot}{len(given)}{slot}"
                given.append(message["token_ids"])
            else:
                content = self._special_text.sub(lambda m: m[0][:1] + cut + m[0][1:], message["content"])
            marked.append({**message, "content": content})
        text = self._template.render(marked, add_generation_prompt)
        parts = text.split(slot)
        self._check_length("".join(parts[::2]).replace(cut, ""), max_tokens)
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.extend(given[int(part)])
            else:
                for piece in part.split(cut):
                    ids.extend(self.encode(piece, add_bos=False))
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    @functools.cached_property
    def longest_token(self) -> int:
        """An upper bound for the bytes of any token."""
        return max((len(text.encode()) for text in self._backend.get_vocab()), default=1)

    def _check_length(self, text: str, max_tokens: int | None) -> None:
        if max_tokens is not None and len(text) > max_tokens * self.longest_token:
            raise ContextFull(f"the prompt has {len(text):,} characters, but the context holds {max_tokens} tokens")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token (UTF-8 for special ones); empty for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._token_bytes(token_id)
        return known

    def _token_bytes(self, token_id: int) -> bytes:
        text = self._backend.id_to_token(token_id) if 0 <= token_id < self.size else None
        if text is None:
            return b""
        if token_id in self.special_ids:
            return text.encode()
        if self._byte_level:
            # A token that was added to the vocabulary later may hold characters outside the alphabet.
            known = [self._byte_of.get(character) for character in text]
            return text.encode() if None in known else bytes(byte for byte in known if byte is not None)
        byte = _BYTE_TOKEN.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()

    def starts_with_space(self, first_id: int) -> bool:
        """Whether decoding from this token on has to drop one leading space.

        Sentencepiece vocabularies put a space before the first word of a text. An answer that continues a text does not
        begin with bos and keeps its space.
        """
        return not self._byte_level and first_id == self.bos_id

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with _library_errors("the tokenizer cannot encode this text"):
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _find_bos(self, named: str | None, add_bos: bool | None) -> int | None:
        own = self._encode("", add_special_tokens=True)
        if add_bos is None:
            return own[0] if own else None
        return self._backend.token_to_id(named) if add_bos and named is not None else None

    def _end_of_turn(self) -> list[int]:
        """The special token that the template puts after an answer: the model was trained to end with it."""
        try:
            text = self._template.render(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARKS[0]}], False
            )
        except TokenizerError:  # a template may refuse this conversation and accept others
            return []
        token = self._special_text.match(text.rpartition(_MARKS[0])[2].lstrip())
        token_id = self._backend.token_to_id(token[0]) if token else None
        return [] if token_id is None else [token_id]


class StreamDecoder:
    """Decodes token by token. The pieces, joined, are exactly `tokenizer.decode` of all ids.

    Bytes of an incomplete character are held back until later tokens complete it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._drop_space = False

    @property
    def pending(self) -> bool:
        """Whether bytes of an incomplete character are held back."""
        return bool(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        if self._first:
            self._first, self._drop_space = False, self._tokenizer.starts_with_space(token_id)
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._drop_space and data and token_id not in self._tokenizer.special_ids:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """The rest: U+FFFD if the last character is incomplete, otherwise nothing."""
        return self._utf8.decode(b"", final=True)


def from_tiktoken(vocabulary: str | os.PathLike[str] | ModelFile, folder: str | os.PathLike[str]) -> Tokenizer:
    """Writes the tokenizer of a tiktoken-style `tokenizer.model` as tokenizer.json and tokenizer_config.json.

    Split pattern, special tokens and chat template are those of BitNet b1.58 2B4T, which has Llama 3's vocabulary.
    `folder` must exist. Raises TokenizerError if the file is not such a vocabulary (but sentencepiece's, for example).
    """
    folder = Path(folder)
    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": BITNET_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Tokenizer.open(folder)


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turns any exception of the library into a TokenizerError; its panics derive from BaseException."""
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{what}: {one_line(error)}") from None


def _load(path: ModelFile) -> tokenizers.Tokenizer:
    try:
        data = path.read_bytes()
    except FileError as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from None
    with _library_errors(f"{path} is damaged"):
        # With an affix that the vocabulary does not match, the library aborts the process; no BitNet model has one.
        if affix := _AFFIX.search(data):
            raise TokenizerError(f"{path}: {affix[1].decode()} is not supported")
        return tokenizers.Tokenizer.from_buffer(data)


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether tokens are in GPT-2's byte alphabet (not sentencepiece's text). TokenizerError for other kinds."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"Metaspace", "ByteFallback"}:
        return False
    raise TokenizerError(f"tokenizer.json: a decoder of type {decoder.get('type')} is not supported")


def _known_ids(value: object, size: int) -> frozenset[int]:
    """eos_token_id of generation_config.json, one or a list. Ids outside the vocabulary are ignored with a warning."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    known = set()
    for i in ids:
        if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size:
            known.add(i)
        else:
            _log.warning("generation_config.json: eos_token_id %.60r is not a token of this model; ignored", i)
    return frozenset(known)


def _no_surrogates(text: str) -> str:
    """Replaces lone surrogates, which a terminal or a JSON file can produce, by U+FFFD: they have no UTF-8."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _read_object(path: ModelFile) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file."""
    return read_json(path, TokenizerError) if path.exists() else {}
