"""Masks: which pixels of a canvas are repainted, as (height, width) uint8; 255 is repainted, 0 is kept.

Reads pictures, files, arrays and tensors, and refuses what could be meant in two ways. Knows nothing of models.
"""

from __future__ import annotations

import os
import sys
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from limner.config import ReferencePolicy
from limner.errors import InvalidRequest
from limner.grid import PIXELS
from limner.images.limits import MAX_FILE_BYTES
from limner.images.reference import PreparedReference, prepare_canvas, upright
from limner.images.sources import open_picture

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeIs

__all__ = [
    "MaskSource",
    "check_marked",
    "describe_mask",
    "mask_of_picture",
    "picture_of_mask",
    "read_alpha_mask",
    "read_mask",
]

PictureSource: TypeAlias = "Image.Image | str | os.PathLike[str] | bytes | IO[bytes]"
MaskSource: TypeAlias = "PictureSource | np.ndarray | Tensor"

_LOSSY = ("JPEG", "MPO", "WEBP")
"""Formats that leave ripples beside the edges of a mask."""
_RIPPLE = 15
"""Values of lossy files up to this far from black or white are taken as black or white."""
_GREY = 16
"""Channels of a pixel that differ by more are a colour."""


def read_mask(mask: MaskSource, *, size: tuple[int, int], field: str = "mask_image") -> np.ndarray:
    """Return a mask as (height, width) uint8; white (255) is repainted, black (0) is kept, and what is between is mixed.

    `size` is the (width, height) of the canvas, which the mask has to have. A picture is black and white or grey, and
    turned upright as its EXIF data says; of JPEG and WebP, values within 15 of black or white are taken as that. An array
    is (H, W) or (H, W, 1), a tensor (H, W), (1, H, W) or (1, 1, H, W): bool, uint8 up to 255, floating point up to 1.
    Raises `InvalidRequest` that names `field`.
    """
    if _is_tensor(mask):
        mask = mask.detach().cpu()
        values = _from_array((mask.float() if mask.is_floating_point() else mask).numpy(), field)
    elif isinstance(mask, np.ndarray):
        values = _from_array(mask, field)
    else:
        picture, shown = _open(mask, field)
        values = _from_picture(picture, shown)
    return _checked(values, size=size, field=field)


def read_alpha_mask(picture: PictureSource, *, size: tuple[int, int], field: str = "mask") -> np.ndarray:
    """Return the mask in a picture's alpha channel, as `read_mask` does: what is transparent is repainted.

    So OpenAI's image API means its `mask`. A picture without an alpha channel is refused with `InvalidRequest`.
    """
    image, shown = _open(picture, field)
    alpha = _alpha(image)
    if alpha is None:
        raise InvalidRequest(
            shown,
            f"it has no alpha channel (its mode is {image.mode}); make what is to be repainted transparent, as a PNG",
        )
    return _checked(255 - alpha, size=size, field=field)


def describe_mask(mask: np.ndarray, *, field: str = "mask_image") -> list[str]:
    """Return what is to be said of a mask (height, width) uint8: that it repaints everything."""
    if mask.min() == 255:
        return [f"{field}: it is white everywhere, so nothing of the canvas is kept; black is kept"]
    return []


def check_marked(mask: np.ndarray, *, field: str, marked: str = "white") -> None:
    """Raise `InvalidRequest` if a mask repaints nothing: all steps would be drawn for the picture that is there."""
    if not mask.any():
        raise InvalidRequest(field, f"no pixel is {marked}, so nothing would be drawn; mark what is to change")


def picture_of_mask(mask: np.ndarray) -> PreparedReference:
    """Return a mask (height, width) uint8 as a grey picture of its size, as which it can be stored."""
    grey = Image.fromarray(mask).convert("RGB")
    return prepare_canvas(grey, policy=ReferencePolicy(min_side=PIXELS, max_aspect=1e9))


def mask_of_picture(picture: PreparedReference) -> np.ndarray:
    """Return the mask that `picture_of_mask` made a picture of."""
    width, height = picture.report.processed_size
    return np.frombuffer(picture.data, np.uint8).reshape(height, width, 3)[..., 0].copy()


