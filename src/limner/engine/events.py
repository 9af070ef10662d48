"""What a request's listener hears, from `Started` to the one last event.

Owns these values. Events of replicas are pickled, so all of them hold plain values. Knows no queue, engine or wire format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from limner.images import ReferenceReport
from limner.pipeline import PromptReport, Timings
from limner.pipeline.repaint import ImageReport, OfImages
from limner.store import Source

__all__ = ["EditResult", "Event", "Failed", "Finished", "LastEvent", "Listener", "Prefilled", "Progress", "Started"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class EditResult(OfImages):
    """The images of a request in the order of its seeds, and how they were made.

    `waited` and `ran` are seconds in the queue and on the device; `batch` images were drawn together. `seconds_saved` is
    the time of the prefill that was not repeated, 0 if it was computed now. `metadata` is what
    all images have in common, `own` what each has for itself.
    """

    images: tuple[Image.Image, ...]
    seeds: tuple[int, ...]
    reference_cache: Literal["none"] | Source
    reference_key: str | None
    seconds_saved: float
    references: tuple[ReferenceReport, ...]
    prompt: PromptReport
    timings: Timings
    waited: float
    ran: float
    batch: int
    metadata: dict[str, Any]
    warnings: tuple[str, ...] = ()
    own: tuple[ImageReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The request is on the device. It may come more than once: see `Engine.submit`."""


@dataclass(frozen=True, eq=False, slots=True)
class Progress:
    """`step` of `num_inference_steps` is done. `previews`: a small picture of each image, if the model has previews."""

    step: int
    num_inference_steps: int
    previews: tuple[Image.Image, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Finished:
    """The images of an `EditRequest`."""

    result: EditResult


@dataclass(frozen=True, eq=False, slots=True)
class Prefilled:
    """The K/V of a `PrefillRequest` are cached under `key`: `nbytes` bytes, whose prefill took `prefill_seconds`."""

    key: str
    nbytes: int
    prefill_seconds: float
    source: Source


@dataclass(frozen=True, eq=False, slots=True)
class Failed:
    """The request has no result. `Cancelled` and `DeadlineExceeded` are among the errors."""

    error: Exception


LastEvent = Finished | Prefilled | Failed
Event = Started | Progress | LastEvent
Listener = Callable[[Event], None]
