"""The pipelines under diffusers' names, each with that class's arguments in their order. The manners are `manners`'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from limner.images import Picture
from limner.pipeline.manners import DropInOutput, Manners, as_diffusers
from limner.pipeline.pipeline import StepCallback
from limner.pipeline.progress import Progress
from limner.references import References

__all__ = ["Flux2KleinKVPipeline", "Flux2KleinPipeline"]


class Flux2KleinKVPipeline(Manners):
    """`Pipeline` in the place of diffusers' class of this name; the card's example needs its import line changed alone."""

    _diffusers_class: ClassVar[str] = "Flux2KleinKVPipeline"

    @as_diffusers
    def __call__(  # type: ignore[override]
        self,
        image: Picture | Sequence[Picture] | None = None,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        sigmas: Sequence[float] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        text_encoder_out_layers: Sequence[int] | None = None,
        *,
        references: References | None = None,
        seed: int | Sequence[int] | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        size_policy: str = "floor",
    ) -> DropInOutput | tuple[Any]:
        """As `Pipeline.__call__`, which see, in diffusers' order.

        Pictures may be https URLs, of public addresses. `prompt` may be empty. Sizes go down to multiples of 16, with a
        warning. `seed` is one for each image, or the first: the next have seed + 1, ... `attention_kwargs` may have
        scale, by which the strengths of LoRAs are multiplied in this call.
        """
        return self._draw_as_diffusers(
            image=image,
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            output_type=output_type,
            return_dict=return_dict,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            text_encoder_out_layers=text_encoder_out_layers,
            references=references,
            seed=seed,
            joint_attention_kwargs=joint_attention_kwargs,
            progress=progress,
            size_policy=size_policy,
        )


class Flux2KleinPipeline(Manners):
    """`Pipeline` in the place of diffusers' class of this name, for standard and base klein: references are joint."""

    _diffusers_class: ClassVar[str] = "Flux2KleinPipeline"

    @as_diffusers
    def __call__(  # type: ignore[override]
        self,
        image: Picture | Sequence[Picture] | None = None,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        text_encoder_out_layers: Sequence[int] | None = None,
        *,
        references: References | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        size_policy: str = "floor",
    ) -> DropInOutput | tuple[Any]:
        """As `Flux2KleinKVPipeline.__call__`, with the steps and the guidance that diffusers has for this class.

        Distilled models draw in 4 steps: give `num_inference_steps=4`. Guidance has no effect on them. `negative_prompt` is
        this engine's own; left out it is an empty one, as in diffusers.
        """
        return self._draw_as_diffusers(
            image=image,
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt=negative_prompt,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            return_dict=return_dict,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            text_encoder_out_layers=text_encoder_out_layers,
            references=references,
            seed=seed,
            joint_attention_kwargs=joint_attention_kwargs,
            progress=progress,
            size_policy=size_policy,
        )
