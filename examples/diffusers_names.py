"""The names and manners of diffusers: change the import, keep the program."""

import torch

from limner import Flux2KleinKVPipeline

pipe = Flux2KleinKVPipeline.from_pretrained(None)  # the bundled model; usually a folder or a hub id
pipe.set_progress_bar_config(disable=True)
image = pipe(
    prompt="a small red rocket in the snow",
    height=128,
    width=128,
    num_inference_steps=4,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]
image.save("drop-in.png")
