"""Pictures in and out: decoding with limits, what happens to a reference, saving with metadata.

Owns the formats (PNG, JPEG, WebP), the limits that are checked before decoding, resizing and cropping, and the metadata
of a saved picture. Nothing is changed silently: `ReferenceReport` says what happened. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageColor, PngImagePlugin, UnidentifiedImageError

from limner.config import ReferencePolicy
from limner.errors import InvalidRequest, OutputError
from limner.files import write_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FORMATS",
    "MAX_DECODED_PIXELS",
    "MAX_FILE_BYTES",
    "PreparedReference",
    "ReferenceReport",
    "check_output",
    "decode",
    "encode",
    "prepare_reference",
    "printable",
    "read_metadata",
    "save",
    "to_pil",
    "to_pixels",
]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""File endings and the formats that are read and written."""
MAX_FILE_BYTES = 256 << 20
"""Larger files are not read."""
MAX_DECODED_PIXELS = 64 * 1000 * 1000
"""Pictures with more pixels are refused before they are decoded."""
_METADATA_KEY = "limner"
_GRID = 16
_EXIF_BYTES = 60_000
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by its EXIF orientation; the rest of its EXIF is not looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceReport:
    """What happened to one reference. Sizes are (width, height); `cut` counts pixels (left, top, right, bottom)."""

    original_size: tuple[int, int]
    oriented: bool
    resized_to: tuple[int, int] | None
    cut: tuple[int, int, int, int]
    processed_size: tuple[int, int]
    digest: str

    def describe(self) -> str:
        """One line for people."""
        parts = ["{}x{}".format(*self.original_size)]
        parts += ["turned upright (EXIF)"] if self.oriented else []
        parts += ["scaled to {}x{}".format(*self.resized_to)] if self.resized_to else []
        parts += ["cut {} left, {} top, {} right, {} bottom".format(*self.cut)] if any(self.cut) else []
        return ", ".join([*parts, "used as {}x{}".format(*self.processed_size)])


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PreparedReference:
    """The pixels of a processed reference, as RGB bytes row by row, and how they came to be."""

    data: bytes
    report: ReferenceReport

    def computed_digest(self) -> str:
        """SHA-256 in hex of size and pixels; that of the report, unless somebody changed one of them."""
        return _digest(self.data, self.report.processed_size)

    @property
    def pixels(self) -> Tensor:
        """(3, height, width) uint8; made when asked for: a reference whose K/V are kept needs its digest alone."""
        import torch  # here: who reads the metadata of a file needs none of it

        width, height = self.report.processed_size
        values = np.frombuffer(self.data, np.uint8).reshape(height, width, 3)
        return torch.from_numpy(values.transpose(2, 0, 1).copy())


def decode(source: str | os.PathLike[str] | bytes, *, field: str = "image") -> Image.Image:
    """A file or bytes to a picture, fully decoded. Raises `InvalidRequest` that names `field` and the remedy."""
    shown = _shown(source)
    try:
        if not isinstance(source, bytes):
            path = Path(source)
            if path.exists() and not path.is_file():
                raise InvalidRequest(field, f"{shown} is not a file; give a picture file")
            if path.stat().st_size > MAX_FILE_BYTES:
                raise InvalidRequest(field, f"{shown} is over {MAX_FILE_BYTES} bytes; scale it down")
        data = source if isinstance(source, bytes) else path.read_bytes()
    except ValueError as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(field, f"{shown} is not a file name ({error})") from None
    except OSError as error:
        raise InvalidRequest(
            field, f"{shown} cannot be read ({error.strerror or error}); give a picture file"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower, and an error
            image = Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values())))
    except UnidentifiedImageError:
        raise InvalidRequest(field, f"{shown} is not a PNG, JPEG or WebP picture; convert it to one") from None
    except Image.DecompressionBombError as error:
        raise InvalidRequest(field, f"{shown}: {error}; at most {MAX_DECODED_PIXELS} pixels are allowed") from None
    except Exception as error:  # decoders raise what they stumble over: struct.error, EOFError, KeyError, ...
        raise InvalidRequest(field, f"{shown} is damaged ({error}); save it again") from None
    _check_header(image, data, field=f"{field} {shown}")
    try:
        image.load()
    except Exception as error:
        raise InvalidRequest(field, f"{shown} is truncated or damaged ({error}); save it again") from None
    return image


