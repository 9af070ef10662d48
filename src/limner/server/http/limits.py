"""What is refused before a route sees a request: no key, a body too large or too slow, callers from elsewhere.

ASGI middlewares. A body is read whole, within a limit of its own and one over all requests, before the route runs, so a
route never waits for a slow caller and refusals come early.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from limner.errors import AccessDenied, QueueFull, RateLimited
from limner.outbound.urls import Origin
from limner.server.access.bodies import Bodies, Body
from limner.server.access.keys import Owner
from limner.server.http.errors import answer_of

__all__ = ["BodyLimits", "ErrorBody", "LocalCallers", "LoopbackCallers"]

ErrorBody = Callable[[str, int, str], Mapping[str, object]]
"""(path, status, message) to the body of an error in the dialect of that path."""

_SMALL = 1 << 20
"""More bytes are joined in a thread, which lets all others go on."""


class BodyLimits:
    """Find the owner, then read the body, as far as `bodies` has room for it.

    `owner_of(headers)` raises `AccessDenied`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        bodies: Bodies,
        seconds: float,
        owner_of: Callable[[Headers], Owner],
        error_body: ErrorBody,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._bodies = bodies
        self._seconds = seconds
        self._owner_of = owner_of
        self._error_body = error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        taken: Body | None = None
        try:
            owner = self._owner_of(headers)
            scope.setdefault("state", {})["owner"] = owner  # for those who read the body
            length = headers.get("content-length", "0")
            if not length.isdecimal():
                raise _Refused(400, f"content-length: {length[:40]!r} is not a number")
            if int(length[:20]) > self._max_bytes:
                raise _Refused(413, f"the body has {length[:20]} bytes; at most {self._max_bytes} are allowed")
            taken = self._bodies.open(owner)
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
                        if taken.num_bytes + len(chunk) > self._max_bytes:
                            raise _Refused(413, f"the body is over the {self._max_bytes} bytes that are allowed")
                        taken.take(len(chunk))
                        chunks.append(chunk)
            except TimeoutError:
                raise _Refused(408, f"the body did not come within {self._seconds:g} seconds") from None
            taken.come()
            body = _join(chunks) if taken.num_bytes <= _SMALL else await asyncio.to_thread(_join, chunks)
            await self._app(scope, _replay(body, receive), send)
        except (AccessDenied, RateLimited, QueueFull) as error:  # routes answer theirs themselves
            await _refuse(send, *answer_of(scope["path"], error))
        except _Refused as refused:
            await _refuse(send, refused.status, self._error_body(scope["path"], refused.status, refused.message), {})
        finally:
            if taken is not None:
                taken.close()


def _join(chunks: list[bytes]) -> bytes:
    body = b"".join(chunks)
    chunks.clear()  # so that it is not in memory twice while the route works
    return body


class LocalCallers:
    """For a server without keys: refuse requests that another site's page makes a browser of this machine send.

    Such a page can let a name of its own resolve to 127.0.0.1 (then `Host` is that name), or send a form across sites
    (then `Origin` is that site). Programs send neither. Pages of `browser_origins` are let through.
    """

    def __init__(
        self, app: ASGIApp, *, error_body: ErrorBody, browser_origins: Collection[Origin] = frozenset()
    ) -> None:
        self._app = app
        self._error_body = error_body
        self._browser_origins = frozenset(map(str, browser_origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            hosts, origins = headers.getlist("host"), headers.getlist("origin")
            problem = ""
            if len(hosts) != 1 or not _is_local(f"//{hosts[0]}"):
                problem = "the header Host has to be localhost, 127.0.0.1 or [::1]: this server has no keys"
            elif not all(origin in self._browser_origins or _is_local(origin) for origin in origins):
                problem = "pages of other sites may not use this server, which has no keys"
            if problem:
                await _refuse(send, 400, self._error_body(scope["path"], 400, problem), {})
                return
        await self._app(scope, receive, send)


class LoopbackCallers:
    """For a server without keys behind a proxy that may listen anywhere: refuse callers from other machines.

    A proxy may take the caller's address from a header that the caller sent, so requests with such a header are refused.
    """

    def __init__(self, app: ASGIApp, *, error_body: ErrorBody) -> None:
        self._app = app
        self._error_body = error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        forwarded = {b"x-forwarded-for", b"forwarded"} & {name.lower() for name, _ in scope.get("headers", ())}
        if scope["type"] == "http" and (forwarded or not _is_loopback(scope.get("client"))):
            problem = "this server has no keys, and answers callers on its own machine alone; start it with keys"
            await _refuse(send, 403, self._error_body(scope["path"], 403, problem), {})
            return
        await self._app(scope, receive, send)


def _is_loopback(client: Any) -> bool:
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except (TypeError, ValueError, IndexError):
        return False


def _is_local(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.hostname in ("localhost", "127.0.0.1", "::1") and "@" not in parts.netloc
    except ValueError:
        return False


async def _refuse(send: Send, status: int, content: Mapping[str, object], more: Mapping[str, str]) -> None:
    """Answer without reading the rest of the request, so the connection cannot be used again."""
    body = json.dumps(content).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **more}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a whole body, then the messages that follow."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
