"""What a job, uploaded references and a webhook are: plain records.

Knows nothing of tables, engines and HTTP.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from limner.errors import InvalidRequest
from limner.images import PreparedReference, ReferenceReport
from limner.requests import EditRequest

__all__ = ["Handle", "Job", "JobOptions", "JobRequest", "Status", "Webhook", "check_idempotency_key", "edit_request"]

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
    that the caller used, for the URLs in a webhook. Steps None are
    the model's own. `aspect` is width over height where no size is given, or one side. With
    a `mask` the pixels of the first picture stay where it is black. `without_effect` names fields that were not followed.
    """

    prompt: str
    seed: int | None = None
    num_images: int = 1
    pictures: tuple[PreparedReference, ...] = ()
    handle: str | None = None
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

    `mask`: where it is black, the pixels of the first reference are put back.
    `drawn_seeds`: the server drew the seeds. `result` depends on the status: `files` and a report of the drawing,
    `finding`, or `error` and `type`. Times are seconds since the epoch. `set_aside`: this version cannot read what another
    version wrote of the job, and leaves it as it is.
    """

    owner: str
    prompt: str
    seeds: tuple[int, ...]
    drawn_seeds: bool = False
    references: tuple[ReferenceReport, ...] = ()
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


def edit_request(job: Job, references: tuple[PreparedReference, ...]) -> EditRequest:
    """Return the request to the engine: the one way from a job of any dialect to the model."""
    return EditRequest(
        prompt=job.prompt,
        seeds=job.seeds,
        references=references,
        width=job.width,
        height=job.height,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        negative_prompt=job.negative_prompt,
    )


def check_idempotency_key(key: str | None) -> str | None:
    """Return a key of 1 to 255 printable ASCII characters, or None. Raises `InvalidRequest`."""
    if key is not None and not (1 <= len(key) <= 255 and key.isascii() and key.isprintable()):
        raise InvalidRequest("idempotency_key", f"has {len(key)} characters; 1 to 255 printable ASCII ones are allowed")
    return key
