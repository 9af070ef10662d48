"""Answers of the OpenAI Images dialect: pictures in one body, or as a stream of events.

Knows nothing of how a request is read.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from starlette.requests import Request

from limner import grid
from limner.errors import Cancelled, DeadlineExceeded, LimnerError, Moderated, NotFound, QueueFull
from limner.server.dialects.job_view import cache_report
from limner.server.dialects.openai_schemas import Generation
from limner.server.http.errors import answer_of
from limner.server.http.service import Service
from limner.server.jobs.records import Job
from limner.server.jobs.updates import Update

__all__ = ["Answer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer to one request, whose job is accepted. `cancel`: a caller who goes away cancels the job."""

    service: Service
    request: Request
    fields: Generation
    kind: Literal["image_generation", "image_edit"]
    job: Job
    cancel: bool

    async def body(self) -> dict[str, Any]:
        """Wait for the job and return its pictures. Raises what the job ended with, and `Cancelled`."""
        return await self._images(await self._wait())

    async def _wait(self) -> Job:
        """Wait for the end of the job, or until the caller has gone."""
        runner = self.service.runner
        ended = asyncio.ensure_future(runner.wait(self.job.id))
        gone = asyncio.ensure_future(_until_gone(self.request))
        try:
            await asyncio.wait({ended, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                if self.cancel:
                    runner.cancel(self.job.id)
                raise Cancelled("the caller has gone")
            return self._found(ended.result())
        finally:
            gone.cancel()
            ended.cancel()

    def _found(self, job: Job | None) -> Job:
        if job is None:
            raise NotFound(f"id: {self.job.id} was forgotten")
        return job

    async def _images(self, job: Job) -> dict[str, Any]:
        _raise_unless_ready(job)
        service = self.service
        data: list[dict[str, Any]] = []
        if self.fields.response_format == "url":
            data = [{"url": url} for url in service.urls.of(job, service.base_url(self.request))]
        else:
            for number in range(1, len(job.seeds) + 1):
                file = await service.offload.run(service.jobs.read_result, job, number)
                if file is None:
                    raise NotFound(f"id: the result of {job.id} has expired")
                data.append({"b64_json": base64.b64encode(file).decode()})
        return {
            "created": int(job.created),
            "data": data,
            **_shape(job),
            "usage": _usage(job),
            "limner": {
                "model": service.settings.model_name,
                **cache_report(job),
                "warnings": self._warnings(job),
                "seeds": job.result["seeds"],
            },
        }

    def _warnings(self, job: Job) -> list[str]:
        """Return the warnings of a job; that of its size in the words of this dialect, where the caller used them."""
        warnings: list[str] = job.result.get("warnings", [])
        if self.fields.size in (None, "auto"):
            return warnings
        model = self.service.engine.model
        default = job.references[0].processed_size if job.references else model.default_size
        size = job.result["width"], job.result["height"]
        return grid.in_words(warnings, size, model.sizes, default=default, field="size")

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events: previews of the first image, evenly over the steps, then each finished picture.

        The request says how many previews (`partial_images`).
        """
        is_over = False
        common = {"created_at": int(self.job.created), **_shape(self.job)}
        try:
            async with contextlib.aclosing(self._previews(common)) as previews:
                async for event in previews:
                    yield event
            is_over = True
            ended = self._found(await self.service.runner.wait(self.job.id))
            body = await self._images(ended)
            for image in body["data"]:
                event_body = {**image, **common, "usage": body["usage"], "limner": body["limner"]}
                yield _event(f"{self.kind}.completed", event_body)
        except LimnerError as error:  # the status was sent with the first event
            _, content, _ = answer_of(self.request.url.path, error)
            yield _event("error", content)
        finally:
            if self.cancel and not is_over:
                self.service.runner.cancel(self.job.id)

    async def _previews(self, common: dict[str, Any]) -> AsyncGenerator[str, None]:
        shown = 0
        async with contextlib.aclosing(self.service.runner.watch(self.job.id, idle=15)) as updates:
            async for update in updates:
                if update is None:
                    yield ": waiting\n\n"
                elif update.state == "running" and update.previews and update.step in self._shown_steps(update):
                    data = await self.service.offload.run(_enlarge, update.previews[0], self.job)
                    event = {"partial_image_index": shown, "b64_json": base64.b64encode(data).decode(), **common}
                    yield _event(f"{self.kind}.partial_image", event)
                    shown += 1

    def _shown_steps(self, update: Update) -> set[int]:
        """Return the steps after which a preview is sent; of a picture that is drawn over, fewer steps are drawn."""
        return _preview_steps(self.fields.partial_images or 0, update.num_inference_steps)


async def _until_gone(request: Request) -> None:
    """Wait until the caller has closed the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.25)


def _raise_unless_ready(job: Job) -> None:
    """Raise the error that a job ended with."""
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


def _shape(job: Job) -> dict[str, Any]:
    return {
        "output_format": job.output_format,
        "size": f"{job.width}x{job.height}",
        "quality": "auto",
        "background": "opaque",
    }


def _usage(job: Job) -> dict[str, Any]:
    """Return the number of tokens that the model read and drew."""
    text = job.result["prompt"]["num_tokens"]
    pictures = grid.num_tokens(*(report["processed_size"] for report in job.result["references"]))
    canvas = job.result.get("canvas")  # of which a part may be drawn, at another scale
    drawn_size = canvas["drawn_size"] if canvas else (job.result["width"], job.result["height"])
    drawn = len(job.seeds) * grid.num_tokens(drawn_size)
    return {
        "total_tokens": text + pictures + drawn,
        "input_tokens": text + pictures,
        "output_tokens": drawn,
        "input_tokens_details": {"text_tokens": text, "image_tokens": pictures},
    }


def _event(kind: str, values: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **values})}\n\n"


def _preview_steps(num: int, num_inference_steps: int) -> set[int]:
    """Return the steps after which a preview is sent: `num` of them, evenly spread, never the last."""
    before = num_inference_steps - 1
    num = min(num, before)
    return {round((i + 1) * num_inference_steps / (num + 1)) for i in range(num)} & set(range(1, num_inference_steps))


def _enlarge(preview: bytes, job: Job) -> bytes:
    """Scale a preview to the size of the result, or what fits in it if a part of a picture is drawn."""
    with Image.open(io.BytesIO(preview)) as image:
        assert job.width is not None
        assert job.height is not None
        scale = min(job.width / image.width, job.height / image.height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        large = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    large.save(buffer, job.output_format.upper())
    return buffer.getvalue()
