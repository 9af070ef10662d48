"""ComfyUI's IMAGE, a tensor (B, H, W, C) in [0, 1], from and to what Limner takes and gives. Knows no nodes."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from limner.errors import InvalidRequest

__all__ = ["from_pixels", "to_pictures"]


def to_pictures(image: Tensor, *, field: str) -> list[Image.Image]:
    """Return the pictures of a batch in order, each value the nearest of 256; those beyond [0, 1] are cut as in Save Image.

    An IMAGE that was loaded from a file gives the very pixels of the file. Raises `InvalidRequest` that names `field`.
    """
    if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        shape = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise InvalidRequest(field, f"{shape} is not an IMAGE (B, H, W, 3 or 4); connect an IMAGE")
    if not torch.isfinite(image).all():
        raise InvalidRequest(field, "it holds values that are not finite; look at the node that it comes from")
    values = (image.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return [Image.fromarray(one) for one in values]


def from_pixels(pixels: Tensor) -> Tensor:
    """Return pictures (B, 3, H, W) in [0, 1] as an IMAGE (B, H, W, 3) on the CPU, not rounded to 256 values."""
    return pixels.detach().float().permute(0, 2, 3, 1).contiguous().cpu()
