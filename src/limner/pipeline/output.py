"""What a call returns. Does not know how its latents were made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from limner.errors import InvalidRequest
from limner.images import ReferenceReport, side_by_side
from limner.pipeline.arguments import DrawRequest
from limner.pipeline.decode import Decoded, Decoding
from limner.pipeline.memory_errors import typed_memory_errors
from limner.pipeline.networks import Networks
from limner.pipeline.prefill import CacheSource
from limner.pipeline.progress import Lap, Timings
from limner.pipeline.prompts import PromptReport
from limner.pipeline.repaint import ImageReport, OfImages, in_common
from limner.references import References
from limner.tokens import unpack

__all__ = ["PipelineOutput", "make_output"]

_PICTURES = ("pil", "np", "pt")


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
        """Return the pictures of latents: "pil", "np" or "pt".

        In another thread too, while the pipeline draws the next; not if it has a memory limit, which moves weights about.
        Not of a copy that was pickled. Raises `InvalidRequest`, and `CapacityError` if memory is too little.
        """
        if output_type not in _PICTURES:
            raise InvalidRequest("output_type", f"{output_type!r} is none of {', '.join(map(repr, _PICTURES))}")
        if self.decoder is None:
            raise InvalidRequest(
                "output_type", "of the call was not 'latent', or this is a pickled copy; decode what a call returned"
            )
        pictures, own, lap = self.decoder(self.images, output_type)
        timings, metadata = replace(self.timings, decode=lap.seconds), {**self.metadata, **in_common(own)}
        return replace(self, images=pictures, own=own, timings=timings, metadata=metadata, decoder=None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"decoder": None}

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
    decoding = Decoding.of(networks)
    pictures, own, decode_lap = decoding.decode(request, latents, rows=rows)
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
        decoder=decoding.later(request, rows=rows) if request.output_type == "latent" else None,
    )
