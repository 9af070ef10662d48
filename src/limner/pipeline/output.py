"""Latents to pictures, and what a call returns. Does not know how the latents were made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limner.errors import InvalidRequest
from limner.images import ReferenceReport, side_by_side, to_pil
from limner.pipeline.arguments import DrawRequest
from limner.pipeline.memory_errors import typed_memory_errors
from limner.pipeline.networks import Networks
from limner.pipeline.prefill import CacheSource
from limner.pipeline.progress import Lap, Stopwatch, Timings, silent
from limner.pipeline.prompts import PromptReport
from limner.pipeline.repaint import ImageReport, OfImages, finish, in_common
from limner.references import References
from limner.tokens import unpack

__all__ = ["Decoded", "PipelineOutput", "decode", "make_output"]

_DECODED_PIXELS = 1024 * 1024
"""Pictures of more pixels than this together are decoded one after another."""

Decoded = tuple[Any, tuple[ImageReport, ...], Lap]
"""Pictures, what each has for itself, and the time that took."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PipelineOutput(OfImages):
    """What a call returns.

    `images` is a list of PIL pictures, an array (B, height, width, 3) or a tensor (B, 3, height, width) in [0, 1], or
    latents, as `output_type` says. `seeds` has one entry an image: the seed that reproduces it by itself, or None if
    there is none (given latents, a generator used before, the later images of a batch that shares one generator).
    `reference_cache` says where the K/V came from, `reference_key` is their content key, `seconds_saved` is what computing
    them took when that was not done again; `references` tell of each picture, `warnings` of what may be unmeant.
    `metadata` is what all images have in common, `own` what each has for itself.
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
    own: tuple[ImageReport, ...] = ()
    decoder: Callable[[Tensor, str], Decoded] | None = field(default=None, repr=False)

    @typed_memory_errors
    @torch.no_grad()
    def decoded(self, output_type: str = "pil") -> PipelineOutput:
        """Return the pictures of latents ("pil", "np", "pt"); in another thread too, while the pipeline draws the next."""
        if self.decoder is None or output_type == "latent":
            raise InvalidRequest("output_type", "call with 'latent', and then decode to 'pil', 'np' or 'pt', once")
        pictures, own, lap = self.decoder(self.images, output_type)
        timings, metadata = replace(self.timings, decode=lap.seconds), {**self.metadata, **in_common(own)}
        return replace(self, images=pictures, own=own, timings=timings, metadata=metadata, decoder=None)

    def __repr__(self) -> str:
        shape = f"{self.metadata.get('width')}x{self.metadata.get('height')}"
        seeds = ", ".join(map(str, self.seeds))
        return (
            f"PipelineOutput({len(self.seeds)} of {shape}, seeds {seeds}, references: {self.reference_cache}, "
            f"{self.timings.total:.2f} s)"
        )

    def _repr_png_(self) -> bytes | None:
        """Show the pictures side by side in notebooks."""
        return side_by_side(self.images) if isinstance(self.images, list) and self.images else None


def decode(networks: Networks, request: DrawRequest, latents: Tensor, *, rows: list[int]) -> Decoded:
    """Decode latents (B, C, 2 h, 2 w) of `rows` of the batch to what `output_type` says, and put them into canvases."""
    clock = Stopwatch(networks.device)
    request.progress("decode", 0, 1)
    pictures = latents if request.output_type == "latent" else _decode(networks, request, latents)
    pictures, own = finish(request, pictures, rows)
    request.progress("decode", 1, 1)
    return pictures, own, clock.lap()


def _decode_later(networks: Networks, request: DrawRequest, rows: list[int]) -> Callable[[Tensor, str], Decoded]:
    """Return `decode` for latents of a call and a type, which keeps neither K/V nor tokens of the call."""
    kept = replace(request, references=None, pictures=(), prompt_embeds=None, callback=None, progress=silent)

    def decoder(latents: Tensor, output_type: str) -> Decoded:
        return decode(networks, replace(kept, output_type=output_type), latents, rows=rows)

    return decoder


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
    networks: Networks,
    request: DrawRequest,
    tokens: Tensor,
    *,
    rows: list[int],
    dtype: torch.dtype,
    prompts: tuple[PromptReport, ...],
    references: References | None,
    source: CacheSource,
    laps: tuple[Lap, Lap, Sequence[Lap]],
) -> PipelineOutput:
    """Make what a call returns of clean tokens (B, S_img, C), which are `rows` of the batch, from latents in `dtype`.

    `laps` are those of text, references and steps.
    """
    latents = networks.autoencoder.denormalise(unpack(tokens, grid=request.grid).to(dtype))
    pictures, own, decode_lap = decode(networks, request, latents, rows=rows)
    width, height = request.workload.size
    reports = references.reports if references else ()
    metadata: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_inference_steps": len(request.sigmas) - 1,
        "sigmas": [round(sigma, 6) for sigma in request.sigmas.tolist()],
        "references": [report.digest for report in reports],
        "references_attention": networks.kind.references,
        "dtype": str(networks.dtype).removeprefix("torch."),
    }
    if request.guidance is not None:
        metadata["guidance_scale"] = request.guidance.scale
    if request.reference_guidance != 1:
        metadata["reference_guidance"] = request.reference_guidance
    metadata |= in_common(own)
    if request.reuse is not None:
        metadata["reuse"] = request.reuse
    if request.loras:
        metadata["loras"] = [asdict(lora) for lora in request.loras]
    return PipelineOutput(
        images=pictures,
        own=own,
        seeds=tuple(request.noise.seeds[row] for row in rows),
        timings=Timings.of(text=laps[0], references=laps[1], steps=laps[2], decode=decode_lap),
        reference_cache=source,
        references=reports,
        reference_key=references.key if references else None,
        seconds_saved=references.prefill_seconds if references and source != "miss" else 0.0,
        prompts=prompts,
        metadata=metadata,
        warnings=request.warnings,
        decoder=_decode_later(networks, request, rows) if request.output_type == "latent" else None,
    )
