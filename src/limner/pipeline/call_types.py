"""The arguments of a call for type checkers: what `return_dict` decides about its result.

Names and types are those of `Pipeline.__call__`, which a test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limner.pipeline.prefill import Picture
from limner.pipeline.progress import Progress
from limner.references import References
from limner.requests import Control

__all__ = ["CallArguments", "StepCallback"]

StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], Mapping[str, Any] | None]
"""(pipeline, step, timestep, tensors) to changed tensors; see `Pipeline.__call__`."""


class CallArguments(Control, total=False):
    """What a call takes besides the prompt and `return_dict`."""

    image: Picture | Sequence[Picture] | None
    references: References | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    sigmas: Sequence[float] | None
    guidance_scale: float | None
    negative_prompt: str | Sequence[str] | None
    negative_prompt_embeds: Tensor | None
    reuse: str | None
    num_images_per_prompt: int
    generator: torch.Generator | Sequence[torch.Generator] | None
    latents: Tensor | None
    prompt_embeds: Tensor | None
    output_type: str
    callback_on_step_end: StepCallback | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    max_sequence_length: int | None
    text_encoder_out_layers: Sequence[int] | None
    progress: Progress | bool | None
    size_policy: str
