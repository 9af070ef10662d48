"""The denoising loop: noise tokens to clean ones, and what a step callback may see and change.

Latents stay in float32 between steps. Does not know prompts, pictures or where References come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limner.errors import InvalidRequest, NumericalError
from limner.model.preview import Preview
from limner.pipeline.arguments import DrawRequest
from limner.pipeline.networks import Networks
from limner.pipeline.progress import Stopwatch
from limner.pipeline.velocity import Velocity
from limner.references import References
from limner.schedule import euler_step
from limner.tokens import pack, unpack

__all__ = ["Batch", "denoise"]


@dataclass(kw_only=True, eq=False, slots=True)
class Batch:
    """The images that are being drawn: tokens (B, S_img, C) in float32, and text tokens (B, S_txt, text_width).

    `negative_embeds` are the text tokens of negative prompts, None without guidance.
    `rows` are the numbers of these images in the batch that the call began with. `seconds` are those of the steps done.
    """

    latents: Tensor
    prompt_embeds: Tensor
    negative_embeds: Tensor | None
    rows: list[int]
    seconds: tuple[float, ...] = ()


def denoise(
    networks: Networks,
    request: DrawRequest,
    *,
    noise: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor | None,
    references: References | None,
    preview: Preview | None,
    interrupted: Callable[[], bool],
) -> Batch:
    """Take all steps from noise (B, C, h, w) on; after a step for which `interrupted()` is true the others are left out.

    Raises `InvalidRequest` for what a callback returns, and `NumericalError` if the result is not finite.
    """
    device, velocity_of = networks.device, Velocity(networks, request, references)
    batch = Batch(
        latents=pack(noise), prompt_embeds=prompt_embeds, negative_embeds=negative_embeds, rows=list(range(len(noise)))
    )
    timesteps, sigmas = (request.sigmas[:-1] * 1000).to(device), request.sigmas.to(device)
    with networks.working("denoise", request.workload):
        for i, timestep in enumerate(timesteps):
            request.progress("step", i, len(timesteps))
            clock = Stopwatch(device)
            velocity = velocity_of(
                batch.latents,
                timestep / 1000,  # with the roundings of diffusers, which multiplies by 1000 and divides again
                prompt_embeds=batch.prompt_embeds,
                negative_embeds=batch.negative_embeds,
                rows=batch.rows,
            )
            before = batch.latents
            batch.latents = euler_step(before, velocity, sigma=sigmas[i], next_sigma=sigmas[i + 1])
            if request.callback is not None:
                clean = None
                if {"denoised", "preview"} & {*request.callback_inputs}:
                    clean = euler_step(before, velocity, sigma=sigmas[i], next_sigma=torch.zeros_like(sigmas[i]))
                _call_back(request, batch, i, timestep, clean=clean, preview=preview)
                if references is not None and references.kv and networks.adapters.applied != request.loras:
                    raise InvalidRequest(
                        "callback_on_step_end",
                        "changed the LoRAs, and the K/V of the references were made with those before; change them between "
                        "calls, or draw without references",
                    )
            batch.seconds += (clock.lap(),)
            if interrupted():
                break
    request.progress("step", len(timesteps), len(timesteps))
    if not torch.isfinite(batch.latents).all():
        raise NumericalError(
            f"the latents are not finite in {networks.dtype}: the weights are damaged, or the dtype is too narrow for "
            "them; check the files, or use torch.float32 or torch.bfloat16 (--dtype)"
        )
    return batch


def _call_back(
    request: DrawRequest, batch: Batch, step: int, timestep: Tensor, *, clean: Tensor | None, preview: Preview | None
) -> None:
    """Offer a callback the tensors that it asked for, and apply what it returns: latents, prompt_embeds and rows.

    `clean` are the tokens that this step predicts, if denoised or preview was asked for.
    """
    assert request.callback is not None
    offered = {"latents": batch.latents, "prompt_embeds": batch.prompt_embeds}
    if clean is not None:
        offered["denoised"] = clean
        if preview is not None:
            offered["preview"] = preview(unpack(clean, grid=request.grid))
    tensors = {name: offered[name] for name in request.callback_inputs}
    changed = request.callback(step, timestep, tensors) or {}
    for name in ("latents", "prompt_embeds"):
        new = changed.get(name, offered[name])
        if not isinstance(new, Tensor) or new.shape != offered[name].shape:
            raise InvalidRequest("callback_on_step_end", f"gave back {name} that are not {list(offered[name].shape)}")
    batch.latents = changed.get("latents", batch.latents).to(batch.latents.device)
    batch.prompt_embeds = changed.get("prompt_embeds", batch.prompt_embeds)
    rows = changed.get("rows")
    if rows is not None:
        if not rows or sorted({*rows} & {*range(len(batch.rows))}) != list(rows):
            raise InvalidRequest(
                "callback_on_step_end",
                f"gave back rows {rows}; allowed: rising numbers of the {len(batch.rows)} images of the batch",
            )
        batch.rows = [batch.rows[i] for i in rows]
        batch.latents, batch.prompt_embeds = batch.latents[rows], batch.prompt_embeds[rows]
        batch.negative_embeds = None if batch.negative_embeds is None else batch.negative_embeds[rows]
