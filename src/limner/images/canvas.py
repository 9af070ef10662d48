"""How a canvas is drawn and put back: the box of it that is drawn, at which size, and the composition into the canvas.

Pixels outside of the mask, beyond the feather around it, are the canvas' own, bit for bit. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from limner.errors import InvalidRequest
from limner.grid import MIN_SIDE, PIXELS

__all__ = [
    "CanvasPlan",
    "CanvasReport",
    "check_drawn",
    "cut",
    "cut_mask",
    "feathered",
    "known_box",
    "plan_canvas",
    "stitch",
]

Size = tuple[int, int]
Box = tuple[int, int, int, int]

CONTEXT = 0.25
"""Share of the mask's longer side that a crop shows on each side of it."""
MIN_CONTEXT = 32
"""The least that a crop shows on each side of the mask, in pixels of the canvas."""
USEFUL = 0.25
"""A crop is enlarged until the longer side of the mask has this share of the side of a square of `max_pixels`."""
WHOLE = 0.9
"""A canvas that has to be scaled down by less than this is drawn whole."""
MAX_ENLARGED = 4.0
"""Crops are not enlarged by more, unless a padding asks for them."""
_RESAMPLED = 3
"""Pixels of the coarser picture that resampling (Lanczos) mixes into one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CanvasReport:
    """What was drawn of a canvas. Sizes are (width, height) in pixels; `box` is (left, top, right, bottom) in the canvas.

    `scale` is the drawn size over that of the box; `share` is that of the canvas' pixels that may differ from the input.
    """

    size: Size
    box: Box
    drawn_size: Size
    scale: float
    share: float

    def describe(self) -> str:
        """Return the report as one line of text."""
        whole = self.box[0] <= 0 and self.box[1] <= 0 and self.box[2] >= self.size[0] and self.box[3] >= self.size[1]
        where = "whole" if whole else "from {},{} to {},{}".format(*self.box)
        scale = "" if self.scale == 1 else f" (scale {self.scale:.3g})"
        return "canvas {}x{}, drawn {} as {}x{}{}, {:.1%} of it repainted".format(
            *self.size, where, *self.drawn_size, scale, self.share
        )


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class CanvasPlan:
    """How a canvas is drawn: `box` (left, top, right, bottom) of it at `drawn_size`; `mask` is (height, width) uint8.

    The box may reach over the canvas' edges, by what its drawn sides lack to the grid or to the model's sizes: there
    the canvas is continued by its edge. `mask_blur` is the width of the feather around the mask, in pixels of the canvas.
    """

    size: Size
    box: Box
    drawn_size: Size
    mask: np.ndarray
    mask_blur: int

    @property
    def box_size(self) -> Size:
        """Width and height of the box in pixels of the canvas."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]

    def weight(self) -> np.ndarray:
        """Return how much of each pixel (height, width) uint8 of the result is drawn, for `report` and `stitch`."""
        return feathered(self.mask, self.mask_blur)

    def report(self, weight: np.ndarray) -> CanvasReport:
        """Return what is drawn, for the result."""
        width, height = self.box_size
        return CanvasReport(
            size=self.size,
            box=self.box,
            drawn_size=self.drawn_size,
            scale=math.sqrt(self.drawn_size[0] * self.drawn_size[1] / (width * height)),
            share=float((weight > 0).mean()),
        )


