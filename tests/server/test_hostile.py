"""What only an attacker sends: it costs the sender an error, and nobody else anything."""

import json
import math
import socket
import time
from typing import Any

import pytest
from pydantic import ValidationError

from bitnet_numba.server.schemas import ChatBody, CompletionBody, DetokenizeBody, ResponseBody, TokenizeBody
from tests.engine.toy_backend import tokens_of, toy_engine
from tests.server.helpers import Running, serving

TEXT = "/v1/completions"


@pytest.mark.parametrize(
    "kind, content",
    [
        (ChatBody, {"messages": [1] * 1000}),
        (ChatBody, {"messages": [{}] * 1000}),
        (ChatBody, {"messages": [{"role": "user", "content": [1] * 1000}]}),
        (ChatBody, {"messages": [{"role": "user", "content": ""}], "modalities": [1] * 1000}),
        (ChatBody, {"messages": [{"role": "assistant", "tool_calls": [1] * 1000}]}),
        (CompletionBody, {"prompt": [{}] * 1000}),
        (CompletionBody, {"prompt": ["a", *[[]] * 1000]}),
        (CompletionBody, {"prompt": [["x"] * 1000] * 1000}),
        (CompletionBody, {"prompt": "a", "stop_token_ids": [{}] * 1000}),
        (ResponseBody, {"input": [1] * 1000}),
        (ResponseBody, {"input": [{"content": [1] * 1000}]}),
        (TokenizeBody, {"messages": [1] * 1000}),
        (DetokenizeBody, {"tokens": [{}] * 1000}),
    ],
)
def test_a_thousand_mistakes_are_not_collected(kind: Any, content: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(content)
    assert caught.value.error_count() < 10


def test_errors_do_not_repeat_what_is_long(server: Running) -> None:
    for fields in ({"logit_bias": {"a" * 10**5: "x"}}, {"model": "a" * 10**5}, {"truncation": "a" * 10**5}):
        response = server.post(TEXT, {"prompt": "Once", **fields})
        assert response.status_code in (400, 404) and len(response.content) < 2000


def test_numbers_of_thousands_of_digits(server: Running) -> None:
    for name in ("n", "max_tokens", "top_k", "seed", "min_tokens", "priority", "logprobs"):
        for sign in ("", "-"):
            body = json.dumps({"prompt": ["a"] * 12, "max_tokens": 1})[:-1] + f', "{name}": {sign}{"9" * 4300}}}'
            response = server.client.post(TEXT, content=body)
            assert response.status_code in (200, 400), (name, response.text)


def test_metadata_is_text_and_not_much(server: Running) -> None:
    for metadata in ({"a": math.nan}, {"a": [1]}, {"a": None}, {f"{i}": "" for i in range(17)}):
        content = json.dumps({"input": "Hi", "metadata": metadata})
        response = server.client.post("/v1/responses", content=content)
        assert response.status_code == 400 and response.json()["error"]["param"] == "metadata"


def test_an_origin_that_is_no_address(server: Running) -> None:
    for origin in ("http://[", "http://]", "[", "null"):
        response = server.client.get("/v1/models", headers={"origin": origin})
        assert response.status_code == 403 and response.json()["error"]["code"] == "origin_not_allowed"


def test_a_key_may_end_with_any_character() -> None:
    key = "clé-à"  # whose last byte is white space in latin-1
    with serving(lambda: toy_engine(tokens_of(" fox"))[0], api_keys=(key,)) as running:
        headers = {"authorization": f"Bearer {key}".encode()}
        assert running.client.get("/v1/models", headers=headers).status_code == 200


def test_bodies_that_nobody_reads_do_not_keep_a_connection() -> None:
    heads = (
        b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nOrigin: http://x\r\nContent-Length: 1000\r\n\r\n",
    )
    with serving(lambda: toy_engine(tokens_of(" fox"))[0], receive_timeout=0.3) as running:
        connections = [socket.create_connection(("127.0.0.1", running.port), timeout=10) for _ in heads]
        for connection, head in zip(connections, heads, strict=True):
            connection.sendall(head)
            assert connection.recv(65536).startswith(b"HTTP/1.1 ")
            connection.sendall(b"x")  # from now on, no time for a next request runs
        for connection in connections:
            with connection:
                assert connection.recv(65536) == b""
        assert running.client.get("/health").status_code == 200


def test_a_body_that_is_read_may_take_its_time() -> None:
    with serving(lambda: toy_engine(tokens_of(" fox"))[0], receive_timeout=1.0) as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
            body = b'{"prompt": "Hi"}'
            connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body))
            for byte in body:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_who_leaves_within_the_body_is_no_mistake_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    with serving(lambda: toy_engine(tokens_of(" fox"))[0]) as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
            connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            running.wait_until(lambda: bool(running.server.server_state.tasks))
        running.wait_until(lambda: 'path="/tokenize",status="499"' in running.client.get("/metrics").text)
    assert "ClientLeft" not in caplog.text
