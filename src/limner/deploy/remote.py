"""An engine whose pipelines are in other processes, the replicas.

Owns the way of a request to a replica and back: events as they arrive, cancellation, deadlines, and that a request whose
replica died is sent again. An image is a function of its request, seeds included, so drawing it twice is safe. Knows
nothing of HTTP or durability, and nothing of Ray: `Replicas` is the seam.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Protocol

from limner.engine import (
    Admission,
    EditRequest,
    EngineStats,
    Event,
    Failed,
    Finished,
    Job,
    LastEvent,
    Listener,
    ModelCard,
    Prefilled,
    PrefillRequest,
    RequestQueue,
    Started,
)
from limner.engine.events import Progress
from limner.engine.queue import too_late
from limner.errors import Cancelled, LimnerError, RemoteError
from limner.images import PreparedReference
from limner.store import StoreStats

__all__ = ["LostReplica", "RemoteEngine", "Replicas"]

_logger = logging.getLogger("limner.server")
_MOST_LOSSES = 5
"""Replicas that may end while they draw a request. It may be the cause, and must not end all of them."""
_MOST_WAITS = 20
"""Replicas that may end while a request only waits there: another request may be the cause."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_KNOWN_KEYS = 65536


class LostReplica(Exception):
    """The replica of a request died, was stopped, or cannot be reached; `counts`: the request may be the cause."""

    def __init__(self, problem: str, *, counts: bool = True) -> None:
        super().__init__(problem)
        self.counts = counts


