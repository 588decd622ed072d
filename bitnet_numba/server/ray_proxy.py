"""What Ray Serve's proxies do for our replicas: a conversation keeps its replica, and an answer whose replica is gone
ends with an error instead of breaking off. The second is found by a variable of the environment that Ray starts in:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=bitnet_numba.server.ray_proxy:middleware ray start --head
"""

import random
import uuid
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitnet_numba.server.errors import busy
from bitnet_numba.server.exchange import EVENT_HEADERS, Exchange

ROUTER = f"{__name__}.SessionRouter"


class SessionRouter(ConsistentHashRouter):
    """Requests with a header x-session-id go to the replica that a consistent hash of it names, or to the next ones if
    that is full; others to the less busy of two."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Groups of replicas, in the order in which they are asked."""
        if pending_request is None or pending_request.metadata.session_id or not candidate_replicas:
            chosen: list[list[Any]] = await super().choose_replicas(candidate_replicas, pending_request)
            return chosen
        pending_request.routing_context.should_backoff = True
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


def middleware() -> list[Middleware]:
    """What the proxies put around every application."""
    return [Middleware(BrokenAnswers)]


class BrokenAnswers:
    """Ends a stream of events that breaks off with an error, and answers a request that nobody has answered."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = ended = streams = left = False

        async def note_left() -> Message:
            nonlocal left
            message = await receive()
            left = left or message["type"] == "http.disconnect"
            return message

        async def note_state(message: Message) -> None:
            nonlocal started, ended, streams
            if message["type"] == "http.response.start":
                started, streams = True, EVENT_HEADERS[0] in [tuple(header) for header in message.get("headers", ())]
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        await self.app(scope, note_left, note_state)
        if left or ended or (started and not streams):
            return
        scope.setdefault("state", {}).setdefault("request_id", uuid.uuid4().hex)
        exchange = Exchange(scope, receive, send)
        exchange.started = started
        await exchange.error(busy("the replica that answered is gone", "replica_lost"))
