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
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from PIL import Image

from limner import __version__, images
from limner.engine import EditResult, Event, Failed, Finished, Prefilled, Progress, Started
from limner.engine.protocol import Backend
from limner.errors import Cancelled, DeadlineExceeded, LimnerError, OutputError, QueueFull
from limner.images import PreparedReference
from limner.requests import EditRequest, PrefillRequest
from limner.server.access.keys import Limiter, Owner, Slot
from limner.server.jobs.records import Job, JobStore, Status
from limner.server.jobs.storage import StorageUnavailable
from limner.server.jobs.webhooks import Delivery, Outcome, deliver, next_attempt
from limner.server.outbound.client import OutboundClient
from limner.trust import provenance
from limner.trust.provenance import Ingredient, Signer
from limner.trust.safety import Checks, Finding

__all__ = ["JobRunner", "RunnerSettings", "Update"]

_logger = logging.getLogger("limner.server")
_R = TypeVar("_R")
_WEBHOOKS_AT_ONCE = 16
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_LEFT_SECONDS = 60.0
"""A job that is pending for so long and not known here was written by a call that did not hear of it."""
_PASSED_KEPT = 4096
SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}
"""File endings of results, by output format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerSettings:
    """Seconds: results are served for `keep_results`, jobs known `keep_jobs` longer; `drain` is what a shutdown waits.

    `images_per_key`: how many images an owner may have, all his jobs in the folder taken together; None: any number.
    """

    keep_results: float = 600.0
    keep_jobs: float = 86400.0
    drain: float = 30.0
    clean_every: float = 60.0
    webhooks: Delivery = field(default_factory=Delivery)
    images_per_key: int | None = None


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
    cancelled: bool = False
    update: Update = field(default_factory=lambda: Update(state="queued"))
    watchers: set[asyncio.Queue[Update | None]] = field(default_factory=set)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class JobRunner:
    """Brings jobs to their end. `start` and `stop` belong to the life of the server."""

    def __init__(
        self,
        *,
        engine: Backend,
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
        self._coming = 0  # accepted, or about to be, and not in the engine's queue yet
        self._prefills: set[asyncio.Future[Prefilled]] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._ways: set[asyncio.Task[None]] = set()
        self._stop_by: float | None = None
        self._passed: OrderedDict[tuple[str, int], None] = OrderedDict()  # digests of references, and tolerance
        self._webhook_due = asyncio.Event()
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="limner-files")  # files and checks, beside the device
        self._store_pool = ThreadPoolExecutor(1, thread_name_prefix="limner-jobs")  # SQLite writes one at a time anyway

    async def start(self) -> None:
        """Takes up what an earlier process left, and begins to send webhooks and to clean."""
        self._loop = asyncio.get_running_loop()
        self._take_up(await self.store(self.jobs.pending))
        self._spawn(self._send_webhooks(), self._background)
        self._spawn(self._clean(), self._background)

    def _take_up(self, left: Sequence[Job]) -> None:
        for job in left:
            self._coming += 1
            self._begin(job, self.limiter.hold(Owner(name=job.owner, id=job.owner), beyond_limit=True))
        if left:
            _logger.info("%d jobs of an earlier run are taken up again", len(left))

    async def stop(self) -> None:
        """Finishes what can be finished in time; what is left stays pending, for the next start.

        What the engine has drawn is checked, written and ended before the store closes, if that takes no longer than
        `drain` again.
        """
        self.refuse()
        assert self._stop_by is not None
        end = self._stop_by
        while self._coming and time.monotonic() < end:  # promised, and not in the queue yet
            await asyncio.sleep(0.01)
        left = await asyncio.to_thread(self.engine.close, timeout=max(0.0, end - time.monotonic()))
        await asyncio.sleep(0)  # what the engine's thread said last is heard now
        if self._ways:
            await asyncio.wait(self._ways, timeout=self.settings.drain)
        if left:
            _logger.info("%d jobs are left for the next start", len(left))
        for future in self._prefills:
            if not future.done():
                future.set_exception(QueueFull("the server shuts down; send the request again later"))
        for live in self._live.values():  # nobody waits for what this process will not do
            for queue in live.watchers:
                queue.put_nowait(None)
            live.ended.set()
        tasks = [*self._ways, *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._store_pool.shutdown(wait=True)

    def refuse(self) -> None:
        """Takes no more jobs, and `stop` waits until `drain` seconds from now."""
        if self._stop_by is None:
            self._stop_by = time.monotonic() + self.settings.drain

    # callers

    async def store(self, call: Callable[..., _R], *args: Any, **kwargs: Any) -> _R:
        """A call of the job store, away from the event loop."""
        return await self._loop.run_in_executor(self._store_pool, functools.partial(call, *args, **kwargs))

    async def aside(self, call: Callable[..., _R], *args: Any, **kwargs: Any) -> _R:
        """Work on files and pictures, away from the event loop."""
        return await self._loop.run_in_executor(self._pool, functools.partial(call, *args, **kwargs))

    async def accept(self, job: Job, pictures: Sequence[PreparedReference], slot: Slot) -> tuple[Job, bool]:
        """Writes a job down and queues it; gives it as kept, and whether it is new. Raises what the engine refuses."""
        begun = False
        self._coming += 1
        try:
            if self._stop_by is not None:
                raise QueueFull("the server shuts down; send the request again later")
            self.engine.check(self._request(job, tuple(pictures)))
            self.engine.check_room(num_admitted=self._coming - 1)
            kept, new = await self.store(self.jobs.add, job, pictures, budget=self.settings.images_per_key)
            if new:
                self._begin(kept, slot)
                begun = True
            else:
                self.resume(kept)
            return kept, new
        finally:
            if not begun:
                self._coming -= 1
                slot.release()

    def resume(self, job: Job) -> None:
        """Takes up a job that a call has written down which did not hear of it; nothing for others."""
        if job.status == "pending" and job.id not in self._live and self._stop_by is None:
            self._take_up([job])

    def update(self, id: str) -> Update | None:
        """How far a job is that has not ended; None: it has, or is not here."""
        live = self._live.get(id)
        if live is None:
            return None
        return live.update

    async def wait(self, id: str) -> Job | None:
        """The job when it has ended; None: it is not here. One that is pending is left for the next start."""
        live = self._live.get(id)
        if live is not None:
            await live.ended.wait()
        return await self.store(self.jobs.get, id)

    async def watch(self, id: str, *, idle: float | None = None) -> AsyncGenerator[Update | None, None]:
        """All updates from now on; the last one has a final state, unless the server shuts down before.

        None is given after `idle` seconds without an update. Close it (`contextlib.aclosing`) to be heard of no more.
        """
        live = self._live.get(id)
        if live is None:
            job = await self.store(self.jobs.get, id)
            if job is not None and job.status != "pending":
                yield Update(state=job.status, progress=1.0)
            return
        queue: asyncio.Queue[Update | None] = asyncio.Queue()
        live.watchers.add(queue)
        try:
            update: Update | None = live.update
            while True:
                yield update
                if update is not None and update.state not in ("queued", "running"):
                    return
                try:
                    async with asyncio.timeout(idle):
                        update = await queue.get()
                except TimeoutError:
                    update = None
                else:
                    if update is None:
                        return
        finally:
            live.watchers.discard(queue)

    def cancel(self, id: str) -> bool:
        """Stops a job that has not ended: it ends as "cancelled", within a step. False: it has ended, or is not here.

        One whose pictures are drawn already ends as it would.
        """
        live = self._live.get(id)
        if live is None:
            return False
        live.cancelled = True  # where it is still on its way to the engine
        self.engine.cancel(id)
        return True

    async def prefill(self, references: Sequence[PreparedReference], *, owner: str, id: str) -> Prefilled:
        """Computes K/V of references, or finds them. Raises what the engine raises."""
        future: asyncio.Future[Prefilled] = self._loop.create_future()
        self._prefills.add(future)

        def settle(event: Event) -> None:
            if future.done():
                return
            if isinstance(event, Prefilled):
                future.set_result(event)
            elif isinstance(event, Failed):
                future.set_exception(event.error)

        def heard(event: Event) -> None:
            self._loop.call_soon_threadsafe(settle, event)

        try:
            self.engine.submit(PrefillRequest(references=tuple(references)), id=id, listener=heard, owner=owner)
            return await future
        except asyncio.CancelledError:
            self.engine.cancel(id)
            raise
        finally:
            self._prefills.discard(future)

    async def check_pictures(self, pictures: Sequence[PreparedReference], *, tolerance: int) -> Finding | None:
        """What the checks say of references. Pictures that passed, at the same tolerance, are not looked at again."""
        names = [(p.report.digest, tolerance) for p in pictures]
        if all(name in self._passed for name in names):
            for name in names:
                self._passed.move_to_end(name)
            return None
        found = [Image.frombytes("RGB", p.report.processed_size, p.data) for p in pictures]
        finding = await self.aside(self.checks.check_images, found, role="input", tolerance=tolerance)
        if finding is None:
            self._passed.update(dict.fromkeys(names))
            while len(self._passed) > _PASSED_KEPT:
                self._passed.popitem(last=False)
        return finding

    @property
    def num_live(self) -> int:
        return len(self._live)

    # the way of a job

    @staticmethod
    def _request(job: Job, references: tuple[PreparedReference, ...]) -> EditRequest:
        return EditRequest(
            prompt=job.prompt,
            seeds=job.seeds,
            references=references,
            width=job.width,
            height=job.height,
            num_inference_steps=job.num_steps,
        )

    def _begin(self, job: Job, slot: Slot) -> None:
        self._live[job.id] = _Live(job=job, slot=slot)
        self._spawn(self._bring(job), self._ways)

    async def _bring(self, job: Job) -> None:
        """Checks what came, and gives the job to the engine. Counted in `_coming` by who began it."""
        try:
            finding = await self.aside(self.checks.check_prompt, job.prompt, tolerance=job.tolerance)
            pictures = [await self._patiently(self.jobs.picture, report) for report in job.references]
            if finding is None and not job.options.get("references_checked"):
                finding = await self.check_pictures(pictures, tolerance=job.tolerance)
            if finding is not None:
                await self._end(job, "request_moderated", {"finding": asdict(finding)})
                return
            if self._live[job.id].cancelled:
                raise Cancelled(f"{job.id} was cancelled before it began")

            def heard(event: Event) -> None:
                self._loop.call_soon_threadsafe(self._hear, job, event)

            timeout = None if job.timeout is None else job.created + job.timeout - time.time()
            self.engine.submit(
                self._request(job, tuple(pictures)),
                id=job.id,
                listener=heard,
                owner=job.owner,
                priority=job.priority,
                timeout=timeout,
                accepted=True,
            )
        except QueueFull:
            if self._stop_by is None:  # the engine takes what was accepted, unless it is closed
                raise
            _logger.info("job %s is left for the next start", job.id)
        except Exception as error:
            await self._fail(job, error)
        finally:
            self._coming -= 1

    async def _patiently(self, call: Callable[..., _R], *args: Any, **kwargs: Any) -> _R:
        """Work on files, again and again where their storage does not answer: what is drawn is not lost to that."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return await self.aside(call, *args, **kwargs)
            except StorageUnavailable as error:
                _logger.warning("%s; tried again in %g s", error, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

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
                    state="running",
                    progress=event.step / (event.num_inference_steps + 1),
                    step=event.step,
                    num_steps=event.num_inference_steps,
                    previews=files,
                ),
            )
        elif isinstance(event, Finished):
            self._spawn(self._deliver(job, event.result), self._ways)
        elif isinstance(event, Failed):
            self._spawn(self._fail(job, event.error), self._ways)

    async def _deliver(self, job: Job, result: EditResult) -> None:
        """Checks and writes the pictures of a job, then ends it."""
        try:
            finding = await self.aside(self.checks.check_images, result.images, role="output", tolerance=job.tolerance)
            if finding is not None:
                await self._end(job, "content_moderated", {"finding": asdict(finding)})
                return
            started = time.perf_counter()
            files = await self._patiently(self._encode, job, result)
            names = await self._patiently(self.jobs.write_results, job.id, files, suffix=SUFFIXES[job.output_format])
            told = _told(job, result) | {"files": names, "encode_seconds": round(time.perf_counter() - started, 4)}
            await self._end(job, "ready", told)
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
                    Ingredient(data=self.jobs.picture_png(report.digest), title=f"image {number}")
                    for number, report in enumerate(job.references, start=1)
                ]
                data = provenance.sign(
                    data,
                    format=job.output_format,
                    title=f"{job.id}.{SUFFIXES[job.output_format]}",
                    action="edited" if used else "created",
                    ingredients=used,
                    metadata=metadata,
                    signer=self.signer,
                )
            files.append(data)
        return files

    @functools.cached_property
    def _model(self) -> str:
        return self.engine.model.digest

    async def _fail(self, job: Job, error: Exception) -> None:
        if isinstance(error, Cancelled):
            await self._end(job, "cancelled", {"error": "the job was cancelled", "type": "cancelled"})
            return
        is_theirs = isinstance(error, LimnerError) and not isinstance(error, OutputError)  # which names our folders
        if not is_theirs:
            _logger.error("job %s failed", job.id, exc_info=error)
        kind = "deadline" if isinstance(error, DeadlineExceeded) else "failed"
        message = str(error) if is_theirs else "an error inside the server; its log has more"
        await self._end(job, "error", {"error": message, "type": kind})

    async def _end(self, job: Job, status: Status, result: dict[str, Any]) -> None:
        """Ends a job; where the store fails, until it does not, and the job keeps its place."""
        pause = _FIRST_PAUSE
        while True:
            try:
                await self.store(self.jobs.end, job.id, status, result=result, keep_seconds=self.settings.keep_results)
                break
            except LimnerError:
                _logger.exception("job %s cannot be ended; tried again in %g s, or after a restart", job.id, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
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

    def _spawn(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = self._loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(functools.partial(_finished, tasks))

    async def _send_webhooks(self) -> None:
        """Several at once, so that a receiver that is slow holds up none of the others for long."""
        under_way: dict[str, asyncio.Task[None]] = {}
        due: list[Job] | None = []
        while True:
            self._webhook_due.clear()
            before = due
            try:
                due = await self.store(self.jobs.due_webhooks)
            except LimnerError as error:
                due = None
                if before is not None:  # once an outage
                    _logger.error("webhooks that are due cannot be read, and wait: %s", error)
            for job in due or ():
                if job.id not in under_way and len(under_way) < _WEBHOOKS_AT_ONCE:
                    task = self._loop.create_task(self._send_webhook(job))
                    under_way[job.id] = task
                    self._background.add(task)
                    task.add_done_callback(functools.partial(_finished, self._background))
                    task.add_done_callback(functools.partial(self._webhook_sent, under_way, job.id))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._webhook_due.wait(), 1.0)

    def _webhook_sent(self, under_way: dict[str, asyncio.Task[None]], id: str, task: asyncio.Task[None]) -> None:
        del under_way[id]
        self._webhook_due.set()

    async def _send_webhook(self, job: Job) -> None:
        """At least once: an attempt is noted after it was made."""
        assert job.webhook is not None
        again = None
        if self._outbound is None:
            _logger.error("webhook of %s is given up: webhooks are switched off", job.id)
        else:
            body = json.dumps(self.describe(job)).encode()
            result = await deliver(job.webhook.url, body, job.webhook.secret, client=self._outbound)
            if result.outcome is Outcome.RETRY:
                now = time.time()
                again = next_attempt(
                    job.webhook_attempts + 1,
                    now,
                    random.Random(),
                    first_attempt=job.webhook_first or now,
                    policy=self.settings.webhooks,
                )
            if result.outcome is not Outcome.DELIVERED:
                _logger.warning("webhook of %s: %s%s", job.id, result.problem, "" if again else "; given up")
        try:
            await self.store(self.jobs.webhook_attempted, job.id, again=again)
        except LimnerError:  # it stays due; the receiver is not asked again and again for a fault of ours
            _logger.exception("the attempt at the webhook of %s cannot be noted", job.id)
            await asyncio.sleep(_LONGEST_PAUSE)

    describe: Callable[[Job], dict[str, Any]] = staticmethod(lambda job: {"id": job.id, "status": job.status})
    """What a webhook says of a job; the dialect sets it."""

    async def _clean(self) -> None:
        while True:
            try:
                await self.store(self.jobs.clean, forget_seconds=self.settings.keep_jobs)
                if self._stop_by is None:
                    pending, old = await self.store(self.jobs.pending), time.time() - _LEFT_SECONDS
                    self._take_up([job for job in pending if job.id not in self._live and job.created < old])
            except (LimnerError, OSError):
                _logger.exception("old results could not be removed")
            await asyncio.sleep(self.settings.clean_every)


def _finished(tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    """What a task raised that nobody waits for is in the log."""
    tasks.discard(task)
    if not task.cancelled() and task.exception() is not None:
        _logger.error("a task in the background failed", exc_info=task.exception())


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
