"""Train the autoencoder further, on whole pictures; writes OUT/vae.

It was first trained on crops, whose group statistics are not those of whole pictures; its decoder receives latents from a
transformer, so here some have noise; and the form of small stickers is seldom right, so here their pixels
weigh more than the scene's, and the loss counts how far each sticker has gone the way to its mirror image or to grey. (A koala
is nearly grey, and an autoencoder of squared errors alone makes it so.)

With `--freeze-encoder` latents stay what they were, and data and transformers made with them stay valid. With
`--keep-latents` they stay near, in the same BatchNorm statistics, so that a transformer trained on the old ones can go on from
its weights (with data made anew). With neither the statistics are measured again.
"""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor, nn

from common import (
    Average,
    Log,
    Optimizer,
    arguments,
    find_font,
    form_loss,
    restore,
    save_checkpoint,
    snapshot,
    step_rng,
)
from judge import told_forms
from train_autoencoder import evaluate, fit_batch_norm, is_inner, pixels, random_picture, watched
from world import SIZES, STICKERS, Renderer

NOISE = 0.2
"""Largest deviation of the noise, in units of each channel's own deviation."""
STICKER_WEIGHT = 3.0
"""What an error on a sticker weighs, next to one on the scene."""


def deviations(vae: AutoencoderKLFlux2) -> Tensor:
    """Deviation of each latent channel, (C, 1, 1): the mean over the four places of a patch."""
    variance = vae.bn.running_var.view(vae.config.latent_channels, -1)
    return variance.mean(1).sqrt()[:, None, None]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures `x` (B, 3, height, width) and what an error in each pixel weighs (B, 1, height, width).

    `ways` (N, 3, height, width) is what changes if one sticker is mirrored, or is in grey, in the pictures of these `numbers` (N,).
    """

    x: Tensor
    weight: Tensor
    numbers: Tensor
    ways: Tensor


def strayed(error: Tensor, batch: Batch) -> Tensor:
    """Return how far each sticker has moved towards another form (N,): 0 is right, 1 is the other form."""
    return (error[batch.numbers] * batch.ways).sum((1, 2, 3)) / batch.ways.square().sum((1, 2, 3))


def add_noise(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of 0 to `NOISE` deviations of each channel on half of the latents."""
    deviation = latents.detach().std((0, 2, 3), keepdim=True)
    level = NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator)
    level = level * (torch.rand(level.shape, generator=generator) < 0.5)
    return latents + level * deviation * torch.randn(latents.shape, generator=generator)


def batch(rng: random.Random, renderer: Renderer, glyphs: list[int], num: int) -> Batch:
    """`num` pictures of one size."""
    size = rng.choices(SIZES, (0.7, 0.15, 0.15))[0]
    some = [replace(random_picture(rng, glyphs), size=size) for _ in range(num)]
    x = torch.stack([pixels(renderer.render(p)) for p in some])
    scenes = torch.stack([pixels(renderer.render(replace(p, stickers=()))) for p in some])
    weight = 1 + (STICKER_WEIGHT - 1) * (x != scenes).any(1, keepdim=True).float()
    numbers, ways = [], []
    for number, picture in enumerate(some):
        for form in (form for i in range(len(picture.stickers)) for form in told_forms(picture, i, renderer)):
            numbers.append(number)
            ways.append(pixels(renderer.render(form)) - x[number])
    return Batch(
        x=x.contiguous(memory_format=torch.channels_last),
        weight=weight / weight.mean(),
        numbers=torch.tensor(numbers, dtype=torch.long),
        ways=torch.stack(ways) if ways else x[:0],
    )


