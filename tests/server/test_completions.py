"""Texts that are continued over HTTP, and the tokenizer's endpoints."""

from openai.types import Completion

from bitnet_numba.engine.engine import Engine
from tests.server.helpers import Running

PATH = "/v1/completions"
BODY = {"prompt": "Once upon a time", "seed": 5, "max_tokens": 30, "temperature": 0.7}


def test_texts_are_the_engines(server: Running, built_in: Engine) -> None:
    expected = built_in.generate("Once upon a time", built_in.sampling, seed=5, max_new_tokens=30, temperature=0.7)
    answer = server.post(PATH, BODY).json()
    Completion.model_validate(answer)
    assert answer["choices"][0]["text"] == expected.text
    assert answer["usage"]["total_tokens"] == expected.stats.prompt_tokens + expected.stats.generated_tokens


def test_a_stream_is_the_whole_answer_in_pieces(server: Running) -> None:
    for echo in (False, True):
        whole = server.post(PATH, {**BODY, "echo": echo}).json()["choices"][0]
        events = server.events(PATH, {**BODY, "echo": echo})
        assert events.pop() == "[DONE]"
        assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
        assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
        assert whole["text"].startswith("Once upon a time") == echo


def test_sixteen_tokens_unless_told(server: Running) -> None:
    answer = server.post(PATH, {"prompt": "Once upon a time", "temperature": 0}).json()
    assert answer["usage"]["completion_tokens"] == 16


def test_lists_of_prompts_and_token_ids(server: Running) -> None:
    tokens = [server.post("/tokenize", {"prompt": text}).json()["tokens"] for text in ("Once upon a time", "The fox")]
    texts = [server.post(PATH, {**BODY, "prompt": prompt}).json()["choices"][0]["text"] for prompt in tokens]
    for prompts in (["Once upon a time", "The fox"], tokens):
        choices = server.post(PATH, {**BODY, "prompt": prompts}).json()["choices"]
        assert [choice["text"] for choice in choices] == texts
    several = server.post(PATH, {**BODY, "prompt": tokens, "n": 2}).json()
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert [several["choices"][index]["text"] for index in (0, 2)] == texts
    assert several["usage"]["prompt_tokens"] == sum(map(len, tokens))


def test_tokens_there_and_back(server: Running, built_in: Engine) -> None:
    text = "A fox met an owl; “Hello!” 🦊"
    found = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == built_in.tokenizer.encode(text) and found["count"] == len(found["token_strs"])
    bare = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": bare}).json() == {"prompt": text}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    chat = [{"role": "user", "content": "Hi"}]
    found = server.post("/tokenize", {"messages": chat}).json()
    assert found["tokens"] == built_in.tokenizer.encode_chat(chat) and found["max_model_len"] == built_in.context


def test_logprobs_of_an_answer_and_its_prompt(server: Running, built_in: Engine) -> None:
    body = {**BODY, "max_tokens": 4, "logprobs": 2, "temperature": 0}
    params = {"max_new_tokens": 4, "logprobs": 2, "prompt_logprobs": 2}
    expected = built_in.generate("Once upon a time", **params)
    assert expected.prompt_logprobs is not None and expected.logprobs is not None
    answer = Completion.model_validate(server.post(PATH, body).json()).choices[0]
    assert answer.logprobs.token_logprobs == [entry.logprob for entry in expected.logprobs]
    assert answer.logprobs.text_offset[0] == 0 and "".join(answer.logprobs.tokens) == answer.text
    with_prompt = server.post(PATH, {**body, "echo": True}).json()["choices"][0]
    found = with_prompt["logprobs"]
    wanted = [None if entry is None else entry.logprob for entry in [*expected.prompt_logprobs, *expected.logprobs]]
    assert found["token_logprobs"] == wanted and found["top_logprobs"][0] is None
    assert found["tokens"][0] == "<|begin_of_text|>" and "".join(found["tokens"][1:]) == with_prompt["text"]
    for token, place, logprob, top in zip(
        found["tokens"], found["text_offset"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        if logprob is not None:  # as the first token's is
            assert with_prompt["text"].startswith(token, place) and top[token] == logprob and len(top) in (2, 3)
    events = [event["choices"][0] for event in server.events(PATH, {**body, "echo": True})[:-1]]
    assert events[0]["text"] == "Once upon a time"
    for name, whole in with_prompt["logprobs"].items():
        assert [value for event in events if event["logprobs"] for value in event["logprobs"][name]] == whole
    streamed = [event["choices"][0]["logprobs"] for event in server.events(PATH, body)[:-1]]
    assert [place for one in streamed if one for place in one["text_offset"]] == answer.logprobs.text_offset


def test_a_prompt_is_scored_without_an_answer(server: Running) -> None:
    """`max_tokens` 0, as clients that compare texts ask."""
    body = {"prompt": ["Once upon a time", "The fox"], "echo": True, "logprobs": 1, "max_tokens": 0}
    longer = server.post(PATH, {**body, "max_tokens": 1}).json()["choices"]
    answer = server.post(PATH, body).json()
    assert answer["usage"]["completion_tokens"] == 0
    for choice, other in zip(answer["choices"], longer, strict=True):
        count = len(choice["logprobs"]["tokens"])
        assert choice["logprobs"] == {name: values[:count] for name, values in other["logprobs"].items()}
        assert choice["finish_reason"] == "length" and len(other["logprobs"]["tokens"]) == count + 1
    assert [choice["text"] for choice in answer["choices"]] == body["prompt"]
    events = server.events(PATH, {**body, "prompt": "The fox", "stream_options": {"include_usage": True}})
    opening, end, used, _ = events
    assert opening["choices"][0]["text"] == "The fox" and end["choices"][0]["finish_reason"] == "length"
    assert opening["choices"][0]["logprobs"] == answer["choices"][1]["logprobs"]
    assert end["choices"][0]["text"] == "" and used["usage"]["completion_tokens"] == 0
    for fields in ({"echo": False}, {"min_tokens": 1}):
        error = server.post(PATH, {**body, **fields}).json()["error"]
        assert error["param"] == "max_tokens" and error["type"] == "invalid_request_error"
