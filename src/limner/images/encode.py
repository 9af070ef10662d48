"""Encode pictures as files, with metadata, and write them whole or not at all. Knows nothing of models."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from limner.errors import InvalidRequest, OutputError
from limner.files import write_file
from limner.images.formats import FORMATS, PIL_FORMATS
from limner.images.metadata import save_options

__all__ = ["check_output", "encode", "numbered", "save"]


def check_output(path: str | os.PathLike[str]) -> Path:
    """Return the path if a picture can be written there; call it before work is spent on the picture.

    Raises `InvalidRequest` for another suffix than those of `FORMATS`, and `OutputError`.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InvalidRequest("output", f"{path} has to end in {', '.join(FORMATS)}")
    folder = path.parent
    try:
        possible = (
            not path.is_dir() and folder.is_dir() and os.access(folder, os.W_OK) and len(os.fsencode(path.name)) < 256
        )
    except (OSError, ValueError):  # the path is too long, or holds a NUL
        possible = False
    if not possible:
        raise OutputError(f"output: {path} cannot be written: {folder} has to be a folder that you may write to")
    return path


def numbered(path: Path, num_images: int) -> list[Path]:
    """Return the names of several images of one name: out-1.png, out-2.png, ...; of one image, the name itself."""
    if num_images == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{i}") for i in range(1, num_images + 1)]


def encode(
    image: Image.Image,
    format: str,  # noqa: A002
    *,
    metadata: Mapping[str, Any] | None = None,
    quality: int = 95,
) -> bytes:
    """Return the bytes of a picture file with `metadata` in it; `read_metadata` reads it back.

    `format` is PNG, JPEG or WEBP in any case; `quality` (1 to 100) is for the last two. JPEG and WebP hold 60,000 bytes
    of metadata; a prompt that is longer is replaced by its start, its length and its digest. Raises `InvalidRequest`.
    """
    kind = format.upper()
    if kind not in PIL_FORMATS:
        raise InvalidRequest("format", f"{format!r} is not written; use {', '.join(sorted(PIL_FORMATS))}")
    if not 1 <= quality <= 100:
        raise InvalidRequest("quality", f"{quality} is not within 1 to 100")
    options = save_options(metadata or {}, kind)
    if kind != "PNG":
        options["quality"] = quality
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def side_by_side(images: Sequence[Image.Image]) -> bytes:
    """Return pictures in one row as the bytes of a PNG."""
    row = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    return encode(row, "PNG")


def save(image: Image.Image, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a picture in the format of the path's suffix, encoded by `encode`. Raises as `check_output`."""
    path = check_output(path)
    write_file(path, encode(image, FORMATS[path.suffix.lower()], metadata=metadata))
