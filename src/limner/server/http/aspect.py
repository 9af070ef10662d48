"""The shape of a result where a caller gives it as a ratio of sides: read, and made a size on the grid.

Knows no dialect.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from limner.errors import InvalidRequest
from limner.grid import MIN_SIDE, PIXELS, nearest_size

__all__ = ["MAX_ASPECT", "is_of_aspect", "read_aspect", "size_of_aspect"]

MAX_ASPECT = 8
_ASPECT = re.compile(r"([1-9][0-9]{0,4}):([1-9][0-9]{0,4})")


def read_aspect(text: str, *, field: str = "aspect_ratio") -> Fraction:
    """Return width over height of "16:9". Raises `InvalidRequest`."""
    found = _ASPECT.fullmatch(text)
    if found is None:
        raise InvalidRequest(field, f"{text!r} is not WIDTH:HEIGHT, as 16:9")
    aspect = Fraction(int(found[1]), int(found[2]))
    if not Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
        raise InvalidRequest(field, f"{text} is not within {MAX_ASPECT}:1 and 1:{MAX_ASPECT}; use one that is")
    return aspect


def is_of_aspect(size: tuple[int, int], aspect: Fraction) -> bool:
    """Return whether a size (width, height) has this aspect, but for less than a step of the grid on one side."""
    width, height = size
    return abs(width - height * aspect) < PIXELS or abs(height - width / aspect) < PIXELS


def size_of_aspect(
    aspect: Fraction,
    *,
    width: int | None,
    height: int | None,
    like: tuple[int, int],
    learned: Sequence[tuple[int, int]] = (),
) -> tuple[int, int]:
    """Return (width, height) for an aspect. Sides that are given stand; the other one follows.

    Where none is given: the size that the model has `learned` nearest to the aspect, if it is of it (`is_of_aspect`);
    else as many pixels as the size `like`, each side on the grid.
    """
    if width and height:
        return width, height
    if width:
        return width, _on_grid(width / aspect)
    if height:
        return _on_grid(height * aspect), height
    pixels = like[0] * like[1]
    nearest = nearest_size(learned, (aspect.numerator, aspect.denominator), pixels=pixels)
    if nearest is not None and is_of_aspect(nearest, aspect):
        return nearest
    pixels = max(pixels, math.ceil(MIN_SIDE**2 * max(aspect, 1 / aspect)))  # so that the short side is long enough
    return _on_grid(math.sqrt(pixels * aspect)), _on_grid(math.sqrt(pixels / aspect))


def _on_grid(side: float | Fraction) -> int:
    return max(MIN_SIDE, round(side / PIXELS) * PIXELS)
