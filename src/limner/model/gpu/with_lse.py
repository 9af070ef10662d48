"""Torch's attention kernels that also return the log-sum-exp: each part of the keys by itself, merged by it.

Shapes: B batch, S queries, R keys of a part, H heads, D head dimension. K/V of a part have batch 1 or B and are read where
they are. Kernels (`CALLS`), by the name of what runs:
- ``flash``: FlashAttention 2 of torch; on a CPU its flash kernel, whose products are oneDNN's.
- ``flash3``, ``flash4``: FlashAttention 3 and 4, if their packages are installed. Torch has one of the three active in a
  process, for all callers; the one that is asked for is made so.
- ``cudnn``: cuDNN's fused attention.
- ``efficient``: the memory-efficient kernel: float32, and cards before Ampere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention as torch_attention
from torch import Tensor

from limner.model.gpu import fused
from limner.model.kv import LayerKV

__all__ = ["CALLS", "attend_parts"]

WithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""q, k and v (B, H, S, D) to the result (B, H, S, D) and the log-sum-exp of the scores (B, H, S), natural."""


def attend_parts(name: str, q: Tensor, parts: list[tuple[LayerKV, float]]) -> Tensor:
    """softmax over the keys of all parts, (B, S, H, D); the bias of a part, the logarithm of its weight, is added to its
    log-sum-exp.
    """
    call = CALLS[name]
    *cached, last = parts
    out, lse = _part(call, q, last)
    if fused.runs(q):
        for part in cached:
            out, lse = fused.merge((out, lse), _part(call, q, part), dtype=q.dtype)
        return out
    wide = out
    for part in cached:
        other, lse_other = _part(call, q, part)
        share_BSH1 = torch.sigmoid(lse_other - lse).unsqueeze(-1)
        wide = torch.lerp(wide.float(), other.float(), share_BSH1)
        lse = torch.logaddexp(lse, lse_other)
    return wide.to(q.dtype)


def _part(call: WithLse, q: Tensor, part: tuple[LayerKV, float]) -> tuple[Tensor, Tensor]:
    """Return attention (B, S, H, D) to one part, and its log-sum-exp (B, S, H), its bias added."""
    (k, v), bias = part
    batch, num_own, heads, dim = q.shape
    if k.shape[0] == batch:
        out, lse = _heads_second(call, q, k, v)
    else:  # one set of references: the batch is one long row of queries
        out, lse = _heads_second(call, q.reshape(1, batch * num_own, heads, dim), k, v)
        out, lse = out.reshape(q.shape), lse.reshape(batch, num_own, heads)
    return out, lse + bias if bias else lse


def _heads_second(call: WithLse, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention (B, S, H, D) and the log-sum-exp of its scores (B, S, H), float32."""
    out, lse = call(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2), lse.float().transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.device.type != "cuda":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse
    return _flash_version(None)(q, k, v)


def _flash_version(wanted: str | None) -> WithLse:
    """FlashAttention in the version that torch calls `wanted`; None: its own, the second."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        _activate(wanted)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        return out, lse

    return call


def _activate(wanted: str | None) -> None:
    """Make a version the one that torch's operator runs. Raises `RuntimeError` if it is not there."""
    versions: Any = torch_attention
    current = getattr(versions, "current_flash_attention_impl", lambda: None)()
    if current == wanted:
        return
    if wanted is None:
        versions.restore_flash_attention_impl()
    elif not hasattr(versions, "activate_flash_attention_impl"):
        raise RuntimeError(f"this torch ({torch.__version__}) does not know {wanted}")
    else:
        versions.activate_flash_attention_impl(wanted)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out, lse.reshape(q.shape[:3])  # some versions return (B, H, S, 1)


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out, lse[..., : q.shape[2]]  # its rows are filled up to multiples of 32


CALLS: dict[str, WithLse] = {
    "flash": _flash,
    "flash3": _flash_version("FA3"),
    "flash4": _flash_version("FA4"),
    "cudnn": _cudnn,
    "efficient": _efficient,
}
