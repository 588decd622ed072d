"""The form that an answer must have: a JSON schema, a regular expression, one of several texts, or a grammar.

It is checked here, but knows no tokens: see `text/constraint.py`. The `llguidance` library does the parsing.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from bitnet_numba.errors import RequestError, printable, shown

MAX_SOURCE = 64 * 1024  # characters of a schema, an expression or a grammar
MAX_DEPTH = 64  # of values inside values
MAX_MULTIPLE = 10_000  # least common multiple of a schema's multipleOf: time and memory grow with its square
MAX_PATTERNS = 64  # of names of properties, in one object: time grows with their cube
# At most about 30 ms a token, which all answers wait for: that is what initial_lexer_fuel bounds. Compiling is up to
# four times that (see `constraint.GROUPS`), and in the caller's thread. Errors leave out the parser's state.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 50_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# Where schemas stand in a schema: single ones, lists and objects of them.
INNER, INNER_LISTS = ("items", "additionalProperties"), ("prefixItems", "anyOf")
INNER_OBJECTS = ("properties", "patternProperties", "$defs", "definitions")
# Keywords by which a value is held to several schemas at once: a property that one does not name is another's.
COMBINED = (
    "allOf", "oneOf", "not", "if", "dependentSchemas", "dependencies", "unevaluatedProperties", "$dynamicRef",
    "$recursiveRef",
)  # fmt: skip
BESIDE = ("anyOf", "$ref")  # likewise, beside keywords of objects
OF_OBJECTS = ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "propertyNames")
# White space between values is given, not chosen: a small model may go on with line ends for ever.
ONE_LINE: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Grammar:
    """The form that an answer must have. Made by `json`, `json_schema`, `regex`, `choice` or `lark`.

    The answer ends where the form ends. One that reaches `max_new_tokens` before is cut, with finish reason "length".
    """

    source: str = field(repr=False)  # in the library's own notation
    kind: str

    @classmethod
    def json(cls) -> "Grammar":
        """Any JSON object, in one line."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: Any, lenient: bool = False) -> "Grammar":
        """JSON that is valid under a schema (a dict, a bool, or its text), in one line.

        An object has the properties that its schema names, and others only where the schema speaks of them: see
        `without_other_properties`. lenient: keywords that cannot be enforced are ignored. Raises RequestError for what
        is no schema, for such keywords otherwise, and beyond 64 KiB or 64 levels.
        """
        if isinstance(schema, str):
            _check_size("a JSON schema", schema)
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise RequestError(f"a JSON schema must be JSON, not {shown(schema)}") from None
        if not isinstance(schema, dict | bool):
            raise RequestError(f"a JSON schema must be an object or a bool, not {shown(schema)}")
        if isinstance(schema, bool):  # the library knows objects alone
            if not schema:
                raise RequestError("JSON schema: no text has this form")
            schema = {}
        _check_depth(schema)
        _check_cost(schema)
        try:
            text = json.dumps(without_other_properties(schema))
        except (TypeError, ValueError):
            raise RequestError("a JSON schema must consist of what JSON knows") from None
        _check_size("a JSON schema", text)
        source = library().LLMatcher.grammar_from_json_schema(text, overrides={**ONE_LINE, "lenient": lenient})
        return cls._checked(source, "JSON schema")

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """What a regular expression matches as a whole (Rust's dialect: no look-around, no back-references)."""
        _check_text("a regular expression", pattern)
        return cls._checked(library().LLMatcher.grammar_from_regex(pattern), "regular expression")

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Grammar":
        """One of several texts. Raises RequestError unless they are a list of texts, none of them empty."""
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts or "" in texts:
            raise RequestError(f"choices must be a list of texts that are not empty, not {shown(texts)}")
        for text in texts:
            _check_text("a choice", text)
        rule = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        _check_size("a list of choices", rule)
        return cls._checked(library().LLMatcher.grammar_from_lark(rule), "choice")

    @classmethod
    def lark(cls, grammar: str) -> "Grammar":
        """A context-free grammar in Lark's notation, as far as llguidance understands it; its first rule is `start`."""
        _check_text("a grammar", grammar)
        return cls._checked(library().LLMatcher.grammar_from_lark(grammar), "grammar")

    @classmethod
    def _checked(cls, source: str, kind: str) -> "Grammar":
        problem = library().LLMatcher.validate_grammar(source, limits=limits())
        if problem and not problem.startswith("WARNING"):
            raise RequestError(f"{kind}: {library_message(problem)}")
        return cls(source, kind)


def without_other_properties(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with `"additionalProperties": false` for each object that names properties and says nothing of others:
    a small model may go on with properties of its own for ever.

    What is valid under it is valid under the given one. A schema that holds values to several schemas at once (`allOf`,
    `oneOf` and the like) stays as it is, and so does an object that requires more than it names.
    """
    try:
        closed: dict[str, Any] = _closed(schema)
    except _Combined:
        return schema
    return closed


class _Combined(Exception):
    """A schema holds values to several schemas at once."""


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    keys = schema.keys()
    if keys & set(COMBINED) or (keys & set(BESIDE) and keys & set(OF_OBJECTS)):
        raise _Combined
    closed = dict(schema)
    for key, inner in schema.items():
        if key in INNER:
            closed[key] = _closed(inner)
        elif key in INNER_LISTS and isinstance(inner, list | tuple):
            closed[key] = [_closed(each) for each in inner]
        elif key in INNER_OBJECTS and isinstance(inner, dict):
            closed[key] = {name: _closed(each) for name, each in inner.items()}
    named, required, fewest = schema.get("properties"), schema.get("required", ()), schema.get("minProperties", 0)
    if (
        isinstance(named, dict)
        and not keys & {"additionalProperties", "patternProperties"}
        and isinstance(required, list | tuple)
        and all(isinstance(name, str) and name in named for name in required)
        and isinstance(fewest, int)
        and fewest <= len(named)
    ):
        closed["additionalProperties"] = False
    return closed


def library() -> Any:
    """llguidance, imported when it is first needed: it takes 20 ms."""
    import llguidance

    return llguidance


def limits() -> Any:
    """LIMITS as the library takes them."""
    return library().LLParserLimits(**LIMITS)


def library_message(text: str) -> str:
    """One of the library's messages as a line, without its markup."""
    return printable(" ".join(text.replace("<non-verbose/>", "").split()), 300)


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


def _check_cost(schema: object) -> None:
    """Raises RequestError for what would take the library minutes to compile."""
    multiples: list[Fraction] = []
    level = [schema]
    while level:
        for value in level:
            if not isinstance(value, dict):
                continue
            number = value.get("multipleOf")
            if isinstance(number, int | float) and 0 < number < math.inf:
                multiples.append(Fraction(str(number)))
            patterns = value.get("patternProperties")
            if isinstance(patterns, dict) and len(patterns) > MAX_PATTERNS:
                raise RequestError(f"JSON schema: patternProperties may be {MAX_PATTERNS}, not {len(patterns)}")
        level = [inner for outer in level for inner in _inside(outer)]
    unit = math.lcm(*(number.denominator for number in multiples))
    if math.lcm(*(int(number * unit) for number in multiples)) > MAX_MULTIPLE:
        raise RequestError(f"JSON schema: multipleOf may be {MAX_MULTIPLE:,} steps, all together in one schema")


def _inside(value: object) -> Sequence[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list | tuple) else []