class Replicas(Protocol):
    """All replicas. Which of them runs a request is for the implementation to choose."""

    def run(
        self, request: EditRequest | PrefillRequest, *, id: str, owner: str, priority: int, timeout: float | None
    ) -> contextlib.AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Give the events of a request. Leaving the block before the last one cancels it. Raises `LostReplica`."""

    async def forget(self, key: str) -> bool:
        """Remove References from the store of every replica; False if none had them.

        Raises `RemoteError` unless all answer.
        """

    async def store_stats(self) -> list[StoreStats]:
        """Return the counts of the replicas that answer."""


class RemoteEngine:
    """`limner.engine.Engine` for a server: the same calls, over replicas. Lives in the event loop that made it.

    `max_waiting` requests may wait, in all; each replica draws `max_batch` images at once. Which waiting request runs
    next is decided in the replica that has it.
    """

    def __init__(self, replicas: Replicas, card: ModelCard, *, max_waiting: int, max_batch: int) -> None:
        self.replicas = replicas
        self.model = card
        self.admission = Admission(
            model=card, max_waiting=max_waiting, max_batch=max_batch, memory_bytes=card.memory_bytes
        )
        self._queue = RequestQueue(self.admission)
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._references = _KnownReferences()
        self._batches = 0.0
        self._loop = asyncio.get_running_loop()
        # a request outlives the HTTP request that brought it: where that is cancelled, this is not
        self._context = contextvars.Context()

    # what callers ask

    @property
    def max_waiting(self) -> int:
        return self.admission.max_waiting

    @property
    def max_batch(self) -> int:
        return self.admission.max_batch

    def check(self, request: EditRequest | PrefillRequest) -> tuple[int, int]:
        """As `Engine.check`, with the memory of the replica that made the card."""
        return self.admission.check(request)

    def opened(self, request: EditRequest) -> EditRequest:
        """As `Engine.opened`: replicas get pixels and no names of files."""
        return self.admission.opened(request)

    def check_room(self, *, num_admitted: int = 0) -> None:
        """As `Engine.check_room`."""
        self._queue.check_room(num_admitted=num_admitted)

    def key_of(self, prepared: Sequence[PreparedReference]) -> str:
        """As `Pipeline.key_of`, in the arithmetic of the replica that made the card."""
        return self.model.key_of(prepared)

    def holds(self, key: str) -> bool:
        """Whether some replica had the K/V of a key; it may have dropped them since."""
        return key in self._references

    def forget(self, key: str) -> bool:
        """Remove K/V from every replica that runs. Not to be called in the event loop. Raises `RemoteError`."""
        had = asyncio.run_coroutine_threadsafe(self.replicas.forget(key), self._loop).result()
        return self._references.forget(key) or had

    def store_stats(self) -> StoreStats:
        """Return hits and misses as results reported them; bytes, entries and evictions of the replicas that run now.

        Not to be called in the event loop.
        """
        found = self._references.stats()
        for one in asyncio.run_coroutine_threadsafe(self.replicas.store_stats(), self._loop).result():
            for tier in found.nbytes:
                found.nbytes[tier] += one.nbytes[tier]
                found.num_entries[tier] += one.num_entries[tier]
                found.evictions[tier] += one.evictions[tier]
        return found

    def stats(self) -> EngineStats:
        """Return the counts of this process; batches and busy seconds as results reported them. No `batch_sizes`."""
        return replace(self._queue.snapshot(), batches=round(self._batches))

    @property
    def is_alive(self) -> bool:
        """Whether requests are accepted; replicas may come and go."""
        return not self._queue.closed

    # what callers do

    def submit(
        self,
        request: EditRequest | PrefillRequest,
        *,
        id: str,
        listener: Listener,
        owner: str = "local",
        priority: int = 0,
        timeout: float | None = None,
        accepted: bool = False,
    ) -> None:
        """As `Engine.submit`. After a lost replica a listener may hear `Started` and `Progress` again."""
        job = self._queue.add(
            request, id=id, listener=listener, owner=owner, priority=priority, timeout=timeout, accepted=accepted
        )
        self._tasks[job] = self._loop.create_task(self._bring(job), context=self._context.copy())

    def cancel(self, id: str) -> bool:
        """As `Engine.cancel`."""
        job = self._queue.cancel(id)
        if job is None:
            return False
        self._tasks[job].cancel()
        self._end(job, Failed(Cancelled(f"{id} was cancelled")))
        return True

    def close(self, *, timeout: float = 0.0) -> list[str]:
        """As `Engine.close`. Not to be called in the event loop."""
        return asyncio.run_coroutine_threadsafe(self._close(timeout), self._loop).result()

    async def _close(self, timeout: float) -> list[str]:
        self._queue.closed = True
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=timeout)
        dropped = self._queue.drop_all()
        tasks = [self._tasks.pop(job) for job in dropped]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return [job.id for job in dropped]

    # the way of a request

    async def _bring(self, job: Job) -> None:
        """Bring a request to its end, whatever that is."""
        try:
            await self._send_until_done(job)
        except Exception as error:
            if isinstance(error, TimeoutError) and self._seconds_left(job) == 0.0:
                error = too_late(job)
            if not isinstance(error, LimnerError):
                _logger.error("request %s failed", job.id, exc_info=error)
            self._end(job, Failed(error))

    async def _send_until_done(self, job: Job) -> None:
        """Send a request to replicas until one has ended it. Raises what is wrong with it, or with too many replicas."""
        losses, waits, attempt, pause = 0, 0, 0, _FIRST_PAUSE
        while True:
            attempt += 1
            try:
                async with asyncio.timeout(self._seconds_left(job)):
                    await self._send(job, attempt)
                    return
            except LostReplica as error:
                losses += error.counts and job.running
                waits += error.counts and not job.running
                if job.running:
                    self._queue.requeue(job)
                _logger.warning("%s is sent again: %s", job.id, error)
                if losses >= _MOST_LOSSES or waits >= _MOST_WAITS:
                    raise RemoteError(
                        f"{losses} replicas ended while they drew this, {waits} while it waited there, the last one "
                        f"so: {error}; see their logs"
                    ) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _seconds_left(self, job: Job) -> float | None:
        return None if job.deadline is None else max(0.0, job.deadline - time.monotonic())

    async def _send(self, job: Job, attempt: int) -> None:
        """Send a request to one replica and pass its events on. Raises `LostReplica` and what is wrong with it."""
        async with self.replicas.run(
            job.request,
            id=f"{job.id}/{attempt}",
            owner=job.owner,
            priority=job.priority,
            timeout=self._seconds_left(job),
        ) as events:
            async for event in events:
                if not isinstance(event, (Started, Progress)):
                    self._end(job, event)
                    return
                if not job.running:
                    self._queue.start(job)
                job.tell(event)
        raise LostReplica("it gave no result")

    def _end(self, job: Job, event: LastEvent) -> None:
        """Count and tell the last event, once."""
        if not self._queue.end(job, event.error if isinstance(event, Failed) else None):
            return
        del self._tasks[job]
        if not isinstance(event, Failed):
            self._references.count(event)
            self._count(event)
        job.tell(event)

    def _count(self, event: Finished | Prefilled) -> None:
        stats = self._queue.stats
        if isinstance(event, Prefilled):
            stats.prefills += event.source == "miss"
            return
        result = event.result
        share = len(result.seeds) / result.batch  # of the batch that it was drawn in
        self._batches += share
        stats.busy_seconds += share * result.ran
        stats.images += len(result.images)
        stats.waited_seconds += result.waited
        stats.prefills += result.reference_cache == "miss"


class _KnownReferences:
    """The References that results named: the keys used last, and from which tiers they came."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, None] = OrderedDict()
        self._stats = StoreStats()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def forget(self, key: str) -> bool:
        """Forget a key; False if it was not known."""
        if key not in self._keys:
            return False
        del self._keys[key]
        return True

    def count(self, event: Finished | Prefilled) -> None:
        """Count where the References of a request came from."""
        if isinstance(event, Finished):
            result = event.result
            key, source, seconds = result.reference_key, str(result.reference_cache), result.timings.references
            saved = result.seconds_saved
        else:
            key, source, seconds = event.key, str(event.source), event.prefill_seconds
            saved = 0.0 if event.source == "miss" else seconds
        if key is None:
            return
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > _KNOWN_KEYS:
            self._keys.popitem(last=False)
        if source == "miss":
            self._stats.misses += 1
            self._stats.prefill_seconds += seconds
        else:
            self._stats.hits[source] += 1
            self._stats.prefill_seconds_saved += saved

    def stats(self) -> StoreStats:
        """Return a copy of the counts; sizes are 0."""
        return StoreStats(
            hits=dict(self._stats.hits),
            misses=self._stats.misses,
            prefill_seconds=self._stats.prefill_seconds,
            prefill_seconds_saved=self._stats.prefill_seconds_saved,
        )
