"""Answers of a given form: a JSON schema, a regular expression, one of several texts, or a grammar.

A `Grammar` is checked, but knows no tokens. For one model's tokenizer and one answer it becomes a `Constraint`: which
tokens may come next, token by token. The `llguidance` library does the parsing.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_numba.errors import RequestError, printable, shown

if TYPE_CHECKING:
    import llguidance

    from bitnet_numba.text.tokenizer import Tokenizer

MAX_SOURCE = 64 * 1024  # characters of a schema, an expression or a grammar
MAX_DEPTH = 64  # of values inside values
KEPT = 64  # compiled grammars of a tokenizer; the least recently used goes
# About 20 ms to compile and 15 ms a token at worst, and 30 MB. Errors leave out the parser's state.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


@dataclass(frozen=True)
class Grammar:
    """The form that an answer must have. Made by `json`, `json_schema`, `regex`, `choice` or `lark`.

    The answer ends where the form ends. One that reaches `max_new_tokens` before is cut, with finish reason "length".
    """

    source: str = field(repr=False)  # in the library's own notation
    kind: str

    @classmethod
    def json(cls) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: Any) -> "Grammar":
        """JSON that is valid under a schema (a dict, a bool, or its text).

        Raises RequestError for what is no schema, for keywords that cannot be enforced, and beyond 64 KiB or 64 levels.
        """
        if isinstance(schema, str):
            _check_size("a JSON schema", schema)
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise RequestError(f"a JSON schema must be JSON, not {shown(schema)}") from None
        if not isinstance(schema, dict | bool):
            raise RequestError(f"a JSON schema must be an object or a bool, not {shown(schema)}")
        _check_depth(schema)
        try:
            text = json.dumps(schema)
        except (TypeError, ValueError):
            raise RequestError("a JSON schema must consist of what JSON knows") from None
        _check_size("a JSON schema", text)
        return cls._checked(_library().LLMatcher.grammar_from_json_schema(text), "JSON schema")

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """What a regular expression matches as a whole (Rust's dialect: no look-around, no back-references)."""
        _check_text("a regular expression", pattern)
        return cls._checked(_library().LLMatcher.grammar_from_regex(pattern), "regular expression")

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Grammar":
        """One of several texts."""
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts or "" in texts:
            raise RequestError(f"choices must be a list of texts that are not empty, not {shown(texts)}")
        for text in texts:
            _check_text("a choice", text)
        rule = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        _check_size("a list of choices", rule)
        return cls._checked(_library().LLMatcher.grammar_from_lark(rule), "choice")

    @classmethod
    def lark(cls, grammar: str) -> "Grammar":
        """A context-free grammar in Lark's notation, as far as llguidance understands it; its first rule is `start`."""
        _check_text("a grammar", grammar)
        return cls._checked(_library().LLMatcher.grammar_from_lark(grammar), "grammar")

    @classmethod
    def _checked(cls, source: str, kind: str) -> "Grammar":
        problem = _library().LLMatcher.validate_grammar(source, limits=_limits())
        if problem and not problem.startswith("WARNING"):
            raise RequestError(f"{kind}: {_line(problem)}")
        return cls(source, kind)


class Constraint:
    """What one answer may go on with. Not safe for use by several threads at a time."""

    def __init__(self, matcher: "llguidance.LLMatcher", size: int):
        """size: of the vocabulary."""
        self._matcher = matcher
        self._size = size

    @property
    def finished(self) -> bool:
        """Whether the form is complete and nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, out: np.ndarray) -> None:
        """Writes which tokens may come next, uint32 [at least vocabulary / 32]: bit i % 32 of word i // 32.

        An end-of-answer token is among them where the form is complete. Raises RequestError if the form turns out to
        be too complex.
        """
        out[:] = 0
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: -(-self._size // 32)]
        if self._matcher.is_error():
            raise RequestError(f"the form of the answer: {_line(self._matcher.get_error())}")
        out[: words.size] = words
        if self._size % 32:
            out[words.size - 1] &= (1 << self._size % 32) - 1  # what is no token may not come

    def accept(self, token: int) -> bool:
        """Goes on by a token; False if it is not allowed here."""
        return bool(self._matcher.consume_token(token))


class GrammarCompiler:
    """Constraints for the answers of one tokenizer. Any thread may use it."""

    def __init__(self, tokenizer: "Tokenizer"):
        library = _library()
        self._size = tokenizer.size
        wrapper = library.TokenizerWrapper(_TokenizerView(tokenizer))
        stops = sorted(i for i in tokenizer.stop_ids if i < tokenizer.size)
        self._tokens = library.LLTokenizer(wrapper, eos_token=stops or [tokenizer.size])
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, grammar: Grammar) -> Constraint:
        """A new answer's constraint. Raises RequestError if the grammar is too complex for this tokenizer."""
        with self._lock:
            matcher = self._compiled.pop(grammar.source, None)
            if matcher is None:
                matcher = _library().LLMatcher(self._tokens, grammar.source, log_level=0, limits=_limits())
                if matcher.is_error():
                    raise RequestError(f"{grammar.kind}: {_line(matcher.get_error())}")
            self._compiled[grammar.source] = matcher
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return Constraint(matcher.deep_copy(), self._size)


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


def _library() -> Any:
    """llguidance, imported when it is first needed: it takes 20 ms."""
    import llguidance

    return llguidance


def _limits() -> Any:
    return _library().LLParserLimits(**LIMITS)


def _line(message: str) -> str:
    return printable(" ".join(message.split()), 300)


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{what} must be a string, not {shown(text)}")
    _check_size(what, text)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{what} must be valid Unicode") from None


def _check_size(what: str, text: str) -> None:
    if len(text) > MAX_SOURCE:
        raise RequestError(f"{what} may have {MAX_SOURCE:,} characters, not {len(text):,}")


def _check_depth(value: object) -> None:
    """Raises RequestError for a JSON value nested too deeply, however deep it is."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
        if len(level) > MAX_SOURCE:
            break
    raise RequestError(f"a JSON schema may be nested {MAX_DEPTH} levels deep, and have {MAX_SOURCE:,} characters")


def _inside(value: object) -> Sequence[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list | tuple) else []
