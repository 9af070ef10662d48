"""The OpenAI Images dialect: pictures in the answer to the request, or as a stream of events.

Owns how these requests are read. `seed`, `num_inference_steps` and `references` (a handle) are additions; `limner` in an
answer reports on cached references, and on fields that have no effect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter, Depends, Header, Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import Response

from limner.errors import InvalidRequest, NotFound
from limner.images import PreparedReference
from limner.server.access.keys import Owner
from limner.server.dialects.model_names import model_names
from limner.server.dialects.openai_answers import Answer
from limner.server.dialects.openai_schemas import EDIT_FORM, Generation, Images, ModelEntry, Models
from limner.server.http.errors import OPENAI_ERRORS
from limner.server.http.service import KEYS, Service
from limner.server.http.wire import SafeJSON, StrictRoute, read_form
from limner.server.jobs.records import JobRequest

__all__ = ["routes"]

_SIZE = re.compile(r"([1-9][0-9]{1,4})x([1-9][0-9]{1,4})")
_NAMES = {"width": "size", "height": "size", "num_images": "n"}
"""Fields of jobs, by their names in this dialect."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inputs:
    fields: Generation
    pictures: tuple[PreparedReference, ...]
    kind: Literal["image_generation", "image_edit"]


def routes(service: Service) -> APIRouter:
    """Return the routes of this dialect."""
    router = APIRouter(tags=["OpenAI Images dialect"], route_class=StrictRoute, dependencies=KEYS)
    key = Header(None, alias="Idempotency-Key", max_length=255)
    names = model_names(service.settings.model_name)

    @router.post("/v1/images/generations", response_model=Images, responses=OPENAI_ERRORS, summary="Pictures from text")
    async def generate_images(
        request: Request, fields: Generation, owner: Owner = Depends(service.paying), idempotency: str | None = key
    ) -> Response:
        if fields.input_fidelity is not None:
            raise InvalidRequest("input_fidelity", "is for edits; leave it out")
        inputs = _Inputs(fields=fields, pictures=(), kind="image_generation")
        return await _answer(service, request, owner, inputs, idempotency)

    @router.post(
        "/v1/images/edits",
        response_model=Images,
        responses=OPENAI_ERRORS,
        openapi_extra=EDIT_FORM,
        summary="Pictures from text and references",
    )
    async def edit_images(
        request: Request, owner: Owner = Depends(service.paying), idempotency: str | None = key
    ) -> Response:
        return await _answer(service, request, owner, await _read_form(service, request, owner), idempotency)

    @router.get("/v1/models", response_model=Models, responses=OPENAI_ERRORS, summary="What can be named as model")
    async def list_models(owner: Owner = Depends(service.owner)) -> Models:
        return Models(data=[ModelEntry(id=name) for name in names])

    @router.get("/v1/models/{name}", response_model=ModelEntry, responses=OPENAI_ERRORS, summary="One model")
    async def get_model(name: str, owner: Owner = Depends(service.owner)) -> ModelEntry:
        if name not in names:
            raise NotFound(f"model: {name[:80]!r} is not one of {', '.join(names)}")
        return ModelEntry(id=name)

    return router


async def _answer(
    service: Service, request: Request, owner: Owner, inputs: _Inputs, idempotency: str | None
) -> Response:
    fields = inputs.fields
    job_request = _job_request(service, inputs, idempotency)
    if fields.stream:  # before there is a job
        service.streams.check(owner)
    try:
        job, _ = await service.accept(owner, job_request)
    except InvalidRequest as error:
        if error.field not in _NAMES:
            raise
        problem = str(error).removeprefix(f"{error.field}: ")
        raise InvalidRequest(_NAMES[error.field], f"{error.field} {problem}") from None
    answer = Answer(
        service=service, request=request, fields=fields, kind=inputs.kind, job=job, cancel=idempotency is None
    )
    if fields.stream:
        return service.event_stream(owner, answer.events())
    return SafeJSON(await answer.body())


def _job_request(service: Service, inputs: _Inputs, idempotency: str | None) -> JobRequest:
    fields = inputs.fields
    _check_model(service, fields.model)
    if fields.background == "transparent":
        raise InvalidRequest("background", "transparent pictures are not made; use opaque or auto")
    if fields.output_compression is not None and (fields.output_format or "png") == "png":
        raise InvalidRequest("output_compression", "has no effect on png; use jpeg or webp, or leave it out")
    width, height = _size(fields.size)
    return JobRequest(
        prompt=fields.prompt,
        seed=fields.seed,
        num_images=fields.n or 1,
        pictures=inputs.pictures,
        handle=fields.references,
        idempotency=idempotency,
        width=width,
        height=height,
        num_inference_steps=fields.num_inference_steps or 4,
        output_format=fields.output_format or "png",
        quality=max(1, 95 if fields.output_compression is None else fields.output_compression),
    )


def _check_model(service: Service, model: str | None) -> None:
    names = model_names(service.settings.model_name)
    if model is not None and model not in names:
        raise NotFound(f"model: {model[:80]!r} is not one of {', '.join(names)}; or leave it out")


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text in (None, "auto"):
        return None, None
    found = _SIZE.fullmatch(text or "")
    if found is None:
        raise InvalidRequest("size", f"{text!r} is neither auto nor WIDTHxHEIGHT, as 512x512")
    return int(found[1]), int(found[2])


async def _read_form(service: Service, request: Request, owner: Owner) -> _Inputs:
    values: dict[str, str] = {}
    files: dict[str, bytes] = {}
    limit = service.settings.max_picture_bytes
    async with read_form(request, max_fields=60, max_part=limit + 1024) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name == "mask":
                    raise InvalidRequest("mask", "masks are not supported; say in the prompt what to change")
                if name not in ("image", "image[]"):
                    raise InvalidRequest(name, "is not a field for a file; pictures are image or image[]")
                files[f"image {len(files) + 1}"] = await service.offload.run(value.file.read, limit + 1)
            elif name in ("image", "image[]"):
                raise InvalidRequest(name, "is text; send the picture as a file with a file name")
            elif name in values:
                raise InvalidRequest(name, "is there twice; give it once")
            else:
                values[name] = value
    fields = _validate(values)
    if not files and fields.references is None:
        raise InvalidRequest("image", "is missing; send one or more pictures, or references with a handle")
    return _Inputs(fields=fields, pictures=await service.pictures.read_files(files, owner=owner), kind="image_edit")


def _validate(values: Mapping[str, str]) -> Generation:
    try:
        return Generation.model_validate_strings(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(".".join(map(str, first["loc"])) or "body", first["msg"]) from None
