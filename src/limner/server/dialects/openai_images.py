"""The OpenAI Images dialect: pictures in the answer to the request, or as a stream of events.

Owns these wire schemas. Source: the types of the `openai` Python package (2026-08). `seed`, `num_inference_steps` and
`references` (a handle) are additions; `limner` in an answer tells of kept references, and of fields that have no effect.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Depends, Header, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import Response, StreamingResponse

from limner.errors import Cancelled, DeadlineExceeded, InvalidRequest, LimnerError, Moderated, NotFound, QueueFull
from limner.images import PreparedReference
from limner.server.access.keys import Owner
from limner.server.http.service import KEYS, Service, until_gone
from limner.server.http.wire import OPENAI_ERRORS, SafeJSON, StrictRoute, answer_of, cache_report, check_form
from limner.server.jobs.records import Job

__all__ = ["routes"]

MAX_IMAGES = 10
MAX_PARTIAL = 3
_SIZE = re.compile(r"([1-9][0-9]{1,4})x([1-9][0-9]{1,4})")
_IDLE = ("quality", "background", "moderation", "style", "input_fidelity")
"""Fields of models of others: taken, and reported as without effect."""
_NAMES = {"width": "size", "height": "size", "num_images": "n"}
"""Fields of jobs, by the names that they have here."""


class Generation(BaseModel):
    """Body of /v1/images/generations; /v1/images/edits has these fields as a form, and pictures."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=32000)
    model: str | None = Field(None, max_length=200)
    n: int | None = Field(1, ge=1, le=MAX_IMAGES)
    size: str | None = Field("auto", max_length=20, description='"auto" or WIDTHxHEIGHT, multiples of 16')
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None
    input_fidelity: Literal["high", "low"] | None = None
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=MAX_PARTIAL)
    user: str | None = Field(None, max_length=1000)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    num_inference_steps: int | None = Field(4, ge=1, le=50)
    references: str | None = Field(None, max_length=200)


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    created: int
    data: list[ImageData]
    output_format: str
    size: str
    quality: str
    background: str
    usage: dict[str, Any]
    limner: dict[str, Any]


class ModelEntry(BaseModel):
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "limner"


class Models(BaseModel):
    object: str = "list"
    data: list[ModelEntry]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    fields: Generation
    pictures: tuple[PreparedReference, ...]
    kind: Literal["image_generation", "image_edit"]


_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["prompt"],
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": 16},
                        "image[]": {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": 16},
                        **{name: {"type": "string"} for name in Generation.model_fields},
                    },
                }
            }
        },
    }
}


def routes(service: Service) -> APIRouter:
    """The routes of this dialect."""
    router = APIRouter(tags=["OpenAI Images dialect"], route_class=StrictRoute, dependencies=KEYS)
    key = Header(None, alias="Idempotency-Key", max_length=255)

    async def answer(request: Request, owner: Owner, asked: _Asked, idempotency: str | None) -> Response:
        fields = asked.fields
        _check_model(service, fields.model)
        if fields.background == "transparent":
            raise InvalidRequest("background", "transparent pictures are not made; use opaque or auto")
        if fields.output_compression is not None and (fields.output_format or "png") == "png":
            raise InvalidRequest("output_compression", "has no effect on png; use jpeg or webp, or leave it out")
        width, height = _size(fields.size)
        try:
            job, _ = await service.accept(
                owner,
                prompt=fields.prompt,
                seed=fields.seed,
                num_images=fields.n or 1,
                pictures=asked.pictures,
                references=fields.references,
                idempotency=idempotency,
                width=width,
                height=height,
                num_steps=fields.num_inference_steps or 4,
                output_format=fields.output_format or "png",
                quality=max(1, 95 if fields.output_compression is None else fields.output_compression),
            )
        except InvalidRequest as error:
            if error.field not in _NAMES:
                raise
            problem = str(error).removeprefix(f"{error.field}: ")
            raise InvalidRequest(_NAMES[error.field], f"{error.field} {problem}") from None
        if fields.stream:
            events = _events(service, request, job, asked, cancel=idempotency is None)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        job = await _wait(service, request, job, cancel=idempotency is None)
        return SafeJSON(await _images(service, request, job, asked))

    @router.post("/v1/images/generations", response_model=Images, responses=OPENAI_ERRORS, summary="Pictures from text")
    async def generate_images(
        request: Request, fields: Generation, owner: Owner = Depends(service.paying), idempotency: str | None = key
    ) -> Response:
        if fields.input_fidelity is not None:
            raise InvalidRequest("input_fidelity", "is for edits; leave it out")
        return await answer(request, owner, _Asked(fields=fields, pictures=(), kind="image_generation"), idempotency)

    @router.post(
        "/v1/images/edits",
        response_model=Images,
        responses=OPENAI_ERRORS,
        openapi_extra=_FORM,
        summary="Pictures from text and references",
    )
    async def edit_images(
        request: Request, owner: Owner = Depends(service.paying), idempotency: str | None = key
    ) -> Response:
        asked = await _read_form(service, request)
        return await answer(request, owner, asked, idempotency)

    @router.get("/v1/models", response_model=Models, responses=OPENAI_ERRORS, summary="What can be named as model")
    async def list_models(owner: Owner = Depends(service.owner)) -> Models:
        return Models(data=[ModelEntry(id=name) for name in model_names(service)])

    @router.get("/v1/models/{name}", response_model=ModelEntry, responses=OPENAI_ERRORS, summary="One model")
    async def get_model(name: str, owner: Owner = Depends(service.owner)) -> ModelEntry:
        if name not in model_names(service):
            raise NotFound(f"model: {name[:80]!r} is not one of {', '.join(model_names(service))}")
        return ModelEntry(id=name)

    return router


