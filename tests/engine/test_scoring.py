"""Scores of texts: against log-softmax of the logits, whatever the windows; and of the built-in model, which is good at
its own world."""

import json
import math
from itertools import islice
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet_numba as bn
from bitnet_numba.errors import RequestError
from bitnet_numba.sampling import token_logprobs
from tests.engine.toy_backend import TOKENIZER, toy_engine, toy_logits
from tests.strategies import some_ids
from tools.demo.world.conversation import conversation


def test_a_score_is_log_softmax_of_the_logits() -> None:
    llm, backend = toy_engine()
    text = "Once upon a time there was a fox."
    score = llm.score(text, 3)
    ids = TOKENIZER.encode(text)
    rows = np.stack([toy_logits(ids[:i]) for i in range(1, len(ids))])
    assert score.token_ids == ids and score.logprobs == [None, *token_logprobs(rows, ids[1:], 3)]
    assert score == llm.score(ids, 3)
    by_hand = [
        math.log(np.exp(row - row.max())[i] / np.exp(row - row.max()).sum())
        for row, i in zip(rows, ids[1:], strict=True)
    ]
    assert score.logprob == pytest.approx(sum(by_hand), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(-sum(by_hand) / len(by_hand)), rel=1e-4)
    found = json.loads(json.dumps(score.to_dict()))
    assert found["perplexity"] == score.perplexity and found["logprobs"][1]["token_id"] == ids[1]
    assert "perplexity" in repr(score) and backend.open_contexts == 0


@settings(max_examples=30)
@given(ids=st.lists(st.integers(0, 1989), min_size=2, max_size=60), data=st.data())
def test_windows_score_each_token_once(ids: list[int], data: st.DataObject) -> None:
    llm, backend = toy_engine(context=40)
    window = data.draw(st.integers(2, 40))
    stride = data.draw(st.integers(1, window - 1))
    seen: list[tuple[int, int]] = []
    score = llm.score(ids, window=window, stride=stride, progress=lambda done, total: seen.append((done, total)))
    assert [None, *ids[1:]] == [None if each is None else each.token_id for each in score.logprobs]
    assert seen[-1] == (len(ids), len(ids)) and len(seen) == len(backend.prefilled)
    for position in range(1, len(ids)):
        # The toy's logits tell how many tokens there were before, up to three of which it looks at.
        begin = 0 if position < window else -(-(position - window + 1) // stride) * stride
        (expected,) = token_logprobs(toy_logits(ids[begin:position])[None], [ids[position]], 0)
        assert score.logprobs[position] == expected


@given(ids=some_ids, top=st.integers(0, 20))
def test_prompt_logprobs_are_the_score(ids: list[int], top: int) -> None:
    llm, _ = toy_engine()
    want = llm.score(ids, top).logprobs if len(ids) > 1 else [None]
    asked = {"max_new_tokens": 2, "prompt_logprobs": top}
    assert llm.generate(ids, **asked).prompt_logprobs == want
    assert llm.session().generate(ids, **asked).prompt_logprobs == want
    assert [one.prompt_logprobs for one in llm.generate(ids, **asked, n=2)] == [want, want]
    assert llm.generate(ids, max_new_tokens=2).prompt_logprobs is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "one token alone cannot be scored|the prompt is empty"),
        ({"text": [5]}, "one token alone cannot be scored"),
        ({"text": []}, "the prompt is empty"),
        ({"text": [5, 9999]}, "token id 9999 is not in the vocabulary"),
        ({"text": 5}, "score takes a text or token ids, not 5"),
        ({"text": "ab", "top": 21}, "top must be between 0 and 20, not 21"),
        ({"text": "ab", "top": True}, "top must be between 0 and 20, not True"),
        ({"text": "ab", "window": 300}, "window must be at most 256, not 300"),
        ({"text": "ab", "window": 1}, "window must be at least 2"),
        ({"text": "ab", "window": 9, "stride": 9}, "stride must be at most 8, not 9"),
        ({"text": "ab", "stride": 0}, "stride must be a positive integer, not 0"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    llm, backend = toy_engine()
    with pytest.raises(RequestError, match=message):
        llm.score(**arguments)  # type: ignore[arg-type]
    assert backend.open_contexts == 0 and backend.prefilled == []


def test_the_built_in_model_knows_its_world() -> None:
    """Replies of its world that it has never seen: 1.6 for the built-in model; and another backend agrees."""
    cpu, reference = bn.load(backend="cpu"), bn.load(backend="reference")
    losses: list[float] = []
    for seed in range(3):
        ids, said = cpu.tokenizer.encode(""), [False]
        for turn in islice(conversation(Random((1 << 41) + seed), evaluation=True), 3):
            asked = cpu.tokenizer.encode(f"User: {turn.user}<|eot_id|>Assistant: ", add_bos=False)
            answered = cpu.tokenizer.encode(f"{turn.assistant}<|eot_id|>", add_bos=False)
            ids += asked + answered
            said += [False] * len(asked) + [True] * len(answered)
        score = cpu.score(ids)
        losses += [-each.logprob for each, own in zip(score.logprobs, said, strict=True) if own and each is not None]
    assert math.exp(sum(losses) / len(losses)) < 2
    # A flip of an int8 activation moves a token by some tenths; the mean hardly moves.
    assert reference.score(ids[:120]).perplexity == pytest.approx(cpu.score(ids[:120]).perplexity, rel=0.1)
