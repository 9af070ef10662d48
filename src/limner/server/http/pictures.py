"""Pictures of a request as references: read, limited in size and number, and prepared as the model reads them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from limner import images
from limner.engine.protocol import Backend
from limner.errors import InvalidRequest
from limner.images import PreparedReference
from limner.server.access.keys import Owner
from limner.server.http.settings import ServeSettings
from limner.server.jobs.offload import Offload
from limner.server.outbound.client import OutboundClient
from limner.server.outbound.pictures import decode_picture, read_picture

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

    async def read_files(self, files: Mapping[str, bytes], *, owner: Owner) -> tuple[PreparedReference, ...]:
        """Prepare picture files, by the names that errors give them. Raises `InvalidRequest`."""
        return self._check_number(
            tuple([await self._prepare(data, name=name, owner=owner) for name, data in files.items()])
        )

    async def read_texts(self, texts: Mapping[str, str], *, owner: Owner) -> tuple[PreparedReference, ...]:
        """Prepare pictures of a JSON body: base64, data URLs or, if that is allowed, URLs. Raises `InvalidRequest`."""
        found = []
        for name, text in texts.items():
            limit = self._settings.max_picture_bytes
            if ":" not in text[:64] or text[:5].lower() == "data:":  # in a thread: decoding megabytes takes a while
                read = functools.partial(decode_picture, text, max_bytes=limit, field=name)
                data = await self._offload.decode(read, field=name, owner=owner.id)
            else:
                data = await read_picture(text, client=self._outbound, max_bytes=limit, field=name)
            found.append(await self._prepare(data, name=name, owner=owner))
        return self._check_number(tuple(found))

    async def _prepare(self, data: bytes, *, name: str, owner: Owner) -> PreparedReference:
        limit = self._settings.max_picture_bytes
        if len(data) > limit:
            raise InvalidRequest(name, f"the file has {len(data)} bytes; at most {limit} are allowed")
        policy = self._engine.model.reference_policy
        prepare = functools.partial(images.prepare_reference, data, policy=policy, field=name)
        return await self._offload.decode(prepare, field=name, owner=owner.id)

    def _check_number(self, pictures: tuple[PreparedReference, ...]) -> tuple[PreparedReference, ...]:
        limit = self._settings.max_references
        if len(pictures) > limit:
            raise InvalidRequest("references", f"{len(pictures)} pictures are over the {limit} that are allowed")
        return pictures
