"""Trains the decoder of the autoencoder further, on whole pictures, with the encoder as it is; writes OUT/vae.

The encoder and its BatchNorm statistics do not change, so latents and transformers made with them stay valid. The
autoencoder was trained on crops, whose group statistics are not those of whole pictures; and the decoder meets latents that a
transformer drew, so here some have noise.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from common import Average, Log, Optimizer, arguments, find_font, restore, save_checkpoint, snapshot, step_rng
from train_autoencoder import evaluate, pixels, random_picture, watched
from world import SIZES, STICKERS, Renderer

NOISE = 0.2
"""Largest deviation of the noise, in units of each channel's own deviation."""


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, pictures: Tensor) -> Tensor:
    """Posterior means (B, C, h, w)."""
    with torch.autocast("cpu", torch.bfloat16):
        return vae.encode(pictures).latent_dist.mode().float()


def deviations(vae: AutoencoderKLFlux2) -> Tensor:
    """Deviation of each latent channel, (C, 1, 1): the mean over the four places of a patch."""
    variance = vae.bn.running_var.view(vae.config.latent_channels, -1)
    return variance.mean(1).sqrt()[:, None, None]


def add_noise(latents: Tensor, deviation: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of 0 to `NOISE` deviations on half of the latents."""
    level = NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator)
    level = level * (torch.rand(level.shape, generator=generator) < 0.5)
    return latents + level * deviation * torch.randn(latents.shape, generator=generator)


def main() -> None:
    parser = arguments(__doc__ or "", steps=1200, batch=16, lr=1e-3)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder to start from")
    args = parser.parse_args()
    log = Log(args.out)
    renderer = Renderer(find_font(args.font))
    glyphs = [*STICKERS.values()] * 8 + renderer.unnamed_glyphs()
    torch.manual_seed(args.seed)
    vae = AutoencoderKLFlux2.from_pretrained(args.vae, torch_dtype=torch.float32).to(memory_format=torch.channels_last)
    vae.requires_grad_(False).eval()
    trained = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    trained.requires_grad_(True)
    average = Average(trained, 0.998)
    optimizer = Optimizer(
        trained, lr=args.lr, matrices=lambda name, p: (p.dim() == 4 and "_blocks." in name) or "mid_block" in name
    )
    first = 0
    if args.resume:
        first = restore(args.out / "checkpoint.pt", trained, average, optimizer)["step"]
    truth = watched(renderer, glyphs, seed=args.seed)
    log.write(psnr=evaluate(vae, truth))
    deviation = deviations(vae)

    for step in range(first, args.steps):
        rng, generator = step_rng(args.seed, step)
        size = rng.choices(SIZES, (0.7, 0.15, 0.15))[0]
        some = [replace(random_picture(rng, glyphs), size=size) for _ in range(args.batch)]
        x = torch.stack([pixels(renderer.render(p)) for p in some]).contiguous(memory_format=torch.channels_last)
        latents = add_noise(encode(vae, x), deviation, generator)
        with torch.autocast("cpu", torch.bfloat16):
            restored = vae.decode(latents).sample
        error = restored.float() - x
        rate = min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        optimizer.step(error.square().mean() + 0.05 * error.abs().mean(), rate=rate)
        average.update(trained, step)
        if step % min(50, args.steps // 6 or 1) == 0:
            log.write(step=step, mse=error.square().mean().item())
        stop = log.seconds > args.minutes * 60 or step + 1 == args.steps
        if stop or (step + 1) % 200 == 0:
            save_checkpoint(args.out / "checkpoint.pt", snapshot(trained, average, optimizer, step + 1))
        if stop:
            break

    average.copy_to(trained)
    log.write(psnr=evaluate(vae, truth))
    vae.to(memory_format=torch.contiguous_format).save_pretrained(args.out / "vae")


if __name__ == "__main__":
    main()
