"""ComfyUI's IMAGE, a tensor (B, H, W, C) in [0, 1], and MASK (B, H, W), from and to what Limner takes and gives.

Knows no nodes.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limner.errors import InvalidRequest

__all__ = ["from_pixels", "to_mask", "to_pictures"]


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


def to_mask(mask: Tensor, *, size: tuple[int, int], field: str = "mask") -> np.ndarray:
    """Return a MASK as (height, width) uint8, 255 where it is 1, for a picture of `size` (width, height).

    Raises `InvalidRequest` that names `field`.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3) or 0 in mask.shape:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidRequest(field, f"{shape} is not a MASK (B, H, W); connect a MASK")
    if mask.dim() == 3 and mask.shape[0] != 1:
        raise InvalidRequest(field, f"is a batch of {mask.shape[0]} masks; connect one")
    height, width = mask.shape[-2:]
    if (width, height) != size:
        remedy = "scale it, or paint one in the mask editor of the picture"
        if (width, height) == (64, 64) and not mask.any():  # of Load Image, where a file has no transparency
            remedy = "the loaded file has no mask; paint one in its mask editor"
        raise InvalidRequest(field, "is {}x{}, the picture {}x{}; {}".format(width, height, *size, remedy))
    if not torch.isfinite(mask).all():
        raise InvalidRequest(field, "it holds values that are not finite; look at the node that it comes from")
    values = (mask.detach().float().cpu().reshape(height, width) * 255).round().clamp(0, 255)
    if not values.any():
        raise InvalidRequest(field, "nothing is masked, so nothing would be drawn; mask what is to change")
    return np.asarray(values.to(torch.uint8).numpy())


def from_pixels(pixels: Tensor) -> Tensor:
    """Return pictures (B, 3, H, W) in [0, 1] as an IMAGE (B, H, W, 3) on the CPU, not rounded to 256 values."""
    return pixels.detach().float().permute(0, 2, 3, 1).contiguous().cpu()