def _check_header(image: Image.Image, data: bytes, *, field: str) -> None:
    """Refuses, before any pixel is decoded, what would have to be guessed at."""
    width, height = image.size
    if width * height > MAX_DECODED_PIXELS:
        raise InvalidRequest(field, f"{width}x{height} is over {MAX_DECODED_PIXELS} pixels; scale it down")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a JPEG with previews behind it
        raise InvalidRequest(field, f"it is animated ({image.n_frames} frames); save one frame")  # type: ignore[attr-defined]
    if image.format == "PNG" and len(data) > 24 and data[24] == 16:
        raise InvalidRequest(field, "it has 16 bits a channel; save it with 8")


def _upright_rgb(image: Image.Image, *, background: str | None, field: str) -> tuple[Image.Image, bool]:
    """The picture as RGB with its EXIF orientation applied, and whether that changed it."""
    try:
        if data := image.info.get("exif"):
            Image.Exif().load(
                data
            )  # raises where getexif() gives nothing, having failed once while the file was opened
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # of many kinds: the file says what is read as what
        raise InvalidRequest(field, f"its EXIF data is damaged ({error}); save it again") from None
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    oriented = turn is not None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
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
        return image.convert("RGB"), oriented
    if image.mode in ("RGB", "L", "P", "1"):
        return image if image.mode == "RGB" else image.convert("RGB"), oriented
    remedy = {"CMYK": "convert it to RGB with its colour profile", "YCCK": "convert it to RGB"}
    raise InvalidRequest(field, f"its colour mode is {image.mode}; {remedy.get(image.mode, 'save it as 8 bit RGB')}")


def _shown(source: str | os.PathLike[str] | bytes) -> str:
    """How a message names a source."""
    return f"({len(source)} bytes)" if isinstance(source, bytes) else printable(os.fspath(source))


def printable(text: str) -> str:
    """A file name that any terminal and log can take."""
    return os.fsencode(text).decode("utf-8", "replace")


def prepare_reference(
    image: Image.Image | str | os.PathLike[str] | bytes | PreparedReference,
    *,
    policy: ReferencePolicy,
    field: str = "image",
) -> PreparedReference:
    """A reference as the model reads it: upright RGB, scaled down if over the cap, its middle cut to multiples of 16.

    One that was prepared before is given back as it is.
    """
    if isinstance(image, PreparedReference):
        return image
    if isinstance(image, (str, os.PathLike, bytes)):
        name = f"{field} {_shown(image)}"
        image = decode(image, field=field)
        field = name
    elif isinstance(image, Image.Image):
        _check_header(image, b"", field=field)
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise InvalidRequest(field, f"the picture is truncated or damaged ({error}); save it again") from None
    else:
        raise InvalidRequest(field, f"{type(image).__name__} is not a picture; give a PIL image, a file name or bytes")
    original = image.size
    rgb, oriented = _upright_rgb(image, background=policy.background, field=field)
    width, height = rgb.size
    if min(width, height) < policy.min_side:
        raise InvalidRequest(
            field, f"{width}x{height} is too small; each side has to be at least {policy.min_side} pixels"
        )
    if max(width / height, height / width) > policy.max_aspect:
        raise InvalidRequest(field, f"{width}x{height} is too long; the aspect may be {policy.max_aspect:g}:1, crop it")
    resized = None
    if width * height > policy.pixels:
        # int() and LANCZOS as in diffusers 0.42.1, Flux2ImageProcessor._resize_to_target_area
        factor = math.sqrt(policy.pixels / (width * height))
        resized = (int(width * factor), int(height * factor))
        if min(resized) < _GRID:
            raise InvalidRequest(
                field,
                f"{width}x{height} would be scaled to {resized[0]}x{resized[1]}, under 16 pixels; raise "
                f"max_pixels={policy.pixels}",
            )
        rgb = rgb.resize(resized, Image.Resampling.LANCZOS)
        width, height = resized
    kept = (width // _GRID * _GRID, height // _GRID * _GRID)
    left, top = (width - kept[0]) // 2, (height - kept[1]) // 2
    if kept != (width, height):
        rgb = rgb.crop((left, top, left + kept[0], top + kept[1]))
    data = rgb.tobytes()
    return PreparedReference(
        data=data,
        report=ReferenceReport(
            original_size=original,
            oriented=oriented,
            resized_to=resized,
            cut=(left, top, width - kept[0] - left, height - kept[1] - top),
            processed_size=kept,
            digest=_digest(data, kept),
        ),
    )


def _digest(data: bytes, size: tuple[int, int]) -> str:
    digest = hashlib.sha256(f"{size[0]}x{size[1]}:".encode())
    digest.update(data)
    return digest.hexdigest()


def to_pixels(pixels: Tensor) -> Tensor:
    """uint8 (3, height, width) to float32 (1, 3, height, width) in [-1, 1], by the steps that diffusers takes."""
    return pixels[None].float() / 255.0 * 2.0 - 1.0


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, height, width) in [0, 1] to PIL pictures."""
    values = (pictures.float().permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(value) for value in values]


def check_output(path: str | os.PathLike[str]) -> Path:
    """A path that a picture can be written to, checked before work is spent on the picture."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InvalidRequest("output", f"{path} has to end in {', '.join(FORMATS)}")
    folder = path.parent
    try:
        possible = (
            not path.is_dir() and folder.is_dir() and os.access(folder, os.W_OK) and len(os.fsencode(path.name)) < 256
        )
    except (OSError, ValueError):  # too long a path, a NUL in it
        possible = False
    if not possible:
        raise OutputError(f"output: {path} cannot be written: {folder} has to be a folder that you may write to")
    return path


