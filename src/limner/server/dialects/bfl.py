"""The hosted dialect of the model family: submit a job, poll for its result.

Owns these wire schemas. Source: the public OpenAPI document of the hosted service and its documentation, and what clients
send that were made for all of its models. `mask` is that of its fill endpoint; `top`, `bottom`, `left` and `right` are
those of its expand endpoint. `references`, `background`, `canvas`, `without_effect` and the fields of `ControlFields`, and
in /v1/edit `num_images`, `num_inference_steps`, `priority` and `timeout`, are Limner's own additions.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from limner.config import Fit
from limner.errors import InvalidRequest
from limner.requests import MAX_PROMPT_CHARACTERS, with_mask
from limner.server.access.keys import Owner
from limner.server.dialects.control_fields import ControlFields, control_of, read_controls
from limner.server.dialects.job_view import STATUSES, as_result
from limner.server.dialects.model_names import ENDPOINTS
from limner.server.dialects.unused import (
    ABOUT,
    Guidance,
    NegativePrompt,
    Unused,
    UnusedField,
    UnusedFlag,
    without_effect,
)
from limner.server.http.aspect import is_of_aspect, read_aspect
from limner.server.http.errors import ERRORS, renamed
from limner.server.http.pictures import SentPicture
from limner.server.http.service import KEYS, Service
from limner.server.http.wire import StrictRoute
from limner.server.jobs.records import Job, JobRequest, Webhook
from limner.server.jobs.webhooks import check_webhook_secret, check_webhook_url
from limner.trust.safety import MAX_TOLERANCE

__all__ = ["routes"]

NUM_IMAGES = 10
_FIELDS = ("input_image", *(f"input_image_{i}" for i in range(2, NUM_IMAGES + 1)))
_SIDES = ("left", "top", "right", "bottom")
Picture = Annotated[str | None, Field(description="base64, a data URL, or a URL where the server fetches them")]


Margin = Annotated[int | None, Field(ge=0, le=16384, strict=True, description="new pixels at this side; see expand")]


class Inputs(ControlFields):
    """Body of the hosted endpoints."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)
    input_image: Picture = None
    input_image_2: Picture = None
    input_image_3: Picture = None
    input_image_4: Picture = None
    input_image_5: Picture = None
    input_image_6: Picture = None
    input_image_7: Picture = None
    input_image_8: Picture = None
    input_image_9: Picture = None
    input_image_10: Picture = None
    references: str | None = Field(None, description="handle from POST /v1/references, instead of input_image ...")
    mask: Picture = Field(
        None, description="of the canvas' size: white is repainted, black stays, to the pixel beyond mask_blur"
    )
    canvas: Picture = Field(
        None, description="the picture to repaint, at its own size, which is no reference; without it the first picture"
    )
    left: Margin = None
    top: Margin = None
    right: Margin = None
    bottom: Margin = None
    background: str | None = Field(
        None, max_length=100, description="colour behind transparent pictures, as white or #fff"
    )
    seed: int | None = Field(None, ge=0, le=2**63 - 1, strict=True)
    width: int | None = Field(None, ge=0, le=16384, strict=True, description="multiple of 16; 0: as image 1 is used")
    height: int | None = Field(None, ge=0, le=16384, strict=True, description="multiple of 16; 0: as image 1 is used")
    aspect_ratio: str | None = Field(None, max_length=20, description="as 16:9; a width or height that is given stands")
    steps: int | None = Field(None, ge=1, le=50, strict=True)
    guidance: Guidance = None
    safety_tolerance: int = Field(2, ge=0, le=6, strict=True, description="6 of older models is 5 here")
    output_format: Literal["jpeg", "png", "webp"] | None = "jpeg"
    webhook_url: str | None = Field(None, min_length=1, max_length=2083)
    webhook_secret: str | None = Field(None, max_length=1024)

    # fields of other models of the hosted service
    prompt_upsampling: UnusedFlag = None
    disable_pup: Annotated[Any, ABOUT, Unused("true")] = None
    transparent_bg: UnusedFlag = None
    interval: UnusedField = None
    raw: UnusedFlag = None
    image_prompt: UnusedField = None
    image_prompt_strength: UnusedField = None
    finetune_id: UnusedField = None
    finetune_strength: UnusedField = None
    input_image_blob_path: UnusedField = None
    sync: UnusedFlag = None


