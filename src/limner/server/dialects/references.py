"""Uploaded references as resources, for both dialects and the page.

Owns these wire schemas. POST /v1/references stores pictures, computes their K/V and gives a handle: their content key,
valid for the API key that uploaded them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import Response

from limner import grid
from limner.config import FITS, Fit
from limner.errors import InvalidRequest, Moderated, OutputError, RemoteError
from limner.images import PreparedReference
from limner.server.access.keys import Owner
from limner.server.dialects.picture_answers import reference_answer
from limner.server.dialects.unknown_fields import told
from limner.server.http.errors import ERRORS
from limner.server.http.pictures import SentPicture
from limner.server.http.service import KEYS, Service
from limner.server.http.wire import StrictRoute, read_form
from limner.server.jobs.records import Handle
from limner.spelling import meant

__all__ = ["routes"]


FIT = "how sides become multiples of 16; null: as the service does, which is crop unless it was started with --fit"
"""What the field `fit` of these bodies means."""


class ReferenceInputs(BaseModel):
    """JSON body of POST /v1/references; a form with files named image is taken as well."""

    model_config = ConfigDict(extra="forbid")

    images: list[str] = Field(min_length=1, max_length=16, description="base64, data URLs, or URLs where allowed")
    safety_tolerance: int = Field(2, ge=0, le=5, strict=True)
    fit: Fit | None = Field(None, description=FIT)
    prefill: bool = Field(True, strict=True, description="false: K/V are left to the first job that uses them")
    background: str | None = Field(
        None, max_length=100, description="colour behind transparent pictures, as white or #fff"
    )


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
                        "fit": {"type": "string", "enum": [*FITS], "description": FIT},
                        "prefill": {"type": "string", "enum": ["true", "false"]},
                        "background": {"type": "string"},
                    },
                }
            },
        },
    }
}


_FORM_FIELDS = ("image", "safety_tolerance", "fit", "prefill", "background")


def routes(service: Service) -> APIRouter:
    """Return the routes of references."""
    router = APIRouter(tags=["resources"], route_class=StrictRoute, dependencies=KEYS)
    jobs, offload = service.jobs, service.offload

    @router.post(
        "/v1/references",
        status_code=201,
        response_model=Reference,
        responses=ERRORS,
        openapi_extra=_FORM,
        summary="Upload references once; their K/V are computed and kept",
    )
    async def add_references(request: Request, owner: Owner = Depends(service.paying)) -> dict[str, Any]:
        return await _add(service, owner, await _read(service, request, owner))

    @router.get("/v1/references", response_model=ReferenceList, responses=ERRORS, summary="Your references")
    async def list_references(owner: Owner = Depends(service.owner)) -> dict[str, Any]:
        return {"data": [_reference(handle) for handle in await offload.store(jobs.handles, owner.id)]}

    @router.get("/v1/references/{id}", response_model=Reference, responses=ERRORS, summary="One of your references")
    async def get_references(id: str, owner: Owner = Depends(service.owner)) -> dict[str, Any]:
        handle = await service.handle(owner, id)
        return {**_reference(handle), "cache": await _held(service, owner, id)}

    @router.get(
        "/v1/references/{id}/{number}.png",
        responses={**ERRORS, 200: {"content": {"image/png": {}}, "description": "The picture as the model reads it"}},
        response_class=Response,
        summary="A reference as the model reads it",
    )
    async def get_reference_picture(id: str, number: int, owner: Owner = Depends(service.owner)) -> Response:
        handle = await service.handle(owner, id)
        return await reference_answer(service, handle.references, number)

    @router.delete("/v1/references/{id}", response_model=Removed, responses=ERRORS, summary="Forget references")
    async def delete_references(id: str, owner: Owner = Depends(service.owner)) -> dict[str, Any]:
        await service.handle(owner, id)
        for key in await _delete(service, owner, id):
            await service.known.forget(owner.id, key)
        return {"id": id, "deleted": True}

    return router


@dataclass(frozen=True, kw_only=True, slots=True)
class _Upload:
    pictures: tuple[PreparedReference, ...]
    tolerance: int
    prefill: bool


async def _read(service: Service, request: Request, owner: Owner) -> _Upload:
    """Read a JSON body or a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        return await _read_form(service, request, owner)
    try:
        inputs = ReferenceInputs.model_validate(await request.json())
    except json.JSONDecodeError as error:
        raise InvalidRequest("body", f"is not JSON ({error})") from None
    except ValidationError as error:
        found = [{**e, "loc": ("body", *e["loc"]), "msg": told(e, ReferenceInputs)} for e in error.errors()]
        raise RequestValidationError(found) from None
    sent = [SentPicture(field=f"images[{i}]", data=text) for i, text in enumerate(inputs.images)]
    pictures = await service.pictures.read(sent, owner=owner, background=inputs.background, fit=inputs.fit)
    return _Upload(pictures=pictures, tolerance=inputs.safety_tolerance, prefill=inputs.prefill)


