"""Matrix products of stored weights, in the dtype that is fastest on their device.

Some CPUs multiply bfloat16 at half the rate of float32 (AVX-512 BF16 without AMX on Intel), others at twice the rate. So
on a CPU the two are compared once per process. Where float32 is a quarter faster, half-precision weights are widened block
by block into a small buffer and multiplied there, which also rounds once instead of twice. With AMX, `limner.native.tiles`
multiplies bfloat16, also with the gate of an MLP in the same pass. Stored weights do not change.

Shapes: x (..., K), weight (N, K), result (..., N). Knows nothing of blocks or attention.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.native import tiles

__all__ = ["Linear", "fast_dtype"]

_logger = logging.getLogger("limner")
_BLOCK = 4 << 20
"""Weights that are widened at a time: 16 MiB of float32."""
_FEW = 32
"""With fewer rows of x than this, widening the weights costs more than it saves."""


@cache
def fast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which matrix products of `dtype` are fastest; measured once for a CPU, and logged."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    if dtype == torch.bfloat16 and tiles.why_missing() is None:
        return dtype
    x, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    narrow, wide = (_seconds(product, x, weight) for product in (F.linear, _wide_linear))
    chosen = torch.float32 if wide * 1.25 < narrow else dtype
    _logger.info("%s on cpu: %.1f ms as it is, %.1f ms in float32: %s", dtype, narrow * 1e3, wide * 1e3, chosen)
    return chosen


@torch.no_grad()
def _seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    """Return the shortest of five runs, after one to warm up."""
    product(x, weight)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x, weight)
        best = min(best, time.perf_counter() - start)
    return best


def _wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in float32, rounded to the dtype of x at the end; `_BLOCK` weights are widened at a time."""
    num_out, num_in = weight.shape
    rows = x.reshape(-1, num_in).float()
    out = x.new_empty(rows.shape[0], num_out)
    step = min(num_out, max(1, _BLOCK // num_in))
    wide = torch.empty(step, num_in, device=x.device)
    product = torch.empty(rows.shape[0] * step, device=x.device)
    for start in range(0, num_out, step):
        part = weight[start : start + step]
        part_out = product[: rows.shape[0] * len(part)].view(rows.shape[0], len(part))
        torch.mm(rows, wide[: len(part)].copy_(part).t(), out=part_out)
        out[:, start : start + step] = part_out
    return out.view(*x.shape[:-1], num_out)


class Linear(nn.Linear):
    """A matrix without bias.

    `arithmetic` overrides the dtype of its products; None lets the device choose. `tiled`: bfloat16 is multiplied in AMX
    tiles where the CPU has them.
    """

    arithmetic: torch.dtype | None = None
    tiled: bool = True

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def prepare(self, x: Tensor) -> Tensor:
        """Prepare activations that several matrices read; here nothing to do (`Int8Linear` quantizes them once)."""
        return x

    def forward(self, input: Tensor, rows: slice | None = None) -> Tensor:  # noqa: A002 (nn.Linear's name)
        """x weight^T; with `rows` only these output features."""
        weight = self._rows(rows)
        if torch.is_grad_enabled() or input.numel() < _FEW * input.shape[-1]:
            return F.linear(input, weight)
        wanted = self.arithmetic or fast_dtype(input.device, input.dtype)
        if wanted != input.dtype:
            return _wide_linear(input, weight)
        # as one matrix: of three dimensions that are a part of a sequence, torch copies the weight for a batched product
        flat = input.reshape(-1, input.shape[-1])
        if not self._fits_tiles(input):
            return F.linear(flat, weight).view(*input.shape[:-1], -1)
        start, stop, _ = (rows or slice(None)).indices(self.out_features)
        whole = tiles.aligned(start, stop)
        made = tiles.product(flat, self.weight[whole])[:, start - whole.start : stop - whole.start]
        return made.contiguous().view(*input.shape[:-1], -1)

    def arithmetic_name(self, device: torch.device) -> str:
        """Return the name of products there, where no gradient is recorded."""
        dtype = self.arithmetic or fast_dtype(device, self.weight.dtype)
        name = str(dtype).removeprefix("torch.")
        both = self.tiled and dtype == self.weight.dtype == torch.bfloat16
        runs = both and device.type == "cpu" and tiles.why_missing() is None
        return f"{name} tiles {tiles.digest()}" if runs else name

    def gates(self, x: Tensor, rows: slice | None = None) -> bool:
        """Return True if `gated` runs for x: with tiles; no gradients are recorded, and no hook, as of a LoRA, is set."""
        num = len(range(self.out_features)[rows or slice(None)])
        fits = self._fits_tiles(x) and tiles.fits(num, self.in_features, gated=True)
        return fits and not (torch.is_grad_enabled() or self._forward_hooks or self._forward_pre_hooks)

    def gated(self, x: Tensor, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        """silu(first half) * second half of the product's last axis, rounded once, where `gates`.

        Into `out` (..., N / 2) if given, which may be a part of longer rows.
        """
        weight = self._rows(rows)
        if out is None:
            out = x.new_empty(*x.shape[:-1], len(weight) // 2)
        tiles.product(x.reshape(-1, x.shape[-1]), weight, gated=True, out=out.view(-1, out.shape[-1]))
        return out

    def _rows(self, rows: slice | None) -> Tensor:
        return self.weight if rows is None else self.weight[rows]

    def _fits_tiles(self, x: Tensor) -> bool:
        """Return True if products of x run in tiles. The whole matrix decides, so that parts have the bits of the whole."""
        both = x.dtype == self.weight.dtype == torch.bfloat16 and x.device.type == self.weight.device.type == "cpu"
        chosen = self.tiled and self.arithmetic in (None, torch.bfloat16) and x.numel() >= _FEW * x.shape[-1]
        return both and chosen and tiles.fits(self.out_features, self.in_features)
