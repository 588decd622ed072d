"""What Ray Serve's proxies do around an application, without Ray's cluster."""

import asyncio
import json
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():  # of Ray's own code
    warnings.simplefilter("ignore")
    pytest.importorskip("ray")
    from bitnet_numba.server.ray_proxy import BrokenAnswers, SessionRouter
pytestmark = pytest.mark.filterwarnings("ignore")

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}
PIECE = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
END = {"type": "http.response.body", "body": b""}
PLAIN = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


def sent_by(*messages: Any, left: bool = False) -> list[Any]:
    """What a client gets if an application sends this, and then no more. left: the client is gone by then."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        for message in messages:
            await send(message)
        if left:
            await receive()

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(BrokenAnswers(app)({"type": "http", "headers": []}, receive, send))
    return sent


def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    sent = sent_by(START, PIECE)
    assert sent[:2] == [START, PIECE] and sent[2]["more_body"] and sent[3] == END and len(sent) == 4
    error = json.loads(sent[2]["body"].removeprefix(b"data: "))["error"]
    assert error["code"] == "replica_lost" and error["type"] == "server_error"


def test_a_request_without_an_answer_gets_one() -> None:
    start, whole = sent_by()
    assert start["status"] == 503 and json.loads(whole["body"])["error"]["code"] == "replica_lost"


@pytest.mark.parametrize("messages", [(START, PIECE, END), (PLAIN, END), (PLAIN, PIECE)])
def test_nothing_is_added_to_other_answers(messages: Any) -> None:
    assert sent_by(*messages) == list(messages)


@pytest.mark.parametrize("messages", [(), (START, PIECE)])
def test_nothing_is_sent_to_who_has_left(messages: Any) -> None:
    assert sent_by(*messages, left=True) == list(messages)


def test_requests_without_a_session_go_to_the_less_busy_of_two() -> None:
    router: Any = SessionRouter.__new__(SessionRouter)
    context = SimpleNamespace(should_backoff=False)
    request = SimpleNamespace(metadata=SimpleNamespace(session_id=""), routing_context=context)
    groups = [asyncio.run(router.choose_replicas(list("abc"), request)) for _ in range(60)]
    assert all(len(group) == 1 and len(set(group[0])) == 2 for group in groups) and context.should_backoff
    assert {tuple(group[0]) for group in groups} == {(x, y) for x in "abc" for y in "abc" if x != y}
    assert asyncio.run(router.choose_replicas(["a"], request)) == [["a"]]
