"""Runs accepted jobs: brings them to the engine, checks and writes what comes, tells who watches, sends webhooks.

Owns the way of a job from the store to its end, also after a restart. Works in one event loop; the engine's thread reaches
it through `call_soon_threadsafe`. Knows nothing of wire dialects.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from PIL import Image

from limner import __version__, images, provenance
from limner.engine import EditRequest, EditResult, Engine, Event, Failed, Finished, Prefilled, Progress, Started
from limner.errors import Cancelled, DeadlineExceeded, LimnerError
from limner.images import PreparedReference
from limner.provenance import Ingredient, Signer
from limner.references import References
from limner.safety import Checks, Finding
from limner.server.access import Limiter, Owner, Slot
from limner.server.jobs import Job, JobStore, Status
from limner.server.outbound import OutboundClient
from limner.server.webhooks import Outcome, deliver, next_attempt

__all__ = ["JobRunner", "RunnerSettings", "Update"]

_logger = logging.getLogger("limner.server")
_R = TypeVar("_R")
SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}
"""File endings of results, by output format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerSettings:
    """Seconds: results are served for `keep_results`, jobs known `keep_jobs` longer; `drain` is what a shutdown waits."""

    keep_results: float = 600.0
    keep_jobs: float = 86400.0
    drain: float = 30.0
    clean_every: float = 60.0


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Update:
    """What a watcher hears: `state` is "queued", "running" or a job's final status.

    `progress` is in [0, 1]; `previews` are small PNG files, one an image, if the model has them and a step was done.
    """

    state: str
    progress: float = 0.0
    step: int = 0
    num_steps: int = 0
    previews: tuple[bytes, ...] = ()


