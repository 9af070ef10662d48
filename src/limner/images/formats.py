"""The file formats of pictures: PNG, JPEG and WebP, their suffixes, media types and first bytes.

A format has one name, in lowercase: "png", "jpeg", "webp". Pillow writes it in capitals. Of other files it is known what
they are and how a picture is made of them. Knows no pixels.
"""

from __future__ import annotations

import re

__all__ = ["FORMATS", "MEDIA_TYPES", "PIL_FORMATS", "SUFFIXES", "format_of", "other_file"]

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


_MAGICK = "convert it, as with: magick FILE picture.png"
# First bytes, what such a file is, and what makes a picture of it.
_OTHERS = (
    (rb".{4}ftyp(?:avif|avis)", "an AVIF picture", "convert it, as with: avifdec FILE picture.png"),
    (
        rb".{4}ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)",
        "a HEIC picture, as phones take them",
        "export it as JPEG, or convert it, as with: heif-convert FILE picture.png",
    ),
    (
        rb".{4}ftypcrx |II\*\0.{4}CR\x02|IIU\0|IIRO|IIRS|FUJIFILMCCD-RAW|FOVb|\0MRM",
        "a camera's raw file",
        "develop it to a PNG or JPEG, as with: darktable-cli FILE picture.png",
    ),
    (
        rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF.{4}AVI ",
        "a video",
        "save one frame, as with: ffmpeg -i FILE -vframes 1 picture.png",
    ),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture", "convert it, as with: djxl FILE picture.png"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture", _MAGICK),
    (rb"GIF8[79]a", "a GIF", "save one frame as PNG, as with: magick 'FILE[0]' picture.png"),
    (
        rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
        "a TIFF, or a camera's raw file that is made like one",
        "save one page as PNG, as with: magick 'FILE[0]' picture.png",
    ),
    (rb"BM", "a BMP picture", _MAGICK),
    (rb"\0\0[\x01\x02]\0", "an icon (ICO)", _MAGICK),
    (rb"8BPS", "a Photoshop file", "export it as PNG"),
    (rb"v/1\x01|#\?R", "a picture of high dynamic range (OpenEXR, HDR)", "export it as PNG with 8 bits a channel"),
    (rb"%PDF", "a PDF", "save one page as PNG, as with: pdftoppm -png -singlefile FILE picture"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file", "export it as PNG"),
    (rb"\s*(?:<\?xml.*)?<svg[\s>]", "an SVG drawing", "draw it, as with: rsvg-convert FILE -o picture.png"),
    (rb"\s*<(?:!(?:doctype|DOCTYPE) html|html|HTML)", "a web page (HTML)", "download the picture itself"),
    (rb"version https://git-lfs", "a pointer of Git LFS", "fetch the picture itself: git lfs pull"),
    (
        rb".{5}\0\0\0\{|GGUF",
        "a file of weights or a pack",
        "a pack is given instead of pictures (limner edit --references FILE)",
    ),
    (rb"PK\x03\x04|7z\xbc\xaf|Rar!|\x1f\x8b", "an archive", "unpack it"),
    (rb"$", "an empty file", "save or download it again"),
)
_HEAD = 4096
"""Bytes of the start of a file that say what it is."""


def other_file(data: bytes) -> tuple[str, str] | None:
    """Return what a file is that is no PNG, JPEG or WebP, by its first bytes, and what makes a picture of it."""
    head = data[:_HEAD]
    return next(
        ((what, remedy) for start, what, remedy in _OTHERS if re.match(b"(?s:" + start + b")", head) is not None), None
    )
