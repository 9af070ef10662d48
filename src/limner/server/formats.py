"""File suffixes and media types of results, by the name of their format; derived from the table of `limner.images`."""

from __future__ import annotations

from limner.images import FORMATS

__all__ = ["MEDIA_TYPES", "SUFFIXES"]

SUFFIXES: dict[str, str] = {}
"""Format to suffix without a dot: the first one that `FORMATS` has for it (jpeg: jpg)."""
for _suffix, _format in FORMATS.items():
    SUFFIXES.setdefault(_format.lower(), _suffix.removeprefix("."))
MEDIA_TYPES = {format_: f"image/{format_}" for format_ in SUFFIXES}