async def _read_form(service: Service, request: Request, owner: Owner) -> _Upload:
    limit, tolerance, prefill = service.settings.max_picture_bytes, 2, True
    sent: list[SentPicture] = []
    background: str | None = None
    fit: Fit | None = None
    async with read_form(request, max_fields=20, max_part=limit + 1024) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name in ("image", "image[]"):
                sent.append(SentPicture(field=name, data=await service.offload.run(value.file.read, limit + 1)))
            elif name == "safety_tolerance" and isinstance(value, str) and value in "012345" and len(value) == 1:
                tolerance = int(value)
            elif name == "fit" and isinstance(value, str) and value in FITS:
                fit = cast(Fit, value)
            elif name == "prefill" and value in ("true", "false"):
                prefill = value == "true"
            elif name == "background" and isinstance(value, str) and len(value) <= 100:
                background = value
            else:
                near = None if name in _FORM_FIELDS else meant(name, _FORM_FIELDS)
                raise InvalidRequest(
                    name,
                    f"is no field, or has no such value; {f'did you mean {near}? ' if near else ''}image: files, "
                    f"safety_tolerance: 0 to 5, fit: {', '.join(FITS)}, prefill: true or false, background: a colour",
                )
    if not sent:
        raise InvalidRequest("image", "is missing; send one or more pictures")
    pictures = await service.pictures.read(sent, owner=owner, background=background, fit=fit)
    return _Upload(pictures=pictures, tolerance=tolerance, prefill=prefill)


async def _add(service: Service, owner: Owner, upload: _Upload) -> dict[str, Any]:
    """Check and store references, and compute their K/V if the upload says so."""
    pictures = upload.pictures
    finding = await service.moderation.check_references(pictures, tolerance=upload.tolerance)
    if finding is not None:
        raise Moderated(finding.reason)
    nbytes, seconds = None, None
    if upload.prefill:
        with service.limiter.hold(owner):
            service.engine.check_room()
            made = await service.prefills.compute(pictures, owner=owner.id, id=f"prefill-{uuid.uuid4()}")
        told = await service.known.tell(owner.id, made.key, source=made.source, seconds=made.prefill_seconds)
        key, nbytes, seconds = made.key, made.nbytes, round(told.seconds, 4)
        now: dict[str, Any] = {"cache": told.source, "seconds_saved": round(told.saved, 4)}
    else:
        key = await service.offload.run(service.engine.key_of, pictures)
        now = {"cache": await _held(service, owner, key)}
    handle = Handle(
        owner=owner.id,
        key=key,
        references=tuple(p.report for p in pictures),
        num_tokens=grid.num_tokens(*(p.report.processed_size for p in pictures)),
        tolerance=upload.tolerance,
        nbytes=nbytes,
        prefill_seconds=seconds,
    )
    stored = await service.offload.store(
        service.jobs.add_handle,
        handle,
        pictures,
        max_handles=service.settings.max_handles,
        files=await service.offload.run(service.jobs.encode, pictures),
    )
    return {**_reference(stored), **now}


async def _held(service: Service, owner: Owner, key: str) -> str | None:
    """Return "memory" if K/V are there and the owner may be told so, else None."""
    return "memory" if service.engine.holds(key) and await service.known.has(owner.id, key) else None


async def _delete(service: Service, owner: Owner, handle: str) -> list[str]:
    """Remove a handle, and all K/V of its pictures that no other handle is for. Return the keys of all, kept or not."""
    jobs, offload = service.jobs, service.offload

    async def forget(keys: Iterable[str]) -> None:
        try:
            for key in keys:
                await offload.run(service.engine.forget, key)
        except RemoteError as error:  # the server's fault, whose message is not for callers
            raise OutputError(str(error)) from error

    found = await offload.store(jobs.keys_of_handle, owner.id, handle)
    # before the handle is gone, so that the caller can repeat a failed deletion
    await forget(key for key, is_free in found.items() if is_free)
    left = await offload.store(jobs.remove_handle, owner.id, handle, keys=list(found))
    await forget(key for key in left if not found[key])  # another owner left meanwhile
    return list(found)


def _reference(handle: Handle) -> dict[str, Any]:
    return {
        "id": handle.key,
        "created": handle.created,
        "references": [report.as_json() for report in handle.references],
        "num_tokens": handle.num_tokens,
        "nbytes": handle.nbytes,
        "prefill_seconds": handle.prefill_seconds,
    }
