"""References, jobs and results as resources, for both dialects and the page.

Owns these wire schemas: POST /v1/references makes a handle (the content key, for the key that made it), jobs can be
listed, watched and cancelled, results are read under signed URLs. GET /v1/capabilities says what a caller may ask for.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import Response, StreamingResponse

from limner import __version__
from limner.errors import InvalidRequest, Moderated, NotFound, OutputError, RemoteError
from limner.images import PreparedReference
from limner.server.access.keys import Owner
from limner.server.dialects.bfl import as_result
from limner.server.http.service import KEYS, MEDIA_TYPES, Service
from limner.server.http.wire import ERRORS, StrictRoute, check_form
from limner.server.jobs.records import Handle, Job
from limner.server.jobs.runner import SUFFIXES, Update

__all__ = ["results", "routes"]


class ReferenceInputs(BaseModel):
    """JSON body of POST /v1/references; a form with files named image is taken as well."""

    model_config = ConfigDict(extra="forbid")

    images: list[str] = Field(min_length=1, max_length=16, description="base64, data URLs, or URLs where allowed")
    safety_tolerance: int = Field(2, ge=0, le=5, strict=True)
    prefill: bool = Field(True, strict=True, description="false: K/V are left to the first job that uses them")


class Reference(BaseModel):
    """References that are kept. `cache` says where their K/V were now: miss (computed now), memory, disk or remote.

    `nbytes` and `prefill_seconds` are null where the upload left the K/V to the first job.
    """

    id: str
    created: float
    references: list[dict[str, Any]]
    num_tokens: int
    nbytes: int | None = None
    prefill_seconds: float | None = None
    cache: str | None = None
    seconds_saved: float | None = None


class ReferenceList(BaseModel):
    data: list[Reference]


class Removed(BaseModel):
    id: str
    deleted: bool


class JobEntry(BaseModel):
    id: str
    status: str
    created: float
    prompt: str
    num_images: int
    seeds: list[int] = []
    width: int | None
    height: int | None
    num_inference_steps: int
    output_format: str
    num_references: int
    references: str | None = Field(None, description="content key of its references, also their handle if you have one")
    result: dict[str, Any] | None = None
    progress: float | None = None
    details: dict[str, Any] | None = None
    preview: dict[str, Any] | None = None


class JobList(BaseModel):
    data: list[JobEntry]


class Capabilities(BaseModel):
    """What this server draws with, and the limits of a request. Sizes are (width, height) in pixels."""

    model: str
    version: str
    default_size: list[int]
    sizes: list[list[int]] = Field(description="those that the model has learned to draw; none: any")
    grid: int = Field(description="output sides are multiples of it")
    max_output_pixels: int
    max_images: int
    max_references: int
    max_picture_bytes: int
    previews: bool = Field(description="whether jobs show small pictures while they are drawn")
    keep_seconds: float = Field(description="how long results are served")


_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": ReferenceInputs.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": 16},
                        "image[]": {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": 16},
                        "safety_tolerance": {"type": "string"},
                        "prefill": {"type": "string", "enum": ["true", "false"]},
                    },
                }
            },
        },
    }
}


def routes(service: Service) -> APIRouter:
    """The routes of resources."""
    router = APIRouter(tags=["resources"], route_class=StrictRoute, dependencies=KEYS)
    runner, jobs = service.runner, service.jobs

    @router.post(
        "/v1/references",
        status_code=201,
        response_model=Reference,
        responses=ERRORS,
        openapi_extra=_FORM,
        summary="Upload references once; their K/V are computed and kept",
    )
    async def add_references(request: Request, owner: Owner = Depends(service.paying)) -> dict[str, Any]:
        pictures, tolerance, prefill = await _read(service, request)
        finding = await runner.check_pictures(pictures, tolerance=tolerance)
        if finding is not None:
            raise Moderated(finding.reason)
        described: dict[str, Any] = {"tolerance": tolerance}
        if prefill:
            with service.limiter.hold(owner):
                service.engine.check_room()
                made = await runner.prefill(pictures, owner=owner.id, id=f"prefill-{uuid.uuid4()}")
            key, seconds = made.key, round(made.prefill_seconds, 4)
            described |= {"nbytes": made.nbytes, "prefill_seconds": seconds}
            now: dict[str, Any] = {"cache": made.source, "seconds_saved": 0.0 if made.source == "miss" else seconds}
        else:
            key = await runner.aside(service.engine.key_of, pictures)
            now = {"cache": "memory" if service.engine.holds(key) else None}
        described |= {"num_tokens": sum(w * h for w, h in (p.report.processed_size for p in pictures)) // _PATCH**2}
        reports = tuple(p.report for p in pictures)
        handle = await runner.store(
            jobs.add_handle,
            Handle(owner=owner.id, key=key, references=reports, described=described),
            pictures,
            max_handles=service.settings.max_handles,
        )
        return {**_reference(handle), **now}

    @router.get("/v1/references", response_model=ReferenceList, responses=ERRORS, summary="Your references")
    async def list_references(owner: Owner = Depends(service.owner)) -> dict[str, Any]:
        return {"data": [_reference(handle) for handle in await runner.store(jobs.handles, owner.id)]}

    @router.get("/v1/references/{id}", response_model=Reference, responses=ERRORS, summary="One of your references")
    async def get_references(id: str, owner: Owner = Depends(service.owner)) -> dict[str, Any]:
        handle = await service.handle(owner, id)
        return {**_reference(handle), "cache": "memory" if service.engine.holds(id) else None}

    @router.get(
        "/v1/references/{id}/{number}.png",
        responses={**ERRORS, 200: {"content": {"image/png": {}}, "description": "The picture as the model reads it"}},
        response_class=Response,
        summary="A reference as the model reads it",
    )
    async def get_reference_picture(id: str, number: int, owner: Owner = Depends(service.owner)) -> Response:
        handle = await service.handle(owner, id)
        if not 1 <= number <= len(handle.references):
            raise NotFound(f"number: {number} is not within 1 to {len(handle.references)}")
        data = await runner.aside(jobs.picture_png, handle.references[number - 1].digest)
        return Response(data, media_type="image/png", headers=_PRIVATE)

    @router.delete("/v1/references/{id}", response_model=Removed, responses=ERRORS, summary="Forget references")
    async def delete_references(id: str, owner: Owner = Depends(service.owner)) -> dict[str, Any]:
        await service.handle(owner, id)

        async def forget() -> None:
            try:
                await runner.aside(service.engine.forget, id)
            except RemoteError as error:  # not the caller's fault, and not for his eyes
                raise OutputError(str(error)) from error

        alone = await runner.store(jobs.is_only_owner, owner.id, id)
        if alone:  # while the handle is there, so that a failure can be asked away
            await forget()
        if await runner.store(jobs.remove_handle, owner.id, id) and not alone:  # the other one went at the same time
            await forget()
        return {"id": id, "deleted": True}

    @router.get("/v1/jobs", response_model=JobList, responses=ERRORS, summary="Your jobs, the newest first")
    async def list_jobs(
        request: Request, owner: Owner = Depends(service.owner), limit: int = Query(50, ge=1, le=200)
    ) -> dict[str, Any]:
        found = await runner.store(jobs.of_owner, owner.id, limit=limit)
        return {"data": [_entry(service, request, job) for job in found]}

    @router.get("/v1/jobs/{id}", response_model=JobEntry, responses=ERRORS, summary="One of your jobs")
    async def get_job(request: Request, id: str, owner: Owner = Depends(service.owner)) -> dict[str, Any]:
        return _entry(service, request, await service.job(owner, id))

    @router.delete("/v1/jobs/{id}", response_model=JobEntry, responses=ERRORS, summary="Cancel a job")
    async def cancel_job(request: Request, id: str, owner: Owner = Depends(service.owner)) -> dict[str, Any]:
        await service.job(owner, id)
        if runner.cancel(id):
            await runner.wait(id)
        return _entry(service, request, await service.job(owner, id))

    @router.get(
        "/v1/jobs/{id}/events",
        responses={**ERRORS, 200: {"content": {"text/event-stream": {}}, "description": "One event an update"}},
        response_class=Response,
        summary="Updates of a job as they come",
    )
    async def watch_job(request: Request, id: str, owner: Owner = Depends(service.owner)) -> Response:
        job = await service.job(owner, id)
        stream = _events(service, request, job)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-store"})

    return router


def results(service: Service) -> APIRouter:
    """The pictures of jobs, which need no key: their URLs are signed."""
    router = APIRouter(tags=["resources"])
    runner, jobs = service.runner, service.jobs

    @router.get(
        "/v1/results/{id}/{name}",
        responses={**ERRORS, 200: {"content": {kind: {} for kind in MEDIA_TYPES.values()}, "description": "A picture"}},
        response_class=Response,
        summary="A result, under a signed URL",
    )
    async def get_result_picture(
        id: str, name: str, expires: int = Query(ge=0, le=2**40), signature: str = Query(max_length=128)
    ) -> Response:
        number, _, suffix = name.partition(".")
        if not (number.isascii() and number.isdecimal() and len(number) < 4):
            raise NotFound(f"name: {name[:80]!r} is not a result")
        service.check_signature(id, int(number), expires, signature)
        job = await runner.store(jobs.get, id)
        data = None
        if job is not None and suffix == SUFFIXES[job.output_format]:
            data = await runner.aside(jobs.read_result, job, int(number))
        if job is None or data is None:
            raise NotFound("name: this result has expired, or never was")
        return Response(data, media_type=MEDIA_TYPES[job.output_format], headers=_PRIVATE)

    @router.get(
        "/v1/jobs/{id}/references/{number}.png",
        responses={**ERRORS, 200: {"content": {"image/png": {}}, "description": "The picture as the model reads it"}},
        response_class=Response,
        dependencies=KEYS,
        summary="A reference of a job as the model reads it",
    )
    async def job_reference(id: str, number: int, owner: Owner = Depends(service.owner)) -> Response:
        job = await service.job(owner, id)
        if not 1 <= number <= len(job.references):
            raise NotFound(f"number: {number} is not within 1 to {len(job.references)}")
        data = await runner.aside(jobs.picture_png, job.references[number - 1].digest)
        return Response(data, media_type="image/png", headers=_PRIVATE)

    @router.get(
        "/v1/capabilities",
        response_model=Capabilities,
        responses=ERRORS,
        dependencies=KEYS,
        summary="What may be asked for",
    )
    async def capabilities(owner: Owner = Depends(service.owner)) -> Capabilities:
        settings, model = service.settings, service.engine.model
        return Capabilities(
            model=settings.model_name,
            version=__version__,
            default_size=list(model.default_size),
            sizes=[list(size) for size in model.sizes],
            grid=_PATCH,
            max_output_pixels=settings.max_output_pixels,
            max_images=service.engine.max_batch,
            max_references=settings.max_references,
            max_picture_bytes=settings.max_picture_bytes,
            previews=model.previews,
            keep_seconds=settings.runner.keep_results,
        )

    return router


_PATCH = 16
"""Pixels of a token's side."""
_PRIVATE = {"cache-control": "private, max-age=600", "x-content-type-options": "nosniff"}


