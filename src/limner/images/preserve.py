"""Leave the rest alone: find what an edit did not change, and take the canvas' own pixels there.

A model draws every pixel anew, so what nobody asked to change comes back a little blurred, tinted or moved. Here a change
is what differs more than that, at any scale. In doubt it is a change. Knows nothing of models, prompts or masks.

Arrays are (height, width, 3) or (height, width) float32; colours are in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from limner.errors import InvalidRequest
from limner.grid import PIXELS

__all__ = ["MAX_COLOUR", "MAX_SHIFT", "Preserved", "preserve"]

Array = np.ndarray

MAX_SHIFT = 0.012
"""A shift of the whole picture by more than this share of its longer side is no drift, and stays."""
MAX_COLOUR = 8 / 255
"""A colour that goes further than this is no drift, and stays: somebody asked for another light, or another white."""
MIN_SUPPORT = 0.1
"""Drift is measured where at least this share of the picture is close to the canvas, or else not at all."""
_CLOSE = 24 / 255
_STEEP = 4 / 255
"""A slope, by pixel, from which on a place tells of shifts."""
_BETTER = 0.7
"""A shift is believed if it leaves less than this share of the error at half or more of those places."""
_MIN_MOVED = 0.3
"""Smaller shifts, in pixels, are reported and not undone: they are less than what resampling blurs."""

_LEVELS = ((18.0, 0.35), (14.0, 0.25), (12.0, 0.15), (8.0, 0.08))
"""By halving of the picture: the difference (of 255), and the share of the local contrast, from which on it is a change.

Chosen on 150 edits of the bundled model with rendered truth: of a dozen sets one that undid next to nothing.
"""
_WEAK = 0.6
"""What differs by this share of a change belongs to the change beside it."""
_SWEEPS = 24
"""Rounds in which that is looked for; a round goes around two corners at least."""
_GAP = PIXELS // 2
"""What lies between changes less than twice this far apart belongs to them: a token draws all of its pixels at once."""
_FINE = (12.0, 0.25)
"""As in `_LEVELS`, for single pixels at the rim of a change: what differs by less is the canvas'."""
_TINT = 5 / 255
"""What differs in one way by more, over an area, is a change, however close its pixels are."""
_RIM = 10
"""Pixels: so far coarse levels and closed gaps can widen a change."""
_FEATHER = 3
"""Pixels in which a change fades into the canvas, on its own side; not where it differs clearly."""
_SAME_ASPECT = 0.01
_NO_DRIFT = np.ones(3, np.float32), np.zeros(3, np.float32)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Preserved:
    """A result in which what the edit left alone is the canvas' own.

    `drift_pixels` is how far (dx, dy) the result had moved, to the right and down, in pixels of the result;
    `drift_colour` how much a middle grey had changed, by channel, of 255. `share_kept` is the share of pixels that are
    the canvas', bit for bit. `change` is the map as L, of the canvas' size: 255 where the result is, 0 where the canvas is.
    """

    picture: Image.Image
    drift_pixels: tuple[float, float]
    drift_colour: tuple[float, float, float]
    share_kept: float
    change: Image.Image

    def as_json(self) -> dict[str, Any]:
        """Return the report without pictures, for JSON."""
        return {
            "share_kept": round(self.share_kept, 6),
            "drift_pixels": list(self.drift_pixels),
            "drift_colour": list(self.drift_colour),
        }

    def describe(self) -> str:
        """Return the report as one line of text."""
        return (
            "kept {:.1%} of the canvas; drift {:+.2f}, {:+.2f} pixels, colour {:+.1f}, {:+.1f}, {:+.1f} of 255".format(
                self.share_kept, *self.drift_pixels, *self.drift_colour
            )
        )