def model_names(service: Service) -> list[str]:
    """The name of the model that is loaded, and those that it answers to."""
    from limner.server.dialects.bfl import ENDPOINTS

    return [service.settings.model_name, *ENDPOINTS]


def _check_model(service: Service, model: str | None) -> None:
    if model is not None and model not in model_names(service):
        raise NotFound(f"model: {model[:80]!r} is not one of {', '.join(model_names(service))}; or leave it out")


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text in (None, "auto"):
        return None, None
    found = _SIZE.fullmatch(text or "")
    if found is None:
        raise InvalidRequest("size", f"{text!r} is neither auto nor WIDTHxHEIGHT, as 512x512")
    return int(found[1]), int(found[2])


async def _read_form(service: Service, request: Request) -> _Asked:
    check_form(request)
    values: dict[str, str] = {}
    files: list[tuple[str, bytes]] = []
    limit = service.settings.max_picture_bytes
    async with request.form(max_files=20, max_fields=60, max_part_size=limit + 1024) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name == "mask":
                    raise InvalidRequest("mask", "masks are not supported; say in the prompt what to change")
                if name not in ("image", "image[]"):
                    raise InvalidRequest(name, "is not a field for a file; pictures are image or image[]")
                files.append((f"image {len(files) + 1}", await value.read(limit + 1)))
            elif name in ("image", "image[]"):
                raise InvalidRequest(name, "is text; send the picture as a file with a file name")
            elif name in values:
                raise InvalidRequest(name, "is there twice; give it once")
            else:
                values[name] = value
    fields = _validate(values)
    if not files and fields.references is None:
        raise InvalidRequest("image", "is missing; send one or more pictures, or references with a handle")
    pictures = tuple([await service.prepare(data, name=name) for name, data in files])
    return _Asked(fields=fields, pictures=service.check_count(pictures), kind="image_edit")


