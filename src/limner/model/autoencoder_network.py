"""The network of FLUX.2's autoencoder, with the names of diffusers' `AutoencoderKLFlux2` for modules and tensors.

It computes what diffusers' class does, operation for operation, so results are the same to the last bit. An encoder or
decoder of wide maps that are channels last on a CPU uses `limner.model.feature_maps` instead: the same up to rounding. Its
own, since importing diffusers' class takes longer than drawing a small picture.

Shapes: feature maps (B, C, height, width). Knows torch; does not know files, strips and normalised latents.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from limner.config import NetworkConfig
from limner.model.feature_maps import doubled, doubles, doubling_weight, fuse, is_fast, normalised

__all__ = ["DEFAULTS", "AutoencoderNetwork", "is_plain"]

DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "decoder_block_out_channels": None,
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 32,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "batch_norm_eps": 1e-4,
    "batch_norm_momentum": 0.1,
    "patch_size": (2, 2),
}
"""What a configuration leaves out: the values of diffusers' class."""
_EPS = 1e-6
_WIDE = 64
"""An encoder or decoder whose narrowest maps have so many channels is fast channels last on a CPU."""


def is_plain(config: Mapping[str, Any]) -> bool:
    """Return True for a configuration of `AutoencoderNetwork`; others are for diffusers' class alone."""
    values = {**DEFAULTS, **config}
    channels, own = values["block_out_channels"], values["decoder_block_out_channels"]
    lists = [channels, values["down_block_types"], values["up_block_types"], *([own] if own else [])]
    return (
        all(isinstance(one, (list, tuple)) for one in lists)
        and len({len(one) for one in lists}) == 1
        and set(values["down_block_types"]) == {"DownEncoderBlock2D"}
        and set(values["up_block_types"]) == {"UpDecoderBlock2D"}
        and values["act_fn"] in ("silu", "swish")
    )


class AutoencoderNetwork(nn.Module):
    """Encoder, decoder, the 1x1 convolutions between them, and the running statistics of latents in `bn`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build it from a configuration that `is_plain`; what is missing in it is FLUX.2's."""
        super().__init__()
        unset = config.get("_use_default_values", ())
        given = {name: value for name, value in config.items() if name not in unset and name != "_use_default_values"}
        self.config = NetworkConfig({**DEFAULTS, **given})
        c = self.config
        self.encoder = Encoder(
            in_channels=c.in_channels,
            out_channels=2 * c.latent_channels,
            widths=c.block_out_channels,
            num_resnets=c.layers_per_block,
            groups=c.norm_num_groups,
            attention=c.mid_block_add_attention,
        )
        self.decoder = Decoder(
            in_channels=c.latent_channels,
            out_channels=c.out_channels,
            widths=c.decoder_block_out_channels or c.block_out_channels,
            num_resnets=c.layers_per_block + 1,
            groups=c.norm_num_groups,
            attention=c.mid_block_add_attention,
        )
        for half, widths in (
            (self.encoder, c.block_out_channels),
            (self.decoder, c.decoder_block_out_channels or c.block_out_channels),
        ):
            if min(widths) >= _WIDE:
                fuse(half)
        moments, latents = 2 * c.latent_channels, c.latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if c.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if c.use_post_quant_conv else None
        self.bn = nn.BatchNorm2d(
            math.prod(c.patch_size) * latents, eps=c.batch_norm_eps, momentum=c.batch_norm_momentum, affine=False
        )


class Encoder(nn.Module):
    """Pixels (B, 3, height, width) to feature maps of an eighth of the size, one level for each of `widths`."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        num_resnets: int,
        groups: int,
        attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        pairs = itertools.pairwise([widths[0], *widths])
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D(before, after, num_resnets=num_resnets, groups=groups, last=i == len(widths) - 1)
            for i, (before, after) in enumerate(pairs)
        )
        self.mid_block = MidBlock(widths[-1], groups=groups, attention=attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        out: Tensor = self.conv_out(normalised(self.conv_norm_out, self.conv_act, self.mid_block(x), overwrite=True))
        return out


class Decoder(nn.Module):
    """Latents (B, C, h, w) to pixels (B, 3, 8 h, 8 w); `widths` are those of the levels, the finest first."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        num_resnets: int,
        groups: int,
        attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        pairs = itertools.pairwise([widths[-1], *reversed(widths)])
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(before, after, num_resnets=num_resnets, groups=groups, last=i == len(widths) - 1)
            for i, (before, after) in enumerate(pairs)
        )
        self.mid_block = MidBlock(widths[-1], groups=groups, attention=attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(normalised(self.conv_norm_out, self.conv_act, x, overwrite=True))
        return out


class DownEncoderBlock2D(nn.Module):
    """Residual blocks of one resolution, then half of it, except in the last level."""

    def __init__(self, before: int, after: int, *, num_resnets: int, groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(before if i == 0 else after, after, groups=groups) for i in range(num_resnets)
        )
        self.downsamplers = None if last else nn.ModuleList([Downsample(after)])

    def forward(self, x: Tensor) -> Tensor:
        for part in (*self.resnets, *(self.downsamplers or ())):
            x = part(x)
        return x


class UpDecoderBlock2D(nn.Module):
    """Residual blocks of one resolution, then twice of it, except in the last level."""

    def __init__(self, before: int, after: int, *, num_resnets: int, groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(before if i == 0 else after, after, groups=groups) for i in range(num_resnets)
        )
        self.upsamplers = None if last else nn.ModuleList([Upsample(after)])

    def forward(self, x: Tensor) -> Tensor:
        for part in (*self.resnets, *(self.upsamplers or ())):
            x = part(x)
        return x


class MidBlock(nn.Module):
    """A residual block, attention among all positions if the model has it, and a residual block."""

    def __init__(self, width: int, *, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width, groups=groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups=groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for part in self.attentions:
            x = part(x)
        out: Tensor = self.resnets[1](x)
        return out


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with x through a 1x1 convolution if the width changes."""

    def __init__(self, before: int, after: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, eps=_EPS)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, after, eps=_EPS)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.conv_shortcut = None if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(normalised(self.norm1, self.nonlinearity, x))
        hidden = self.conv2(normalised(self.norm2, self.nonlinearity, hidden, overwrite=True))
        before = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return hidden.add_(before) if is_fast(self, hidden) else before + hidden  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Half the size: a convolution with stride 2, with a row of zeros below the map and a column on its right."""

    padding = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Twice the size: each value repeated in 2x2, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if doubles(self, x):
            return doubled(self.conv, doubling_weight(self.conv), x)
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Attention(nn.Module):
    """One head over all positions, around which x is added."""

    def __init__(self, width: int, *, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        flat_BCS = self.group_norm(x).flatten(2) if is_fast(self, x) else self.group_norm(x.flatten(2))
        hidden_BSC = flat_BCS.transpose(1, 2)
        q, k, v = (to(hidden_BSC).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))  # one head
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.to_out[0](out).transpose(1, 2).reshape(x.shape) + x  # type: ignore[no-any-return]
