"""Attention over [references | own] in one pass, by Triton: nothing is joined before, nothing merged after.

Shapes: B batch, S queries, R reference keys, T own keys, H heads, D head dimension. K/V of references (1 or B, R, H, D) are
read as they are kept: in the dtype of the queries, or in int8 or fp8 with a scale for each token and head, which is applied
to scores and weights, so nothing is widened in memory. Weights of keys are added to scores as logarithms.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from limner.model.gpu.launch import available, interpreted, launch, tile_for
from limner.model.kv import AnyLayerKV, LayerKV, QuantizedLayerKV

__all__ = ["attend", "key_bias", "takes"]

_DIMS = (16, 32, 64, 128)
_ANY_CARD = (8, 0)


def takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if the kernel runs there with such heads: 16, 32, 64 or 128 values, in half precision."""
    half = dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and interpreted())
    return half and head_dim in _DIMS and available(device)


def key_bias(weights: tuple[tuple[int, float], ...], device: torch.device) -> Tensor:
    """Return what `attend` adds to the scores of keys whose weights are (number of keys, weight): log2 of it, float32.

    It is made once for all layers and steps, and on the device: nothing is sent there. A graph that is being captured
    makes its own: it would keep the address of one that others may push out of the cache, and not its memory.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return _key_bias(weights, device) if capturing else _kept_key_bias(weights, device)


def _key_bias(weights: tuple[tuple[int, float], ...], device: torch.device) -> Tensor:
    logs = [(num, math.log2(weight) if weight > 0 else -math.inf) for num, weight in weights]
    return torch.cat([torch.full((num,), value, device=device) for num, value in logs])


_kept_key_bias = lru_cache(maxsize=16)(_key_bias)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    references: AnyLayerKV | None = None,
    ref_bias: Tensor | None = None,
    own_bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q [k_ref | k]^T / sqrt(D) + bias) [v_ref | v], (B, S, H, D); into `out` if given, which may be a view.

    Biases (R,) and (T,) float32 are powers of 2 (`key_bias`). Raises `ValueError` for shapes that do not fit.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    refs: AnyLayerKV = LayerKV(k[:, :0], v[:, :0]) if references is None else references
    if torch.compiler.is_compiling():
        torch.ops.limner.attend(q, k, v, list(refs), ref_bias, own_bias, out)
        return out
    return _attend(q, k, v, refs, ref_bias=ref_bias, own_bias=own_bias, out=out)


@torch.library.custom_op("limner::attend", mutates_args=("out",))
def _as_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    references: list[Tensor],
    ref_bias: Tensor | None,
    own_bias: Tensor | None,
    out: Tensor,
) -> None:
    """The kernel as one operator of a graph of `torch.compile`, which does not look into it."""
    refs = LayerKV(*references) if len(references) == 2 else QuantizedLayerKV(*references)
    _attend(q, k, v, refs, ref_bias=ref_bias, own_bias=own_bias, out=out)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, refs: AnyLayerKV, *, ref_bias: Tensor | None, own_bias: Tensor | None, out: Tensor
) -> Tensor:
    batch, num, heads, dim = q.shape
    _check(q, LayerKV(k, v), refs, out, biases=(ref_bias, own_bias))
    if q.numel() == 0:
        return out
    q = q if q.stride(-1) == 1 else q.contiguous()  # its offsets are 64 bits wide
    k, v = _readable(k), _readable(v)
    kr, vr, k_scale, v_scale, form = _as_kept(refs, q)
    capability = _ANY_CARD if interpreted() or torch.version.hip else torch.cuda.get_device_capability(q.device)
    tile = tile_for(capability, narrow=k_scale is not None)
    num_ref, num_own = refs.num_tokens, k.shape[1]
    fp8 = "" if form != "fp8" else "native" if capability >= (8, 9) and not torch.version.hip else "bits"
    launch(
        "attend",
        (-(-num // tile.rows), batch * heads),
        q,
        kr,
        vr,
        q if k_scale is None else k_scale,
        q if v_scale is None else v_scale,
        q if ref_bias is None else ref_bias,
        k,
        v,
        q if own_bias is None else own_bias,
        out,
        num,
        num_ref,
        num_own,
        heads,
        *q.stride()[:3],
        *_strides(kr),
        *_strides(vr),
        *((0, 0) if k_scale is None else _strides(k_scale)[:2]),
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        math.log2(math.e) / math.sqrt(dim),
        DIM=dim,
        ROWS=tile.rows,
        KEYS=tile.keys,
        REFS=num_ref > 0,
        SCALED=k_scale is not None,
        FP8=fp8,
        REF_BIASED=ref_bias is not None,
        OWN_BIASED=own_bias is not None,
        EVEN_REFS=num_ref % tile.keys == 0,
        EVEN_OWN=num_own % tile.keys == 0,
        WIDE=interpreted(),
        device=q.device,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _as_kept(refs: AnyLayerKV, q: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, str]:
    """Return k, v and their scales as the kernel reads them, and their format; fp8 as bytes."""
    if isinstance(refs, LayerKV):
        return _readable(refs.k.to(q.dtype)), _readable(refs.v.to(q.dtype)), None, None, ""
    k, v = _readable(refs.k), _readable(refs.v)
    k_scale, v_scale = refs.k_scale.float().contiguous(), refs.v_scale.float().contiguous()
    if k.dtype == torch.int8:
        return k, v, k_scale, v_scale, "int8"
    return k.view(torch.uint8), v.view(torch.uint8), k_scale, v_scale, "fp8"


def _check(
    q: Tensor, own: LayerKV, refs: AnyLayerKV, out: Tensor, *, biases: tuple[Tensor | None, Tensor | None]
) -> None:
    batch, _, heads, dim = q.shape
    if not takes(q.device, q.dtype, dim) or out.shape != q.shape or out.dtype != q.dtype or out.stride(-1) != 1:
        raise ValueError(f"q {tuple(q.shape)} {q.dtype} on {q.device} is not for this kernel")
    for kv, batches in ((own, (batch,)), (refs, (1, batch))):
        shape = kv.k.shape
        if kv.v.shape != shape or shape[2:] != (heads, dim) or shape[0] not in batches:
            raise ValueError(
                f"k {tuple(shape)}, v {tuple(kv.v.shape)} do not fit {batch} images of {heads} heads of {dim}"
            )
        if any(x.device != q.device for x in kv):
            raise ValueError(f"k and v on {kv.k.device} do not fit queries on {q.device}")
    if own.k.dtype != q.dtype or own.v.dtype != q.dtype:
        raise ValueError(f"k {own.k.dtype}, v {own.v.dtype} do not fit queries in {q.dtype}")
    if isinstance(refs, QuantizedLayerKV) and any(
        x.shape != (*refs.k.shape[:3], 1) for x in (refs.k_scale, refs.v_scale)
    ):
        raise ValueError(f"scales {tuple(refs.k_scale.shape)} are not one for each key and head")
    for bias, num in zip(biases, (refs.num_tokens, own.num_tokens), strict=True):
        if bias is not None and bias.shape != (num,):
            raise ValueError(f"weights are of {bias.shape[0]} keys, there are {num}")


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Distances of images, tokens and heads; 0 for images that share it."""
    return (0 if x.shape[0] == 1 else x.stride(0)), x.stride(1), x.stride(2)


def _readable(x: Tensor) -> Tensor:
    """A tensor (B, S, H, D) in a layout that the kernel reads: its offsets within an image are 32 bits wide."""
    return x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 1 << 31 else x.contiguous()
