"""Limits of a request that hold before any route sees it: size and time of its body, and a key before either.

An ASGI middleware. It reads a body whole, up to a limit of its own and one over all requests, and hands it on; so a route
never waits for a slow caller, and what is refused is refused early.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from limner.errors import AccessDenied

__all__ = ["BodyLimits", "ErrorBody"]

ErrorBody = Callable[[str, int, str], dict[str, object]]
"""(path, status, message) to the body of an error in the dialect of that path."""


class BodyLimits:
    """`check_key(headers)` raises `AccessDenied`; `max_buffered` bytes may be in memory over all requests."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        max_buffered: int,
        seconds: float,
        check_key: Callable[[Headers], object],
        error_body: ErrorBody,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_buffered = max_buffered
        self._seconds = seconds
        self._check_key = check_key
        self._error_body = error_body
        self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        taken = 0
        try:
            try:
                self._check_key(headers)
            except AccessDenied as error:
                raise _Refused(403, str(error)) from None
            length = headers.get("content-length", "0")
            if not length.isdecimal():
                raise _Refused(400, f"content-length: {length[:40]!r} is not a number")
            if int(length[:20]) > self._max_bytes:
                raise _Refused(413, f"the body has {length[:20]} bytes; at most {self._max_bytes} are allowed")
            chunks: list[bytes] = []
            try:
                async with asyncio.timeout(self._seconds):
                    more = True
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            return
                        chunk = message.get("body", b"")
                        more = message.get("more_body", False)
                        if taken + len(chunk) > self._max_bytes:
                            raise _Refused(413, f"the body is over the {self._max_bytes} bytes that are allowed")
                        if self._buffered + len(chunk) > self._max_buffered:
                            raise _Refused(503, "too many large requests at once; try again later")
                        taken += len(chunk)
                        self._buffered += len(chunk)
                        chunks.append(chunk)
            except TimeoutError:
                raise _Refused(408, f"the body did not come within {self._seconds:g} seconds") from None
            await self._app(scope, _replay(b"".join(chunks), receive), send)
        except _Refused as refused:
            await self._refuse(scope["path"], refused, send)
        finally:
            self._buffered -= taken

    async def _refuse(self, path: str, refused: _Refused, send: Send) -> None:
        status = 401 if refused.status == 403 and path.startswith("/v1/images") else refused.status
        body = json.dumps(self._error_body(path, status, refused.message)).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers += [(b"retry-after", b"1")] if status == 503 else []
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body at once and then what else comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