def preserve(canvas: Image.Image, result: Image.Image) -> Preserved:
    """Return the result with the canvas' own pixels wherever the edit changed nothing; both pictures are RGB.

    Drift of the whole picture is measured where both are close, by position (Lucas and Kanade 1981, in a pyramid of halved
    pictures) and by colour (a gain and an offset a channel, by medians), and undone if it is small: what is large was
    asked for. Then pixels are compared in that pyramid. Blur and ringing of a decoder grow with contrast and vanish in
    coarser levels, so the tolerance of each level is a constant and a share of the local contrast. What differs by more
    is a change, with what is next to it and differs by nearly as much.

    A result of another size than the canvas is compared at its own, and comes back at that of the canvas. Raises
    `InvalidRequest` if the sides are not in proportion.
    """
    if canvas.mode != "RGB" or result.mode != "RGB":
        raise ValueError(f"canvas and result are {canvas.mode} and {result.mode}, not RGB")
    _check_aspect(canvas.size, result.size)
    before = _values(canvas if canvas.size == result.size else canvas.resize(result.size, Image.Resampling.LANCZOS))
    after = _values(result)
    shift = _shift(before, after)
    moved = math.hypot(*shift) >= _MIN_MOVED
    if moved:
        after = _translated(after, shift)
    drift = _colour(before, after)
    gain, offset = drift or _NO_DRIFT
    after = np.clip((after - offset) / gain, 0, 1)
    change = _change(before, after) if drift else Image.new("L", result.size, 255)
    if not moved and (gain == 1).all() and (offset == 0).all():
        undone = result
    else:
        undone = Image.fromarray((after * 255).round().astype(np.uint8))
    if undone.size != canvas.size:
        undone = undone.resize(canvas.size, Image.Resampling.LANCZOS)
        change = change.resize(canvas.size, Image.Resampling.BILINEAR)
    tint = (gain * 0.5 + offset - 0.5) * 255
    return Preserved(
        picture=Image.composite(undone, canvas, change),
        drift_pixels=(round(shift[0], 3), round(shift[1], 3)),
        drift_colour=(round(float(tint[0]), 2), round(float(tint[1]), 2), round(float(tint[2]), 2)),
        share_kept=float((np.asarray(change) == 0).mean()),
        change=change,
    )


def _check_aspect(canvas: tuple[int, int], result: tuple[int, int]) -> None:
    ratio = canvas[0] / canvas[1] / (result[0] / result[1])
    if abs(ratio - 1) > _SAME_ASPECT:
        raise InvalidRequest(
            "preserve",
            "the canvas is {}x{} and the result {}x{}, of another shape; leave out width and height, or preserve".format(
                *canvas, *result
            ),
        )


# Where the edit changed something


def _change(before: Array, after: Array) -> Image.Image:
    """Return the change map as L: 255 where the result is to be, 0 where the canvas is, with soft edges."""
    height, width = before.shape[:2]
    score = np.zeros((height, width), np.float32)
    fine = _fine(before, after)
    rim = (fine < 1) & (_tint(before, after, fine < 1) < _TINT)
    for level, (constant, share) in enumerate(_LEVELS):
        if level:
            before, after = _halved(before), _halved(after)
        smooth = _smooth(before)
        differs = np.abs(smooth - _smooth(after)).max(-1)
        tolerance = constant / 255 + share * _contrast(smooth)
        score = np.maximum(score, _enlarged(differs / tolerance, (width, height), 2**level))
    changed = _spread(score >= 1, score >= _WEAK)
    closed = ~_widened(~_widened(changed, _GAP), _GAP)
    kept = _spread(~closed, ~closed | (_widened(~closed, _RIM) & rim))
    weight = np.clip(2 * (fine - 1), 0, 1)
    weight[~_widened(kept, _FEATHER - 1)] = 1
    for distance in range(1, _FEATHER):
        weight = np.maximum(weight, ~_widened(kept, distance - 1) * np.float32(distance / _FEATHER))
    weight[kept] = 0
    return Image.fromarray((weight * 255).round().astype(np.uint8))


def _fine(before: Array, after: Array) -> Array:
    """Return how far pixels differ beyond what blur explains; from 1 on they are another thing.

    An edge that is blurred is in both pictures. One that is in one of them alone is a change: its contrast excuses nothing.
    """
    smooth, smooth_after = _smooth(before), _smooth(after)
    contrast = np.minimum(_contrast(smooth), _contrast(smooth_after))
    constant, share = _FINE
    found: Array = np.abs(smooth - smooth_after).max(-1) / (constant / 255 + share * contrast)
    return found


def _tint(before: Array, after: Array, close: Array) -> Array:
    """Return how much the close pixels around each pixel, of 8x8 at least, differ on average: a faint change of an area."""
    height, width = close.shape
    near = close[..., None].astype(np.float32)
    difference, share = (after - before) * near, near
    for _ in range(2):
        difference, share = _halved(difference), _halved(share)
    mean = np.abs(_smooth(difference)).max(-1) / np.maximum(_smooth(share)[..., 0], 1e-3)
    return _enlarged(mean, (width, height), 4)