class EditInputs(Inputs):
    """Body of /v1/edit."""

    num_images: int = Field(1, ge=1, le=16, strict=True, description="seeds are seed, seed + 1, ...")
    num_inference_steps: int | None = Field(None, ge=1, le=50, strict=True, description="null: the model's own")
    negative_prompt: NegativePrompt = None
    fit: Fit | None = Field(
        None, description="how sides of references become multiples of 16; null: as the service does"
    )
    priority: int = Field(0, ge=-10, le=0, strict=True, description="lower ones wait for others")
    timeout: float | None = Field(None, gt=0, le=86400, description="seconds after which the job ends as Error")


class Submitted(BaseModel):
    """`without_effect` names fields of the request that are not followed."""

    id: str
    polling_url: str
    input_mp: float | None = None
    output_mp: float | None = None
    without_effect: list[str] | None = None


class SubmittedWebhook(Submitted):
    """The answer to a job with a webhook, which may be polled as well."""

    status: str
    webhook_url: str


class Result(BaseModel):
    id: str
    status: Literal["Task not found", "Pending", "Request Moderated", "Content Moderated", "Ready", "Error"]
    result: dict[str, Any] | None = None
    progress: float | None = None
    details: dict[str, Any] | None = None
    preview: dict[str, Any] | None = None


def routes(service: Service) -> APIRouter:
    """Return the routes of this dialect."""
    router = APIRouter(tags=["hosted dialect"], route_class=StrictRoute, dependencies=KEYS)
    key = Header(None, alias="Idempotency-Key", max_length=255)

    def add(name: str) -> None:
        @router.post(
            f"/v1/{name}",
            operation_id=name.replace("-", "_"),
            response_model=Submitted | SubmittedWebhook,
            response_model_exclude_none=True,
            responses=ERRORS,
            summary="Draw or edit (the model that is loaded)",
        )
        async def hosted(
            request: Request, inputs: Inputs, owner: Owner = Depends(service.paying), idempotency: str | None = key
        ) -> dict[str, Any]:
            return await _submit(service, request, inputs, owner, idempotency)

    for name in ENDPOINTS:
        add(name)

    @router.post(
        "/v1/edit",
        response_model=Submitted | SubmittedWebhook,
        response_model_exclude_none=True,
        responses=ERRORS,
        summary="Draw or edit, with everything that the engine offers",
    )
    async def edit(
        request: Request, inputs: EditInputs, owner: Owner = Depends(service.paying), idempotency: str | None = key
    ) -> dict[str, Any]:
        return await _submit(service, request, inputs, owner, idempotency)

    @router.get(
        "/v1/get_result",
        response_model=Result,
        responses={**ERRORS, 404: {"model": Result, "description": "No such task"}},
        summary="How far a job is, or its result",
    )
    async def get_result(
        request: Request, response: Response, owner: Owner = Depends(service.owner), id: str = Query(max_length=200)
    ) -> dict[str, Any]:
        job = await service.offload.store(service.jobs.get, id, owner=owner.id)
        if job is None:
            response.status_code = 404
            return {"id": id, "status": "Task not found"}
        update = service.runner.update(id) if job.status == "pending" else None
        return as_result(job, service.urls.of(job, service.base_url(request)), update)

    return router


