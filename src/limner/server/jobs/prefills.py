"""Prefills that callers wait for: K/V of references computed, or found, without a job.

Works in one event loop; the engine's thread reaches it through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from limner.engine import Event, Failed, Prefilled
from limner.engine.protocol import Backend
from limner.errors import QueueFull
from limner.images import PreparedReference
from limner.requests import PrefillRequest

__all__ = ["Prefills"]


class Prefills:
    """Bring prefills to an engine and wait for them."""

    def __init__(self, engine: Backend) -> None:
        self._engine = engine
        self._waiting: set[asyncio.Future[Prefilled]] = set()

    async def compute(self, references: Sequence[PreparedReference], *, owner: str, id: str) -> Prefilled:
        """Compute the K/V of references, or find them. Raises what the engine raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Prefilled] = loop.create_future()
        self._waiting.add(future)

        def settle(event: Event) -> None:
            if future.done():
                return
            if isinstance(event, Prefilled):
                future.set_result(event)
            elif isinstance(event, Failed):
                future.set_exception(event.error)

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(settle, event)

        try:
            self._engine.submit(PrefillRequest(references=tuple(references)), id=id, listener=listen, owner=owner)
            return await future
        except asyncio.CancelledError:
            self._engine.cancel(id)
            raise
        finally:
            self._waiting.discard(future)

    def close(self) -> None:
        """Fail the prefills that callers still wait for, since the engine is closed."""
        for future in self._waiting:
            if not future.done():
                future.set_exception(QueueFull("the server shuts down; send the request again later"))
