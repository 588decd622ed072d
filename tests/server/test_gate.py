"""Who may ask: hosts, pages of other sites, keys; and the id that every request has."""

from collections.abc import Iterator

import pytest

from bitnet_numba.server.gate import host_name
from tests.engine.toy_backend import toy_engine
from tests.server.helpers import Running, serving

HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
KEYS = ("first-key", "second-ключ")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    """Keys, hosts and one origin."""
    hosts, origins = ("127.0.0.1", "localhost"), ("https://friend.example",)
    with serving(lambda: toy_engine()[0], api_keys=KEYS, allowed_hosts=hosts, cors_origins=origins) as running:
        yield running


def ask(running: Running, **headers: str) -> int:
    """The status of a request with these headers, and one of the keys unless they have another."""
    given = {"authorization": f"Bearer {KEYS[0]}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    encoded = {name: value.encode("utf-8") for name, value in given.items()}
    return running.post("/v1/chat/completions", HELLO, headers=encoded).status_code


def test_keys(guarded: Running) -> None:
    assert ask(guarded) == ask(guarded, authorization=f"bearer {KEYS[1]}") == 200
    for wrong in ("", "Bearer", "Bearer first-key2", "Bearer first-ke", "Basic first-key", "first-key"):
        assert ask(guarded, authorization=wrong) == 401
    for path, status in (("/health", 200), ("/", 200), ("/metrics", 401), ("/v1/models", 401), ("/openapi.json", 401)):
        assert guarded.client.get(path).status_code == status
    response = guarded.client.get("/v1/models")
    assert response.headers["www-authenticate"] == "Bearer" and response.json()["error"]["code"] == "invalid_api_key"


def test_hosts(guarded: Running) -> None:
    assert ask(guarded, host="localhost:1234") == ask(guarded, host="LOCALHOST") == 200
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        assert ask(guarded, host=host) == 403
    assert guarded.client.get("/health", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "host, name",
    [("a:1", "a"), ("A", "a"), ("[::1]:8000", "[::1]"), ("[::1]", "[::1]"), ("1.2.3.4:5", "1.2.3.4"), ("", "")],
)
def test_host_names(host: str, name: str) -> None:
    assert host_name(host) == name


def test_pages_of_other_sites(guarded: Running) -> None:
    assert ask(guarded, origin=guarded.url) == ask(guarded, origin="https://friend.example") == 200
    for origin in ("https://evil.example", "null", "https://friend.example.evil.example", "http://friend.example"):
        assert ask(guarded, origin=origin) == 403


def test_cors_is_for_those_that_are_named(guarded: Running) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answers = [
        guarded.client.options("/v1/chat/completions", headers={"origin": origin, **asked})
        for origin in ("https://friend.example", "https://evil.example")
    ]
    assert [answer.status_code for answer in answers] == [200, 403]
    assert answers[0].headers["access-control-allow-origin"] == "https://friend.example"
    assert "access-control-allow-credentials" not in answers[0].headers
    refused = guarded.client.get("/v1/models", headers={"origin": "https://friend.example"})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://friend.example"


def test_no_cors_unless_asked(server: Running) -> None:
    response = server.client.get("/v1/models", headers={"origin": server.url})
    assert response.status_code == 200 and not [name for name in response.headers if name.startswith("access-control")]


def test_request_ids(guarded: Running) -> None:
    ids = [guarded.client.get("/health").headers["x-request-id"] for _ in range(3)]
    assert len(set(ids)) == 3
    for path in ("/health", "/nothing", "/v1/models"):
        assert guarded.client.get(path, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("x" * 200, "a b", "ä"):
        assert guarded.client.get("/health", headers={"x-request-id": odd.encode()}).headers["x-request-id"] != odd
