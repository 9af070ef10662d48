"""Jobs as resources, for both dialects and the page: listed, watched and cancelled.

Owns these wire schemas.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from limner.server.access.keys import Owner
from limner.server.dialects.job_view import as_result, controls
from limner.server.http.errors import ERRORS
from limner.server.http.service import KEYS, Service
from limner.server.http.wire import StrictRoute
from limner.server.jobs.records import Job
from limner.server.jobs.updates import Update

__all__ = ["routes"]


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
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    output_format: str
    num_references: int
    controls: dict[str, Any] | None = Field(
        None, description="what was asked for beyond prompt and references; mask and canvas: true if there is one"
    )
    references: str | None = Field(
        None, description="the handle that it was asked with; else the content key, which is a handle if you have one"
    )
    result: dict[str, Any] | None = None
    progress: float | None = None
    details: dict[str, Any] | None = None
    preview: dict[str, Any] | None = None


class JobList(BaseModel):
    data: list[JobEntry]


class Forgotten(BaseModel):
    """How many ended jobs were removed with their results."""

    deleted: int


def routes(service: Service) -> APIRouter:
    """Return the routes of jobs."""
    router = APIRouter(tags=["resources"], route_class=StrictRoute, dependencies=KEYS)
    runner = service.runner

    @router.get("/v1/jobs", response_model=JobList, responses=ERRORS, summary="Your jobs, the newest first")
    async def list_jobs(
        request: Request,
        owner: Owner = Depends(service.owner),
        limit: int = Query(50, ge=1, le=200),
        before: float | None = Query(None, ge=0, allow_inf_nan=False, description="those created before this time"),
    ) -> dict[str, Any]:
        found = await service.offload.store(service.jobs.of_owner, owner.id, limit=limit, before=before)
        return {"data": [_entry(service, request, job) for job in found]}

    @router.delete("/v1/jobs", response_model=Forgotten, responses=ERRORS, summary="Remove all of your ended jobs")
    async def forget_jobs(owner: Owner = Depends(service.owner)) -> dict[str, int]:
        return {"deleted": await service.offload.store(service.jobs.forget_all, owner.id)}

    @router.get("/v1/jobs/{id}", response_model=JobEntry, responses=ERRORS, summary="One of your jobs")
    async def get_job(request: Request, id: str, owner: Owner = Depends(service.owner)) -> dict[str, Any]:
        return _entry(service, request, await service.job(owner, id))

    @router.delete("/v1/jobs/{id}", response_model=JobEntry, responses=ERRORS, summary="Cancel a job, or remove it")
    async def cancel_job(
        request: Request,
        id: str,
        owner: Owner = Depends(service.owner),
        forget: bool = Query(False, description="also remove the job, with its results and what only it needs"),
    ) -> dict[str, Any]:
        await service.job(owner, id)
        if runner.cancel(id):
            await runner.wait(id)
        entry = _entry(service, request, await service.job(owner, id))
        if forget:
            await service.offload.store(service.jobs.forget, id)
        return entry

    @router.get(
        "/v1/jobs/{id}/events",
        responses={**ERRORS, 200: {"content": {"text/event-stream": {}}, "description": "One event an update"}},
        response_class=Response,
        summary="Updates of a job as they come",
    )
    async def watch_job(request: Request, id: str, owner: Owner = Depends(service.owner)) -> Response:
        job = await service.job(owner, id)
        return service.event_stream(owner, _events(service, request, job))

    return router


def _entry(service: Service, request: Request, job: Job, update: Update | None = None) -> dict[str, Any]:
    update = update or (service.runner.update(job.id) if job.status == "pending" else None)
    shown = as_result(job, service.urls.of(job, service.base_url(request)), update)
    return {
        "id": job.id,
        "status": job.status,
        "created": job.created,
        "prompt": job.prompt,
        "num_images": len(job.seeds),
        "seeds": list(job.seeds),
        "width": job.width,
        "height": job.height,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
        "negative_prompt": job.negative_prompt,
        "output_format": job.output_format,
        "num_references": len(job.references),
        "controls": controls(job),
        # the handle first: the key of the K/V is another one where the job has LoRAs of its own
        "references": job.options.handle or job.result.get("reference_key"),
        **{name: shown[name] for name in ("result", "progress", "details", "preview")},
    }


async def _events(service: Service, request: Request, job: Job) -> AsyncIterator[str]:
    """Yield each update as an event named by its state; a comment line now and then keeps the connection open."""
    async with contextlib.aclosing(service.runner.watch(job.id, idle=15)) as updates:
        async for update in updates:
            if update is None:
                yield ": waiting\n\n"
                continue
            current = await service.offload.store(service.jobs.get, job.id) if update.progress == 1.0 else job
            entry = _entry(service, request, current or job, update)
            yield f"event: {update.state}\ndata: {json.dumps(entry)}\n\n"