class Refined(nn.Module):
    """The autoencoder with one loss."""

    def __init__(
        self, vae: AutoencoderKLFlux2, *, freeze_encoder: bool, keep_latents: float, form_weight: float
    ) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self._vae, self._deviation = [vae], deviations(vae)  # in a list: its modules are named once
        self._keep, self._form_weight = keep_latents, form_weight
        self._before = None
        if freeze_encoder:
            self.encoder.requires_grad_(False)
            self.quant_conv.requires_grad_(False)
        elif keep_latents:
            self._before = [AutoencoderKLFlux2.from_config(vae.config)]
            self._before[0].load_state_dict(vae.state_dict())
            self._before[0].requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def encode(self, x: Tensor, vae: AutoencoderKLFlux2) -> Tensor:
        """Posterior means (B, C, h, w)."""
        return vae.encode(x).latent_dist.mode().float()

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and of it: squared error of pixels in [-1, 1], how far stickers strayed, squared change of the latents
        in their deviations."""
        vae, x = self._vae[0], batch.x
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.encode(x, vae)
            restored = vae.decode(add_noise(latents, generator)).sample
            moved = torch.zeros(())
            if self._before:
                with torch.no_grad():
                    before = self.encode(x, self._before[0])
                moved = ((latents - before) / self._deviation).square().mean()
        error = restored.float() - x
        forms = form_loss(strayed(error, batch))
        loss = (batch.weight * (error.square() + 0.05 * error.abs())).mean()
        loss = loss + self._form_weight * forms + self._keep * moved
        parts = {"mse": error.square().mean(), "form_loss": forms, "moved": moved}
        return loss, {name: value.detach() for name, value in parts.items()}


def main() -> None:
    parser = arguments(__doc__ or "", steps=1200, batch=16, lr=1.5e-3)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder to start from")
    parser.add_argument("--freeze-encoder", action="store_true", help="train the decoder alone")
    parser.add_argument(
        "--keep-latents", type=float, default=0.0, help="price of a unit squared change of the latents, in the loss"
    )
    parser.add_argument("--named", type=int, default=16, help="how much oftener a named sticker is shown than another")
    parser.add_argument("--form-weight", type=float, default=1.0, help="what a sticker of another form weighs")
    parser.add_argument("--statistics", type=int, default=768, help="pictures that the BatchNorm statistics come from")
    args = parser.parse_args()
    if args.freeze_encoder and args.keep_latents:
        parser.error("--keep-latents: a frozen encoder keeps them; give one of the two")
    log = Log(args.out)
    renderer = Renderer(find_font(args.font))
    glyphs = [*STICKERS.values()] * args.named + renderer.unnamed_glyphs()
    torch.manual_seed(args.seed)
    vae = AutoencoderKLFlux2.from_pretrained(args.vae, torch_dtype=torch.float32).to(memory_format=torch.channels_last)
    vae.eval()
    model = Refined(
        vae, freeze_encoder=args.freeze_encoder, keep_latents=args.keep_latents, form_weight=args.form_weight
    )
    average = Average(model, 0.998)
    optimizer = Optimizer(model, lr=args.lr, matrices=is_inner)
    first = 0
    if args.resume:
        first = restore(args.out / "checkpoint.pt", model, average, optimizer)["step"]
    truth = watched(renderer)
    log.write(psnr=evaluate(vae, truth))

    def prepare(step: int) -> tuple[Batch, torch.Generator]:
        rng, generator = step_rng(args.seed, step)
        return batch(rng, renderer, glyphs, args.batch), generator

    with ThreadPoolExecutor(1) as beside:
        following = beside.submit(prepare, first)
        for step in range(first, args.steps):
            pictures, generator = following.result()
            following = beside.submit(prepare, step + 1)
            loss, parts = model(pictures, generator)
            rate = min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
            optimizer.step(loss, rate=rate)
            average.update(model, step)
            if step % min(50, args.steps // 6 or 1) == 0:
                log.write(step=step, loss=loss.item(), **{name: value.item() for name, value in parts.items()})
            stop = log.seconds > args.minutes * 60 or step + 1 in (args.steps, args.stop_after)
            if stop or (step + 1) % 200 == 0:
                save_checkpoint(args.out / "checkpoint.pt", snapshot(model, average, optimizer, step + 1))
            if stop:
                break

    average.copy_to(model)
    if not args.freeze_encoder and not args.keep_latents:
        fit_batch_norm(vae, renderer, glyphs, num=args.statistics, seed=args.seed)
    log.write(psnr=evaluate(vae, truth))
    vae.to(memory_format=torch.contiguous_format).save_pretrained(args.out / "vae")


if __name__ == "__main__":
    main()
