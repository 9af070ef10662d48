"""Pictures of a request as references: read, limited in size and number, and prepared as the model reads them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

from limner import images
from limner.config import Fit
from limner.engine.protocol import Backend
from limner.errors import InvalidRequest
from limner.images import PreparedReference
from limner.outbound.client import OutboundClient
from limner.outbound.pictures import decode_picture, read_picture
from limner.server.http.settings import ServeSettings
from limner.server.jobs.offload import Offload

__all__ = ["PictureReader"]


class PictureReader:
    """Turn what callers send into references for the model of an engine. `outbound` fetches URLs, if settings allow."""

    def __init__(
        self, *, engine: Backend, offload: Offload, settings: ServeSettings, outbound: OutboundClient | None
    ) -> None:
        self._engine = engine
        self._offload = offload
        self._settings = settings
        self._outbound = outbound if settings.fetch_urls else None

    async def read_files(self, files: Mapping[str, bytes], *, fit: Fit | None = None) -> tuple[PreparedReference, ...]:
        """Prepare picture files, by the names that errors give them; `fit` None: as the service does.

        Raises `InvalidRequest`.
        """
        found = [await self._prepare(data, name=name, fit=fit) for name, data in files.items()]
        return self._check_number(tuple(found))

    async def read_texts(self, texts: Mapping[str, str], *, fit: Fit | None = None) -> tuple[PreparedReference, ...]:
        """Prepare pictures of a JSON body: base64, data URLs or, if that is allowed, URLs. As `read_files`."""
        found = []
        for name, text in texts.items():
            limit = self._settings.max_picture_bytes
            if ":" not in text[:64] or text[:5].lower() == "data:":  # in a thread: decoding megabytes takes a while
                read = functools.partial(decode_picture, text, max_bytes=limit, field=name)
                data = await self._offload.decode(read, field=name)
            else:
                data = await read_picture(text, client=self._outbound, max_bytes=limit, field=name)
            found.append(await self._prepare(data, name=name, fit=fit))
        return self._check_number(tuple(found))

    async def _prepare(self, data: bytes, *, name: str, fit: Fit | None) -> PreparedReference:
        limit = self._settings.max_picture_bytes
        if len(data) > limit:
            raise InvalidRequest(name, f"the file has {len(data)} bytes; at most {limit} are allowed")
        policy = self._engine.model.reference_policy
        policy = policy if fit is None else replace(policy, fit=fit)
        prepare = functools.partial(images.prepare_reference, data, policy=policy, field=name)
        return await self._offload.decode(prepare, field=name)

    def _check_number(self, pictures: tuple[PreparedReference, ...]) -> tuple[PreparedReference, ...]:
        limit = self._settings.max_references
        if len(pictures) > limit:
            raise InvalidRequest("references", f"{len(pictures)} pictures are over the {limit} that are allowed")
        return pictures
