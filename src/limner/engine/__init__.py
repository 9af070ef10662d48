"""Many requests, one device: a queue with priorities and fairness, batches, cancellation, deadlines, progress.

Owns when a request runs and with which others. Requests that share references, size and number of steps run as one batch
over one set of keys and values. Knows nothing of HTTP, files or durability: a request that the process takes down with it
is the caller's to bring again.

One thread runs the pipeline. Listeners are called in it, so they have to be quick; what they raise is logged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import psutil
import torch
from PIL import Image
from torch import Tensor

from limner.config import ReferencePolicy
from limner.engine.load import load_in_thread
from limner.errors import Cancelled, DeadlineExceeded, InvalidRequest, LimnerError, QueueFull
from limner.grid import check_size
from limner.images import PreparedReference, ReferenceReport, to_pil
from limner.options import ServiceOptions
from limner.pipeline import Pipeline, PipelineOutput, PromptReport, Timings, check_fits
from limner.requests import EditRequest, PrefillRequest, check_prompt
from limner.store import StoreStats

__all__ = [
    "EditRequest",
    "EditResult",
    "Engine",
    "EngineStats",
    "Event",
    "Failed",
    "Finished",
    "ModelView",
    "PrefillRequest",
    "Prefilled",
    "Progress",
    "Started",
    "check_request",
    "check_room_for",
    "load_aside",
    "load_in_thread",
]

_logger = logging.getLogger("limner")
load_aside = load_in_thread
"""The name before."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class EditResult:
    """Pictures in the order of the seeds, and how they came to be.

    `waited` and `ran` are seconds in the queue and on the device; `batch` images were drawn together. `seconds_saved` is
    what the prefill of these references took when it was done, where it was not done again.
    """

    images: tuple[Image.Image, ...]
    seeds: tuple[int, ...]
    reference_cache: Literal["none", "miss", "memory", "disk", "remote"]
    reference_key: str | None
    seconds_saved: float
    references: tuple[ReferenceReport, ...]
    prompt: PromptReport
    timings: Timings
    waited: float
    ran: float
    batch: int
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Started:
    """The request is on the device."""


