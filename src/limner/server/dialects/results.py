"""Pictures of jobs as resources, and what this server can be asked for.

Owns these wire schemas. Results need no key: their URLs are signed.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from limner import grid
from limner.errors import NotFound
from limner.images import MEDIA_TYPES, SUFFIXES
from limner.pipeline.control import MASK_BLUR
from limner.server.access.keys import Owner
from limner.server.dialects.control_fields import CONTROL_FIELDS
from limner.server.dialects.picture_answers import picture_answer, reference_answer
from limner.server.http.errors import ERRORS
from limner.server.http.service import KEYS, Service
from limner.version import __version__

__all__ = ["routes"]


class LoadedLora(BaseModel):
    """A LoRA that the server was started with, and its strength in requests that name none."""

    name: str
    strength: float


class Capabilities(BaseModel):
    """What this server draws with, and the limits of a request. Sizes are (width, height) in pixels."""

    model: str
    version: str
    default_size: list[int]
    sizes: list[list[int]] = Field(description="those that the model has learned to draw; none: any")
    grid: int = Field(description="output sides are multiples of it")
    max_output_pixels: int
    max_canvas_pixels: int = Field(
        description="of what is repainted, with what is added to it, times the images of a job"
    )
    max_images: int
    max_references: int
    max_picture_bytes: int
    references_attention: Literal["isolated", "joint"] = Field(description="what references attend to (limner.kinds)")
    is_distilled: bool = Field(description="drawn in few steps without guidance; guidance has no effect then")
    num_inference_steps: int = Field(description="steps of a request that names none")
    guidance_scale: float = Field(description="guidance of a request that names none; 1: none")
    controls: list[str] = Field(description="fields that say what is repainted and what references count")
    mask_blur: int = Field(description="that of a request that names none, in pixels")
    previews: bool = Field(description="whether jobs show small pictures while they are drawn")
    keep_seconds: float = Field(description="how long results are served")
    keep_bytes: int | None = Field(description="the oldest jobs go when what is kept of jobs has more; null: never")
    fetch_urls: bool = Field(description="whether pictures may be named by https URL")
    words: list[str] = Field(description="the only words of prompts that the model was trained on; none: any")
    loras: list[LoadedLora] = Field(description="those that a request may name, and that act where it names none")


class ModelCard(BaseModel):
    """What there is to read of the model: its card as Markdown, or where it stands."""

    model: str
    card: str | None
    url: str | None


def routes(service: Service) -> APIRouter:
    """Return the routes of results and of capabilities."""
    router = APIRouter(tags=["resources"])
    _add_pictures(router, service)
    _add_model(router, service)
    return router


def _add_pictures(router: APIRouter, service: Service) -> None:
    """Add the pictures of jobs."""

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
        service.urls.check(id, int(number), expires, signature)
        job = await service.offload.store(service.jobs.get, id)
        data = None
        if job is not None and f".{suffix}" == SUFFIXES[job.output_format]:
            data = await service.offload.run(service.jobs.read_result, job, int(number))
        if job is None or data is None:
            raise NotFound("name: this result has expired, or never was")
        return picture_answer(data, MEDIA_TYPES[job.output_format])

    @router.get(
        "/v1/jobs/{id}/references/{number}.png",
        responses={**ERRORS, 200: {"content": {"image/png": {}}, "description": "The picture as the model reads it"}},
        response_class=Response,
        dependencies=KEYS,
        summary="A reference of a job as the model reads it",
    )
    async def job_reference(id: str, number: int, owner: Owner = Depends(service.owner)) -> Response:
        job = await service.job(owner, id)
        return await reference_answer(service, job.references, number)

    @router.get(
        "/v1/jobs/{id}/maps/{number}.png",
        responses={
            **ERRORS,
            200: {"content": {"image/png": {}}, "description": "The map, grey, of the picture's size"},
        },
        response_class=Response,
        dependencies=KEYS,
        summary="What an edit with preserve changed: white where a picture is the edit's, black where it is the canvas'",
    )
    async def job_map(id: str, number: int, owner: Owner = Depends(service.owner)) -> Response:
        job = await service.job(owner, id)
        data = await service.offload.run(service.jobs.read_result, job, number, kind="maps")
        if data is None:
            raise NotFound(
                f"number: {id} has no map {number}, or it has expired; jobs with preserve have one a picture"
            )
        return picture_answer(data, "image/png")

    @router.get(
        "/v1/jobs/{id}/{name}.png",
        responses={**ERRORS, 200: {"content": {"image/png": {}}, "description": "The picture"}},
        response_class=Response,
        dependencies=KEYS,
        summary="The canvas of a job, at its own size, or its mask, which is white where it is repainted",
    )
    async def job_picture(id: str, name: Literal["canvas", "mask"], owner: Owner = Depends(service.owner)) -> Response:
        job = await service.job(owner, id)
        report = job.canvas if name == "canvas" else job.mask
        if report is None:
            raise NotFound(f"name: {id} has no {name}" + ("" if name == "mask" else "; what it repaints is image 1"))
        return await reference_answer(service, [report], 1)


def _add_model(router: APIRouter, service: Service) -> None:
    """Add what the model can do."""

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
            grid=grid.PIXELS,
            max_output_pixels=settings.max_output_pixels,
            max_canvas_pixels=settings.max_canvas_pixels,
            max_images=service.engine.max_batch,
            max_references=settings.max_references,
            max_picture_bytes=settings.max_picture_bytes,
            references_attention=model.kind.references,
            is_distilled=model.kind.distilled,
            num_inference_steps=model.kind.num_inference_steps,
            guidance_scale=model.kind.guidance_scale,
            controls=list(CONTROL_FIELDS),
            mask_blur=MASK_BLUR,
            previews=model.previews,
            keep_seconds=settings.runner.keep_results,
            keep_bytes=settings.runner.keep_bytes,
            fetch_urls=settings.fetch_urls,
            words=list(settings.about.words),
            loras=[LoadedLora(name=lora.name, strength=lora.strength) for lora in model.loras],
        )

    @router.get(
        "/v1/model-card",
        response_model=ModelCard,
        responses=ERRORS,
        dependencies=KEYS,
        summary="What the model is, and what can be asked of it",
    )
    async def model_card(owner: Owner = Depends(service.owner)) -> ModelCard:
        about = service.settings.about
        return ModelCard(model=service.settings.model_name, card=about.card, url=about.url)
