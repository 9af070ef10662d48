"""Convert pixels to the tensors that the autoencoder takes, and its pictures to PIL. Knows no files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["to_pil", "to_pixels"]


def to_pixels(pixels: Tensor) -> Tensor:
    """Return (3, height, width) uint8 as (1, 3, height, width) float32 in [-1, 1], by the same steps as diffusers."""
    return pixels[None].float() / 255.0 * 2.0 - 1.0


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """Return (B, 3, height, width) in [0, 1] as B pictures, each value rounded to the nearest of 256."""
    values = (pictures.float().permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(value) for value in values]
