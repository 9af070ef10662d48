"""Diffusers' inpaint pipeline under its name: its arguments in their order, its pictures.

Canvas and mask go through diffusers' own processors, so that every pixel is theirs: the mask is black or white, nothing is
put back unless `padding_mask_crop` is given. `Pipeline` has soft masks, and surroundings that stay bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limner.config import ReferencePolicy
from limner.errors import InvalidRequest
from limner.grid import PIXELS
from limner.images import Picture, prepare_reference
from limner.images.mask import MaskSource
from limner.images.sources import as_list, open_picture
from limner.pipeline.canvas import Canvas, whole_canvas
from limner.pipeline.control import check_strength
from limner.pipeline.manners import DropInOutput, Manners, as_diffusers
from limner.pipeline.pipeline import StepCallback
from limner.pipeline.progress import Progress

__all__ = ["Flux2KleinInpaintPipeline"]

_MAX_PIXELS = 1024 * 1024


class Flux2KleinInpaintPipeline(Manners):
    """`Pipeline` in the place of diffusers' class of this name: what is white in a mask is drawn anew."""

    _diffusers_class: ClassVar[str] = "Flux2KleinInpaintPipeline"

    @as_diffusers
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        image: Picture | Sequence[Picture] | None = None,
        image_reference: Picture | Sequence[Picture] | None = None,
        mask_image: MaskSource | Sequence[MaskSource] | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 8.0,
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
        negative_prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> DropInOutput | tuple[Any]:
        """Draw what is white in `mask_image` over `image`, with `image_reference` as a further reference.

        The size is that of the canvas, whatever `height` and `width` say, as in diffusers. Several references keep their
        own sizes each. Raises as `Pipeline.__call__`.
        """
        if image is None or mask_image is None:
            raise InvalidRequest("mask_image", "image and mask_image are both needed; or use Flux2KleinPipeline")
        if latents is not None:
            raise InvalidRequest("latents", "are not taken here; give a generator or seed")
        canvas = _prepare(self, image, mask_image, padding=padding_mask_crop, strength=strength)
        if padding_mask_crop is not None and output_type != "pil":
            raise InvalidRequest("output_type", f"{output_type!r} with padding_mask_crop; use 'pil', as in diffusers")
        references = [] if image_reference is None else as_list(image_reference)
        out = self._draw_as_diffusers(
            prompt=prompt,
            image=[canvas.canvas.prepared, *references],
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            negative_prompt_embeds=negative_prompt_embeds,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            prompt_embeds=prompt_embeds,
            output_type=output_type,
            return_dict=True,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            text_encoder_out_layers=text_encoder_out_layers,
            seed=seed,
            joint_attention_kwargs=joint_attention_kwargs,
            progress=progress,
            canvas=canvas.canvas,
        )
        assert isinstance(out, DropInOutput)
        if canvas.crop is not None:
            out.images[:] = [
                self.image_processor.apply_overlay(canvas.mask, canvas.original, drawn, canvas.crop)
                for drawn in out.images
            ]
        return out if return_dict else out.to_tuple()


class _Prepared(NamedTuple):
    canvas: Canvas
    original: Image.Image
    mask: Any
    crop: tuple[int, int, int, int] | None


def _prepare(pipe: Manners, image: Any, mask: Any, *, padding: int | None, strength: float) -> _Prepared:
    """Return the canvas and the mask of tokens as diffusers makes them."""
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    pictures = pipe._fetched(image)
    if len(pictures) != 1:
        raise InvalidRequest("image", f"there are {len(pictures)}; give one canvas, and others as image_reference")
    original = open_picture(pictures[0], field="image")[0].convert("RGB")
    masks = Flux2ImageProcessor(
        vae_scale_factor=PIXELS, do_normalize=False, do_binarize=True, do_convert_rgb=False, do_convert_grayscale=True
    )
    processor = pipe.image_processor
    if original.width * original.height > _MAX_PIXELS:
        scale = math.sqrt(_MAX_PIXELS / (original.width * original.height))
        original = processor.resize(original, int(original.height * scale), int(original.width * scale))
    width, height = (side // PIXELS * PIXELS for side in original.size)
    if isinstance(mask, (list, tuple)):
        if len(mask) != 1:
            raise InvalidRequest("mask_image", f"there are {len(mask)}; give one for all prompts")
        mask = mask[0]
    if isinstance(mask, (np.ndarray, Tensor)):
        if padding is not None:
            raise InvalidRequest("mask_image", "is no picture; padding_mask_crop needs one, as in diffusers")
    else:
        mask = open_picture(pipe._fetched(mask)[0], field="mask_image")[0]
    crop = None if padding is None else masks.get_crop_region(mask, width, height, pad=padding)
    mode = "default" if crop is None else "fill"
    drawn = processor.preprocess(original, height, width, crops_coords=crop, resize_mode=mode)
    values = masks.preprocess(mask, height=height, width=width, resize_mode=mode, crops_coords=crop)
    grid = (height // PIXELS, width // PIXELS)
    tokens = torch.nn.functional.interpolate(values.float(), size=grid, mode="bilinear").flatten(2).transpose(1, 2)
    pixels = ((drawn[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    prepared = prepare_reference(
        Image.fromarray(pixels), policy=ReferencePolicy(max_pixels=width * height, max_aspect=1e9)
    )
    canvas = whole_canvas(prepared, tokens=tokens, strength=check_strength(strength))
    return _Prepared(canvas=canvas, original=original, mask=mask, crop=crop)
