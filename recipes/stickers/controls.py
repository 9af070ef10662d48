"""Cases of the tasks that keep part of a picture: a mask, new area around it, or what an edit leaves alone.

Each has a truth that is rendered, as those of `tasks.py`, whose prompts they use. Owns masks and margins of the cases, and what is
measured of what should not change. Knows nothing of models.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from judge import NewArea, pixels, psnr
from limner.images import expand_canvas
from tasks import NUM_VARIANTS, Example, Grammar
from world import GRID, STICKERS, TOKEN, Picture, Renderer, Sticker

CONTROLS = ("mask", "outpaint", "preserve")
Box = tuple[int, int, int, int]
NEW_AREAS = (2 * GRID, 4 * GRID)
"""Pixels that a picture is continued by, at one side or at two."""
LEAST_KEPT = 4 * GRID
"""What is left of each side at least."""
CONTINUE_WORDS = ("continue the picture", "extend the picture", "more of the scene", "the whole scene")
"""Prompts that leave it to the picture what is beside it; only training has them."""
BESIDE = TOKEN // 2
"""Pixels beside a change of the truth, half a token, where no model can tell what is still old from what is new."""
EVERYTHING = 0.01
"""Where less than this share is left, untouched pixels are not measured."""


@dataclass(frozen=True, kw_only=True)
class Control(Example):
    """An example with what the call is given besides: boxes that are repainted, (left, top, right, bottom) of new area, or neither."""

    boxes: tuple[Box, ...] = ()
    expand: Box | None = None

    def arguments(self, renderer: Renderer) -> dict[str, Any]:
        """Return what the pipeline takes besides prompt, size and noise."""
        images = [renderer.render(picture) for picture in self.references]
        if self.expand is not None:
            return {"image": [self._shown(renderer)], "expand": self.expand}
        if self.boxes:
            return {"image": images, "mask_image": Image.fromarray(self.mask()), "mask_blur": 0}
        return {"image": images, "preserve": "auto"}

    @property
    def known(self) -> Box:
        """The part of the result that is there before, (left, top, right, bottom)."""
        width, height = self.result.size
        left, top, right, bottom = self.expand or (0, 0, 0, 0)
        return (left, top, width - right, height - bottom)

    def drawn_tokens(self) -> np.ndarray:
        """Return what is repainted by tokens, (height / 16, width / 16) bool, as the pipeline does; all without a mask."""
        if self.expand is None:
            mask = self.mask() > 0 if self.boxes else np.ones(self.result.size[::-1], bool)
        else:
            mask = expand_canvas(Image.new("RGB", _size(self.known)), expand=self.expand).mask > 0
        height, width = mask.shape
        return mask.reshape(height // TOKEN, TOKEN, width // TOKEN, TOKEN).any((1, 3))

    def mask(self) -> np.ndarray:
        """Return what is repainted, (height, width) uint8 of 0 and 255."""
        width, height = self.result.size
        mask = np.zeros((height, width), np.uint8)
        for left, top, right, bottom in self.boxes:
            mask[top:bottom, left:right] = 255
        return mask

    def new_area(self, renderer: Renderer) -> NewArea | None:
        """Return what is new in the result."""
        if self.expand is None:
            return None
        continued, _, (left, top, right, bottom) = expand_canvas(self._shown(renderer), expand=self.expand)
        where = np.ones((continued.height, continued.width), bool)
        where[top:bottom, left:right] = False
        return NewArea(where=where, continued=continued)

    def _shown(self, renderer: Renderer) -> Image.Image:
        """Return the part of the result that is there before."""
        return renderer.render(self.result).crop(self.known)

    def kept(self, image: Image.Image, renderer: Renderer) -> dict[str, float]:
        """Return what is measured where the result should be as before, by name.

        Of masks `changed_outside`, the pixels outside of the mask that are not those of the canvas. Of new area
        `new_area`, its PSNR in dB, and `continued`, that of the edges continued. Of `preserve` see `untouched`.
        """
        if (area := self.new_area(renderer)) is not None:
            truth = pixels(renderer.render(self.result))
            drawn = {"new_area": pixels(image), "continued": pixels(area.continued)}
            return {name: psnr(one, truth, area.where) for name, one in drawn.items()}
        if self.boxes:
            found, before = pixels(image), pixels(renderer.render(self.references[0]))
            return {"changed_outside": float((found != before).any(-1)[self.mask() == 0].sum())}
        return untouched(image, self, renderer)


def untouched(image: Image.Image, case: Example, renderer: Renderer) -> dict[str, float]:
    """Return the PSNR in dB on what an edit should leave as it was, by name.

    `untouched` are all pixels that are equal in image 1 and in the truth; `untouched_away` those of them that are further
    than half a token (8 pixels) from every pixel that the truth changes. Where there are next to none it is left out.
    """
    found, before, truth = pixels(image), *(pixels(renderer.render(p)) for p in (case.references[0], case.result))
    changed = (truth != before).any(-1)
    near = Image.fromarray(changed.astype(np.uint8) * np.uint8(255)).filter(ImageFilter.MaxFilter(2 * BESIDE + 1))
    where = {"untouched": ~changed, "untouched_away": np.asarray(near) == 0}
    return {name: psnr(found, truth, mask) for name, mask in where.items() if mask.mean() > EVERYTHING}


def control_cases(task: str, num: int, *, seed: int = 0) -> list[Control]:
    """Return fixed cases of a task; those of `preserve` are the edits of the evaluation."""
    if task == "preserve":
        rng = random.Random(f"{seed}/edit/evaluation")
        grammar = Grammar([*STICKERS.values()], evaluation=True)
        return [Control(**vars(grammar.draw(rng, "edit"))) for _ in range(num)]
    rng = random.Random(f"{seed}/{task}/evaluation")
    grammar = Grammar([*STICKERS.values()], evaluation=True)
    found: list[Control] = []
    while len(found) < num:
        case = _outpainted(rng, grammar) if task == "outpaint" else _masked(rng, grammar, remove=len(found) % 2 == 1)
        if case is not None:
            found.append(case)
    return found


def training_sitting(rng: random.Random, grammar: Grammar, task: str) -> list[Control]:
    """Return one example to train `mask` or `outpaint` on, as a sitting; half of those to outpaint do not name what is there."""
    case = None
    while case is None:
        case = _masked(rng, grammar, remove=rng.random() < 0.5) if task == "mask" else _outpainted(rng, grammar)
    if task == "outpaint" and rng.random() < 0.5:
        picture = case.result
        varied = replace(picture, scene=replace(picture.scene, variant=rng.randrange(NUM_VARIANTS)))
        case = replace(case, prompt=rng.choice(CONTINUE_WORDS), result=varied)
    return [case]


def _masked(rng: random.Random, grammar: Grammar, *, remove: bool) -> Control | None:
    """Return an example that only adds stickers to image 1, replaces them or takes them away, with the boxes of these."""
    example = grammar.draw(rng, "edit" if remove else "combine2")
    before, after = example.references[0], example.result
    gone = [s for s in before.stickers if s not in after.stickers]
    new = [s for s in after.stickers if s not in before.stickers]
    if before.scene != after.scene or (remove and new) or not (gone or new):
        return None
    boxes = {_box(sticker, after) for sticker in (*gone, *new)}
    return Control(**vars(replace(example, task="mask")), boxes=tuple(sorted(boxes)))


def _outpainted(rng: random.Random, grammar: Grammar) -> Control | None:
    """Return a picture asked for by name, of which up to two sides without sticker are missing."""
    example = grammar.draw(rng, "draw")
    width, height = example.result.size
    boxes = [_box(sticker, example.result) for sticker in example.result.stickers]
    free = (
        min(left for left, _, _, _ in boxes),
        min(top for _, top, _, _ in boxes),
        width - max(right for _, _, right, _ in boxes),
        height - max(bottom for _, _, _, bottom in boxes),
    )
    fitting = {
        side: [new for new in NEW_AREAS if free[side] >= new and (width, height)[side % 2] - new >= LEAST_KEPT]
        for side in range(4)
    }
    sides = [side for side in fitting if fitting[side]]
    chosen = rng.sample(sides, min(len(sides), rng.choice((1, 2))))
    if not chosen or {0, 2} <= set(chosen) or {1, 3} <= set(chosen):
        return None
    expand = tuple(rng.choice(fitting[side]) if side in chosen else 0 for side in range(4))
    return Control(**vars(replace(example, task="outpaint")), expand=(expand[0], expand[1], expand[2], expand[3]))


def _size(box: Box) -> tuple[int, int]:
    return (box[2] - box[0], box[3] - box[1])


def _box(sticker: Sticker, picture: Picture) -> Box:
    left, top = sticker.box(picture.size)
    return (left, top, left + sticker.scale, top + sticker.scale)
