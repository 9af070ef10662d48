"""Which requests an engine accepts: they are valid, they fit in memory, and the queue has room.

Owns these checks and the texts of their errors, for an engine in this process and for one over replicas. Pure: knows no
thread, no queue and no pipeline, and measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from limner.engine.protocol import ModelView
from limner.errors import InvalidRequest, QueueFull
from limner.grid import check_size, num_tokens
from limner.images import PreparedReference
from limner.pipeline import check_fits
from limner.requests import MAX_STEPS, EditRequest, PrefillRequest, check_guidance, check_length, check_prompt

__all__ = ["Admission"]

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

    def check(self, request: EditRequest | PrefillRequest) -> tuple[int, int]:
        """Return the output size (width, height) in pixels of a request that can run; for a prefill, the default size.

        Raises `InvalidRequest` and `CapacityError`.
        """
        if isinstance(request, PrefillRequest):
            if not request.references:
                raise InvalidRequest("references", "there are none; give at least one picture")
            size, batch = self.model.default_size, 1
        else:
            size, batch = self._check_edit(request), len(request.seeds)
        tokens = self._num_tokens(request.references, size=size, batch=batch)
        check_fits(self.model.memory_needed(**tokens), self.memory_bytes, **tokens)
        return size

    def _check_edit(self, request: EditRequest) -> tuple[int, int]:
        check_prompt(request.prompt)
        if not request.seeds:
            raise InvalidRequest("seeds", "there are none; give one for each image")
        if len(request.seeds) > self.max_batch:
            raise InvalidRequest("num_images", f"{len(request.seeds)} images are over the {self.max_batch} of a batch")
        steps = request.num_inference_steps
        if steps is not None and not 1 <= steps <= MAX_STEPS:
            raise InvalidRequest("num_inference_steps", f"{steps} is not within 1 to {MAX_STEPS}")
        check_guidance(request.guidance_scale)
        if repaints := [name for name in request.control if not name.startswith("reference_")]:
            raise InvalidRequest(repaints[0], "is not offered by engines yet; call the pipeline itself")
        if request.negative_prompt is not None:
            check_length("negative_prompt", request.negative_prompt)
        sizes = [r.report.processed_size for r in request.references] or [self.model.default_size]
        width = check_size("width", sizes[0][0] if request.width is None else request.width)
        height = check_size("height", sizes[0][1] if request.height is None else request.height)
        return width, height

    def fits(self, references: Sequence[PreparedReference], *, size: tuple[int, int], batch: int) -> bool:
        """Whether `batch` images of a size over these references fit in memory."""
        return self.needed(references, size=size, batch=batch) <= self.memory_bytes

    def needed(self, references: Sequence[PreparedReference], *, size: tuple[int, int], batch: int) -> int:
        """Bytes that `batch` images of a size over these references may take."""
        return self.model.memory_needed(**self._num_tokens(references, size=size, batch=batch))

    def _num_tokens(
        self, references: Sequence[PreparedReference], *, size: tuple[int, int], batch: int
    ) -> dict[str, int]:
        """The arguments of `memory_needed`."""
        return {
            "num_ref": num_tokens(*(r.report.processed_size for r in references)),
            "num_own": num_tokens(size) + min(_MAX_TEXT_TOKENS, self.model.text_length),
            "batch": batch,
        }

    def check_waiting(self, num_waiting: int) -> None:
        """Raise `QueueFull` where no further request may wait."""
        if num_waiting >= self.max_waiting:
            raise QueueFull(f"{num_waiting} requests wait, which is all that may; try again later")
