"""The metadata of a picture that Limner made: which values it has, and where a file of each format holds them.

In a PNG it is a text chunk named "limner"; in JPEG and WebP it is the EXIF image description, with "limner" as the
software. Either way it is JSON. Knows no pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from limner.version import __version__

__all__ = ["picture_metadata", "read_metadata", "save_options"]

_KEY = "limner"
_MAX_EXIF_BYTES = 60_000
_MAX_PROMPT = 4000
"""Characters of a prompt that stay in EXIF data that would be too long."""


def picture_metadata(*, prompt: str, seed: int | None, model: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of one picture; `model` is the digest of the weights, `more` what the pipeline reports."""
    return {"prompt": prompt, "seed": seed, "version": __version__, "model": model, **more}


def save_options(metadata: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the options of `PIL.Image.Image.save` that put metadata into a file of Pillow's format `kind`."""
    text = _to_json(metadata)
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text(_KEY, text)
        return {"pnginfo": info}
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = _KEY
    exif[ExifTags.Base.ImageDescription] = text if len(text) <= _MAX_EXIF_BYTES else _to_json(_shortened(metadata))
    return {"exif": exif}


def read_metadata(source: str | os.PathLike[str] | bytes) -> dict[str, Any]:
    """Return the metadata that Limner wrote into a picture file, given as path or bytes; {} if there is none."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        text = image.info.get(_KEY)
        if text is None and image.getexif().get(ExifTags.Base.Software) == _KEY:
            text = image.getexif().get(ExifTags.Base.ImageDescription)
    found = json.loads(text) if text and isinstance(text, str) else {}
    return found if isinstance(found, dict) else {}


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Return True for a picture file that has Limner's metadata; False for any other file, and one that cannot be read."""
    try:
        return bool(read_metadata(path))
    except (OSError, SyntaxError, ValueError, RecursionError, Image.DecompressionBombError):
        return False


def _to_json(metadata: Mapping[str, Any]) -> str:
    return json.dumps(dict(metadata), ensure_ascii=True, sort_keys=True)


def _shortened(metadata: Mapping[str, Any]) -> dict[str, Any]:
    prompt = str(metadata.get("prompt", ""))
    start = {
        "prompt": prompt[:_MAX_PROMPT],
        "prompt_length": len(prompt),
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
    }
    return {**metadata, **start}
