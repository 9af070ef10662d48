"""Fetch a picture for a program that has no event loop of its own, behind the guard of the service. Decodes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from limner.outbound.client import OutboundClient
from limner.outbound.pictures import fetch_picture

__all__ = ["fetch_now"]

_INSTEAD = "download the file and give its name"


def fetch_now(
    url: str, *, max_bytes: int, field: str, make_client: Callable[[], OutboundClient] | None = None
) -> bytes:
    """Return the file at a URL: https, public addresses only, every redirect checked. Raises `InvalidRequest`.

    It runs in a thread of its own, so that it also works where an event loop runs, as in a notebook.
    """

    async def fetch() -> bytes:
        client = (make_client or OutboundClient)()
        try:
            return await fetch_picture(url, client=client, max_bytes=max_bytes, field=field, instead=_INSTEAD)
        finally:
            client.close()

    with ThreadPoolExecutor(1, thread_name_prefix="limner-fetch") as thread:
        return thread.submit(asyncio.run, fetch()).result()