def _is_tensor(mask: object) -> TypeIs[Tensor]:
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    return torch is not None and isinstance(mask, torch.Tensor)


def _open(mask: Any, field: str) -> tuple[Image.Image, str]:
    """Return the upright picture, and the field with the file's name."""
    if hasattr(mask, "read") and not isinstance(mask, (Image.Image, os.PathLike)):
        mask = mask.read(MAX_FILE_BYTES + 1)
        if not isinstance(mask, bytes):
            raise InvalidRequest(field, f"the file gives {type(mask).__name__}, not bytes; open it with mode 'rb'")
        if len(mask) > MAX_FILE_BYTES:
            raise InvalidRequest(field, f"it is over {MAX_FILE_BYTES} bytes; scale it down")
    if not isinstance(mask, (Image.Image, str, os.PathLike, bytes)):
        raise InvalidRequest(
            field,
            f"{type(mask).__name__} is not a mask; give a PIL image, a file, its name or bytes, an array or a tensor",
        )
    image, shown = open_picture(mask, field=field)
    kind = image.format
    image, _ = upright(image, field=shown)
    image.format = kind  # transposing forgets it
    return image, shown


def _alpha(image: Image.Image) -> np.ndarray | None:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return np.array(image.convert("RGBA").getchannel("A"))
    return None


def _from_picture(image: Image.Image, field: str) -> np.ndarray:
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise InvalidRequest(
            field, f"its colour mode is {image.mode}; save it as 8 bit grey, white where it is to be repainted"
        )
    alpha = _alpha(image)
    if alpha is not None and alpha.min() < 255:
        raise InvalidRequest(
            field,
            "it is transparent in places, which could mean kept or repainted; save it without alpha channel, white where "
            "it is to be repainted",
        )
    if image.mode in ("1", "L", "LA"):
        grey = np.array(image.convert("L"))
    else:
        rgb = np.array(image.convert("RGB"))
        spread = int((rgb.max(-1) - rgb.min(-1)).max(initial=0))
        if spread > _GREY:
            raise InvalidRequest(field, "it has colours; save it as grey: white is repainted, black is kept")
        grey = np.array(image.convert("L"))
    if image.format in _LOSSY:
        grey[grey <= _RIPPLE] = 0
        grey[grey >= 255 - _RIPPLE] = 255
    return _check_range(grey, field)


def _from_array(values: np.ndarray, field: str) -> np.ndarray:
    shape = values.shape
    if values.ndim == 3 and 1 in (shape[0], shape[-1]):
        values = values[..., 0] if shape[-1] == 1 else values[0]
    elif values.ndim == 4 and shape[:2] == (1, 1):
        values = values[0, 0]
    if values.ndim != 2:
        raise InvalidRequest(field, f"its shape is {shape}; give (height, width), such as one channel of it")
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return _check_range(values.copy(), field)
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all() or values.min(initial=0) < 0 or values.max(initial=0) > 1:
            raise InvalidRequest(
                field, "floating point masks hold values from 0 (kept) to 1 (repainted); scale it to that"
            )
        return np.asarray((values.astype(np.float64) * 255).round(), np.uint8)
    raise InvalidRequest(
        field,
        f"its values are {values.dtype}; give bool, uint8 from 0 to 255 or floating point from 0 to 1, such as mask > 0",
    )


def _check_range(values: np.ndarray, field: str) -> np.ndarray:
    """Refuse 0 and 1 in place of 0 and 255: such a mask would repaint nearly nothing."""
    if values.max(initial=0) == 1:
        raise InvalidRequest(field, "its largest value is 1 of 255; multiply it by 255, or give an array of bool")
    return values


def _checked(values: np.ndarray, *, size: tuple[int, int], field: str) -> np.ndarray:
    height, width = values.shape
    if (width, height) != tuple(size):
        raise InvalidRequest(
            field,
            "it is {}x{} and the canvas {}x{}; scale it to the canvas' size".format(width, height, *size)
            + (", or turn it" if (height, width) == tuple(size) else ""),
            code="size",
        )
    return values
