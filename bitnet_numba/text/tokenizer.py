"""Text <-> token ids: `tokenizers` with a chat template and stop ids.

Decoding is our own, from the bytes of each token, so that decoding at once and decoding as tokens arrive are the same
function (see `stream_decoder`).
"""

import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tokenizers

from bitnet_numba.errors import ContextFull, RequestError, TokenizerError
from bitnet_numba.model_folder import FileError, ModelFile, ModelFolder
from bitnet_numba.text.chat_encoder import ChatEncoder
from bitnet_numba.text.chat_template import (
    PLAIN_STOP,
    PLAIN_TEMPLATE,
    Message,
    find_template,
    read_ids,
    without_surrogates,
)
from bitnet_numba.text.constraint import GrammarCompiler
from bitnet_numba.text.guarded_encoder import GuardedEncoder
from bitnet_numba.text.stream_decoder import StreamDecoder
from bitnet_numba.text.thoughts import ThoughtReader, check_thoughts
from bitnet_numba.text.tiktoken import byte_alphabet
from bitnet_numba.text.tokenizer_files import (
    eos_ids,
    is_byte_level,
    library_errors,
    load_backend,
    named_tokens,
    read_object,
    try_once,
)
from bitnet_numba.text.tool_messages import Tools

_log = logging.getLogger("bitnet_numba")
KEPT_STOPS = 64  # sets of first bytes of stop strings whose tokens are remembered
T = TypeVar("T")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """A model's tokenizer. Created by `Tokenizer.open`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: str | None = None,
        named_tokens: Mapping[str, object] | None = None,
        add_bos: bool | None = None,
        stop_ids: Iterable[int] = (),
        refusal: str | None = None,
    ):
        """
        template: Jinja source; None falls back to plain "User: ..." turns.
        named_tokens: the text of bos_token, eos_token, ... as templates see them.
        add_bos: whether texts start with bos_token; None: as the tokenizer's own post-processor does it.
        stop_ids: tokens that end an answer, in addition to eos_token and the template's end of turn.
        refusal: why the model's own template cannot be used; then chats are refused with this reason.
        """
        self._backend = backend
        named = named_tokens or {}
        self._added = backend.get_added_tokens_decoder()
        # Ids of special tokens, which decoding skips.
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self._byte_level = is_byte_level(backend)
        self.bytes_of: Mapping[int, bytes] = _FoundOnce(self._find_bytes)  # as `token_bytes`, but quicker
        # The text of a token by itself; None if its bytes are not whole characters.
        self.text_of: Mapping[int, str | None] = _FoundOnce(lambda token: _whole_text(self.bytes_of[token]))
        self._having: dict[frozenset[int], Mapping[int, bool]] = {}  # see `tokens_with`
        self._byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        self.size = max(backend.get_vocab_size(), 1 + max(self._added, default=-1))  # ids are below this
        self.bos_id = self._find_bos(named.get("bos_token"), add_bos)  # of the token that texts start with; None: none
        self.has_chat_template = template is not None or refusal is not None
        # Stop strings of chats: without a template, where the user's next turn would begin.
        self.chat_stop: tuple[str, ...] = () if self.has_chat_template else (PLAIN_STOP,)
        self._refusal = refusal
        self._chat: ChatEncoder | None = None
        if refusal is None:
            try:
                self._chat = ChatEncoder(backend, PLAIN_TEMPLATE if template is None else template, named)
            except TokenizerError as error:
                self._refusal = str(error)
        if self._refusal is not None:
            _log.warning("%s; chats will be refused, but raw text can be continued", self._refusal.rstrip("."))
        self.eos_id = self._id_of(named.get("eos_token"))
        ends = {*stop_ids, self.eos_id, self._chat.end_of_turn if self._chat else None}
        self.stop_ids = frozenset(i for i in ends if i is not None)  # of tokens that end an answer

    def __repr__(self) -> str:
        return f"<Tokenizer: {self.size:,} tokens>"

    @staticmethod
    def open(
        folder: str | os.PathLike[str] | ModelFolder,
        vocab_size: int | None = None,
        trial: bool = False,
        passed: Path | None = None,
    ) -> "Tokenizer":
        """Reads the tokenizer of a folder: tokenizer.json and, where there are any, tokenizer_config.json,
        special_tokens_map.json, generation_config.json, config.json and chat templates.

        trial: opens tokenizer.json in another process first, since a damaged one can end the process. passed: the
            folder that notes those that have passed, which are not tried again.

        Raises TokenizerError if a file is missing or damaged, or if the tokenizer's vocabulary is larger than a model's
        of `vocab_size`. A chat template that cannot be used is told, and then only chats are refused. A token that was
        added beyond the model's vocabulary (for padding) does no harm until a prompt has it.
        """
        folder = ModelFolder.of(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise TokenizerError(f"{folder} has no tokenizer.json: convert the model again from a folder that has one")
        config = read_object(folder / "tokenizer_config.json")
        named = named_tokens(config, read_object(folder / "special_tokens_map.json"))
        add_bos = config.get("add_bos_token")
        template = refusal = None
        try:
            template = find_template(folder, config)
        except TokenizerError as error:
            refusal = str(error)
        try:
            data = path.read_bytes()
        except FileError as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from None
        if trial:
            try_once(data, path, passed)
        tokenizer = Tokenizer(
            load_backend(data, path), template, named, add_bos if isinstance(add_bos, bool) else None, refusal=refusal
        )
        tokenizer.stop_ids |= eos_ids(folder, vocab_size or tokenizer.size)
        tokenizer._check_size(path, vocab_size)
        return tokenizer

    def _check_size(self, path: ModelFile, vocab_size: int | None) -> None:
        size = self._backend.get_vocab_size(with_added_tokens=False)
        if vocab_size is None or max(size, self.bos_id or 0) < vocab_size:
            return
        if size > vocab_size:
            raise TokenizerError(f"{path} has {size} tokens, but the model has embeddings for {vocab_size}")
        if self.bos_id is not None and self.bos_id >= vocab_size:
            raise TokenizerError(f"{path}: the first token of texts is {self.bos_id}, but the model has {vocab_size}")

    def encode(self, text: str, add_bos: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text. Special tokens written in it are parsed as such; there is exactly one bos, at the start.

        add_bos: False leaves it out, unless the text begins with it. max_tokens: how many there is room for.

        Raises RequestError if `text` is not a string, and ContextFull, before any work, if a text this long cannot fit
        into `max_tokens` tokens.
        """
        if not isinstance(text, str):
            raise RequestError(f"a text must be a string, not {type(text).__name__}")
        self._check_length(text, max_tokens)
        return self._with_bos(self._encode(without_surrogates(text), add_special_tokens=False), add_bos)

    def _with_bos(self, ids: list[int], add_bos: bool = True) -> list[int]:
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in the middle of another one: without bos, and special tokens in it stay plain text."""
        with library_errors("the tokenizer cannot encode this text"):
            guarded, names = self._plain
            found = [(*match.span(), True) for match in names.finditer(text)] if names.pattern else []
            return guarded.encode(without_surrogates(text), found, continues=True)

    @functools.cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles grammars for this tokenizer. Made when it is first needed: that takes up to a second."""
        return GrammarCompiler(self)

    @functools.cached_property
    def _plain(self) -> tuple[GuardedEncoder, re.Pattern[str]]:
        special = {self._added[i].content: i for i in sorted(self.special_ids)}
        longest_first = sorted(special, key=len, reverse=True)
        return GuardedEncoder(self._backend, special), re.compile("|".join(map(re.escape, longest_first)))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids. Ids without a token (padding of the embedding) decode to nothing.

        skip_special: special tokens decode to nothing, too.

        Raises RequestError if `ids` are not integers.
        """
        stream = StreamDecoder(self, skip_special)
        return stream.push_all(read_ids(ids, "decode")) + stream.finish()

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Tools | None = None,
        thinking: bool | None = None,
    ) -> str:
        """The text that the template makes of [{"role": ..., "content": ...}, ...].

        add_generation_prompt: the text ends where the model's answer begins.
        continue_final_message: the text ends with the last message's content, which the model goes on with.
        tools: functions that the model may call (see `text.tool_messages`); where the template does not take them, the
        system's message tells of them. thinking: whether the model thinks before it answers; None: as the template does
        where it is not told.

        Raises RequestError if the messages are not a conversation, or the template has no such switch, and
        TokenizerError if the template fails.
        """
        return self._chats().trace(messages, add_generation_prompt, continue_final_message, tools, thinking)[1].text

    @property
    def call_tags(self) -> tuple[str, str]:
        """What stands before and after a call of a function in an answer. Raises TokenizerError without a template."""
        return self._chats().call_tags

    def check_thinking(self, thinking: bool | None) -> None:
        """Raises RequestError if the model is told to think, or not to, and its template has no switch for that."""
        if thinking is not None:
            self._chats().check_thinking(thinking)

    def thoughts(self, thinking: bool | None = None, begun: str | None = None) -> ThoughtReader | None:
        """What tells the thought of an answer from the answer; None if the model marks no thoughts.

        begun: the beginning of an answer that the model goes on with.

        Raises RequestError for another `thinking`, or a beginning that is not a string.
        """
        check_thoughts(thinking, begun)
        return None if self._chat is None else self._chat.thoughts(thinking, begun)

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
        continue_final_message: bool = False,
        tools: Tools | None = None,
        thinking: bool | None = None,
    ) -> list[int]:
        """Token ids of a conversation, including bos: those of the template's text. Arguments and errors as for
        `apply_chat_template`, and `max_tokens` as for `encode`.

        Special tokens and turn markers inside a content are read as plain text, so that no message can end its turn or
        forge another. Where the template keeps the content of a message with "token_ids", these ids are used as far as
        their text is the same and none is such a token: the model's own answers stay token for token as it generated
        them, and the KV cache that holds them can be reused.
        """
        chats = self._chats()
        read, trace = chats.trace(messages, add_generation_prompt, continue_final_message, tools, thinking)
        self._check_length(trace.text, max_tokens)
        with library_errors("the tokenizer cannot encode this text"):
            return self._with_bos(chats.encode(read, trace, lambda: StreamDecoder(self)))

    def _chats(self) -> ChatEncoder:
        if self._chat is None:
            raise TokenizerError(str(self._refusal))
        return self._chat

    def special_stops(self, stops: Sequence[str]) -> frozenset[int]:
        """The ids of the special tokens among stop strings: these never match as strings, for decoding skips them."""
        texts = {stop.strip() for stop in stops}
        return frozenset(i for text in texts - {""} for i in self._special_ids_by_text.get(text, ()))

    @functools.cached_property
    def _special_ids_by_text(self) -> dict[str, list[int]]:
        """The ids of special tokens by their text, without white space around it."""
        found: dict[str, list[int]] = {}
        for i in self.special_ids:
            found.setdefault(self._added[i].content.strip(), []).append(i)
        return found

    @functools.cached_property
    def longest_token(self) -> int:
        """An upper bound for the bytes of any token."""
        return max((len(text.encode()) for text in self._backend.get_vocab()), default=1)

    def _check_length(self, text: str, max_tokens: int | None) -> None:
        if max_tokens is not None and len(text) > max_tokens * self.longest_token:
            raise ContextFull(f"the prompt has {len(text):,} characters, but the context holds {max_tokens} tokens")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token (UTF-8 for special ones); empty for an id without a token."""
        return self.bytes_of[token_id]

    def _find_bytes(self, token_id: int) -> bytes:
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

    def tokens_with(self, characters: Iterable[str]) -> Mapping[int, bool]:
        """Whether each token has the first byte of one of these characters.

        None of them is in the text of tokens that have none, unless it began in a token before.
        """
        wanted = set(characters)
        # U+FFFD also stands for bytes that are no character.
        first = range(256) if "\ufffd" in wanted else (text.encode(errors="replace")[0] for text in wanted)
        key = frozenset(first)
        if key not in self._having:
            if len(self._having) >= KEPT_STOPS:
                self._having.clear()
            self._having[key] = _FoundOnce(lambda token: not key.isdisjoint(self.bytes_of[token]))
        return self._having[key]

    def starts_with_space(self, first_id: int) -> bool:
        """Whether decoding from this token on has to drop one leading space.

        Sentencepiece vocabularies put a space before the first word of a text. An answer that continues a text does not
        begin with bos and keeps its space.
        """
        return not self._byte_level and first_id == self.bos_id

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with library_errors("the tokenizer cannot encode this text"):
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _id_of(self, text: object) -> int | None:
        return self._backend.token_to_id(text) if isinstance(text, str) else None

    def _find_bos(self, named: object, add_bos: bool | None) -> int | None:
        if add_bos is not None:
            return self._id_of(named) if add_bos else None
        # The post-processor may also write tokens behind a text, which is not what a prompt is to end with.
        bare, whole = (self._encode("a", add_special_tokens=special) for special in (False, True))
        before = len(whole) - len(bare)
        while before > 0 and whole[before : before + len(bare)] != bare:
            before -= 1
        return whole[0] if before > 0 else None


def _whole_text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


class _FoundOnce(dict[int, T]):
    """What a function finds for tokens: it is asked once for each, when that is first needed."""

    def __init__(self, find: Callable[[int], T]):
        super().__init__()
        self._find = find

    def __missing__(self, token_id: int) -> T:
        found = self[token_id] = self._find(token_id)
        return found
