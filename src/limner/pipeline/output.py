"""Latents to pictures, and what a call returns. Does not know how the latents were made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limner.images import CanvasReport, Preserved, ReferenceReport, to_pil
from limner.kinds import ModelKind
from limner.pipeline.arguments import DrawRequest
from limner.pipeline.networks import Networks
from limner.pipeline.prefill import CacheSource
from limner.pipeline.progress import Lap, Stopwatch, Timings
from limner.pipeline.prompts import PromptReport
from limner.references import References
from limner.tokens import unpack

__all__ = ["PipelineOutput", "decode", "make_output"]

_DECODED_PIXELS = 1024 * 1024
"""Pictures of more pixels than this together are decoded one after another."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PipelineOutput:
    """What a call returns.

    `images` is a list of PIL pictures, an array (B, height, width, 3) or a tensor (B, 3, height, width) in [0, 1], or
    latents, as `output_type` says. `seeds` has one entry an image: the seed that reproduces it by itself, or None if
    there is none (given latents, a generator used before, the later images of a batch that shares one generator).
    `reference_cache` says where the K/V came from, `reference_key` is their content key, `seconds_saved` is what computing
    them took when that was not done again; `references` tell of each picture, `warnings` of what may be unmeant.
    """

    images: Any
    seeds: tuple[int | None, ...]
    timings: Timings
    reference_cache: CacheSource
    references: tuple[ReferenceReport, ...] = ()
    reference_key: str | None = None
    seconds_saved: float = 0.0
    prompts: tuple[PromptReport, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    canvas: tuple[CanvasReport, ...] = ()
    preserved: tuple[Preserved, ...] = ()


def decode(networks: Networks, request: DrawRequest, tokens: Tensor, *, dtype: torch.dtype) -> tuple[Any, Lap]:
    """Decode clean tokens (B, S_img, C) to what `output_type` says, from latents in `dtype`; also the time it took."""
    clock = Stopwatch(networks.device)
    request.progress("decode", 0, 1)
    latents = networks.autoencoder.denormalise(unpack(tokens, grid=request.grid).to(dtype))
    pictures = latents if request.output_type == "latent" else _decode(networks, request, latents)
    request.progress("decode", 1, 1)
    return pictures, clock.lap()


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Finished:
    """Pictures as `output_type` says, and what was kept of the canvas."""

    pictures: Any
    preserved: tuple[Preserved, ...] = ()


def _finish(request: DrawRequest, pictures: Any, rows: list[int]) -> _Finished:
    """Put drawn pictures back into their canvas, bit for bit outside of the mask. Latents stay as they are."""
    canvas = request.canvas
    if canvas is None or request.output_type == "latent" or not (canvas.masked or canvas.preserves):
        return _Finished(pictures=pictures)
    drawn = _as_pil(pictures, request.output_type)
    preserved: tuple[Preserved, ...] = ()
    if canvas.preserves:
        preserved = tuple(canvas.preserve(image) for image in drawn)
        made = [one.picture for one in preserved]
    else:
        made = canvas.finish(drawn, rows, num_images=request.workload.batch)
    return _Finished(pictures=_as_type(made, like=pictures), preserved=preserved)


def _as_pil(pictures: Any, output_type: str) -> list[Image.Image]:
    if output_type == "pil":
        return list(pictures)
    array = pictures if output_type == "np" else pictures.float().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(values) for values in (array * 255).round().astype(np.uint8)]


def _as_type(pictures: list[Image.Image], *, like: Any) -> Any:
    """Return pictures as `like` is: a list as they are, an array or a tensor without alpha."""
    if isinstance(like, list):
        return pictures
    array = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]).astype(np.float32) / 255
    return torch.from_numpy(array).permute(0, 3, 1, 2).to(like) if isinstance(like, Tensor) else array


def _decode(networks: Networks, request: DrawRequest, latents: Tensor) -> Any:
    width, height = request.workload.size
    at_once = max(1, _DECODED_PIXELS // (width * height))
    with networks.working("decode", replace(request.workload, batch=len(latents))):
        parts = [networks.autoencoder.decode(part) for part in torch.split(latents, at_once)]
    pictures = (torch.cat(parts) * 0.5 + 0.5).clamp(0, 1)
    if request.output_type == "pt":
        return pictures
    if request.output_type == "np":
        array: np.ndarray[Any, Any] = pictures.float().permute(0, 2, 3, 1).cpu().numpy()
        return array
    return to_pil(pictures)


def make_output(
    request: DrawRequest,
    pictures: Any,
    *,
    rows: list[int],
    prompts: tuple[PromptReport, ...],
    references: References | None,
    source: CacheSource,
    timings: Timings,
    dtype: torch.dtype,
    kind: ModelKind,
) -> PipelineOutput:
    """Say how pictures came to be, which are `rows` of the batch; `dtype` is that of the transformer."""
    width, height = request.workload.size
    reports = references.reports if references else ()
    metadata: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_inference_steps": len(request.sigmas) - 1,
        "sigmas": [round(sigma, 6) for sigma in request.sigmas.tolist()],
        "references": [report.digest for report in reports],
        "references_attention": kind.references,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if request.guidance is not None:
        metadata["guidance_scale"] = request.guidance.scale
    if request.reference_weights is not None:
        metadata["reference_weights"] = [list(row) for row in request.reference_weights]
    if request.reference_guidance != 1:
        metadata["reference_guidance"] = request.reference_guidance
    finished, canvas = _finish(request, pictures, rows), request.canvas
    if canvas is not None:
        metadata |= {"canvas_digest": canvas.prepared.report.digest, "strength": canvas.strength}
        if canvas.masked:
            metadata |= {"box": list(canvas.plans[0].box), "canvas_size": list(canvas.picture.size)}
        if canvas.preserves:
            metadata["preserve"] = "auto"
    if request.reuse is not None:
        metadata["reuse"] = request.reuse
    if request.loras:
        metadata["loras"] = [asdict(lora) for lora in request.loras]
    return PipelineOutput(
        images=finished.pictures,
        canvas=tuple(plan.report for plan in canvas.plans) if canvas is not None and canvas.masked else (),
        preserved=finished.preserved,
        seeds=tuple(request.noise.seeds[row] for row in rows),
        timings=timings,
        reference_cache=source,
        references=reports,
        reference_key=references.key if references else None,
        seconds_saved=references.prefill_seconds if references and source != "miss" else 0.0,
        prompts=prompts,
        metadata=metadata,
        warnings=request.warnings,
    )
