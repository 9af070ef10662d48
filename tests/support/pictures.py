"""Picture files for tests, good ones and hostile ones."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, chunks: bytes) -> bytes:
    """A PNG with more chunks behind its header."""
    return png[:33] + chunks + png[33:]


def with_segments(jpeg: bytes, segments: bytes) -> bytes:
    """A JPEG with more segments at its start."""
    return jpeg[:2] + segments + jpeg[2:]


def with_scans(image: Image.Image, more: int, *, before: bytes = b"", quality: int = 75) -> bytes:
    """A progressive JPEG whose last scan is there so many times more, each time behind `before`."""
    data = encoded(image, "JPEG", progressive=True, quality=quality)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + (before + last) * more + data[-2:]


def png_header(width: int, height: int, *, depth: int = 8) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )
