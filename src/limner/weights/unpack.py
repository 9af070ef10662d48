"""Widen weights that are stored in few bits, some rows at a time: the arithmetic of the formats in `packing`.

Every value is multiplied by its scale in float32 and rounded once, to the dtype that is asked for. Shapes: a weight is
(N, K), rows of outputs. Knows no files.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from limner.weights.files import VALUES_AT_ONCE
from limner.weights.packing import Packing

__all__ = ["hadamard", "row_scales", "unpack", "untile"]

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 without its sign, which is the highest of four bits."""


def unpack(
    packing: Packing,
    stored: Tensor,
    scale: Tensor | None,
    second: Tensor | None = None,
    *,
    rows: slice | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight, or some of its rows, in a dtype. `stored`, `scale` and `second` are the tensors of the file."""
    stored = stored.view(packing.dtype) if stored.dtype == torch.uint8 and packing.format != "nvfp4" else stored
    if scale is None:
        return (stored if rows is None else stored[rows]).to(dtype)
    if len(packing.shape) != 2:
        wide = stored.float() * scale.float().reshape(-1, *[1] * (len(packing.shape) - 1))
        return (wide if rows is None else wide[rows]).to(dtype)
    height, width = packing.shape
    first, last, _ = (rows or slice(None)).indices(height)
    scales = _scales(packing, scale, second)
    found = torch.empty(last - first, width, dtype=dtype)
    step = max(1, VALUES_AT_ONCE // max(1, width))
    turn = hadamard(packing.rotation) if packing.rotation else None
    for start in range(first, last, step):
        end = min(start + step, last)
        values = _fp4(stored[start:end]) if packing.format == "nvfp4" else stored[start:end].float()
        _scale(values, _of_rows(packing, scales, start, end), packing.group)
        if turn is not None:
            values = (values.view(-1, packing.rotation) @ turn).view(end - start, -1)
        found[start - first : end - first] = values[:, :width]
    return found


def row_scales(packing: Packing, scale: Tensor) -> Tensor:
    """Return one float32 scale for each row of a weight in int8."""
    return scale.float().reshape(-1).expand(packing.shape[0]).contiguous()


def untile(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Return (rows, columns) of scales in tiles, as block-scaled products of CUDA want them.

    Each tile of 128 x 4 is contiguous and holds scale (r, c) at 16 (r mod 32) + 4 (r div 32) + c, as cuBLAS documents
    ("1D block scaling factors layout"). The last tiles are filled up.
    """
    high, wide = -(-rows // 128), -(-columns // 4)
    tiles = scales.reshape(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * 128, wide * 4)[:rows, :columns]


@cache
def hadamard(size: int) -> Tensor:
    """Return the regular Hadamard matrix (size, size) of ConvRot, scaled to be orthogonal; it is its own inverse.

    Products of the matrix of four whose rows and columns each have one -1: symmetric, so twice it is the identity.
    """
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    found = four
    while len(found) < size:
        found = torch.kron(found, four)
    scaled: Tensor = found / size**0.5
    return scaled


@cache
def _pairs() -> Tensor:
    """Return (256,) int64: the two float32 of each byte, the high half first, since one look-up is faster than two."""
    values = torch.tensor([*_FP4, *(-value for value in _FP4)])
    byte = torch.arange(256)
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1).view(torch.int64).flatten()


def _fp4(stored: Tensor) -> Tensor:
    """Bytes (N, K / 2) to float32 (N, K)."""
    return _pairs()[stored.int()].view(torch.float32)


def _scales(packing: Packing, scale: Tensor, second: Tensor | None) -> Tensor:
    """Return the scales in float32: (1 or N, 1), one for each square, or one for each group of columns."""
    if packing.format not in ("mxfp8", "nvfp4"):
        return scale.float() if packing.side else scale.float().reshape(-1, 1)
    own = untile(scale.view(torch.uint8), packing.shape[0], -(-packing.shape[1] // packing.group))
    if packing.format == "mxfp8":
        # The byte is the exponent of a float32: 2^(byte - 127), and 0 for 0, which writers keep for groups of zeros.
        return (own.int() << 23).view(torch.float32)
    assert second is not None
    return second.float().reshape(()) * own.contiguous().view(torch.float8_e4m3fn).float()


def _of_rows(packing: Packing, scales: Tensor, start: int, end: int) -> Tensor:
    """Return the scales of some rows."""
    if packing.side:
        return scales[torch.arange(start, end) // packing.side]
    return scales if len(scales) == 1 else scales[start:end]


def _scale(values: Tensor, scales: Tensor, group: int) -> None:
    """Multiply values (N, K) in place by scales (N or 1, C): of `group` columns each, or of whole rows."""
    if group and values.shape[1] == group * scales.shape[1]:
        values.view(len(values), -1, group).mul_(scales[:, :, None])
    else:
        values.mul_(scales.repeat_interleave(group, dim=1)[:, : values.shape[1]] if group else scales)
