"""Whatever a client sends, the answer is an error in OpenAI's form that names the field, and the server goes on."""

import gzip
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.server.schemas import ChatBody, CompletionBody
from tests.engine.toy_backend import tokens_of, toy_engine
from tests.server.helpers import Running, serving

CHAT, TEXT, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
ONCE: dict[str, Any] = {"prompt": "Once", "max_tokens": 2}


def error_of(running: Running, path: str, content: Any, status: int = 400) -> dict[str, Any]:
    """The error of a request that has to be refused."""
    response = running.post(path, content)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    "field, value",
    [
        ("functions", [{}]),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("web_search_options", {}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server: Running, field: str, value: Any) -> None:
    error = error_of(server, CHAT, {**HELLO, field: value})
    assert error["param"] == field and error["message"].startswith(field) and error["code"] == "unsupported_parameter"
    neutral = next(iter(ChatBody.NEUTRAL[field]), None)
    assert server.post(CHAT, {**HELLO, field: neutral}).status_code == 200


@pytest.mark.parametrize("field, value", [("best_of", 2), ("suffix", "x")])
def test_the_same_for_texts(server: Running, field: str, value: Any) -> None:
    assert error_of(server, TEXT, {**ONCE, field: value})["param"] == field
    neutral = next(iter(CompletionBody.NEUTRAL[field]), None)
    assert server.post(TEXT, {**ONCE, field: neutral}).status_code == 200


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", 2),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_completion_tokens", -3),
        ("n", 0),
        ("n", 10**6),
        ("n", "2"),
        ("seed", 1.5),
        ("stop", [""]),
        ("stop", {"a": 1}),
        ("stop", ["a"] * 17),
        ("stop", "a" * 1001),
        ("stream", "yes"),
        ("logprobs", 3),
        ("top_logprobs", 3),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", [1]),
        ("presence_penalty", 2.5),
        ("frequency_penalty", "x"),
        ("stop_token_ids", [-1]),
        ("min_tokens", 3),
        ("ignore_eos", 1),
        ("stream_options", [1]),
        ("messages", []),
        ("messages", None),
        ("messages", "Hi"),
    ],
)
def test_wrong_values_are_named(server: Running, field: str, value: Any) -> None:
    error = error_of(server, CHAT, {**HELLO, field: value})
    assert error["param"] in (field, "max_tokens" if field == "max_completion_tokens" else field)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "message, param",
    [
        ({"role": "user"}, "messages"),
        ({"content": "Hi"}, "messages.0.role"),
        ({"role": "wizard", "content": "Hi"}, "messages"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}, "messages"),
        ({"role": "user", "content": 5}, "messages.0.content"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "messages.0.tool_calls.0.function"),
        ("Hi", "messages.0"),
    ],
)
def test_wrong_messages_are_named(server: Running, message: Any, param: str) -> None:
    assert error_of(server, CHAT, {**HELLO, "messages": [message]})["param"].startswith(param)


@pytest.mark.parametrize(
    "path, fields, message",
    [
        (CHAT, {"stop": ["x"] * 17}, "stop: List should have at most 16 items"),
        (CHAT, {"stop": ["x", 5]}, "stop.1: Input should be a valid string"),
        (CHAT, {"stop": ["x", "x" * 1001]}, "stop.1: String should have at most 1000 characters"),
        (CHAT, {"stop": 5}, "stop: Input should be a valid string"),
        (CHAT, {"tool_choice": {"type": "web_search"}}, "tool_choice.type: Input should be 'function'"),
        (CHAT, {"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name: Field required"),
        (CHAT, {"tool_choice": "any"}, "tool_choice: Input should be 'none', 'auto' or 'required'"),
        (TEXT, {"prompt": [1, "x"]}, "prompt.1: Input should be a valid integer"),
        (TEXT, {"prompt": [[1, "x"]]}, "prompt.0.1: Input should be a valid integer"),
        (TEXT, {"prompt": ["x", [1]]}, "prompt.1: Input should be a valid string"),
        (RESPONSE, {"input": []}, "input: List should have at least 1 item"),
        (RESPONSE, {"input": [{"content": [5]}]}, "input.0.content.0: Input should be an object"),
        (RESPONSE, {"tools": [{"type": "web_search"}]}, "tools.0.type: Input should be 'function'"),
        (RESPONSE, {"tool_choice": {"type": "web_search"}}, "tool_choice.type: Input should be 'function'"),
        ("/v1/embeddings", {"input": ["x"] * 3000}, "input: List should have at most 2048 items"),
        ("/v1/embeddings", {"input": [[1, "x"]]}, "input.0.1: Input should be a valid integer"),
    ],
)
def test_fields_of_several_forms_are_told_what_is_wrong_in_theirs(
    server: Running, path: str, fields: dict[str, Any], message: str
) -> None:
    valid = {CHAT: HELLO, TEXT: ONCE, RESPONSE: {"input": "Hi"}}.get(path, {})
    error = error_of(server, path, {**valid, **fields})
    assert error["message"].startswith(message) and error["param"] == message.split(":")[0]


def test_prompts_that_are_none(server: Running) -> None:
    assert error_of(server, TEXT, {**ONCE, "prompt": [4096]})["message"].startswith("token id 4096")
    for prompt in ("", [], [""], [[]], [1, "x"], [[1], "x"], [-1], [True], None, {}, [1.5]):
        assert error_of(server, TEXT, {**ONCE, "prompt": prompt})["param"].startswith("prompt")
    error = error_of(server, TEXT, {**ONCE, "prompt": "fox " * 3000})
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert error_of(server, CHAT, {"messages": [{"role": "user", "content": "fox " * 3000}]})["param"] == "messages"
    assert error_of(server, "/tokenize", {})["param"] == "prompt"
    assert error_of(server, "/tokenize", {"messages": []})["param"] == "messages"
    assert error_of(server, "/detokenize", {"tokens": [1 << 70]})["param"] == "tokens"


@pytest.mark.parametrize("path, fields", [(CHAT, HELLO), (TEXT, ONCE), (RESPONSE, {"input": "Hi"})])
def test_tokens_that_the_model_has_not(server: Running, path: str, fields: dict[str, Any]) -> None:
    assert error_of(server, path, {**fields, "stop_token_ids": [4096]})["param"] == "stop_token_ids"
    assert error_of(server, path, {**fields, "stop_token_ids": list(range(256))})["param"] == "stop_token_ids"
    assert error_of(server, path, {**fields, "logit_bias": {"4096": 1}})["param"] == "logit_bias"


def test_too_many_answers_are_named_by_what_makes_them_many(server: Running) -> None:
    for fields, field in (
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"n": 129}, "n"),
    ):
        error = error_of(server, TEXT, {**ONCE, **fields})
        assert error["param"] == field and "128 answers" in error["message"]


