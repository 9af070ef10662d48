"""The only caller of attention kernels: own tokens attend to [references | own], references are never copied.

Shapes: B batch, S own sequence, R reference sequence, H heads, D head dimension, Q a chunk of queries.
All tensors are (B, S, H, D); transposes live here alone. K/V of references have batch 1 and serve the whole batch; a
batch of B is allowed too (training). Knows nothing of blocks, modulation or positions.

Kernels (`KERNELS`), all equal to rounding:
- ``chunked``: queries in chunks; two matrix products fill one score buffer, one softmax, two products. The fastest on
  CPUs, and runs anywhere.
- ``flash``: the library's flash kernel once for the references and once for the own tokens, merged by their
  log-sum-exp. For CUDA; also runs on CPU.
- ``dense``: the formula over the concatenation. Copies; differentiable; the one for training, where on CPU it is a
  third faster, backward included, than `scaled_dot_product_attention` at a few hundred tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["KERNELS", "attend", "choose_kernel"]

_logger = logging.getLogger("limner")
_CHUNK = 128


@cache
def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the fastest kernel that runs there; the choice is logged once.

    The library's flash kernel takes half precision, Ampere or newer, and head dims that are multiples of 8.
    """
    flash = (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    name = "flash" if flash else "chunked"
    _logger.info("attention on %s in %s, head dim %d: kernel %s", device, dtype, head_dim, name)
    return name


def attend(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    *,
    k_ref_BRHD: Tensor | None = None,
    v_ref_BRHD: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """softmax(q [k_ref | k]^T / sqrt(D)) [v_ref | v], shape (B, S, H, D).

    `k_ref_BRHD` and `v_ref_BRHD` have batch 1 or B. `kernel` is a name in `KERNELS`; None takes the fastest of the
    device, or the differentiable one while gradients are recorded.
    """
    if kernel is None:
        records = torch.is_grad_enabled() and q_BSHD.requires_grad
        kernel = "dense" if records else choose_kernel(q_BSHD.device, q_BSHD.dtype, q_BSHD.shape[-1])
    return KERNELS[kernel](q_BSHD, k_BSHD, v_BSHD, k_ref_BRHD, v_ref_BRHD)


def _dense(q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor | None, v_ref: Tensor | None) -> Tensor:
    if k_ref is not None and v_ref is not None:
        k = torch.cat([k_ref.expand(q.shape[0], -1, -1, -1), k], dim=1)
        v = torch.cat([v_ref.expand(q.shape[0], -1, -1, -1), v], dim=1)
    q_BHSD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q_BHSD / math.sqrt(q.shape[-1])) @ k_BHSD.transpose(-1, -2)
    return (torch.softmax(scores, dim=-1).to(v.dtype) @ v_BHSD).transpose(1, 2)


def _chunked(q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor | None, v_ref: Tensor | None) -> Tensor:
    batch, num_own, heads, dim = q.shape
    num_ref = 0 if k_ref is None else k_ref.shape[1]
    out_BHSD = q.new_empty(batch, heads, num_own, dim)
    scale = 1 / math.sqrt(dim)
    for b in range(batch):
        r = b if k_ref is not None and k_ref.shape[0] == batch else 0
        q_HSD = (q[b] * scale).transpose(0, 1).contiguous()
        k_HDS = k[b].permute(1, 2, 0)
        v_HSD = v[b].transpose(0, 1)
        for start in range(0, num_own, _CHUNK):
            q_HQD = q_HSD[:, start : start + _CHUNK]
            out_HQD = out_BHSD[b, :, start : start + _CHUNK]
            if k_ref is None or v_ref is None:
                torch.matmul(torch.softmax(q_HQD @ k_HDS, dim=-1), v_HSD, out=out_HQD)
                continue
            scores_ref_HQR = q_HQD @ k_ref[r].permute(1, 2, 0)
            scores = torch.cat([scores_ref_HQR, q_HQD @ k_HDS], dim=-1)
            weights = torch.softmax(scores, dim=-1)
            part = weights[..., :num_ref] @ v_ref[r].transpose(0, 1)
            torch.add(part, weights[..., num_ref:] @ v_HSD, out=out_HQD)
    return out_BHSD.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor | None, v_ref: Tensor | None) -> Tensor:
    own, lse_own = _flash_with_lse(q, k, v)
    if k_ref is None or v_ref is None:
        return own
    batch, num_own, heads, dim = q.shape
    if k_ref.shape[0] == batch:
        ref, lse_ref = _flash_with_lse(q, k_ref, v_ref)
    else:  # one set of references: the batch is one long row of queries
        ref, lse_ref = _flash_with_lse(q.reshape(1, batch * num_own, heads, dim), k_ref, v_ref)
        ref, lse_ref = ref.reshape(q.shape), lse_ref.reshape(batch, num_own, heads)
    share_BSH1 = torch.sigmoid(lse_ref - lse_own).unsqueeze(-1)
    return torch.lerp(own.float(), ref.float(), share_BSH1).to(q.dtype)


def _flash_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (B, S, H, D) and the log-sum-exp of its scores (B, S, H), float32."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if q.device.type == "cuda":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
    return out.transpose(1, 2), lse.float().transpose(1, 2)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "chunked": _chunked,
    "flash": _flash,
    "dense": _dense,
}
