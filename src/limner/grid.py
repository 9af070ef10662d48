"""The grid of pixels: the side of one token, the sizes that it allows, and the number of tokens of a picture.

The autoencoder halves a side three times, and a token is a patch of 2x2 latents: 16 pixels. Knows no tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from fractions import Fraction
from typing import Any

from limner.errors import InvalidRequest

__all__ = [
    "MIN_SIDE",
    "PIXELS",
    "SIZE_POLICIES",
    "check_size",
    "floor_size",
    "in_words",
    "nearest_size",
    "num_tokens",
    "size_warning",
    "unlearned",
    "whole_number",
]

PIXELS = 16
"""Side, in pixels, of the square that one token stands for."""
MIN_SIDE = 64
"""The smallest side of a picture or a reference, in pixels."""


SIZE_POLICIES = ("refuse", "floor")
"""What becomes of sides of an output that are no multiples of `PIXELS`."""
_REMEDIES = {
    "width, height": ("give width {} and height {}", "leave both out", "max_pixels"),
    "--size": ("give --size {}x{}", "leave it out", "--max-pixels"),
    "size": ('give "size": "{}x{}"', "leave it out", "--max-pixels"),
}
"""How a caller asks for a size, by what he calls it (in Python and JSON; on the command line; in manifests), how for none,
and what caps references."""


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


def nearest_size(sizes: Iterable[tuple[int, int]], aspect: tuple[int, int], *, pixels: int) -> tuple[int, int] | None:
    """Return the size (width, height) nearest to an aspect (width, height); of several, the one nearest to `pixels`.

    None: there are no sizes.
    """

    def distance(size: tuple[int, int]) -> tuple[Fraction, int]:
        ratio = Fraction(size[0] * aspect[1], size[1] * aspect[0])
        return max(ratio, 1 / ratio), abs(size[0] * size[1] - pixels)

    return min(sizes, key=distance, default=None)


def unlearned(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> str:
    """Return that a size is none of those that a model has learned; "" if it is one, or the model draws any."""
    if not sizes or size in sizes:
        return ""
    shown, *learned = ("{}x{}".format(*one) for one in (size, *sizes))
    return f"{shown} is not a size that this model has learned to draw: {', '.join(learned)}"


def size_warning(
    size: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    *,
    default: tuple[int, int],
    over_cap: Collection[tuple[int, int]] = (),
    field: str = "width, height",
) -> tuple[str, ...]:
    """Return what is to be said of a size that is none of the `sizes` that a model has learned; () if it is one.

    No sizes: a model draws any. `default` is what is drawn where none is asked for, `field` a name in `_REMEDIES`.
    `over_cap` are the sizes that references would become if their cap were higher, where the caller sets it.
    """
    if not (problem := unlearned(size, sizes)):
        return ()
    give, leave, cap = _REMEDIES[field]
    near = nearest_size(sizes, size, pixels=size[0] * size[1]) or size
    remedy = give.format(*near) + (f", or {leave}" if default in sizes else "")
    if size == default and near in over_cap:  # another size would be drawn from the same image 1
        remedy = (
            f"it is that of image 1, which needs {near[0] * near[1]} pixels ({cap}) to be used as {near[0]}x{near[1]}"
        )
    return (f"{field}: {problem}; {remedy}",)


def in_words(
    warnings: Iterable[str],
    size: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    *,
    default: tuple[int, int],
    over_cap: Collection[tuple[int, int]] = (),
    field: str,
) -> list[str]:
    """Return the warnings of a call with that of its size in the words of a caller; others as of `size_warning`."""
    old, new = (
        size_warning(size, sizes, default=default, over_cap=over_cap, field=name) for name in ("width, height", field)
    )
    return [new[0] if text in old else text for text in warnings]