def plan_canvas(
    size: Size,
    mask: np.ndarray,
    *,
    max_pixels: int,
    sizes: Sequence[Size] = (),
    padding: int | None = None,
    mask_blur: int,
) -> CanvasPlan:
    """Return how a canvas of `size` (width, height) is drawn; `mask` is (height, width) uint8, as `read_mask` gives it.

    A canvas of at most `max_pixels` is drawn whole, pixel by pixel, a slightly larger one (`WHOLE`) scaled down. Others are
    cropped around the mask, with context on each side and as much of the rest as fits: pixel by pixel, enlarged if the
    mask would be small, scaled down if not even mask and context fit. `padding` asks for a crop with that many pixels
    around the mask, at the size of the whole canvas. `sizes` are the only ones that a model draws, if it is bound to
    some: of those of at most `max_pixels`, or else the smallest, a canvas that is drawn whole has the smallest that shows
    it pixel by pixel, and one that is smaller than all is enlarged.

    Both sides have one scale, to half a pixel of the canvas, and nothing that the box holds is lost: what it lacks to
    multiples of 16, or to the aspect of one of `sizes`, is put around it. Raises `InvalidRequest`.
    """
    if mask.shape != (size[1], size[0]) or mask.dtype != np.uint8:
        raise ValueError(
            f"mask {mask.shape} {mask.dtype} is not ({size[1]}, {size[0]}) uint8"
        )  # read_mask makes such masks
    _check_count("mask_blur", mask_blur)
    if padding is not None:
        _check_count("padding_mask_crop", padding)
    whole: Box = (0, 0, *size)
    within = _within(sizes, max_pixels)
    candidates = _drawn(whole, size, max_pixels=max_pixels, sizes=within, cap=math.inf if sizes else 1.0)
    enough = 1.0
    marked = _bounds(mask)
    longest = max(marked[2] - marked[0], marked[3] - marked[1]) if marked else 0
    if marked and padding is not None:
        needed = _grown(marked, max(padding, mask_blur), size)
        budget = min(max_pixels, max(size[0] * size[1], MIN_SIDE**2))
        candidates = _drawn(needed, size, max_pixels=budget, sizes=_within(sizes, budget), cap=math.inf)
        enough = math.inf
    elif marked and max(scale for scale, _ in candidates) < WHOLE:
        context = max(MIN_CONTEXT, math.ceil(CONTEXT * longest), mask_blur)
        useful = USEFUL * math.sqrt(max((w * h for w, h in within), default=max_pixels)) / longest
        needed = _grown(marked, context, size)
        enough = cap = min(max(1.0, useful), MAX_ENLARGED)
        candidates = _drawn(needed, size, max_pixels=max_pixels, sizes=within, cap=cap)
    else:
        needed = whole
    placed = [(scale, _box(needed, drawn, scale, size), drawn) for scale, drawn in candidates]

    def rank(plan: tuple[float, Box, Size]) -> tuple[float, ...]:
        """The finest; of these the one that needs least beyond the canvas' edges, then the one that shows most."""
        scale, box, (width, height) = plan
        return round(min(scale, enough), 3), -_outside(box, size), _inside(box, size), -width * height

    _, box, drawn = max(placed, key=rank)
    return CanvasPlan(size=size, box=box, drawn_size=drawn, mask=mask, mask_blur=mask_blur)


def cut(picture: Image.Image, plan: CanvasPlan, *, background: str = "white") -> tuple[Image.Image, Image.Image]:
    """Return what is drawn of a canvas: its box as RGB, and the mask there as L (255 is repainted), both of `drawn_size`.

    Beyond the canvas' edges both are continued by their edge. What is transparent in an RGBA canvas is cut as if it stood
    on `background`. Raises ValueError for a picture of another size or mode.
    """
    _check_picture(picture, plan)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")
    pixels = _scaled(_extended(np.asarray(picture), plan.box), plan.drawn_size, Image.Resampling.LANCZOS)
    return pixels, cut_mask(plan)


def cut_mask(plan: CanvasPlan) -> Image.Image:
    """Return the mask of `cut` alone."""
    return _scaled(_extended(plan.mask, plan.box), plan.drawn_size, Image.Resampling.BILINEAR)


def check_drawn(plan: CanvasPlan, *, field: str) -> None:
    """Raise `InvalidRequest` if nothing of a mask is left in the size that is drawn, so that no token would be drawn."""
    if cut_mask(plan).getbbox() is None:
        raise InvalidRequest(
            field,
            "what it marks is too small to be left in {}x{}, as which {}x{} of the canvas are drawn; mark larger "
            "areas".format(*plan.drawn_size, *plan.box_size),
        )