def encode(
    image: Image.Image,
    format: str,  # noqa: A002
    *,
    metadata: Mapping[str, Any] | None = None,
    quality: int = 95,
) -> bytes:
    """A picture as the bytes of a file, `metadata` with it; `read_metadata` reads it back.

    `format` is PNG, JPEG or WEBP in any case; `quality` (1 to 100) is for the last two. JPEG and WebP take 60,000 bytes
    of metadata; of a longer prompt they get the start, and its length and digest. Raises `InvalidRequest`.
    """
    kind = format.upper()
    if kind not in FORMATS.values():
        raise InvalidRequest("format", f"{format!r} is not written; use {', '.join(sorted(set(FORMATS.values())))}")
    if not 1 <= quality <= 100:
        raise InvalidRequest("quality", f"{quality} is not within 1 to 100")
    text = json.dumps(dict(metadata or {}), ensure_ascii=True, sort_keys=True)
    buffer = io.BytesIO()
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text(_METADATA_KEY, text)
        image.save(buffer, kind, pnginfo=info)
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.Software] = _METADATA_KEY
        exif[ExifTags.Base.ImageDescription] = text if len(text) <= _EXIF_BYTES else _shortened(metadata or {})
        image.save(buffer, kind, quality=quality, exif=exif)
    return buffer.getvalue()


def save(image: Image.Image, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> None:
    """Saves a picture as its ending says, as `encode` makes it."""
    path = check_output(path)
    write_file(path, encode(image, FORMATS[path.suffix.lower()], metadata=metadata))


def _shortened(metadata: Mapping[str, Any]) -> str:
    prompt = str(metadata.get("prompt", ""))
    start = {
        "prompt": prompt[:4000],
        "prompt_length": len(prompt),
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
    }
    return json.dumps({**metadata, **start}, ensure_ascii=True, sort_keys=True)


def read_metadata(source: str | os.PathLike[str] | bytes) -> dict[str, Any]:
    """The metadata that `save` or `encode` wrote, or {}; from a file or its bytes."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        text = image.info.get(_METADATA_KEY)
        if text is None and image.getexif().get(ExifTags.Base.Software) == _METADATA_KEY:
            text = image.getexif().get(ExifTags.Base.ImageDescription)
    found = json.loads(text) if text else {}
    return found if isinstance(found, dict) else {}
