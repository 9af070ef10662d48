"""Pictures of a request as references: read, limited in size and number, and prepared as the model reads them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from limner import images
from limner.config import Fit, ReferencePolicy
from limner.engine.protocol import Backend
from limner.errors import InvalidRequest
from limner.images import PreparedReference
from limner.outbound.client import OutboundClient
from limner.outbound.pictures import decode_picture, is_url, read_picture
from limner.server.access.keys import Owner
from limner.server.http.settings import ServeSettings
from limner.server.jobs.offload import Offload

__all__ = ["PictureReader", "SentPicture"]

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class SentPicture:
    """A picture as a caller sent it, and the field it came in: the bytes of a file, or text (base64, data URL, URL)."""

    field: str
    data: bytes | str


class PictureReader:
    """Turn what callers send into references for the model of an engine. `outbound` fetches URLs, if settings allow."""

    def __init__(
        self, *, engine: Backend, offload: Offload, settings: ServeSettings, outbound: OutboundClient | None
    ) -> None:
        self._engine = engine
        self._offload = offload
        self._settings = settings
        self._outbound = outbound if settings.fetch_urls else None

    async def read(
        self,
        sent: Sequence[SentPicture],
        *,
        owner: Owner,
        background: str | None = None,
        fit: Fit | None = None,
        first_whole: bool = False,
    ) -> tuple[PreparedReference, ...]:
        """Prepare pictures, in order. `background` is what this caller wants behind transparent ones, `fit` how they
        get to the grid; None: as the service does. `first_whole`: the first one is repainted, and stays as large as it is.

        Raises `InvalidRequest` that names the field of the caller, and which of its pictures if it has several.
        """
        if background is not None:
            images.background_colour(background)
        self._check_number(sent)
        fields, found = Counter(picture.field for picture in sent), []
        for number, picture in enumerate(sent, start=1):
            policy = self._policy(background=background, fit=fit)
            try:
                whole = first_whole and number == 1
                found.append(await self._prepare(picture, owner=owner, policy=policy, whole=whole))
            except InvalidRequest as error:
                if fields[picture.field] == 1 or error.field != picture.field:
                    raise
                problem = f"picture {number}: {error.problem}"
                raise InvalidRequest(picture.field, problem, code=error.code, index=number - 1) from None
        return tuple(found)

    async def read_canvas(self, sent: SentPicture, *, owner: Owner, background: str | None = None) -> PreparedReference:
        """Prepare a picture that is repainted, at its own size. Raises `InvalidRequest`."""
        return await self._prepare(sent, owner=owner, policy=self._policy(background=background), whole=True)

    async def read_mask(
        self, sent: SentPicture, *, owner: Owner, size: tuple[int, int], drawn: Literal["transparent", "white"]
    ) -> PreparedReference:
        """Read a mask over a picture of `size` (width, height), as a picture that is white where it is repainted.

        `drawn` says what marks such pixels in what was sent. Raises `InvalidRequest`, also where nothing is marked.
        """
        data = await self._bytes(sent, owner=owner)

        def read() -> PreparedReference:
            reader = images.read_mask if drawn == "white" else images.read_alpha_mask
            mask = reader(data, size=size, field=sent.field)
            images.check_marked(mask, field=sent.field, marked=drawn)
            return images.picture_of_mask(mask)

        return await self._decode(read, owner=owner, field=sent.field)

    def _policy(self, *, background: str | None, fit: Fit | None = None) -> ReferencePolicy:
        changes: dict[str, Any] = {"background": background, "fit": fit}
        policy = self._engine.model.reference_policy
        return replace(policy, **{name: value for name, value in changes.items() if value is not None})

    async def _prepare(
        self, sent: SentPicture, *, owner: Owner, policy: ReferencePolicy, whole: bool
    ) -> PreparedReference:
        data = await self._bytes(sent, owner=owner)
        ask = '"background": "white" in the request'

        def prepare() -> PreparedReference:
            if not whole:
                return images.prepare_reference(data, policy=policy, field=sent.field, ask_background=ask)
            canvas = images.prepare_canvas(data, policy=policy, field=sent.field, ask_background=ask)
            self._settings.check_canvas(canvas.report.processed_size, field=sent.field)
            return canvas

        return await self._decode(prepare, owner=owner, field=sent.field)

    async def _bytes(self, sent: SentPicture, *, owner: Owner) -> bytes:
        limit, data = self._settings.max_picture_bytes, sent.data
        if isinstance(data, str):
            if not is_url(data):  # in a thread: decoding megabytes takes a while
                read = functools.partial(decode_picture, data, max_bytes=limit, field=sent.field)
                data = await self._offload.decode(read, field=sent.field, owner=owner.id)
            else:
                data = await read_picture(data, client=self._outbound, max_bytes=limit, field=sent.field)
        if len(data) > limit:
            raise InvalidRequest(sent.field, f"the file has {len(data)} bytes; at most {limit} are allowed")
        return data

    async def _decode(self, call: Callable[[], _T], *, owner: Owner, field: str) -> _T:
        """Decode a picture. Errors name the field alone: callers read it as a name, without the size of the file."""
        try:
            return await self._offload.decode(call, field=field, owner=owner.id)
        except InvalidRequest as error:
            if error.field == field or not error.field.startswith(f"{field} "):
                raise
            raise error.of(field) from None

    def _check_number(self, sent: Sequence[SentPicture]) -> None:
        limit = self._settings.max_references
        if len(sent) > limit:
            raise InvalidRequest(sent[limit].field, f"{len(sent)} pictures are over the {limit} that are allowed")
