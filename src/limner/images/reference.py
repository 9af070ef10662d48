"""Prepare a reference picture for the model: turn it upright, flatten it, scale it under the cap, crop it to the grid.

Nothing is changed silently: `ReferenceReport` says what was done. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageColor

from limner.config import ReferencePolicy
from limner.errors import InvalidRequest
from limner.grid import PIXELS
from limner.images.decode import check_header, decode, describe_source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PreparedReference", "ReferenceReport", "open_picture", "prepare_reference", "upright"]

_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns a picture upright, by its EXIF orientation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceReport:
    """What was done to one reference. Sizes are (width, height); `cut` counts pixels (left, top, right, bottom)."""

    original_size: tuple[int, int]
    oriented: bool
    resized_to: tuple[int, int] | None
    cut: tuple[int, int, int, int]
    processed_size: tuple[int, int]
    digest: str

    def describe(self) -> str:
        """Return the report as one line of text."""
        parts = ["{}x{}".format(*self.original_size)]
        parts += ["turned upright (EXIF)"] if self.oriented else []
        parts += ["scaled to {}x{}".format(*self.resized_to)] if self.resized_to else []
        parts += ["cut {} left, {} top, {} right, {} bottom".format(*self.cut)] if any(self.cut) else []
        return ", ".join([*parts, "used as {}x{}".format(*self.processed_size)])


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PreparedReference:
    """A reference as the model reads it: `data` are its RGB bytes, row by row."""

    data: bytes
    report: ReferenceReport

    def computed_digest(self) -> str:
        """Return the SHA-256 in hex of size and pixels; it equals the report's unless one of them was changed."""
        return _digest(self.data, self.report.processed_size)

    @property
    def pixels(self) -> Tensor:
        """The pixels as a new tensor, (3, height, width) uint8. A cached reference needs its digest alone."""
        import torch  # imported here: reading the metadata of a file needs no torch

        width, height = self.report.processed_size
        values = np.frombuffer(self.data, np.uint8).reshape(height, width, 3)
        return torch.from_numpy(values.transpose(2, 0, 1).copy())


def prepare_reference(
    image: Image.Image | str | os.PathLike[str] | bytes | PreparedReference,
    *,
    policy: ReferencePolicy,
    field: str = "image",
) -> PreparedReference:
    """Return a reference as the model reads it: upright RGB, scaled down if over the cap, cropped to multiples of 16.

    The crop keeps the middle. A prepared reference is returned unchanged. Raises `InvalidRequest` that names `field`.
    """
    if isinstance(image, PreparedReference):
        return image
    image, field = open_picture(image, field=field)
    rgb, oriented = _upright_rgb(image, background=policy.background, field=field)
    _check_size(rgb.size, policy, field=field)
    rgb, resized = _scale_down(rgb, policy, field=field)
    width, height = rgb.size
    size = (width // PIXELS * PIXELS, height // PIXELS * PIXELS)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    if size != (width, height):
        rgb = rgb.crop((left, top, left + size[0], top + size[1]))
    data = rgb.tobytes()
    return PreparedReference(
        data=data,
        report=ReferenceReport(
            original_size=image.size,
            oriented=oriented,
            resized_to=resized,
            cut=(left, top, width - size[0] - left, height - size[1] - top),
            processed_size=size,
            digest=_digest(data, size),
        ),
    )


def open_picture(image: Image.Image | str | os.PathLike[str] | bytes, *, field: str) -> tuple[Image.Image, str]:
    """Return the decoded picture, and the field with the file's name, for messages. Raises `InvalidRequest`."""
    if isinstance(image, (str, os.PathLike, bytes)):
        return decode(image, field=field), f"{field} {describe_source(image)}"
    if not isinstance(image, Image.Image):
        raise InvalidRequest(field, f"{type(image).__name__} is not a picture; give a PIL image, a file name or bytes")
    check_header(image, b"", field=field)
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidRequest(field, f"the picture is truncated or damaged ({error}); save it again") from None
    return image, field


def _upright_rgb(image: Image.Image, *, background: str | None, field: str) -> tuple[Image.Image, bool]:
    """Return the picture as RGB with its EXIF orientation applied, and True if that changed it."""
    image, oriented = upright(image, field=field)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _flatten(image.convert("RGBA"), background=background, field=field), oriented
    if image.mode in ("RGB", "L", "P", "1"):
        return image if image.mode == "RGB" else image.convert("RGB"), oriented
    remedy = {"CMYK": "convert it to RGB with its colour profile", "YCCK": "convert it to RGB"}
    raise InvalidRequest(field, f"its colour mode is {image.mode}; {remedy.get(image.mode, 'save it as 8 bit RGB')}")


def upright(image: Image.Image, *, field: str) -> tuple[Image.Image, bool]:
    """Return the picture with its EXIF orientation applied, and True if that changed it. Raises `InvalidRequest`."""
    transpose = _TRANSPOSES.get(_orientation(image, field=field))
    return (image, False) if transpose is None else (image.transpose(transpose), True)


def _orientation(image: Image.Image, *, field: str) -> int:
    """Return the EXIF orientation, 1 to 8; 0 if there is none. The rest of the EXIF data is not used."""
    try:
        if data := image.info.get("exif"):
            # getexif() gives nothing for data that failed to parse when the file was opened; load() raises
            Image.Exif().load(data)
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # Pillow raises many types here
        raise InvalidRequest(field, f"its EXIF data is damaged ({error}); save it again") from None
    return orientation if isinstance(orientation, int) else 0


def _flatten(image: Image.Image, *, background: str | None, field: str) -> Image.Image:
    """Return an RGBA picture as RGB, over `background` where it is transparent."""
    if image.getchannel("A").getextrema() != (255, 255):
        if background is None:
            raise InvalidRequest(
                field,
                "it is transparent in places; flatten it, or say what stands behind it: "
                "ReferencePolicy(background='white'), --background white",
            )
        try:
            colour = ImageColor.getrgb(background)[:3]
        except ValueError:
            raise InvalidRequest("background", f"{background!r} is not a colour; use white or #ffffff") from None
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*colour, 255)), image)
    return image.convert("RGB")


def _check_size(size: tuple[int, int], policy: ReferencePolicy, *, field: str) -> None:
    width, height = size
    if min(size) < policy.min_side:
        raise InvalidRequest(
            field, f"{width}x{height} is too small; each side has to be at least {policy.min_side} pixels"
        )
    if max(width / height, height / width) > policy.max_aspect:
        raise InvalidRequest(field, f"{width}x{height} is too long; the aspect may be {policy.max_aspect:g}:1, crop it")


def _scale_down(
    image: Image.Image, policy: ReferencePolicy, *, field: str
) -> tuple[Image.Image, tuple[int, int] | None]:
    """Return the picture with at most `policy.pixels` pixels, and its new size (None: it was small enough)."""
    width, height = image.size
    if width * height <= policy.pixels:
        return image, None
    # int() and LANCZOS as in diffusers 0.42.1, Flux2ImageProcessor._resize_to_target_area
    factor = math.sqrt(policy.pixels / (width * height))
    resized = (int(width * factor), int(height * factor))
    if min(resized) < PIXELS:
        raise InvalidRequest(
            field,
            f"{width}x{height} would be scaled to {resized[0]}x{resized[1]}, under {PIXELS} pixels; raise "
            f"max_pixels={policy.pixels}",
        )
    return image.resize(resized, Image.Resampling.LANCZOS), resized


def _digest(data: bytes, size: tuple[int, int]) -> str:
    digest = hashlib.sha256(f"{size[0]}x{size[1]}:".encode())
    digest.update(data)
    return digest.hexdigest()