def _contrast(values: Array) -> Array:
    """Return the difference between the largest and the smallest of 3x3 pixels, of the channel that differs most."""
    found: Array = (_extremes(values, np.maximum) - _extremes(values, np.minimum)).max(-1)
    return found


def _widened(marks: Array, radius: int) -> Array:
    """Return marks (height, width) with `radius` pixels, at most 10, around them in rows and columns."""
    blurred = Image.fromarray(marks.astype(np.uint8) * np.uint8(255)).filter(ImageFilter.BoxBlur(radius))
    return np.asarray(blurred) > 0


def _spread(seeds: Array, allowed: Array) -> Array:
    """Return what of `allowed` is connected with `seeds`, which it contains; all of it if the ways are too winding."""
    found = seeds
    for _ in range(_SWEEPS):
        wider = found
        for axis in (0, 1):
            for backwards in (False, True):
                wider = _swept(wider, allowed, axis, backwards=backwards)
        if (wider == found).all():
            return found
        found = wider
    return allowed


def _swept(found: Array, allowed: Array, axis: int, *, backwards: bool) -> Array:
    """Return `found`, continued in one direction through everything that is `allowed`."""
    marks, free = np.moveaxis(found, axis, 0), np.moveaxis(allowed, axis, 0)
    if backwards:
        marks, free = marks[::-1], free[::-1]
    number = np.arange(1, len(marks) + 1)[:, None]
    last_mark = np.maximum.accumulate(np.where(marks, number, 0), 0)
    last_wall = np.maximum.accumulate(np.where(free, 0, number), 0)
    wider = (last_mark > last_wall) & free | marks
    return np.moveaxis(wider[::-1] if backwards else wider, 0, axis)


# Drift of the whole picture


def _shift(before: Array, after: Array) -> tuple[float, float]:
    """Return how far (dx, dy) the result lies to the right of the canvas and below it, in pixels; (0, 0) if uncertain."""
    height, width = before.shape[:2]
    limit = MAX_SHIFT * max(height, width)
    pyramid = [(before.mean(-1), after.mean(-1))]
    while min(pyramid[-1][0].shape) >= 64 and 2 ** len(pyramid) <= 2 * limit:
        pyramid.append((_halved(pyramid[-1][0]), _halved(pyramid[-1][1])))
    dx = dy = 0.0
    for grey_before, grey_after in reversed(pyramid):
        dx, dy = 2 * dx, 2 * dy
        for _ in range(6):
            moved = _translated(grey_after, (dx, dy))
            step = _step(grey_before, moved)
            if step is None:
                return 0.0, 0.0
            dx, dy = dx + step[0], dy + step[1]
            if math.hypot(*step) < 0.02:
                break
    if math.hypot(dx, dy) > limit:
        return 0.0, 0.0
    grey_before, grey_after = pyramid[0]
    smooth = _smooth(grey_before)
    down, right = np.gradient(smooth)
    steep = np.hypot(down, right) > _STEEP
    still = np.abs(_smooth(grey_after) - smooth)[steep]
    back = np.abs(_smooth(_translated(grey_after, (dx, dy))) - smooth)[steep]
    close = np.minimum(still, back) < _CLOSE
    better = back[close].sum() < _BETTER * still[close].sum()
    return (dx, dy) if better and close.mean() > 0.5 else (0.0, 0.0)


def _step(before: Array, after: Array) -> tuple[float, float] | None:
    """Return one step of least squares towards the shift, by what is close; None without gradients to tell it by."""
    smooth = _smooth(before)
    down, right = np.gradient(smooth)
    error = _smooth(after) - smooth
    error = error - np.median(error)
    steep = np.hypot(down, right)
    # an error may be as large as the slope and a bit of noise explain; what is larger is a change
    weight = (np.abs(error) < 1.5 * steep + 4 / 255) & (steep > _STEEP)
    if weight.mean() < 0.002:
        return None
    x, y, e = right[weight], down[weight], error[weight]
    matrix = np.array([[x @ x, x @ y], [x @ y, y @ y]], np.float64)
    small, large = np.linalg.eigvalsh(matrix)
    if small < 0.02 * large:
        return None
    dx, dy = np.linalg.solve(matrix, [-(x @ e), -(y @ e)])
    return float(np.clip(dx, -1, 1)), float(np.clip(dy, -1, 1))


