"""The arithmetic of blocks between matrix products and attention, row by row: one seam, three ways to run it.

`rows_of` returns the one for a tensor: `Rows` is torch's own, `NativeRows` has kernels in C for bfloat16 on a CPU
(`limner.native`), `FusedRows` Triton's for a GPU (`limner.model.gpu.fused`). All take the same arguments and are equal up
to rounding. Where gradients are recorded torch's own run. Blocks call nothing else.

Shapes: B batch, S sequence, C width, M MLP width, H heads, D head dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.model.gpu import choice, fused
from limner.model.gpu.launch import available, interpreted, power_of_2, source_digest
from limner.model.rope import Rope, apply_rope
from limner.native import kernels as native

__all__ = ["FusedRows", "Heads", "NativeRows", "Rows", "rows_name", "rows_of"]

_logger = logging.getLogger("limner")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Heads:
    """Projections of one stream, q, k and v (B, S, H, D), and the norms of q and k, not applied yet."""

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: nn.RMSNorm
    norm_k: nn.RMSNorm


class Rows:
    """With torch's operators alone."""

    def norm(self, x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
        """LayerNorm(x) (1 + scale) + shift of (B, S, C); the modulation is (C,) or (B, 1, C)."""
        if scale.dim() == 1:  # one kernel of torch if the batch shares the modulation
            return F.layer_norm(x, x.shape[-1:], weight=1 + scale, bias=shift, eps=eps)
        return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift

    def add(self, x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
        """x + gate * change."""
        return torch.addcmul(x, gate, change)

    def gated_silu(self, x: Tensor) -> Tensor:
        """silu(first half) * second half of the last axis."""
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value

    def join_gated(self, attended: Tensor, mlp: Tensor) -> Tensor:
        """Attention's result (B, S, H, D) and `gated_silu` of (B, S, 2 M), beside each other: (B, S, H D + M)."""
        return torch.cat([attended.flatten(2), self.gated_silu(mlp)], dim=-1)

    def norm_rope(self, x: Tensor, norm: nn.RMSNorm, rope: Rope) -> Tensor:
        """RMSNorm of each head of (B, S, H, D), then rotation."""
        return apply_rope(norm(x), rope)

    def attention_input(self, streams: Sequence[Heads], rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q and k after norm and rotation, and v, each (B, S, H, D) of all streams one after the other, as `rope` is."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for heads, table in _with_tables(streams, rope):
            q, k = self.norm_rope(heads.q, heads.norm_q, table), self.norm_rope(heads.k, heads.norm_k, table)
            found.append((q, k, heads.v))
        if len(found) == 1:
            return found[0]
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return q, k, v


class NativeRows(Rows):
    """With kernels in C, where they take the widths."""

    def gated_silu(self, x: Tensor) -> Tensor:
        return native.gated_silu(x) if native.runs_gate(x) else super().gated_silu(x)

    def join_gated(self, attended: Tensor, mlp: Tensor) -> Tensor:
        if not (native.runs_gate(mlp) and native.runs_rows(attended)):
            return super().join_gated(attended, mlp)
        joined, place = _place_beside(attended, mlp)
        native.gated_silu(mlp, out=place)
        return joined

    def norm_rope(self, x: Tensor, norm: nn.RMSNorm, rope: Rope) -> Tensor:
        if norm.eps is None or not native.runs_norm(x, norm.weight):
            return super().norm_rope(x, norm, rope)
        return native.norm_rope(x, norm.weight, norm.eps, rope.cos_SP, rope.sin_SP)


class FusedRows(Rows):
    """With Triton's kernels: each reads its input once and writes where the next one reads. Records no gradients."""

    def norm(self, x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
        return fused.modulated_norm(x, shift, scale, eps=eps)

    def add(self, x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
        return fused.add_gated(x, gate, change)

    def gated_silu(self, x: Tensor) -> Tensor:
        return fused.gated_silu(x)

    def join_gated(self, attended: Tensor, mlp: Tensor) -> Tensor:
        joined, place = _place_beside(attended, mlp)
        fused.gated_silu(mlp, out=place)
        return joined

    def norm_rope(self, x: Tensor, norm: nn.RMSNorm, rope: Rope) -> Tensor:
        if not _takes(norm):
            return super().norm_rope(x, norm, rope)
        out = x.new_empty(x.shape)
        fused.norm_rope([x], [norm.weight], [out], eps=norm.eps or 0.0, table=rope)
        return out

    def attention_input(self, streams: Sequence[Heads], rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        first = streams[0]
        batch, _, num_heads, dim = first.q.shape
        if not all(_takes(norm) for heads in streams for norm in (heads.norm_q, heads.norm_k)):
            return super().attention_input(streams, rope)
        num = sum(heads.q.shape[1] for heads in streams)
        joined = [first.q.new_empty(batch, num, num_heads, dim) for _ in range(3 if len(streams) > 1 else 2)]
        start = 0
        for heads, table in _with_tables(streams, rope):
            end = start + heads.q.shape[1]
            places = [x[:, start:end] for x in joined]
            weights = [heads.norm_q.weight, heads.norm_k.weight]
            read = [heads.q, heads.k, heads.v][: len(places)]
            fused.norm_rope(read, weights, places, eps=heads.norm_q.eps or 0.0, table=table)
            start = end
        return joined[0], joined[1], joined[2] if len(streams) > 1 else first.v


def rows_of(x: Tensor) -> Rows:
    """Return the arithmetic for a tensor: that of its device, dtype, and of whether gradients are recorded."""
    if x.device.type == "cpu" and not interpreted():
        return _NATIVE
    return _FUSED if fused.runs(x) and _is_right(x.device, x.dtype) else _PLAIN


def rows_name(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what names the last bits of this arithmetic without gradients; None for torch's own."""
    if native.has_rows(device, dtype):
        return f"rows {native.source_digest()}"
    if device.type not in ("cpu", "meta") and available(device) and _is_right(device, dtype):
        return f"fused rows {source_digest()}"
    return None


_PLAIN, _NATIVE, _FUSED = Rows(), NativeRows(), FusedRows()
_right: dict[tuple[str, torch.dtype], bool] = {}


def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if the fused kernels do on a device what torch does; tried once in a process."""
    key = (str(device), dtype)
    if key not in _right:
        _right[key] = _try(device, dtype)
    return _right[key]


def _try(device: torch.device, dtype: torch.dtype) -> bool:
    """Compare every fused operation with torch's on small inputs; False if one is wrong or does not run."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, mod, mlp, heads = (made(2, 5, 384), made(2, 1, 3 * 384), made(2, 5, 512), [made(2, 5, 3, 128) for _ in range(6)])
    norms = [nn.RMSNorm(128, eps=1e-6, device=device, dtype=dtype) for _ in range(2)]
    angle = torch.randn(10, 64, generator=generator).to(device)
    rope = Rope(angle.cos(), angle.sin())
    streams = [Heads(q=q, k=k, v=v, norm_q=norms[0], norm_k=norms[1]) for q, k, v in (heads[:3], heads[3:])]
    parts = mod.chunk(3, dim=-1)
    calls: dict[str, Callable[[Rows], Tensor]] = {
        "norm": lambda rows: rows.norm(x, parts[0], parts[1], eps=1e-6),
        "add": lambda rows: rows.add(x, parts[2], x),
        "gate": lambda rows: rows.join_gated(heads[0], mlp),
        "norm and rotation": lambda rows: torch.cat(rows.attention_input(streams, rope)),
    }

    def check(name: str) -> float:
        return choice.relative_error(calls[name](_FUSED), calls[name](_PLAIN))

    limit = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        found = [
            choice.rank(f"fused rows on {device}", [n], check=check, limit=limit, measure=lambda _: 0) for n in calls
        ]
    _logger.info("rows of blocks on %s in %s: %s", device, dtype, "Triton" if all(found) else "torch")
    return all(found)


def _with_tables(streams: Sequence[Heads], rope: Rope) -> list[tuple[Heads, Rope]]:
    """Each stream with its part of the rotary table."""
    if len(streams) == 1:
        return [(streams[0], rope)]
    found, start = [], 0
    for heads in streams:
        end = start + heads.q.shape[1]
        found.append((heads, rope.at(slice(start, end))))
        start = end
    return found


def _takes(norm: nn.RMSNorm) -> bool:
    """Whether a kernel has this norm: heads of a power of 2, the same epsilon in every dtype."""
    dim = norm.normalized_shape[0]
    return norm.eps is not None and power_of_2(dim) == dim


def _place_beside(attended: Tensor, mlp: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, S, H D + M) that begins with attention's result, and the view of its rest."""
    width = attended.shape[2] * attended.shape[3]
    joined = attended.new_empty(*mlp.shape[:-1], width + mlp.shape[-1] // 2)
    joined[..., :width] = attended.flatten(2)
    return joined, joined[..., width:]