def test_answers_that_need_more_room_than_there_is() -> None:
    """The field that limits an answer is called as the endpoint calls it."""
    with serving(lambda: toy_engine(tokens_of(" fox"), context=512)[0], tokens=128) as running:
        for path, fields, field in (
            (CHAT, {**HELLO, "max_tokens": 400}, "max_tokens"),
            (CHAT, {"messages": HELLO["messages"], "max_completion_tokens": 400}, "max_completion_tokens"),
            (RESPONSE, {"input": "Hi", "max_output_tokens": 400}, "max_output_tokens"),
            (TEXT, {"prompt": "Hi", "max_tokens": 400}, "max_tokens"),
        ):
            error = error_of(running, path, fields)
            assert error["param"] == field and error["message"].endswith(f"ask for fewer with {field}")


def test_logprobs_have_a_limit(server: Running) -> None:
    assert error_of(server, CHAT, {**HELLO, "logprobs": True, "top_logprobs": 21})["param"] == "top_logprobs"
    assert error_of(server, TEXT, {**ONCE, "logprobs": 21})["param"] == "logprobs"


def test_bodies_that_are_no_json(server: Running) -> None:
    deep = b'{"messages": ' + b"[" * 100_000
    for body in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"', deep, b'{"messages": [{"role": "\\ud800"}]}'):
        response = server.client.post(CHAT, content=body)
        assert response.status_code == 400 and "\n" not in response.json()["error"]["message"]


def test_paths_and_methods(server: Running) -> None:
    for method, path, status in (
        ("GET", CHAT, 405),
        ("PUT", "/health", 405),
        ("GET", "/nothing", 404),
        ("POST", "/", 405),
    ):
        response = server.client.request(method, path)
        assert response.status_code == status and path in response.json()["error"]["message"]


def test_a_path_that_is_nearly_right_is_told(server: Running) -> None:
    near = {
        "/chat/completions": ", but /v1/chat/completions",
        "/v1/v1/models": ", but /v1/models",
        "/health/": ", but /health",
        "/v1": "",
    }
    for path, hint in near.items():
        message = server.client.get(path).json()["error"]["message"]
        assert message == f"there is no {path}{hint}"


def test_compressed_bodies_are_refused(server: Running) -> None:
    content = gzip.compress(json.dumps(HELLO).encode())
    response = server.client.post(CHAT, content=content, headers={"content-encoding": "gzip"})
    assert response.status_code == 415 and "compressed" in response.json()["error"]["message"]
    plain = {"content": json.dumps(HELLO), "headers": {"content-encoding": "identity"}}
    assert server.client.post(CHAT, **plain).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(sorted(ChatBody.model_fields)), JSON, max_size=4), st.booleans())
def test_any_json_is_answered(server: Running, fields: dict[str, Any], messages: bool) -> None:
    """With an answer or a 4xx: nothing that a client sends is the server's fault."""
    body = {**HELLO, **fields, **(HELLO if messages else {}), "max_completion_tokens": 2}
    response = server.client.post(CHAT, content=json.dumps(body))
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        assert response.json()["error"]["message"]
