"""The only caller of attention kernels: own tokens attend to [references | own], with one set of references per batch.

There may be fewer queries than own keys: only those of the tokens whose result is wanted.

Shapes: B batch, S own sequence, R reference sequence, H heads, D head dimension, Q a chunk of queries.
All tensors are (B, S, H, D); transposes live here alone. K/V of references have batch 1, or B in training. They are neither
repeated nor joined to others: `native`, `tiles`, `triton` and the kernels with a log-sum-exp read them where they are;
`chunked` in half precision copies those of one layer into scratch memory, once for a batch. `native`, `tiles` and `triton`
widen quantized ones a block at a time, the others a layer at a time. Knows nothing of blocks, modulation or positions.

Kernels (`KERNELS`), all equal up to rounding:
- ``native``: a flash kernel in C (`limner.native`), for bfloat16 on CPUs with AVX-512 BF16 and a C compiler. Scores and
  softmax are in float32, and no score leaves the cache.
- ``tiles``: the same with matrix products in the tiles of CPUs with AMX (`limner.native.tiles`), for bfloat16.
- ``chunked``: queries in chunks; two matrix products fill one score buffer, one softmax, two products. Runs anywhere.
- ``chunked_float32``: the same in float32, for half precision where the CPU multiplies float32 faster.
- ``triton``: one pass of our own kernel over references and own tokens (`limner.model.gpu.attention_triton`), on GPUs.
- ``flash``, ``flash3``, ``flash4``, ``cudnn``, ``efficient``: torch's, once for the references and once for the own tokens,
  merged by their log-sum-exp (`limner.model.gpu.with_lse`). ``flash`` runs on any CPU.
- ``sdpa``: torch's own choice over the concatenation; for mps, and where no other kernel runs on a GPU.
- ``dense``: the formula over the concatenation. Copies; differentiable. For training: on a CPU with a few hundred tokens a
  third faster, backward included, than `scaled_dot_product_attention`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from limner.errors import InvalidRequest
from limner.model.arithmetic import fast_dtype
from limner.model.gpu import attention_triton, choice, with_lse
from limner.model.gpu.with_lse import attend_parts
from limner.model.kv import AnyLayerKV, LayerKV, QuantizedLayerKV, quantize_layer
from limner.native import kernels as native
from limner.native import tiles

__all__ = ["CPU_KERNELS", "KERNELS", "KeyWeights", "attend", "choose_kernel", "reads_narrow"]

_logger = logging.getLogger("limner")
_CHUNK = 256
_SCORES = 8 << 20
"""Scores that are in memory at once; more only if one chunk of one head has more."""


@cache
def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the name of the fastest kernel that runs there; the choice is logged once.

    On a GPU the candidates of `limner.model.gpu.choice` are checked and measured. On a CPU with AMX `tiles` is the
    fastest, then torch's flash kernel; without AMX `native` is (`benchmarks/tiles.py`, docs/log.md).
    """
    if device.type not in ("cpu", "meta"):
        name = _choose_on_gpu(device, dtype, head_dim)
    elif tiles.takes(device, dtype, head_dim):
        name = "tiles"
    elif device.type == "cpu" and dtype == torch.bfloat16 and _has_amx():
        name = "flash"
    elif native.takes(device, dtype, head_dim):
        name = "native"
    else:
        name = "chunked_float32" if fast_dtype(device, dtype) != dtype else "chunked"
    _logger.info("attention on %s in %s, head dim %d: kernel %s", device, dtype, head_dim, name)
    return name


