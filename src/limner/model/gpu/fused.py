"""Row arithmetic of blocks in one pass each, by Triton: the twins of what `limner.model.rows` computes with torch.

Shapes: B batch, S sequence, H heads, D head dimension, C width. Everything is read where it lies, if its last axis is
contiguous and its rows are at one distance (else copied once), computed in float32, and rounded once. No function records
gradients; callers ask `runs` first. Knows nothing of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limner.model.gpu.launch import available, launch, power_of_2

__all__ = [
    "add_gated",
    "gated_silu",
    "merge",
    "modulated_norm",
    "norm_rope",
    "quantize_fp8",
    "quantize_int8",
    "runs",
    "scale_product",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HEADS_AT_ONCE = 8
_BLOCK = 1024
_WIDEST = 1 << 15
"""The widest row that a program holds in registers."""


def runs(x: Tensor, *, width: int | None = None) -> bool:
    """Return True if these kernels take x: a GPU with Triton, no gradients being recorded, no `torch.compile`.

    The latter makes such kernels itself, of torch's operators. `width` is what a program holds of a row; None: all of it.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.dtype in _DTYPES and (width or x.shape[-1]) <= _WIDEST and available(x.device)


def norm_rope(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    eps: float,
    table: tuple[Tensor, Tensor],
) -> None:
    """RMSNorm of each head of q and k times its weight (D,), then rotation by (cos, sin), each (S, D / 2); v as it is.

    `inputs` are q, or q and k, or q, k and v, each (B, S, H, D), `weights` those of q and k, `out` the places, which may be
    parts of longer sequences and lie alike. D is a power of 2. Raises `ValueError` for shapes that do not fit.
    """
    batch, num, heads, dim = shape = inputs[0].shape
    if len(out) != len(inputs) or any(x.shape != shape or x.dtype != inputs[0].dtype for x in (*inputs, *out)):
        raise ValueError(f"{[tuple(x.shape) for x in (*inputs, *out)]} do not fit each other")
    if power_of_2(dim) != dim or any(t.shape != (num, dim // 2) for t in table):
        raise ValueError(f"{num} positions of {dim} values do not fit a rotary table {tuple(table[0].shape)}")
    if any(x.stride() != out[0].stride() or not _is_heads(x) for x in out):
        raise ValueError("the places of q, k and v have to lie alike, with the heads of a token one after the other")
    if inputs[0].numel() == 0:
        return
    cos, sin = (t.contiguous() for t in table)
    read = [x if _is_heads(x) else x.contiguous() for x in inputs]
    read, made = ([*of, *[of[0]] * (3 - len(of))] for of in (read, list(out)))  # those that are missing are not touched
    at_once = min(_HEADS_AT_ONCE, power_of_2(heads))
    launch(
        "norm_rope",
        (batch * num, -(-heads // at_once), len(out)),
        *read,
        *made,
        weights[0],
        weights[-1],
        cos,
        sin,
        num,
        heads,
        *(distance for x in read for distance in x.stride()[:2]),
        *out[0].stride()[:2],
        eps,
        DIM=dim,
        HEADS=at_once,
        device=inputs[0].device,
        num_warps=4,
    )


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift of x (B, S, C); shift and scale (C,) or (B, 1, C)."""
    rows, out = _rows(x), x.new_empty(x.shape)
    scale, per_image = _modulation(scale, like=shift)
    block = power_of_2(x.shape[-1])
    if x.numel():
        launch(
            "modulated_norm",
            (rows.shape[0],),
            rows,
            shift,
            scale,
            out,
            x.shape[-2],
            x.shape[-1],
            rows.stride(0),
            per_image,
            eps,
            BLOCK=block,
            device=x.device,
            num_warps=_warps(block),
        )
    return out


def add_gated(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """x + gate * change of (B, S, C); gate (C,) or (B, 1, C)."""
    rows, changes, out = _rows(x), _rows(change), x.new_empty(x.shape)
    gate, per_image = _modulation(gate, like=gate)
    if x.numel():
        launch(
            "add_gated",
            (rows.shape[0], -(-x.shape[-1] // _BLOCK)),
            rows,
            gate,
            changes,
            out,
            x.shape[-2],
            x.shape[-1],
            rows.stride(0),
            changes.stride(0),
            per_image,
            BLOCK=_BLOCK,
            device=x.device,
            num_warps=4,
        )
    return out


def gated_silu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(first half) * second half of the last axis, into `out` if given, whose rows may be parts of longer rows."""
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width) if out is None else out
    if out.shape != (*x.shape[:-1], width) or not _is_rows(out):
        raise ValueError(
            f"{tuple(out.shape)} of strides {out.stride()} is not the place for a gate of {tuple(x.shape)}"
        )
    rows = _rows(x)
    if x.numel():
        grid = rows.shape[0], -(-width // _BLOCK)
        launch(
            "gate", grid, rows, out, width, rows.stride(0), out.stride(-2), BLOCK=_BLOCK, device=x.device, num_warps=4
        )
    return out


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., K) to (rows, K) int8 in [-127, 127], and the scale of each, (rows, 1) float32 of 8 bits."""
    return _quantize("quantize_int8", x, torch.int8)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., K) to (rows, K) fp8 (E4M3), and the scale of each, (rows, 1) float32."""
    return _quantize("quantize_fp8", x, torch.float8_e4m3fn)


def _quantize(kernel: str, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    num, width = rows.shape
    values, scale = x.new_empty(num, width, dtype=dtype), x.new_empty(num, 1, dtype=torch.float32)
    block = power_of_2(width)
    if num:
        launch(
            kernel,
            (num,),
            rows,
            values,
            scale,
            width,
            rows.stride(0),
            BLOCK=block,
            device=x.device,
            num_warps=_warps(block),
        )
    return values, scale


def scale_product(product: Tensor, row_scale: Tensor, column_scale: Tensor, out: Tensor) -> None:
    """product (M, N) int32 times row_scale (M, 1) and column_scale (N,), into `out` (M, N), rounded to its dtype."""
    num, width = product.shape
    if num:
        grid = num, -(-width // _BLOCK)
        scales = row_scale, column_scale
        launch(
            "scale_product",
            grid,
            product,
            *scales,
            out,
            width,
            out.stride(0),
            BLOCK=_BLOCK,
            device=out.device,
            num_warps=4,
        )


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys: each (out (B, S, H, D), log-sum-exp (B, S, H) float32), to that over both."""
    (one, one_lse), (two, two_lse) = ((out.contiguous(), lse.contiguous()) for out, lse in (first, second))
    made, made_lse = one.new_empty(one.shape, dtype=dtype), torch.empty_like(one_lse)
    rows = one_lse.numel()
    if rows:
        launch(
            "merge",
            (-(-rows // 16),),
            one,
            one_lse,
            two,
            two_lse,
            made,
            made_lse,
            rows,
            DIM=one.shape[-1],
            ROWS=16,
            device=one.device,
            num_warps=4,
        )
    return made, made_lse


def _modulation(x: Tensor, *, like: Tensor) -> tuple[Tensor, int]:
    """Return (C,) or (B, 1, C) in the layout of `like`, and the distance of images: 0 if the batch shares it."""
    per_image = 0 if like.dim() == 1 else like.stride(0)
    if x.stride(-1) != 1 or x.stride() != like.stride():
        raise ValueError(f"modulations lie differently: strides {x.stride()} and {like.stride()}")
    return x, per_image


def _is_heads(x: Tensor) -> bool:
    return x.stride(3) == 1 and x.stride(2) == x.shape[3]


def _is_rows(x: Tensor) -> bool:
    """Return True if the rows of x (..., K) are contiguous and at one distance."""
    return x.stride(-1) == 1 and all(
        x.shape[i] == 1 or x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2)
    )


def _rows(x: Tensor) -> Tensor:
    """(..., K) as (rows, K), a view where it can be."""
    x = x if _is_rows(x) else x.contiguous()
    return x.as_strided(
        (x.numel() // max(1, x.shape[-1]), x.shape[-1]), (x.stride(-2) if x.dim() > 1 else x.shape[-1], 1)
    )


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
