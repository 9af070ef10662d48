"""Which requests an engine accepts: they are valid, they fit in memory, and the queue has room.

Owns these checks and the texts of their errors, for an engine in this process and for one over replicas. Pure: knows no
thread, no queue and no pipeline, and measures nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from limner.engine.protocol import ModelView
from limner.errors import InvalidRequest, QueueFull
from limner.grid import check_size
from limner.images import PreparedReference
from limner.kinds import guides
from limner.memory import Workload
from limner.pipeline.adapters import check_loras
from limner.pipeline.admission import check_workload
from limner.pipeline.canvas import canvas_bytes
from limner.pipeline.control import check_reference_guidance, check_reuse, check_weights
from limner.pipeline.repaint import call_workload, check_canvas_size
from limner.pipeline.together import canvases_of, images_of, opened, shared_of
from limner.requests import MAX_STEPS, EditRequest, PrefillRequest, check_guidance, check_length, check_prompt

__all__ = ["Admission"]

_HELD_SHARE = 4
"""Canvases of requests that wait may have this part of the memory of calls."""
_MAX_TEXT_TOKENS = 512
"""Text tokens of a call that leaves `max_sequence_length` out, where the tokenizer declares no less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """The bounds of an engine over a model.

    `max_waiting` requests may wait, `max_batch` images run at once, `memory_bytes` is what calls may take in addition to
    the weights.
    """

    model: ModelView
    max_waiting: int
    max_batch: int
    memory_bytes: int

    def __post_init__(self) -> None:
        for name in ("max_waiting", "max_batch"):
            if (value := getattr(self, name)) < 1:
                raise InvalidRequest(name, f"{value} is not at least 1")

    def opened(self, request: EditRequest) -> EditRequest:
        """As `Pipeline.opened`: canvas and masks are read here, once, and never in the thread that draws."""
        return opened(request, policy=self.model.reference_policy, sizes=self.model.sizes)

    def check(self, request: EditRequest | PrefillRequest) -> tuple[int, int]:
        """Return the size (width, height) in pixels in which a request that can run is drawn; for a prefill, the default.

        The result has that size, or that of its canvas. Raises `InvalidRequest` and `CapacityError`.
        """
        if isinstance(request, PrefillRequest):
            if not request.references:
                raise InvalidRequest("references", "there are none; give at least one picture")
            size = self.model.default_size
            workload = self._workload(size=size, references=request.references, batch=1)
        else:
            request = self.opened(request)
            size = self._check_edit(request)
            workload = self._edits([request], size=size)
        check_workload(self.model.memory_for(workload), self.memory_bytes, workload)
        return size

    def _check_edit(self, request: EditRequest) -> tuple[int, int]:
        """Check an opened request."""
        check_prompt(request.prompt)
        if not request.seeds:
            raise InvalidRequest("seeds", "there are none; give one for each image")
        if len(request.seeds) > self.max_batch:
            raise InvalidRequest("num_images", f"{len(request.seeds)} images are over the {self.max_batch} of a batch")
        steps = request.num_inference_steps
        if steps is not None and not 1 <= steps <= MAX_STEPS:
            raise InvalidRequest("num_inference_steps", f"{steps} is not within 1 to {MAX_STEPS}")
        check_guidance(request.guidance_scale)
        check_reuse(request.reuse, kind=self.model.kind)
        if request.negative_prompt is not None:
            check_length("negative_prompt", request.negative_prompt)
        shared, control, num_references = self._shared(request), request.control, len(request.references)
        steps = self.num_steps(request)
        check_weights(control.get("reference_weights"), num_references=num_references, num_steps=steps)
        check_reference_guidance(control.get("reference_guidance", 1.0), num_references)
        check_loras(control.get("loras"), loaded=self.model.loras)
        check_canvas_size(canvases_of(request), width=request.width, height=request.height)
        return check_size("width", shared["width"]), check_size("height", shared["height"])

    def batch_key(self, request: EditRequest, *, size: tuple[int, int]) -> Hashable:
        """Return what is equal for opened requests that may run as one batch."""
        return size, tuple(self._shared(request).items())

    def num_steps(self, request: EditRequest) -> int:
        """Return the number of steps that an opened request draws."""
        shared = self._shared(request)
        return int(shared["num_inference_steps"] - shared["strength"])

    def work(self, request: EditRequest | PrefillRequest, *, size: tuple[int, int]) -> int:
        """Return how many pixels an opened request drawn in a size reads and draws, those of each forward counted."""
        sizes = [reference.report.processed_size for reference in request.references]
        read = sum(width * height for width, height in sizes)
        if isinstance(request, PrefillRequest):
            return read
        return read + self.num_steps(request) * self.step_work(request, size=size)

    def step_work(self, request: EditRequest | PrefillRequest, *, size: tuple[int, int]) -> int:
        """Return how many pixels a step of an opened request drawn in a size draws; a prefill has no steps.

        Guidance and reference guidance each add a forward to every step (`limner.pipeline.velocity`).
        """
        if isinstance(request, PrefillRequest):
            return 0
        with_references = request.control.get("reference_guidance", 1.0) != 1
        num_forwards = 1 + guides(self.model.kind, request.guidance_scale) + with_references
        return size[0] * size[1] * len(request.seeds) * num_forwards

    def _shared(self, request: EditRequest) -> dict[str, Any]:
        return shared_of(request, kind=self.model.kind, default_size=self.model.default_size)

    def fits(self, requests: Sequence[EditRequest], *, size: tuple[int, int]) -> bool:
        """Whether opened requests of one batch, drawn in a size, fit in memory."""
        return self.needed(requests, size=size) <= self.memory_bytes

    def needed(self, requests: Sequence[EditRequest | PrefillRequest], *, size: tuple[int, int]) -> int:
        """Return the bytes that opened requests of one batch, drawn in a size, may take."""
        edits = [request for request in requests if isinstance(request, EditRequest)]
        if edits:
            return self.model.memory_for(self._edits(edits, size=size))
        return self.model.memory_for(self._workload(size=size, references=requests[0].references, batch=1))

    def _edits(self, requests: Sequence[EditRequest], *, size: tuple[int, int]) -> Workload:
        """Return the workload of requests that are drawn together."""
        first = requests[0]
        canvases = [canvas for request in requests for canvas in images_of(request)]
        return call_workload(
            self._workload(size=size, references=first.references, batch=len(canvases)),
            canvases=canvases,
            guides=guides(self.model.kind, first.guidance_scale),
            reference_guidance=first.control.get("reference_guidance", 1.0),
            reuse=first.reuse,
        )

    def _workload(self, *, size: tuple[int, int], references: Sequence[PreparedReference], batch: int) -> Workload:
        return Workload(
            size=size,
            references=tuple(r.report.processed_size for r in references),
            batch=batch,
            num_text=min(_MAX_TEXT_TOKENS, self.model.text_length),
            joint=self.model.kind.joint,
        )

    def held_bytes(self, request: EditRequest | PrefillRequest) -> int:
        """Return the bytes of the canvases of an opened request, which are in memory while it waits."""
        if isinstance(request, PrefillRequest):
            return 0
        return canvas_bytes(canvases_of(request))

    def check_waiting(self, num_waiting: int, *, held_bytes: int = 0) -> None:
        """Raise `QueueFull` where no further request may wait: by their number, and by the bytes of their canvases."""
        if num_waiting >= self.max_waiting:
            raise QueueFull(f"{num_waiting} requests wait, which is all that may; try again later")
        if held_bytes > self.memory_bytes // _HELD_SHARE:
            raise QueueFull(
                f"the canvases of {num_waiting} requests that wait have {held_bytes >> 20} MiB, over "
                f"{(self.memory_bytes // _HELD_SHARE) >> 20}; try again later"
            )
