"""The requests that wait and run: which is next, and which run with it.

Owns order (priority, then fairness between owners), batches of equal key, deadlines, cancellation, and the counts of
requests. Pure: knows no thread, pipeline or device, and reads time from the clock it is given. Not safe for threads:
an engine that has several guards its queue with a lock.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace

from limner.engine.admission import Admission
from limner.engine.events import Event, Listener
from limner.engine.stats import EngineStats
from limner.errors import Cancelled, DeadlineExceeded, InvalidRequest, QueueFull
from limner.requests import EditRequest, PrefillRequest

__all__ = ["Job", "RequestQueue", "too_late"]

_logger = logging.getLogger("limner")
_ACTIVE_SECONDS = 60.0
"""An owner who sent nothing for so long leaves whole batches to others."""


@dataclass(kw_only=True, eq=False, slots=True)
class Job:
    """An opened request from `add` to its last event, drawn in `size` (width, height); times are of the queue's clock."""

    id: str
    request: EditRequest | PrefillRequest
    size: tuple[int, int]
    listener: Listener
    owner: str
    priority: int
    deadline: float | None
    arrived: float
    running: bool = False
    cancelled: bool = False
    ended: bool = False
    key: Hashable = None
    """Jobs of equal keys may run as one batch (`Admission.batch_key`). None: it runs alone."""
    held_bytes: int = 0
    """Bytes of its canvases."""
    work: int = 0
    """Pixels that it reads and draws, those of each forward counted (`Admission.work`)."""
    step_work: int = 0
    """Those of a step."""
    waited: float = 0.0
    """Seconds that are counted as its wait; a job that begins once more has waited on."""
    on_dropped: Callable[[], None] | None = None
    """Called instead of the listener if the job is dropped."""

    @property
    def num_images(self) -> int:
        return len(self.request.seeds) if isinstance(self.request, EditRequest) else 0

    def is_late(self, now: float) -> bool:
        return self.deadline is not None and self.deadline <= now

    def tell(self, event: Event) -> None:
        """Call the listener. What it raises is logged: it must not stop others."""
        try:
            self.listener(event)
        except Exception:
            _logger.exception("the listener of request %s failed", self.id)