def _colour(before: Array, after: Array) -> tuple[Array, Array] | None:
    """Return gain and offset (3,) of the result's colours over the canvas', where both are close; (1, 0) if uncertain.

    None: most of the picture has other colours in one way, and by more than a drift. It was asked for.
    """
    before, after = _halved(_halved(before)), _halved(_halved(after))
    close = np.abs(after - before).max(-1) < 4 * MAX_COLOUR
    close &= (before.min(-1) > 0.02) & (before.max(-1) < 0.98)  # what is clipped tells nothing
    if close.mean() < MIN_SUPPORT:
        return _NO_DRIFT
    x, y = before[close], after[close]
    gain, offset = np.ones(3, np.float32), np.median(y - x, axis=0).astype(np.float32)
    for channel in range(3):
        if np.ptp(x[:, channel]) > 0.25:
            gain[channel], offset[channel] = _line(x[:, channel], y[:, channel])
    seen = np.quantile(x, (0.05, 0.95), axis=0)  # at colours that are not there the line tells nothing
    ends = np.abs(gain * seen + offset - seen)
    if ends.max() <= MAX_COLOUR:
        return gain, offset
    return None if close.mean() > 0.5 else _NO_DRIFT


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Return slope and intercept of y over x, by least squares that leave out what is further off than noise explains."""
    gain, offset = 1.0, float(np.median(y - x))
    for _ in range(5):
        error = np.abs(y - gain * x - offset)
        near = error <= max(2.5 * float(np.median(error)), 1 / 255)
        spread = float(np.var(x[near]))
        if spread < 1e-4:
            return 1.0, float(np.median(y - x))
        gain = float(np.mean((x[near] - x[near].mean()) * (y[near] - y[near].mean()))) / spread
        offset = float(y[near].mean() - gain * x[near].mean())
    return gain, offset


# Pictures


def _values(image: Image.Image) -> Array:
    return np.asarray(image, np.float32) / 255


def _halved(values: Array) -> Array:
    """Return means of 2x2 pixels; an odd side is continued by its edge."""
    height, width = values.shape[:2]
    odd = [(0, height % 2), (0, width % 2), (0, 0)][: values.ndim]
    values = np.pad(values, odd, mode="edge")
    means: Array = (values[::2, ::2] + values[1::2, ::2] + values[::2, 1::2] + values[1::2, 1::2]) / 4
    return means


def _enlarged(values: Array, size: tuple[int, int], factor: int) -> Array:
    """Return a level of the pyramid at the size (width, height) of the picture."""
    if factor == 1:
        return values
    box = (0, 0, size[0] / factor, size[1] / factor)
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR, box=box))


def _smooth(values: Array) -> Array:
    """Return means weighted by 1, 2, 1 along both axes."""
    for axis in (0, 1):
        v = np.pad(values, [(1, 1) if a == axis else (0, 0) for a in range(values.ndim)], mode="edge")
        a, b, c = (np.moveaxis(v, axis, 0)[i : i + values.shape[axis]] for i in range(3))
        values = np.moveaxis((a + 2 * b + c) / 4, 0, axis)
    return values


def _extremes(values: Array, extreme: np.ufunc) -> Array:
    """Return the largest or smallest of 3x3 pixels."""
    for axis in (0, 1):
        v = np.moveaxis(np.pad(values, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge"), axis, 0)
        values = np.moveaxis(extreme(extreme(v[:-2], v[1:-1]), v[2:]), 0, axis)
    return values


def _translated(values: Array, shift: tuple[float, float]) -> Array:
    """Return the picture moved back by (dx, dy), by cubic interpolation; what comes in from outside continues the edge."""
    margin = math.ceil(max(map(abs, shift))) + 2
    planes = values[..., None] if values.ndim == 2 else values
    height, width = values.shape[:2]
    moved = []
    for plane in np.moveaxis(planes, -1, 0):
        wide = Image.fromarray(np.pad(plane, margin, mode="edge"))
        matrix = (1, 0, margin + shift[0], 0, 1, margin + shift[1])
        moved.append(
            np.asarray(wide.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))
        )
    return moved[0] if values.ndim == 2 else np.stack(moved, -1)
