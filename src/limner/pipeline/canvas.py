"""The canvas of an image: the picture that is repainted, where and how strongly, and how the result is put back into it.

Owns the way from a caller's picture and mask to a picture of the output's size and a mask of tokens, and back. Pixels are
`limner.images`'; steps are `denoise`'s. What the images of a call have together is `repaint`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    check_drawn,
    check_marked,
    cut,
    cut_mask,
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
from limner.pipeline.control import MASK_BLUR, PerPrompt, check_strength
from limner.requests import OF_MASKS, REPAINTING, Control, repaints

__all__ = ["Canvas", "canvas_bytes", "open_canvases", "whole_canvas"]

_PILLOW_BYTES = 4
"""Of a pixel in memory, also of three channels."""
_NO_TOKEN = (
    f"mask_image: it marks none of the tokens, which are {PIXELS} pixels wide, so nothing is repainted; give a larger "
    "white area"
)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Canvas:
    """A picture that is repainted. It has plain values alone, so it may go to another process.

    `picture` is the caller's, upright and in sRGB, with new area around it where it is expanded; `plan` says how it is
    drawn and put back. `prepared` is what is drawn, of the output's size; `reference` is what the model sees of it as
    image 1: all of it, or of an expanded canvas the old picture, at its place in the new one. `strength` in (0, 1] is the
    share of the steps that are drawn. `masked` is False for image to image: then nothing is put back. `preserves`: what
    the edit did not change is taken from the picture. `asked` are those arguments that the metadata of the result repeats.
    """

    picture: Image.Image
    plan: CanvasPlan
    prepared: PreparedReference
    reference: PreparedReference
    strength: float
    masked: bool
    preserves: bool
    warnings: tuple[str, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)
    tokens: Tensor | None = None
    """The mask of tokens (1 or B, S_img, 1), where it is not made of that of pixels."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of what is drawn."""
        return self.plan.drawn_size

    @property
    def is_plain(self) -> bool:
        """True if all is drawn, from noise alone: steps have no use for the canvas."""
        return not self.masked and self.tokens is None and self.strength == 1

    @property
    def puts_back(self) -> bool:
        """Whether the drawn picture is put back into the canvas."""
        return self.masked or self.preserves

    @property
    def metadata(self) -> dict[str, Any]:
        """What is done with the canvas, as values of JSON: digests, and no pixels."""
        found: dict[str, Any] = {"canvas_digest": self.prepared.report.digest, "strength": self.strength, **self.asked}
        if self.masked:
            found |= {"box": list(self.plan.box), "canvas_size": list(self.picture.size)}
        if self.preserves:
            found["preserve"] = "auto"
        return found

    def mask(self) -> Tensor:
        """Return the mask of tokens (1, S_img, 1): 1 where a pixel of the token is repainted, 0 where none is.

        A token draws all of its pixels at once. What of them is outside of the mask is put back afterwards.
        """
        if self.tokens is not None:
            return self.tokens
        if not self.masked:
            return torch.ones(1, self.size[0] * self.size[1] // PIXELS**2, 1)
        values = torch.from_numpy(np.asarray(cut_mask(self.plan), np.float32) / 255)[None, None]
        return F.max_pool2d(values, PIXELS).flatten(2).transpose(1, 2)

    def first_step(self, num_steps: int) -> int:
        """Return how many of the steps are left out, as diffusers does: at least one step is drawn."""
        return int(max(num_steps - min(num_steps * self.strength, num_steps), 0))

    def put_back(self, drawn: Image.Image, *, weight: np.ndarray | None) -> tuple[Image.Image, Preserved | None]:
        """Return a drawn picture in the canvas, at its size; and what was kept, where the edit leaves the rest alone.

        `weight` is that of the plan, where it is masked.
        """
        if not self.preserves:
            return stitch(self.picture, drawn, self.plan, weight=weight), None
        if self.plan.box != (0, 0, *self.plan.size):  # it was continued beyond its edges, to the grid
            drawn = stitch(self.picture, drawn, self.plan)
        found = preserve(self.picture, drawn)
        return found.picture, found


def canvas_bytes(canvases: Iterable[Canvas | None]) -> int:
    """Return the bytes of canvases in memory: their masks, and their pictures, each once however many masks share it."""
    there = [canvas for canvas in {*canvases} if canvas is not None]
    pictures = {id(canvas.picture): canvas.picture for canvas in there}.values()
    prepared = {id(one): one for canvas in there for one in (canvas.prepared, canvas.reference)}.values()
    return (
        sum(_PILLOW_BYTES * picture.width * picture.height for picture in pictures)
        + sum(len(one.data) for one in prepared)
        + sum(canvas.plan.mask.nbytes for canvas in there)
    )


def whole_canvas(prepared: PreparedReference, *, tokens: Tensor, strength: float) -> Canvas:
    """Return a canvas that is drawn as it is, with a mask of tokens (1 or B, S_img, 1), and put back nowhere.

    A mask of which no token is left is drawn as diffusers does, with a warning.
    """
    size = prepared.report.processed_size
    picture = Image.frombytes("RGB", size, prepared.data)
    mask = np.full((size[1], size[0]), 255, np.uint8)
    plan = CanvasPlan(size=size, box=(0, 0, *size), drawn_size=size, mask=mask, mask_blur=0)
    return Canvas(
        picture=picture,
        plan=plan,
        prepared=prepared,
        reference=prepared,
        strength=strength,
        masked=False,
        preserves=False,
        warnings=() if tokens.any() else (_NO_TOKEN,),
        tokens=tokens,
    )


def open_canvases(
    control: Control, image: Any, *, policy: ReferencePolicy, sizes: Sequence[tuple[int, int]], num_prompts: int
) -> tuple[tuple[Canvas | None, ...], Any]:
    """Return the canvases of a call and its pictures: the canvas' place in them has its `reference`.

    There is one canvas for all prompts or one for each; none: (). The canvas is the first picture, or `canvas`, which is
    then no reference. `sizes` are those that the model draws; none: any. Raises `InvalidRequest`.
    """
    ready = control.get("canvas")
    if isinstance(ready, PerPrompt):
        return tuple(ready), image
    if isinstance(ready, Canvas):
        return (ready,), image
    _check_names(control)
    if not repaints(control):
        return (), image
    pictures = None if image is None else as_list(image)
    is_first = ready is None
    if is_first and not pictures:
        names = ", ".join(name for name in REPAINTING if control.get(name) is not None)
        raise InvalidRequest("canvas", f"{names} needs a picture to repaint; give image, or canvas")
    source = pictures[0] if is_first and pictures else ready
    picture = _open(source, policy=policy, field="image 1" if is_first else "canvas")
    canvases = _plan(picture, control, policy=policy, sizes=sizes, num_prompts=num_prompts, is_first=is_first)
    if is_first and pictures:
        return canvases, [canvases[0].reference, *pictures[1:]]
    return canvases, image


def _open(source: Any, *, policy: ReferencePolicy, field: str) -> Image.Image:
    """Return a canvas as RGB or RGBA, upright and in sRGB, with nothing else of its file."""
    if isinstance(source, PreparedReference):
        return Image.frombytes("RGB", source.report.processed_size, source.data)
    prepare_reference(source, policy=policy, field=field)  # what is refused of a reference is refused of a canvas
    opened, field = open_picture(source, field=field)
    picture, _ = upright(to_srgb(opened)[0], field=field)
    alpha = picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info
    plain = Image.new("RGBA" if alpha else "RGB", picture.size)
    plain.paste(picture.convert(plain.mode))
    return plain


def _plan(
    picture: Image.Image,
    control: Control,
    *,
    policy: ReferencePolicy,
    sizes: Sequence[tuple[int, int]],
    num_prompts: int,
    is_first: bool,
) -> tuple[Canvas, ...]:
    strength, background = check_strength(control.get("strength")), policy.background or "white"
    known, fields = None, list[str]()
    mask_image, expand = control.get("mask_image"), control.get("expand")
    masked = mask_image is not None or expand is not None
    preserves = _check_preserve(control.get("preserve"), masked=masked)
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
        fields = ["mask_image"] if len(given) == 1 else [f"mask_image {i}" for i in range(1, len(given) + 1)]
        masks = [read_mask(one, size=picture.size, field=name) for one, name in zip(given, fields, strict=True)]
        for mask, name in zip(masks, fields, strict=True):
            check_marked(mask, field=name)
    else:
        picture = _flat(picture, background=background)
        masks = [np.full((picture.height, picture.width), 255, np.uint8)]
    plans = [
        plan_canvas(
            picture.size,
            mask,
            max_pixels=policy.pixels,
            sizes=tuple(sizes),
            padding=control.get("padding_mask_crop"),
            mask_blur=MASK_BLUR if (blur := control.get("mask_blur")) is None else blur,
        )
        for mask in masks
    ]
    for plan, name in zip(plans, fields, strict=False):
        check_drawn(plan, field=name)
    if len({(plan.box if is_first else None, plan.drawn_size) for plan in plans}) > 1:
        raise InvalidRequest(
            "mask_image", "the masks of one call ask for other parts of the canvas; draw them one after another"
        )
    drawn: dict[Any, PreparedReference] = {}
    for plan in plans:
        if (plan.box, plan.drawn_size) not in drawn:
            size = plan.drawn_size
            drawn[plan.box, size] = prepare_reference(
                cut(picture, plan, background=background)[0],
                policy=ReferencePolicy(max_pixels=size[0] * size[1], max_aspect=1e9),
            )
    return tuple(
        Canvas(
            picture=picture,
            plan=plan,
            prepared=(prepared := drawn[plan.box, plan.drawn_size]),
            reference=_seen(prepared, plan, known),
            strength=strength,
            masked=masked,
            preserves=preserves,
            warnings=tuple(describe_mask(plan.mask)) if mask_image is not None else (),
            asked=_asked(control, plan) if masked else {},
        )
        for plan in plans
    )


def _seen(prepared: PreparedReference, plan: CanvasPlan, known: tuple[int, int, int, int] | None) -> PreparedReference:
    """Return what the model sees of a canvas: all of it, or what is known where it has new area."""
    box = None if known is None else known_box(plan, known)
    return prepared if box is None else prepared.part(box)


def _asked(control: Control, plan: CanvasPlan) -> dict[str, Any]:
    """Return the arguments that say what is repainted, as values of JSON; a digest of the mask."""
    found: dict[str, Any] = {"mask": hashlib.sha256(plan.mask.tobytes()).hexdigest(), "mask_blur": plan.mask_blur}
    if (expand := control.get("expand")) is not None:
        found["expand"] = dict(expand) if isinstance(expand, Mapping) else list(expand)
    if (padding := control.get("padding_mask_crop")) is not None:
        found["padding_mask_crop"] = padding
    return found


def _flat(picture: Image.Image, *, background: str) -> Image.Image:
    """Return a picture without transparency, on `background`."""
    if picture.mode == "RGB":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")


def _check_names(control: Control) -> None:
    """Refuse what would have no effect."""
    masked = any(control.get(name) is not None for name in ("mask_image", "expand"))
    for name in OF_MASKS:
        if not masked and control.get(name) is not None:
            raise InvalidRequest(name, "needs mask_image or expand; without them everything is drawn")
    if control.get("canvas") is not None and not repaints(control):
        raise InvalidRequest("canvas", f"says which picture is repainted; give one of {', '.join(REPAINTING)} too")


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
