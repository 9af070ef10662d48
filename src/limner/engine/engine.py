"""Draws the requests of a queue with one pipeline, in one thread.

Owns that thread, the lock of the queue, and what listeners are told. Order, batches and deadlines are the queue's
(`limner.engine.queue`), refusals those of `limner.engine.admission`. Knows nothing of HTTP, files or durability: a request
that is lost with the process is for the caller to submit again.

While another request waits, the pictures of a batch are decoded beside its steps (`limner.engine.decoding`).
Listeners are called in the engine's thread or in the one that decodes, so they have to be quick; what they raise is
logged.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from limner.config import KnownWords
from limner.engine.admission import Admission
from limner.engine.card import PipelineView
from limner.engine.decoding import Decoder
from limner.engine.events import EditResult, Failed, Finished, Listener, Prefilled, Progress, Started
from limner.engine.protocol import ModelView
from limner.engine.queue import Job, RequestQueue, too_late
from limner.engine.rows import Rows
from limner.engine.runs import Run
from limner.engine.stats import EngineStats
from limner.errors import Cancelled, CapacityError, InvalidRequest, LimnerError
from limner.grid import size_warning
from limner.images import PreparedReference, to_pil
from limner.memory.free import forget
from limner.memory.residency import Residency
from limner.mentions import prompt_warnings
from limner.options import ServiceOptions
from limner.pipeline import Pipeline, PipelineOutput, PromptReport
from limner.pipeline.repaint import canvas_warnings, in_common
from limner.pipeline.together import canvases_of, own_size
from limner.requests import EditRequest, PrefillRequest
from limner.store import StoreStats

__all__ = ["Engine"]

_logger = logging.getLogger("limner")
_JOIN_SECONDS = 60.0
_AfterStep = Callable[[Pipeline, int, Tensor, dict[str, Tensor]], dict[str, Any]]


class Engine:
    """Runs requests on one pipeline, in one thread of its own. On a CPU load the pipeline with `load_in_thread`.

    `max_waiting` requests may wait; `max_batch` images run at once; `memory_bytes` is what calls may take in addition to
    the weights (default: what is free now). With `decode_beside` pictures are decoded while the next steps run, on a CPU
    without a memory limit. Raises `InvalidRequest`.
    """

    def __init__(
        self,
        pipe: Pipeline,
        *,
        max_waiting: int = ServiceOptions.max_waiting,
        max_batch: int = ServiceOptions.max_batch,
        memory_bytes: int | None = None,
        previews: bool = True,
        decode_beside: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if pipe.parallel is not None:
            raise InvalidRequest(
                "pipe",
                "a parallel model runs in several processes that have to make the same calls; an engine is in one",
            )
        self.pipe = pipe
        room = pipe.residency or Residency.unlimited()
        self.model: ModelView = PipelineView(pipe)
        self.admission = Admission(
            model=self.model,
            max_waiting=max_waiting,
            max_batch=max_batch,
            memory_bytes=room.free_bytes(pipe.device) if memory_bytes is None else memory_bytes,
        )
        self._previews = previews and self.model.previews
        self._decode_beside = decode_beside and pipe.device.type == "cpu" and pipe.residency is None
        self._decoder = Decoder()
        self._short_of_memory = False
        """Whether a batch is drawn anew for want of memory: its pictures are decoded before anything else is drawn."""
        self._not_decoded: list[tuple[list[Job], Exception]] = []
        """Batches whose pictures could not be decoded beside another one, and why; for the thread to see to."""
        self._clock = clock
        self._queue = RequestQueue(self.admission, clock=clock)
        self._runs: list[Run] = []
        """What the thread draws, innermost last."""
        self._changed = threading.Condition()
        """Guards the queue; notified when a job arrives, a batch ends or the engine closes."""
        self._thread = threading.Thread(target=self._work, name="limner-engine", daemon=True)
        self._thread.start()

    # what callers ask

    @property
    def max_waiting(self) -> int:
        return self.admission.max_waiting

    @property
    def max_batch(self) -> int:
        return self.admission.max_batch

    def check(self, request: EditRequest | PrefillRequest) -> tuple[int, int]:
        """Return the size (width, height) in which a request is drawn. Raises `InvalidRequest` and `CapacityError`."""
        return self.admission.check(request)

    def opened(self, request: EditRequest) -> EditRequest:
        """As `Pipeline.opened`. It reads pictures: call it in a thread, and `check` and `submit` are quick then."""
        return self.admission.opened(request)

    def check_room(self, *, num_admitted: int = 0) -> None:
        """Raise `QueueFull` if no further request may wait. `num_admitted`: accepted ones that were not submitted yet."""
        with self._changed:
            self._queue.check_room(num_admitted=num_admitted)

    def key_of(self, prepared: Sequence[PreparedReference]) -> str:
        """Return the content key of prepared pictures in this order; reads all weights the first time."""
        return self.pipe.key_of(prepared)

    def holds(self, key: str) -> bool:
        """Whether the K/V of a key are on this machine."""
        return key in self.pipe.store

    def forget(self, key: str) -> bool:
        """Remove the K/V of a key from every tier; False if there were none. Raises `RemoteError` and `OutputError`."""
        return self.pipe.store.remove(key)

    def store_stats(self) -> StoreStats:
        """Return the counts of the store."""
        return self.pipe.store.stats()

    def stats(self) -> EngineStats:
        """Return a copy of the counts."""
        with self._changed:
            return self._queue.snapshot()

    def position(self, id: str) -> int | None:
        """Return how many waiting requests arrived before this one; None if it does not wait."""
        with self._changed:
            return self._queue.position(id)

    @property
    def is_alive(self) -> bool:
        """Whether requests are accepted and the thread that runs them is there."""
        return self._thread.is_alive() and not self._queue.closed

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
        on_dropped: Callable[[], None] | None = None,
    ) -> None:
        """Queue a request. Its listener hears `Started`, `Progress`, and at last `Finished`, `Prefilled` or `Failed`.

        Of two waiting requests the one of higher `priority` runs first; of equal ones, that of the owner who was served
        less. `Started` comes once more for a request that begins again: it found no memory beside others and waited for
        their end, or is drawn without others of its batch, which failed. After `timeout` seconds a request fails with
        `DeadlineExceeded`, even while it runs. `accepted` requests are queued however many wait. `on_dropped` is called
        if the engine is closed before the request is done: the listener hears nothing then. Raises `InvalidRequest`,
        `CapacityError` and `QueueFull`, and then the listener hears nothing.
        """
        if isinstance(request, EditRequest):
            request = self.opened(request)  # before the lock
        with self._changed:
            self._queue.add(
                request,
                id=id,
                listener=listener,
                owner=owner,
                priority=priority,
                timeout=timeout,
                accepted=accepted,
                on_dropped=on_dropped,
            )
            self._changed.notify_all()

    def cancel(self, id: str) -> bool:
        """Stop a request: at once if it waits, after the present step if it runs. False if it is not here."""
        with self._changed:
            job = self._queue.cancel(id)
        if job is None:
            return False
        if not job.running:
            self._fail(job, Cancelled(f"{id} was cancelled before it began"))
        return True

    def close(self, *, timeout: float = 0.0) -> list[str]:
        """Accept nothing more, work on what waits for `timeout` seconds, and return the ids of what is not done.

        What is left is dropped after the present step; its listeners hear nothing more.
        """
        end = time.monotonic() + timeout
        with self._changed:
            self._queue.closed = True
            self._changed.notify_all()
            while self._queue and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            dropped = self._queue.drop_all()
            self._changed.notify_all()
        for job in dropped:
            if job.on_dropped is not None:
                job.on_dropped()
        self._thread.join(timeout=_JOIN_SECONDS)
        return [job.id for job in dropped]

    # the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._queue.waiting or self._not_decoded or self._queue.closed):
                    self._changed.wait()
                if self._queue.closed and not self._queue.waiting:
                    break
                late = self._queue.take_late()
                batch = self._queue.take_batch()
            for job in late:
                self._fail(job, too_late(job))
            start = self._clock()
            self._after_decoding()
            try:
                if batch:
                    self._run_beside(batch, start)
            except Exception as error:  # of the request or of ours: the next ones run
                self._after_failure(batch, error)
            finally:
                with self._changed:
                    self._queue.stats.busy_seconds += self._clock() - start
                    self._changed.notify_all()
        self._decoder.close()
        self._after_decoding()
        with self._changed:
            self._changed.notify_all()

    def _after_decoding(self) -> None:
        """See to the batches whose pictures could not be decoded; where memory was too little for that, begin again."""
        with self._changed:
            failed, self._not_decoded = self._not_decoded, []
        for batch, problem in failed:
            left, error = [job for job in batch if not job.ended], problem
            if isinstance(error, CapacityError) and left:
                forget(error)
                try:
                    self._run_again(left)
                    continue
                except Exception as own_error:
                    error = own_error
            self._after_failure(left, error)

    def _run_again(self, batch: list[Job]) -> None:
        """Run a batch for which memory was too little; once alone, if that is so beside what is being decoded, too."""
        short, self._short_of_memory = self._short_of_memory, True
        try:
            self._run_beside(batch, self._clock())
        finally:
            self._short_of_memory = short

    def _run_beside(self, batch: list[Job], start: float) -> None:
        """Run a batch beside what is being decoded; after that, if memory is too little for both."""
        needed = self.admission.needed([job.request for job in batch], size=batch[0].size)
        if self._decoder.num_bytes and self._decoder.num_bytes + needed > self.admission.memory_bytes:
            self._decoder.wait()
        alone = self._decoder.is_free
        try:
            self._run(batch, start)
        except CapacityError as error:
            if alone or len(batch) > 1:
                raise
            forget(error)
            self._decoder.wait()
            self._run(batch, start)

    def _after_failure(self, batch: list[Job], error: Exception) -> None:
        """Fail a request that ran alone. Of a batch, run each alone, so that one does not fail the others.

        If memory was too little for the batch, run its halves.
        """
        left = [job for job in batch if not job.ended]
        if len(batch) <= 1:
            if left and not isinstance(error, LimnerError):
                _logger.error("request %s failed", left[0].id, exc_info=error)
            for job in left:
                self._fail(job, error)
            return
        size = 1
        if isinstance(error, CapacityError):
            forget(error)  # it may hold the latents of pictures that could not be decoded
            self._decoder.wait()  # which took a part of it
            size = (len(left) + 1) // 2 if len(left) > 1 else 1
            _logger.warning("memory is too little for a batch of %d: %d at once (%s)", len(batch), size, error)
        for part in [left[start : start + size] for start in range(0, len(left), size)]:
            try:
                self._run_again(part)
            except Exception as own_error:
                self._after_failure(part, own_error)

    def _run(self, batch: list[Job], start: float) -> None:
        for job in batch:
            job.tell(Started())
        with self._changed:
            for job in batch:
                self._queue.count_wait(job, until=start)
        head = batch[0]
        if isinstance(head.request, PrefillRequest):  # which runs alone
            self._prefill(head, head.request)
        else:
            width, height = head.size  # of all: some may have left it to the model
            requests = [job.request for job in batch if isinstance(job.request, EditRequest)]
            self._draw(batch, [replace(request, width=width, height=height) for request in requests], start)

    def _prefill(self, job: Job, request: PrefillRequest) -> None:
        references, source = self.pipe.prefill_from(request.references)
        with self._changed:
            self._queue.stats.prefills += source == "miss"
            dropped = not self._queue.end(job)
        if not dropped:
            job.tell(Prefilled(references.key, references.nbytes, references.prefill_seconds, source))

    def _draw(self, batch: list[Job], requests: list[EditRequest], start: float) -> None:
        """Draw the edits of a batch together; those that are cancelled or late leave it after a step."""
        rows = Rows(batch)
        num_inference_steps = self.admission.num_steps(requests[0])
        needed = self.admission.needed(requests, size=batch[0].size)
        run = Run(rows=rows, num_steps=num_inference_steps, num_bytes=needed)

        def after_step(pipe: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
            stay = self._drop_stopped(rows)
            with_previews = self._previews and step + 1 < num_inference_steps
            previews = to_pil(tensors["preview"][stay]) if with_previews else []
            for job, own in rows.split(previews):
                job.tell(Progress(step + 1, num_inference_steps, own))
            run.steps_done = step + 1
            self._let_through(run)
            return {} if len(stay) == len(tensors["latents"]) else {"rows": stay}

        self._runs.append(run)
        try:
            out = self.pipe.draw(
                requests,
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=("latents", "preview") if self._previews else ("latents",),
                output_type="latent",
            )
        except Cancelled:  # all have left, and were failed then
            return
        finally:
            self._runs.pop()
        finish = functools.partial(self._finish, batch, run, out, start)
        if self._runs or not self._may_decode_beside():
            finish()
            return

        def finish_beside() -> None:
            try:
                finish()
            except Exception as error:
                with self._changed:
                    self._not_decoded.append((batch, error))
            with self._changed:
                self._changed.notify_all()

        self._decoder.start(finish_beside, num_bytes=needed)

    def _may_decode_beside(self) -> bool:
        """Whether pictures can be decoded beside the steps of a request that waits."""
        if not self._decode_beside or self._short_of_memory:
            return False
        if torch.get_num_threads() == 1 or not self._decoder.is_free:
            return False
        with self._changed:
            return bool(self._queue.waiting)

    def _finish(self, batch: list[Job], run: Run, latents: PipelineOutput, start: float) -> None:
        """Decode the pictures of a batch, and tell those of its jobs that are still in it."""
        out, rows = latents.decoded(), run.rows
        ran = self._clock() - start - run.paused
        out = replace(out, timings=run.without_pauses(out.timings))
        with self._changed:
            self._queue.stats.count_batch(len(out.images), prefilled=out.reference_cache == "miss")
            cancelled = [job for job in rows.jobs if job.cancelled]
            for job in rows.jobs:
                if job not in cancelled:  # can be cancelled no more
                    self._queue.end(job)
        for job in cancelled:
            self._fail(job, Cancelled(f"{job.id} was cancelled"))
        prompts = {job: reports[0] for job, reports in Rows(batch).split(out.prompts)}
        for job, numbers in rows.split(range(len(out.images))):
            if job not in cancelled:
                waited = start - job.arrived + run.paused
                found = _result(job, out, numbers, pipe=self.pipe, prompt=prompts[job], waited=waited, ran=ran)
                job.tell(Finished(found))

    def _let_through(self, run: Run) -> None:
        """Between two steps, draw a shorter request of an owner who waits for the one whose batch this is."""
        start = self._clock()
        if self.pipe.residency is not None or not run.may_pause(start):  # a second call would move weights about
            return
        jobs = [job for outer in self._runs for job in outer.rows.jobs]
        with self._changed:
            batch = self._queue.take_between(
                owners={job.owner for job in jobs},
                priority=max(job.priority for job in jobs),
                work=run.work_left,
                num_bytes=sum(outer.num_bytes for outer in self._runs) + self._decoder.num_bytes,
            )
        if not batch:
            return
        try:
            self._run(batch, start)
        except CapacityError as error:  # beside the others, that is: it waits, and this batch stops for no one any more
            _logger.warning("memory is too little beside a batch that runs: %s", error)
            run.never_pause()
            self._wait_again(batch)
        except Exception as error:  # of that request
            self._after_failure(batch, error)
        run.pause(start, self._clock())

    def _wait_again(self, batch: Sequence[Job]) -> None:
        """Let the jobs of a batch that did not run wait again, except those that were cancelled meanwhile."""
        with self._changed:
            cancelled = [job for job in batch if job.cancelled]
            for job in batch:
                if not job.ended and not job.cancelled:
                    self._queue.requeue(job)
        for job in cancelled:
            self._fail(job, Cancelled(f"{job.id} was cancelled"))

    def _drop_stopped(self, rows: Rows) -> list[int]:
        """Fail the jobs of a batch that were cancelled or are late. Return the rows of those that go on."""
        now = self._clock()
        with self._changed:
            cancelled = [job for job in rows.jobs if job.cancelled]
        late = [job for job in rows.jobs if job not in cancelled and job.is_late(now)]
        stay = rows.drop([*cancelled, *late])
        for job in cancelled:
            self._fail(job, Cancelled(f"{job.id} was cancelled"))
        for job in late:
            self._fail(job, too_late(job))
        if not stay:
            raise Cancelled("every request of the batch was stopped")
        return stay

    def _fail(self, job: Job, error: Exception) -> None:
        with self._changed:
            dropped = not self._queue.end(job, error)
        if not dropped:
            job.tell(Failed(error))


def _result(
    job: Job,
    out: PipelineOutput,
    numbers: Sequence[int],
    *,
    pipe: Pipeline,
    prompt: PromptReport,
    waited: float,
    ran: float,
) -> EditResult:
    """Return what a batch gave for one job, whose images have these numbers."""
    assert isinstance(job.request, EditRequest)
    assert out.reference_cache != "given"
    own = tuple(out.own[i] for i in numbers)
    known = KnownWords(pipe.text_encoder.known.words)  # where its card is, the caller says
    said = prompt_warnings([job.request.prompt], num_references=len(job.request.references), known=known)
    default = own_size(job.request, default_size=pipe.default_size)
    return EditResult(
        images=tuple(out.images[i] for i in numbers),
        seeds=job.request.seeds,
        reference_cache=out.reference_cache,
        reference_key=out.reference_key,
        seconds_saved=out.seconds_saved,
        references=tuple(r.report for r in job.request.references),
        prompt=prompt,
        timings=out.timings,
        waited=waited,
        ran=ran,
        batch=len(out.images),
        metadata={**out.metadata, **in_common(own)},
        warnings=(
            *canvas_warnings(canvases_of(job.request)),
            *said,
            *size_warning(job.size, pipe.sizes, default=default),
        ),
        own=own,
    )
