"""The ASGI middleware around all routes: limits, token, security headers, metrics, and unexpected errors."""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from funnel.serving.service import Service

API = "/v1/"
UPLOAD = "/v1/files"
CLIENT_DISCONNECTED = 499  # not sent, only counted; nginx's status
RETRY_SECONDS = "1"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

logger = logging.getLogger(__name__)


def error_response(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as the API returns it."""
    safe = " ".join(detail.encode("utf-8", errors="replace").decode().split())
    return JSONResponse({"detail": safe}, status, headers)


class Guard:
    """Wraps an application.

    - Requests are refused while the server is shutting down, without the right token, from pages of other sites, and, if only
      local ones are allowed, for other host names.
    - Bodies are limited in size and time while they are read.
    - Every response has the security headers, and is counted.
    - An unexpected exception is logged, and gives status 500.
    """

    def __init__(self, app: ASGIApp, service: "Service") -> None:
        self.app, self.service = app, service
        self._token_digest = None if service.token is None else _digest(service.token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, response = time.perf_counter(), _Response(scope, send)
        try:
            refusal = self._refuse(scope)
            if refusal is not None:
                await refusal(scope, receive, response.send)
            else:
                await self.app(scope, self._limit_body(scope, receive), response.send)
        except asyncio.CancelledError:
            if not self.service.is_stopping or response.status:
                raise
            await error_response(503, "the server is shutting down", {"Connection": "close"})(scope, receive, response.send)
        except ClientDisconnect:
            response.status = CLIENT_DISCONNECTED
        except Exception:
            logger.exception("%s %s failed", scope["method"], _route(scope))
            if response.status:  # its beginning has been sent
                raise
            await error_response(500, "unexpected error; the server's log says why")(scope, receive, response.send)
        finally:
            metrics, route = self.service.metrics, _route(scope)
            metrics.requests.labels(route, str(response.status or CLIENT_DISCONNECTED)).inc()
            metrics.seconds.labels(route).observe(time.perf_counter() - started)

    def _refuse(self, scope: Scope) -> JSONResponse | None:
        """The error to answer a request with before its body is read; None to let it pass."""
        headers = Headers(scope=scope)
        if self.service.is_stopping:
            return error_response(503, "the server is shutting down; try again later", {"Retry-After": RETRY_SECONDS})
        if self.service.only_local and not _is_local(headers.get("host", "")):
            return error_response(421, "without a token, only localhost is a valid host name; start the server with a token")
        if not scope["path"].startswith(API):
            return None
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return error_response(403, "pages of other sites must not use this server")
        if self._token_digest is not None:
            kind, _, token = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(_digest(token.strip()), self._token_digest):
                problem = "wrong token" if token else "no token"
                message = f"{problem}; send the header 'Authorization: Bearer TOKEN'"
                return error_response(401, message, {"WWW-Authenticate": "Bearer"})
        declared = headers.get("content-length", "")
        limit = self._body_limit(scope)
        return _too_large(limit) if declared.isdecimal() and int(declared[:20]) > limit else None

    def _body_limit(self, scope: Scope) -> int:
        return self.service.settings.file_bytes if scope["path"] == UPLOAD else self.service.settings.body_bytes

    def _limit_body(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` with limits: the size of the body and the time for it; for files, the time between two parts."""
        limit, timeout = self._body_limit(scope), self.service.settings.timeout
        deadline = None if scope["path"] == UPLOAD else time.monotonic() + timeout
        size, is_complete = 0, False

        async def limited() -> Message:
            nonlocal size, is_complete
            if is_complete:  # what follows says that the client has disconnected
                return await receive()
            try:
                remaining = timeout if deadline is None else deadline - time.monotonic()
                message = await asyncio.wait_for(receive(), remaining)
            except asyncio.TimeoutError:
                headers = {"Connection": "close"}
                raise HTTPException(408, "the body did not arrive in time; send it again", headers) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                is_complete = not message.get("more_body", False)
                if size > limit:
                    raise HTTPException(413, _too_large_detail(limit), {"Connection": "close"})
            return message

        return limited


class _Response:
    """Adds headers to a response, and remembers its status; 0 if none was sent."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope, self._send, self.status = scope, send, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(SECURITY_HEADERS)
            headers.setdefault("Cache-Control", "no-store" if self.scope["path"].startswith(API) else "no-cache")
        await self._send(message)


def _route(scope: Mapping[str, Any]) -> str:
    """The route's template, so that clients cannot invent labels of metrics."""
    return str(getattr(scope.get("route"), "path", "")) or ("static" if "endpoint" in scope else "other")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", errors="replace")).digest()


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine: a page of another site could have its own name resolve to 127.0.0.1."""
    try:
        return urlsplit(f"//{host}").hostname in LOOPBACK_NAMES
    except ValueError:
        return False


def _too_large(limit: int) -> JSONResponse:
    return error_response(413, _too_large_detail(limit))


def _too_large_detail(limit: int) -> str:
    return f"the body is larger than {limit:,} bytes; send less at a time"
