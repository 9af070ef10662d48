"""Outpainting: a canvas with new area around it, filled from its edges, and the mask of that area. Knows no models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from limner.errors import InvalidRequest
from limner.images.limits import MAX_DECODED_PIXELS

__all__ = ["ANCHORS", "OVERLAP", "Expanded", "expand_canvas", "expanded_size"]

OVERLAP = 16
"""Pixels of the old picture beside the new area that are drawn again, which hides the seam: the side of a token."""
ANCHORS = {
    "center": (0.5, 0.5),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "top-left": (0.0, 0.0),
    "top-right": (1.0, 0.0),
    "bottom-left": (0.0, 1.0),
    "bottom-right": (1.0, 1.0),
}
"""Where the old picture stands in the new size: the share of the new area that is left of it, and above it."""
_MOST_BLUR = 64
"""Pixels: the fill is blurred more the further it is from the old picture, up to this radius."""


class Expanded(NamedTuple):
    """A canvas with new area: the mask (height, width) uint8, 255 is repainted, and the old picture's box in it."""

    picture: Image.Image
    mask: np.ndarray
    known: tuple[int, int, int, int]


def expand_canvas(
    picture: Image.Image,
    *,
    expand: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    anchor: str = "center",
    overlap: int = OVERLAP,
) -> Expanded:
    """Return the picture (RGB or RGBA) with new area around it, its mask, and where the old picture is in it.

    `expand` are the new pixels at (left, top, right, bottom); or `size` is the new (width, height), in which `anchor`
    says where the picture stands. Along new area `overlap` pixels of the picture are part of the mask. The new area
    continues the picture's edges, blurred the more the further away, so that an encoder sees no hard edge and no
    streaks. Raises `InvalidRequest` that names the argument.
    """
    if picture.mode not in ("RGB", "RGBA"):
        raise ValueError(f"the picture's mode is {picture.mode}, not RGB or RGBA")
    margins = _margins(picture.size, expand=expand, size=size, anchor=anchor)
    left, top, right, bottom = margins
    width, height = picture.size
    _check_overlap(overlap, picture.size, margins)
    mask = np.full((height + top + bottom, width + left + right), 255, np.uint8)
    kept = [(overlap if new else 0) for new in margins]
    mask[top + kept[1] : top + height - kept[3], left + kept[0] : left + width - kept[2]] = 0
    return Expanded(_filled(picture, margins), mask, (left, top, left + width, top + height))


def expanded_size(
    old: tuple[int, int],
    *,
    expand: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    anchor: str = "center",
    overlap: int = OVERLAP,
) -> tuple[int, int]:
    """Return the (width, height) that `expand_canvas` gives to a picture of size `old`. Raises as it does."""
    margins = _margins(old, expand=expand, size=size, anchor=anchor)
    _check_overlap(overlap, old, margins)
    return old[0] + margins[0] + margins[2], old[1] + margins[1] + margins[3]


def _filled(picture: Image.Image, margins: tuple[int, int, int, int]) -> Image.Image:
    left, top, right, bottom = margins
    width, height = picture.size
    pixels = np.pad(np.asarray(picture), ((top, bottom), (left, right), (0, 0)), mode="edge")
    radius = min(_MOST_BLUR, max(margins) / 2)
    beside = np.maximum(_beside(width, left, right)[None], _beside(height, top, bottom)[:, None])
    share = np.minimum(beside.astype(np.float32) / (2 * radius), 1)  # of the blurred continuation; 0 in the picture
    edges = Image.fromarray(pixels)
    weight = Image.fromarray((share * 255).round().astype(np.uint8))
    return Image.composite(edges.filter(ImageFilter.GaussianBlur(radius)), edges, weight)


def _beside(side: int, before: int, after: int) -> np.ndarray:
    """Return how far each pixel of a row is from the picture in it, in pixels."""
    return np.concatenate([np.arange(before, 0, -1), np.zeros(side, np.int64), np.arange(1, after + 1)])


def _margins(
    old: tuple[int, int], *, expand: Sequence[int] | None, size: tuple[int, int] | None, anchor: str
) -> tuple[int, int, int, int]:
    if (expand is None) == (size is None):
        raise InvalidRequest("expand", "give either expand=(left, top, right, bottom) or a new size with an anchor")
    if expand is not None:
        left, top, right, bottom = _counts("expand", expand, 4, "(left, top, right, bottom)")
        margins = (left, top, right, bottom)
        if not any(margins):
            raise InvalidRequest("expand", "(0, 0, 0, 0) adds nothing; give pixels at one side at least")
        new = (old[0] + margins[0] + margins[2], old[1] + margins[1] + margins[3])
        field = "expand"
    else:
        width, height = _counts("size", size, 2, "(width, height)")
        new = (width, height)
        field = "size"
        if anchor not in ANCHORS:
            raise InvalidRequest("anchor", f"{anchor!r} is not one of {', '.join(ANCHORS)}")
        more = (new[0] - old[0], new[1] - old[1])
        if min(more) < 0 or not any(more):
            raise InvalidRequest(
                field,
                "{}x{} is not larger than the picture, {}x{}; give a larger size, or scale the picture down first".format(
                    *new, *old
                ),
            )
        left, top = (int(extra * share) for extra, share in zip(more, ANCHORS[anchor], strict=True))
        margins = (left, top, more[0] - left, more[1] - top)
    if new[0] * new[1] > MAX_DECODED_PIXELS:
        raise InvalidRequest(
            field, "the new picture would be {}x{}, over {} pixels; add less".format(*new, MAX_DECODED_PIXELS)
        )
    return margins


def _counts(field: str, values: object, num: int, names: str) -> tuple[int, ...]:
    if (
        not isinstance(values, Sequence)
        or len(values) != num
        or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)
    ):
        raise InvalidRequest(field, f"{values!r} is not {names} in whole pixels from 0")
    return tuple(values)


def _check_overlap(overlap: object, size: tuple[int, int], margins: Sequence[int]) -> None:
    if not isinstance(overlap, int) or isinstance(overlap, bool) or overlap < 0:
        raise InvalidRequest("overlap", f"{overlap!r} is not a whole number of pixels from 0; use {OVERLAP}")
    for side, new in zip(size, ((margins[0] > 0) + (margins[2] > 0), (margins[1] > 0) + (margins[3] > 0)), strict=True):
        if overlap * new >= side:
            raise InvalidRequest(
                "overlap",
                f"{overlap} leaves nothing of the picture, {size[0]}x{size[1]}; use at most {(side - 1) // new}",
            )
