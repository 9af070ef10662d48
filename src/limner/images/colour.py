"""Pictures with a colour profile to sRGB, whose numbers the model reads.

Owns what becomes of an ICC profile and how that is said. A profile never makes a picture fail, but where the numbers mean
nothing without it (CMYK). Knows nothing of references.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

__all__ = ["to_srgb"]

_MAX_PROFILE_BYTES = 4 << 20
"""Profiles of printers have up to 3 MB."""
_SAME = 2
"""A profile that changes no channel of a colour by more than this, of 255, is sRGB: its profiles round differently."""
_MAX_NAME = 60
_ALPHA = {"RGBA": "RGB", "LA": "L", "PA": "RGB", "RGBa": "RGB", "La": "L"}
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
"""The colour space of a profile for a picture, by the picture's mode."""


def to_srgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """Return the picture in sRGB, and what was done with its profile; (the picture itself, None) if it is in sRGB already.

    A picture without a profile is taken to be in sRGB, as by browsers. Rendering is perceptual, the default of Pillow.
    """
    data = image.info.get("icc_profile")
    if not data:
        return image, None
    if not isinstance(data, bytes) or len(data) > _MAX_PROFILE_BYTES:
        return image, f"not used: it has over {_MAX_PROFILE_BYTES} bytes"
    try:
        return _convert(image, data)
    except Exception as error:  # Pillow raises many types for damaged profiles, and one for a build without LittleCMS
        return image, f"not used: it cannot be read ({_short(str(error)) or type(error).__name__})"


def _convert(image: Image.Image, data: bytes) -> tuple[Image.Image, str | None]:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    space = profile.profile.xcolor_space.strip()
    name = _short(profile.profile.profile_description or "") or "without a name"
    colours, alpha = _split(image, gray=space == "GRAY")
    if space != _SPACES.get(colours.mode):
        return image, f"{name}, not used: it is for {space} pictures, this one is {image.mode}"
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), colours.mode, "RGB")
    if colours.mode != "CMYK" and _is_same(transform, colours.mode):
        return image, None
    converted = ImageCms.applyTransform(colours, transform)
    assert converted is not None
    if alpha is not None:
        converted.putalpha(alpha)
    kept = {key: value for key, value in image.info.items() if key not in ("icc_profile", "transparency")}
    converted.info = kept  # the orientation is among it
    return converted, f"{name}, converted to sRGB"


def _split(image: Image.Image, *, gray: bool) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours of a picture as L, RGB or CMYK, and its transparency if it has any."""
    kind = "L" if gray and image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("LA" if kind == "L" else "RGBA")
        return image.convert(kind), image.getchannel("A")
    if image.mode in ("1", "L", "P"):
        image = image.convert(kind)
    return image, None


def _is_same(transform: Any, mode: str) -> bool:
    """Return True if a transform changes no colour of a grid of all colours by more than rounding."""
    if mode == "L":
        probe = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    else:
        levels = np.linspace(0, 255, 18).round().astype(np.uint8)
        probe = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3))
    found = ImageCms.applyTransform(probe, transform)
    assert found is not None
    difference = np.asarray(found).astype(int) - np.asarray(probe.convert("RGB")).astype(int)
    return bool(np.abs(difference).max() <= _SAME)


def _short(text: str) -> str:
    """Return a text of a file as it can be printed on one line."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:_MAX_NAME].strip()
