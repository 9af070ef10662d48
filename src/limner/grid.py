"""The grid of pixels: the side of one token, the sizes that it allows, and the number of tokens of a picture.

The autoencoder halves a side three times, and a token is a patch of 2x2 latents: 16 pixels. Knows no tensors.
"""

from __future__ import annotations

import operator
from typing import Any

from limner.errors import InvalidRequest

__all__ = ["MIN_SIDE", "PIXELS", "SIZE_POLICIES", "check_size", "floor_size", "num_tokens", "whole_number"]

PIXELS = 16
"""Side, in pixels, of the square that one token stands for."""
MIN_SIDE = 64
"""The smallest side of a picture or a reference, in pixels."""


SIZE_POLICIES = ("refuse", "floor")
"""What becomes of sides of an output that are no multiples of `PIXELS`."""


def num_tokens(*sizes: tuple[int, int]) -> int:
    """Return the tokens of pictures of these sizes (width, height) in pixels, which are multiples of `PIXELS`."""
    return sum(width * height for width, height in sizes) // PIXELS**2


def whole_number(value: Any) -> Any:
    """Return whole numbers of other types, as numpy's, as int; anything else as it is."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def check_size(name: str, value: int) -> int:
    """Return a side of the output in pixels if it is on the grid. Raises `InvalidRequest`."""
    value = whole_number(value)
    if not isinstance(value, int):
        raise InvalidRequest(name, f"{value!r} is not a whole number of pixels")
    if value < MIN_SIDE or value % PIXELS:
        low = max(MIN_SIDE, value // PIXELS * PIXELS)
        use = f"{low} or {low + PIXELS}" if value > MIN_SIDE else f"{MIN_SIDE}"
        raise InvalidRequest(name, f"{value} is not a multiple of {PIXELS} of at least {MIN_SIDE}; use {use}")
    return value


def floor_size(value: int | None) -> int | None:
    """Return a side down to the grid; what `check_size` refuses for another reason stays as it is."""
    return value // PIXELS * PIXELS if isinstance(value, int) and value >= MIN_SIDE else value
