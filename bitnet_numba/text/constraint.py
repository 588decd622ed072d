"""Which tokens may come next in an answer that must have a form (see `bitnet_numba.grammar`)."""

import functools
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.errors import RequestError
from bitnet_numba.grammar import Grammar, library, library_message, limits

if TYPE_CHECKING:
    import llguidance

    from bitnet_numba.text.tokenizer import Tokenizer

# Copies of a matcher share a lexer, which one thread at a time can use: so a grammar has several matchers.
GROUPS = 4
MAX_TEXTS, MAX_TEXT = 8192, 256  # whose tokens are kept, and characters of the longest one
KEPT = 64  # compiled grammars of a tokenizer; the least recently used goes


class Constraint:
    """What one answer may go on with. Not safe for use by several threads at a time."""

    def __init__(self, matcher: "llguidance.LLMatcher", size: int, words: int, group: int = 0):
        """size: of the vocabulary. words: of the library's masks. group: constraints of other groups can be asked at
        the same time."""
        self._matcher = matcher
        self._size, self._words = size, words
        self.group = group

    @property
    def finished(self) -> bool:
        """Whether the form is complete and nothing can follow but the end."""
        return bool(self._matcher.is_stopped())

    def allowed(self, out: NDArray[np.uint32]) -> None:
        """Writes which tokens may come next, uint32 [words]: bit i % 32 of word i // 32. A model may have fewer words
        than the tokenizer, or more.

        Tokens that end answers are among them where the form is complete, and alone where nothing else can follow.
        Raises RequestError if the form turns out to be too complex.
        """
        words, target = min(-(-self._size // 32), out.size), out
        if out.size != self._words:  # the library has a word more, or model and tokenizer differ
            target = np.empty(self._words, np.uint32)
        _compute_mask(self._matcher, target, "the form of the answer")
        if target is not out:
            out[:words] = target[:words]
        out[words:] = 0  # what is no token may not come
        if self._size < 32 * words:
            out[words - 1] &= (1 << self._size % 32) - 1

    def accept(self, token: int) -> bool:
        """Goes on by a token; False if it is not allowed here."""
        return bool(self._matcher.consume_token(token))


class CompiledGrammar:
    """A grammar for one tokenizer: makes the constraints of answers."""

    def __init__(self, matchers: Sequence["llguidance.LLMatcher"], size: int, words: int):
        """matchers: at the start of an answer; they take turns. size, words: as for `Constraint`."""
        self._matchers, self._size, self._words = itertools.cycle(matchers), size, words

    def constraint(self, tokens: Sequence[int] = ()) -> Constraint:
        """A new constraint, for an answer that begins with these tokens."""
        matcher = next(self._matchers)
        constraint = Constraint(matcher.deep_copy(), self._size, self._words, id(matcher))
        for token in tokens:
            constraint.accept(token)
        return constraint


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those used last. Any thread may use it."""

    def __init__(self, tokenizer: "Tokenizer"):
        llguidance = library()
        self._size = tokenizer.size
        stops = sorted(i for i in tokenizer.stop_ids if i < tokenizer.size)
        wrapper = llguidance.TokenizerWrapper(_TokenizerView(tokenizer, stops))
        self._tokens = llguidance.LLTokenizer(wrapper, eos_token=stops or [tokenizer.size])
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Raises RequestError if the grammar is too complex for this tokenizer, as its first mask shows, or no text has
        this form."""
        with self._lock:
            compiled = self._compiled.pop(grammar.source, None)
            if compiled is None:
                matchers = []
                for _ in range(min(GROUPS, os.cpu_count() or 1)):
                    matchers.append(library().LLMatcher(self._tokens, grammar.source, log_level=0, limits=limits()))
                    _check(matchers[-1], grammar.kind)
                words = -(-self._tokens.vocab_size // 32)
                compiled, mask = CompiledGrammar(matchers, self._size, words), np.empty(words, np.uint32)
                # Not while other answers wait. Only here does it show that a schema has no beginning, as one that is a
                # reference to itself; and only the next copy tells that the lexer of both has failed: hence twice.
                for matcher in (*matchers, *matchers):
                    _compute_mask(matcher.deep_copy(), mask, grammar.kind)
            self._compiled[grammar.source] = compiled
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return compiled


def _compute_mask(matcher: "llguidance.LLMatcher", out: NDArray[np.uint32], what: str) -> None:
    """Writes what a matcher allows next, in the library's words. Raises RequestError, beginning with `what`."""
    matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
    _check(matcher, what)


def _check(matcher: "llguidance.LLMatcher", what: str) -> None:
    """Raises RequestError, beginning with `what`, if a matcher has failed."""
    if matcher.is_error():
        message = matcher.get_error()
        raise RequestError(f"{what}: {_reason(message)}")


def _reason(message: str) -> str:
    """What a matcher's message means."""
    if message.startswith("NoExtension"):
        return "no text has this form"
    if "Too many items" in message:  # also where one piece of text forces the next without end
        return "it is too complex, or texts of this form have no end"
    return library_message(message)


class _TokenizerView:
    """A tokenizer as the library asks for it: the bytes of every token, and the tokens of bytes.

    Where the form leaves no choice, the library asks for the tokens of the text to come, again after each of them: so
    answers of one form ask for the same few texts time and again, whose tokens are kept.
    """

    bos_token_id = None

    def __init__(self, tokenizer: "Tokenizer", stops: Sequence[int]):
        self._encode = tokenizer.encode_plain
        self._encode_again = functools.lru_cache(MAX_TEXTS)(tokenizer.encode_plain)
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.size)]
        self.eos_token_id = stops[0] if stops else tokenizer.size
        if not stops:
            self.tokens.append(b"")  # the library needs a token that ends an answer
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("text, not bytes")  # how the library learns what it may give
        return self._encode_again(text) if len(text) <= MAX_TEXT else self._encode(text)
