"""Answers of a given form: whatever is sampled from the allowed tokens has the form."""

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.engine.loading import DEMO
from bitnet_numba.errors import RequestError
from bitnet_numba.grammar import Grammar
from bitnet_numba.text import constraint as constraints
from bitnet_numba.text.constraint import Constraint, GrammarCompiler
from bitnet_numba.text.tokenizer import Tokenizer
from tests.text.conftest import sentencepiece_like

DEMO_TOKENIZER = Tokenizer.open(DEMO)
COMPILER = GrammarCompiler(DEMO_TOKENIZER)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "tags": {"enum": ["a", 1]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def allowed(constraint: Constraint, vocabulary: int) -> np.ndarray:
    """Ids that may come next."""
    words = np.full(-(-vocabulary // 32) + 1, 0xFFFFFFFF, np.uint32)
    constraint.allowed(words)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def sampled(tokenizer: Tokenizer, compiler: GrammarCompiler, form: Grammar, seed: int, limit: int = 400) -> str | None:
    """A random answer of the form; None if it was not complete after `limit` tokens."""
    rng = np.random.default_rng(seed)
    constraint, ids = compiler.compile(form).constraint(), []
    for _ in range(limit):
        choice = allowed(constraint, tokenizer.size)
        assert choice.size and choice.max() < tokenizer.size
        token = int(rng.choice(choice))
        assert constraint.accept(token)
        if token in tokenizer.stop_ids:
            return tokenizer.decode(ids)
        ids.append(token)
        if constraint.finished:
            return tokenizer.decode(ids)
    return None


@settings(max_examples=30)
@given(seed=st.integers(0, 1 << 30))
def test_sampled_answers_are_valid(seed: int) -> None:
    text = sampled(DEMO_TOKENIZER, COMPILER, Grammar.json_schema(PERSON), seed)
    if text is not None:
        value = json.loads(text)
        assert set(value) <= {"name", "age", "tags"} and isinstance(value["age"], int) and len(value["name"]) <= 12
    text = sampled(DEMO_TOKENIZER, COMPILER, Grammar.regex(r"[a-f]{2,5}(-[0-9]+)?"), seed)
    assert text is None or re.fullmatch(r"[a-f]{2,5}(-[0-9]+)?", text)
    text = sampled(DEMO_TOKENIZER, COMPILER, Grammar.lark('start: "x" | "(" start ")"'), seed)
    assert text is None or re.fullmatch(r"\(*x\)*", text)


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [('{"a": 1, "b": [2, 3]}', True), ('{"a": 1,\n "b": 2}', False), ("{ ", False), ("{\n", False), ("{\t", False)],
)
def test_whitespace_in_json_is_given(text: str, is_allowed: bool) -> None:
    """A model that has nothing to say would go on with blanks until its length ends the answer."""
    constraint = COMPILER.compile(Grammar.json()).constraint()
    assert all(constraint.accept(token) for token in DEMO_TOKENIZER.encode(text, add_bos=False)) == is_allowed


A, ONLY_A, A_AND_B = {"properties": {"a": {"type": "integer"}}}, '{"a": 1}', '{"a": 1, "b": 2}'


@pytest.mark.parametrize(
    ("schema", "text", "is_allowed"),
    [
        (A, ONLY_A, True),
        (A, A_AND_B, False),
        ({**A, "additionalProperties": True}, A_AND_B, True),
        ({**A, "additionalProperties": {"type": "integer"}}, A_AND_B, True),
        ({**A, "patternProperties": {"b": {}}}, A_AND_B, True),
        ({**A, "required": ["a", "b"]}, A_AND_B, True),
        ({**A, "required": ["a"], "minProperties": 2}, A_AND_B, True),
        ({"allOf": [A, {"properties": {"b": {"type": "integer"}}}]}, A_AND_B, True),
        ({"items": A}, f"[{ONLY_A}]", True),
        ({"items": A}, f"[{A_AND_B}]", False),
        ({"anyOf": [A, {"type": "string"}]}, A_AND_B, False),
        ({"anyOf": [{}], **A}, A_AND_B, True),
        ({"$defs": {"A": A}, "properties": {"c": {"$ref": "#/$defs/A"}}}, f'{{"c": {ONLY_A}}}', True),
        ({"$defs": {"A": A}, "properties": {"c": {"$ref": "#/$defs/A"}}}, f'{{"c": {A_AND_B}}}', False),
        ({"$defs": {"A": A}, "$ref": "#/$defs/A", "properties": {"b": {"type": "integer"}}}, A_AND_B, True),
        ({"enum": [{"properties": {"a": 1}, "b": 2}]}, '{"properties": {"a": 1}, "b": 2}', True),
        ({"properties": {"properties": {"properties": {"a": {}}}}}, '{"properties": {"a": 1}}', True),
    ],
    ids=str,
)
def test_objects_have_the_properties_that_are_named(schema: dict[str, Any], text: str, is_allowed: bool) -> None:
    """A small model would go on with others; but who speaks of others gets them."""
    before = json.dumps(schema)
    constraint = COMPILER.compile(Grammar.json_schema(schema)).constraint()
    assert all(constraint.accept(token) for token in DEMO_TOKENIZER.encode(text, add_bos=False)) == is_allowed
    assert json.dumps(schema) == before


AWKWARD = ["yes", "no.", "a|b", "(c)", "d\n\\n", "é", "🐉", "-]^", "<|eot_id|>"]


def test_choices_are_literal() -> None:
    seen = {sampled(DEMO_TOKENIZER, COMPILER, Grammar.choice(AWKWARD), seed) for seed in range(80)}
    assert seen == set(AWKWARD)


def test_any_object_and_both_spellings_of_a_schema() -> None:
    assert Grammar.json() == Grammar.json_schema('{"type": "object"}') != Grammar.json_schema(PERSON)
    for seed in range(5):
        text = sampled(DEMO_TOKENIZER, COMPILER, Grammar.json(), seed)
        assert text is None or isinstance(json.loads(text), dict)
    assert sampled(DEMO_TOKENIZER, COMPILER, Grammar.json_schema({"const": {"a": [1, {}]}}), 0) == '{"a": [1, {}]}'


def test_what_cannot_be_enforced_is_ignored_if_that_is_asked() -> None:
    form = Grammar.json_schema({"enum": [1, 2], "not": {"const": 1}}, lenient=True)
    assert {sampled(DEMO_TOKENIZER, COMPILER, form, seed) for seed in range(20)} == {"1", "2"}


def test_a_sentencepiece_vocabulary() -> None:
    tokenizer = Tokenizer(sentencepiece_like())
    compiler = GrammarCompiler(tokenizer)
    for seed in range(5):
        text = sampled(tokenizer, compiler, Grammar.choice(["{}", "no"]), seed)
        assert text in ("{}", "no")
    assert tokenizer.encode_plain("{}") != tokenizer.encode("{}", add_bos=False)  # no space before a first word


def test_special_tokens_are_never_allowed_inside() -> None:
    constraint = COMPILER.compile(Grammar.regex(r"(?s:.*)")).constraint()
    inside = set(allowed(constraint, DEMO_TOKENIZER.size).tolist()) - DEMO_TOKENIZER.stop_ids
    assert not inside & DEMO_TOKENIZER.special_ids
    special = next(iter(DEMO_TOKENIZER.special_ids))
    assert not constraint.accept(special)
    # In a plain text they are spelled.
    text = "".join(DEMO_TOKENIZER.token_bytes(i).decode() for i in sorted(DEMO_TOKENIZER.special_ids))
    assert not DEMO_TOKENIZER.special_ids & set(DEMO_TOKENIZER.encode_plain(text))
    assert DEMO_TOKENIZER.decode(DEMO_TOKENIZER.encode_plain(text)) == text


def test_a_model_without_a_token_that_ends_answers() -> None:
    tokenizer = Tokenizer.open(DEMO)
    tokenizer.stop_ids = frozenset()
    assert sampled(tokenizer, GrammarCompiler(tokenizer), Grammar.choice(["yes"]), 0) == "yes"


def test_answers_do_not_share_a_state() -> None:
    one, other = (COMPILER.compile(Grammar.choice(["ab", "cd"])).constraint() for _ in range(2))
    first = DEMO_TOKENIZER.encode_plain("a")[0]
    assert one.accept(first) and not one.accept(DEMO_TOKENIZER.encode_plain("c")[0])
    assert first in allowed(other, DEMO_TOKENIZER.size)


def test_an_answer_that_has_begun() -> None:
    form = COMPILER.compile(Grammar.choice(["yes", "yet"]))
    ids = DEMO_TOKENIZER.encode_plain("ye")
    begun, other = form.constraint(ids), form.constraint()
    for token in ids:
        other.accept(token)
    assert np.array_equal(allowed(begun, DEMO_TOKENIZER.size), allowed(other, DEMO_TOKENIZER.size))


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("form", [Grammar.json_schema(PERSON), Grammar.regex(r"(?s:.{0,9})"), Grammar.choice(["yes"])])
def test_masks_are_the_same_in_room_of_any_size(form: Grammar, ends: bool) -> None:
    """Where the room is as large as the library's own masks, they are written in place."""
    tokenizer = Tokenizer.open(DEMO)
    tokenizer.stop_ids = tokenizer.stop_ids if ends else frozenset()
    constraint, least = GrammarCompiler(tokenizer).compile(form).constraint(), -(-tokenizer.size // 32)
    expected = np.frombuffer(constraint._matcher.compute_bitmask(), np.uint8)
    expected = np.flatnonzero(np.unpackbits(expected, bitorder="little")[: tokenizer.size])
    for words in (least, least + 1, least + 7, least - 1, 1):  # a model may lack tokens that were added for padding
        out = np.full(words + 1, 0xA5A5A5A5, np.uint32)
        constraint.allowed(out[:words])
        assert out[words] == 0xA5A5A5A5
        found = np.flatnonzero(np.unpackbits(out[:words].view(np.uint8), bitorder="little"))
        assert np.array_equal(found, expected[expected < 32 * words])


def test_what_leaves_no_choice_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library asks for the tokens of the same texts again, token by token and answer by answer."""
    tokenizer, asked = Tokenizer.open(DEMO), list[str]()
    encode = tokenizer.encode_plain
    monkeypatch.setattr(tokenizer, "encode_plain", lambda text: asked.append(text) or encode(text))
    form = Grammar.json_schema({"type": "object", "properties": {"known": {"type": "boolean"}}, "required": ["known"]})
    compiler = GrammarCompiler(tokenizer)
    texts = {sampled(tokenizer, compiler, form, seed) for seed in range(3)}
    before = len(asked)
    assert texts and len(set(asked)) == before > 0
    assert sampled(tokenizer, compiler, form, 0) in texts and len(asked) == before
    long = "x" * (constraints.MAX_TEXT + 1)
    view = constraints._TokenizerView(tokenizer, [])
    assert view(long) == view(long) == encode(long) and asked[before:] == [long, long]


def deep(levels: int) -> Any:
    schema: Any = True
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("make", "value", "reason"),
    [
        (Grammar.json_schema, {"type": "strnig"}, "strnig"),
        (Grammar.json_schema, {"not": {}}, "Unimplemented keys"),
        (Grammar.json_schema, {"$ref": "http://127.0.0.1/x"}, "does not fetch"),
        (Grammar.json_schema, {"enum": []}, "Unsatisfiable"),
        (Grammar.json_schema, False, "no text has this form"),
        (Grammar.json_schema, "{", "must be JSON"),
        (Grammar.json_schema, "[" * 60_000, "must be JSON"),
        (Grammar.json_schema, 5, "must be an object"),
        (Grammar.json_schema, {"a": {1, 2}}, "what JSON knows"),
        (Grammar.json_schema, deep(5000), "64 levels"),
        (Grammar.json_schema, {"description": "x" * 70_000}, "65,536 characters, not 70,0"),
        (Grammar.regex, "(", "unclosed group"),
        (Grammar.regex, "(" * 30_000 + ")" * 30_000, "invalid regex"),
        (Grammar.regex, "a\ud800", "valid Unicode"),
        (Grammar.regex, None, "must be a string, not None"),
        (Grammar.choice, [], "must be a list"),
        (Grammar.choice, "yes", "must be a list"),
        (Grammar.choice, ["a", ""], "not empty"),
        (Grammar.choice, ["a", 1], "must be a string"),
        (Grammar.lark, "start: NOPE", "unknown name"),
        (Grammar.lark, "start: " + "(" * 20_000 + ")" * 20_000, "deeply nested"),
        (Grammar.lark, 'x: "a"', "start"),
    ],
)
def test_what_is_no_grammar_is_refused_in_one_line(make: Any, value: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        make(value)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"anyOf": [{"$ref": "#"}]},
    ],
)
def test_schemas_that_never_begin_are_refused_before_an_answer(schema: Any) -> None:
    with pytest.raises(RequestError, match="^JSON schema: no text has this form$"):
        COMPILER.compile(Grammar.json_schema(schema))


def test_schemas_that_refer_to_themselves_are_used() -> None:
    COMPILER.compile(Grammar.json_schema({"anyOf": [{"$ref": "#"}, {"type": "null"}]}))


def test_a_schema_that_is_true_takes_any_json() -> None:
    assert Grammar.json_schema(True) == Grammar.json_schema({})


@pytest.mark.parametrize(
    "form",
    [
        lambda: Grammar.regex("((a{1,100}){1,100}){1,100}"),
        lambda: Grammar.regex("(a|aa)*(b|bb)*" * 200),
        lambda: Grammar.lark("start: start start | 'a' | 'aa'".replace("'", '"')),
        lambda: Grammar.json_schema({"type": "string", "pattern": "(.*a){30}"}),
    ],
)
def test_what_explodes_is_bounded(form: Any) -> None:
    """Refused, or used at a bounded cost; never more."""
    try:
        constraint = COMPILER.compile(form()).constraint()
        for _ in range(5):
            token = DEMO_TOKENIZER.encode_plain("a")[0]
            if token not in allowed(constraint, DEMO_TOKENIZER.size) or not constraint.accept(token):
                break
    except RequestError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize(
    "form",
    [
        lambda: Grammar.regex("(a{1000}){1000}"),
        lambda: Grammar.json_schema({"type": "string", "pattern": "^(a{300}){300}$"}),
        lambda: Grammar.json_schema({"type": "integer", "multipleOf": 999983}, lenient=True),
        lambda: Grammar.json_schema({"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]}),
        lambda: Grammar.json_schema({"patternProperties": {f"^{i}[a-z]$": {} for i in range(400)}}),
    ],
)
def test_what_would_hold_up_others_is_refused_before_an_answer_begins(form: Any) -> None:
    with pytest.raises(RequestError) as refused:
        COMPILER.compile(form())
    assert "<" not in str(refused.value), "the library's markup"


def test_large_forms_are_not_refused() -> None:
    for form in (
        Grammar.choice([f"choice number {i} of the many" for i in range(1500)]),
        Grammar.json_schema({"type": "number", "multipleOf": 0.01}),
        Grammar.json_schema({"items": {"type": "integer", "multipleOf": 5}, "prefixItems": [{"multipleOf": 1000}]}),
        Grammar.json_schema({"properties": {f"k{i}": {"type": "string", "maxLength": 500} for i in range(100)}}),
    ):
        assert allowed(COMPILER.compile(form).constraint(), DEMO_TOKENIZER.size).size


def test_compiled_grammars_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "KEPT", 2)
    compiler = GrammarCompiler(DEMO_TOKENIZER)
    forms = [Grammar.choice([text]) for text in ("a", "b", "c")]
    for form in (*forms[:2], forms[0], forms[2]):
        compiler.compile(form)
    assert list(compiler._compiled) == [forms[0].source, forms[2].source]