class RequestQueue:
    """Jobs that wait, in order of arrival, and jobs that run; each by its id."""

    def __init__(self, admission: Admission, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.admission = admission
        self.waiting: dict[str, Job] = {}
        self.running: dict[str, Job] = {}
        self.closed = False
        self.stats = EngineStats()
        self._clock = clock
        self._asked: dict[str, float] = {}
        """When each owner last sent a request."""
        self._served: dict[str, int] = {}
        """Service of each owner: the work of his requests that began, in full also of those that were stopped."""
        self._num_batches = 0
        self._last_turn: dict[str, int] = {}
        """The number of the batch in which an owner was last served."""

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def check_room(self, *, num_admitted: int = 0) -> None:
        """Raise `QueueFull` if no further request may wait. `num_admitted`: accepted ones that are not here yet."""
        try:
            held = sum(job.held_bytes for job in self.waiting.values())
            self.admission.check_waiting(len(self.waiting) + num_admitted, held_bytes=held)
        except QueueFull:
            self.stats.refused += 1
            raise

    def add(
        self,
        request: EditRequest | PrefillRequest,
        *,
        id: str,
        listener: Listener,
        owner: str,
        priority: int,
        timeout: float | None,
        accepted: bool,
        on_dropped: Callable[[], None] | None = None,
    ) -> Job:
        """Check a request and let it wait; `accepted` ones are taken however many wait.

        Raises `InvalidRequest`, `CapacityError` and `QueueFull`.
        """
        if isinstance(request, EditRequest):
            request = self.admission.opened(request)
        size = self.admission.check(request)
        if self.closed:
            raise QueueFull("the engine is shutting down; send the request again later")
        if not accepted:
            self.check_room()
        if id in self.waiting or id in self.running:
            raise InvalidRequest("id", f"{id!r} is in the queue already")
        now = self._clock()
        job = Job(
            id=id,
            request=request,
            size=size,
            listener=listener,
            owner=owner,
            priority=priority,
            deadline=None if timeout is None else now + timeout,
            arrived=now,
            key=None if isinstance(request, PrefillRequest) else self.admission.batch_key(request, size=size),
            held_bytes=self.admission.held_bytes(request),
            work=self.admission.work(request, size=size),
            step_work=self.admission.step_work(request, size=size),
            on_dropped=on_dropped,
        )
        self._admit_owner(owner)
        self._asked[owner] = now
        self.stats.accepted += 1
        self.waiting[id] = job
        return job

    def _admit_owner(self, owner: str) -> None:
        """A returning owner starts at the lowest service that active owners had before what runs: no credit, no debt.

        So is the virtual time of start-time fair queuing (Goyal et al. 1996).
        """
        active = {job.owner for job in (*self.waiting.values(), *self.running.values())}
        if not active:
            self._served, self._last_turn = {owner: 0}, {}
        elif owner not in active:
            running = Counter[str]()
            for job in self.running.values():
                running[job.owner] += job.work
            least = min(self._served[other] - running[other] for other in active)
            self._served[owner] = max(self._served.get(owner, 0), least)

    def take_late(self) -> list[Job]:
        """Remove and return the waiting jobs whose deadline has passed."""
        now = self._clock()
        late = [job for job in self.waiting.values() if job.is_late(now)]
        for job in late:
            del self.waiting[job.id]
        return late

    def take_batch(self) -> list[Job]:
        """Move the next job, and the waiting ones that can run with it, to those that run; none if none waits.

        The next job is that of the highest priority; of equal ones, that of the owner who was served least; of those,
        that of the owner who was served longest ago, or never; then the oldest. Jobs of one owner alone fill a share of the
        batch while others ask too, since what they ask for next waits for the whole batch.
        """
        turn = self._in_turn()
        if not turn:
            return []
        head, batch = turn[0], [turn[0]]
        num_images = head.num_images
        alike = [job for job in turn[1:] if job.key is not None and job.key == head.key]
        most = self.admission.max_batch
        if all(job.owner == head.owner for job in alike):
            most = math.ceil(most / self._num_active(head.owner))
        for job in alike:
            together = num_images + job.num_images
            if together <= most and self._fit([*batch, job]):
                batch.append(job)
                num_images = together
        return self._serve(batch)

    def take_between(self, *, owners: Collection[str], priority: int, work: int, num_bytes: int) -> list[Job]:
        """Move the next job that may run between two steps of others to those that run; none if there is none.

        It is of none of these `owners`, has that `priority` at least, takes at most half of the `work` that is left to
        them, is not late, and fits in memory beside their `num_bytes`.
        """
        now, room = self._clock(), self.admission.memory_bytes - num_bytes
        for job in self._in_turn():
            fits = (
                job.owner not in owners and job.priority >= priority and 2 * job.work <= work and not job.is_late(now)
            )
            if fits and self.admission.needed([job.request], size=job.size) <= room:
                return self._serve([job])
        return []

    def _in_turn(self) -> list[Job]:
        served, last = self._served, self._last_turn
        return sorted(
            self.waiting.values(),
            key=lambda job: (-job.priority, served[job.owner], last.get(job.owner, -1), job.arrived),
        )

    def _serve(self, batch: list[Job]) -> list[Job]:
        """Move a batch to those that run: it was its owners' turn."""
        for job in batch:
            self._last_turn[job.owner] = self._num_batches
            self.start(job)
        self._num_batches += 1
        return batch

    def _num_active(self, owner: str) -> int:
        """How many owners have sent a request within `_ACTIVE_SECONDS`, `owner` included."""
        now = self._clock()
        self._asked = {other: at for other, at in self._asked.items() if now - at <= _ACTIVE_SECONDS}
        return len({owner, *self._asked})

    def _fit(self, jobs: Sequence[Job]) -> bool:
        requests = [job.request for job in jobs if isinstance(job.request, EditRequest)]
        return self.admission.fits(requests, size=jobs[0].size)

    def start(self, job: Job) -> None:
        """Move a job from those that wait to those that run, and charge its owner for its work."""
        self._served[job.owner] += job.work
        self.running[job.id] = self.waiting.pop(job.id)
        job.running = True

    def count_wait(self, job: Job, *, until: float) -> None:
        """Count what a job that begins has waited, once however often it begins."""
        waited = until - job.arrived
        self.stats.waited_seconds += waited - job.waited
        job.waited = waited

    def requeue(self, job: Job) -> None:
        """Move a job that was not drawn back, behind those that wait; its owner is not charged."""
        self.waiting[job.id] = self.running.pop(job.id)
        self._served[job.owner] -= job.work
        job.running = False

    def cancel(self, id: str) -> Job | None:
        """Cancel a job and return it; None if it is not here or was cancelled before.

        One that waited has left the queue and is the caller's to `end`; one that runs is only marked.
        """
        job = self.waiting.pop(id, None)
        if job is None:
            job = self.running.get(id)
        if job is None or job.cancelled:
            return None
        job.cancelled = True
        return job

    def end(self, job: Job, error: Exception | None = None) -> bool:
        """Remove a job and count how it ended; False if it has ended before, or was dropped."""
        if job.ended:
            return False
        job.ended = True
        for jobs in (self.waiting, self.running):
            if jobs.get(job.id) is job:
                del jobs[job.id]
        if error is None:
            self.stats.finished += 1
        elif isinstance(error, Cancelled):
            self.stats.cancelled += 1
        else:
            self.stats.failed += 1
        return True

    def drop_all(self) -> list[Job]:
        """Remove all jobs, uncounted, and return them. Their listeners hear nothing more; `on_dropped` is the caller's."""
        dropped = [*self.running.values(), *self.waiting.values()]
        self.running.clear()
        self.waiting.clear()
        for job in dropped:
            job.cancelled = job.ended = True
            job.listener = _ignore
        return dropped

    def position(self, id: str) -> int | None:
        """How many waiting requests arrived before this one; None if it does not wait."""
        return next((i for i, waiting in enumerate(self.waiting) if waiting == id), None)

    def snapshot(self) -> EngineStats:
        """A copy of the counts, with the requests that wait and run now."""
        sizes = dict(self.stats.batch_sizes)
        return replace(self.stats, waiting=len(self.waiting), running=len(self.running), batch_sizes=sizes)


def too_late(job: Job) -> DeadlineExceeded:
    """The error of a job whose deadline has passed."""
    return DeadlineExceeded(f"{job.id} was not done in time; allow it more seconds, or send it when less is waiting")


def _ignore(event: Event) -> None:
    """The listener of a job that was dropped."""
