"""Run the autoencoder's network a strip of rows at a time: the result of the whole picture with less memory, and no seams.

Tiles usually show for two reasons, and both are exact here. A convolution reads the rows above and below its strip. The
statistics of a GroupNorm are those of the whole picture, gathered strip by strip before any strip is normalised (mean and
variance of parts are merged in float64, after Chan, Golub and LeVeque). So the result equals that of the plain network up
to rounding. At each resolution at most two feature maps are in memory: the stream, and the one between the convolutions of
a residual block. The plain network holds four or more.

Shapes: feature maps (B, C, height, width). The middle blocks, at an eighth of the resolution, run whole. Knows torch and
the module names of diffusers; does not know when strips are used (`limner.model.autoencoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.model.feature_maps import Moments, doubled, doubles, doubling_weight, empty_map

__all__ = ["decode", "encode"]

_PIXELS = 1 << 15
"""Pixels of a strip: 32 rows of a picture 1024 wide."""
_LEAST = 8
"""Fewest rows of a strip, since the border rows of strips are read twice."""

Rows = Callable[[int, int], Tensor]
"""A function that returns the rows [start, stop) of a feature map."""


def encode(network: Any, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, height, width) to the moments (B, 2 C, height/8, width/8) of `AutoencoderKLFlux2`."""
    encoder = network.encoder
    x = _convolved(encoder.conv_in, lambda i, j: pixels[:, :, i:j], pixels)
    for block in encoder.down_blocks:
        if type(block).__name__ != "DownEncoderBlock2D":
            x = block(x)
            continue
        for resnet in block.resnets:
            x = _resnet(resnet, x)
        for down in block.downsamplers or ():
            x = _downsampled(down, x)
    x = _out(encoder, encoder.mid_block(x))
    return x if network.quant_conv is None else network.quant_conv(x)


def decode(network: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pixels (B, 3, 8 h, 8 w)."""
    decoder = network.decoder
    x = latents if network.post_quant_conv is None else network.post_quant_conv(latents)
    x = decoder.mid_block(decoder.conv_in(x))
    for block in decoder.up_blocks:
        if type(block).__name__ != "UpDecoderBlock2D":
            x = block(x)
            continue
        for resnet in block.resnets:
            x = _resnet(resnet, x)
        for up in block.upsamplers or ():
            x = _upsampled(up, x)
    return _out(decoder, x)


def _moments(norm: nn.GroupNorm, x: Tensor) -> Moments:
    found = Moments(norm)
    for start, stop in _strips(x.shape[2], x.shape[3]):
        found.add(x[:, :, start:stop])
    return found


def _strips(height: int, width: int) -> Iterator[tuple[int, int]]:
    rows = max(_LEAST, _PIXELS // width)
    for start in range(0, height, rows):
        yield start, min(height, start + rows)


def _conv_rows(conv: nn.Conv2d, read: Rows, height: int, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a convolution's result over a map of `height` rows, with zeros above and below the map."""
    step, pad, size = conv.stride[0], int(conv.padding[0]), conv.kernel_size[0]
    first, last = start * step - pad, (stop - 1) * step - pad + size
    x = read(max(first, 0), min(last, height))
    if first < 0 or last > height:
        x = F.pad(x, (0, 0, max(0, -first), max(0, last - height)))
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, (0, int(conv.padding[1])))


def _convolved(conv: nn.Conv2d, read: Rows, like: Tensor, *, scale: int = 1) -> Tensor:
    """A convolution that keeps the size, over a map of the layout of `like` and `scale` times its size."""
    height, width = (scale * side for side in like.shape[2:])
    out = empty_map(conv, like, channels=conv.out_channels, height=height, width=width)
    for start, stop in _strips(height, width):
        out[:, :, start:stop] = _conv_rows(conv, read, height, start, stop)
    return out


def _resnet(block: Any, x: Tensor) -> Tensor:
    """A residual block. The result overwrites x, or the map between the convolutions if their widths differ."""
    height, width = x.shape[2:]
    norm = _moments(block.norm1, x).normaliser(block.nonlinearity)
    hidden = empty_map(block, x, channels=block.conv1.out_channels, height=height, width=width)
    moments = Moments(block.norm2)
    for start, stop in _strips(height, width):
        part = _conv_rows(block.conv1, lambda i, j: norm(x[:, :, i:j]), height, start, stop)
        hidden[:, :, start:stop] = part
        moments.add(part)
    norm2, above = moments.normaliser(block.nonlinearity), hidden[:, :, :0]
    out = x if block.conv_shortcut is None else hidden
    for start, stop in _strips(height, width):

        def read(i: int, j: int, start: int = start, above: Tensor = above) -> Tensor:
            rows = hidden[:, :, i:j] if i == start else torch.cat([above, hidden[:, :, start:j]], dim=2)
            return norm2(rows)

        part = _conv_rows(block.conv2, read, height, start, stop)
        above = hidden[:, :, stop - 1 : stop].clone()  # the next strip reads this row, which may be overwritten below
        own = x[:, :, start:stop]
        part += own if block.conv_shortcut is None else block.conv_shortcut(own)
        out[:, :, start:stop] = part
    return out


def _downsampled(down: Any, x: Tensor) -> Tensor:
    """Half the size: a convolution with stride 2, with a row of zeros below the map and a column on its right."""
    height, width = x.shape[2:]
    conv, beyond = down.conv, 1 if down.padding == 0 else 0
    full = height + beyond + 2 * int(conv.padding[0])
    out_height = (full - conv.kernel_size[0]) // conv.stride[0] + 1
    parts = [
        _conv_rows(conv, lambda i, j: F.pad(x[:, :, i:j], (0, beyond)), height, start, stop)
        for start, stop in _strips(out_height, width)
    ]
    return torch.cat(parts, dim=2)


def _upsampled(up: Any, x: Tensor) -> Tensor:
    """Twice the size: each value repeated in 2x2, then a convolution."""
    height, width = x.shape[2:]
    if doubles(up, x):
        weight = doubling_weight(up.conv)
        out = empty_map(up, x, channels=up.conv.out_channels, height=2 * height, width=2 * width)
        for start, stop in _strips(height, 4 * width):
            first = max(0, start - 1)
            rows = doubled(up.conv, weight, x[:, :, first : min(height, stop + 1)])
            out[:, :, 2 * start : 2 * stop] = rows[:, :, 2 * (start - first) : 2 * (stop - first)]
        return out

    def read(i: int, j: int) -> Tensor:
        first = i // 2
        twice = F.interpolate(x[:, :, first : (j - 1) // 2 + 1], scale_factor=2.0, mode="nearest")
        return twice[:, :, i - 2 * first : j - 2 * first]

    return _convolved(up.conv, read, x, scale=2)


def _out(half: Any, x: Tensor) -> Tensor:
    """The last norm and convolution of the encoder or decoder."""
    norm = _moments(half.conv_norm_out, x).normaliser(half.conv_act)
    return _convolved(half.conv_out, lambda i, j: norm(x[:, :, i:j]), x)
