"""Train the KL autoencoder of the bundled model on crops of rendered pictures; writes OUT/vae in the diffusers layout."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2

from common import Average, Log, Optimizer, arguments, find_font, restore, save_checkpoint, snapshot, step_rng
from world import COLUMNS, ROWS, SCALES, SIZES, STICKERS, Picture, Renderer, Scene, Sticker, scene_names

CROP = 64
CONFIG = {
    "block_out_channels": (16, 32, 64, 128),
    "layers_per_block": 1,
    "latent_channels": 12,
    "norm_num_groups": 2,
    "sample_size": 128,
    "mid_block_add_attention": False,
}
KL_WEIGHT = 1e-5


def is_inner(name: str, p: torch.nn.Parameter) -> bool:
    """Return True for a parameter of the convolutions between the first and the last."""
    return (p.dim() == 4 and "_blocks." in name) or "mid_block" in name


def random_picture(rng: random.Random, glyphs: list[int]) -> Picture:
    """Any scene, one to four stickers of any kind but the held-out ones."""
    stickers = [
        Sticker(
            glyph=rng.choice(glyphs),
            scale=rng.choice(SCALES),
            column=rng.choice(COLUMNS),
            row=rng.choice(ROWS),
            mirrored=rng.random() < 0.3,
            grey=rng.random() < 0.1,
        )
        for _ in range(rng.randint(1, 4))
    ]
    scene = Scene(name=rng.choice(scene_names()), variant=rng.choice((0, 0, *range(1, 9))))
    return Picture(scene=scene, stickers=tuple(stickers), size=rng.choice(SIZES))


def pixels(image: object) -> torch.Tensor:
    """(3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def batch(rng: random.Random, renderer: Renderer, glyphs: list[int], size: int) -> torch.Tensor:
    crops = []
    for _ in range(size):
        image = renderer.render(random_picture(rng, glyphs))
        x, y = (rng.randrange(0, (side - CROP) // 8 + 1) * 8 for side in image.size)
        crops.append(pixels(image.crop((x, y, x + CROP, y + CROP))))
    return torch.stack(crops)


def watched(renderer: Renderer) -> torch.Tensor:
    """The pictures that every autoencoder is judged on, (48, 3, height, width), all square."""
    rng, glyphs = random.Random("0/evaluation"), [*STICKERS.values()] * 8 + renderer.unnamed_glyphs()
    pictures = [p for p in (random_picture(rng, glyphs) for _ in range(200)) if p.size == SIZES[0]][:48]
    return torch.stack([pixels(renderer.render(p)) for p in pictures])


@torch.no_grad()
def evaluate(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> float:
    """PSNR in dB over whole pictures, posterior mean."""
    restored = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    return -10 * math.log10(((restored - pictures) / 2).square().mean().item())


def main() -> None:
    parser = arguments(__doc__ or "", steps=3800, batch=8, lr=3e-3)
    parser.add_argument("--statistics", type=int, default=768, help="pictures that the BatchNorm statistics come from")
    args = parser.parse_args()
    log = Log(args.out)
    renderer = Renderer(find_font(args.font))
    glyphs = [*STICKERS.values()] * 8 + renderer.unnamed_glyphs()
    torch.manual_seed(args.seed)
    vae = AutoencoderKLFlux2(**CONFIG)
    torch.nn.init.constant_(vae.quant_conv.bias[CONFIG["latent_channels"] :].detach(), -6.0)  # little noise at first
    average = Average(vae, 0.998)
    optimizer = Optimizer(vae, lr=args.lr, matrices=is_inner)
    first = 0
    if args.resume:
        first = restore(args.out / "checkpoint.pt", vae, average, optimizer)["step"]
    truth = watched(renderer)

    for step in range(first, args.steps):
        rng, generator = step_rng(args.seed, step)
        x = batch(rng, renderer, glyphs, args.batch)
        progress = step / args.steps
        rate = min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        posterior = vae.encode(x).latent_dist
        restored = vae.decode(posterior.sample(generator)).sample
        error = restored - x
        loss = (
            error.square().mean()
            + 0.1 * error.abs().mean()
            + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        )
        optimizer.step(loss, rate=rate)
        average.update(vae, step)
        if step % min(50, args.steps // 6 or 1) == 0:
            log.write(step=step, loss=loss.item(), mse=error.square().mean().item())
        stop = log.seconds > args.minutes * 60 or step + 1 in (args.steps, args.stop_after)
        if stop or (step + 1) % 500 == 0:
            save_checkpoint(args.out / "checkpoint.pt", snapshot(vae, average, optimizer, step + 1))
        if stop:
            break

    average.copy_to(vae)
    vae.eval()
    fit_batch_norm(vae, renderer, glyphs, num=args.statistics, seed=args.seed)
    log.write(psnr=evaluate(vae, truth))
    vae.save_pretrained(args.out / "vae")


@torch.no_grad()
def fit_batch_norm(vae: AutoencoderKLFlux2, renderer: Renderer, glyphs: list[int], *, num: int, seed: int) -> None:
    """Set the running statistics of the patchified latents, so that each of the channels has mean 0 and variance 1."""
    rng = random.Random(f"{seed}/statistics")
    latents = []
    for _ in range(num):
        picture = random_picture(rng, glyphs)
        latent = vae.encode(pixels(renderer.render(picture))[None]).latent_dist.mode()
        _, c, h, w = latent.shape
        patches = latent.view(c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3).reshape(c * 4, -1)
        latents.append(patches)
    values = torch.cat(latents, 1).double()
    vae.bn.running_mean.copy_(values.mean(1))
    vae.bn.running_var.copy_(values.var(1))


if __name__ == "__main__":
    main()
