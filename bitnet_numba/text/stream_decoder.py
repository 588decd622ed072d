"""Token ids to text as they arrive: the bytes of tokens, joined and decoded as UTF-8, with U+FFFD for invalid ones."""

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitnet_numba.text.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes token by token. The pieces, joined, are exactly `tokenizer.decode` of all ids.

    Bytes of an incomplete character are held back until later tokens complete it.
    """

    def __init__(self, tokenizer: "Tokenizer", skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._text_of = tokenizer.text_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._drop_space = False
        self.pending = False  # whether bytes of an incomplete character are held back

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        if not (self.pending or self._first or self._drop_space):
            text = self._text_of[token_id]
            if text is not None:  # as is that of nearly every token
                return "" if token_id in self._skipped else text
        if self._first:
            self._first, self._drop_space = False, self._tokenizer.starts_with_space(token_id)
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.bytes_of[token_id]
        if self._drop_space and data and token_id not in self._tokenizer.special_ids:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decode(data)

    def _decode(self, data: bytes) -> str:
        text = self._utf8.decode(data)
        self.pending = bool(self._utf8.getstate()[0])
        return text

    def push_all(self, ids: Sequence[int]) -> str:
        """The text that several tokens complete: of each, `push`, joined, but quicker."""
        first = 0
        pieces = []
        while first < len(ids) and (self._first or self._drop_space):
            pieces.append(self.push(ids[first]))
            first += 1
        bytes_of, skipped = self._tokenizer.bytes_of, self._skipped
        data = b"".join([bytes_of[token] for token in ids[first:] if token not in skipped])
        return "".join([*pieces, self._decode(data)])

    @property
    def state(self) -> tuple[bool, bool, tuple[bytes, int]]:
        """What it goes on from; set it to go on from there again."""
        return self._first, self._drop_space, self._utf8.getstate()

    @state.setter
    def state(self, state: tuple[bool, bool, tuple[bytes, int]]) -> None:
        self._first, self._drop_space, utf8 = state
        self._utf8.setstate(utf8)
        self.pending = bool(utf8[0])

    def finish(self) -> str:
        """The rest: U+FFFD if the last character is incomplete, otherwise nothing."""
        self.pending = False
        return self._utf8.decode(b"", final=True)
