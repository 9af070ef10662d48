"""Who is answered before any route sees the request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from limner.server.http.errors import error_body
from limner.server.http.limits import LoopbackCallers


@pytest.mark.parametrize(
    ("client", "allowed"),
    [
        (("127.0.0.1", 5), True),
        (("::1", 5), True),
        (("127.9.9.9", 0), True),
        (("10.0.0.2", 5), False),
        (("::ffff:10.0.0.2", 5), False),
        (("", 0), False),
        (None, False),
    ],
)
def test_without_keys_other_machines_are_refused(client: Any, allowed: bool) -> None:
    sent: list[dict[str, Any]] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        sent.append({"status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/edit", "headers": [], "client": client}
    asyncio.run(LoopbackCallers(inner, error_body=error_body)(scope, send, send))
    assert sent[0]["status"] == (200 if allowed else 403)
    assert allowed or b"no keys" in sent[1]["body"]


@pytest.mark.parametrize("header", [b"x-forwarded-for", b"X-Forwarded-For", b"forwarded"])
def test_without_keys_what_a_caller_says_of_itself_counts_for_nothing(header: bytes) -> None:
    """A proxy that believes the header would have made 127.0.0.1 of the client."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/edit", "headers": [(header, b"127.0.0.1")], "client": ("127.0.0.1", 5)}
    asyncio.run(LoopbackCallers(send, error_body=error_body)(scope, send, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 403
