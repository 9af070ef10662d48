"""Pixels to normalised latents and back, over the network of FLUX.2's autoencoder.

Shapes: pixels (B, 3, height, width) in [-1, 1]; latents (B, 4 C, h, w), patchified and normalised by the running
statistics of the checkpoint's BatchNorm, as the transformer reads and predicts them. Large pictures are processed in
strips (`limner.model.strips`), with the same result up to rounding. Knows no pictures and no files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limner.config import WHOLE_PIXELS
from limner.model import feature_maps, strips
from limner.tokens import PATCH, patchify, unpatchify

__all__ = ["Autoencoder"]


class Autoencoder(nn.Module):
    """Wrap the network so that all other code sees normalised, patchified latents only.

    `network` is an `AutoencoderNetwork`, or diffusers' `AutoencoderKLFlux2`, which has the same parts.
    """

    whole_pixels: int = WHOLE_PIXELS
    """Larger pictures are decoded in strips. For encoding `WHOLE_PIXELS` is fixed: its bits are part of the content key."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    @property
    def factor(self) -> int:
        """Pixels on a side of one token: 16 for the family."""
        return int(PATCH * 2 ** (len(self.network.config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return int(self.network.config.latent_channels) * PATCH**2

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def _weight(self) -> Tensor:
        parameter: Tensor = next(self.network.parameters())
        return parameter

    @property
    def arithmetic(self) -> str | None:
        """What decides the last bits of latents besides weights, device and dtype; None for torch's plain layout."""
        fused = feature_maps.is_fused(self.network.encoder) and self.device.type == "cpu"
        return feature_maps.arithmetic_name(self.dtype) if fused else None

    def _laid_out(self, half: nn.Module, x: Tensor) -> Tensor:
        """Return x in the layout in which encoder or decoder is fastest on a CPU; on another device as it is."""
        if x.device.type != "cpu":
            return x
        last = feature_maps.is_fused(half) and not torch.is_grad_enabled()
        return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, height, width) in [-1, 1] to latents (B, 4 C, h, w): the mean of the posterior, normalised."""
        pixels = self._laid_out(self.network.encoder, pixels.to(self.device, self.dtype))
        if pixels.shape[2] * pixels.shape[3] > WHOLE_PIXELS and not torch.is_grad_enabled():
            moments = strips.encode(self.network, pixels)
        else:
            moments = self.network.encoder(pixels)
            moments = moments if self.network.quant_conv is None else self.network.quant_conv(moments)
        latents = patchify(moments.chunk(2, dim=1)[0])
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Latents (B, 4 C, h, w) to those of the network, (B, C, 2 h, 2 w)."""
        mean, std = self._statistics(latents)
        return unpatchify(latents * std + mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of the network (B, C, 2 h, 2 w) to pixels (B, 3, height, width), about [-1, 1]."""
        latents = self._laid_out(self.network.decoder, latents.to(self.dtype))
        scale = self.factor // PATCH
        if latents.shape[2] * latents.shape[3] * scale**2 > self.whole_pixels and not torch.is_grad_enabled():
            return strips.decode(self.network, latents).contiguous()
        latents = latents if self.network.post_quant_conv is None else self.network.post_quant_conv(latents)
        pixels: Tensor = self.network.decoder(latents)
        return pixels.contiguous()

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        bn = self.network.bn
        mean = bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + self.network.config.batch_norm_eps)
        return mean.to(like.device, like.dtype), std.to(like.device, like.dtype)
