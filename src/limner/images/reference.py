"""Prepare a reference picture for the model: sRGB, upright, without transparency, under the cap, on the grid.

Nothing is changed silently: `ReferenceReport` says what was done. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageColor

from limner.config import ReferencePolicy
from limner.errors import InvalidRequest
from limner.grid import PIXELS
from limner.images.colour import to_srgb
from limner.images.fit import Box, fit_picture
from limner.images.sources import PictureSource, as_list, open_picture

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ASK_BACKGROUND",
    "ASK_MAX_PIXELS",
    "Picture",
    "PreparedReference",
    "ReferenceReport",
    "background_colour",
    "prepare_canvas",
    "prepare_reference",
    "prepare_references",
    "put_back",
    "upright",
]

ASK_BACKGROUND = "reference_policy=ReferencePolicy(background='white')"
"""How a caller in Python says what stands behind transparent pictures."""
ASK_MAX_PIXELS = "ReferencePolicy(max_pixels=...), --max-pixels"
"""How a caller in Python, or who starts a command, has references made smaller."""
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
_TINY = 1e-6
"""Of a pixel: what floating point adds to an edge that is on a pixel's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceReport:
    """What was done to one reference. Sizes are (width, height), boxes (left, top, right, bottom).

    `cut` and `added` count pixels on each side of the scaled picture. `upright_size` is the size after turning, where it
    is not `original_size`. `profile` says what was done with a colour profile that is not sRGB's. `origin` (x, y) is where
    its corner is in the picture that is drawn, for what is known of an expanded canvas: whole tokens.
    """

    original_size: tuple[int, int]
    oriented: bool
    resized_to: tuple[int, int] | None
    cut: Box
    processed_size: tuple[int, int]
    digest: str
    added: Box = (0, 0, 0, 0)
    upright_size: tuple[int, int] | None = None
    profile: str | None = None
    origin: tuple[int, int] = (0, 0)

    @property
    def box(self) -> Box:
        """Where the picture is in the processed one, in pixels: all of it, unless it was padded."""
        width, height = self.processed_size
        return (self.added[0], self.added[1], width - self.added[2], height - self.added[3])

    @property
    def source_box(self) -> tuple[float, float, float, float]:
        """Which part of the upright original is in `box`, in its pixels: fractions of them where it was scaled."""
        width, height = self.upright_size or self.original_size
        scaled = self.resized_to or (width, height)
        left, top, right, bottom = self.cut
        return (
            left * width / scaled[0],
            top * height / scaled[1],
            (scaled[0] - right) * width / scaled[0],
            (scaled[1] - bottom) * height / scaled[1],
        )

    def as_stored(self) -> dict[str, Any]:
        """Return the report without fields at their defaults, so that those of plain pictures are what they always were."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}

    def as_json(self) -> dict[str, Any]:
        """Return the report with both boxes, for JSON; `origin` only where it is another than the corner."""
        values = {**asdict(self), "box": self.box, "source_box": self.source_box}
        return values if any(self.origin) else {name: value for name, value in values.items() if name != "origin"}

    def describe(self) -> str:
        """Return the report as one line of text."""
        parts = ["{}x{}".format(*self.original_size)]
        parts += [f"colour profile {self.profile}"] if self.profile else []
        parts += ["turned upright (EXIF)"] if self.oriented else []
        parts += ["scaled to {}x{}".format(*self.resized_to)] if self.resized_to else []
        parts += ["cut {} left, {} top, {} right, {} bottom".format(*self.cut)] if any(self.cut) else []
        parts += ["padded {} left, {} top, {} right, {} bottom".format(*self.added)] if any(self.added) else []
        place = " at {}, {} of the picture".format(*self.origin) if any(self.origin) else ""
        return ", ".join([*parts, "used as {}x{}".format(*self.processed_size) + place])


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PreparedReference:
    """A reference as the model reads it: `data` are its RGB bytes, row by row."""

    data: bytes
    report: ReferenceReport

    def computed_digest(self) -> str:
        """Return the SHA-256 in hex of size, origin and pixels; it equals the report's unless one of them was changed."""
        return _digest(self.data, self.report.processed_size, self.report.origin)

    def part(self, box: Box) -> PreparedReference:
        """Return a part (left, top, right, bottom) of it that stays in its place; the box is on the grid of tokens."""
        width, height = self.report.processed_size
        left, top, right, bottom = box
        if any(side % PIXELS for side in box) or not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(f"the box {box} is not a part of {width}x{height} on the grid of {PIXELS} pixels")
        data = Image.frombytes("RGB", (width, height), self.data).crop(box).tobytes()
        size, origin = (right - left, bottom - top), (left, top)
        digest = _digest(data, size, origin)
        return PreparedReference(
            data=data,
            report=ReferenceReport(
                original_size=size,
                oriented=False,
                resized_to=None,
                cut=(0, 0, 0, 0),
                processed_size=size,
                digest=digest,
                origin=origin,
            ),
        )

    @property
    def pixels(self) -> Tensor:
        """The pixels as a new tensor, (3, height, width) uint8. A cached reference needs its digest alone."""
        import torch  # imported here: reading the metadata of a file needs no torch

        width, height = self.report.processed_size
        values = np.frombuffer(self.data, np.uint8).reshape(height, width, 3)
        return torch.from_numpy(values.transpose(2, 0, 1).copy())


