"""Judge a picture against the rendered truth: PSNR, SSIM, and whether it shows what was asked for.

Owns the measures. A picture is a success when the truth is nearer to it than every picture that differs from the truth in
one thing: another sticker in its place (of all named and held-out ones), another place, another size, mirrored, grey,
left out, one of a reference that should not be there, or another scene. Knows nothing of models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from skimage.metrics import structural_similarity

from world import COLUMNS, HELD_OUT, ROWS, SCALES, STICKERS, Picture, Renderer, Scene, scene_names

Pixels = np.ndarray
SAME = 30.0
"""Alternatives nearer to the truth than this many dB, where they differ in place, count as the truth (a mirrored ball)."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """PSNR in dB, SSIM, and which properties are right; a success has all of them."""

    psnr: float
    ssim: float
    sticker: bool
    place: bool
    form: bool
    scene: bool

    @property
    def success(self) -> bool:
        return self.sticker and self.place and self.form and self.scene


def pixels(image: Image.Image) -> Pixels:
    """(height, width, 3) in [0, 1]."""
    return np.asarray(image.convert("RGB"), np.float32) / 255


def psnr(a: Pixels, b: Pixels, where: np.ndarray | None = None) -> float:
    """PSNR in dB of pictures in [0, 1], over the pixels of a mask (height, width) if one is given."""
    error = np.square(a - b)
    return -10 * math.log10(max(float((error if where is None else error[where]).mean()), 1e-10))


def ssim(a: Pixels, b: Pixels) -> float:
    """Structural similarity (Wang et al. 2004; Gaussian window of sigma 1.5)."""
    return float(
        structural_similarity(
            a, b, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def alternatives(truth: Picture, references: Sequence[Picture]) -> Iterator[tuple[str, Picture]]:
    """Pictures that differ from the truth in one thing, with the name of that thing."""
    for i, sticker in enumerate(truth.stickers):
        for glyph in (*STICKERS.values(), *HELD_OUT.values()):
            if glyph != sticker.glyph:
                yield "sticker", truth.with_sticker(i, glyph=glyph)
        taken = {(s.column, s.row) for s in truth.stickers}
        for column in COLUMNS:
            for row in ROWS:
                if (column, row) not in taken:
                    yield "place", truth.with_sticker(i, column=column, row=row)
        for scale in SCALES:
            if scale != sticker.scale:
                yield "form", truth.with_sticker(i, scale=scale)
        for other in other_forms(truth, i):
            yield "form", other
        yield "sticker", replace(truth, stickers=(*truth.stickers[:i], *truth.stickers[i + 1 :]))
    for sticker in {s for picture in references for s in picture.stickers}:
        if (sticker.glyph, sticker.column, sticker.row) not in {(s.glyph, s.column, s.row) for s in truth.stickers}:
            yield "sticker", replace(truth, stickers=(sticker, *truth.stickers))  # behind those that belong there
    for name in scene_names():
        if name != truth.scene.name:
            yield "scene", replace(truth, scene=Scene(name=name))


def seen(candidate: Pixels, right: Pixels) -> bool:
    """Return True if two pictures differ visibly: where they differ, by more than `SAME`."""
    differs = np.abs(candidate - right).max(-1) > 0
    return bool(differs.any()) and psnr(candidate, right, differs) <= SAME


def other_forms(picture: Picture, index: int) -> tuple[Picture, Picture]:
    """The picture with one of its stickers mirrored, and with it in grey instead of colour or the other way round."""
    sticker = picture.stickers[index]
    return (
        picture.with_sticker(index, mirrored=not sticker.mirrored),
        picture.with_sticker(index, grey=not sticker.grey),
    )


def told_forms(picture: Picture, index: int, renderer: Renderer) -> list[Picture]:
    """Return those of `other_forms` that differ visibly from the picture; a mirrored ball does not."""
    right = pixels(renderer.render(picture))
    return [form for form in other_forms(picture, index) if seen(pixels(renderer.render(form)), right)]


@dataclass(frozen=True, kw_only=True)
class NewArea:
    """What of a picture was not there before, (height, width) bool, and the picture with nothing but its edges continued."""

    where: np.ndarray
    continued: Image.Image


def judge(
    image: Image.Image,
    truth: Picture,
    *,
    references: Sequence[Picture],
    renderer: Renderer,
    new_area: NewArea | None = None,
) -> Verdict:
    """Return everything that is wrong with an image; `references` are the pictures that it was made from.

    With a `new_area` the scene is judged in it alone, and there another scene is what only continues the edges, too.
    """
    found, right = pixels(image), pixels(renderer.render(truth))
    squared = np.square(found - right).sum(-1)
    wrong: set[str] = set()
    others = ((thing, pixels(renderer.render(other))) for thing, other in alternatives(truth, references))
    if new_area is not None:
        others = itertools.chain(others, [("scene", pixels(new_area.continued))])
    for thing, candidate in others:
        if thing in wrong:
            continue
        if new_area is not None and thing == "scene":
            candidate = np.where(new_area.where[..., None], candidate, right)
        if not seen(candidate, right):
            continue
        differs = np.abs(candidate - right).max(-1) > 0
        if np.square(found - candidate).sum(-1)[differs].sum() <= squared[differs].sum():
            wrong.add(thing)
    return Verdict(
        psnr=psnr(found, right),
        ssim=ssim(found, right),
        sticker="sticker" not in wrong,
        place="place" not in wrong,
        form="form" not in wrong,
        scene="scene" not in wrong,
    )
