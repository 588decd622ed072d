"""The ASGI application: routes, and what every request passes before it reaches one."""

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from bitnet_numba.errors import one_line
from bitnet_numba.server.chat_completions import chat_completions
from bitnet_numba.server.completions import completions
from bitnet_numba.server.embeddings import embeddings
from bitnet_numba.server.errors import ApiError
from bitnet_numba.server.exchange import ClientLeft, Exchange, dump
from bitnet_numba.server.gate import Gate, KeyCheck
from bitnet_numba.server.information import health, metrics, model, models, openapi
from bitnet_numba.server.page import page
from bitnet_numba.server.responses import responses
from bitnet_numba.server.schemas import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    ResponseBody,
    TokenizeBody,
)
from bitnet_numba.server.service import Service
from bitnet_numba.server.tokenization import detokenize, tokenize

_log = logging.getLogger("bitnet_numba.server")
# What answers a request with a body.
Poster = Callable[[Service, Exchange, Any], Awaitable[None]]
Getter = Callable[[Service, Exchange], Awaitable[None]]

POSTS: dict[str, tuple[type[Body], Poster]] = {
    "/v1/chat/completions": (ChatBody, chat_completions),
    "/v1/completions": (CompletionBody, completions),
    "/v1/responses": (ResponseBody, responses),
    "/v1/embeddings": (EmbeddingBody, embeddings),
    "/tokenize": (TokenizeBody, tokenize),
    "/detokenize": (DetokenizeBody, detokenize),
}
GETS: dict[str, Getter] = {
    "/": page,
    "/health": health,
    "/metrics": metrics,
    "/v1/models": models,
    "/v1/models/{model:path}": model,
    "/openapi.json": openapi,
}


class Endpoint:
    """One route as an ASGI application: reads the body, if there is one, and turns every error into a response."""

    def __init__(self, service: Service, answer: Poster | Getter, kind: type[Body] | None = None):
        """kind: of the body; None: a request has none."""
        self._service, self._answer, self._kind = service, answer, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        exchange = Exchange(scope, receive, send)
        try:
            try:
                arguments: list[Any] = []
                if self._kind is not None:
                    settings = self._service.settings
                    arguments.append(await exchange.body(self._kind, settings.max_body, settings.receive_timeout))
                await self._answer(self._service, exchange, *arguments)
            except ApiError as error:
                if not exchange.left:
                    await exchange.error(error)
            except ClientLeft:
                raise
            except Exception as error:
                # A mistake of ours: the traceback is for the log, the client learns only that it is one.
                _log.exception("request %s: %s", exchange.request_id, one_line(error))
                await exchange.error(ApiError(500, "internal error", code="internal_error"))
        except ClientLeft:
            pass


def create_app(service: Service, lifespan: Callable[[], "contextlib.AbstractAsyncContextManager[None]"]) -> Starlette:
    """The application. lifespan: what runs around its requests, such as the loading of the model."""
    settings = service.settings

    @contextlib.asynccontextmanager
    async def around(app: Starlette) -> AsyncIterator[None]:
        async with lifespan():
            yield

    routes = [Route(path, Endpoint(service, answer, kind), methods=["POST"]) for path, (kind, answer) in POSTS.items()]
    routes += [Route(path, Endpoint(service, answer), methods=["GET"]) for path, answer in GETS.items()]
    gate = Middleware(
        Gate,
        metrics=service.metrics,
        paths=[*POSTS, *GETS],
        allowed_hosts=settings.allowed_hosts,
        origins=settings.cors_origins,
        log_requests=settings.log_requests,
    )
    middleware = [gate, Middleware(KeyCheck, keys=settings.api_keys)]
    if settings.cors_origins:
        # Credentials are never allowed: a key is sent in a header that a page has to know.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
        middleware.insert(1, cors)
    app = Starlette(
        routes=routes, middleware=middleware, lifespan=around, exception_handlers={HTTPException: _http_error}
    )
    app.router.redirect_slashes = False
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in the form of all errors."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    message = f"{path} does not take {request.method}"
    if error.status_code == 404:
        message = f"there is no {path}{_near(path)}"
    content = dump(ApiError(error.status_code, message).content())
    return Response(content, error.status_code, dict(error.headers or {}), "application/json")


def _near(path: str) -> str:
    """The end of the message on an unknown path: the path that was probably meant; empty if there is none."""
    bare = path.rstrip("/")
    for other in (bare, f"/v1{bare}", bare.replace("/v1/v1/", "/v1/", 1)):
        if other in POSTS or other in GETS:
            return f", but {other}"
    return ""
