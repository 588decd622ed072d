"""One shape of call: a prompt, parameters, and single fields by name; all ways to ask give the same answer."""

import dataclasses
import inspect
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet_numba as bn
from bitnet_numba.errors import RequestError
from bitnet_numba.sampling import read_sampling
from bitnet_numba.sampling_params import DEFAULT_MAX_NEW_TOKENS, SamplingOverrides, SamplingParams
from tests.engine.toy_backend import TOKENIZER, tokens_of, toy_engine
from tests.strategies import sampling, some_ids

EOT = 1999
HI = [{"role": "user", "content": "Hi."}]
params = st.builds(
    dataclasses.replace,
    sampling,
    max_new_tokens=st.one_of(st.none(), st.integers(1, 20)),
    stop=st.sampled_from([(), ("e",), ("th", "a ")]),
)


def values_of(given: SamplingParams) -> dict[str, Any]:
    return {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}


def same(one: bn.Completion, other: bn.Completion) -> bool:
    return (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)


@settings(max_examples=15)
@given(some_ids, params)
def test_all_ways_to_ask_give_the_same_answer(ids: list[int], asked: SamplingParams) -> None:
    llm, _ = toy_engine(context=48)
    want = llm.generate(ids, asked)
    assert want.stats.generated_tokens <= (asked.max_new_tokens or 48)
    assert same(llm.generate(ids, **values_of(asked)), want)
    assert same(llm.generate(ids, SamplingParams(1.1, seed=9), **values_of(asked)), want)
    stream = llm.stream(ids, asked)
    assert "".join(stream) == want.text and same(stream.result(), want)
    assert same(llm.session().generate(ids, asked), want)
    assert same(llm.session().stream(ids, **values_of(asked)).result(), want)
    batch = [
        *llm.generate_batch([ids], asked),
        *llm.generate_batch([ids], [asked]),
        *llm.generate_batch([ids], max_new_tokens=5),
    ]
    assert same(batch[0], want) and same(batch[1], want) and same(batch[2], llm.generate(ids, max_new_tokens=5))
    assert same(llm.generate_batch([ids], [None], **values_of(asked))[0], want)
    with llm.scheduler(1) as scheduler:
        scheduler.add(ids, asked, seed=asked.seed)
        updates = [update for _ in iter(lambda: scheduler.busy, False) for update in scheduler.step()]
    assert updates[-1].completion is not None and same(updates[-1].completion, want)


def test_chat_follows_the_model_and_generate_is_greedy() -> None:
    llm, _ = toy_engine()
    assert same(llm.chat("Hi."), llm.generate(HI)) and same(
        llm.chat(deque(HI)), llm.generate(HI)
    )  # it recommends nothing
    llm.sampling = SamplingParams(1.5, max_new_tokens=9)
    assert len(llm.chat("Hi.").token_ids) <= 9 and len({llm.chat("Hi.").text for _ in range(4)}) > 1
    assert same(llm.chat("Hi.", seed=3), llm.generate(HI, temperature=1.5, max_new_tokens=9, seed=3))
    assert same(llm.chat("Hi.", seed=3), llm.stream(HI, llm.sampling, seed=3).result())
    assert same(llm.chat("Hi.", SamplingParams()), llm.generate(HI))  # params are taken as they are
    assert same(llm.chat("Hi.", temperature=0, max_new_tokens=512), llm.generate(HI))
    with pytest.raises(RequestError, match="chat answers one text or one list of messages, not .'Hi.', 'Ho."):
        llm.chat(["Hi.", "Ho."])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="chat answers one text or one list of messages, not .5, 6"):
        llm.chat([5, 6])  # type: ignore[list-item]
    for empty in ("", []):
        with pytest.raises(RequestError, match="the prompt is empty"):
            llm.chat(empty)


