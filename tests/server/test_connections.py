"""Clients that dawdle, send halves, too much or nothing, or one request behind the other: on raw connections."""

import json
import socket
import time

import pytest

from tests.engine.toy_backend import ToyBackend, tokens_of, toy_engine
from tests.server.helpers import Running, serving
from tests.server.slow_model import CHAT, HEAD, body, free, slow_engine


def test_bodies_that_are_too_large(slow: tuple[Running, ToyBackend]) -> None:
    running, _ = slow
    large = b"x" * (64 << 20)
    response = running.client.post(CHAT, content=large)
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
    pieces = (large[:65536] for _ in range(200))  # of a length that is not told before
    assert running.client.post(CHAT, content=pieces).status_code == 413


def connect(running: Running, data: bytes) -> socket.socket:
    """A connection on which this has been sent."""
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=10)
    connection.sendall(data)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    data = b""
    with connection:
        while piece := connection.recv(65536):
            data += piece
    return data


def test_slow_senders_are_cut_off() -> None:
    with serving(lambda: toy_engine(tokens_of(" fox"))[0], receive_timeout=0.3) as running:
        halves = [b"", b"GET", HEAD, HEAD + b"Content-Length: 50\r\n\r\n{"]
        connections = [connect(running, half) for half in halves]
        after = connect(running, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert after.recv(65536).startswith(b"HTTP/1.1 200")
        after.sendall(HEAD)  # half a request on a connection that has had one
        for connection in (*connections, after):
            assert read_all(connection).startswith(b"HTTP/1.1 408")
        dripping = connect(running, HEAD)
        with pytest.raises(OSError):  # a byte now and then does not help
            for _ in range(100):
                dripping.sendall(b"x")
                time.sleep(0.02)
        dripping.close()
        assert not running.server.server_state.connections or running.client.get("/health").status_code == 200


def test_a_stray_line_does_not_cut_off_an_answer() -> None:
    with serving(lambda: slow_engine([]), receive_timeout=0.1) as running:
        content = json.dumps(body(max_tokens=150)).encode()
        head = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content)
        connection = connect(running, head + content)
        connection.sendall(b"\r\n")
        assert b'"completion_tokens":150' in read_all(connection)


def test_headers_have_a_limit(slow: tuple[Running, ToyBackend]) -> None:
    running, _ = slow
    host = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nX-Large: "
    assert read_all(connect(running, host + b"x" * 60_000 + b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    for header in (b"X-Large: " + b"x" * 200_000, b"X: y\r\n" * 40_000, b"X-Large: " + b"x" * 66_000 + b"\r\n\r\n"):
        connection = connect(running, HEAD)
        with connection:
            try:
                connection.sendall(header)
                assert connection.recv(65536).startswith(b"HTTP/1.1 431")
            except ConnectionError:  # it was closed while the rest came
                pass
    assert running.client.get("/health").status_code == 200


def test_half_requests_and_churn_leave_nothing(slow: tuple[Running, ToyBackend]) -> None:
    running, _ = slow
    request = (
        b'Content-Length: 80\r\n\r\n{"messages": [{"role": "user", "content": "Hi"}], "stream": true, "n": 1}         '
    )
    whole = HEAD + request
    for i in range(300):
        connection = connect(running, whole[: (i * 7) % len(whole) + 1])
        if i % 3 == 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, no farewell
        connection.close()
    running.wait_until(lambda: free(running))
    running.wait_until(lambda: len(running.server.server_state.connections) <= 1)
    assert running.post(CHAT, body(max_tokens=5)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_sends_no_more_is_taken_for_gone(slow: tuple[Running, ToyBackend], stream: bool) -> None:
    """The end of what a client sends is all that is seen of one that has left, too."""
    running, _ = slow
    content = json.dumps(body(max_tokens=3000, stream=stream)).encode()
    with connect(running, HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content) as connection:
        running.wait_until(lambda: running.service.running == 1)
        connection.shutdown(socket.SHUT_WR)
        running.wait_until(lambda: free(running), 2.0)


def test_pipelined_requests_are_answered_in_order(slow: tuple[Running, ToyBackend]) -> None:
    running, _ = slow
    ask = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n%s\r\n"
    data = read_all(connect(running, ask % (b"health", b"") + ask % (b"nothing", b"Connection: close\r\n")))
    assert data.index(b"HTTP/1.1 200") < data.index(b"HTTP/1.1 404")