Picture: TypeAlias = PictureSource | PreparedReference
"""A reference as callers have it, or as it was prepared."""


def prepare_reference(
    image: Picture, *, policy: ReferencePolicy, field: str = "image", ask_background: str = ASK_BACKGROUND
) -> PreparedReference:
    """Return a reference as the model reads it: upright sRGB, under the cap, on the grid as `policy.fit` says.

    A prepared reference is returned unchanged. Raises `InvalidRequest` that names `field`.
    `ask_background` is how this caller can say what stands behind a transparent picture, for that error.
    """
    if isinstance(image, PreparedReference):
        return image
    read = _read(image, policy=policy, field=field, ask_background=ask_background)
    fitted = fit_picture(read.rgb, policy, field=read.field)
    return _prepared(read, fitted.image, resized_to=fitted.resized_to, cut=fitted.cut, added=fitted.added)


def prepare_canvas(
    image: Picture, *, policy: ReferencePolicy, field: str = "canvas", ask_background: str = ASK_BACKGROUND
) -> PreparedReference:
    """Return a picture that is repainted: upright sRGB without transparency, at its own size, on no grid and under no cap.

    What is refused of a reference is refused of it too. Raises `InvalidRequest` that names `field`.
    """
    if isinstance(image, PreparedReference):
        return image
    read = _read(image, policy=policy, field=field, ask_background=ask_background)
    return _prepared(read, read.rgb)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Read:
    """A picture as RGB and upright, what was done to it, and how messages name it."""

    rgb: Image.Image
    size: tuple[int, int]
    oriented: bool
    profile: str | None
    field: str


def _read(image: PictureSource, *, policy: ReferencePolicy, field: str, ask_background: str) -> _Read:
    opened, field = open_picture(image, field=field)
    converted, profile = to_srgb(opened)
    try:
        rgb, oriented = _upright_rgb(
            converted, background=policy.background, field=field, ask_background=ask_background
        )
    except InvalidRequest as error:
        if profile is None:
            raise
        problem = str(error).removeprefix(f"{field}: ")
        raise InvalidRequest(field, f"{problem} (its colour profile: {profile})") from None
    _check_size(rgb.size, policy, field=field)
    return _Read(rgb=rgb, size=opened.size, oriented=oriented, profile=profile, field=field)


