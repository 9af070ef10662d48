"""Draw from text alone, four seeds of one prompt side by side."""

import torch

import limner

pipe = limner.Pipeline.from_pretrained()
seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
out = pipe("a big rocket in the night sky", num_images_per_prompt=4, generator=seeds)
for seed, image in zip(out.seeds, out.images, strict=True):
    image.save(f"rocket-{seed}.png")
