"""Chats over HTTP: the engine's answers, in OpenAI's form."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from bitnet_numba.backends.host_model import PAGE_SIZE
from bitnet_numba.engine.engine import Engine
from tests.server.helpers import Running

PATH = "/v1/chat/completions"
STORY = [{"role": "user", "content": "Tell me a story about a fox and a lantern."}]
BODY = {"messages": STORY, "seed": 3, "max_tokens": 60, "temperature": 0.8}


def stream_text(events: list, index: int = 0) -> str:
    """The joined content of one choice."""
    choices = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices if choice["index"] == index)


def test_answers_are_the_engines(server: Running, built_in: Engine) -> None:
    expected = built_in.chat(STORY, seed=3, max_new_tokens=60, temperature=0.8)
    response = server.post(PATH, BODY)
    answer = ChatCompletion.model_validate(response.json())
    assert response.status_code == 200 and answer.model == "bitnet-demo"
    (choice,) = answer.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == {"stop": "stop", "length": "length"}[expected.finish_reason]
    assert answer.usage is not None and answer.usage.completion_tokens == expected.stats.generated_tokens
    assert answer.usage.prompt_tokens == expected.stats.prompt_tokens
    assert response.headers["x-request-id"] in answer.id


def test_a_stream_is_the_whole_answer_in_pieces(server: Running) -> None:
    whole = server.post(PATH, BODY).json()
    events = server.events(PATH, BODY)
    assert events.pop() == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(event) for event in events]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole["choices"][0]["finish_reason"]
    assert stream_text(events) == whole["choices"][0]["message"]["content"]
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks)
    assert len(chunks) > 3


def test_usage_comes_last_where_it_is_asked_for(server: Running) -> None:
    events = server.events(PATH, {**BODY, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]" and events[-2]["choices"] == []
    assert events[-2]["usage"] == server.post(PATH, BODY).json()["usage"]
    assert all(event["usage"] is None for event in events[:-2])


def test_several_choices(server: Running) -> None:
    whole = server.post(PATH, {**BODY, "n": 3}).json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2] and len(set(texts)) == 3
    assert texts[0] == server.post(PATH, BODY).json()["choices"][0]["message"]["content"]
    events = server.events(PATH, {**BODY, "n": 3})
    assert [stream_text(events, index) for index in range(3)] == texts
    alone = server.post(PATH, BODY).json()["usage"]
    assert whole["usage"]["prompt_tokens"] == alone["prompt_tokens"]


def test_a_request_alone_is_the_same_in_a_crowd(server: Running) -> None:
    bodies = [{**BODY, "seed": seed, "max_tokens": 20 + seed % 30} for seed in range(32)]
    alone = [server.post(PATH, body).json()["choices"][0]["message"]["content"] for body in bodies]

    def ask(number: int) -> str:
        body = bodies[number % 32]
        if number < 32:
            return server.post(PATH, body).json()["choices"][0]["message"]["content"]
        return stream_text(server.events(PATH, body))

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(ask, range(64))) == alone * 2


def test_null_is_absence_and_unknown_fields_are_ignored(server: Running) -> None:
    nothing = ("n", "stop", "logit_bias", "response_format", "tools", "tool_choice", "logprobs", "stream", "user")
    body = {**BODY, **dict.fromkeys(nothing), "no_such_field": {"a": [1]}, "reasoning_effort": "low"}
    assert server.post(PATH, body).json()["choices"] == server.post(PATH, BODY).json()["choices"]


@pytest.mark.parametrize(
    "same",
    [
        [{"role": "user", "content": [{"type": "text", "text": STORY[0]["content"]}]}],
        [{"role": "user", "content": STORY[0]["content"], "name": None}],
    ],
)
def test_messages_in_other_words(server: Running, same: list) -> None:
    assert server.post(PATH, {**BODY, "messages": same}).json()["choices"] == server.post(PATH, BODY).json()["choices"]


def test_a_developer_is_the_system(server: Running) -> None:
    def answer(role: str) -> list:
        messages = [{"role": role, "content": "Be brief."}, *STORY]
        return server.post(PATH, {**BODY, "messages": messages}).json()["choices"]

    assert answer("developer") == answer("system")


def test_both_names_of_the_limit(server: Running) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body = {"messages": STORY, "seed": 1, name: 5}
        answer = server.post(PATH, body).json()
        assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 5


def test_stop_strings(server: Running) -> None:
    text = server.post(PATH, BODY).json()["choices"][0]["message"]["content"]
    word = text.split()[8]
    answer = server.post(PATH, {**BODY, "stop": [word, "never"]}).json()["choices"][0]
    assert answer["message"]["content"] == text[: text.index(word)] and answer["finish_reason"] == "stop"


def test_the_model_has_more_than_one_name(server: Running, built_in: Engine) -> None:
    assert server.post(PATH, {**BODY, "model": "gpt-4o-mini"}).json()["model"] == "gpt-4o-mini"
    assert [entry["id"] for entry in server.client.get("/v1/models").json()["data"]] == ["bitnet-demo", "gpt-4o-mini"]
    assert server.client.get("/v1/models/bitnet-demo").json()["max_model_len"] == built_in.context
    for response in (server.post(PATH, {**BODY, "model": "other"}), server.client.get("/v1/models/other")):
        assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_an_answer_that_stands_last_is_continued(server: Running, built_in: Engine) -> None:
    messages = [*STORY, {"role": "assistant", "content": "Once upon a time"}]
    expected = built_in.chat(messages, temperature=0, max_new_tokens=10).text
    body = {"messages": messages, "temperature": 0, "max_tokens": 10}
    assert server.post(PATH, body).json()["choices"][0]["message"]["content"] == expected


def test_logprobs_are_the_engines(server: Running, built_in: Engine) -> None:
    expected = built_in.chat(STORY, seed=3, max_new_tokens=20, temperature=0.8, logprobs=4)
    body = {**BODY, "max_tokens": 20, "logprobs": True, "top_logprobs": 4}
    content = ChatCompletion.model_validate(server.post(PATH, body).json()).choices[0].logprobs.content
    assert expected.logprobs is not None and len(content) == len(expected.logprobs)
    for found, (token, logprob, top) in zip(content, expected.logprobs, strict=True):
        assert bytes(found.bytes) == built_in.tokenizer.token_bytes(token) and found.logprob == logprob
        assert [other.logprob for other in found.top_logprobs] == [logprob for _, logprob in top]
    events = server.events(PATH, body)[:-1]
    streamed = [event["choices"][0]["logprobs"] for event in events]
    joined = [token for logprobs in streamed if logprobs for token in logprobs["content"]]
    assert joined == [token.model_dump() for token in content]
    bare = server.post(PATH, {**BODY, "max_tokens": 20, "logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert [token["logprob"] for token in bare] == [token.logprob for token in content]
    assert all(token["top_logprobs"] == [] for token in bare)


def test_sampling_fields_have_their_effect(server: Running, built_in: Engine) -> None:
    first = built_in.tokenizer.encode_chat(STORY)
    greedy = {"messages": STORY, "temperature": 0, "max_tokens": 30}
    (token, *_) = built_in.generate(first, max_new_tokens=3).token_ids
    for fields, params in (
        ({"logit_bias": {str(token): -100}}, {"logit_bias": {token: -100}}),
        ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"presence_penalty": 1.5, "frequency_penalty": 0.5}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"stop_token_ids": [token]}, {"stop_token_ids": [token]}),
        ({"ignore_eos": True, "min_tokens": 30}, {"ignore_eos": True, "min_tokens": 30}),
        ({"top_k": 1, "temperature": 2, "seed": -1}, {}),
    ):
        expected = built_in.chat(STORY, **{"temperature": 0, "max_new_tokens": 30, **params})
        assert server.post(PATH, {**greedy, **fields}).json()["choices"][0]["message"]["content"] == expected.text


def test_a_second_turn_finds_its_cache_unless_it_is_salted(server: Running) -> None:
    def cached(salt: str, messages: list) -> int:
        usage = server.post(PATH, {**BODY, "messages": messages, "cache_salt": salt, "max_tokens": 400}).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    first = server.post(PATH, {**BODY, "cache_salt": "a", "max_tokens": 400}).json()
    answer, held = first["choices"][0]["message"], first["usage"]["total_tokens"] - 1  # the last token is not fed
    second = [*STORY, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "And then?"}]
    assert cached("b", second) == 0 and cached("a", second) == held // PAGE_SIZE * PAGE_SIZE > 0
