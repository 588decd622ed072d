"""One HTTP request and its response: the body with its limits, JSON, server-sent events, and clients that leave."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

from bitnet_numba.server.errors import ApiError, from_validation

AnyBody = TypeVar("AnyBody", bound=BaseModel)

JSON_HEADERS = [(b"content-type", b"application/json")]
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]
# What is thrown away of a body that is too large, so that its sender, who reads nothing before, sees the answer.
MAX_DISCARDED, DISCARD_TIME = 128 << 20, 10.0


class ClientLeft(Exception):
    """The connection is gone: nobody waits for the answer."""


def dump(content: object) -> bytes:
    """JSON, compact, in UTF-8."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class Exchange:
    """Reads the request and writes the response of one ASGI call."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self.scope, self._receive, self._send = scope, receive, send
        self.started = False  # whether the response's status has been sent
        self.left = False  # whether the client has
        self._loop = asyncio.get_running_loop()

    @property
    def request_id(self) -> str:
        """By which logs and clients call this request."""
        return str(self.scope["state"]["request_id"])

    @property
    def tenant(self) -> str:
        """Whose key it has, in a form that tells nothing of the key; empty if no keys are asked for."""
        return str(self.scope["state"].get("tenant", ""))

    def note_usage(self, usage: Mapping[str, Any]) -> None:
        """Tokens of the answer, for the log."""
        self.scope["state"]["usage"] = usage

    def header(self, name: bytes) -> str | None:
        """A header of the request, by its name in small letters; None if it has none."""
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key == name), None)

    async def body(self, kind: type[AnyBody], max_size: int, timeout: float) -> AnyBody:
        """The body as a model. Raises ApiError if it is none, too large or too late, ClientLeft if it never comes."""
        if self.header(b"content-encoding") not in (None, "", "identity"):
            raise ApiError(415, "compressed bodies are not supported", code="unsupported_encoding")
        length = self.header(b"content-length")
        too_large = ApiError(413, f"the body has more than {max_size:,} bytes", code="body_too_large")
        if length is not None and length.isdigit() and int(length) > max_size:
            raise too_large
        data = bytearray()

        async def read() -> None:
            more = True
            while more:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                data.extend(message.get("body", b""))
                if len(data) > max_size:
                    raise too_large
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(read(), timeout)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {timeout:g} s", code="timeout", headers={"connection": "close"}
            ) from None
        try:
            return kind.model_validate_json(bytes(data))
        except ValidationError as error:
            raise from_validation(error) from None

    async def json(self, content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Sends a whole response."""
        await self.respond(dump(content), b"application/json", status, headers)

    async def respond(
        self, body: bytes, content_type: bytes, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Sends a whole response of any type."""
        given = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()]
        length = (b"content-length", b"%d" % len(body))
        await self._start(status, [(b"content-type", content_type), length, *given])
        await self._send({"type": "http.response.body", "body": body})

    async def error(self, error: ApiError) -> None:
        """Sends an error: as the response, or as the last event of a stream that has begun."""
        if self.started:
            await self.event(b"data: " + dump(error.content()) + b"\n\n")
            await self.end_events()
            return
        if error.status == 413:
            await self._refuse_body(error)
        else:
            await self.json(error.content(), error.status, error.headers)

    async def start_events(self) -> None:
        """Begins a stream of events."""
        await self._start(200, EVENT_HEADERS)

    async def event(self, data: bytes) -> None:
        """Sends one or more events, written out; waits as long as the client reads too slowly."""
        if self.left:
            raise ClientLeft
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_events(self) -> None:
        """Ends a stream."""
        await self._send({"type": "http.response.body", "body": b""})

    @contextlib.asynccontextmanager
    async def watching(self, on_left: Callable[[], None]) -> AsyncIterator[None]:
        """Inside, after the body has been read, `on_left` is called as soon as the client has left."""

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self.left = True
            on_left()

        task = self._loop.create_task(watch())
        try:
            yield
        finally:
            task.cancel()

    @contextlib.contextmanager
    def deadline(self, seconds: float, on_late: Callable[[], None]) -> Iterator[None]:
        """Inside, `on_late` is called when the time is over."""
        timer = self._loop.call_later(seconds, on_late)
        try:
            yield
        finally:
            timer.cancel()

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _refuse_body(self, error: ApiError) -> None:
        """Answers while the body still comes, and reads on for a while: a closed connection would hide the answer."""
        body = dump(error.content())
        headers = [*JSON_HEADERS, (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        await self._start(error.status, headers)
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

        async def discard() -> None:
            discarded = 0
            message: MutableMapping[str, Any] = {}
            while discarded < MAX_DISCARDED and message.get("more_body", True):
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    return
                discarded += len(message.get("body", b""))

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(discard(), DISCARD_TIME)
        await self._send({"type": "http.response.body", "body": b""})
