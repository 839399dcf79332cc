"""Who may use the server, and how much may be sent to it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from keras_openllama.serving.errors import ApiError

# Open to everybody who can reach the server: they reveal nothing and cost nothing.
PUBLIC_PATHS = ("/", "/health")
BODY_TIME_LIMIT = 60.0  # Seconds.


def error_response(error: ApiError) -> JSONResponse:
    """Returns the response for an error.

    Example:
        >>> error_response(ApiError("Unknown.", status=404)).status_code
        404
    """
    return JSONResponse(error.body(), error.status, error.headers)


class AccessControl:
    """Middleware that refuses unknown hosts and requests without an API key.

    Args:
        app: The application.
        allowed_hosts: Hosts, without a port, by which clients may call the server;
            `"*"` allows all. A page of another site cannot reach a server on the
            loopback interface by a name of its own (DNS rebinding).
        api_keys: Keys, one of which each request must have; empty for none.

    Example:
        >>> control = AccessControl(app=None, allowed_hosts=["localhost"])
        >>> control.allows_host("localhost:8000"), control.allows_host("evil.example")
        (True, False)
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: Sequence[str] = ("*",),
        api_keys: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._hosts = {host.lower() for host in allowed_hosts}
        self._digests = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        error = None
        if not self.allows_host(headers.get(b"host", b"").decode("latin-1")):
            error = ApiError(
                "This host is not allowed. Start the server with --allowed-host HOST.",
                status=421,
                code="host_not_allowed",
            )
        elif scope["path"] not in PUBLIC_PATHS and not self.allows_key(
            headers.get(b"authorization", b"")
        ):
            error = ApiError(
                "The API key is missing or wrong. Send it as `Authorization: Bearer "
                "KEY`.",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        app = error_response(error) if error else self._app
        await app(scope, receive, send)

    def allows_host(self, header: str) -> bool:
        """Whether clients may call the server by the `Host` of a request."""
        if "*" in self._hosts:
            return True
        if header.startswith("["):  # An address of IPv6.
            host = header[1:].partition("]")[0]
        else:
            host = header.partition(":")[0]
        return host.lower() in self._hosts

    def allows_key(self, authorization: bytes) -> bool:
        """Whether a request has one of the API keys, compared in constant time."""
        if not self._digests:
            return True
        scheme, _, key = authorization.partition(b" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key):
    return hashlib.sha256(key).digest()


async def read_json_body(request: Request, max_bytes: int) -> bytes:
    """Reads the body of a request.

    Args:
        request: The request.
        max_bytes: Maximum length of the body.

    Raises:
        ApiError: If the body is too long, arrives too slowly, or is not declared as
            JSON. Pages of other sites can send other types without being asked.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip()
    if content_type.lower() != "application/json":
        raise ApiError(
            "The header `Content-Type: application/json` is missing. Received: "
            f"{content_type[:100]!r}",
            status=415,
        )
    too_long = ApiError(
        f"The body must have at most {max_bytes} bytes.",
        status=413,
        code="body_too_large",
        # What remains of the body is not read.
        headers={"Connection": "close"},
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_long
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_TIME_LIMIT):
            async for chunk in request.stream():
                data += chunk
                if len(data) > max_bytes:
                    raise too_long
    except TimeoutError as error:
        raise ApiError(
            f"The body took longer than {BODY_TIME_LIMIT:g} s.", status=408
        ) from error
    return bytes(data)
