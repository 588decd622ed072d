"""A server in a thread of this process, on a port of its own."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from bitnet_numba.engine.engine import Engine
from bitnet_numba.server.app import create_app
from bitnet_numba.server.http_server import Server, make_server
from bitnet_numba.server.launch import listen
from bitnet_numba.server.service import Service
from bitnet_numba.server.settings import Settings


@dataclass
class Running:
    """A server under test."""

    port: int
    service: Service
    server: Server
    thread: threading.Thread
    client: httpx.Client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, content: Any, **options: Any) -> httpx.Response:
        """Sends JSON."""
        return self.client.post(path, json=content, **options)

    def events(self, path: str, content: Any) -> list[Any]:
        """The data of a stream's events; the last is "[DONE]" as it is."""
        with self.client.stream("POST", path, json={**content, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            return read_events("".join(response.iter_text()))

    def wait_until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Fails if it does not become true in time."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "it never became true"
            time.sleep(0.002)


def read_events(text: str) -> list[Any]:
    """The data of server-sent events."""
    assert text.endswith("\n\n")
    data = []
    for event in text.split("\n\n")[:-1]:
        assert event.startswith("data: ") and "\n" not in event
        value = event.removeprefix("data: ")
        data.append(value if value == "[DONE]" else json.loads(value))
    return data


@contextlib.contextmanager
def serving(load: Callable[[], Engine], wait: bool = True, **settings: Any) -> Iterator[Running]:
    """Serves a model, with a client for it. wait: until the model is loaded."""
    service = Service(Settings(**{"models": ("toy",), "receive_timeout": 5.0, **settings}))
    listener = listen("127.0.0.1", 0)

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        task = asyncio.get_running_loop().create_task(service.start(load))
        yield
        task.cancel()

    server = make_server(create_app(service, lifespan), service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    port = listener.getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0, trust_env=False) as client:
            running = Running(port, service, server, thread, client)
            # The first load of a machine compiles kernels.
            running.wait_until(lambda: server.started and (not wait or service.status == "ok"), 300.0)
            yield running
    finally:
        server.should_exit = True
        thread.join(20.0)
        assert not thread.is_alive(), "the server did not end"


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with listen("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])
