"""An engine whose pipelines are in other processes: what the server calls is here, what draws is a replica.

Owns the way of a request to a replica and back: events as they come, cancellation, deadlines, and that a request whose
replica died is sent again. A picture is a function of its request, seeds included, so drawing it twice is safe. Knows
nothing of HTTP or durability, and of Ray only that a handle gives events and which of its errors mean a lost replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch

from limner.config import ModelGeometry, ReferencePolicy
from limner.engine import (
    EngineStats,
    Event,
    Failed,
    Finished,
    Prefilled,
    Progress,
    Started,
    check_request,
    check_room_for,
)
from limner.errors import Cancelled, DeadlineExceeded, InvalidRequest, LimnerError, QueueFull, RemoteError
from limner.images import PreparedReference
from limner.memory import Formats, call_bytes
from limner.pipeline import Pipeline
from limner.references import reference_key
from limner.requests import EditRequest, PrefillRequest
from limner.store import StoreStats

__all__ = ["LostReplica", "ModelCard", "RemoteEngine", "Replicas"]

_logger = logging.getLogger("limner.server")
_GRID = 256
_MOST_LOSSES = 5
"""Replicas that a request may lose. It may be what kills them, and should not take all of them."""
_MOST_WAITS = 20
"""Replicas that may end while it only waits there: another request may be what kills them."""
_LONGEST_PAUSE = 5.0
_KNOWN_KEYS = 65536


class LostReplica(Exception):
    """The replica that had a request died, was stopped, or cannot be reached; `counts`: the request may be why."""

    def __init__(self, problem: str, *, counts: bool = True) -> None:
        super().__init__(problem)
        self.counts = counts


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What a server has to know of the pipeline of its replicas, as plain values."""

    digest: str
    reference_weights: str
    dtype: str
    kernel: str
    kv_cache_dtype: str | None
    reference_policy: ReferencePolicy
    default_size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    text_length: int
    previews: bool
    geometry: ModelGeometry
    formats: Formats
    whole_pixels: int
    memory_bytes: int

    @classmethod
    def of(cls, pipe: Pipeline, *, memory_bytes: int) -> ModelCard:
        return cls(
            digest=pipe.digest,
            reference_weights=pipe.reference_weights,
            dtype=str(pipe.dtype).removeprefix("torch."),
            kernel=pipe.kernel,
            kv_cache_dtype=pipe.kv_cache_dtype,
            reference_policy=pipe.reference_policy,
            default_size=pipe.default_size,
            sizes=pipe.sizes,
            text_length=pipe.text_encoder.max_length,
            previews=pipe.latent_preview is not None,
            geometry=pipe.geometry,
            formats=pipe.formats,
            whole_pixels=pipe.autoencoder.whole_pixels,
            memory_bytes=memory_bytes,
        )

    def memory_needed(self, *, num_ref: int, num_own: int, batch: int) -> int:
        """As `Pipeline.memory_needed`."""
        return call_bytes(
            self.geometry.transformer,
            self.geometry.autoencoder,
            num_ref=num_ref,
            num_own=num_own,
            batch=batch,
            formats=self.formats,
            whole_pixels=self.whole_pixels,
            reference_pixels=min(num_ref * _GRID, self.reference_policy.pixels),
        )


class Replicas(Protocol):
    """The replicas, whichever of them does a request."""

    def run(
        self, request: EditRequest, *, id: str, owner: str, priority: int, timeout: float | None
    ) -> contextlib.AbstractAsyncContextManager[AsyncIterator[Event]]:
        """The events of a request: a prefill alone where it has no seeds. Leaving the block before the last one cancels
        it. Raises `LostReplica`."""

    async def forget(self, key: str) -> bool:
        """Removes References from the store of every replica; whether one had them. Raises `RemoteError` unless all
        answer."""

    async def store_stats(self) -> list[StoreStats]:
        """The counts of the replicas that answer."""


@dataclass(kw_only=True, eq=False, slots=True)
class _Request:
    id: str
    request: EditRequest
    listener: Callable[[Event], None]
    owner: str
    priority: int
    deadline: float | None
    began: bool = False
    task: asyncio.Task[None] | None = None


