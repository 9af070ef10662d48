"""The canvas of a call: the picture that is repainted, where and how strongly, and how the result is put back into it.

Owns the way from a caller's picture and mask to a picture of the output's size and a mask of tokens, and back. Pixels are
`limner.images`'; steps are `denoise`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from limner.config import ReferencePolicy
from limner.errors import InvalidRequest
from limner.grid import PIXELS
from limner.images import (
    CanvasPlan,
    PreparedReference,
    Preserved,
    cut,
    describe_mask,
    expand_canvas,
    known_box,
    plan_canvas,
    prepare_reference,
    preserve,
    read_mask,
    stitch,
)
from limner.images.colour import to_srgb
from limner.images.reference import upright
from limner.images.sources import as_list, open_picture
from limner.pipeline.control import MASK_BLUR, check_strength
from limner.requests import Control

__all__ = ["Canvas", "open_canvas", "whole_canvas"]

_OF_CANVAS = ("canvas", "mask_image", "strength", "expand", "padding_mask_crop", "preserve")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Canvas:
    """A picture that is repainted.

    `picture` is the caller's, upright and in sRGB, with new area around it where it is expanded; `plans` say how it is
    drawn and put back, one for each mask. `prepared` is what is drawn, of the output's size; `reference` is what the
    model sees of it as image 1: all of it, or of an expanded canvas the old picture, at its place in the new one.
    `strength` in (0, 1] is the share of the steps that are drawn. `masked` is False for image to image: then nothing is
    put back. `preserves`: what the edit did not change is taken from the picture.
    """

    picture: Image.Image
    plans: tuple[CanvasPlan, ...]
    prepared: PreparedReference
    reference: PreparedReference
    strength: float
    masked: bool
    preserves: bool
    warnings: tuple[str, ...]
    tokens: Tensor | None = None
    """The masks of tokens, where they are not made of those of pixels."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of what is drawn."""
        return self.plans[0].drawn_size

    @property
    def is_plain(self) -> bool:
        """True if all is drawn, from noise alone: steps have no use for the canvas."""
        return not self.masked and self.tokens is None and self.strength == 1

    def mask(self, *, num_images_per_prompt: int) -> Tensor:
        """Return the masks of tokens (1 or B, S_img, 1): 1 where a pixel of the token is repainted, 0 where none is.

        A token draws all of its pixels at once. What of them is outside of the mask is put back afterwards.
        """
        if self.tokens is not None:
            return self.tokens
        if not self.masked:
            return torch.ones(1, 1, 1)
        masks = []
        for plan in self.plans:
            _, mask = cut(self.picture, plan)
            values = torch.from_numpy(np.asarray(mask, np.float32) / 255)[None, None]
            masks.append(F.max_pool2d(values, PIXELS).flatten(2).transpose(1, 2))
        if len(masks) == 1:
            return masks[0]
        return torch.cat(masks).repeat_interleave(num_images_per_prompt, dim=0)

    def sigmas(self, sigmas: Tensor) -> Tensor:
        """Return the noise levels (steps + 1,) that are drawn, as diffusers takes them: at least one step."""
        steps = len(sigmas) - 1
        start = int(max(steps - min(steps * self.strength, steps), 0))
        return sigmas[start:]

    def finish(self, drawn: Sequence[Image.Image], rows: Sequence[int], *, num_images: int) -> list[Image.Image]:
        """Return drawn pictures put back into the canvas, at its size; `rows` say which of the batch's they are."""
        per_plan = num_images // len(self.plans)
        return [
            stitch(self.picture, image, self.plans[row // per_plan]) for row, image in zip(rows, drawn, strict=True)
        ]

    def preserve(self, drawn: Image.Image) -> Preserved:
        """Return a drawn picture in which what the edit did not change is the canvas' own."""
        plan = self.plans[0]
        if plan.box != (0, 0, *plan.size):  # it was continued beyond its edges, to the grid
            drawn = stitch(self.picture, drawn, plan)
        return preserve(self.picture, drawn)


def whole_canvas(prepared: PreparedReference, *, tokens: Tensor, strength: float) -> Canvas:
    """Return a canvas that is drawn as it is, with a mask of tokens (1 or B, S_img, 1), and put back nowhere."""
    size = prepared.report.processed_size
    picture = Image.frombytes("RGB", size, prepared.data)
    mask = np.full((size[1], size[0]), 255, np.uint8)
    plan = CanvasPlan(size=size, box=(0, 0, *size), drawn_size=size, mask=mask, mask_blur=0)
    return Canvas(
        picture=picture,
        plans=(plan,),
        prepared=prepared,
        reference=prepared,
        strength=strength,
        masked=False,
        preserves=False,
        warnings=(),
        tokens=tokens,
    )


def open_canvas(
    control: Control, image: Any, *, policy: ReferencePolicy, sizes: Sequence[tuple[int, int]], num_prompts: int
) -> tuple[Canvas | None, Any]:
    """Return the canvas of a call, None if it has none, and its pictures: the canvas' place in them has its `reference`.

    The canvas is the first picture, or `canvas`, which is then no reference. `sizes` are those that the model draws; none:
    any. Raises `InvalidRequest`.
    """
    if isinstance(ready := control.get("canvas"), Canvas):
        return ready, image
    if all(control.get(name) is None for name in _OF_CANVAS):
        if control.get("mask_blur") is not None:
            raise InvalidRequest("mask_blur", "needs mask_image or expand; without them everything is drawn")
        return None, image
    pictures = None if image is None else as_list(image)
    is_first = control.get("canvas") is None
    if is_first and not pictures:
        names = ", ".join(name for name in _OF_CANVAS if control.get(name) is not None)
        raise InvalidRequest("canvas", f"{names} needs a picture to repaint; give image, or canvas")
    source = pictures[0] if is_first and pictures else control["canvas"]
    picture = _open(source, policy=policy, field="image 1" if is_first else "canvas")
    canvas = _plan(picture, control, policy=policy, sizes=sizes, num_prompts=num_prompts)
    if is_first and pictures:
        return canvas, [canvas.reference, *pictures[1:]]
    return canvas, image


def _open(source: Any, *, policy: ReferencePolicy, field: str) -> Image.Image:
    """Return a canvas as RGB, upright and in sRGB."""
    if isinstance(source, PreparedReference):
        return Image.frombytes("RGB", source.report.processed_size, source.data)
    prepare_reference(source, policy=policy, field=field)  # what is refused of a reference is refused of a canvas
    opened, field = open_picture(source, field=field)
    picture, _ = upright(to_srgb(opened)[0], field=field)
    if picture.mode == "RGB":
        return picture
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        return picture.convert("RGBA")
    return picture.convert("RGB")


def _plan(
    picture: Image.Image,
    control: Control,
    *,
    policy: ReferencePolicy,
    sizes: Sequence[tuple[int, int]],
    num_prompts: int,
) -> Canvas:
    strength, warnings, known = check_strength(control.get("strength")), [], None
    mask_image, expand = control.get("mask_image"), control.get("expand")
    preserves = _check_preserve(control.get("preserve"), masked=mask_image is not None or expand is not None)
    if mask_image is not None and expand is not None:
        raise InvalidRequest(
            "expand", "mask_image and expand are both given; expand first, and give a mask of that size"
        )
    if expand is not None:
        picture, mask, known = expand_canvas(picture, **_expansion(expand))
        masks = [mask]
    elif mask_image is not None:
        given: list[Any] = list(mask_image) if isinstance(mask_image, (list, tuple)) else [mask_image]
        if len(given) not in (1, num_prompts):
            raise InvalidRequest(
                "mask_image", f"there are {len(given)} for {num_prompts} prompts; give one, or as many"
            )
        masks = [read_mask(one, size=picture.size) for one in given]
        warnings = list(dict.fromkeys(text for mask in masks for text in describe_mask(mask)))
    else:
        picture = _flat(picture, background=policy.background or "white")
        masks = [np.full((picture.height, picture.width), 255, np.uint8)]
    masked = mask_image is not None or expand is not None
    _check_names(control, masked=masked)
    plans = tuple(
        plan_canvas(
            picture.size,
            mask,
            max_pixels=policy.pixels,
            sizes=tuple(sizes),
            padding=control.get("padding_mask_crop") if masked else None,
            mask_blur=MASK_BLUR if (blur := control.get("mask_blur")) is None else blur,
        )
        for mask in masks
    )
    if len({(plan.box, plan.drawn_size) for plan in plans}) > 1:
        raise InvalidRequest(
            "mask_image", "the masks of one call ask for other parts of the canvas; draw them one after another"
        )
    drawn, _ = cut(picture, plans[0], background=policy.background or "white")
    size = plans[0].drawn_size
    prepared = prepare_reference(drawn, policy=ReferencePolicy(max_pixels=size[0] * size[1], max_aspect=1e9))
    # a model takes what it sees for the picture: of new area it is not to see the fill
    seen = None if known is None else known_box(plans[0], known)
    return Canvas(
        picture=picture,
        plans=plans,
        prepared=prepared,
        reference=prepared if seen is None else prepared.part(seen),
        strength=strength,
        masked=masked,
        preserves=preserves,
        warnings=tuple(warnings),
    )


def _flat(picture: Image.Image, *, background: str) -> Image.Image:
    """Return a picture without transparency, on `background`."""
    if picture.mode == "RGB":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")


def _check_names(control: Control, *, masked: bool) -> None:
    """Refuse what would have no effect."""
    for name in ("mask_blur", "padding_mask_crop"):
        if not masked and control.get(name) is not None:
            raise InvalidRequest(name, "needs mask_image or expand; without them everything is drawn")
    others = ("mask_image", "expand", "strength", "preserve")
    if control.get("canvas") is not None and all(control.get(name) is None for name in others):
        raise InvalidRequest("canvas", f"says which picture is repainted; give one of {', '.join(others)} too")


def _expansion(expand: Any) -> dict[str, Any]:
    """Return the arguments of `expand_canvas`: (left, top, right, bottom), or size, anchor and overlap by name."""
    if not isinstance(expand, Mapping):
        return {"expand": expand}
    unknown = [name for name in expand if name not in ("expand", "size", "anchor", "overlap")]
    if unknown:
        raise InvalidRequest("expand", f"{', '.join(map(str, unknown))} are not expand, size, anchor or overlap")
    return dict(expand)


def _check_preserve(value: str | None, *, masked: bool) -> bool:
    if value not in (None, "auto"):
        raise InvalidRequest("preserve", f"{value!r} is not one of None, 'auto'")
    if value is not None and masked:
        raise InvalidRequest("preserve", "is for edits without a mask: a mask says what is kept; give one of them")
    return value is not None
