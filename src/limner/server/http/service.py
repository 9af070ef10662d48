"""The parts of a running server, as all routes share them: who calls, and jobs from requests.

Knows no wire schema.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from limner.engine.protocol import Backend
from limner.errors import InvalidRequest, NotFound
from limner.images import PreparedReference, expanded_size
from limner.outbound.client import OutboundClient
from limner.pipeline.together import canvases_of
from limner.references import CONTENT_KEY
from limner.requests import CONTROL_VALUES, EditRequest, repaints
from limner.server.access.keys import KeyRing, Owner
from limner.server.access.limits import Limiter
from limner.server.access.streams import Streams
from limner.server.http.aspect import is_of_aspect, size_of_aspect
from limner.server.http.pictures import PictureReader
from limner.server.http.result_urls import ResultUrls
from limner.server.http.settings import ServeSettings
from limner.server.jobs.known_references import KnownReferences
from limner.server.jobs.moderation import Moderation
from limner.server.jobs.offload import Offload
from limner.server.jobs.prefills import Prefills
from limner.server.jobs.records import (
    Handle,
    Job,
    JobOptions,
    JobPictures,
    JobRequest,
    check_idempotency_key,
    edit_request,
)
from limner.server.jobs.runner import JobRunner
from limner.server.jobs.store import JobStore
from limner.trust.safety import check_tolerance

__all__ = ["KEYS", "Service"]


KEYS = [
    Security(APIKeyHeader(name="x-key", scheme_name="key", auto_error=False)),
    Security(HTTPBearer(scheme_name="bearer", auto_error=False)),
]
"""For the OpenAPI document: the two ways to send a key. `Service.owner` reads and checks it."""


class _EventStream(StreamingResponse):
    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], *, close: Callable[[], None]) -> None:
        super().__init__(events, headers={"cache-control": "no-store"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


@dataclass(kw_only=True, eq=False, slots=True)
class Service:
    """The parts of a running server. `ready`: requests are taken."""

    engine: Backend
    jobs: JobStore
    runner: JobRunner
    prefills: Prefills
    known: KnownReferences
    moderation: Moderation
    offload: Offload
    pictures: PictureReader
    urls: ResultUrls
    keyring: KeyRing
    limiter: Limiter
    settings: ServeSettings
    outbound: OutboundClient | None
    streams: Streams
    ready: bool = False

    def refuse(self) -> None:
        """Begin a shutdown: not ready, and no more jobs are accepted. Accepted jobs go on."""
        self.ready = False
        self.runner.refuse()

    # who calls

    def owner(self, request: Request) -> Owner:
        """Return the owner of the key in a request. Raises `AccessDenied`."""
        owner = self.keyring.identify(request.headers)
        request.state.owner = owner
        return owner

    def paying(self, request: Request) -> Owner:
        """Return the owner of a request that makes work, and count it. Raises `AccessDenied` and `RateLimited`."""
        owner = self.owner(request)
        self.limiter.admit(owner)
        return owner

    def base_url(self, request: Request) -> str:
        """Return the address that callers use, without a slash at its end."""
        return (self.settings.public_url or str(request.base_url)).rstrip("/")

    def event_stream(self, owner: Owner, events: AsyncIterator[str]) -> Response:
        """Return events as an answer that is counted until it ends. Raises `RateLimited` if too many are open."""
        return _EventStream(events, close=self.streams.open(owner))

    # what is stored for an owner

    async def handle(self, owner: Owner, key: str) -> Handle:
        """Return references that this owner uploaded. Raises `NotFound`."""
        found = await self.offload.store(self.jobs.handle, owner.id, key) if CONTENT_KEY.fullmatch(key) else None
        if found is None:
            raise NotFound(f"references: {key[:80]!r} is not a handle of yours; POST /v1/references makes one")
        return found

    async def job(self, owner: Owner, id: str) -> Job:
        """Return a job of this owner. Raises `NotFound`."""
        found = await self.offload.store(self.jobs.get, id, owner=owner.id)
        if found is None:
            raise NotFound(f"id: {id[:80]!r} is not a job of yours, or was forgotten")
        return found

    async def canvas_size(self, owner: Owner, request: JobRequest) -> tuple[int, int] | None:
        """Return the (width, height) of what a request would repaint; None: it has no picture. Raises `NotFound`."""
        first = request.canvas or next(iter(request.pictures), None)
        if first is not None:
            return first.report.processed_size
        if request.handle is None:
            return None
        return (await self.handle(owner, request.handle)).references[0].processed_size

    # new jobs

    async def accept(self, owner: Owner, request: JobRequest) -> tuple[Job, bool]:
        """Write and queue the job that a caller of any dialect asks for. Return it, and whether it is new.

        Raises `InvalidRequest`, `NotFound`, `Conflict`, `BudgetSpent`, `RateLimited`, `QueueFull` and `CapacityError`.
        """
        check_idempotency_key(request.idempotency)
        check_tolerance(request.tolerance)
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
            if "\0" in text:  # some later readers would cut the text there
                raise InvalidRequest(name, f"has a NUL character at {text.index(chr(0))}; leave it out")
        references, options = await self._references(owner, request)
        pictures = JobPictures(references=references, canvas=request.canvas, mask=request.mask)
        job = self._make_job(owner, request, pictures, options)
        if request.mask is None:
            asked = edit_request(job, pictures)
        else:  # a large mask takes a while
            asked = await self.offload.run(edit_request, job, pictures)
        if job.repaints or job.canvas is not None:
            asked, size = await self._opened(job, asked)
            _check_size(request, size)
            job = replace(job, width=size[0], height=size[1])
        known = await self.offload.store(self.jobs.known, job)
        if known is not None:  # a repeated request takes no slot
            self.runner.resume(known)
            return known, False
        slot = self.limiter.hold(owner)
        return await self.runner.accept(job, pictures, slot, request=asked)

    async def _opened(self, job: Job, asked: EditRequest) -> tuple[EditRequest, tuple[int, int]]:
        """Return a request to the engine with its canvas planned, and the (width, height) of its pictures.

        Raises `InvalidRequest` where there is nothing to repaint, or too much, or it cannot be done.
        """
        first = job.canvas or next(iter(job.references), None)
        if first is None:
            name = "mask" if job.mask is not None else next(name for name in CONTROL_VALUES if name in job.control)
            raise InvalidRequest(name, "needs a picture to repaint; send canvas, or a picture")
        size, field = first.processed_size, "canvas"
        if expand := job.control.get("expand"):
            size, field = _expanded(size, expand), "expand"
        self.settings.check_canvas(size, num_images=len(job.seeds), field=field)
        field = "canvas" if job.mask is None else "mask"
        opened = functools.partial(self.engine.opened, asked)  # in a thread: large pictures take a while
        asked = await self.offload.decode(opened, field=field, owner=job.owner)
        (canvas, *_) = canvases_of(asked)
        assert canvas is not None
        return asked, canvas.picture.size if canvas.puts_back else canvas.size

    async def _references(self, owner: Owner, request: JobRequest) -> tuple[tuple[PreparedReference, ...], JobOptions]:
        """Return the pictures of a request or of its handle, and what the job notes of them."""
        options = JobOptions(base_url=request.base_url, without_effect=request.without_effect)
        if request.handle is None:
            return request.pictures, options
        if request.pictures:
            raise InvalidRequest("references", "a handle and pictures are both given; give one of them")
        handle = await self.handle(owner, request.handle)
        pictures = tuple([await self.offload.run(self.jobs.picture, report) for report in handle.references])
        is_checked = handle.tolerance == request.tolerance
        return pictures, replace(options, handle=request.handle, references_checked=is_checked)

    def _make_job(self, owner: Owner, request: JobRequest, pictures: JobPictures, options: JobOptions) -> Job:
        if not 1 <= request.num_images <= self.engine.max_batch:
            raise InvalidRequest("num_images", f"{request.num_images} images; 1 to {self.engine.max_batch} are allowed")
        is_repainted = repaints(request.control, mask=request.mask)
        size = (None, None) if is_repainted else self._size(request, pictures.references)
        first = secrets.randbelow(2**31) if request.seed is None else request.seed
        kind = self.engine.model.kind
        return Job(
            owner=owner.id,
            prompt=request.prompt,
            seeds=tuple(first + i for i in range(request.num_images)),
            drawn_seeds=request.seed is None,
            references=tuple(p.report for p in pictures.references),
            control=dict(request.control),
            canvas=None if request.canvas is None else request.canvas.report,
            mask=None if request.mask is None else request.mask.report,
            width=size[0],
            height=size[1],
            num_inference_steps=request.num_inference_steps or kind.num_inference_steps,
            guidance_scale=None if kind.distilled else request.guidance_scale,
            negative_prompt=None if kind.distilled else request.negative_prompt,
            priority=request.priority,
            timeout=request.timeout,
            tolerance=request.tolerance,
            output_format=request.output_format,
            quality=request.quality,
            options=options,
            webhook=request.webhook,
            idempotency=request.idempotency,
        )

    def _size(self, request: JobRequest, pictures: tuple[PreparedReference, ...]) -> tuple[int, int]:
        """Return the size of the result: what was asked for, else that in which image 1 is used, else the model's."""
        model = self.engine.model
        default = pictures[0].report.processed_size if pictures else model.default_size
        size = request.width or default[0], request.height or default[1]
        if request.aspect is not None:
            size = size_of_aspect(
                request.aspect, width=request.width, height=request.height, like=default, learned=model.sizes
            )
        if size[0] * size[1] > self.settings.max_output_pixels:
            raise InvalidRequest(
                "width", f"{size[0]}x{size[1]} is over the {self.settings.max_output_pixels} pixels that are allowed"
            )
        return size


def _expanded(size: tuple[int, int], expand: Any) -> tuple[int, int]:
    """Return the (width, height) of a picture with what is added to it. Raises `InvalidRequest` that names `expand`."""
    try:
        return expanded_size(size, **(expand if isinstance(expand, dict) else {"expand": expand}))
    except InvalidRequest as error:
        raise InvalidRequest("expand", error.problem) from None


def _check_size(request: JobRequest, size: tuple[int, int]) -> None:
    """Raise `InvalidRequest` where another size is asked for than what is repainted has."""
    for name, asked, side in zip(("width", "height"), (request.width, request.height), size, strict=True):
        if asked not in (None, side):
            raise InvalidRequest(
                name,
                "{} is asked for, and what is repainted comes back as {}x{}; leave the size out".format(asked, *size),
            )
    if request.aspect is not None and not is_of_aspect(size, request.aspect):
        raise InvalidRequest(
            "aspect_ratio", "what is repainted comes back as {}x{}; leave the aspect out".format(*size)
        )