def _choose_on_gpu(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the fastest kernel that is right there: four heads, an image and references of 1,024 tokens each."""
    candidates = choice.attention_candidates(device, dtype, head_dim)
    what = f"attention on {device} in {dtype}, head dim {head_dim}"

    def case(num: int) -> tuple[Tensor, Tensor, Tensor, LayerKV]:
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(1, n, 4, head_dim, generator=generator) for n in (num, num, num, num + 5, num + 5)]
        q, k, v, *kept = (x.to(device, dtype) for x in made)
        return q, k, v, LayerKV(*kept)

    def check(name: str) -> float:
        q, k, v, kept = case(75)
        weights = KeyWeights(cached=((40, 0.5), (40, 1.0)))
        found = attend(q, k, v, references=kept, weights=weights, kernel=name)
        wide = LayerKV(*(x.float() for x in kept))
        expected = attend(q.float(), k.float(), v.float(), references=wide, weights=weights, kernel="dense")
        return choice.relative_error(found, expected)

    def measure(name: str) -> float:
        q, k, v, kept = case(1024)
        return choice.seconds(device, lambda: attend(q, k, v, references=kept, kernel=name))

    with torch.no_grad():
        right = choice.rank(what, candidates[:-1], check=check, limit=2e-2, measure=measure)
    return right[0] if right else candidates[-1]


@cache
def reads_narrow(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if `triton` is there and right with int8 and fp8 K/V, whose copies in `dtype` the others need."""
    if device.type == "cpu" or not attention_triton.takes(device, dtype, head_dim):
        return False
    generator = torch.Generator().manual_seed(0)
    q, *kept = (torch.randn(1, 80, 4, head_dim, generator=generator).to(device, dtype) for _ in range(3))

    def check(kind: str) -> float:
        narrow = quantize_layer(LayerKV(*kept), kind)
        found = attention_triton.attend(q, *kept, references=narrow)
        expected = attend(q, *kept, references=narrow, kernel="dense")
        return choice.relative_error(found, expected)

    def right(kind: str) -> bool:
        what = f"attention to {kind} references on {device}"
        return bool(choice.rank(what, [kind], check=check, limit=2e-2, measure=lambda _: 0.0))

    with torch.no_grad():
        return right("int8") and right("fp8")


def _has_amx() -> bool:
    """Whether this CPU has matrix tiles for bfloat16 (AMX) that torch and oneDNN use."""
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private, so it may go
    return bool(check and check() and torch.backends.mkldnn.enabled)


def attend(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    *,
    references: AnyLayerKV | None = None,
    weights: KeyWeights | list[KeyWeights | None] | None = None,
    kernel: str | None = None,
) -> Tensor:
    """softmax(q [k_ref | k]^T / sqrt(D)) [v_ref | v], shape (B, S, H, D).

    K/V of `references` have batch 1 or B. `weights` multiply the softmax's terms of some keys: log w is added to their
    scores; a list has those of each image. `kernel` is a name in `KERNELS`; None takes the fastest one of the device, or
    the differentiable one while gradients are recorded. Raises `InvalidRequest` if `native` or `tiles` cannot run.
    """
    if isinstance(weights, list):
        return _by_weights(q_BSHD, k_BSHD, v_BSHD, references, weights, kernel)
    if kernel is None:
        records = _records(q_BSHD, k_BSHD, v_BSHD, references)
        kernel = "dense" if records else choose_kernel(q_BSHD.device, q_BSHD.dtype, q_BSHD.shape[-1])
        narrow = isinstance(references, QuantizedLayerKV) and not records
        if narrow and reads_narrow(q_BSHD.device, q_BSHD.dtype, q_BSHD.shape[-1]):
            kernel = "triton"
    if kernel == "triton":
        return _triton(q_BSHD, k_BSHD, v_BSHD, references, weights or KeyWeights())
    is_int8 = isinstance(references, QuantizedLayerKV) and references.k.dtype == torch.int8
    if kernel in _IN_PLACE and references is not None and not is_int8:
        references = LayerKV(*(x.to(q_BSHD.dtype) for x in references.dense(q_BSHD.dtype)))
    if q_BSHD.device.type == "cpu" and kernel not in CPU_KERNELS:
        raise InvalidRequest(
            "kernel", f"{kernel!r} does not run on a CPU (allowed: {', '.join(CPU_KERNELS)}); leave it out"
        )
    parts = _parts(k_BSHD, v_BSHD, references, weights)
    if kernel in _IN_PLACE:
        return _in_place(kernel, q_BSHD, parts)
    return _PLAIN[kernel](q_BSHD, [(kv.dense(v_BSHD.dtype), bias) for kv, bias in parts])


def _by_weights(
    q: Tensor, k: Tensor, v: Tensor, references: AnyLayerKV | None, weights: list[KeyWeights | None], kernel: str | None
) -> Tensor:
    """Neighbours of equal weights together: each image as alone, from the same K/V."""
    outs, start = [], 0
    for one, images in groupby(weights):
        rows = slice(start, start + len(list(images)))
        start = rows.stop
        held = references
        if held is not None and len(held[0]) > 1:
            held = type(held)(*(x[rows] for x in held))
        outs.append(attend(q[rows], k[rows], v[rows], references=held, weights=one, kernel=kernel))
    return torch.cat(outs)


class KeyWeights(NamedTuple):
    """Weights of keys, as (number of keys, weight) one after the other: of cached references, and of own keys.

    None: all have weight 1. A weight of 0 leaves its keys out.
    """

    cached: tuple[tuple[int, float], ...] | None = None
    own: tuple[tuple[int, float], ...] | None = None


_Part = tuple[AnyLayerKV, float]
"""Keys and values (1 or B, R, H, D), and the bias of their scores."""
_DensePart = tuple[LayerKV, float]


def _parts(
    k: Tensor, v: Tensor, references: AnyLayerKV | None, weights: KeyWeights | None
) -> list[tuple[AnyLayerKV, float]]:
    """Return the keys in their order, cached ones first, divided where their weights differ."""
    weights = weights or KeyWeights()
    own = _weighted(LayerKV(k, v), weights.own)
    return own if references is None else _weighted(references, weights.cached) + own


def _weighted(kv: AnyLayerKV, weights: tuple[tuple[int, float], ...] | None) -> list[_Part]:
    if weights is None:
        return [(kv, 0.0)]
    found: list[_Part] = []
    start = 0
    for weight, spans in groupby(weights, key=lambda span: span[1]):
        end = start + sum(num for num, _ in spans)
        if weight > 0 and end > start:
            found.append((type(kv)(*(x[:, start:end] for x in kv)), math.log(weight)))
        start = end
    if start != kv.num_tokens:
        raise ValueError(f"weights are of {start} keys, there are {kv.num_tokens}")
    return found


def _records(q: Tensor, k: Tensor, v: Tensor, references: AnyLayerKV | None) -> bool:
    """True if a gradient is recorded for any of them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *(references or ())))


def _dense(q: Tensor, parts: list[_DensePart]) -> Tensor:
    k, v = (torch.cat([kv[i].expand(q.shape[0], -1, -1, -1) for kv, _ in parts], dim=1) for i in range(2))
    q_BHSD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q_BHSD / math.sqrt(q.shape[-1])) @ k_BHSD.transpose(-1, -2)
    if any(bias for _, bias in parts):
        scores = scores + torch.cat([scores.new_full((kv.num_tokens,), bias) for kv, bias in parts])
    return (torch.softmax(scores, dim=-1).to(v.dtype) @ v_BHSD).transpose(1, 2)


def _triton(q: Tensor, k: Tensor, v: Tensor, references: AnyLayerKV | None, weights: KeyWeights) -> Tensor:
    if not attention_triton.takes(q.device, q.dtype, q.shape[-1]):
        raise InvalidRequest(
            "kernel",
            f"'triton' does not run on {q.device} in {q.dtype} with heads of {q.shape[-1]} (it takes float16 and bfloat16, "
            "heads of 16, 32, 64 or 128, an NVIDIA card from Ampere on or an AMD one, and needs the package triton); "
            "leave kernel out",
        )
    if _records(q, k, v, references):
        raise InvalidRequest("kernel", "'triton' records no gradients; leave kernel out, or use torch.no_grad()")
    cached, own = weights
    ref_bias = None if cached is None or references is None else attention_triton.key_bias(cached, q.device)
    own_bias = None if own is None else attention_triton.key_bias(own, q.device)
    return attention_triton.attend(q, k, v, references=references, ref_bias=ref_bias, own_bias=own_bias)


def _in_place(name: str, q: Tensor, parts: list[_Part]) -> Tensor:
    """With a kernel in C, which reads all parts where they are."""
    kernel, needs = _IN_PLACE[name]
    if not kernel.takes(q.device, q.dtype, q.shape[-1]):
        raise InvalidRequest(
            "kernel",
            f"{name!r} does not run on {q.device} in {q.dtype} with heads of {q.shape[-1]} (it takes bfloat16, {needs} and "
            "a C compiler; the log says what is missing); leave kernel out",
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, *(x for kv, _ in parts for x in kv))):
        raise InvalidRequest("kernel", f"{name!r} records no gradients; leave kernel out, or use torch.no_grad()")
    for kv, _ in parts:
        if kv[0].shape[0] not in (1, q.shape[0]):
            raise ValueError(f"references of batch {kv[0].shape[0]} do not fit {q.shape[0]} images")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for b in range(q.shape[0]):
        segments = [_segment(kv, b, bias) for kv, bias in parts]
        kernel.attend(q[b], segments, out[b])
    return out


def _segment(kv: AnyLayerKV, b: int, bias: float) -> native.Segment:
    """The keys of image `b` of the batch, as views."""
    k, v, *scales = (x[b if len(x) > 1 else 0] for x in kv)
    k_scale, v_scale = scales or (None, None)
    return native.Segment(k, v, k_scale, v_scale, bias)


def _chunked(q: Tensor, parts: list[_DensePart], *, dtype: torch.dtype | None = None) -> Tensor:
    """Some heads and queries at a time: scores in one buffer, softmax in place; products in `dtype`, None: that of q."""
    dtype = dtype or q.dtype
    batch, num_q, heads, dim = q.shape
    num = [kv.num_tokens for kv, _ in parts]
    total = sum(num)
    ends = [sum(num[: i + 1]) for i in range(len(num))]
    out_BSHD = torch.empty_like(q, memory_format=torch.contiguous_format)
    heads_at_once = max(1, min(heads, _SCORES // (_CHUNK * total)))
    scores = q.new_empty(heads_at_once * min(_CHUNK, num_q) * total, dtype=dtype)
    read: list[tuple[Tensor, Tensor]] = [(q, q)] * len(parts)
    for b in range(batch):
        for i, (kv, _) in enumerate(parts):
            if b == 0 or len(kv.k) == batch:  # shared ones are read once
                own = b if len(kv.k) > 1 else 0
                read[i] = _heads_first(kv.k[own], dtype), _heads_first(kv.v[own], dtype)
        q_HSD = _heads_first(q[b], dtype) * (1 / math.sqrt(dim))
        for h in range(0, heads, heads_at_once):
            some = slice(h, h + heads_at_once)
            for start in range(0, num_q, _CHUNK):
                q_HQD = q_HSD[some, start : start + _CHUNK]
                # contiguous for the last chunk too: softmax in place is wrong for anything else
                shape = (*q_HQD.shape[:2], total)
                terms = scores[: math.prod(shape)].view(shape)
                places = [terms[..., end - n : end] for n, end in zip(num, ends, strict=True)]
                for place, (k_HSD, _), (_, bias) in zip(places, read, parts, strict=True):
                    torch.bmm(q_HQD, k_HSD[some].transpose(1, 2), out=place)
                    if bias:
                        place.add_(bias)
                torch._softmax(terms, -1, False, out=terms)
                part = torch.bmm(places[-1], read[-1][1][some])  # own ones first, as they are the last part
                for place, (_, v_HSD) in zip(places[:-1], read[:-1], strict=True):
                    part.baddbmm_(place, v_HSD[some])
                out_BSHD[b, start : start + _CHUNK, some] = part.transpose(0, 1)
    return out_BSHD


def _heads_first(x_SHD: Tensor, dtype: torch.dtype) -> Tensor:
    """(S, H, D) to (H, S, D): a view for float32, whose products take strides; otherwise contiguous, in one pass."""
    if x_SHD.dtype == dtype == torch.float32:
        return x_SHD.transpose(0, 1)
    return x_SHD.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format, copy=True)


def _sdpa(q: Tensor, parts: list[_DensePart]) -> Tensor:
    """Torch's own choice over the concatenation. Copies K/V of the layer; on mps and xpu there is nothing better."""
    k, v = (torch.cat([kv[i].expand(q.shape[0], -1, -1, -1) for kv, _ in parts], dim=1) for i in range(2))
    mask = None
    if any(bias for _, bias in parts):
        mask = torch.cat([q.new_full((kv.num_tokens,), bias) for kv, bias in parts]).expand(q.shape[1], -1)
    q_BHSD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, attn_mask=mask).transpose(1, 2)


_PLAIN: dict[str, Callable[[Tensor, list[_DensePart]], Tensor]] = {
    "chunked": _chunked,
    "chunked_float32": partial(_chunked, dtype=torch.float32),
    **{name: partial(attend_parts, name) for name in with_lse.CALLS},
    "sdpa": _sdpa,
    "dense": _dense,
}
_IN_PLACE: dict[str, tuple[Any, str]] = {  # kernels in C, and what they need
    "native": (native, "multiples of 16 up to 256, a CPU with AVX-512 BF16"),
    "tiles": (tiles, "multiples of 32 up to 256, a CPU with AMX"),
}
KERNELS = (*_IN_PLACE, "triton", *_PLAIN)
CPU_KERNELS = tuple(name for name in KERNELS if name not in ("triton", "flash3", "flash4", "cudnn", "efficient"))