@dataclass(kw_only=True, eq=False, slots=True)
class _Live:
    """A job that has not ended, in this process."""

    job: Job
    slot: Slot
    update: Update = field(default_factory=lambda: Update(state="queued"))
    watchers: set[asyncio.Queue[Update]] = field(default_factory=set)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class JobRunner:
    """Brings jobs to their end. `start` and `stop` belong to the life of the server."""

    def __init__(
        self,
        *,
        engine: Engine,
        jobs: JobStore,
        limiter: Limiter,
        checks: Checks,
        settings: RunnerSettings,
        signer: Signer | None = None,
        outbound: OutboundClient | None = None,
    ) -> None:
        self.engine = engine
        self.jobs = jobs
        self.limiter = limiter
        self.checks = checks
        self.settings = settings
        self.signer = signer
        self._outbound = outbound
        self._live: dict[str, _Live] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready_seconds: deque[float] = deque(maxlen=100)
        self._webhook_due = asyncio.Event()
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="limner-files")  # files and checks, beside the device
        self._store_pool = ThreadPoolExecutor(1, thread_name_prefix="limner-jobs")  # SQLite writes one at a time anyway

    async def start(self) -> None:
        """Takes up what an earlier process left, and begins to send webhooks and to clean."""
        self._loop = asyncio.get_running_loop()
        pending = await self.store(self.jobs.pending)
        for job in pending:
            await self._begin(job, self.limiter.hold(Owner(name=job.owner, id=job.owner), beyond_limit=True))
        if pending:
            _logger.info("%d jobs of an earlier run are taken up again", len(pending))
        self._spawn(self._send_webhooks())
        self._spawn(self._clean())

    async def stop(self) -> None:
        """Finishes what can be finished in time; what is left stays pending, for the next start."""
        left = await asyncio.to_thread(self.engine.close, timeout=self.settings.drain)
        if left:
            _logger.info("%d jobs are left for the next start", len(left))
        for _ in range(100):  # what the engine finished is being written
            if all(live.job.id in left for live in self._live.values()):
                break
            await asyncio.sleep(0.05)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._store_pool.shutdown(wait=True)

    # callers

    async def store(self, call: Callable[..., _R], *args: Any, **kwargs: Any) -> _R:
        """A call of the job store, away from the event loop."""
        return await self._loop.run_in_executor(self._store_pool, functools.partial(call, *args, **kwargs))

    async def aside(self, call: Callable[..., _R], *args: Any, **kwargs: Any) -> _R:
        """Work on files and pictures, away from the event loop."""
        return await self._loop.run_in_executor(self._pool, functools.partial(call, *args, **kwargs))

    async def accept(self, job: Job, pictures: Sequence[PreparedReference], slot: Slot) -> tuple[Job, bool]:
        """Writes a job down and queues it; gives it as kept, and whether it is new. Raises what the engine refuses."""
        try:
            await self._loop.run_in_executor(None, self.engine.check, self._request(job, tuple(pictures)))
            self.engine.check_room()
            kept, new = await self.store(self.jobs.add, job, pictures)
        except BaseException:
            slot.release()
            raise
        if not new:
            slot.release()
            return kept, False
        await self._begin(kept, slot)
        return kept, True

    def update(self, id: str) -> Update | None:
        """How far a job is that has not ended; None: it has, or is not here."""
        live = self._live.get(id)
        if live is None:
            return None
        return live.update

    async def wait(self, id: str) -> Job | None:
        """The job when it has ended; None: it is not here."""
        live = self._live.get(id)
        if live is not None:
            await live.ended.wait()
        return await self.store(self.jobs.get, id)

    async def watch(self, id: str) -> AsyncIterator[Update]:
        """All updates from now on; the last one has a final state."""
        live = self._live.get(id)
        if live is None:
            job = await self.store(self.jobs.get, id)
            if job is not None:
                yield Update(state=job.status, progress=1.0)
            return
        queue: asyncio.Queue[Update] = asyncio.Queue()
        live.watchers.add(queue)
        try:
            yield live.update
            if live.ended.is_set():
                return
            while True:
                update = await queue.get()
                yield update
                if update.state not in ("queued", "running"):
                    return
        finally:
            live.watchers.discard(queue)

    async def cancel(self, id: str) -> bool:
        """Whether the job was stopped; it ends as "cancelled" within a step."""
        if id not in self._live:
            return False
        return self.engine.cancel(id) or id in self._live

    async def prefill(self, references: Sequence[PreparedReference], *, owner: str, id: str) -> tuple[References, str]:
        """Computes K/V of references, or finds them; and where they came from. Raises what the engine raises."""
        future: asyncio.Future[Prefilled] = self._loop.create_future()

        def settle(event: Event) -> None:
            if future.done():
                return
            if isinstance(event, Prefilled):
                future.set_result(event)
            elif isinstance(event, Failed):
                future.set_exception(event.error)

        def heard(event: Event) -> None:
            self._loop.call_soon_threadsafe(settle, event)

        self.engine.prefill(references, id=id, listener=heard, owner=owner)
        try:
            found = await future
        except asyncio.CancelledError:
            self.engine.cancel(id)
            raise
        return found.references, found.source

    async def check_pictures(self, pictures: Sequence[PreparedReference], *, tolerance: int) -> Finding | None:
        """What the checks say of references."""
        found = [Image.frombytes("RGB", p.report.processed_size, p.data) for p in pictures]
        return await self.aside(self.checks.check_images, found, role="input", tolerance=tolerance)

    @property
    def num_live(self) -> int:
        return len(self._live)

    # the way of a job

    @staticmethod
    def _request(job: Job, references: tuple[PreparedReference, ...]) -> EditRequest:
        return EditRequest(
            prompt=job.prompt, seeds=job.seeds, references=references, width=job.width, height=job.height,
            num_steps=job.num_steps,
        )  # fmt: skip

    async def _begin(self, job: Job, slot: Slot) -> None:
        self._live[job.id] = _Live(job=job, slot=slot)
        self._spawn(self._bring(job))

    async def _bring(self, job: Job) -> None:
        """Checks what came, and gives the job to the engine."""
        try:
            pictures = [await self.aside(self.jobs.picture, digest) for digest in job.references]
            finding = self.checks.check_prompt(job.prompt, tolerance=job.tolerance)
            if finding is None and not job.options.get("references_checked"):
                finding = await self.check_pictures(pictures, tolerance=job.tolerance)
            if finding is not None:
                await self._end(job, "request_moderated", {"finding": asdict(finding)})
                return

            def heard(event: Event) -> None:
                self._loop.call_soon_threadsafe(self._hear, job, event)

            timeout = None if job.timeout is None else job.created + job.timeout - time.time()
            self.engine.submit(
                self._request(job, tuple(pictures)), id=job.id, listener=heard, owner=job.owner, priority=job.priority,
                timeout=timeout, accepted=True,
            )  # fmt: skip
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await self._fail(job, error)

    def _hear(self, job: Job, event: Event) -> None:
        live = self._live.get(job.id)
        if live is None:
            return
        if isinstance(event, Started):
            self._tell(live, Update(state="running", num_steps=job.num_steps))
        elif isinstance(event, Progress):
            files = tuple(_small_png(preview) for preview in event.previews) or live.update.previews
            self._tell(
                live,
                Update(
                    state="running", progress=event.step / (event.num_steps + 1), step=event.step,
                    num_steps=event.num_steps, previews=files,
                ),
            )  # fmt: skip
        elif isinstance(event, Finished):
            self._spawn(self._deliver(job, event.result))
        elif isinstance(event, Failed):
            self._spawn(self._fail(job, event.error))

    async def _deliver(self, job: Job, result: EditResult) -> None:
        """Checks and writes the pictures of a job, then ends it."""
        try:
            finding = await self.aside(self.checks.check_images, result.images, role="output", tolerance=job.tolerance)
            if finding is not None:
                await self._end(job, "content_moderated", {"finding": asdict(finding)})
                return
            started = time.perf_counter()
            files = await self.aside(self._encode, job, result)
            names = await self.aside(self.jobs.write_results, job.id, files, suffix=SUFFIXES[job.output_format])
            told = _told(job, result) | {"files": names, "encode_seconds": round(time.perf_counter() - started, 4)}
            await self._end(job, "ready", told)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await self._fail(job, error)

    def _encode(self, job: Job, result: EditResult) -> list[bytes]:
        files = []
        for image, seed in zip(result.images, result.seeds, strict=True):
            metadata = {
                "prompt": job.prompt,
                "seed": seed,
                "version": __version__,
                "model": self._model,
                **result.metadata,
            }
            data = images.encode(image, job.output_format, metadata=metadata, quality=job.quality)
            if self.signer is not None:
                used = [
                    Ingredient(data=self.jobs.picture_file(digest).read_bytes(), title=f"image {number}")
                    for number, digest in enumerate(job.references, start=1)
                ]
                data = provenance.sign(
                    data, format=job.output_format, title=f"{job.id}.{SUFFIXES[job.output_format]}",
                    action="edited" if used else "created", ingredients=used, metadata=metadata, signer=self.signer,
                )  # fmt: skip
            files.append(data)
        return files

    @functools.cached_property
    def _model(self) -> str:
        return self.engine.pipe.digest

    async def _fail(self, job: Job, error: Exception) -> None:
        if isinstance(error, Cancelled):
            await self._end(job, "cancelled", {"error": "the job was cancelled", "type": "cancelled"})
            return
        if not isinstance(error, LimnerError):
            _logger.error("job %s failed", job.id, exc_info=error)
        kind = "deadline" if isinstance(error, DeadlineExceeded) else "failed"
        message = str(error) if isinstance(error, LimnerError) else "an error inside the server; its log has more"
        await self._end(job, "error", {"error": message, "type": kind})

    async def _end(self, job: Job, status: Status, result: dict[str, Any]) -> None:
        try:
            await self.store(self.jobs.end, job.id, status, result=result, keep_seconds=self.settings.keep_results)
        except LimnerError:
            _logger.exception("job %s could not be ended; it runs again after a restart", job.id)
        live = self._live.pop(job.id, None)
        if live is None:
            return
        live.slot.release()
        _logger.info("%s", json.dumps({"event": "job", "id": job.id, "status": status, "owner": job.owner}))
        self._tell(live, Update(state=status, progress=1.0, step=live.update.step, num_steps=live.update.num_steps))
        live.ended.set()
        if job.webhook is not None:
            self._webhook_due.set()

    @staticmethod
    def _tell(live: _Live, update: Update) -> None:
        live.update = update
        for queue in live.watchers:
            queue.put_nowait(update)

    # in the background

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_webhooks(self) -> None:
        """At least once: an attempt is noted after it was made."""
        rng = random.Random()
        while True:
            for job in await self.store(self.jobs.due_webhooks):
                assert job.webhook is not None
                if self._outbound is None:
                    await self.store(self.jobs.webhook_attempted, job.id, again=None)
                    _logger.error("webhook of %s is given up: webhooks are switched off", job.id)
                    continue
                body = json.dumps(self.describe(job)).encode()
                result = await deliver(job.webhook.url, body, job.webhook.secret, client=self._outbound)
                again = None
                if result.outcome is Outcome.RETRY:
                    now = time.time()
                    again = next_attempt(job.webhook_attempts + 1, now, rng, first_attempt=job.webhook_first or now)
                if result.outcome is not Outcome.DELIVERED:
                    _logger.warning("webhook of %s: %s%s", job.id, result.problem, "" if again else "; given up")
                await self.store(self.jobs.webhook_attempted, job.id, again=again)
            self._webhook_due.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._webhook_due.wait(), 1.0)

    describe: Callable[[Job], dict[str, Any]] = staticmethod(lambda job: {"id": job.id, "status": job.status})
    """What a webhook says of a job; the dialect sets it."""

    async def _clean(self) -> None:
        while True:
            try:
                await self.aside(self.jobs.clean, forget_seconds=self.settings.keep_jobs)
            except (LimnerError, OSError):
                _logger.exception("old results could not be removed")
            await asyncio.sleep(self.settings.clean_every)


def _small_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _told(job: Job, result: EditResult) -> dict[str, Any]:
    """What is kept and told of a result, beside its pictures."""
    return {
        "seeds": list(result.seeds),
        "width": result.metadata["width"],
        "height": result.metadata["height"],
        "reference_cache": result.reference_cache,
        "reference_key": result.reference_key,
        "seconds_saved": round(result.seconds_saved, 4),
        "references": [asdict(report) for report in result.references],
        "prompt": asdict(result.prompt),
        "timings": {**asdict(result.timings), "total": result.timings.total},
        "waited": round(result.waited, 4),
        "ran": round(result.ran, 4),
        "batch": result.batch,
    }
