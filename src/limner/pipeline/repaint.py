"""What the images of a call have each for itself: a canvas, weights of references, and metadata that says so.

Owns the way from canvases of prompts to the images of a batch, and what becomes of drawn pictures. What one canvas is,
`canvas` says. Knows no networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limner.errors import InvalidRequest
from limner.images import CanvasReport, Preserved
from limner.pipeline.arguments import DrawRequest
from limner.pipeline.canvas import Canvas

__all__ = ["Finished", "canvas_sizes", "canvas_warnings", "drawn_levels", "finish", "of_images", "token_masks"]

_T = TypeVar("_T")


def of_images(values: Sequence[_T], *, num_prompts: int, num_images_per_prompt: int) -> tuple[_T, ...]:
    """Return a value for each image, of values for each prompt or of one for all; none of none."""
    each = tuple(values) * num_prompts if len(values) == 1 else tuple(values)
    return tuple(one for one in each for _ in range(num_images_per_prompt))


def canvas_sizes(canvases: Sequence[Canvas | None]) -> set[tuple[int, int]]:
    """Return the sizes (width, height) in which canvases are drawn: one, if they are drawn together."""
    return {canvas.size for canvas in canvases if canvas is not None}


def canvas_warnings(canvases: Sequence[Canvas | None]) -> tuple[str, ...]:
    """Return what is to be said of the masks, once each."""
    return tuple(dict.fromkeys(text for canvas in canvases if canvas is not None for text in canvas.warnings))


def drawn_levels(canvases: Sequence[Canvas | None], levels: Tensor) -> Tensor:
    """Return those noise levels (steps + 1,) that are drawn, by the strengths of all images of a call.

    Raises `InvalidRequest` if they differ.
    """
    starts = {0 if canvas is None else canvas.first_step(len(levels) - 1) for canvas in canvases}
    if len(starts) > 1 or (None in canvases and any(canvases) and levels[0] != 1):
        raise InvalidRequest("strength", "those of the images ask for other steps; draw them one after another")
    return levels[starts.pop() :] if starts else levels


def token_masks(canvases: Sequence[Canvas | None]) -> Tensor:
    """Return the masks of tokens (1 or B, S_img, 1) of images, of which one at least has a canvas; 1 where there is none."""
    made = {
        canvas: canvas.mask() for canvas in canvases if canvas is not None
    }  # by identity: canvases have no equality
    some = next(iter(made.values()))
    if len({*canvases}) == 1:
        return some
    return torch.cat([torch.ones_like(some) if canvas is None else made[canvas] for canvas in canvases])


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Finished:
    """Pictures as `output_type` says, and for each image what was drawn and kept of its canvas, and its own metadata."""

    pictures: Any
    canvas: tuple[CanvasReport | None, ...]
    preserved: tuple[Preserved | None, ...]
    metadata: tuple[dict[str, Any], ...]


def finish(request: DrawRequest, pictures: Any, rows: Sequence[int]) -> Finished:
    """Put drawn pictures, which are `rows` of the batch, back into their canvases. Latents stay as they are.

    Raises `InvalidRequest` for an array or a tensor of pictures that are not all of one size.
    """
    canvases = [request.canvases[row] if request.canvases else None for row in rows]
    preserved: list[Preserved | None] = [None] * len(rows)
    if request.output_type != "latent" and any(canvas is not None and canvas.puts_back for canvas in canvases):
        made = _as_pil(pictures, request.output_type)
        for i, canvas in enumerate(canvases):
            if canvas is not None and canvas.puts_back:
                made[i], preserved[i] = canvas.put_back(made[i])
        pictures = _as_type(made, like=pictures)
    reports = {canvas: canvas.plan.report for canvas in canvases if canvas is not None and canvas.masked}
    own = [_metadata(request, row) for row in rows]
    for metadata, kept in zip(own, preserved, strict=True):
        if kept is not None:
            metadata["share_kept"] = round(kept.share_kept, 6)
            metadata |= {"drift_pixels": list(kept.drift_pixels), "drift_colour": list(kept.drift_colour)}
    return Finished(
        pictures=pictures,
        canvas=tuple(None if canvas is None else reports.get(canvas) for canvas in canvases) if reports else (),
        preserved=tuple(preserved) if any(one is not None for one in preserved) else (),
        metadata=tuple(own),
    )


def _metadata(request: DrawRequest, row: int) -> dict[str, Any]:
    """What one image has for itself."""
    found: dict[str, Any] = {}
    weights = request.reference_weights[row] if request.reference_weights else None
    if weights is not None:
        found["reference_weights"] = [list(step) for step in weights]
    if request.canvases and (canvas := request.canvases[row]) is not None:
        found |= canvas.metadata
    return found


def _as_pil(pictures: Any, output_type: str) -> list[Image.Image]:
    if output_type == "pil":
        return list(pictures)
    array = pictures if output_type == "np" else pictures.float().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(values) for values in (array * 255).round().astype(np.uint8)]


def _as_type(pictures: list[Image.Image], *, like: Any) -> Any:
    """Return pictures as `like` is: a list as they are, an array or a tensor without alpha."""
    if isinstance(like, list):
        return pictures
    if len({picture.size for picture in pictures}) > 1:
        raise InvalidRequest("output_type", "the canvases differ in size, so there is no one array; use 'pil'")
    array = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]).astype(np.float32) / 255
    return torch.from_numpy(array).permute(0, 3, 1, 2).to(like) if isinstance(like, Tensor) else array
