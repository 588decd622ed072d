"""`generate_batch` over a toy backend."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.errors import RequestError
from bitnet_numba.sampling import SamplingParams
from tests.engine.scheduling import EOT, alone, engine, requests, same_answer
from tests.engine.toy_backend import TOKENIZER, VOCAB, tokens_of


@given(st.lists(requests, max_size=8), st.integers(1, 9))
def test_generate_batch_gives_the_answers_in_order(asked: list[dict[str, Any]], max_sequences: int) -> None:
    llm, backend = engine()
    got = llm.generate_batch(
        [request["prompt"] for request in asked],
        [request["params"] for request in asked],
        max_new_tokens=12,
        stop="e",
        max_sequences=max_sequences,
    )
    expected = [alone(llm, request | {"max_new_tokens": 12, "stop": "e"}) for request in asked]
    assert all(same_answer(a, b) for a, b in zip(got, expected, strict=True))
    assert all(batch.closed for batch in backend.batches)


def test_generate_batch_takes_prompts_of_all_forms() -> None:
    llm, _ = engine()
    chat = [{"role": "user", "content": "Hi."}]
    forms: list[Any] = ["Once", [5, 6], chat]
    for params in (None, SamplingParams(0.9, seed=3), [None, SamplingParams(1.1, seed=2), SamplingParams()]):
        each = params if isinstance(params, list) else [params] * 3
        got = llm.generate_batch(forms, params, max_new_tokens=6)
        for completion, prompt, own in zip(got, forms, each, strict=True):
            assert same_answer(completion, alone(llm, {"prompt": prompt, "params": own, "max_new_tokens": 6}))
    unseeded = llm.generate_batch(["x"] * 4, SamplingParams(1.5), max_new_tokens=8)
    assert len({completion.text for completion in unseeded}) > 1  # each prompt draws a seed of its own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["x", ""]}, "prompt 1: the prompt is empty"),
        ({"prompts": ["x", [VOCAB]]}, "prompt 1: token id 2000"),
        ({"prompts": [[5], [5] * 49]}, "prompt 1: the prompt has 49 tokens"),
        ({"prompts": [5, 6]}, "prompt 0: a prompt must be a string"),
        ({"prompts": "text"}, "prompts must be a list"),
        ({"prompts": {"role": "user"}}, "prompts must be a list"),
        ({"prompts": None}, "prompts must be a list"),
        ({"prompts": ["x"], "params": [None, None]}, "1 prompts but 2 sampling parameters"),
        ({"prompts": ["x"], "params": 5}, "params must be"),
        ({"prompts": ["x"], "params": [5]}, "prompt 0: params of generate_batch must be"),
        ({"prompts": ["x"], "max_new_tokens": 0}, "max_new_tokens must be"),
        ({"prompts": ["x"], "stop": ""}, "a stop string must be"),
        ({"prompts": ["x"], "max_sequences": 0}, "max_sequences must be"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_computed(arguments: dict[str, Any], message: str) -> None:
    llm, backend = engine()
    with pytest.raises(RequestError, match=message) as caught:
        llm.generate_batch(**arguments)
    assert "\n" not in str(caught.value)
    assert all(batch.log == [] for batch in backend.batches)


def test_stop_strings_of_a_model_without_a_template_hold_in_batches() -> None:
    llm, _ = engine([*tokens_of(" Fine.\nUser: And you?"), EOT])
    llm.tokenizer = type(TOKENIZER)(TOKENIZER._backend, add_bos=True, named_tokens={"eos_token": "<|eot_id|>"})
    chat = [{"role": "user", "content": "Hi."}]
    texts = [completion.text for completion in llm.generate_batch([chat, "Hi."])]
    assert texts == [" Fine.", " Fine.\nUser: And you?"]
