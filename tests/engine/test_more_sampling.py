"""What a request may ask for beside the basic settings: where an answer ends, what is told of its tokens, several of
them. On every way to ask; alone as in company."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bitnet_numba as bn
from bitnet_numba.engine.asynchronous import results
from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.loading import DEMO
from bitnet_numba.engine.scheduler import Update
from bitnet_numba.errors import ContextFull, RequestError
from bitnet_numba.sampling import sample, token_logprobs
from bitnet_numba.sampling_params import SamplingParams
from tests.engine.toy_backend import TOKENIZER, tokens_of, toy_engine, toy_logits
from tests.kernels.harness import needs_gpu
from tests.strategies import seeds, some_ids

ids_below = st.integers(0, 1989)
asked = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    seed=seeds,
    max_new_tokens=st.integers(8, 20),
    stop=st.sampled_from([(), "e", ("th", "a b")]),
    stop_token_ids=st.lists(ids_below, max_size=200),
    presence_penalty=st.sampled_from([0.0, 1.0, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.dictionaries(ids_below, st.floats(-5, 5), max_size=5),
    min_tokens=st.integers(0, 8),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 3),
)


def told(completion: Completion) -> tuple[object, ...]:
    """All but the times."""
    c = completion
    return c.text, c.token_ids, c.finish_reason, c.logprobs, c.prompt_logprobs


@settings(max_examples=40)
@given(st.lists(st.tuples(some_ids, asked), min_size=1, max_size=4))
def test_all_ways_to_ask_give_the_same_answer(requests: list[tuple[list[int], SamplingParams]]) -> None:
    llm, _ = toy_engine(context=64)
    want = [told(llm.generate(ids, params)) for ids, params in requests]
    assert [told(llm.session().generate(ids, params)) for ids, params in requests] == want
    batch = llm.generate_batch([ids for ids, _ in requests], [params for _, params in requests])
    assert [told(completion) for completion in batch] == want

    with llm.scheduler(3, prefill_chunk=8) as scheduler:
        numbers = [scheduler.add(ids, params) for ids, params in requests]
        updates: list[Update] = []
        while scheduler.busy:
            updates += scheduler.step()
    for number, expected in zip(numbers, want, strict=True):
        own = [update for update in updates if update.request == number]
        assert own[-1].completion is not None and told(own[-1].completion) == expected
        text, token_ids, _, logprobs, _ = expected
        assert "".join(update.text for update in own) == text
        assert [token for update in own for token in update.token_ids] == token_ids
        assert [each for update in own for each in update.logprobs] == (logprobs or [])


@settings(max_examples=40)
@given(some_ids, asked)
@example([0, 0], SamplingParams(temperature=1.0, seed=232, max_new_tokens=8, stop="e", min_tokens=7))
def test_an_answer_is_the_definition_s(prompt: list[int], params: SamplingParams) -> None:
    llm, _ = toy_engine(context=64)
    completion = llm.generate(prompt, params)
    ends = {*params.ends, *(() if params.ignore_eos else TOKENIZER.stop_ids)}
    complete = SamplingParams(
        **{name: getattr(params, name) for name in params.__annotations__} | {"stop_token_ids": ends}
    )
    ids = list(prompt)
    for i, token in enumerate(completion.token_ids):
        row = toy_logits(ids)
        assert token == sample(row, ids, complete, len(prompt))
        if completion.logprobs is not None:
            assert completion.logprobs[i] == token_logprobs(row[None], [token], params.logprobs or 0)[0]
        ids.append(token)
    assert (completion.logprobs is None) == (params.logprobs is None)
    # Its last tokens may be left out, where a stop string begins in the midst of a character.
    assert completion.finish_reason != "stop" or completion.stats.generated_tokens > params.min_tokens
    assert not ends & set(completion.token_ids)


def test_where_an_answer_ends() -> None:
    eos = min(TOKENIZER.stop_ids)
    story = tokens_of("one two three four five six")
    llm, _ = toy_engine(script=[*story[:3], eos, *story[3:]])
    first = llm.generate([5])
    assert (first.token_ids, first.finish_reason) == (story[:3], "stop")
    going_on = llm.generate([5], ignore_eos=True, max_new_tokens=len(story) + 1)
    assert (going_on.token_ids, going_on.finish_reason) == ([*story[:3], eos, *story[3:]], "length")
    by_id = llm.generate([5], stop_token_ids=[story[1]])
    assert (by_id.token_ids, by_id.finish_reason, by_id.stats.generated_tokens) == (story[:1], "stop", 2)
    assert llm.generate([5], stop_token_ids=[story[4]], ignore_eos=True).token_ids == [*story[:3], eos, story[3]]
    # A stop string is looked for only in the text after min_tokens.
    assert llm.generate([5], stop=" t", ignore_eos=True, max_new_tokens=7).text == "one"
    late = llm.generate([5], stop=[" three", " f"], min_tokens=3, ignore_eos=True, max_new_tokens=7)
    assert late.text == "one two three" and late.finish_reason == "stop"


def test_several_answers() -> None:
    llm, backend = toy_engine()
    prompt = list(range(100, 141))
    params = SamplingParams(1.0, seed=2**64 - 2, max_new_tokens=9, logprobs=1)
    answers = llm.generate(prompt, params, n=4)
    seeds_taken = (2**64 - 2, 2**64 - 1, 0, 1)
    assert [told(answer) for answer in answers] == [told(llm.generate(prompt, params, seed=s)) for s in seeds_taken]
    computed = sum(backend.batches[0].prefilled)
    assert computed == len(prompt) + 3, "the prompt is computed once, but for the tokens of its last page"
    assert len({answer.text for answer in answers}) == 4
    assert [told(one) for one in llm.generate(prompt, params, n=1)] == [told(llm.generate(prompt, params))]
    assert isinstance(json.dumps([answer.to_dict() for answer in answers]), str)
    with pytest.raises(RequestError, match="n must be a positive integer, not 0"):
        llm.generate(prompt, n=0)
    with pytest.raises(RequestError, match="generate has no option nn: did you mean n"):
        llm.generate(prompt, nn=2)  # type: ignore[call-overload]


def test_several_answers_however_they_are_asked_for() -> None:
    """A chat, tasks of asyncio and batches give the same as `generate`, for each of their prompts."""
    llm, _ = toy_engine(context=100)
    params, message = SamplingParams(temperature=1.0, seed=(1 << 64) - 1, max_new_tokens=12), "What is it?"
    wanted = [llm.generate(each, params, n=3) for each in ("This is", "Once", [{"role": "user", "content": message}])]

    def texts(answers: list[Completion]) -> list[tuple[str, list[int]]]:
        return [(one.text, one.token_ids) for one in answers]

    assert texts(llm.chat(message, params, n=3)) == texts(wanted[2])
    assert texts(asyncio.run(llm.agenerate("This is", params, n=3))) == texts(wanted[0])
    assert [texts(each) for each in llm.generate_batch(["This is", "Once"], params, n=3)] == [*map(texts, wanted[:2])]
    assert llm.generate_batch([], params, n=2) == []
    small = llm.generate_batch(["a", "b"], n=np.uint8(130), max_new_tokens=1)  # a sum of two is beyond its range
    assert [len(each) for each in small] == [130, 130]
    for ask in (llm.chat, llm.generate_batch, lambda prompt, n: asyncio.run(llm.agenerate(prompt, n=n))):
        with pytest.raises(RequestError, match="n must be a positive integer, not 0"):
            ask(["x"] if ask == llm.generate_batch else "x", n=0)
    with pytest.raises(ContextFull, match="^prompt 1: "):
        llm.generate_batch(["a", [5] * 101], n=2)


def test_one_of_several_tasks_that_fails_ends_the_others() -> None:
    ended: list[str] = []

    class Endless:
        async def result(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("endless")

    class Fails:
        async def result(self) -> None:
            await asyncio.sleep(0)
            raise RequestError("it fails")

    streams: Any = [Endless(), Fails(), Endless()]

    async def run() -> None:
        with pytest.raises(RequestError, match="it fails"):
            await results(streams)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert ended == ["endless", "endless"]


def test_completions_as_json() -> None:
    llm, _ = toy_engine()
    completion = llm.generate([5, 6], logprobs=2, prompt_logprobs=0, max_new_tokens=3)
    found = json.loads(json.dumps(completion.to_dict()))
    assert completion.logprobs is not None and found["prompt_logprobs"][0] is None
    assert found["logprobs"][0] == {
        "token_id": completion.token_ids[0],
        "logprob": completion.logprobs[0].logprob,
        "top": [list(pair) for pair in completion.logprobs[0].top],
    }
    assert llm.generate([5, 6], max_new_tokens=3).to_dict()["logprobs"] is None


def test_answers_of_asyncio_have_them_too() -> None:
    llm, _ = toy_engine()
    want = llm.generate([5, 6], logprobs=2, presence_penalty=1.0, max_new_tokens=5)

    async def ask() -> Completion:
        return await llm.agenerate([5, 6], logprobs=2, presence_penalty=1.0, max_new_tokens=5)

    assert told(asyncio.run(ask())) == told(want)


@pytest.mark.parametrize(
    ("given_params", "message"),
    [
        ({"stop_token_ids": [2000]}, "token 2000 of stop_token_ids is not in the vocabulary of 2000"),
        ({"logit_bias": {2000: 1}}, "token 2000 of logit_bias is not in the vocabulary of 2000"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(given_params: dict[str, object], message: str) -> None:
    llm, backend = toy_engine()
    with pytest.raises(RequestError, match=message):
        llm.generate([5], **given_params)  # type: ignore[call-overload]
    with llm.scheduler() as scheduler, pytest.raises(RequestError, match=message):
        scheduler.add([5], **given_params)  # type: ignore[arg-type]
    assert backend.prefilled == []


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_built_in_model_tells_log_softmax_of_its_logits(backend: str) -> None:
    llm: Engine = bn.load(DEMO, backend)
    params = SamplingParams(
        temperature=0.8, seed=4, max_new_tokens=12, logprobs=5, prompt_logprobs=5, frequency_penalty=1.0, min_tokens=12,
        logit_bias={300: -2.0},
    )  # fmt: skip
    prompt = "This is the story of Runa, a dragon."
    alone, *together = [llm.generate(prompt, params), *llm.generate(prompt, params, n=2)]
    in_company, _ = llm.generate_batch([prompt, "Once upon a time"], [params, SamplingParams(max_new_tokens=9)])
    assert together[0].token_ids == in_company.token_ids == alone.token_ids
    if backend == "cpu":  # to the bit
        assert told(together[0]) == told(in_company) == told(alone)
    ids = [*llm.tokenizer.encode(prompt), *alone.token_ids]
    logits, start = llm.logits(ids), len(ids) - len(alone.token_ids)
    expected = [None, *token_logprobs(logits[:-1], ids[1:], 5)]
    assert alone.logprobs is not None and alone.prompt_logprobs is not None
    for found, wanted in zip([*alone.prompt_logprobs, *alone.logprobs], expected, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            assert found.token_id == wanted.token_id
            # Computed in other passes: the same bits on the CPU; in the reference, other last bits, and so flips.
            atol = 1e-5 if backend == "cpu" else 0.3 * logits.std()
            values = ([each.logprob, *(value for _, value in each.top)] for each in (found, wanted))
            np.testing.assert_allclose(*values, rtol=0, atol=atol)
    assert llm.generate(prompt, params, logprobs=None).token_ids == alone.token_ids
    assert start == alone.stats.prompt_tokens


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_options_that_bind_nothing_change_no_answer(backend: str) -> None:
    check_idle_options(backend, tokens=5 if backend == "reference" else 16)


@needs_gpu
def test_options_that_bind_nothing_change_no_answer_on_gpu() -> None:
    check_idle_options("cuda", tokens=16)


def check_idle_options(backend: str, tokens: int) -> None:
    """Each option goes the way of its kind, through whatever kernels that has, and leaves every token as it is."""
    chat: list[bn.Message] = [{"role": "user", "content": "Tell me a story about a fox and a lantern."}]
    with bn.load(DEMO, backend) as llm:
        for params in (SamplingParams(max_new_tokens=tokens), SamplingParams(1.0, seed=5, max_new_tokens=tokens)):
            plain = llm.generate(chat, params)
            unused = next(i for i in range(llm.config.vocab_size) if i not in plain.token_ids)
            idle: dict[str, Any] = {
                "top_k": llm.config.vocab_size,
                "top_p": float(np.nextafter(1.0, 0.0)),
                "min_p": 1e-30,
                "logit_bias": {unused: 0.0, plain.token_ids[0]: 0.0},
                "presence_penalty": 1e-30,
                "frequency_penalty": 1e-30,
                "repetition_penalty": 1 + 1e-12,  # as float32, 1
                "min_tokens": 1,
                "ignore_eos": True,
                "stop": "nothing that it says",
                "stop_token_ids": [unused],
                "logprobs": 3,
                "grammar": bn.Grammar.regex("(?s).*"),
            }
            for name, value in idle.items():
                assert llm.generate(chat, params, **{name: value}).token_ids == plain.token_ids, (name, params)
            together = llm.generate_batch([chat] * len(idle), [replace(params, **{n: v}) for n, v in idle.items()])
            assert len({tuple(answer.token_ids) for answer in together}) == 1


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_scheduler_tells_of_a_prompt_once_and_before_its_answer(tokens: int) -> None:
    llm, _ = toy_engine()
    with llm.scheduler() as scheduler:
        numbers = [scheduler.add([5, 6, 7], logprobs=1, prompt_logprobs=n, max_new_tokens=tokens) for n in (None, 2)]
        updates = [update for _ in range(9) if scheduler.busy for update in scheduler.step()]
    for number, update in zip(numbers, (updates[-2], updates[-1]), strict=True):
        told = [update.prompt_logprobs for update in updates if update.request == number]
        assert update.request == number and update.completion is not None
        assert list(told[0]) == (update.completion.prompt_logprobs or []) and not any(told[1:])
    assert updates[-1].completion.prompt_logprobs is not None
