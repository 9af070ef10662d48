"""Norms and doublings of the autoencoder's feature maps, on a CPU and channels last (those of a pixel side by side).

In that layout oneDNN's convolutions read and write maps as they are; in the other one they first lay them out anew. A norm
and its activation are one pass for the statistics and one for the values (`limner.native`, where it is built; else torch).
A convolution over a map that was doubled is one transposed convolution of the map itself: each value of the result has 2x2
products instead of 3x3, with sums of weights.

Shapes: maps (B, C, h, w). Knows torch and the native kernels; does not know which networks have this layout
(`limner.model.autoencoder`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.native import kernels as native

__all__ = [
    "Moments",
    "arithmetic_name",
    "doubled",
    "doubles",
    "doubling_weight",
    "empty_map",
    "fuse",
    "is_fast",
    "is_fused",
    "normalised",
]

_LEAST_DOUBLED = 64 * 64
"""Pixels of the smallest map whose doubling pays in bfloat16 with AMX (docs/log.md, 2026-11-29)."""


def fuse(network: nn.Module) -> None:
    """Let all modules of a network compute maps that are channels last here. Other modules keep to torch's bits."""
    for module in network.modules():
        module.fused = True  # type: ignore[assignment]


def is_fused(module: nn.Module) -> bool:
    """Return True if `fuse` was called for a network with this module."""
    return getattr(module, "fused", False)


def is_fast(module: nn.Module, x: Tensor) -> bool:
    """Return True if a module is fused and x is a map for it: channels last on a CPU, and no gradient is recorded."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return is_fused(module) and last and x.device.type == "cpu" and not torch.is_grad_enabled()


def arithmetic_name(dtype: torch.dtype) -> str:
    """Name what decides the last bits of channels last besides torch: whether the norms are native, and which."""
    runs = dtype in (torch.bfloat16, torch.float32) and native.native_library() is not None
    return f"channels last {native.source_digest()}" if runs else "channels last"


def empty_map(module: nn.Module, like: Tensor, *, channels: int, height: int, width: int) -> Tensor:
    """Return a map without values for a module's result, with the batch and dtype of `like`."""
    layout = torch.channels_last if is_fast(module, like) else torch.contiguous_format
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def normalised(norm: nn.GroupNorm, act: nn.Module, x: Tensor, *, overwrite: bool = False) -> Tensor:
    """act(norm(x)) of a whole map; with `overwrite` x may be lost."""
    if not (is_fused(norm) and native.runs_maps(x)):
        return act(norm(x))  # type: ignore[no-any-return]
    moments = Moments(norm)
    moments.add(x)
    return moments.normaliser(act, overwrite=overwrite)(x)


def doubles(module: nn.Module, x: Tensor) -> bool:
    """Return True if a convolution over x, doubled, is faster as `doubled`: laying out its weights takes time as well."""
    return is_fast(module, x) and x.shape[2] * x.shape[3] >= _LEAST_DOUBLED


def doubling_weight(conv: nn.Conv2d) -> Tensor:
    """Return the weight (C_in, C_out, 4, 4) for `doubled`, of a 3x3 convolution. Sums are rounded once, to its dtype.

    The kernel has rows w0, w1, w2. An even row of the result reads the row of x above with w0 and its own with w1 + w2, an
    odd one its own with w0 + w1 and the row below with w2. So do columns.
    """
    rows = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], device=conv.weight.device)
    sums = conv.weight.flatten(2).float() @ torch.kron(rows, rows).t()
    return sums.to(conv.weight.dtype).view(*sums.shape[:2], 4, 4).transpose(0, 1)


def doubled(conv: nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    """Return `conv` of x after each value was repeated in 2x2, (B, C, 2 h, 2 w); `weight` is its `doubling_weight`."""
    return F.conv_transpose2d(x, weight, conv.bias, stride=2, padding=1)


class Moments:
    """Running mean and variance of each group of a GroupNorm, over strips added one by one."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self._norm = norm
        self._count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, strip: Tensor) -> None:
        """Add rows of the map."""
        batch, groups = strip.shape[0], self._norm.num_groups
        count = strip[0].numel() // groups
        if is_fused(self._norm) and native.runs_maps(strip):
            sums, squared = native.map_sums(strip).view(batch, 2, groups, -1).sum(dim=-1).unbind(1)
            mean = sums / count
            variance = (squared / count - mean**2).clamp_(min=0)
        else:
            flat = strip.float().reshape(batch, groups, -1)
            variance, mean = (_wide(v) for v in torch.var_mean(flat, dim=-1, correction=0))
        if self._mean is None or self._squares is None:
            self._count, self._mean, self._squares = count, mean, variance * count
            return
        total, apart = self._count + count, mean - self._mean
        self._squares = self._squares + variance * count + apart**2 * (self._count * count / total)
        self._mean = self._mean + apart * (count / total)
        self._count = total

    def normaliser(self, act: nn.Module, *, overwrite: bool = False) -> Callable[[Tensor], Tensor]:
        """Return act(norm(x)) as a function of rows of the map; with `overwrite` these rows may be lost."""
        scale_BC, shift_BC = self._factors()
        scale_BC11, shift_BC11 = (v[:, :, None, None] for v in (scale_BC, shift_BC))

        def apply(x: Tensor) -> Tensor:
            if isinstance(act, nn.SiLU) and is_fused(self._norm) and native.runs_maps(x):
                out = x if overwrite else torch.empty_like(x)
                native.map_silu(x, scale_BC, shift_BC, out=out)
                return out
            return act(torch.addcmul(shift_BC11, x.float(), scale_BC11).to(x.dtype))  # type: ignore[no-any-return]

        return apply

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return the norm as x scale + shift, (B, C) float32 each."""
        assert self._mean is not None
        assert self._squares is not None
        norm = self._norm
        per_group = norm.num_channels // norm.num_groups
        mean = self._mean.repeat_interleave(per_group, dim=1)
        scale = torch.rsqrt(self._squares / self._count + norm.eps).repeat_interleave(per_group, dim=1)
        scale = scale * _wide(norm.weight)
        return scale.float(), (_wide(norm.bias) - mean * scale).float()


def _wide(x: Tensor) -> Tensor:
    """To float64; to float32 on mps, which has none."""
    return x.float() if x.device.type == "mps" else x.double()
