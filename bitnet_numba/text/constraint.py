"""Which tokens may come next in an answer that must have a form (see `bitnet_numba.grammar`)."""

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
KEPT = 64  # compiled grammars of a tokenizer; the least recently used goes


class Constraint:
    """What one answer may go on with. Not safe for use by several threads at a time."""

    def __init__(self, matcher: "llguidance.LLMatcher", size: int, group: int = 0):
        """size: of the vocabulary. group: constraints of other groups can be asked at the same time."""
        self._matcher = matcher
        self._size = size
        self.group = group

    @property
    def finished(self) -> bool:
        """Whether the form is complete and nothing can follow but the end."""
        return bool(self._matcher.is_stopped())

    def allowed(self, out: NDArray[np.uint32]) -> None:
        """Writes which tokens may come next, uint32 [at least vocabulary / 32]: bit i % 32 of word i // 32.

        Tokens that end answers are among them where the form is complete, and alone where nothing else can follow.
        Raises RequestError if the form turns out to be too complex.
        """
        out[:] = 0
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: -(-self._size // 32)]
        if self._matcher.is_error():
            raise RequestError(f"the form of the answer: {library_message(self._matcher.get_error())}")
        out[: words.size] = words
        if self._size % 32:
            out[words.size - 1] &= (1 << self._size % 32) - 1  # what is no token may not come

    def accept(self, token: int) -> bool:
        """Goes on by a token; False if it is not allowed here."""
        return bool(self._matcher.consume_token(token))


class CompiledGrammar:
    """A grammar for one tokenizer: makes the constraints of answers."""

    def __init__(self, matchers: Sequence["llguidance.LLMatcher"], size: int):
        """matchers: at the start of an answer; they take turns. size: of the vocabulary."""
        self._matchers, self._size = itertools.cycle(matchers), size

    def constraint(self, tokens: Sequence[int] = ()) -> Constraint:
        """A new constraint, for an answer that begins with these tokens."""
        matcher = next(self._matchers)
        constraint = Constraint(matcher.deep_copy(), self._size, id(matcher))
        for token in tokens:
            constraint.accept(token)
        return constraint


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those used last. Any thread may use it."""

    def __init__(self, tokenizer: "Tokenizer"):
        llguidance = library()
        self._size = tokenizer.size
        wrapper = llguidance.TokenizerWrapper(_TokenizerView(tokenizer))
        stops = sorted(i for i in tokenizer.stop_ids if i < tokenizer.size)
        self._tokens = llguidance.LLTokenizer(wrapper, eos_token=stops or [tokenizer.size])
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Raises RequestError if the grammar is too complex for this tokenizer."""
        with self._lock:
            compiled = self._compiled.pop(grammar.source, None)
            if compiled is None:
                matchers = []
                for _ in range(min(GROUPS, os.cpu_count() or 1)):
                    matchers.append(library().LLMatcher(self._tokens, grammar.source, log_level=0, limits=limits()))
                    if matchers[-1].is_error():
                        raise RequestError(f"{grammar.kind}: {library_message(matchers[-1].get_error())}")
                compiled = CompiledGrammar(matchers, self._size)
            self._compiled[grammar.source] = compiled
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return compiled


class _TokenizerView:
    """A tokenizer as the library asks for it: the bytes of every token, and the tokens of bytes."""

    bos_token_id = None

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        # The last is for tokenizers without a token that ends an answer: the library needs one.
        self.tokens = [*(tokenizer.token_bytes(i) for i in range(tokenizer.size)), b""]
        self.eos_token_id = tokenizer.size
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("text, not bytes")  # how the library learns what it may give
        return self._tokenizer.encode_plain(text)
