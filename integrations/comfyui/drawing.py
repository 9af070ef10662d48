"""The nodes that draw: Generate from text alone, Edit with references.

A batch of N pictures has the seeds seed, seed + 1, ..., seed + N - 1, and each of its pictures is the one that its seed
gives alone.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from limner import EditRequest, PipelineOutput
from limner.errors import LimnerError
from limner.grid import MIN_SIDE, PIXELS, check_size
from limner.options import ServiceOptions
from limner.requests import MAX_STEPS, Control, check_prompt

from . import host
from .control import control_inputs, control_of
from .model import Model
from .pictures import from_pixels
from .references import KeptReferences

__all__ = ["Edit", "Generate"]

MAX_SEED = 2**53 - 1
"""ComfyUI's page has one type of number, which rounds larger ones."""
_MAX_SIDE = 8192


class _Drawing:
    """What both nodes share."""

    CATEGORY = host.CATEGORY
    FUNCTION = "draw"
    RETURN_TYPES: tuple[str, ...] = ("IMAGE", "STRING")
    RETURN_NAMES: tuple[str, ...] = ("image", "report")

    @classmethod
    def VALIDATE_INPUTS(  # noqa: N802
        cls, prompt: str | None = None, width: int | None = None, height: int | None = None
    ) -> bool | str:
        """Refuse before the prompt runs what it would be refused for. Inputs that are connected are None here."""
        try:
            if prompt is not None:
                check_prompt(prompt)
            for name, value in (("width", width), ("height", height)):
                if value:
                    check_size(name, value)
        except LimnerError as error:
            return str(error)
        return True

    def _draw(
        self,
        model: Model,
        references: KeptReferences | None,
        *,
        prompt: str,
        seed: int,
        steps: int,
        width: int,
        height: int,
        batch_size: int,
        guidance_scale: float = 0.0,
        negative_prompt: str = "",
        control: Control | None = None,
    ) -> tuple[Tensor, str]:
        request = EditRequest(
            prompt=prompt,
            seeds=tuple(range(seed, seed + batch_size)),
            width=width or None,
            height=height or None,
            num_inference_steps=steps or None,
            guidance_scale=guidance_scale or None,
            negative_prompt=negative_prompt or None,
            control=control or Control(),
        )
        host.check_stopped()
        with model.pipeline() as pipe:
            watch = host.Watch(steps or pipe.kind.num_inference_steps, previews=pipe.latent_preview is not None)

            def call() -> PipelineOutput:
                return pipe.draw(
                    [request],
                    references=references.for_pipeline(pipe) if references is not None else None,
                    callback_on_step_end=watch.step,
                    callback_on_step_end_tensor_inputs=watch.inputs,
                    output_type="pt",
                    progress=watch.part,
                )

            out = host.with_room(call)
        return from_pixels(out.images), _report(out)


class Generate(_Drawing):
    """Draws from text alone."""

    DESCRIPTION = "Draws from text alone. Pictures of a batch have the seeds seed, seed + 1, ..."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"model": ("LIMNER_MODEL",), **_drawing("0: the model's own")}, "optional": _guidance()}

    @host.outside_inference_mode
    def draw(self, model: Model, **asked: Any) -> tuple[Tensor, str]:
        """Draw a batch."""
        return self._draw(model, None, **asked)


class Edit(_Drawing):
    """Edits, or combines, references as the prompt says; all of image 1, or what is masked."""

    DESCRIPTION = (
        "Edits, or combines, references, which the prompt calls image 1, image 2, ... With a mask that part of image 1, or "
        "of canvas, is repainted, and the rest stays, beyond mask_blur to the pixel. Pictures of a batch have the seeds "
        "seed, seed + 1, ..."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "model": ("LIMNER_MODEL",),
                "references": ("LIMNER_REFERENCES",),
                **_drawing("0: that in which image 1 is used, or that of what is repainted"),
            },
            "optional": {**_guidance(), **control_inputs()},
        }

    @host.outside_inference_mode
    def draw(self, model: Model, references: KeptReferences, **asked: Any) -> tuple[Tensor, str]:
        """Draw a batch over the references."""
        control = control_of(references, **{name: asked.pop(name) for name in control_inputs() if name in asked})
        return self._draw(model, references, **asked, control=control)


def _drawing(size: str) -> dict[str, Any]:
    """The inputs of both nodes; `size` says what 0 means."""
    side = {
        "default": 0,
        "min": 0,
        "max": _MAX_SIDE,
        "step": PIXELS,
        "tooltip": f"a multiple of {PIXELS}, at least {MIN_SIDE}; {size}",
    }
    return {
        "prompt": ("STRING", {"default": "", "multiline": True, "dynamicPrompts": True}),
        "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
        "steps": ("INT", {"default": 0, "min": 0, "max": MAX_STEPS, "tooltip": "0: the model's own"}),
        "width": ("INT", side),
        "height": ("INT", dict(side)),
        "batch_size": ("INT", {"default": 1, "min": 1, "max": ServiceOptions.max_batch}),
    }


def _guidance() -> dict[str, Any]:
    """The inputs of both nodes for base models."""
    scale = {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "of base models; 0: the model's own"}
    negative = {"default": "", "multiline": True, "tooltip": "of base models: what guidance goes away from"}
    return {"guidance_scale": ("FLOAT", scale), "negative_prompt": ("STRING", negative)}


def _report(out: PipelineOutput) -> str:
    """How the pictures were made, as JSON."""
    (prompt,) = out.prompts[:1]
    about = {
        "seeds": list(out.seeds),
        **out.metadata,
        "reference_key": out.reference_key,
        "cut_off_the_prompt": prompt.cut,
        "seconds": round(out.timings.total, 4),
        "canvas": [one.describe() for one in out.canvas],
        "preserved": [one.describe() for one in out.preserved],
        "warnings": list(out.warnings),
    }
    return json.dumps(about)
