"""The inputs of Edit beyond prompt and references: what is repainted, and how much references count.

Owns their sockets, and how MASK (B, H, W) in [0, 1] and IMAGE become a `limner.requests.Control`. docs/control.md says what
they mean.
"""

from __future__ import annotations

import re
from typing import Any

from PIL import Image
from torch import Tensor

from limner.errors import InvalidRequest
from limner.pipeline.control import MASK_BLUR
from limner.requests import Control

from .pictures import to_mask, to_pictures
from .references import KeptReferences

__all__ = ["control_inputs", "control_of", "read_weights"]

_MAX_SIDE = 8192
_SIDES = ("left", "top", "right", "bottom")


def control_inputs() -> dict[str, Any]:
    """The optional inputs; what is left at its default asks for nothing."""
    side = {"default": 0, "min": 0, "max": _MAX_SIDE}
    blur = {"default": MASK_BLUR, "min": 0, "max": 1024, "tooltip": "pixels over which the repainted place fades out"}
    crop = {
        "default": -1,
        "min": -1,
        "max": _MAX_SIDE,
        "tooltip": "draw the mask and so many pixels around it; -1: off",
    }
    strength = {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01, "tooltip": "under 1: draw over image 1"}
    guidance = {
        "default": 1.0,
        "min": 0.0,
        "max": 10.0,
        "step": 0.1,
        "tooltip": "over 1 holds a likeness; twice the time",
    }
    return {
        "mask": (
            "MASK",
            {
                "tooltip": "of image 1's size: what is masked is repainted, the rest stays, to the pixel beyond mask_blur"
            },
        ),
        "canvas": ("IMAGE", {"tooltip": "repaint this picture instead of image 1"}),
        "strength": ("FLOAT", strength),
        "preserve": (["off", "auto"], {"tooltip": "auto: what the edit did not change comes from image 1"}),
        **{f"expand_{name}": ("INT", {**side, "tooltip": f"new pixels at the {name}"}) for name in _SIDES},
        "mask_blur": ("INT", blur),
        "padding_mask_crop": ("INT", crop),
        "reference_weights": ("STRING", {"default": "", "tooltip": "one for each reference, as 1.0, 0.6; 1: as it is"}),
        "reference_guidance": ("FLOAT", guidance),
    }


def control_of(
    references: KeptReferences,
    *,
    mask: Tensor | None = None,
    canvas: Tensor | None = None,
    strength: float = 1.0,
    preserve: str = "off",
    mask_blur: int = MASK_BLUR,
    padding_mask_crop: int = -1,
    reference_weights: str = "",
    reference_guidance: float = 1.0,
    **expand: int,
) -> Control:
    """Return what the inputs ask for. Without `canvas`, image 1 of the references is repainted; their K/V stay.

    Raises `InvalidRequest`.
    """
    sides = tuple(expand.pop(f"expand_{name}", 0) for name in _SIDES)
    if expand:
        raise TypeError(f"{', '.join(expand)} are no inputs")
    found = Control()
    if reference_weights.strip():
        found["reference_weights"] = read_weights(reference_weights)
    if reference_guidance != 1:
        found["reference_guidance"] = reference_guidance
    if strength != 1:
        found["strength"] = strength
    if preserve != "off":
        found["preserve"] = preserve
    if any(sides):
        found["expand"] = sides
    if mask is None and not {"strength", "preserve", "expand"} & found.keys():
        if canvas is not None:
            raise InvalidRequest("canvas", "is connected, and nothing says what of it is repainted; connect a mask too")
        _check_unused(mask_blur, padding_mask_crop)
        return found
    found["canvas"] = picture = _canvas(references, canvas)
    if mask is not None:
        found["mask_image"] = to_mask(mask, size=picture.size)
    if mask is not None or "expand" in found:
        found["mask_blur"] = mask_blur
        if padding_mask_crop >= 0:
            found["padding_mask_crop"] = padding_mask_crop
    else:
        _check_unused(mask_blur, padding_mask_crop)
    return found


def _check_unused(mask_blur: int, padding_mask_crop: int) -> None:
    """Raise `InvalidRequest` if either is not at its default: without a mask or new area they mean nothing."""
    for name, value, default in (("mask_blur", mask_blur, MASK_BLUR), ("padding_mask_crop", padding_mask_crop, -1)):
        if value != default:
            raise InvalidRequest(
                name, f"{value} needs a mask, or new pixels at a side; connect one, or leave it at {default}"
            )


def _canvas(references: KeptReferences, canvas: Tensor | None) -> Image.Image:
    if canvas is None:
        if not references.images:
            raise InvalidRequest("canvas", "a pack holds no pictures; connect the picture to repaint as canvas")
        return references.images[0]
    pictures = to_pictures(canvas, field="canvas")
    if len(pictures) != 1:
        raise InvalidRequest("canvas", f"is a batch of {len(pictures)} pictures; connect one")
    return pictures[0]


def read_weights(text: str) -> list[float]:
    """Return the numbers of "1.0, 0.6". Raises `InvalidRequest`."""
    parts = re.split(r"[\s,;]+", text.strip())
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise InvalidRequest("reference_weights", f"{text!r} is not a number for each reference, as 1.0, 0.6") from None
