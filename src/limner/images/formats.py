"""The file formats of pictures: PNG, JPEG and WebP, their suffixes, media types and first bytes.

A format has one name, in lowercase: "png", "jpeg", "webp". Pillow writes it in capitals. Knows no pixels.
"""

from __future__ import annotations

__all__ = ["FORMATS", "MEDIA_TYPES", "PIL_FORMATS", "SUFFIXES", "format_of"]

# Name, media type, suffixes. The first suffix is the one that is written.
_TABLE = (
    ("png", "image/png", (".png",)),
    ("jpeg", "image/jpeg", (".jpg", ".jpeg")),
    ("webp", "image/webp", (".webp",)),
)

FORMATS = {suffix: name.upper() for name, _, suffixes in _TABLE for suffix in suffixes}
"""Pillow's name of the format by file suffix, with its dot. Files with these suffixes are read and written."""
SUFFIXES = {name: suffixes[0] for name, _, suffixes in _TABLE}
"""File suffix, with its dot, by format."""
MEDIA_TYPES = {name: media_type for name, media_type, _ in _TABLE}
"""Media type (RFC 9110) by format."""
PIL_FORMATS = tuple(name.upper() for name in SUFFIXES)
"""The formats under Pillow's names."""


def format_of(data: bytes) -> str | None:
    """Return the format of a picture file by its first bytes, or None for any other file."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
