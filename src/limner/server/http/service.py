"""What the routes of all dialects share: the parts of a running server, who calls, pictures and jobs from a request.

Owns the settings and the signed URLs of results. Knows no wire schema.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.requests import Request

from limner import images
from limner.config import ReferencePolicy
from limner.engine.protocol import Backend
from limner.errors import AccessDenied, InvalidRequest, NotFound
from limner.images import PreparedReference
from limner.server.access.keys import KeyRing, Limiter, LimitPolicy, Owner
from limner.server.jobs.records import Handle, Job, JobStore, check_idempotency_key
from limner.server.jobs.runner import SUFFIXES, JobRunner, RunnerSettings
from limner.server.outbound.client import OutboundClient, OutboundPolicy
from limner.server.outbound.pictures import decode_picture, read_picture
from limner.trust.safety import check_tolerance

__all__ = ["KEYS", "MEDIA_TYPES", "ServeSettings", "Service", "until_gone"]

_logger = logging.getLogger("limner.server")
_KEY = re.compile(r"[0-9a-f]{64}")
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


KEYS = [
    Security(APIKeyHeader(name="x-key", scheme_name="key", auto_error=False)),
    Security(HTTPBearer(scheme_name="bearer", auto_error=False)),
]
"""For the OpenAPI document: either way to send a key. `Service.owner` is what reads and checks it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """How a server works. Sizes in bytes, times in seconds. `data` is what a `JobStore` opens.

    `public_url` is what callers reach the server under, if it is not what their requests name. `fetch_urls`: pictures may
    be named by URL. `webhooks`: jobs may name a URL that hears of their end. `max_references` are those of a job,
    `max_handles` those that are kept for a key.
    """

    data: str | Path
    public_url: str | None = None
    max_body_bytes: int = 128 << 20
    max_buffered_bytes: int = 1 << 30
    body_seconds: float = 30.0
    max_picture_bytes: int = 20 << 20
    max_references: int = 16
    max_handles: int = 1000
    max_output_pixels: int = 4 << 20
    fetch_urls: bool = False
    webhooks: bool = True
    outbound: OutboundPolicy = field(default_factory=OutboundPolicy)
    limits: LimitPolicy = field(default_factory=LimitPolicy)
    runner: RunnerSettings = field(default_factory=RunnerSettings)
    model_name: str = "limner-stickers"


