"""The OpenAI Images dialect: pictures in the answer to the request, or as a stream of events.

Owns what a request of this dialect asks of the service. `seed`, `num_inference_steps`, `references` (a handle), `canvas`,
the fields of `ControlFields` and a colour as `background` are additions; `limner` in an answer reports on cached
references, on what was repainted, and on fields without effect.
"""

from __future__ import annotations

import re

from fastapi import APIRouter, Depends, Header, Request
from starlette.responses import Response

from limner.errors import InvalidRequest, NotFound
from limner.requests import with_mask
from limner.server.access.keys import Owner
from limner.server.dialects.control_fields import control_of, read_controls
from limner.server.dialects.model_names import answers_to, model_names
from limner.server.dialects.openai_answers import Answer
from limner.server.dialects.openai_bodies import EditInputs, read_edit
from limner.server.dialects.openai_schemas import EDIT_BODY, Generation, Images, ModelEntry, Models
from limner.server.dialects.unused import without_effect
from limner.server.http.errors import OPENAI_ERRORS, renamed
from limner.server.http.service import KEYS, Service
from limner.server.http.wire import SafeJSON, StrictRoute
from limner.server.jobs.records import JobRequest

__all__ = ["routes"]

_SIZE = re.compile(r"([1-9][0-9]{1,4})x([1-9][0-9]{1,4})")
_BACKGROUNDS = ("auto", "opaque")
"""Values of `background` that are no colour."""


def routes(service: Service) -> APIRouter:
    """Return the routes of this dialect."""
    router = APIRouter(tags=["OpenAI Images dialect"], route_class=StrictRoute, dependencies=KEYS)
    key = Header(None, alias="Idempotency-Key", max_length=255)

    @router.post("/v1/images/generations", response_model=Images, responses=OPENAI_ERRORS, summary="Pictures from text")
    async def generate_images(
        request: Request, fields: Generation, owner: Owner = Depends(service.paying), idempotency: str | None = key
    ) -> Response:
        if fields.input_fidelity is not None:
            raise InvalidRequest("input_fidelity", "is for edits; leave it out")
        return await _answer(service, request, owner, EditInputs(fields=fields), idempotency)

    @router.post(
        "/v1/images/edits",
        response_model=Images,
        responses=OPENAI_ERRORS,
        openapi_extra=EDIT_BODY,
        summary="Pictures from text and references",
    )
    async def edit_images(
        request: Request, owner: Owner = Depends(service.paying), idempotency: str | None = key
    ) -> Response:
        inputs = await read_edit(request, max_picture_bytes=service.settings.max_picture_bytes, offload=service.offload)
        return await _answer(service, request, owner, inputs, idempotency, is_edit=True)

    @router.get("/v1/models", response_model=Models, responses=OPENAI_ERRORS, summary="What can be named as model")
    async def list_models(owner: Owner = Depends(service.owner)) -> Models:
        return Models(data=[ModelEntry(id=name) for name in model_names(service.settings)])

    @router.get("/v1/models/{name:path}", response_model=ModelEntry, responses=OPENAI_ERRORS, summary="One model")
    async def get_model(name: str, owner: Owner = Depends(service.owner)) -> ModelEntry:
        _check_model(service, name)
        return ModelEntry(id=name)

    return router


async def _answer(
    service: Service,
    request: Request,
    owner: Owner,
    inputs: EditInputs,
    idempotency: str | None,
    *,
    is_edit: bool = False,
) -> Response:
    fields = inputs.fields
    job_request = await _job_request(service, owner, inputs, idempotency)
    if fields.stream:  # before there is a job
        service.streams.check(owner)
    try:
        job, _ = await service.accept(owner, job_request)
    except InvalidRequest as error:
        raise _named(error, fields) from None
    answer = Answer(
        service=service,
        request=request,
        fields=fields,
        kind="image_edit" if is_edit else "image_generation",
        job=job,
        cancel=idempotency is None,
    )
    if fields.stream:
        return service.event_stream(owner, answer.events())
    return SafeJSON(await answer.body())


def _named(error: InvalidRequest, fields: Generation) -> InvalidRequest:
    """Return an error of the service in the names of this dialect."""
    error = with_mask(error)
    if error.field in ("width", "height") and getattr(fields, error.field) is None:
        side = "" if "x" in error.problem.partition(" ")[0] else f"{error.field} "
        return InvalidRequest("size", side + error.problem)
    return renamed(error, {"num_images": "n"})


async def _job_request(service: Service, owner: Owner, inputs: EditInputs, idempotency: str | None) -> JobRequest:
    fields = inputs.fields
    if fields.model is not None:
        _check_model(service, fields.model)
    if fields.background == "transparent":
        raise InvalidRequest("background", "transparent pictures are not made; use opaque or auto")
    if fields.output_compression not in (None, 100) and (fields.output_format or "png") == "png":
        raise InvalidRequest(
            "output_compression", f"{fields.output_compression} has no effect on png; use 100, or jpeg or webp"
        )
    width, height = _size(fields)
    background = None if fields.background in _BACKGROUNDS else fields.background
    job_request = JobRequest(
        prompt=fields.prompt,
        seed=fields.seed,
        num_images=fields.n or 1,
        handle=fields.references,
        idempotency=idempotency,
        width=width,
        height=height,
        num_inference_steps=fields.num_inference_steps,
        guidance_scale=fields.guidance_scale,
        negative_prompt=fields.negative_prompt,
        output_format=fields.output_format or "png",
        quality=max(1, 95 if fields.output_compression is None else fields.output_compression),
        without_effect=(
            *(("background",) if background is not None and fields.references is not None else ()),
            *without_effect(fields, kind=service.engine.model.kind),
        ),
    )
    return await read_controls(
        service,
        owner,
        job_request,
        pictures=inputs.pictures,
        control=control_of(fields),
        canvas=inputs.canvas,
        mask=inputs.mask,
        drawn="transparent",
        background=background,
    )


def _check_model(service: Service, name: str) -> None:
    if not answers_to(name, service.settings):
        known = ", ".join(model_names(service.settings))
        raise NotFound(f"model: {name[:80]!r} is not one of {known}; or leave it out")


def _size(fields: Generation) -> tuple[int | None, int | None]:
    if fields.size in (None, "auto"):
        return fields.width, fields.height
    found = _SIZE.fullmatch(fields.size or "")
    if found is None:
        raise InvalidRequest("size", f"{fields.size!r} is neither auto nor WIDTHxHEIGHT, as 512x512")
    size = int(found[1]), int(found[2])
    for name, side in zip(("width", "height"), size, strict=True):
        if getattr(fields, name) not in (None, side):
            raise InvalidRequest(name, f"is {getattr(fields, name)}, and size says {fields.size}; give one of them")
    return size