@dataclass(frozen=True, eq=False, slots=True)
class Progress:
    """`step` of `num_steps` is done; `previews` are small pictures of what comes, one an image, if the model has them."""

    step: int
    num_steps: int
    previews: tuple[Image.Image, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Finished:
    """The pictures are there."""

    result: EditResult


@dataclass(frozen=True, eq=False, slots=True)
class Prefilled:
    """References are kept under `key`, as so many bytes; their prefill took `prefill_seconds` when it was done."""

    key: str
    nbytes: int
    prefill_seconds: float
    source: Literal["miss", "memory", "disk", "remote"]


@dataclass(frozen=True, eq=False, slots=True)
class Failed:
    """There will be no pictures; `Cancelled` and `DeadlineExceeded` are among the errors."""

    error: Exception


Event = Started | Progress | Finished | Prefilled | Failed
Listener = Callable[[Event], None]
_BatchKey = tuple[tuple[str, ...], int, int, int]


@dataclass(kw_only=True, eq=False, slots=True)
class _Job:
    """A request in the queue or on the device. `key` None: a prefill alone."""

    id: str
    owner: str
    priority: int
    deadline: float | None
    listener: Listener
    request: EditRequest
    key: _BatchKey | None
    arrived: float
    cancelled: bool = False
    ended: bool = False

    @property
    def num_images(self) -> int:
        return len(self.request.seeds)


@dataclass(kw_only=True, slots=True)
class EngineStats:
    """Counts since the engine was made, and what is there now."""

    waiting: int = 0
    running: int = 0
    accepted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    batches: int = 0
    images: int = 0
    prefills: int = 0
    """Prefills that were computed, for an edit or alone."""
    busy_seconds: float = 0.0
    waited_seconds: float = 0.0
    batch_sizes: dict[int, int] = field(default_factory=dict)


def check_request(
    request: EditRequest,
    *,
    max_batch: int,
    default_size: tuple[int, int],
    text_length: int,
    memory_needed: Callable[..., int],
    memory_bytes: int,
) -> tuple[int, int]:
    """The output size (width, height) of a request that can run. Raises `InvalidRequest` and `CapacityError`."""
    check_prompt(request.prompt)
    if not request.seeds:
        raise InvalidRequest("seeds", "there are none; give one for each image")
    if len(request.seeds) > max_batch:
        raise InvalidRequest("num_images", f"{len(request.seeds)} images are over the {max_batch} of a batch")
    if not 1 <= request.num_inference_steps <= 100:
        raise InvalidRequest("num_inference_steps", f"{request.num_inference_steps} is not within 1 to 100")
    sizes = [r.report.processed_size for r in request.references] or [default_size]
    width = check_size("width", sizes[0][0] if request.width is None else request.width)
    height = check_size("height", sizes[0][1] if request.height is None else request.height)
    check_room_for(
        request.references,
        size=(width, height),
        batch=len(request.seeds),
        text_length=text_length,
        memory_needed=memory_needed,
        memory_bytes=memory_bytes,
    )
    return width, height


def check_room_for(
    references: Sequence[PreparedReference],
    *,
    size: tuple[int, int],
    batch: int,
    text_length: int,
    memory_needed: Callable[..., int],
    memory_bytes: int,
) -> None:
    """Raises `CapacityError` with the numbers where so much does not fit; arguments as of `Pipeline.memory_needed`."""
    num_ref = sum(w * h for w, h in (r.report.processed_size for r in references)) // 256
    tokens = {"num_ref": num_ref, "num_own": _own_tokens(size, text_length), "batch": batch}
    check_fits(memory_needed(**tokens), memory_bytes, **tokens)


def _own_tokens(size: tuple[int, int], text_length: int) -> int:
    return size[0] * size[1] // 256 + min(512, text_length)


class ModelView(Protocol):
    """What callers may know of a model without having it."""

    @property
    def default_size(self) -> tuple[int, int]: ...

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def reference_policy(self) -> ReferencePolicy: ...

    @property
    def previews(self) -> bool: ...

    @property
    def digest(self) -> str: ...


class _View:
    """A pipeline as callers see it."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe
        self.default_size, self.sizes, self.reference_policy = pipe.default_size, pipe.sizes, pipe.reference_policy
        self.previews = pipe.latent_preview is not None

    @property
    def digest(self) -> str:
        return self._pipe.digest


class Engine:
    """Runs requests on one pipeline, in one thread of its own. On a CPU load the pipeline with `load_in_thread`.

    `max_waiting` requests may wait; `max_batch` images run at once; `memory_bytes` is what calls may take beside the
    weights (default: what is free now).
    """

    def __init__(
        self,
        pipe: Pipeline,
        *,
        max_waiting: int = ServiceOptions.max_waiting,
        max_batch: int = ServiceOptions.max_batch,
        memory_bytes: int | None = None,
        previews: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("max_waiting", max_waiting), ("max_batch", max_batch)):
            if value < 1:
                raise InvalidRequest(name, f"{value} is not at least 1")
        if pipe.parallel is not None:
            raise InvalidRequest(
                "pipe",
                "a parallel model runs in several processes that have to make the same calls; an engine is in one",
            )
        self.pipe = pipe
        self.max_waiting = max_waiting
        self.max_batch = max_batch
        self.memory_bytes = _free(pipe) if memory_bytes is None else memory_bytes
        self._previews = previews and pipe.latent_preview is not None
        self._clock = clock
        self._lock = threading.Condition()
        self._waiting: list[_Job] = []
        self._running: list[_Job] = []
        self._served: dict[str, float] = {}
        self._stats = EngineStats()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="limner-engine", daemon=True)
        self._thread.start()

    # callers

    def check(self, request: EditRequest) -> tuple[int, int]:
        """The output size (width, height) of a request that can run. Raises `InvalidRequest` and `CapacityError`."""
        return check_request(
            request,
            max_batch=self.max_batch,
            default_size=self.pipe.default_size,
            text_length=self.pipe.text_encoder.max_length,
            memory_needed=self.pipe.memory_needed,
            memory_bytes=self.memory_bytes,
        )

    def check_room(self, *, beside: int = 0) -> None:
        """Raises `QueueFull` where no more requests may wait; `beside` are on their way to the queue."""
        with self._lock:
            self._check_room(beside)

    def _check_room(self, beside: int = 0) -> None:
        waiting = len(self._waiting) + beside
        if waiting >= self.max_waiting:
            self._stats.refused += 1
            raise QueueFull(f"{waiting} requests wait, which is all that may; try again later")

    @property
    def model(self) -> ModelView:
        """What callers may know of the model."""
        return _View(self.pipe)

    def key_of(self, prepared: Sequence[PreparedReference]) -> str:
        """The content key of prepared pictures in this order; reads all weights the first time."""
        return self.pipe.key_of(prepared)

    def holds(self, key: str) -> bool:
        """Whether the K/V of a key are on this machine."""
        return key in self.pipe.store

    def forget(self, key: str) -> bool:
        """Removes the K/V of a key from every tier; False if there were none. Raises `RemoteError` and `OutputError`."""
        return self.pipe.store.remove(key)

    def store_stats(self) -> StoreStats:
        """Counts of the store."""
        return self.pipe.store.stats()

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
        """Queues a request. Its listener hears of `Started`, `Progress`, and at last one of `Finished` and `Failed`.

        Of two waiting requests the one of higher `priority` runs first; of equal ones, that of the owner who was served
        less. `timeout` are seconds from now after which it fails with `DeadlineExceeded`, also while it runs. `accepted`
        requests were promised already: the queue takes them however long it is. Raises `InvalidRequest`,
        `CapacityError` and `QueueFull`, and then the listener hears nothing.
        """
        if isinstance(request, PrefillRequest):
            self.prefill(
                request.references, id=id, listener=listener, owner=owner, priority=priority, accepted=accepted
            )
            return
        width, height = self.check(request)
        digests = tuple(r.report.digest for r in request.references)
        key = (digests, width, height, request.num_inference_steps)
        self._enqueue(id, request, key, listener, owner=owner, priority=priority, timeout=timeout, accepted=accepted)

    def prefill(
        self,
        references: Sequence[PreparedReference],
        *,
        id: str,
        listener: Listener,
        owner: str = "local",
        priority: int = 0,
        accepted: bool = False,
    ) -> None:
        """Queues the computing of K/V alone; its listener hears at last one of `Prefilled` and `Failed`."""
        if not references:
            raise InvalidRequest("references", "there are none; give at least one picture")
        check_room_for(
            references,
            size=self.pipe.default_size,
            batch=1,
            text_length=self.pipe.text_encoder.max_length,
            memory_needed=self.pipe.memory_needed,
            memory_bytes=self.memory_bytes,
        )
        request = EditRequest(prompt="prefill", seeds=(), references=tuple(references))
        self._enqueue(id, request, None, listener, owner=owner, priority=priority, timeout=None, accepted=accepted)

    def _enqueue(
        self,
        id: str,
        request: EditRequest,
        key: _BatchKey | None,
        listener: Listener,
        *,
        owner: str,
        priority: int,
        timeout: float | None,
        accepted: bool,
    ) -> None:
        now = self._clock()
        job = _Job(
            id=id,
            owner=owner,
            priority=priority,
            deadline=None if timeout is None else now + timeout,
            listener=listener,
            request=request,
            key=key,
            arrived=now,
        )
        with self._lock:
            if self._closed:
                raise QueueFull("the engine is shutting down; send the request again later")
            if not accepted:
                self._check_room()
            if any(other.id == id for other in (*self._waiting, *self._running)):
                raise InvalidRequest("id", f"{id!r} is in the queue already")
            active = {other.owner for other in (*self._waiting, *self._running)}
            if owner not in active:  # who was away saves nothing up, and owes nothing
                least = min((self._served[other] for other in active), default=0.0)
                self._served[owner] = max(self._served.get(owner, 0.0), least) if active else 0.0
                if not active:
                    self._served = {owner: 0.0}
            self._stats.accepted += 1
            self._waiting.append(job)
            self._lock.notify_all()

    def cancel(self, id: str) -> bool:
        """Stops a request: at once if it waits, after the step that runs now otherwise. False: it is not here."""
        with self._lock:
            for job in self._waiting:
                if job.id == id:
                    self._waiting.remove(job)
                    break
            else:
                running = [job for job in self._running if job.id == id and not (job.cancelled or job.ended)]
                for job in running:
                    job.cancelled = True
                return bool(running)
        self._fail(job, Cancelled(f"{id} was cancelled before it began"))
        return True

    def position(self, id: str) -> int | None:
        """How many requests of the queue arrived before this one; None: it does not wait."""
        with self._lock:
            for i, job in enumerate(self._waiting):
                if job.id == id:
                    return i
        return None

    def stats(self) -> EngineStats:
        with self._lock:
            found = EngineStats(
                **{name: getattr(self._stats, name) for name in EngineStats.__dataclass_fields__}  # a copy
            )
            found.batch_sizes = dict(self._stats.batch_sizes)
            found.waiting, found.running = len(self._waiting), len(self._running)
        return found

    @property
    def is_alive(self) -> bool:
        """Whether the thread that runs requests is there."""
        return self._thread.is_alive() and not self._closed

    def close(self, *, timeout: float = 0.0) -> list[str]:
        """Takes no more requests, works on those that wait for `timeout` seconds, and gives the ids of those not done.

        What is left is dropped after the step that runs now; its listeners hear nothing more.
        """
        end = time.monotonic() + timeout
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            while (self._waiting or self._running) and (left := end - time.monotonic()) > 0:
                self._lock.wait(left)
            dropped = [*self._running, *self._waiting]
            self._waiting.clear()
            for job in dropped:
                job.cancelled = True
                job.listener = _deaf
            self._lock.notify_all()
        self._thread.join(timeout=60)
        return [job.id for job in dropped]

    # the thread

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self._closed:
                    self._lock.wait()
                if not self._waiting:
                    return
                late = self._take_late()
                batch = self._take_batch()
                self._running = list(batch)
            for job in late:
                self._fail(job, _too_late(job))
            start = self._clock()
            try:
                if batch:
                    self._run(batch, start)
            except Exception as error:  # a request's fault or ours: the next ones run
                self._after_failure(batch, error)
            finally:
                with self._lock:
                    self._running = []
                    self._stats.busy_seconds += self._clock() - start
                    self._lock.notify_all()

    def _after_failure(self, batch: list[_Job], error: Exception) -> None:
        """Fails a request that ran alone; of a batch, each is tried alone, so that one does not take others with it."""
        left = [job for job in batch if not job.ended]
        if len(batch) == 1:
            if not isinstance(error, LimnerError):
                _logger.error("request %s failed", batch[0].id, exc_info=error)
            for job in left:
                self._fail(job, error)
            return
        for job in left:
            try:
                self._run([job], self._clock())
            except Exception as own_error:
                self._after_failure([job], own_error)

    def _take_late(self) -> list[_Job]:
        now = self._clock()
        late = [job for job in self._waiting if job.deadline is not None and job.deadline <= now]
        self._waiting = [job for job in self._waiting if job not in late]
        return late

    def _take_batch(self) -> list[_Job]:
        """The request whose turn it is, and those that can run with it."""
        if not self._waiting:
            return []
        turn = sorted(self._waiting, key=lambda job: (-job.priority, self._served.get(job.owner, 0.0), job.arrived))
        head, batch = turn[0], [turn[0]]
        if head.key is not None:
            for job in turn[1:]:
                images = sum(j.num_images for j in batch) + job.num_images
                if job.key == head.key and images <= self.max_batch and self._fits(head, images):
                    batch.append(job)
        for job in batch:
            self._served[job.owner] = self._served.get(job.owner, 0.0) + max(1, job.num_images) / len(batch)
        self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    def _fits(self, head: _Job, images: int) -> bool:
        assert head.key is not None
        num_ref = sum(w * h for w, h in (r.report.processed_size for r in head.request.references)) // 256
        own = _own_tokens((head.key[1], head.key[2]), self.pipe.text_encoder.max_length)
        return self.pipe.memory_needed(num_ref=num_ref, num_own=own, batch=images) <= self.memory_bytes

    def _run(self, batch: list[_Job], start: float) -> None:
        for job in batch:
            self._tell(job, Started())
        with self._lock:
            self._stats.waited_seconds += sum(start - job.arrived for job in batch)
        head = batch[0]
        if head.key is None:
            references, source = self.pipe.prefill_from(head.request.references)
            with self._lock:
                self._stats.prefills += source == "miss"
                self._stats.finished += 1
            head.ended = True
            self._tell(head, Prefilled(references.key, references.nbytes, references.prefill_seconds, source))
            return
        _, width, height, num_steps = head.key
        going = _Rows(batch)

        def after_step(pipe: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
            kept = self._drop_stopped(going)
            if self._previews and step + 1 < num_steps:
                previews = to_pil(tensors["preview"][kept])
                for job, own in going.split(previews):
                    self._tell(job, Progress(step + 1, num_steps, tuple(own)))
            else:
                for job in going.jobs:
                    self._tell(job, Progress(step + 1, num_steps, ()))
            return {} if len(kept) == len(tensors["latents"]) else {"rows": kept}

        try:
            out = self.pipe(
                [job.request.prompt for job in batch for _ in job.request.seeds],
                image=list(head.request.references) or None,
                width=width,
                height=height,
                num_inference_steps=num_steps,
                generator=[torch.Generator().manual_seed(seed) for job in batch for seed in job.request.seeds],
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=("latents", "preview") if self._previews else ("latents",),
            )
        except Cancelled:
            return
        assert isinstance(out, PipelineOutput)
        done = going.split(out.images)
        prompts = dict(zip([job.id for job in batch for _ in job.request.seeds], out.prompts, strict=True))
        now = self._clock()
        with self._lock:
            self._stats.batches += 1
            self._stats.images += len(out.images)
            self._stats.prefills += out.reference_cache == "miss"
            self._stats.batch_sizes[len(out.images)] = self._stats.batch_sizes.get(len(out.images), 0) + 1
            late = [job for job, _ in done if job.cancelled]
            self._stats.finished += len(done) - len(late)
            for job, _ in done:
                job.ended = True  # can be cancelled no more
        for job in late:
            self._fail(job, Cancelled(f"{job.id} was cancelled"))
        for job, pictures in done:
            if job in late:
                continue
            self._tell(
                job,
                Finished(
                    EditResult(
                        images=tuple(pictures),
                        seeds=job.request.seeds,
                        reference_cache=out.reference_cache,  # type: ignore[arg-type]  # never "given" here
                        reference_key=out.reference_key,
                        seconds_saved=out.seconds_saved,
                        references=tuple(r.report for r in job.request.references),
                        prompt=prompts[job.id],
                        timings=out.timings,
                        waited=start - job.arrived,
                        ran=now - start,
                        batch=len(out.images),
                        metadata=out.metadata,
                    )
                ),
            )

    def _drop_stopped(self, going: _Rows) -> list[int]:
        """Fails the requests of a batch that were cancelled or are late; the rows of those that go on."""
        now = self._clock()
        with self._lock:
            stopped = [job for job in going.jobs if job.cancelled]
        late = [job for job in going.jobs if job not in stopped and job.deadline is not None and job.deadline <= now]
        kept = going.drop([*stopped, *late])
        for job in (*stopped, *late):
            self._fail(job, _too_late(job) if job in late else Cancelled(f"{job.id} was cancelled"))
        if not kept:
            raise Cancelled("every request of the batch was stopped")
        return kept

    def _fail(self, job: _Job, error: Exception) -> None:
        with self._lock:
            job.ended = True
            if isinstance(error, Cancelled):
                self._stats.cancelled += 1
            else:
                self._stats.failed += 1
        self._tell(job, Failed(error))

    def _tell(self, job: _Job, event: Event) -> None:
        try:
            job.listener(event)
        except Exception:
            _logger.exception("the listener of request %s failed", job.id)


class _Rows:
    """Which rows of a batch belong to which request, as requests drop out."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        self.jobs = list(jobs)

    def drop(self, stopped: Sequence[_Job]) -> list[int]:
        """Takes requests out; gives the rows, of those before, that stay."""
        kept: list[int] = []
        row = 0
        for job in self.jobs:
            if job not in stopped:
                kept += range(row, row + job.num_images)
            row += job.num_images
        self.jobs = [job for job in self.jobs if job not in stopped]
        return kept

    def split(self, values: Sequence[Any]) -> list[tuple[_Job, Sequence[Any]]]:
        """One value a row, to the values of each request."""
        found, row = [], 0
        for job in self.jobs:
            found.append((job, values[row : row + job.num_images]))
            row += job.num_images
        return found


def _deaf(event: Event) -> None:
    """The listener of requests that nobody waits for any more."""


def _too_late(job: _Job) -> DeadlineExceeded:
    return DeadlineExceeded(f"{job.id} was not done in time; allow it more seconds, or send it when less is waiting")


def _free(pipe: Pipeline) -> int:
    if pipe.device.type == "cuda":
        return int(torch.cuda.mem_get_info(pipe.device)[0])
    return int(psutil.virtual_memory().available)
