"""Pictures as answers: only the caller's own programs may cache them."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response

from limner.errors import NotFound
from limner.images import ReferenceReport
from limner.server.http.service import Service

__all__ = ["picture_answer", "reference_answer"]

_HEADERS = {"cache-control": "private, max-age=600", "x-content-type-options": "nosniff"}


def picture_answer(data: bytes, media_type: str) -> Response:
    """Answer with a picture file."""
    return Response(data, media_type=media_type, headers=_HEADERS)


async def reference_answer(service: Service, references: Sequence[ReferenceReport], number: int) -> Response:
    """Answer with the PNG file of a reference, counted from 1. Raises `NotFound`."""
    if not 1 <= number <= len(references):
        raise NotFound(f"number: {number} is not within 1 to {len(references)}")
    data = await service.offload.run(service.jobs.picture_png, references[number - 1].digest)
    return picture_answer(data, "image/png")