def _prepared(
    read: _Read,
    image: Image.Image,
    *,
    resized_to: tuple[int, int] | None = None,
    cut: Box = (0, 0, 0, 0),
    added: Box = (0, 0, 0, 0),
) -> PreparedReference:
    data = image.tobytes()
    return PreparedReference(
        data=data,
        report=ReferenceReport(
            original_size=read.size,
            oriented=read.oriented,
            resized_to=resized_to,
            cut=cut,
            processed_size=image.size,
            digest=_digest(data, image.size),
            added=added,
            upright_size=None if read.rgb.size == read.size else read.rgb.size,
            profile=read.profile,
        ),
    )


def prepare_references(image: Any, *, policy: ReferencePolicy) -> tuple[PreparedReference, ...]:
    """Prepare a picture, or an ordered list of them, for image 1, 2, ... Raises `InvalidRequest`."""
    pictures = [image] if isinstance(image, PreparedReference) else as_list(image)
    return tuple(
        prepare_reference(picture, policy=policy, field=f"image {i}") for i, picture in enumerate(pictures, start=1)
    )


def put_back(result: Image.Image, original: PictureSource, report: ReferenceReport) -> Image.Image:
    """Return the upright original, in sRGB, with a result of the reference's processed size in the place it was taken from.

    Every pixel of the original that the reference did not have stays as it is: what was cut, and of a scaled reference
    the pixels at the border that it had in part. What was padded is left out. Raises `InvalidRequest`.
    """
    if result.size != report.processed_size:
        raise InvalidRequest(
            "result",
            f"is {result.size[0]}x{result.size[1]}, the reference was used as {report.processed_size[0]}x"
            f"{report.processed_size[1]}; draw in that size",
        )
    opened, field = open_picture(original, field="original")
    whole = to_srgb(opened)[0]
    transpose = _TRANSPOSES.get(_orientation(whole, field=field))
    whole = (whole if transpose is None else whole.transpose(transpose)).convert("RGB")
    if whole.size != (report.upright_size or report.original_size):
        raise InvalidRequest("original", f"is {whole.size[0]}x{whole.size[1]}, not the picture of the report")
    left, top, right, bottom = report.source_box
    target = (math.ceil(left - _TINY), math.ceil(top - _TINY), math.floor(right + _TINY), math.floor(bottom + _TINY))
    part = result.convert("RGB").crop(report.box)
    x, y = part.width / (right - left), part.height / (bottom - top)
    size = (target[2] - target[0], target[3] - target[1])
    if part.size != size:
        inside = (
            max(0.0, (target[0] - left) * x),
            max(0.0, (target[1] - top) * y),
            min(part.width, (target[2] - left) * x),
            min(part.height, (target[3] - top) * y),
        )
        part = part.resize(size, Image.Resampling.LANCZOS, box=inside)
    whole.paste(part, target[:2])
    return whole


def _upright_rgb(
    image: Image.Image, *, background: str | None, field: str, ask_background: str
) -> tuple[Image.Image, bool]:
    """Return the picture as RGB with its EXIF orientation applied, and True if that changed it."""
    image, oriented = upright(image, field=field)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return _flatten(image, background=background, field=field, ask_background=ask_background), oriented
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


def background_colour(text: str) -> tuple[int, ...]:
    """Return the red, green and blue of a colour name or "#rrggbb". Raises `InvalidRequest` that names `background`."""
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise InvalidRequest("background", f"{text!r} is not a colour; use white or #ffffff") from None


def _flatten(image: Image.Image, *, background: str | None, field: str, ask_background: str) -> Image.Image:
    """Return an RGBA picture as RGB, over `background` where it is transparent."""
    if image.getchannel("A").getextrema() != (255, 255):
        if background is None:
            raise InvalidRequest(
                field,
                f"it is transparent in places; flatten it, or say what stands behind it: {ask_background}",
                code="transparent",
            )
        colour = background_colour(background)
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


def _digest(data: bytes, size: tuple[int, int], origin: tuple[int, int] = (0, 0)) -> str:
    place = f"+{origin[0]}+{origin[1]}" if any(origin) else ""
    digest = hashlib.sha256(f"{size[0]}x{size[1]}{place}:".encode())
    digest.update(data)
    return digest.hexdigest()