def known_box(plan: CanvasPlan, known: Box) -> Box | None:
    """Return which whole tokens of what is drawn show nothing but a box of the canvas, in pixels; None if there are none.

    Where the canvas is scaled, tokens that resampling mixes with what is beside the box are left out.
    """
    sides = []
    for axis in (0, 1):
        start, end = plan.box[axis], plan.box[axis + 2]
        low, high = max(start, known[axis]), min(end, known[axis + 2])
        scale = plan.drawn_size[axis] / (end - start)
        reach = 0.0 if scale == 1 else _RESAMPLED * max(1.0, scale)
        first = (low - start) * scale + (reach if low > start else 0)
        last = (high - start) * scale - (reach if high < end else 0)
        sides.append((math.ceil(first / PIXELS) * PIXELS, math.floor(last / PIXELS) * PIXELS))
    (left, right), (top, bottom) = sides
    return (left, top, right, bottom) if left < right and top < bottom else None


def stitch(
    canvas: Image.Image, drawn: Image.Image, plan: CanvasPlan, *, weight: np.ndarray | None = None
) -> Image.Image:
    """Return the canvas with the drawn picture in the mask, at the canvas' size and in its mode (RGB or RGBA).

    Each pixel is mixed by `plan.weight()`, which callers with several pictures give as `weight`: at 0 it is the canvas'
    own, bit for bit, with its alpha; at 255 it is the drawn one, opaque. Raises ValueError for pictures of other sizes or
    modes.
    """
    _check_picture(canvas, plan)
    if drawn.size != plan.drawn_size:
        raise ValueError(f"the drawn picture is {drawn.size}, the plan {plan.drawn_size}")
    left, top, right, bottom = plan.box
    inside = (max(left, 0), max(top, 0), min(right, plan.size[0]), min(bottom, plan.size[1]))
    if drawn.size != plan.box_size:
        drawn = drawn.resize(plan.box_size, Image.Resampling.LANCZOS)
    drawn = drawn.crop((inside[0] - left, inside[1] - top, inside[2] - left, inside[3] - top)).convert(canvas.mode)
    weight = plan.weight() if weight is None else weight
    result = canvas.copy()
    part = np.ascontiguousarray(weight[inside[1] : inside[3], inside[0] : inside[2]])
    result.paste(drawn, inside, Image.fromarray(part))
    return result


def feathered(mask: np.ndarray, blur: int) -> np.ndarray:
    """Return a mask (height, width) uint8 with a feather of `blur` pixels around it.

    The mask is widened by half of `blur` and averaged over squares with the other half as radius. So where a mask is white
    it stays white, and further than `blur` pixels from it, in rows or in columns, it stays 0. The feather lies outside:
    what the mask covers is repainted in full, and nothing of what was there shines through.
    """
    marked = _bounds(mask) if blur else None
    if marked is None:
        return mask
    height, width = mask.shape
    left, top, right, bottom = _grown(marked, blur, (width, height))
    wide = (blur + 1) // 2
    part = _widened(_widened(mask[top:bottom, left:right], wide, 0), wide, 1)
    result = np.zeros_like(mask)
    result[top:bottom, left:right] = Image.fromarray(part).filter(ImageFilter.BoxBlur(blur - wide))
    return result


def _widened(values: np.ndarray, radius: int, axis: int) -> np.ndarray:
    """Return the maximum over `radius` pixels to both sides along an axis."""
    rows, reach = np.moveaxis(values, axis, 0), 0
    while reach < radius:
        step = min(reach + 1, radius - reach)  # no further, so that what is shifted by comes from inside of the array
        wider = rows.copy()
        wider[step:] = np.maximum(wider[step:], rows[:-step])
        wider[:-step] = np.maximum(wider[:-step], rows[step:])
        rows, reach = wider, reach + step
    return np.moveaxis(rows, 0, axis)


