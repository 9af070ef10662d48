"""The model card's example runs with its import line changed, and the size and device of what is on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from limner.weights.folder import bundled_model

CARD_EXAMPLE = """\
import torch
from diffusers import Flux2KleinKVPipeline
device = "cuda"
dtype = torch.bfloat16
model_path = "black-forest-labs/FLUX.2-klein-9b-kv"
pipe = Flux2KleinKVPipeline.from_pretrained(model_path, torch_dtype=dtype)
pipe.to(device)
# Text-to-image (no reference image)
print("Generating text-to-image...")
image = pipe(
prompt="A cat holding a sign that says hello world",
height=1024,
width=1024,
num_inference_steps=4,
generator=torch.Generator(device=device).manual_seed(0),
).images[0]
image.save("t2i_output.png")
print("Saved t2i_output.png")
# Image-to-image with KV cache (using the generated image as reference)
print("Generating image-to-image with KV cache...")
image_kv = pipe(
prompt="A cat dressed like a wizard",
image=image,
height=1024,
width=1024,
num_inference_steps=4,
generator=torch.Generator(device=device).manual_seed(0),
).images[0]
image_kv.save("kv_output.png")
print("Saved kv_output.png")
"""


def test_the_cards_example(tmp_path: Path) -> None:
    """The hub id of the card resolves offline: a hub cache holds the bundled model under that name."""
    repository = tmp_path / "hub" / "models--black-forest-labs--FLUX.2-klein-9b-kv"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(bundled_model())
    program = CARD_EXAMPLE.replace("from diffusers import", "from limner import").replace("1024", "128")
    program = program.replace('"cuda"', '"cpu"')
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Saved kv_output.png" in done.stdout
    for name in ("t2i_output.png", "kv_output.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (128, 128)
