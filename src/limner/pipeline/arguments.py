"""The checked arguments of one call, which all steps of the call get. Does not know how they are checked, nor models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from limner.grid import PIXELS
from limner.images import PreparedReference
from limner.memory import Workload
from limner.model.shards import Ranks
from limner.pipeline.adapters import AppliedLora
from limner.pipeline.canvas import Canvas
from limner.pipeline.noise import NoiseSource, short_digest
from limner.pipeline.progress import Progress
from limner.references import References

__all__ = ["DrawRequest", "Guidance", "StepHook"]

StepHook = Callable[[int, Tensor, dict[str, Tensor]], Mapping[str, Any] | None]
"""A step callback with its pipeline bound: (step, timestep, tensors) to what it changed."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Guidance:
    """How far to go from what negative prompts give to what prompts give: v_neg + scale (v - v_neg).

    One of `prompts` and `prompt_embeds` (B, S, text_width) is given, one for each prompt. `together`: both run as one
    batch.
    """

    scale: float
    prompts: tuple[str, ...] | None
    prompt_embeds: Tensor | None
    together: bool

    @property
    def named(self) -> list[str]:
        """The negative prompts, or a digest of their tokens."""
        return list(self.prompts or ()) if self.prompt_embeds is None else [short_digest(self.prompt_embeds)]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class DrawRequest:
    """One call, checked: prompts or their tokens, pictures or their References, sizes, noise levels and noise.

    `workload` has the output size and the batch. `sigmas` (steps + 1,) falls to 0. `loras` act when the call begins.
    `guidance` None: there is none. `reference_weights` has for each image those of each reference, for each step or once
    for all; None, and (): all are 1. `reference_guidance` 1: none. `canvases` has for each image the picture that is
    repainted, or None; (): there is none. `reuse` "step0": K/V that joint references have in the first step serve the
    others.
    """

    prompts: tuple[str, ...] | None
    prompt_embeds: Tensor | None
    num_images_per_prompt: int
    max_sequence_length: int
    text_encoder_out_layers: tuple[int, ...] | None
    pictures: tuple[PreparedReference, ...]
    references: References | None
    workload: Workload
    sigmas: Tensor
    noise: NoiseSource
    guidance: Guidance | None
    reuse: str | None
    reference_weights: tuple[tuple[tuple[float, ...], ...] | None, ...]
    reference_guidance: float
    canvases: tuple[Canvas | None, ...]
    loras: tuple[AppliedLora, ...]
    output_type: str
    callback: StepHook | None
    callback_inputs: tuple[str, ...]
    progress: Progress
    warnings: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """The output's (h, w) in tokens."""
        width, height = self.workload.size
        return height // PIXELS, width // PIXELS

    def shared(self, ranks: Ranks, *, prompt_embeds: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the text tokens and the noise of process 0. Raises `InvalidRequest` unless all processes got the same.

        Texts and the states of generators are compared. What is computed from them may differ in its last bits between
        machines.
        """
        if ranks.alone:
            return prompt_embeds, noise  # no digests: those of tensors take a while
        given, masks = self.references, {one: one.tokens for one in self.canvases if one is not None}
        digests = {one: short_digest(mask) for one, mask in masks.items() if mask is not None}
        values = {
            "size": [*prompt_embeds.shape, *noise.shape],
            "sigmas": self.sigmas.tolist(),
            "prompt": list(self.prompts) if self.prompts is not None else short_digest(prompt_embeds),
            "latents" if self.noise.latents is not None else "generator": list(self.noise.digests),
            "references": given and [report.digest for report in given.reports],
            "image": [p.report.digest for p in self.pictures],
            "lora": [asdict(lora) for lora in self.loras],
            "guidance_scale": self.guidance and self.guidance.scale,
            "negative_prompt": self.guidance and self.guidance.named,
            "reuse": self.reuse,
            "reference_weights": self.reference_weights,
            "reference_guidance": self.reference_guidance,
            "mask_image": [one and digests.get(one, one.asked.get("mask")) for one in self.canvases],
            "canvas": [one and one.metadata for one in self.canvases],
        }
        ranks.check_same(values)
        return ranks.broadcast_tensor(prompt_embeds), ranks.broadcast_tensor(noise)