def _validate(values: Mapping[str, str]) -> Generation:
    try:
        return Generation.model_validate_strings(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(".".join(map(str, first["loc"])) or "body", first["msg"]) from None


async def _wait(service: Service, request: Request, job: Job, *, cancel: bool) -> Job:
    """The job when it has ended; a caller who goes away cancels it, unless he can ask for it again."""
    ended = asyncio.ensure_future(service.runner.wait(job.id))
    gone = asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait({ended, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            if cancel:
                service.runner.cancel(job.id)
            raise Cancelled("the caller has gone")
        found = ended.result()
    finally:
        gone.cancel()
        ended.cancel()
    if found is None:
        raise NotFound(f"id: {job.id} was forgotten")
    return found


def _raise_ended(job: Job) -> None:
    """Raises what a job that is not ready ended with."""
    if job.status == "ready":
        return
    if "finding" in job.result:
        raise Moderated(job.result["finding"]["reason"])
    if job.result.get("type") == "deadline":
        raise DeadlineExceeded(job.result["error"])
    if job.status == "pending":
        raise QueueFull(f"the server shuts down; {job.id} is drawn after the next start: GET /v1/jobs/{job.id}")
    if job.status == "cancelled":
        raise Cancelled("the job was cancelled")
    raise LimnerError(job.result.get("error", "the job failed"))


async def _images(service: Service, request: Request, job: Job, asked: _Asked) -> dict[str, Any]:
    _raise_ended(job)
    data: list[dict[str, Any]] = []
    if asked.fields.response_format == "url":
        data = [{"url": url} for url in service.result_urls(job, service.base_url(request))]
    else:
        for number in range(1, len(job.seeds) + 1):
            file = await service.runner.aside(service.jobs.read_result, job, number)
            if file is None:
                raise NotFound(f"id: the result of {job.id} has expired")
            data.append({"b64_json": base64.b64encode(file).decode()})
    return {
        "created": int(job.created),
        "data": data,
        **_shape(job),
        "usage": _usage(job),
        "limner": {**cache_report(job), "seeds": job.result["seeds"], **_without_effect(asked.fields)},
    }


def _shape(job: Job) -> dict[str, Any]:
    return {
        "output_format": job.output_format,
        "size": f"{job.width}x{job.height}",
        "quality": "auto",
        "background": "opaque",
    }


def _without_effect(fields: Generation) -> dict[str, Any]:
    idle = [name for name in _IDLE if getattr(fields, name) not in (None, "auto")]
    return {"without_effect": idle} if idle else {}


def _usage(job: Job) -> dict[str, Any]:
    """Tokens that the model read and drew; a token of a picture is 16x16 pixels."""
    text = job.result["prompt"]["num_tokens"]
    pictures = sum(w * h for w, h in (r["processed_size"] for r in job.result["references"])) // 256
    drawn = len(job.seeds) * job.result["width"] * job.result["height"] // 256
    return {
        "total_tokens": text + pictures + drawn,
        "input_tokens": text + pictures,
        "output_tokens": drawn,
        "input_tokens_details": {"text_tokens": text, "image_tokens": pictures},
    }


async def _events(service: Service, request: Request, job: Job, asked: _Asked, *, cancel: bool) -> AsyncIterator[str]:
    """Server-sent events: up to `partial_images` previews of the first image, evenly over the steps, then each picture.

    A caller who goes away cancels the job, where `cancel` says so.
    """
    shown, steps = 0, _partial_steps(asked.fields.partial_images or 0, job.num_steps)
    common = {"created_at": int(job.created), **_shape(job)}
    is_over = False
    try:
        async with contextlib.aclosing(service.runner.watch(job.id, idle=15)) as updates:
            async for update in updates:
                if update is None:
                    yield ": waiting\n\n"
                elif update.state == "running" and update.step in steps and update.previews:
                    data = await service.runner.aside(_enlarged, update.previews[0], job)
                    event = {"partial_image_index": shown, "b64_json": base64.b64encode(data).decode(), **common}
                    yield _event(f"{asked.kind}.partial_image", event)
                    shown += 1
        is_over = True
        ended = await service.runner.wait(job.id)
        if ended is None:
            raise NotFound(f"id: {job.id} was forgotten")
        whole = await _images(service, request, ended, asked)
        for image in whole["data"]:
            event = {**image, **common, "usage": whole["usage"], "limner": whole["limner"]}
            yield _event(f"{asked.kind}.completed", event)
    except LimnerError as error:  # the status was sent long ago
        _, body, _ = answer_of(request.url.path, error)
        yield _event("error", body)
    finally:
        if cancel and not is_over:
            service.runner.cancel(job.id)


def _event(kind: str, values: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **values})}\n\n"


def _partial_steps(num: int, num_steps: int) -> set[int]:
    """After which steps a preview is sent: evenly spread, never after the last."""
    before = num_steps - 1
    num = min(num, before)
    return {round((i + 1) * num_steps / (num + 1)) for i in range(num)} & set(range(1, num_steps))


def _enlarged(preview: bytes, job: Job) -> bytes:
    """A preview at the size of the result."""
    with Image.open(io.BytesIO(preview)) as image:
        assert job.width is not None
        assert job.height is not None
        large = image.resize((job.width, job.height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    large.save(buffer, job.output_format.upper())
    return buffer.getvalue()