class Service:
    """The parts of a running server."""

    def __init__(
        self,
        *,
        engine: Backend,
        jobs: JobStore,
        runner: JobRunner,
        keyring: KeyRing,
        limiter: Limiter,
        settings: ServeSettings,
        outbound: OutboundClient | None,
    ) -> None:
        self.engine = engine
        self.jobs = jobs
        self.runner = runner
        self.keyring = keyring
        self.limiter = limiter
        self.settings = settings
        self.outbound = outbound
        self.ready = False

    def refuse(self) -> None:
        """The beginning of a shutdown: not ready, and no more jobs are taken; what was accepted goes on."""
        self.ready = False
        self.runner.refuse()

    @property
    def policy(self) -> ReferencePolicy:
        return self.engine.model.reference_policy

    # who calls

    def owner(self, request: Request) -> Owner:
        """The owner of the key in a request. Raises `AccessDenied`."""
        owner = self.keyring.identify(request.headers)
        request.state.owner = owner
        return owner

    def paying(self, request: Request) -> Owner:
        """The owner of a request that makes work, counted. Raises `AccessDenied` and `RateLimited`."""
        owner = self.owner(request)
        self.limiter.admit(owner)
        return owner

    # pictures

    async def prepare(self, data: bytes, *, name: str) -> PreparedReference:
        """The bytes of a picture file as a reference."""
        if len(data) > self.settings.max_picture_bytes:
            raise InvalidRequest(
                name, f"the file has {len(data)} bytes; at most {self.settings.max_picture_bytes} are allowed"
            )
        return await self.runner.aside(images.prepare_reference, data, policy=self.policy, field=name)

    async def prepare_texts(self, texts: Mapping[str, str]) -> tuple[PreparedReference, ...]:
        """Pictures that a JSON body names: base64, data URLs or, where that is switched on, URLs."""
        client = self.outbound if self.settings.fetch_urls else None
        found = []
        for name, text in texts.items():
            limit = self.settings.max_picture_bytes
            if ":" not in text[:64] or text[:5].lower() == "data:":  # decoding megabytes holds up the event loop
                data = await self.runner.aside(decode_picture, text, max_bytes=limit, field=name)
            else:
                data = await read_picture(text, client=client, max_bytes=limit, field=name)
            found.append(await self.prepare(data, name=name))
        return self.check_count(tuple(found))

    def check_count(self, pictures: tuple[PreparedReference, ...]) -> tuple[PreparedReference, ...]:
        if len(pictures) > self.settings.max_references:
            raise InvalidRequest(
                "references", f"{len(pictures)} pictures are over the {self.settings.max_references} that are allowed"
            )
        return pictures

    async def handle(self, owner: Owner, key: str) -> Handle:
        """References that this owner uploaded. Raises `NotFound`."""
        found = await self.runner.store(self.jobs.handle, owner.id, key) if _KEY.fullmatch(key) else None
        if found is None:
            raise NotFound(f"references: {key[:80]!r} is not a handle of yours; POST /v1/references makes one")
        return found

    # jobs

    async def accept(
        self,
        owner: Owner,
        *,
        prompt: str,
        seed: int | None,
        num_images: int = 1,
        pictures: tuple[PreparedReference, ...] = (),
        references: str | None = None,
        idempotency: str | None = None,
        **more: Any,
    ) -> tuple[Job, bool]:
        """A job that is written down and queued, and whether it is new; `references` is a handle instead of pictures.

        Raises what says why it was not accepted.
        """
        check_idempotency_key(idempotency)
        check_tolerance(more.get("tolerance", 2))
        if "\0" in prompt:  # cuts a text short in some of what reads it later
            raise InvalidRequest("prompt", f"has a NUL character at {prompt.index(chr(0))}; leave it out")
        options = dict(more.pop("options", {}))
        if references is not None:
            if pictures:
                raise InvalidRequest("references", "a handle and pictures are both given; give one of them")
            handle = await self.handle(owner, references)
            pictures = tuple([await self.runner.aside(self.jobs.picture, report) for report in handle.references])
            options["handle"] = references
            options["references_checked"] = handle.described.get("tolerance") == more.get("tolerance", 2)
        if not 1 <= num_images <= self.engine.max_batch:
            raise InvalidRequest("num_images", f"{num_images} images; 1 to {self.engine.max_batch} are allowed")
        first = secrets.randbelow(2**31) if seed is None else seed
        job = Job(
            owner=owner.id,
            prompt=prompt,
            seeds=tuple(first + i for i in range(num_images)),
            drawn_seeds=seed is None,
            references=tuple(p.report for p in pictures),
            idempotency=idempotency,
            options=options,
            **more,
        )
        width, height = self._size(job, pictures)
        if width * height > self.settings.max_output_pixels:
            raise InvalidRequest(
                "width", f"{width}x{height} is over the {self.settings.max_output_pixels} pixels that are allowed"
            )
        job = replace(job, width=width, height=height)
        known = await self.runner.store(self.jobs.known, job)
        if known is not None:  # asked for again, it takes no place
            self.runner.resume(known)
            return known, False
        slot = self.limiter.hold(owner)
        return await self.runner.accept(job, pictures, slot)

    def _size(self, job: Job, pictures: Sequence[PreparedReference]) -> tuple[int, int]:
        first = pictures[0].report.processed_size if pictures else self.engine.model.default_size
        return job.width or first[0], job.height or first[1]

    async def job(self, owner: Owner, id: str) -> Job:
        """A job of this owner. Raises `NotFound`."""
        found = await self.runner.store(self.jobs.get, id, owner=owner.id)
        if found is None:
            raise NotFound(f"id: {id[:80]!r} is not a job of yours, or was forgotten")
        return found

    # results

    def base_url(self, request: Request) -> str:
        return (self.settings.public_url or str(request.base_url)).rstrip("/")

    def result_urls(self, job: Job, base: str) -> list[str]:
        """A URL for each picture of a job, that whoever has it may read until the result expires."""
        suffix, expires = SUFFIXES[job.output_format], int(job.expires or 0)
        urls = []
        for number in range(1, len(job.result.get("files", [])) + 1):
            signature = self._signature(job.id, number, expires)
            query = urlencode({"expires": expires, "signature": signature})
            urls.append(f"{base}/v1/results/{job.id}/{number}.{suffix}?{query}")
        return urls

    def check_signature(self, id: str, number: int, expires: int, signature: str) -> None:
        """Raises `AccessDenied` for a URL that was not made here, or is over."""
        right = self._signature(id, number, expires)
        if not hmac.compare_digest(right.encode(), signature.encode("utf-8", "surrogatepass")):
            raise AccessDenied("signature: this URL was not made here, or was changed", missing=False)
        if expires <= time.time():
            raise NotFound("expires: this result has expired; ask for the picture again")

    def _signature(self, id: str, number: int, expires: int) -> str:
        text = f"{id}/{number}/{expires}".encode()
        return hmac.new(self._url_key, text, hashlib.sha256).hexdigest()

    @functools.cached_property
    def _url_key(self) -> bytes:
        return hmac.new(self.jobs.secret, b"result urls", hashlib.sha256).digest()


async def until_gone(request: Request) -> None:
    """Returns when the caller has closed the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.25)
