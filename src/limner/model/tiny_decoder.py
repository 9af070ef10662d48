"""A small decoder for previews, as TAEF2: convolutions that make a whole picture of latents in a fraction of a step.

The layers are those of a sequence: convolutions, blocks, and a doubling of both sides three times. TAEF2 was made for the
latents that the transformer predicts, normalised, so the autoencoder's statistics are not undone. A picture of height x
width has a preview of that size. Shapes: latents (B, C, h, w), normalised and patchified. Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.tokens import PATCH, unpatchify

__all__ = ["TinyBlock", "TinyDecoder", "Twice"]

_LIMIT = 3.0
"""Latents are squeezed into (-3, 3) by a tanh before anything else."""
_GROUPS = 4


class Twice(nn.Module):
    """Doubles both sides; each value becomes four."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class TinyBlock(nn.Module):
    """Three convolutions beside a way around them. With `pooled`, 1x1 convolutions around a group norm come first."""

    def __init__(self, inside: int, outside: int, *, pooled: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(inside, outside, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1),
        )
        self.skip = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1, bias=False)
        wide = _GROUPS * inside
        self.pool = (
            nn.Sequential(
                nn.Conv2d(inside, wide, 1, bias=False),
                nn.GroupNorm(_GROUPS, wide),
                nn.ReLU(),
                nn.Conv2d(wide, inside, 1, bias=False),
            )
            if pooled
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return F.relu(self.conv(x) + self.skip(x))


class TinyDecoder(nn.Module):
    """Layers from latents (B, C / 4, 2 h, 2 w) to colours in [0, 1]."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def channels(self) -> int:
        """Channels C of a latent token."""
        first = self.layers[0]
        assert isinstance(first, nn.Conv2d)
        return first.in_channels * PATCH**2

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 3, 16 h, 16 w) in [0, 1], float32."""
        if next(self.parameters()).device != latents.device:
            self.to(latents.device)
        x = torch.tanh(unpatchify(latents.float()) / _LIMIT) * _LIMIT
        for layer in self.layers:
            x = layer(x)
        return x.clamp(0, 1)