async def _submit(
    service: Service, request: Request, inputs: Inputs, owner: Owner, idempotency: str | None
) -> dict[str, Any]:
    webhook = _webhook(service, inputs)
    aspect, unused = _read_shape(inputs)
    fit = getattr(inputs, "fit", None)
    if fit is not None and inputs.references is not None:
        raise InvalidRequest("fit", "references with a handle were fitted when they were uploaded; leave it out")
    if inputs.references is not None and inputs.background is not None:
        unused = (*unused, "background")  # it stood behind them when they were uploaded
    sent = [SentPicture(field=name, data=text) for name in _FIELDS if (text := getattr(inputs, name)) is not None]
    job_request = JobRequest(
        prompt=inputs.prompt,
        seed=inputs.seed,
        handle=inputs.references,
        idempotency=idempotency,
        width=inputs.width or None,
        height=inputs.height or None,
        aspect=aspect,
        num_inference_steps=inputs.steps,
        guidance_scale=inputs.guidance,
        tolerance=min(inputs.safety_tolerance, MAX_TOLERANCE),
        output_format=inputs.output_format or "jpeg",
        webhook=webhook,
        base_url=service.base_url(request) if webhook else None,
        without_effect=(*unused, *without_effect(inputs, kind=service.engine.model.kind)),
    )
    if isinstance(inputs, EditInputs):
        job_request = replace(
            job_request,
            num_images=inputs.num_images,
            num_inference_steps=_steps(inputs),
            negative_prompt=inputs.negative_prompt,
            priority=inputs.priority,
            timeout=inputs.timeout,
        )
    job_request = await read_controls(
        service,
        owner,
        job_request,
        pictures=sent,
        control=_control(inputs),
        canvas=_sent("canvas", inputs.canvas),
        mask=_sent("mask", inputs.mask),
        drawn="white",
        background=inputs.background,
        fit=fit,
    )
    try:
        job, _ = await service.accept(owner, job_request)
    except InvalidRequest as error:
        raise renamed(with_mask(error), _names(inputs)) from None
    answer = _submitted(job, service.base_url(request))
    if webhook is not None:
        answer |= {"status": STATUSES[job.status], "webhook_url": webhook.url}
    return answer


def _read_shape(inputs: Inputs) -> tuple[Fraction | None, tuple[str, ...]]:
    """Return the aspect that was asked for, and which fields ask for what is not done though they have an effect."""
    unused = ("safety_tolerance",) if inputs.safety_tolerance > MAX_TOLERANCE else ()
    if inputs.aspect_ratio is None:
        return None, unused
    aspect = read_aspect(inputs.aspect_ratio)
    if inputs.width and inputs.height and not is_of_aspect((inputs.width, inputs.height), aspect):
        unused = ("aspect_ratio", *unused)
    return aspect, unused


def _steps(inputs: EditInputs) -> int | None:
    if inputs.steps is None:
        return inputs.num_inference_steps
    if inputs.num_inference_steps not in (None, inputs.steps):
        raise InvalidRequest("steps", f"is {inputs.steps}, num_inference_steps {inputs.num_inference_steps}; give one")
    return inputs.steps


def _control(inputs: Inputs) -> dict[str, Any]:
    """Return what is asked for beyond prompt and references. Raises `InvalidRequest`."""
    found = control_of(inputs)
    sides = [getattr(inputs, name) for name in _SIDES]
    if any(side is not None for side in sides):
        if "expand" in found:
            raise InvalidRequest("expand", "left, top, right or bottom is given as well; give one of them")
        found["expand"] = [side or 0 for side in sides]
    return found


def _sent(field: str, text: str | None) -> SentPicture | None:
    return None if text is None else SentPicture(field=field, data=text)


def _names(inputs: Inputs) -> dict[str, str]:
    """Return the names of this dialect for those of the service, as the request used them."""
    names = {"num_inference_steps": "steps"} if inputs.steps else {}
    side = next((name for name in _SIDES if getattr(inputs, name) is not None), None)
    return names if side is None else {**names, "expand": side}


def _webhook(service: Service, inputs: Inputs) -> Webhook | None:
    secret = inputs.webhook_secret or None
    if inputs.webhook_url is None:
        if secret is not None:
            raise InvalidRequest("webhook_secret", "needs webhook_url")
        return None
    if secret is not None:
        check_webhook_secret(secret)
    if service.outbound is None or not service.settings.webhooks:
        raise InvalidRequest("webhook_url", "webhooks are switched off on this server; poll instead")
    check_webhook_url(inputs.webhook_url, policy=service.outbound.policy)
    return Webhook(url=inputs.webhook_url, secret=secret)


def _submitted(job: Job, base_url: str) -> dict[str, Any]:
    sizes = [report.processed_size for report in job.references]
    names = job.options.without_effect
    return {
        **({"without_effect": list(names)} if names else {}),
        "id": job.id,
        "polling_url": f"{base_url}/v1/get_result?id={job.id}",
        "input_mp": _megapixels(*sizes),
        "output_mp": _megapixels((job.width or 0, job.height or 0)) * len(job.seeds),
    }


def _megapixels(*sizes: tuple[int, int]) -> float:
    return round(sum(w * h for w, h in sizes) / 1e6, 4)
