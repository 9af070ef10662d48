"""Limits of picture files, checked on their structure before a decoder sees them: what a small file may make a decoder do.

Reads segments and chunks of JPEG, PNG and WebP (RFC 9649) as far as their lengths say. Knows no pixels. A file that is
damaged ends the reading; to say so is the decoder's part.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

from limner.errors import InvalidRequest
from limner.images.formats import format_of

__all__ = [
    "MAX_BLOCKS",
    "MAX_DECODED_PIXELS",
    "MAX_EXIF_BYTES",
    "MAX_FILE_BYTES",
    "MAX_METADATA_BYTES",
    "MAX_PIXEL_CHUNKS",
    "MAX_SCANS",
    "MAX_SCAN_PIXELS",
    "check_animation",
    "check_size",
    "check_structure",
]

MAX_FILE_BYTES = 256 << 20
"""Larger files are not read."""
MAX_DECODED_PIXELS = 64 * 1000 * 1000
"""Pictures with more pixels are refused before they are decoded."""
MAX_SCANS = 100
"""Scans of a JPEG. A scan may have a few bytes and costs a pass over all pixels, so libjpeg-turbo's djpeg has -maxscans.

Its own progressive files have 10 scans, and optimizers write some tens.
"""
MAX_SCAN_PIXELS = 20 * MAX_DECODED_PIXELS
"""Scans times pixels of a JPEG: 20 scans of the largest picture, some seconds of work."""
MAX_BLOCKS = 1000
"""Segments of a JPEG, chunks of a WebP, and those chunks of a PNG that have no pixels. A file has a few dozen at most."""
MAX_PIXEL_CHUNKS = 100_000
"""IDAT chunks of a PNG. libpng writes 8 KiB in each, which makes 32,768 of the largest file."""
MAX_METADATA_BYTES = 16 << 20
"""Bytes of everything in a file that is not pixels, inflated. Depth maps and previews have some megabytes."""
MAX_EXIF_BYTES = 1 << 20
"""Bytes of EXIF data. A JPEG segment holds 64 KiB; the values may overlap, and so take far more when they are read."""

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not a stuffed byte, a restart or a fill byte
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN, _END = 0xDA, 0xD9


def check_structure(data: bytes, *, field: str) -> None:
    """Refuse a file whose structure asks for too much work or memory. Raises `InvalidRequest` that names `field`."""
    kind = format_of(data)
    if kind == "jpeg":
        _check_jpeg(data, field=field)
    elif kind == "png":
        _check_png(data, field=field)
    elif kind == "webp":
        _check_webp(data, field=field)


def check_size(width: int, height: int, *, field: str) -> None:
    """Refuse a picture with too many pixels. Raises `InvalidRequest`."""
    if width * height > MAX_DECODED_PIXELS:
        raise InvalidRequest(field, f"{width}x{height} is over {MAX_DECODED_PIXELS} pixels; scale it down")


def check_animation(num_frames: int, *, field: str) -> None:
    """Refuse a picture with several frames. Raises `InvalidRequest`."""
    if num_frames > 1:
        remedy = "save one frame, as with: magick 'FILE[0]' picture.png"
        raise InvalidRequest(field, f"it is animated ({num_frames} frames); {remedy}")


class _Metadata:
    """Counts what a file has besides its pixels, and refuses what is over the limits."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._num_blocks = self._num_bytes = self._exif_bytes = 0

    @property
    def left(self) -> int:
        """Bytes that are still allowed."""
        return MAX_METADATA_BYTES - self._num_bytes

    def count(self, num_bytes: int, *, exif: bool = False) -> None:
        self._num_blocks += 1
        self._num_bytes += num_bytes
        self._exif_bytes += num_bytes if exif else 0
        if self._num_blocks > MAX_BLOCKS:
            raise self._refusal(f"it has over {MAX_BLOCKS} blocks of data besides its pixels, which is the limit")
        if self._exif_bytes > MAX_EXIF_BYTES:
            raise self._refusal(f"its EXIF data has {self._exif_bytes} bytes; at most {MAX_EXIF_BYTES} are allowed")
        if self._num_bytes > MAX_METADATA_BYTES:
            raise self._refusal(
                f"its metadata (text, profiles, EXIF, XMP) has over {MAX_METADATA_BYTES} bytes, which is the limit"
            )

    def _refusal(self, problem: str) -> InvalidRequest:
        return InvalidRequest(self._field, f"{problem}; save it again without metadata")


