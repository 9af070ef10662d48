"""One table of formats for the server."""

from __future__ import annotations

from limner.server.formats import MEDIA_TYPES, SUFFIXES


def test_suffixes_and_media_types() -> None:
    assert SUFFIXES == {"png": "png", "jpeg": "jpg", "webp": "webp"}
    assert MEDIA_TYPES == {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
    assert list(MEDIA_TYPES) == ["png", "jpeg", "webp"]  # the order of the OpenAPI document
