"""From the size of a reference to one on the grid of pixels: scaled under the cap, then cropped, padded or resized.

Owns the arithmetic of the three ways to fit, and to which of the sizes that a model has learned. Knows no files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from limner.config import ReferencePolicy
from limner.errors import InvalidRequest
from limner.grid import PIXELS, nearest_size

__all__ = ["Box", "Fitted", "fit_picture"]

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels: edges of a box, or how many pixels were cut or added there."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fitted:
    """A picture on the grid. `resized_to` None: it was not scaled. `cut` and `added` count pixels of the scaled picture."""

    image: Image.Image
    resized_to: tuple[int, int] | None
    cut: Box = (0, 0, 0, 0)
    added: Box = (0, 0, 0, 0)


def fit_picture(image: Image.Image, policy: ReferencePolicy, *, field: str) -> Fitted:
    """Return an RGB picture with at most `policy.pixels` pixels and sides that are multiples of 16, as `policy.fit` says.

    "crop" keeps the middle, "pad" repeats the pixels at the edges, with the picture in the middle, "resize" scales each
    side to the nearest multiple. Scaling is LANCZOS, once. Where `policy.sizes` say so, the size is one of these instead.
    Raises `InvalidRequest` that names `field`.
    """
    fitted = _to_grid(image, policy, field=field)
    under_cap = [size for size in policy.sizes or () if _area(size) <= policy.pixels]
    size = nearest_size(under_cap, image.size, pixels=_area(fitted.image.size))
    return fitted if size in (None, fitted.image.size) else _to_size(image, size, fit=policy.fit)


def _to_grid(image: Image.Image, policy: ReferencePolicy, *, field: str) -> Fitted:
    if policy.fit == "resize":
        return _resize(image, policy, field=field)
    if policy.fit == "pad":
        return _pad(image, policy, field=field)
    size = _capped(image.size, policy, field=field)
    return _cut(image, size, (size[0] // PIXELS * PIXELS, size[1] // PIXELS * PIXELS))


def _to_size(image: Image.Image, size: tuple[int, int], *, fit: str) -> Fitted:
    """Return a picture as one of exactly this size, scaled up or down."""
    if fit == "resize":
        return Fitted(image=_scaled(image, size), resized_to=size)
    scales = [side / own for side, own in zip(size, image.size, strict=True)]
    scale, limit = (min(scales), min) if fit == "pad" else (max(scales), max)
    width, height = (limit(side, max(1, round(own * scale))) for side, own in zip(size, image.size, strict=True))
    return (_padded if fit == "pad" else _cut)(image, (width, height), size)


def _cut(image: Image.Image, scaled_to: tuple[int, int], size: tuple[int, int]) -> Fitted:
    """Return a picture that was scaled, and of that the middle."""
    scaled, (width, height) = _scaled(image, scaled_to), scaled_to
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    if size != scaled_to:
        scaled = scaled.crop((left, top, left + size[0], top + size[1]))
    cut = (left, top, width - size[0] - left, height - size[1] - top)
    return Fitted(image=scaled, resized_to=None if scaled_to == image.size else scaled_to, cut=cut)


def _padded(image: Image.Image, scaled_to: tuple[int, int], size: tuple[int, int]) -> Fitted:
    """Return a picture that was scaled, in the middle of a larger one that repeats its edges."""
    scaled = _scaled(image, scaled_to)
    left, top = (size[0] - scaled_to[0]) // 2, (size[1] - scaled_to[1]) // 2
    added = (left, top, size[0] - scaled_to[0] - left, size[1] - scaled_to[1] - top)
    if any(added):
        around = ((added[1], added[3]), (added[0], added[2]), (0, 0))
        scaled = Image.fromarray(np.pad(np.asarray(scaled), around, mode="edge"))
    return Fitted(image=scaled, resized_to=None if scaled_to == image.size else scaled_to, added=added)


def _capped(size: tuple[int, int], policy: ReferencePolicy, *, field: str) -> tuple[int, int]:
    """Return the size, scaled down to the cap if it has more pixels."""
    width, height = size
    if width * height <= policy.pixels:
        return size
    # int() and LANCZOS as in diffusers 0.42.1, Flux2ImageProcessor._resize_to_target_area
    factor = math.sqrt(policy.pixels / (width * height))
    resized = (int(width * factor), int(height * factor))
    if min(resized) < PIXELS:
        raise InvalidRequest(
            field,
            f"{width}x{height} would be scaled to {resized[0]}x{resized[1]}, under {PIXELS} pixels; raise "
            f"max_pixels={policy.pixels}",
        )
    return resized


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _pad(image: Image.Image, policy: ReferencePolicy, *, field: str) -> Fitted:
    size = _capped(image.size, policy, field=field)
    while _area(on_grid := (_up(size[0]), _up(size[1]))) > policy.pixels:
        # what is added counts too: the side that lost most by rounding up goes down to the grid, the other follows
        width, height = image.size
        if on_grid[0] * size[1] >= on_grid[1] * size[0]:
            side = on_grid[0] - PIXELS
            size = (side, round(height * side / width))
        else:
            side = on_grid[1] - PIXELS
            size = (round(width * side / height), side)
        if min(size) < 1:
            raise InvalidRequest(
                field, f"{width}x{height} cannot be padded to {policy.pixels} pixels; raise max_pixels"
            )
    return _padded(image, size, on_grid)


def _resize(image: Image.Image, policy: ReferencePolicy, *, field: str) -> Fitted:
    width, height = _capped(image.size, policy, field=field)
    nearest = (max(PIXELS, _nearest(width)), max(PIXELS, _nearest(height)))
    if _area(nearest) > policy.pixels:
        nearest = (width // PIXELS * PIXELS, height // PIXELS * PIXELS)
    return Fitted(image=_scaled(image, nearest), resized_to=None if nearest == image.size else nearest)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _up(side: int) -> int:
    return -(-side // PIXELS) * PIXELS


def _nearest(side: int) -> int:
    return (side + PIXELS // 2) // PIXELS * PIXELS
