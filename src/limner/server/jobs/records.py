"""What a job, uploaded references and a webhook are: plain records.

Knows nothing of tables, engines and HTTP.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, cast

from limner.errors import InvalidRequest
from limner.images import PreparedReference, ReferenceReport, mask_of_picture
from limner.requests import Control, EditRequest, repaints

__all__ = [
    "Handle",
    "Job",
    "JobOptions",
    "JobPictures",
    "JobRequest",
    "Status",
    "Webhook",
    "check_idempotency_key",
    "edit_request",
]

Status = Literal["pending", "ready", "error", "request_moderated", "content_moderated", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """The URL that the end of a job is reported to, and the secret that signs the report."""

    url: str
    secret: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """What a caller asks for, in the same words for all dialects, before it is a job.

    References are `pictures`, or the `handle` of an upload. `seed` None: the server draws one. `base_url` is the address
    that the caller used, for the URLs in a webhook. Steps None are the model's own. `aspect` is width over height where
    no size is given, or one side. `control` has values of `CONTROL_VALUES`.
    `mask` (white is repainted) is of the size of the picture that is repainted: `canvas`, at its own size, which is no
    reference; without it the first one, which is in `pictures` at its own size then. `without_effect` names fields that
    were not followed.
    """

    prompt: str
    seed: int | None = None
    num_images: int = 1
    pictures: tuple[PreparedReference, ...] = ()
    handle: str | None = None
    control: Mapping[str, Any] = field(default_factory=dict)
    canvas: PreparedReference | None = None
    mask: PreparedReference | None = None
    width: int | None = None
    height: int | None = None
    aspect: Fraction | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    priority: int = 0
    timeout: float | None = None
    tolerance: int = 2
    output_format: str = "png"
    quality: int = 95
    webhook: Webhook | None = None
    base_url: str | None = None
    idempotency: str | None = None
    without_effect: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOptions:
    """What a job carries along that does not change the picture.

    `base_url` is the address that the caller used. `references_checked`: the pictures of `handle` passed the safety
    checks, at the tolerance of this job, when they were uploaded. `without_effect` names fields of the request that were
    not followed.
    """

    base_url: str | None = None
    handle: str | None = None
    references_checked: bool = False
    without_effect: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job. `references` report, in order, which pictures it uses and how this caller's were processed.

    `canvas` is what is repainted and no reference, `mask` says where, `control` has what else is asked for
    (`CONTROL_VALUES`).
    Where something is repainted without a `canvas`, it is the first reference, at its own size, and `width` and `height`
    are those of the result.
    `drawn_seeds`: the server drew the seeds. `result` depends on the status: `files` and a report of the drawing,
    `finding`, or `error` and `type`. Times are seconds since the epoch. `set_aside`: this version cannot read what another
    version wrote of the job, and leaves it as it is.
    """

    owner: str
    prompt: str
    seeds: tuple[int, ...]
    drawn_seeds: bool = False
    references: tuple[ReferenceReport, ...] = ()
    control: Mapping[str, Any] = field(default_factory=dict)
    canvas: ReferenceReport | None = None
    mask: ReferenceReport | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int = 4
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    priority: int = 0
    timeout: float | None = None
    tolerance: int = 2
    output_format: str = "png"
    quality: int = 95
    options: JobOptions = field(default_factory=JobOptions)
    webhook: Webhook | None = None
    idempotency: str | None = None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    created: float = 0.0
    status: Status = "pending"
    ended: float | None = None
    expires: float | None = None
    result: dict[str, Any] = field(default_factory=dict)
    webhook_attempts: int = 0
    webhook_first: float | None = None
    set_aside: bool = False

    @property
    def repaints(self) -> bool:
        """Whether a picture is repainted, and the result has its size."""
        return repaints(self.control, mask=self.mask)

    @property
    def pictures(self) -> tuple[ReferenceReport, ...]:
        """All pictures that the job needs: references, then canvas and mask."""
        return (*self.references, *(one for one in (self.canvas, self.mask) if one is not None))


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class JobPictures:
    """The pictures of a job."""

    references: tuple[PreparedReference, ...] = ()
    canvas: PreparedReference | None = None
    mask: PreparedReference | None = None

    @property
    def all(self) -> tuple[PreparedReference, ...]:
        """All of them, in the order of `Job.pictures`."""
        return (*self.references, *(one for one in (self.canvas, self.mask) if one is not None))


@dataclass(frozen=True, kw_only=True, slots=True)
class Handle:
    """References that were uploaded once: their content key, and how their pictures were processed, in order.

    `tolerance` is that of the safety checks at the upload. `nbytes` and `prefill_seconds` are None if the upload did not
    compute K/V.
    """

    owner: str
    key: str
    references: tuple[ReferenceReport, ...]
    num_tokens: int
    tolerance: int | None = None
    nbytes: int | None = None
    prefill_seconds: float | None = None
    created: float = 0.0


def edit_request(job: Job, pictures: JobPictures) -> EditRequest:
    """Return the request to the engine: the one way from a job of any dialect to the model."""
    control: dict[str, Any] = dict(job.control)
    if pictures.mask is not None:
        control["mask_image"] = mask_of_picture(pictures.mask)
    if pictures.canvas is not None:
        control["canvas"] = pictures.canvas
    is_first = job.repaints and pictures.canvas is None
    return EditRequest(
        prompt=job.prompt,
        seeds=job.seeds,
        references=pictures.references,
        width=None if job.repaints else job.width,  # the engine's is the size that is drawn, not that of the result
        height=None if job.repaints else job.height,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        negative_prompt=job.negative_prompt,
        control=cast("Control", control),
        canvas=next(iter(pictures.references), None) if is_first else None,
    )


def check_idempotency_key(key: str | None) -> str | None:
    """Return a key of 1 to 255 printable ASCII characters, or None. Raises `InvalidRequest`."""
    if key is not None and not (1 <= len(key) <= 255 and key.isascii() and key.isprintable()):
        raise InvalidRequest("idempotency_key", f"has {len(key)} characters; 1 to 255 printable ASCII ones are allowed")
    return key
