"""What the images of a call have each for itself: a canvas, weights of references, and metadata that says so.

Owns the way from canvases of prompts to the images of a batch, and what becomes of drawn pictures. What one canvas is,
`canvas` says. Knows no networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limner.errors import InvalidRequest
from limner.images import CanvasReport, Preserved
from limner.memory import Workload
from limner.pipeline.arguments import DrawRequest
from limner.pipeline.canvas import Canvas

__all__ = [
    "ImageReport",
    "OfImages",
    "call_workload",
    "canvas_sizes",
    "canvas_warnings",
    "check_canvas_size",
    "check_result_sizes",
    "drawn_levels",
    "finish",
    "in_common",
    "of_images",
    "token_masks",
]

_T = TypeVar("_T")


def of_images(values: Sequence[_T], *, num_prompts: int, per_prompt: int) -> tuple[_T, ...]:
    """Return a value for each image, of values for each prompt or of one for all; none of none."""
    each = tuple(values) * num_prompts if len(values) == 1 else tuple(values)
    return tuple(one for one in each for _ in range(per_prompt))


def canvas_sizes(canvases: Sequence[Canvas | None]) -> set[tuple[int, int]]:
    """Return the sizes (width, height) in which canvases are drawn: one, if they are drawn together."""
    return {canvas.size for canvas in canvases if canvas is not None}


def check_canvas_size(canvases: Sequence[Canvas | None], *, width: int | None, height: int | None) -> None:
    """Raise `InvalidRequest` where another size is asked for than that in which a canvas is drawn."""
    for size in canvas_sizes(canvases):
        for name, given, drawn in (("width", width, size[0]), ("height", height, size[1])):
            if given is not None and given != drawn:
                raise InvalidRequest(name, f"{given} is not that of the canvas as it is drawn, {drawn}; leave it out")


def check_result_sizes(canvases: Sequence[Canvas | None], *, size: tuple[int, int], output_type: str) -> None:
    """Raise `InvalidRequest` where results that are to be one array or tensor differ in size. `size` is the drawn one."""
    puts_back = [canvas for canvas in canvases if canvas is not None and canvas.puts_back]
    sizes = {canvas.picture.size for canvas in puts_back} | ({size} if len(puts_back) < len(canvases) else set())
    if output_type in ("np", "pt") and len(sizes) > 1:
        shown = " and ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise InvalidRequest("output_type", f"the results have {shown}, so there is no one array; use 'pil'")


def call_workload(
    call: Workload, *, canvases: Sequence[Canvas | None], guides: bool, reference_guidance: float, reuse: str | None
) -> Workload:
    """Return the workload of a call with all that it asks for; of its images' canvases, each is held once."""

    def pixels(canvas: Canvas) -> int:
        return canvas.picture.width * canvas.picture.height

    there = [canvas for canvas in canvases if canvas is not None]
    return replace(
        call,
        guides=guides,
        guides_references=reference_guidance != 1,
        reuses=reuse is not None and bool(call.references),
        canvas_pixels=sum(pixels(canvas) for canvas in {*there}),
        result_pixels=sum(pixels(canvas) for canvas in there if canvas.puts_back),
        preserves=any(canvas.preserves for canvas in there),
    )


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
    """Return the masks of tokens (1 or B, S_img, 1) of images, of which one has a canvas at least; ones where none is."""
    made = {
        canvas: canvas.mask() for canvas in canvases if canvas is not None
    }  # by identity: canvases have no equality
    some = next(iter(made.values()))
    if len({*canvases}) == 1:
        return some
    return torch.cat([torch.ones_like(some) if canvas is None else made[canvas] for canvas in canvases])


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ImageReport:
    """What one image of a batch has for itself: metadata, what was drawn of its canvas, and what an edit left alone."""

    metadata: dict[str, Any]
    canvas: CanvasReport | None = None
    preserved: Preserved | None = None


class OfImages:
    """What results say of each image: `own` has its report, `metadata` what all have in common."""

    __slots__ = ()
    own: tuple[ImageReport, ...]
    metadata: dict[str, Any]

    @property
    def canvas(self) -> tuple[CanvasReport, ...]:
        """What was drawn of its canvas, of each image that has a mask."""
        return tuple(image.canvas for image in self.own if image.canvas is not None)

    @property
    def preserved(self) -> tuple[Preserved, ...]:
        """What the edit left alone, of each image for which that was asked."""
        return tuple(image.preserved for image in self.own if image.preserved is not None)

    def metadata_of(self, number: int) -> dict[str, Any]:
        """Return the metadata of one image, by its number from 0."""
        return {**self.metadata, **(self.own[number].metadata if self.own else {})}


def finish(request: DrawRequest, pictures: Any, rows: Sequence[int]) -> tuple[Any, tuple[ImageReport, ...]]:
    """Put drawn pictures, which are `rows` of the batch, back into their canvases; say so for each.

    Latents, and pictures without canvas, stay as they are.
    """
    canvases = [request.canvases[row] if request.canvases else None for row in rows]
    preserved: list[Preserved | None] = [None] * len(rows)
    reports: dict[Canvas, CanvasReport] = {}
    made: dict[int, Image.Image] = {}
    for canvas in {*canvases}:
        if canvas is None or not canvas.puts_back:
            continue
        weight = canvas.plan.weight() if canvas.masked else None
        if weight is not None:
            reports[canvas] = canvas.plan.report(weight)
        own = [i for i, other in enumerate(canvases) if other is canvas] if request.output_type != "latent" else []
        for i in own:
            made[i], preserved[i] = canvas.put_back(_as_pil(pictures[i]), weight=weight)
    if made:
        pictures = _replaced(pictures, made)
    found = []
    for row, canvas, kept in zip(rows, canvases, preserved, strict=True):
        weights = request.reference_weights[row] if request.reference_weights else None
        metadata = {} if weights is None else {"reference_weights": [list(step) for step in weights]}
        metadata |= {} if canvas is None else canvas.metadata
        metadata |= {} if kept is None else kept.as_json()
        report = None if canvas is None else reports.get(canvas)
        found.append(ImageReport(metadata=metadata, canvas=report, preserved=kept))
    return pictures, tuple(found)


def in_common(images: Sequence[ImageReport]) -> dict[str, Any]:
    """Return those metadata that are equal for all images."""
    first, *others = [image.metadata for image in images]
    return {name: value for name, value in first.items() if all(one.get(name) == value for one in others)}


def _as_pil(picture: Any) -> Image.Image:
    """Return a picture of Pillow, an array (height, width, 3) or a tensor (3, height, width) as one of Pillow."""
    if isinstance(picture, Image.Image):
        return picture
    array = picture.float().permute(1, 2, 0).cpu().numpy() if isinstance(picture, Tensor) else picture
    return Image.fromarray((array * 255).round().astype(np.uint8))


def _replaced(pictures: Any, made: Mapping[int, Image.Image]) -> Any:
    """Return pictures of one size with some replaced, by number; arrays and tensors have no alpha."""
    found = list(pictures)
    for i, picture in made.items():
        if isinstance(pictures, list):
            found[i] = picture
            continue
        array = np.asarray(picture.convert("RGB")).astype(np.float32) / 255
        found[i] = torch.from_numpy(array).permute(2, 0, 1).to(pictures) if isinstance(pictures, Tensor) else array
    if isinstance(pictures, list):
        return found
    return torch.stack(found) if isinstance(pictures, Tensor) else np.stack(found)