def test_an_answer_has_a_length_unless_none_is_asked_for() -> None:
    llm, _ = toy_engine(tokens_of("a"), context=1000)
    ways: list[Callable[..., bn.Completion]] = [
        llm.generate,
        llm.chat,
        llm.session().generate,
        lambda prompt, **asked: llm.generate_batch([prompt], **asked)[0],
    ]
    for ask in ways:
        answer = ask(HI)
        assert (len(answer.token_ids), answer.finish_reason) == (DEFAULT_MAX_NEW_TOKENS, "length") == (512, "length")
        assert ask(HI, max_new_tokens=None).finish_reason == "context"
    # Nothing is kept free for what the context cannot hold.
    small, _ = toy_engine(tokens_of("a"), context=20)
    assert small.generate([5]).finish_reason == "context"
    with small.scheduler(max_sequences=1, tokens=20) as scheduler:
        scheduler.add([5])


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("temprature", "did you mean temperature?"),
        ("max_tokens", "did you mean max_new_tokens?"),
        ("max_new_token", "did you mean max_new_tokens?"),
        ("repeat_penalty", "did you mean repetition_penalty?"),
        ("stop_strings", "did you mean stop?"),
        ("topp", "did you mean top_p?"),
        ("x" * 1000, "there are temperature, top_p"),
        ("\x1b[2J", "there are temperature, top_p"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest(name: str, advice: str) -> None:
    llm, backend = toy_engine()
    for method, call in {
        "generate": llm.generate,
        "stream": llm.session().stream,
        "chat": llm.chat,
        "add": llm.scheduler(1).add,
        "astream": llm.astream,
        "generate_batch": lambda prompt, params=None, **asked: llm.generate_batch([prompt], params, **asked),
    }.items():
        with pytest.raises(RequestError) as caught:
            call("x", **{name: 5})  # type: ignore[operator]
        message = str(caught.value)
        assert message.startswith(f"{method} has no option ") and advice in message
        assert message.isprintable() and len(message) <= 350
        with pytest.raises(RequestError, match=f"params of {method} must be SamplingParams, not 50: .*max_new_tokens"):
            call("x", [50] if method == "generate_batch" else 50)  # type: ignore[operator]
    with pytest.raises(RequestError, match=r"generate_batch has no option max_sequence: did you mean max_sequences\?"):
        llm.generate_batch(["x"], max_sequence=3)  # type: ignore[call-arg]
    assert backend.prefilled == []


def test_the_keywords_of_calls_are_the_fields() -> None:
    assert list(SamplingOverrides.__annotations__) == list(values_of(SamplingParams()))
    public = [getattr(bn.Engine, name) for name in ("generate", "stream", "chat", "agenerate", "astream")]
    for call in [*public, bn.Session.generate, bn.Session.stream, bn.Scheduler.add]:
        _, prompt, given, *named, overrides = inspect.signature(call).parameters.values()
        assert all(each.kind == each.KEYWORD_ONLY for each in named)
        assert (given.name, given.default, overrides.kind) == ("params", None, inspect.Parameter.VAR_KEYWORD)


def test_parameters_are_equal_whatever_form_their_stop_strings_have() -> None:
    assert SamplingParams(stop="ab") == SamplingParams(stop=["ab"]) == SamplingParams(stop=iter(["ab"]))
    assert SamplingParams(stop=None) == SamplingParams() and SamplingParams(stop={"ab"}).stop == ("ab",)
    assert len({SamplingParams(stop=["a", "b"]), SamplingParams(stop=("a", "b"))}) == 1
    with pytest.raises(RequestError, match="max_new_tokens must be 1 or more, not 0"):
        SamplingParams(max_new_tokens=0)


def test_parameters_show_what_is_not_the_default() -> None:
    assert repr(SamplingParams()) == "SamplingParams()"
    asked = SamplingParams(0.8, top_k=5, seed=1, max_new_tokens=None, stop="x")
    assert repr(asked) == "SamplingParams(temperature=0.8, top_k=5, seed=1, max_new_tokens=None, stop=('x',))"
    assert eval(repr(asked)) == asked


def test_a_length_that_the_model_recommends(tmp_path: Path) -> None:
    for sample in (True, False):
        (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": sample, "max_new_tokens": 2048}))
        assert read_sampling(tmp_path) == SamplingParams(1.0 if sample else 0.0, max_new_tokens=2048)


def test_a_completion_is_json() -> None:
    llm, _ = toy_engine([*tokens_of("na\u00efve"), EOT])
    done = llm.generate("x")
    told = json.loads(json.dumps(done.to_dict()))
    assert told == dataclasses.asdict(done)
    assert (told["text"], told["finish_reason"]) == ("na\u00efve", "stop")
    assert TOKENIZER.decode(told["token_ids"]) == "na\u00efve" and told["stats"]["memory"] == {"weights": 123}
    assert repr(done.stats).startswith(f"<Stats: 2 prompt tokens, {len(done.token_ids) + 1} generated, ")
    assert len(repr(done.stats)) < 100


def test_a_completion_of_a_real_backend_is_json(tiny_packed: Path) -> None:
    llm = bn.load(tiny_packed, backend="reference", context=64)
    for done in (llm.generate("hello", max_new_tokens=3), llm.generate_batch(["hello"], max_new_tokens=3)[0]):
        assert json.loads(json.dumps(done.to_dict()))["token_ids"] == done.token_ids


def test_the_packages_docstring_lists_what_is_public() -> None:
    words = set((bn.__doc__ or "").replace(",", " ").replace(";", " ").replace("(", " ").replace(")", " ").split())
    missing = [name for name in bn.__all__ if name not in {word.rstrip(".:") for word in words}]
    assert missing == []
    for name in ("BackendError", "ContextFull", "Stream", "AsyncStream", "Update", "Stats", "Prompt", "Tokenizer"):
        assert name in bn.__all__ and getattr(bn, name) is not None