async def _read(service: Service, request: Request) -> tuple[tuple[PreparedReference, ...], int, bool]:
    """Pictures, tolerance and whether to compute K/V now, of a JSON body or a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            inputs = ReferenceInputs.model_validate(await request.json())
        except json.JSONDecodeError as error:
            raise InvalidRequest("body", f"is not JSON ({error})") from None
        except ValidationError as error:
            raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from None
        texts = {f"images {i}": text for i, text in enumerate(inputs.images, start=1)}
        return await service.prepare_texts(texts), inputs.safety_tolerance, inputs.prefill
    check_form(request)
    limit, files, tolerance, prefill = service.settings.max_picture_bytes, [], 2, True
    async with request.form(max_files=20, max_fields=20, max_part_size=limit + 1024) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name in ("image", "image[]"):
                files.append(await value.read(limit + 1))
            elif name == "safety_tolerance" and isinstance(value, str) and value in "012345" and len(value) == 1:
                tolerance = int(value)
            elif name == "prefill" and value in ("true", "false"):
                prefill = value == "true"
            else:
                raise InvalidRequest(
                    name,
                    "is no field, or has no such value; image: files, safety_tolerance: 0 to 5, prefill: true or false",
                )
    if not files:
        raise InvalidRequest("image", "is missing; send one or more pictures")
    pictures = tuple([await service.prepare(data, name=f"image {i}") for i, data in enumerate(files, start=1)])
    return service.check_count(pictures), tolerance, prefill


def _reference(handle: Handle) -> dict[str, Any]:
    told = handle.described
    return {
        "id": handle.key,
        "created": handle.created,
        "references": [asdict(report) for report in handle.references],
        "num_tokens": told["num_tokens"],
        "nbytes": told.get("nbytes"),
        "prefill_seconds": told.get("prefill_seconds"),
    }


def _entry(service: Service, request: Request, job: Job, update: Update | None = None) -> dict[str, Any]:
    update = update or (service.runner.update(job.id) if job.status == "pending" else None)
    shown = as_result(job, service.result_urls(job, service.base_url(request)), update)
    return {
        "id": job.id,
        "status": job.status,
        "created": job.created,
        "prompt": job.prompt,
        "num_images": len(job.seeds),
        "seeds": list(job.seeds),
        "width": job.width,
        "height": job.height,
        "num_inference_steps": job.num_steps,
        "output_format": job.output_format,
        "num_references": len(job.references),
        "references": job.result.get("reference_key") or job.options.get("handle"),
        **{name: shown[name] for name in ("result", "progress", "details", "preview")},
    }


async def _events(service: Service, request: Request, job: Job) -> AsyncIterator[str]:
    """Each update as an event named by its state; a comment line now and then keeps the connection."""
    async with contextlib.aclosing(service.runner.watch(job.id, idle=15)) as updates:
        async for update in updates:
            if update is None:
                yield ": waiting\n\n"
                continue
            current = await service.runner.store(service.jobs.get, job.id) if update.progress == 1.0 else job
            entry = _entry(service, request, current or job, update)
            yield f"event: {update.state}\ndata: {json.dumps(entry)}\n\n"
