"""Random requests over many connections to a server, each answer checked: the same request has the same answer."""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from tests.server.helpers import read_events

PROMPTS = 40  # different ones
LIMIT = 1 << 20  # bytes of one line
WORDS = ("fox", "owl", "kite", "lantern", "Once", "The", "a", "and")
LEAVE_AFTER = 0.002  # seconds, at most


class Lost(AssertionError):
    """A request without the answer that it should have."""


class HttpSoak:
    """A run against one server of a model that answers texts and chats.

    counts: by what was asked. Answers are greedy, so that each is known once it has been seen.
    """

    def __init__(self, url: str, connections: int, seed: int = 0):
        address = urlsplit(url)
        assert address.hostname and address.port
        self._host, self._port, self._connections = address.hostname, address.port, connections
        self._dice = random.Random(seed)
        self._bodies = [self._new_body() for _ in range(PROMPTS)]
        self._known: dict[tuple[str, int], list[str]] = {}
        self.counts: Counter[str] = Counter()

    def run(self, requests: int, on_answer: Callable[[], None] = lambda: None) -> None:
        """Asks so many. on_answer: called after each. Raises Lost at the first that is wrong."""
        asyncio.run(self._run(requests, on_answer))

    async def _run(self, requests: int, on_answer: Callable[[], None]) -> None:
        left = requests

        async def client() -> None:
            nonlocal left
            connection = Connection(self._host, self._port)
            try:
                while left > 0:
                    left -= 1
                    await asyncio.wait_for(self._ask(connection), 60)
                    on_answer()
            finally:
                await connection.close()

        clients = [asyncio.ensure_future(client()) for _ in range(self._connections)]
        try:
            await asyncio.gather(*clients)
        finally:
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)

    def _new_body(self) -> dict[str, Any]:
        text = " ".join(self._dice.choices(WORDS, k=self._dice.randint(1, 6)))
        return {"prompt": text, "max_tokens": self._dice.randint(1, 4), "temperature": 0}

    async def _ask(self, connection: "Connection") -> None:
        number = self._dice.randrange(PROMPTS)
        body = self._bodies[number]
        kind = self._dice.choices(
            ("text", "streamed text", "chat", "streamed chat", "wrong", "left", "health"), (30, 40, 5, 5, 5, 5, 10)
        )[0]
        self.counts[kind] += 1
        if kind == "health":
            _check(await connection.ask("GET", "/health"), 200)
            return
        if kind == "wrong":
            answer = await connection.ask("POST", "/v1/completions", {**body, "n": 0})
            if json.loads(_check(answer, 400))["error"]["param"] != "n":
                raise Lost(f"another error: {answer}")
            return
        path, stream = "/v1/completions", kind in ("streamed text", "streamed chat", "left")
        if "chat" in kind:
            body = {**body, "messages": [{"role": "user", "content": body["prompt"]}]}
            path = "/v1/chat/completions"
        n = 1 + number % 2
        body = {**body, "n": n, "stream": stream}
        if kind == "left":
            await connection.leave(path, {**body, "max_tokens": 50}, self._dice.uniform(0, LEAVE_AFTER))
            return
        content = _check(await connection.ask("POST", path, body), 200)
        texts = _streamed(content, n) if stream else [_text(c) for c in json.loads(content)["choices"]]
        if self._known.setdefault((path, number), texts) != texts or len(texts) != n:
            raise Lost(f"{texts} is not {self._known[path, number]}, the answer to {body}")


def _check(answer: tuple[int, str], status: int) -> str:
    if answer[0] != status:
        raise Lost(f"status {answer[0]} instead of {status}: {answer[1]}")
    return answer[1]


def _text(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else (choice.get("message") or choice["delta"]).get("content") or ""


def _streamed(content: str, n: int) -> list[str]:
    events, texts, ended = read_events(content), [""] * n, [0] * n
    if events.pop() != "[DONE]":
        raise Lost(f"a stream without its end: {content}")
    for choice in (choice for event in events for choice in event["choices"]):
        texts[choice["index"]] += _text(choice)
        ended[choice["index"]] += choice["finish_reason"] is not None
    if ended != [1] * n:
        raise Lost(f"a stream whose answers end {ended} times: {content}")
    return texts


class Connection:
    """One connection that is kept between requests, and opened again where it has been closed."""

    def __init__(self, host: str, port: int):
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, content: Any = None) -> tuple[int, str]:
        """Status and body of the answer."""
        reader = await self._send(method, path, content)
        status, length, chunked = int((await reader.readuntil()).split()[1]), 0, False
        while (line := (await reader.readuntil()).lower()) != b"\r\n":
            if line.startswith(b"content-length:"):
                length = int(line.split()[1])
            chunked = chunked or line.startswith(b"transfer-encoding: chunked")
        if not chunked:
            return status, (await reader.readexactly(length)).decode()
        pieces = []
        while size := int(await reader.readuntil(), 16):
            pieces.append((await reader.readexactly(size + 2))[:-2])
        await reader.readexactly(2)
        return status, b"".join(pieces).decode()

    async def leave(self, path: str, content: Any, seconds: float) -> None:
        """Asks, and is gone a moment later."""
        await self._send("POST", path, content)
        await asyncio.sleep(seconds)
        await self.close()

    async def close(self) -> None:
        """Ends the connection."""
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _send(self, method: str, path: str, content: Any) -> asyncio.StreamReader:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=LIMIT)
        reader, writer = self._streams
        data = b"" if content is None else json.dumps(content).encode()
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
        )
        return reader
