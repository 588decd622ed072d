"""Encodes text of which a part may only look like control tokens, because a message of a conversation holds it."""

import functools
import secrets
from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers import AddedToken

from bitnet_numba.errors import TokenizerError

_ANCHORS = ("\x01", "\u0378", "a")  # characters that hardly any token joins to what follows
_MAX_GAP = 1 << 20


class GuardedEncoder:
    """The encoder of a `tokenizers` object, with control tokens that text cannot forge.

    Where nothing needs guarding, the result is the library's own. Otherwise another tokenizer with the same model
    encodes: one that knows the control tokens only by secret names, under which the caller's genuine ones are passed.
    """

    def __init__(self, backend: tokenizers.Tokenizer, controls: Mapping[str, int]):
        """controls: text -> id of the guarded tokens."""
        self._backend = backend
        self._controls = dict(controls)
        self._ids = frozenset(controls.values())

    def encode(self, text: str, found: Sequence[tuple[int, int, bool]], continues: bool = False) -> list[int]:
        """Token ids of a text.

        found: start and end of each text of a control token, in order, and whether it is to stay plain text.
        continues: the text follows other tokens, so it gets no space that the tokenizer writes before a first word.
        """
        if not any(foreign for _, _, foreign in found):
            ids = self._continue(self._backend, text) if continues else self._encode(self._backend, text)
            if sum(i in self._ids for i in ids) <= len(found):
                return ids
            # The tokenizer makes control tokens of other text, too: of full-width letters, for example.
        plain, names, real = self._plain
        parts, position = [], 0
        for start, end, foreign in found:
            if not foreign:
                parts += [text[position:start], names[text[start:end]]]
                position = end
        parts.append(text[position:])
        ids = []
        for i in (self._continue if continues else self._encode)(plain, "".join(parts)):
            if i in real:
                ids.append(real[i])
            elif i in self._ids:  # the model itself has a token of this text
                ids += self._spelled(plain, self._backend.id_to_token(i) or "")
            else:
                ids.append(i)
        return ids

    @functools.cached_property
    def _plain(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """A tokenizer with the same model, the secret name of each control token, and the real ids of added tokens."""
        plain = tokenizers.Tokenizer(self._backend.model)
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(self._backend, part) is not None:
                setattr(plain, part, getattr(self._backend, part))
        key = secrets.token_hex(8)
        # The library numbers added tokens from the size of the vocabulary on, even if that has higher ids.
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        gap = max(vocabulary.values(), default=-1) + 1 - len(vocabulary)
        if gap > _MAX_GAP:
            raise TokenizerError(f"tokenizer.json: {gap:,} ids below the highest have no token")
        plain.add_tokens([AddedToken(f"\ufdd0{key}-{i}", normalized=False) for i in range(gap)])
        names: dict[str, str] = {}
        real: dict[int, int] = {}
        for i, added in sorted(self._backend.get_added_tokens_decoder().items()):
            if added.content in self._controls:
                name = names[added.content] = f"\ufdd0{key}-{i}\ufdd0"
                kept = {flag: getattr(added, flag) for flag in ("lstrip", "rstrip", "single_word")}
                added = AddedToken(name, special=True, normalized=False, **kept)
            plain.add_tokens([added])
            known = plain.token_to_id(added.content)
            if known is not None:
                real[known] = i
        return plain, names, real

    def _spelled(self, plain: tokenizers.Tokenizer, token: str) -> list[int]:
        pieces = [self._encode(plain, character) for character in token]
        return [i for piece in pieces for i in piece if i not in self._ids]

    @staticmethod
    def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    def _continue(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        """As `_encode`, for the text behind a character; that character's own tokens are left out."""
        for anchor in _ANCHORS:
            before = self._encode(backend, anchor)
            whole = self._encode(backend, anchor + text)
            if whole[: len(before)] == before:
                return whole[len(before) :]
        return self._encode(backend, text)
