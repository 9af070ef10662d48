"""A replica: one pipeline and its engine, in a process of its own.

Owns what a replica loads, and what it tells the router of its costs. Requests come as values and leave as events. Knows
nothing of Ray but which methods a deployment may have, and nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import torch

from limner.deploy.cluster import check_nodes, this_node
from limner.engine import (
    EditRequest,
    Engine,
    EngineStats,
    Event,
    Failed,
    Finished,
    ModelCard,
    Prefilled,
    PrefillRequest,
)
from limner.engine.load import load_in_thread, load_pipeline
from limner.errors import LimnerError
from limner.grid import num_tokens
from limner.options import ModelOptions
from limner.server.logs import log_own
from limner.store import ReferenceStore, StoreStats

__all__ = ["Replica"]

_UNBOUNDED = 1 << 30
_SMOOTH = 0.2
"""Weight of the newest value in the running means for the router."""


class Replica:
    """A pipeline with its store and engine, as a deployment of Ray Serve.

    `versions` are those of the process that deploys: raises `InvalidRequest` where this process has others.
    """

    def __init__(
        self,
        model: ModelOptions,
        *,
        versions: dict[str, str],
        threads: int,
        max_batch: int,
        store: str | None,
        store_bytes: int | None,
        store_memory: int,
        memory_bytes: int | None,
        store_cache: str | None = None,
    ) -> None:
        check_nodes({socket.gethostname(): this_node()}, driver=versions, option="versions")
        log_own("text")
        torch.set_num_threads(threads)
        if store is None:
            opened = ReferenceStore(memory_bytes=store_memory)
        else:
            opened = ReferenceStore.open(store, cache=store_cache, disk_bytes=store_bytes, memory_bytes=store_memory)
        self._model = model
        self._pipe = load_in_thread(lambda: load_pipeline(model, store=opened))
        # the ingress bounds what waits
        self._engine = Engine(self._pipe, max_waiting=_UNBOUNDED, max_batch=max_batch, memory_bytes=memory_bytes)
        self._means: dict[str, float] = {}

    def card(self) -> tuple[ModelOptions, ModelCard]:
        """Return how the model was loaded, and its card."""
        return self._model, ModelCard.of(self._pipe, memory_bytes=self._engine.admission.memory_bytes)

    async def draw(
        self, request: EditRequest | PrefillRequest, *, id: str, owner: str, priority: int, timeout: float | None
    ) -> AsyncIterator[Event]:
        """Give the events of a request. Closing the iterator before the last one cancels it."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listener(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ended = False
        try:
            self._engine.submit(
                request, id=id, listener=listener, owner=owner, priority=priority, timeout=timeout, accepted=True
            )
            while not ended:
                event = await events.get()
                ended = isinstance(event, (Finished, Prefilled, Failed))
                if isinstance(event, Finished):
                    self._measure(request, event)
                yield _portable(event)
        except LimnerError as error:
            ended = True
            yield Failed(error)
        finally:
            if not ended:
                self._engine.cancel(id)

    def _measure(self, request: EditRequest | PrefillRequest, event: Finished) -> None:
        """Update the running means with the costs of a request."""
        result = event.result
        prefilled = result.reference_cache == "miss"
        fetched = prefilled or result.reference_cache == "remote"
        costs = {
            "service_seconds": (result.ran - fetched * result.timings.references) * len(result.seeds) / result.batch
        }
        tokens = num_tokens(*(r.report.processed_size for r in request.references))
        if tokens:
            costs["kv_bytes_per_token"] = self._pipe.kv_bytes(tokens) / tokens
        if prefilled:
            costs["prefill_seconds_per_token"] = result.timings.references / tokens
        for name, value in costs.items():
            self._means[name] = self._means.get(name, value) * (1 - _SMOOTH) + value * _SMOOTH

    def record_routing_stats(self) -> dict[str, float]:
        """Return the means for the router. Ray polls this, and sends it on where it changed: hence two digits."""
        return {name: float(f"{value:.2g}") for name, value in self._means.items()}

    async def forget(self, key: str) -> bool:
        """Remove References from every tier, in a thread: a remote tier may take seconds to answer."""
        return await asyncio.to_thread(self._engine.forget, key)

    def stats(self) -> tuple[int, EngineStats, StoreStats]:
        """Return the id of the process, and the counts of its engine and store."""
        return os.getpid(), self._engine.stats(), self._engine.store_stats()

    def check_health(self) -> None:
        """Raise if the engine's thread has ended; Ray then starts another replica in place of this one."""
        if not self._engine.is_alive:
            raise RuntimeError("the engine's thread has ended; its log says why")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


def _portable(event: Event) -> Event:
    """Replace an error of another library, which may not be picklable, by its type and message."""
    if isinstance(event, Failed) and not isinstance(event.error, LimnerError):
        return Failed(RuntimeError(f"{type(event.error).__name__}: {event.error}"))
    return event
