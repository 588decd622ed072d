"""uvicorn, with what it lacks: limits for senders and readers that are slow, and draining before it stops listening."""

import asyncio
import signal
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bitnet_numba.server.service import Service

KEEP_ALIVE = 75.0  # seconds between two requests of a connection; more than proxies usually keep one
STALLED = 60.0  # seconds after which a client that reads nothing is taken for gone
DRAIN_TICK = 0.05
END_TIMEOUT = 5  # seconds for the last bytes of responses, once nothing is generated any more


class Protocol(HttpToolsProtocol):
    """One connection. A request's header must be complete in time and of limited size, as must a body nobody reads."""

    receive_timeout = 30.0
    max_header = 64 << 10

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._receive_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._header_size = 0
        self._in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection that never says anything ends as a slow one does."""
        super().connection_made(transport)
        self._start_receive_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the timers."""
        self._stop_receive_timer()
        self._stop_stall_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, of a header no more than may come: a larger one can arrive at once."""
        while data and not self.transport.is_closing():
            part = data if self._in_body else data[: self.max_header + 1 - self._header_size]
            data = data[len(part) :]
            if not self._in_body:
                self._start_receive_timer()
                self._header_size += len(part)
            super().data_received(part)
            if not self._in_body and self._header_size > self.max_header and not self.transport.is_closing():
                self._refuse(431, f"the header has more than {self.max_header} bytes")

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_body = False
        self._start_receive_timer()

    def on_headers_complete(self) -> None:
        """The header is here; whoever reads the body has limits of its own for it."""
        self._stop_receive_timer()
        self._start_receive_timer()
        self._in_body, self._header_size = True, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is here."""
        self._stop_receive_timer()
        self._in_body = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is written to."""
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(STALLED, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads."""
        self._stop_stall_timer()
        super().resume_writing()

    def _start_receive_timer(self) -> None:
        if self._receive_timer is None:
            self._receive_timer = self.loop.call_later(self.receive_timeout, self._receive_late)

    def _stop_receive_timer(self) -> None:
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _receive_late(self) -> None:
        self._receive_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_receive_timer()  # something came while an answer is under way, which is not to be cut off
        elif self._in_body:  # of a request that has been answered without it
            self.transport.close()
        elif not self.transport.is_closing():
            self._refuse(408, "the header did not arrive in time")

    def _refuse(self, status: int, message: str) -> None:
        """Answers what never became a request, and closes; with another one's response under way, only closes."""
        if self.cycle is None or self.cycle.response_complete:
            line = {408: b"408 Request Timeout", 431: b"431 Request Header Fields Too Large"}[status]
            body = message.encode()
            head = b"HTTP/1.1 %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            self.transport.write(head % (line, len(body)) + body)
        self.transport.close()


class Server(uvicorn.Server):
    """Ends by itself after SIGTERM, once no answer is open or time is over; at once after Ctrl-C."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        """Runs until it is told to end."""
        self._loop = asyncio.get_running_loop()
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain, or, the second time or for Ctrl-C, ends."""
        if sig == signal.SIGTERM and self._loop is not None and not self._service.draining:
            self._service.draining = True
            self._loop.call_soon_threadsafe(self._drain)
        else:
            self._end()

    def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._service.settings.drain_timeout

        def look() -> None:
            if self._service.open and loop.time() < until:
                loop.call_later(DRAIN_TICK, look)
            else:
                self._end()

        look()

    def _end(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: Any = None) -> None:
        """Ends open answers with an error, so that no connection waits for one, then stops as uvicorn does."""
        await asyncio.get_running_loop().run_in_executor(None, self._service.close)
        await super().shutdown(sockets)


def make_server(app: Any, service: Service) -> Server:
    """A server that is ready to run."""
    settings = service.settings

    class ServiceProtocol(Protocol):
        receive_timeout = settings.receive_timeout
        max_header = settings.max_header

    config = uvicorn.Config(
        app,
        http=ServiceProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=int(KEEP_ALIVE),
        timeout_graceful_shutdown=END_TIMEOUT,
    )
    return Server(config, service)
