"""A quick preview of latents during denoising: one linear map from a latent token to 2x2 pixels of a small picture.

The map is fitted when a model is made (`recipes/`) and stored with it. A picture of height x width has a preview of
height/8 x width/8. Shapes: latents (B, C, h, w), normalised and patchified. Knows no files and no pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from limner.tokens import patchify, unpatchify

__all__ = ["LatentPreview", "Preview"]

_OUT = 12
"""Three colours of 2x2 pixels, in the channel order of `tokens.patchify`."""


class Preview(Protocol):
    """What makes previews: called with latents (B, C, h, w), returns pictures in [0, 1], (B, 3, height, width), float32."""

    @property
    def channels(self) -> int:
        """Channels C of a latent token."""

    def __call__(self, latents: Tensor) -> Tensor: ...


class LatentPreview:
    """A map with weight (12, C) and bias (12,). Raises `ValueError` for other shapes and values that are not finite."""

    def __init__(self, weight: Sequence[Sequence[float]] | Tensor, bias: Sequence[float] | Tensor) -> None:
        self.weight = torch.as_tensor(weight, dtype=torch.float32)
        self.bias = torch.as_tensor(bias, dtype=torch.float32)
        if self.weight.dim() != 2 or len(self.weight) != _OUT or self.bias.shape != (_OUT,):
            raise ValueError(
                f"weight has shape {list(self.weight.shape)}, bias {list(self.bias.shape)}; allowed: [12, C], [12]"
            )
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise ValueError("weight or bias hold values that are not finite")

    @classmethod
    def fit(cls, latents: Tensor, pixels: Tensor) -> LatentPreview:
        """Fit by least squares to latents (B, C, h, w) and their pictures at 1/8 size, (B, 3, 2 h, 2 w) in [0, 1]."""
        x = latents.double().movedim(1, -1).flatten(0, -2)
        y = patchify(pixels.double()).movedim(1, -1).flatten(0, -2)
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], dim=1), y).solution
        return cls(solution[:-1].t().float(), solution[-1].float())

    @property
    def channels(self) -> int:
        """Channels C of a latent token."""
        return self.weight.shape[1]

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 3, 2 h, 2 w) in [0, 1], float32."""
        weight, bias = self.weight.to(latents.device), self.bias.to(latents.device)
        patches = torch.einsum("oc,bchw->bohw", weight, latents.float()) + bias[:, None, None]
        return unpatchify(patches).clamp(0, 1)