def _check_jpeg(data: bytes, *, field: str) -> None:
    metadata, num_scans, size = _Metadata(field), 0, (0, 0)
    for marker, segment in _jpeg_segments(data):
        is_exif = marker == 0xE1 and segment.startswith(b"Exif\0\0")
        metadata.count(len(segment) if marker >= 0xE0 else 0, exif=is_exif)
        num_scans += marker == _SCAN
        if marker in _FRAME_HEADERS and len(segment) >= 5:
            height, width = struct.unpack_from(">HH", segment, 1)
            size = max(size, (width, height), key=lambda size: size[0] * size[1])
    check_size(*size, field=field)
    allowed = min(MAX_SCANS, MAX_SCAN_PIXELS // max(size[0] * size[1], 1))
    if num_scans > allowed:
        raise InvalidRequest(
            field,
            f"it has {num_scans} scans; at most {allowed} are allowed at {size[0]}x{size[1]}; save it again, as a baseline "
            "JPEG or a PNG",
        )


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield each marker, and its segment without the length, up to the end of the picture."""
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        marker, at = data[found.start() + 1], found.end()
        if marker == _END:
            return
        if marker < 0xC0 or marker == 0xD8:  # has no segment; what libjpeg skips after such a marker are two bytes
            yield marker, b""
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        yield marker, data[at + 2 : at + max(length, 2)]
        at += max(length, 2)


def _check_png(data: bytes, *, field: str) -> None:
    metadata, num_pixel_chunks = _Metadata(field), 0
    for kind, at, length in _png_chunks(data):
        if kind == b"IDAT":
            num_pixel_chunks += 1
            if num_pixel_chunks > MAX_PIXEL_CHUNKS:
                raise InvalidRequest(field, f"it has over {MAX_PIXEL_CHUNKS} IDAT chunks, the limit; save it again")
            continue
        if kind == b"acTL" and length >= 4:
            check_animation(int.from_bytes(data[at : at + 4], "big"), field=field)
        metadata.count(length, exif=kind == b"eXIf")
        if (start := _deflated_from(kind, data[at : at + length])) is not None:
            metadata.count(_inflated_size(data[at + start : at + length], limit=metadata.left + 1))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and length of the data of each chunk, up to the end of the picture."""
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        yield kind, at + 8, length
        at += 12 + length


def _deflated_from(kind: bytes, chunk: bytes) -> int | None:
    """Return where the deflated part of a chunk begins, or None if nothing in it is deflated."""
    name_end = chunk.find(b"\0")
    if kind in (b"zTXt", b"iCCP"):
        return name_end + 2
    if kind == b"iTXt" and chunk[name_end + 1 : name_end + 2] != b"\0":
        language_end = chunk.find(b"\0", name_end + 3)
        return chunk.find(b"\0", language_end + 1) + 1
    return None


def _inflated_size(data: bytes, *, limit: int) -> int:
    """Return how many bytes these are when inflated, at most `limit`; 0 if they are damaged."""
    try:
        return len(zlib.decompressobj().decompress(data, limit))
    except zlib.error:
        return 0


def _check_webp(data: bytes, *, field: str) -> None:
    metadata, num_frames = _Metadata(field), 0
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    at = 12
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, at)
        at += 8
        if kind == b"VP8X" and length >= 10:
            width, height = (1 + int.from_bytes(data[at + i : at + i + 3], "little") for i in (4, 7))
            check_size(width, height, field=field)
        num_frames += kind == b"ANMF"
        has_pixels = kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF")
        metadata.count(0 if has_pixels else length, exif=kind == b"EXIF")
        at += length + length % 2
    check_animation(num_frames, field=field)