class RemoteEngine:
    """`limner.engine.Engine` for a server: the same calls, over replicas. Lives in the event loop that made it.

    `max_waiting` requests may wait, in all; each replica draws `max_batch` images at once.
    """

    def __init__(self, replicas: Replicas, card: ModelCard, *, max_waiting: int, max_batch: int) -> None:
        self.max_waiting = max_waiting
        self.max_batch = max_batch
        self.card = card
        self.pipe = RemotePipeline(self)
        self.replicas = replicas
        self.loop = asyncio.get_running_loop()
        # what is sent belongs to the job, not to the HTTP request that came with it, which may be cancelled
        self._context = contextvars.Context()
        self._requests: dict[str, _Request] = {}
        self._stats = EngineStats()
        self._batches = 0.0
        self._closed = False

    # callers

    def check(self, request: EditRequest) -> tuple[int, int]:
        """The output size (width, height) of a request that can run. Raises `InvalidRequest` and `CapacityError`."""
        return check_request(
            request,
            max_batch=self.max_batch,
            default_size=self.card.default_size,
            text_length=self.card.text_length,
            memory_needed=self.card.memory_needed,
            memory_bytes=self.card.memory_bytes,
        )

    def check_room(self, *, beside: int = 0) -> None:
        """Raises `QueueFull` where no more requests may wait; `beside` are on their way to the queue."""
        waiting = self._waiting() + beside
        if waiting >= self.max_waiting:
            self._stats.refused += 1
            raise QueueFull(f"{waiting} requests wait, which is all that may; try again later")

    @property
    def model(self) -> ModelCard:
        """What the replicas have loaded."""
        return self.card

    def key_of(self, prepared: Sequence[PreparedReference]) -> str:
        """As `Pipeline.key_of`, in the arithmetic of the replica that was asked."""
        return self.pipe.key_of(prepared)

    def holds(self, key: str) -> bool:
        """Whether some replica had the K/V of a key; it may have dropped them since."""
        return key in self.pipe.store

    def forget(self, key: str) -> bool:
        """Removes K/V from every replica that runs; not to be called in the event loop."""
        return self.pipe.store.remove(key)

    def store_stats(self) -> StoreStats:
        """Hits and misses as this process saw them; bytes and entries of the replicas that run now."""
        return self.pipe.store.stats()

    def submit(
        self,
        request: EditRequest | PrefillRequest,
        *,
        id: str,
        listener: Callable[[Event], None],
        owner: str = "local",
        priority: int = 0,
        timeout: float | None = None,
        accepted: bool = False,
    ) -> None:
        """As `Engine.submit`: after a lost replica a listener may hear of `Started` and `Progress` again."""
        if isinstance(request, PrefillRequest):
            self.prefill(
                request.references, id=id, listener=listener, owner=owner, priority=priority, accepted=accepted
            )
            return
        self.check(request)
        self._begin(id, request, listener, owner, priority, timeout=timeout, accepted=accepted)

    def prefill(
        self,
        references: Sequence[PreparedReference],
        *,
        id: str,
        listener: Callable[[Event], None],
        owner: str = "local",
        priority: int = 0,
        accepted: bool = False,
    ) -> None:
        """Computes K/V alone, where requests with these references will go."""
        if not references:
            raise InvalidRequest("references", "there are none; give at least one picture")
        check_room_for(
            references,
            size=self.card.default_size,
            batch=1,
            text_length=self.card.text_length,
            memory_needed=self.card.memory_needed,
            memory_bytes=self.card.memory_bytes,
        )
        request = EditRequest(prompt="prefill", seeds=(), references=tuple(references))
        self._begin(id, request, listener, owner, priority, timeout=None, accepted=accepted)

    def _begin(
        self,
        id: str,
        request: EditRequest,
        listener: Callable[[Event], None],
        owner: str,
        priority: int,
        *,
        timeout: float | None,
        accepted: bool,
    ) -> None:
        if self._closed:
            raise QueueFull("the engine is shutting down; send the request again later")
        if not accepted:
            self.check_room()
        if id in self._requests:
            raise InvalidRequest("id", f"{id!r} is in the queue already")
        deadline = None if timeout is None else time.monotonic() + timeout
        found = _Request(id=id, request=request, listener=listener, owner=owner, priority=priority, deadline=deadline)
        self._requests[id] = found
        self._stats.accepted += 1
        found.task = self.loop.create_task(self._bring(found), context=self._context.copy())

    def cancel(self, id: str) -> bool:
        """Stops a request: at once if it waits, after the step that runs now otherwise. False: it is not here."""
        found = self._requests.get(id)
        if found is None or found.task is None:
            return False
        found.task.cancel()
        self._end(found, Failed(Cancelled(f"{id} was cancelled")))
        return True

    def stats(self) -> EngineStats:
        """Counts of this process, of batches and busy seconds as results tell of them; `batch_sizes` stays empty."""
        waiting = self._waiting()
        return replace(
            self._stats, waiting=waiting, running=len(self._requests) - waiting, batches=round(self._batches)
        )

    def _waiting(self) -> int:
        return sum(not found.began for found in list(self._requests.values()))

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken; replicas may come and go."""
        return not self._closed

    def close(self, *, timeout: float = 0.0) -> list[str]:
        """As `Engine.close`; not to be called in the event loop."""
        return asyncio.run_coroutine_threadsafe(self._close(timeout), self.loop).result()

    async def _close(self, timeout: float) -> list[str]:
        self._closed = True
        tasks = [found.task for found in self._requests.values() if found.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)
        left = list(self._requests.values())
        self._requests.clear()
        for found in left:
            if found.task is not None:
                found.task.cancel()
        await asyncio.gather(*(found.task for found in left if found.task is not None), return_exceptions=True)
        return [found.id for found in left]

    # the way of a request

    async def _bring(self, found: _Request) -> None:
        """Sends a request until a replica has done it, or says why it cannot be done."""
        losses, waited, attempt, pause = 0, 0, 0, 0.1
        try:
            while True:
                attempt += 1
                try:
                    async with asyncio.timeout(self._left(found)):
                        if await self._once(found, attempt):
                            return
                except LostReplica as error:
                    losses += error.counts and found.began
                    waited += error.counts and not found.began
                    found.began = False
                    _logger.warning("%s is sent again: %s", found.id, error)
                    if losses >= _MOST_LOSSES or waited >= _MOST_WAITS:
                        raise RemoteError(
                            f"{losses} replicas ended while they drew this, {waited} while it waited there, the last one "
                            f"so: {error}; see their logs"
                        ) from error
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        except Exception as error:
            if isinstance(error, TimeoutError) and self._left(found) == 0.0:
                error = DeadlineExceeded(
                    f"{found.id} was not done in time; allow it more seconds, or send it when less is waiting"
                )
            if not isinstance(error, LimnerError):
                _logger.error("request %s failed", found.id, exc_info=error)
            self._end(found, Failed(error))

    def _left(self, found: _Request) -> float | None:
        return None if found.deadline is None else max(0.0, found.deadline - time.monotonic())

    async def _once(self, found: _Request, attempt: int) -> bool:
        """Whether a replica brought the request to its end. Raises `LostReplica` and what is wrong with the request."""
        async with self.replicas.run(
            found.request,
            id=f"{found.id}/{attempt}",
            owner=found.owner,
            priority=found.priority,
            timeout=self._left(found),
        ) as events:
            async for event in events:
                if isinstance(event, (Started, Progress)):
                    found.began = True
                    self._tell(found, event)
                else:
                    self._end(found, event)
                    return True
        raise LostReplica("it gave no result")

    def _end(self, found: _Request, event: Finished | Prefilled | Failed) -> None:
        """Tells the last event, once."""
        if self._requests.pop(found.id, None) is None:
            return
        if isinstance(event, Failed):
            cancelled = isinstance(event.error, Cancelled)
            self._stats.cancelled += cancelled
            self._stats.failed += not cancelled
        else:
            self._stats.finished += 1
            self.pipe.store.count(event)
            if isinstance(event, Finished):
                self._stats.images += len(event.result.images)
                self._stats.waited_seconds += event.result.waited
                share = len(event.result.seeds) / event.result.batch  # of the batch that it was drawn in
                self._batches += share
                self._stats.busy_seconds += share * event.result.ran
                self._stats.prefills += event.result.reference_cache == "miss"
            else:
                self._stats.prefills += event.source == "miss"
        self._tell(found, event)

    def _tell(self, found: _Request, event: Event) -> None:
        try:
            found.listener(event)
        except Exception:
            _logger.exception("the listener of request %s failed", found.id)


class RemotePipeline:
    """What a server asks a pipeline, answered from its card."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._card = engine.card
        self.store = RemoteStore(engine)

    @property
    def default_size(self) -> tuple[int, int]:
        return self._card.default_size

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return self._card.sizes

    @property
    def reference_policy(self) -> ReferencePolicy:
        return self._card.reference_policy

    @property
    def latent_preview(self) -> Literal[True] | None:
        """Not None where replicas send previews."""
        return True if self._card.previews else None

    @property
    def digest(self) -> str:
        return self._card.digest

    def key_of(self, prepared: Sequence[PreparedReference]) -> str:
        """As `Pipeline.key_of`, in the arithmetic of the replica that was asked."""
        return reference_key(
            weights=self._card.reference_weights,
            dtype=getattr(torch, self._card.dtype),
            arithmetic=self._card.kernel,
            digests=[p.report.digest for p in prepared],
            quantization=self._card.kv_cache_dtype,
        )


@dataclass(kw_only=True, slots=True)
class _Counts:
    hits: dict[str, int] = field(default_factory=lambda: dict(StoreStats().hits))
    misses: int = 0
    prefill_seconds: float = 0.0
    saved: float = 0.0


class RemoteStore:
    """The stores of all replicas: what results said of them, and removal everywhere."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine
        self._known: OrderedDict[str, None] = OrderedDict()
        self._counts = _Counts()

    def __contains__(self, key: str) -> bool:
        """Whether some replica had them; it may have dropped them since."""
        return key in self._known

    def count(self, event: Finished | Prefilled) -> None:
        """Takes down where the references of a request came from."""
        if isinstance(event, Finished):
            result = event.result
            key, source, seconds = result.reference_key, str(result.reference_cache), result.timings.references
            saved = result.seconds_saved
        else:
            key, source, seconds = event.key, str(event.source), event.prefill_seconds
            saved = 0.0 if event.source == "miss" else seconds
        if key is None:
            return
        self._known[key] = None
        self._known.move_to_end(key)
        if len(self._known) > _KNOWN_KEYS:
            self._known.popitem(last=False)
        if source == "miss":
            self._counts.misses += 1
            self._counts.prefill_seconds += seconds
        else:
            self._counts.hits[source] += 1
            self._counts.saved += saved

    def remove(self, key: str) -> bool:
        """Forgets References in every replica that runs; not to be called in the event loop."""
        asked = asyncio.run_coroutine_threadsafe(self._engine.replicas.forget(key), self._engine.loop)
        found = asked.result()
        known = key in self._known
        self._known.pop(key, None)
        return found or known

    def stats(self) -> StoreStats:
        """Hits and misses as this process saw them; bytes, entries and evictions of the replicas that run now."""
        asked = asyncio.run_coroutine_threadsafe(self._engine.replicas.store_stats(), self._engine.loop)
        found = StoreStats(
            hits=dict(self._counts.hits),
            misses=self._counts.misses,
            prefill_seconds=self._counts.prefill_seconds,
            prefill_seconds_saved=self._counts.saved,
        )
        for one in asked.result():
            for tier in found.nbytes:
                found.nbytes[tier] += one.nbytes[tier]
                found.num_entries[tier] += one.num_entries[tier]
                found.evictions[tier] += one.evictions[tier]
        return found
