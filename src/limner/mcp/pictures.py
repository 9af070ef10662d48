"""Pictures that an assistant names: files of the allowed folder, kept references, base64 and, if allowed, URLs.

Reads and prepares them in threads, so that the event loop goes on. Knows no tools.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import anyio
import numpy as np
from anyio import to_thread

from limner.config import ReferencePolicy
from limner.errors import InvalidRequest
from limner.images import MAX_FILE_BYTES, PreparedReference, check_marked, prepare_canvas, prepare_reference, read_mask
from limner.mcp.folder import AllowedFolder
from limner.mcp.inputs import MAX_PICTURES
from limner.mcp.kept import KeptReferences
from limner.outbound.client import OutboundClient
from limner.outbound.pictures import decode_picture, fetch_picture

__all__ = ["URI", "PictureReader"]

T = TypeVar("T")
_ASK_BACKGROUND = "limner mcp is started with --background white"
URI = re.compile(r"limner://references/([^/]+)(?:/([1-9][0-9]{0,3})\.png)?")
"""All pictures that are kept under a name, or one of them."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}:")
_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|UklGR)[A-Za-z0-9+/=\s]{40,}")
"""The first bytes of a PNG, JPEG or WebP file in base64, and no dot: no path of a picture looks so."""


class PictureReader:
    """Turns the texts of a call into references. Without a `folder` paths are refused, without `outbound` URLs are."""

    def __init__(
        self,
        *,
        policy: ReferencePolicy,
        kept: KeptReferences,
        folder: AllowedFolder | None,
        outbound: OutboundClient | None,
    ) -> None:
        self._policy = policy
        self._kept = kept
        self._folder = folder
        self._outbound = outbound
        self._slots = anyio.CapacityLimiter(2)  # a decoded picture may have hundreds of megabytes

    async def read(
        self, texts: Sequence[str], *, field: str = "pictures", first_whole: bool = False
    ) -> tuple[PreparedReference, ...]:
        """Return the references that texts name, in order. Raises `InvalidRequest`.

        `first_whole`: the first one is repainted, and stays as large as it is; a kept one stays as it is kept.
        """
        found: list[PreparedReference] = []
        for i, text in enumerate(texts, start=1):
            found += await self._read(text, field=f"{field} {i}", whole=first_whole and i == 1)
        if len(found) > MAX_PICTURES:
            raise InvalidRequest(field, f"{len(found)} pictures are over the {MAX_PICTURES} that are allowed")
        return tuple(found)

    async def _read(self, text: str, *, field: str, whole: bool) -> Sequence[PreparedReference]:
        if text.startswith("limner:"):
            return self._of_uri(text, field=field)
        return [await self.in_thread(self._prepare, await self._bytes(text, field=field), field=field, whole=whole)]

    async def read_canvas(self, text: str, *, field: str = "canvas") -> PreparedReference:
        """Return a picture to repaint: a kept one as it is kept, others at their own size. Raises `InvalidRequest`."""
        found = await self._read(text, field=field, whole=True)
        if len(found) != 1:
            raise InvalidRequest(field, f"{text!r} are {len(found)} pictures; name one, as {text}/1.png")
        return found[0]

    async def read_mask(self, text: str, *, size: tuple[int, int], field: str = "mask") -> np.ndarray:
        """Return a mask over a picture of `size` (width, height): (height, width) uint8. Raises `InvalidRequest`."""
        if text.startswith("limner:"):
            raise InvalidRequest(field, "no masks are kept; give a file of the allowed folder, or base64")
        mask = await self.in_thread(read_mask, await self._bytes(text, field=field), size=size, field=field)
        check_marked(mask, field=field)
        return mask

    def _of_uri(self, uri: str, *, field: str) -> Sequence[PreparedReference]:
        match = URI.fullmatch(uri)
        if match is None:
            raise InvalidRequest(field, f"{uri!r} is not limner://references/NAME or limner://references/NAME/1.png")
        kept = self._kept.get(match[1], field=field)
        if match[2] is None:
            return kept.pictures
        number = int(match[2])
        if number > len(kept.pictures):
            raise InvalidRequest(field, f"{match[1]!r} holds {len(kept.pictures)} pictures; there is no {number}")
        return kept.pictures[number - 1 : number]

    async def _bytes(self, text: str, *, field: str) -> bytes:
        if text[:5].lower() == "data:" or (_BASE64.match(text) and "." not in text):
            return await self.in_thread(decode_picture, text, max_bytes=MAX_FILE_BYTES, field=field)
        if text[:5].lower() != "file:" and _SCHEME.match(text):
            return await self._fetch(text, field=field)
        if self._folder is None:
            raise InvalidRequest(
                field, "no folder is allowed; start limner mcp with --folder DIR, or give the picture as base64"
            )
        return await self.in_thread(self._folder.read, text, field=field)

    async def _fetch(self, url: str, *, field: str) -> bytes:
        if self._outbound is None:
            raise InvalidRequest(
                field,
                "pictures by URL are not fetched; give a path in the allowed folder or base64, or start limner mcp with "
                "--fetch-urls",
            )
        return await fetch_picture(url, client=self._outbound, max_bytes=MAX_FILE_BYTES, field=field)

    def _prepare(self, data: bytes, *, field: str, whole: bool) -> PreparedReference:
        prepare = prepare_canvas if whole else prepare_reference
        return prepare(data, policy=self._policy, field=field, ask_background=_ASK_BACKGROUND)

    async def in_thread(self, function: Callable[..., T], *arguments: object, **named: object) -> T:
        """Run what reads, decodes or encodes a picture."""
        return await to_thread.run_sync(functools.partial(function, *arguments, **named), limiter=self._slots)