def _drawn(region: Box, size: Size, *, max_pixels: int, sizes: Sequence[Size], cap: float) -> list[tuple[float, Size]]:
    """Return (scale, drawn size) of each way to draw a region, and of the rest what fits, at most `cap` times enlarged."""
    need = (region[2] - region[0], region[3] - region[1])
    if sizes:
        return [(min(cap, w / need[0], h / need[1]), (w, h)) for w, h in sizes]
    scale = min(cap, math.sqrt(max_pixels / (need[0] * need[1])))
    while True:
        budget = (
            max_pixels / scale**2
        )  # in pixels of the canvas; spent on a box as square as region and canvas let it be
        width = min(size[0], max(need[0], math.sqrt(budget)))
        height = min(size[1], max(need[1], budget / width))
        width = min(size[0], max(need[0], budget / height))
        drawn = (_side(need[0] * scale, width * scale), _side(need[1] * scale, height * scale))
        if drawn[0] * drawn[1] <= max_pixels or drawn == (MIN_SIDE, MIN_SIDE):
            return [(scale, drawn)]
        scale *= 0.995  # what has to be shown was rounded up to the grid


def _within(sizes: Sequence[Size], max_pixels: int) -> list[Size]:
    """Return the sizes of at most so many pixels; if there are none, the smallest ones."""
    least = min((w * h for w, h in sizes), default=0)
    return [(w, h) for w, h in sizes if w * h <= max(max_pixels, least)]


def _side(need: float, want: float) -> int:
    """Return the side on the grid that shows all of what is needed, and of what is wanted as much as is whole tokens."""
    rounding = 0.01
    return max(MIN_SIDE, math.ceil((need - rounding) / PIXELS) * PIXELS, int((want + rounding) / PIXELS) * PIXELS)


def _box(region: Box, drawn: Size, scale: float, size: Size) -> Box:
    """Return the box of the drawn size at a scale: around the middle of the region, as far inside the canvas as it goes."""
    starts, ends = [], []
    for axis in (0, 1):
        low, high = region[axis], region[axis + 2]
        side = max(high - low, round(drawn[axis] / scale))
        start = low - (side - (high - low)) // 2
        start = (size[axis] - side) // 2 if side >= size[axis] else min(max(start, 0), size[axis] - side)
        starts.append(start)
        ends.append(start + side)
    return (starts[0], starts[1], ends[0], ends[1])


def _inside(box: Box, size: Size) -> int:
    return (min(box[2], size[0]) - max(box[0], 0)) * (min(box[3], size[1]) - max(box[1], 0))


def _outside(box: Box, size: Size) -> int:
    return (box[2] - box[0]) * (box[3] - box[1]) - _inside(box, size)


def _bounds(mask: np.ndarray) -> Box | None:
    """Return the box around everything of a mask that is not 0; None if there is nothing."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return None
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _grown(box: Box, margin: int, size: Size) -> Box:
    left, top, right, bottom = box
    return (max(left - margin, 0), max(top - margin, 0), min(right + margin, size[0]), min(bottom + margin, size[1]))


def _extended(values: np.ndarray, box: Box) -> np.ndarray:
    """Return a box of an array (height, width, ...), continued by its edges where the box reaches over them."""
    height, width = values.shape[:2]
    left, top, right, bottom = box
    part = values[max(top, 0) : bottom, max(left, 0) : right]
    over = [(max(-top, 0), max(bottom - height, 0)), (max(-left, 0), max(right - width, 0))]
    return np.pad(part, [*over, *[(0, 0)] * (values.ndim - 2)], mode="edge")


def _scaled(values: np.ndarray, size: Size, resampling: Image.Resampling) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(values))
    return image if image.size == size else image.resize(size, resampling)


def _check_picture(picture: Image.Image, plan: CanvasPlan) -> None:
    if picture.size != plan.size or picture.mode not in ("RGB", "RGBA"):
        raise ValueError(f"the canvas is {picture.mode} {picture.size}, the plan RGB or RGBA {plan.size}")


def _check_count(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidRequest(field, f"{value!r} is not a whole number of pixels from 0; use 0 for none")
