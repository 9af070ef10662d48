"""The way of a job: from the store through the checks and the engine to its end, also after a restart.

Works in one event loop; the engine's thread reaches it through `call_soon_threadsafe`. Knows nothing of wire dialects.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from limner.engine import EditResult, Event, Failed, Finished, Progress, Started
from limner.engine.protocol import Backend
from limner.errors import Cancelled, DeadlineExceeded, LimnerError, OutputError, QueueFull
from limner.requests import EditRequest
from limner.server.access.keys import Owner
from limner.server.access.limits import Limiter, Slot
from limner.server.jobs.moderation import Moderation
from limner.server.jobs.offload import Offload, pauses
from limner.server.jobs.records import Job, JobPictures, Status, edit_request
from limner.server.jobs.results import ResultWriter
from limner.server.jobs.settings import RunnerSettings
from limner.server.jobs.store import JobStore
from limner.server.jobs.tasks import Tasks
from limner.server.jobs.updates import Update, UpdateFeed
from limner.server.jobs.webhook_sender import WebhookSender

__all__ = ["JobRunner"]

_logger = logging.getLogger("limner.server")
_ROOM_SECONDS = 0.1
_LOST_SECONDS = 60.0
"""Age at which a pending job without a task counts as lost."""


@dataclass(kw_only=True, eq=False, slots=True)
class _LiveJob:
    """A job that this process brings to its end."""

    job: Job
    slot: Slot
    cancelled: bool = False
    feed: UpdateFeed = field(default_factory=UpdateFeed)


class JobRunner:
    """Bring jobs to their end. `start` and `stop` belong to the life of the server."""

    def __init__(
        self,
        *,
        engine: Backend,
        jobs: JobStore,
        limiter: Limiter,
        offload: Offload,
        moderation: Moderation,
        results: ResultWriter,
        webhooks: WebhookSender,
        settings: RunnerSettings,
    ) -> None:
        self._engine = engine
        self._jobs = jobs
        self._limiter = limiter
        self._offload = offload
        self._moderation = moderation
        self._results = results
        self._webhooks = webhooks
        self._settings = settings
        self._live: dict[str, _LiveJob] = {}
        self._backlog: dict[str, Job] = {}  # of earlier runs, not given to the engine yet
        self._num_admitted = 0  # jobs accepted, or about to be, that are not in the engine's queue yet
        self._tasks = Tasks()
        self._stop_by: float | None = None

    @property
    def num_live(self) -> int:
        """Number of jobs that have not ended."""
        return len(self._live)

    # the life of the server

    async def start(self) -> None:
        """Continue the jobs that an earlier process left."""
        self._loop = asyncio.get_running_loop()
        self._adopt(await self._offload.store(self._jobs.pending))

    async def adopt_lost(self) -> None:
        """Adopt pending jobs that no task tracks: their insert was committed but the answer was lost."""
        if self._stop_by is None:
            pending, old = await self._offload.store(self._jobs.pending), time.time() - _LOST_SECONDS
            self._adopt([job for job in pending if job.id not in self._live and job.created < old])

    def _adopt(self, left: Sequence[Job]) -> None:
        left = [job for job in left if job.id not in self._live]
        if not left:
            return
        for job in left:
            self._num_admitted += 1
            slot = self._limiter.hold(Owner(name=job.owner, id=job.owner), beyond_limit=True)
            self._live[job.id] = _LiveJob(job=job, slot=slot)
        if not self._backlog:
            self._tasks.spawn(self._submit_backlog())
        self._backlog |= {job.id: job for job in _in_turns(left)}
        _logger.info("%d jobs of an earlier run are taken up again", len(left))

    async def _submit_backlog(self) -> None:
        """Give adopted jobs to the engine as it has room, since those that wait there have their pictures in memory."""
        while self._backlog:
            if self._stop_by is not None:
                _logger.info("%d jobs are left for the next start", len(self._backlog))
                self._num_admitted -= len(self._backlog)
                self._backlog.clear()
            elif self._engine.stats().waiting >= self._engine.max_waiting:
                await asyncio.sleep(_ROOM_SECONDS)
            else:
                await self._submit(self._backlog.pop(next(iter(self._backlog))))

    def refuse(self) -> None:
        """Accept no more jobs; `stop` then waits until `drain` seconds from now."""
        if self._stop_by is None:
            self._stop_by = time.monotonic() + self._settings.drain

    async def stop(self) -> None:
        """Close the engine and finish what can be finished in time; the other jobs stay pending for the next start.

        Pictures that are drawn by then are checked, written and their jobs ended, within `drain` seconds more.
        """
        self.refuse()
        assert self._stop_by is not None
        end = self._stop_by
        while self._num_admitted and time.monotonic() < end:
            await asyncio.sleep(0.01)
        left = await asyncio.to_thread(self._engine.close, timeout=max(0.0, end - time.monotonic()))
        await asyncio.sleep(0)  # lets the last events of the engine's thread arrive
        await self._tasks.wait(timeout=self._settings.drain)
        if left:
            _logger.info("%d jobs are left for the next start", len(left))
        for live in self._live.values():
            live.feed.close()
        await self._tasks.cancel()

    # callers

    async def accept(self, job: Job, pictures: JobPictures, slot: Slot, *, request: EditRequest) -> tuple[Job, bool]:
        """Write a job and queue it. Return it as stored, and whether it is new. Raises what the engine refuses.

        `request` is what the engine is asked for it, opened.
        """
        begun = False
        self._num_admitted += 1
        try:
            if self._stop_by is not None:
                raise QueueFull("the server shuts down; send the request again later")
            self._engine.check(request)
            kept = pictures.all
            self._engine.check_room(num_admitted=self._num_admitted - 1)
            files = await self._offload.run(self._jobs.encode, kept) if kept else None
            budget = self._settings.images_per_key
            stored, new = await self._offload.store(self._jobs.add, job, kept, files=files, budget=budget)
            if new and stored.id not in self._live:  # one whose writing took long may have been adopted
                self._begin(stored, slot, request)
                begun = True
            else:
                self.resume(stored)
            return stored, new
        finally:
            if not begun:
                self._num_admitted -= 1
                slot.release()

    def resume(self, job: Job) -> None:
        """Adopt a pending job if no task tracks it; otherwise do nothing."""
        if job.status == "pending" and job.id not in self._live and self._stop_by is None:
            self._adopt([job])

    def update(self, id: str) -> Update | None:
        """Return how far a job is; None: it has ended, or is not here."""
        live = self._live.get(id)
        return None if live is None else live.feed.last

    async def wait(self, id: str) -> Job | None:
        """Return the job when it has ended, or pending if the server shuts down first; None: it is not here."""
        live = self._live.get(id)
        if live is not None:
            await live.feed.wait()
        return await self._offload.store(self._jobs.get, id)

    async def watch(self, id: str, *, idle: float | None = None) -> AsyncGenerator[Update | None, None]:
        """Yield all updates from now on; the last one has a final state, unless the server shuts down before.

        Yields None after `idle` seconds without an update. Close it (`contextlib.aclosing`) to stop watching.
        """
        live = self._live.get(id)
        if live is None:
            job = await self._offload.store(self._jobs.get, id)
            if job is not None and job.status != "pending":
                yield Update(state=job.status, progress=1.0)
            return
        async with contextlib.aclosing(live.feed.watch(idle=idle)) as updates:
            async for update in updates:
                yield update

    def cancel(self, id: str) -> bool:
        """Stop a job that has not ended: it ends as "cancelled", within a step. False: it has ended, or is not here.

        A job whose pictures are drawn already ends as it would.
        """
        live = self._live.get(id)
        if live is None:
            return False
        live.cancelled = True  # for a job that has not reached the engine
        if self._backlog.pop(id, None) is not None:
            self._num_admitted -= 1
            self._tasks.spawn(self._fail(live.job, Cancelled(f"{id} was cancelled before it began")))
        self._engine.cancel(id)
        return True

    # the way of a job

    def _begin(self, job: Job, slot: Slot, request: EditRequest) -> None:
        self._live[job.id] = _LiveJob(job=job, slot=slot)
        self._tasks.spawn(self._submit(job, request))

    async def _submit(self, job: Job, request: EditRequest | None = None) -> None:
        """Check prompt and pictures, and give the job to the engine. The caller has counted it in `_num_admitted`.

        `request` is what it is for the engine; None: made of what is stored.
        """
        try:
            finding = await self._moderation.check_prompt(job.prompt, tolerance=job.tolerance)
            if finding is None and job.negative_prompt:
                finding = await self._moderation.check_prompt(job.negative_prompt, tolerance=job.tolerance)
            pictures = await self._offload.with_retry(self._jobs.pictures, job, with_mask=request is None)
            if finding is None:
                canvas = () if pictures.canvas is None else (pictures.canvas,)
                looked_at = canvas if job.options.references_checked else (*pictures.references, *canvas)
                finding = await self._moderation.check_references(looked_at, tolerance=job.tolerance)
            if finding is not None:
                await self._end(job, "request_moderated", {"finding": asdict(finding)})
                return
            if request is None:
                request = await self._offload.run(lambda: self._engine.opened(edit_request(job, pictures)))
            if self._live[job.id].cancelled:
                raise Cancelled(f"{job.id} was cancelled before it began")

            def listen(event: Event) -> None:
                self._loop.call_soon_threadsafe(self._hear, job, event)

            self._engine.submit(
                request,
                id=job.id,
                listener=listen,
                owner=job.owner,
                priority=job.priority,
                timeout=_seconds_left(job),
                accepted=True,
            )
        except QueueFull:
            if self._stop_by is None:  # an open engine takes every accepted request
                raise
            _logger.info("job %s is left for the next start", job.id)
        except Exception as error:
            await self._fail(job, error)
        finally:
            self._num_admitted -= 1

    def _hear(self, job: Job, event: Event) -> None:
        live = self._live.get(job.id)
        if live is None:
            return
        if isinstance(event, Started):
            live.feed.publish(Update(state="running", num_inference_steps=job.num_inference_steps))
        elif isinstance(event, Progress):
            live.feed.publish(_progress(event, live.feed.last))
        elif isinstance(event, Finished):
            self._tasks.spawn(self._deliver(job, event.result))
        elif isinstance(event, Failed):
            self._tasks.spawn(self._fail(job, event.error))

    async def _deliver(self, job: Job, result: EditResult) -> None:
        """Check and write the pictures of a job, then end it."""
        try:
            finding = await self._moderation.check_results(result.images, tolerance=job.tolerance)
            if finding is not None:
                await self._end(job, "content_moderated", {"finding": asdict(finding)})
                return
            await self._end(job, "ready", await self._results.write(job, result))
        except Exception as error:
            await self._fail(job, error)

    async def _fail(self, job: Job, error: Exception) -> None:
        if isinstance(error, Cancelled):
            await self._end(job, "cancelled", {"error": "the job was cancelled", "type": "cancelled"})
            return
        is_public = isinstance(error, LimnerError) and not isinstance(error, OutputError)  # which names our folders
        if not is_public:
            _logger.error("job %s failed", job.id, exc_info=error)
        kind = "deadline" if isinstance(error, DeadlineExceeded) else "failed"
        message = str(error) if is_public else "an error inside the server; its log has more"
        await self._end(job, "error", {"error": message, "type": kind})

    async def _end(self, job: Job, status: Status, result: dict[str, Any]) -> None:
        """End a job. While the store fails, the job keeps its slot and the write is repeated."""
        keep = self._settings.keep_results
        for pause in pauses():
            try:
                await self._offload.store(self._jobs.end, job.id, status, result=result, keep_seconds=keep)
                break
            except LimnerError:
                _logger.exception("job %s cannot be ended; tried again in %g s, or after a restart", job.id, pause)
            await asyncio.sleep(pause)
        live = self._live.pop(job.id, None)
        if live is None:
            return
        live.slot.release()
        _logger.info("%s", json.dumps({"event": "job", "id": job.id, "status": status, "owner": job.owner}))
        last = live.feed.last
        live.feed.publish(
            Update(state=status, progress=1.0, step=last.step, num_inference_steps=last.num_inference_steps)
        )
        if job.webhook is not None:
            self._webhooks.wake()


def _in_turns(jobs: Sequence[Job]) -> list[Job]:
    """Return jobs in an order in which owners take turns; those of one owner stay in order."""
    turns: Counter[str] = Counter()
    placed = []
    for job in jobs:
        placed.append((turns[job.owner], job))
        turns[job.owner] += 1
    return [job for _, job in sorted(placed, key=lambda pair: pair[0])]


def _seconds_left(job: Job) -> float | None:
    """Return how long a job may still take: its time counts from when it was accepted, also before a restart."""
    if job.timeout is None:
        return None
    return min(job.timeout, job.created + job.timeout - time.time())  # the clock may have been set back


def _progress(event: Progress, last: Update) -> Update:
    return Update(
        state="running",
        progress=event.step / (event.num_inference_steps + 1),
        step=event.step,
        num_inference_steps=event.num_inference_steps,
        previews=tuple(_small_png(preview) for preview in event.previews) or last.previews,
    )


def _small_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
