"""What every request passes first: its id, its log line and count, the Host header, other sites' pages, the key.

Pure ASGI: middleware that wraps responses would hide from an endpoint that its client has left.
"""

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitnet_numba.errors import printable
from bitnet_numba.server.errors import ApiError
from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.metrics import Metrics

_log = logging.getLogger("bitnet_numba.server")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN_PATHS = ("/health", "/")  # need no key; the page has a field for one


class Gate:
    """Gives each request an id, which its response carries, and refuses foreign hosts and pages."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        paths: Iterable[str],
        allowed_hosts: Iterable[str],
        origins: Iterable[str],
        log_requests: bool,
    ):
        """paths: those that are counted by name. allowed_hosts: none: any. origins: of other sites that may ask."""
        self.app, self._metrics, self._log_requests = app, metrics, log_requests
        self._paths, self._hosts, self._origins = frozenset(paths), frozenset(allowed_hosts), frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        began, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            refusal = self._refusal(headers)
            if refusal is not None:
                await Exchange(scope, receive, send_with_id).error(refusal)
            else:
                await self.app(scope, receive, send_with_id)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status or 499)).inc()
            if self._log_requests:
                self._note(scope, status, time.perf_counter() - began, request_id)

    def _refusal(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if self._hosts and host_name(host) not in self._hosts:
            message = f"the host {host!r} is not allowed; --allow-host names further ones"
            return ApiError(403, message, code="host_not_allowed")
        # Browsers let any page send simple requests; what they cannot forge is where the page is from.
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins or host_of(origin) == host:
            return None
        message = f"pages of {origin!r} are not allowed; --cors-origin names those that are"
        return ApiError(403, message, code="origin_not_allowed")

    def _note(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        usage = scope["state"].get("usage")
        tokens = f" {usage['prompt_tokens']}+{usage['completion_tokens']} tokens" if usage else ""
        path = printable(scope["path"], 80)
        _log.info("%s %s %s%s %.3f s %s", scope["method"], path, status or "left", tokens, seconds, request_id)


class KeyCheck:
    """Lets only requests with one of the keys through, but for OPEN_PATHS."""

    def __init__(self, app: ASGIApp, *, keys: Iterable[str]):
        """keys: none: every request passes."""
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and self._digests and scope["path"] not in OPEN_PATHS:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            # Starlette decodes headers as latin-1; a key may be any text.
            digest = hashlib.sha256(key.strip(" \t").encode("latin-1")).digest()
            if scheme.lower() != "bearer" or not self._known(digest):
                message = "a valid key is needed, in the header Authorization: Bearer KEY"
                headers = {"www-authenticate": "Bearer"}
                error = ApiError(401, message, code="invalid_api_key", headers=headers)
                await Exchange(scope, receive, send).error(error)
                return
            scope.setdefault("state", {})["tenant"] = digest.hex()[:16]
        await self.app(scope, receive, send)

    def _known(self, digest: bytes) -> bool:
        """Looks at all keys, so that the time it takes says nothing of them."""
        return any([hmac.compare_digest(digest, known) for known in self._digests])


def host_of(origin: str) -> str | None:
    """The host, with its port, of a page's Origin header; None if that is no address."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):  # IPv6
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
