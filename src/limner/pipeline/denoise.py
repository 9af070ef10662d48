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
from limner.pipeline.progress import Lap, Stopwatch
from limner.pipeline.repaint import token_masks
from limner.pipeline.velocity import Velocity
from limner.references import References
from limner.schedule import euler_step
from limner.tokens import pack, unpack

__all__ = ["Batch", "denoise"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Surroundings:
    """What stays of a canvas: its clean tokens (1 or B, S_img, C), the noise (B, S_img, C), the mask (1 or B, S_img, 1)."""

    canvas: Tensor
    noise: Tensor
    mask: Tensor

    def noised(self, sigma: Tensor) -> Tensor:
        """The canvas at a noise level: sigma noise + (1 - sigma) canvas, as `scale_noise` of diffusers' scheduler."""
        return sigma * self.noise + (1.0 - sigma) * self.canvas

    def keep(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """Return latents at a noise level with the canvas outside of the mask."""
        return (1 - self.mask) * self.noised(sigma) + self.mask * latents

    def of(self, rows: list[int]) -> Surroundings:
        """Return those of some images of the batch."""
        canvas, mask = (x[rows] if len(x) > 1 else x for x in (self.canvas, self.mask))
        return Surroundings(canvas=canvas, noise=self.noise[rows], mask=mask)


@dataclass(kw_only=True, eq=False, slots=True)
class Batch:
    """The images that are being drawn: tokens (B, S_img, C) in float32, and text tokens (B, S_txt, text_width).

    `negative_embeds` are the text tokens of negative prompts, None without guidance.
    `rows` are the numbers of these images in the batch that the call began with. `laps` are the times of the steps done.
    """

    latents: Tensor
    prompt_embeds: Tensor
    negative_embeds: Tensor | None
    surroundings: Surroundings | None
    rows: list[int]
    laps: tuple[Lap, ...] = ()


def denoise(
    networks: Networks,
    request: DrawRequest,
    *,
    noise: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor | None,
    references: References | None,
    canvas: Tensor | None,
    preview: Preview | None,
    interrupted: Callable[[], bool],
) -> Batch:
    """Take all steps from noise (B, C, h, w) on, or from the noised tokens (1 or B, S_img, C) of canvases.

    After a step for which `interrupted()` is true the others are left out.

    Raises `InvalidRequest` for what a callback returns, and `NumericalError` if the result is not finite.
    """
    device, velocity_of = networks.device, Velocity(networks, request, references)
    sigmas, surroundings, tokens = request.sigmas.to(device), None, pack(noise)
    if canvas is not None:
        surroundings = Surroundings(canvas=canvas.float(), noise=tokens, mask=token_masks(request.canvases).to(device))
        tokens = surroundings.noised(sigmas[0])
    batch = Batch(
        latents=tokens,
        prompt_embeds=prompt_embeds,
        negative_embeds=negative_embeds,
        surroundings=surroundings,
        rows=list(range(len(noise))),
    )
    timesteps = (request.sigmas[:-1] * 1000).to(device)
    velocity_of.prepare(prompt_embeds, negative_embeds)
    with networks.working("denoise", request.workload, cached=velocity_of.kept_bytes):
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
            if batch.surroundings is not None:
                batch.latents = batch.surroundings.keep(batch.latents, sigmas[i + 1])
            if request.callback is not None:
                if batch.laps:
                    batch.laps[-1].wait()  # so that what a callback stops is one queued step at most, not all of them
                clean = None
                if {"denoised", "preview"} & {*request.callback_inputs}:
                    clean = euler_step(before, velocity, sigma=sigmas[i], next_sigma=torch.zeros_like(sigmas[i]))
                _call_back(request, batch, i, timestep, clean=clean, preview=preview)
                depends = references is not None and bool(references.kv or request.reuse)
                if depends and networks.adapters.applied != request.loras:
                    raise InvalidRequest(
                        "callback_on_step_end",
                        "changed the LoRAs, and the K/V of the references were made with those before; change them between "
                        "calls, or draw without references",
                    )
            batch.laps += (clock.lap(),)
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
        batch.surroundings = batch.surroundings and batch.surroundings.of(rows)
