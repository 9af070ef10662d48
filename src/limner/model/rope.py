"""4-axis rotary position embedding.

Shapes: B batch, S sequence, H heads, D head dimension, P = D / 2 rotated pairs. Pairs are neighbours (2 i, 2 i + 1); axis
a of (t, h, w, l) owns `axes[a] / 2` consecutive pairs. Tables are computed in float64 and stored in float32, as in
diffusers 0.42.1 (`get_1d_rotary_pos_embed`); rotation is in float32. Knows nothing of token order (`limner.tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rope", "apply_rope", "rope_table"]


class Rope(NamedTuple):
    """cos and sin of each position and pair, (S, P) float32."""

    cos_SP: Tensor
    sin_SP: Tensor

    def split(self, num: int) -> tuple[Rope, Rope]:
        """Return the tables of the first `num` positions and of the rest."""
        return self.at(slice(num)), self.at(slice(num, None))

    def at(self, places: slice) -> Rope:
        """Return the tables of some positions."""
        return Rope(self.cos_SP[places], self.sin_SP[places])


def rope_table(ids: Tensor, *, axes: Sequence[int], theta: float) -> Rope:
    """Return the table of positions `ids` (S, 4): angle = position * theta^(-2 i / axis) for pair i of an axis."""
    dtype = torch.float32 if ids.device.type == "mps" else torch.float64
    angles = []
    for axis, size in enumerate(axes):
        exponents = torch.arange(0, size, 2, dtype=dtype, device=ids.device) / size
        angles.append(torch.outer(ids[:, axis].to(dtype), theta**-exponents))
    angles_SP = torch.cat(angles, dim=-1)
    return Rope(angles_SP.cos().float(), angles_SP.sin().float())


def apply_rope(x_BSHD: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair of x (B, S, H, D) by the angle of its position; the dtype stays."""
    # unbind, not indexing: its gradient is one stack; that of indexing is two zero-filled tensors and a sum
    even_BSHP, odd_BSHP = x_BSHD.float().reshape(*x_BSHD.shape[:-1], -1, 2).unbind(-1)
    cos_S1P, sin_S1P = rope.cos_SP[:, None], rope.sin_SP[:, None]
    rotated = torch.stack([even_BSHP * cos_S1P - odd_BSHP * sin_S1P, odd_BSHP * cos_S1P + even_BSHP * sin_S1P], dim=-1)
    return rotated.flatten(-2).to(x_BSHD.dtype)
