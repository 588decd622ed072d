"""Answers of a given form, through the engine: they have it, whatever else is asked for and whoever else is served."""

import json
import re
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet_numba as bn
from bitnet_numba.engine.engine import Engine
from bitnet_numba.errors import RequestError
from bitnet_numba.grammar import Grammar
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.text.tokenizer import Tokenizer
from tests.engine.toy_backend import CONFIG, TOKENIZER, VOCAB, ToyBackend, toy_engine

PERSON = Grammar.json_schema(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
CODE = Grammar.regex(r"[a-c]{3}-[0-9]{1,2}")


def check(completion: Any, form: Grammar) -> None:
    if completion.finish_reason == "length":
        return
    assert completion.finish_reason == "stop"
    if form is CODE:
        assert re.fullmatch(r"[a-c]{3}-[0-9]{1,2}", completion.text)
    elif form is PERSON:
        value = json.loads(completion.text)
        assert list(value) == ["name", "age"] and isinstance(value["age"], int) and len(value["name"]) <= 8


@pytest.fixture(scope="module", params=["toy", "cpu"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """A model whose answers have no form of their own."""
    return toy_engine()[0] if request.param == "toy" else bn.load(backend=request.param)


@pytest.mark.parametrize("form", [PERSON, CODE, Grammar.choice(["yes", "no"])])
def test_answers_have_the_form(engine: Engine, form: Grammar) -> None:
    for seed, temperature in enumerate([0.0, 0.7, 5.0]):
        check(engine.generate("Is it?", grammar=form, temperature=temperature, seed=seed), form)
    session = engine.session()
    stream = session.stream("Is it?", grammar=form, max_new_tokens=100, logprobs=1)
    text = "".join(stream)
    assert stream.completion is not None and stream.completion.text == text
    assert stream.completion.token_ids == engine.generate("Is it?", grammar=form, max_new_tokens=100).token_ids
    check(stream.completion, form)
    assert engine.generate("Is it?", grammar=Grammar.choice(["yes", "no"])).text in ("yes", "no")


def test_together_as_alone(engine: Engine) -> None:
    params = [
        SamplingParams(temperature=1.5, seed=i, grammar=[PERSON, None, CODE][i % 3], max_new_tokens=30)
        for i in range(6)
    ]
    together = engine.generate_batch(["Who is it?"] * 6, params)
    for completion, own in zip(together, params, strict=True):
        assert completion.token_ids == engine.generate("Who is it?", own).token_ids
        if own.grammar is not None:
            check(completion, own.grammar)


@settings(max_examples=15)
@given(seed=st.integers(0, 1 << 32), penalty=st.sampled_from([0.0, 2.0]), top_p=st.sampled_from([0.3, 1.0]))
def test_whatever_else_is_asked_for(seed: int, penalty: float, top_p: float) -> None:
    engine = toy_engine()[0]
    params = SamplingParams(
        temperature=1.0, seed=seed, presence_penalty=penalty, frequency_penalty=penalty, top_p=top_p,
        repetition_penalty=1.5, logit_bias={5: 100.0}, grammar=CODE, max_new_tokens=40,
    )  # fmt: skip
    check(engine.generate("x", params), CODE)


def test_a_form_that_is_everything_changes_nothing() -> None:
    """But for special tokens, which no form has inside."""
    engine = toy_engine()[0]
    anything = Grammar.regex(r"(?s:.*)")
    bias = dict.fromkeys(sorted(TOKENIZER.special_ids - TOKENIZER.stop_ids), -100.0)
    # And tokens that end within a character: what follows must complete it.
    broken = [i for i in range(VOCAB) if not whole(TOKENIZER.token_bytes(i))]
    bias |= dict.fromkeys(broken[:900], -100.0)
    for seed in range(5):
        params = SamplingParams(temperature=1.0, seed=seed, logit_bias=bias, max_new_tokens=20)
        assert engine.generate("x", params, grammar=anything).token_ids == engine.generate("x", params).token_ids


def whole(data: bytes) -> bool:
    """Whether these are whole characters, at least one."""
    try:
        return len(data.decode()) > 0
    except UnicodeDecodeError:
        return False


def test_the_end_of_the_form_ends_the_answer_and_nothing_before() -> None:
    engine, backend = toy_engine()
    end = min(TOKENIZER.stop_ids)
    answer = engine.generate("x", grammar=Grammar.regex("a{7}"), logit_bias={end: 100.0})
    assert answer.text == "aaaaaaa" and answer.finish_reason == "stop"
    assert engine.generate("x", grammar=Grammar.regex("a*"), logit_bias={end: 100.0}).text == ""
    assert engine.generate("x", grammar=Grammar.regex("a{7}"), max_new_tokens=1).finish_reason == "length"
    assert isinstance(backend, ToyBackend)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"grammar": "{}"}, "grammar must be a Grammar, not '{}'"),
        ({"grammar": CODE, "min_tokens": 3}, "leave out min_tokens"),
        ({"grammar": CODE, "ignore_eos": True}, "leave out min_tokens and ignore_eos"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        SamplingParams(**fields)


def test_a_model_that_cannot_end_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = toy_engine()[0]
    monkeypatch.setattr(TOKENIZER, "stop_ids", frozenset())
    with pytest.raises(RequestError, match="no token that ends an answer"):
        engine.generate("x", grammar=CODE)


def test_the_reference_has_the_same_definition() -> None:
    answers = [bn.load(backend=backend).generate("Is it?", grammar=CODE).text for backend in ("reference", "cpu")]
    assert answers[0] == answers[1] and re.fullmatch(r"[a-c]{3}-[0-9]{1,2}", answers[0])


def test_a_form_that_becomes_too_complex_ends_its_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = bn.load(backend="reference")
    form = Grammar.choice(["yes"])
    compiled = engine.tokenizer.grammars.compile(form)

    class Failing:
        def allowed(self, out: object) -> None:
            raise RequestError("the form of the answer: too complex")

    monkeypatch.setattr(compiled, "constraint", lambda answer=(): Failing())
    scheduler = engine.scheduler(2)
    failing = scheduler.add("x", grammar=form)
    other = scheduler.add("x", max_new_tokens=3)
    updates = []
    while scheduler.busy:
        updates += scheduler.step()
    scheduler.close()
    errors = {update.request: update.error for update in updates if update.error is not None}
    assert list(errors) == [failing] and isinstance(errors[failing], RequestError)
    assert "too complex" in str(errors[failing])
    assert [u.completion.finish_reason for u in updates if u.request == other and u.completion] == ["length"]


def test_a_tokenizer_that_has_more_tokens_than_the_model() -> None:
    """As where some were added for padding: those are not among what may come next."""
    data = json.loads(TOKENIZER._backend.to_str())
    added = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data["added_tokens"] += [{"id": VOCAB + i, "content": f"<pad {i}>", **added} for i in range(70)]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)), stop_ids=TOKENIZER.stop_ids)
    assert tokenizer.size == VOCAB + 70
    engine = Engine(ToyBackend(), tokenizer, CONFIG, 256)
    for seed in range(3):
        check(engine.generate("x", grammar=CODE, seed=seed, temperature=2.0), CODE)
        anything = engine.generate("x", grammar=Grammar.regex("(?s:.*)"), seed=seed, temperature=5.0)
        assert max(anything.token_ids, default=0) < VOCAB
