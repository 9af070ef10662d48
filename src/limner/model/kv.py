"""What is kept of references: keys and values of each layer, plain or quantized; or, of a joint model, the tokens.

Shapes: k and v (1, S_ref, H, D), k after norm and rotation; scales (1, S_ref, H, 1) float32. The batch is B instead of 1
in training. Knows torch alone.

Quantized K/V have one scale per token and head: the largest absolute value divided by the range of the format. So the
error of a value is at most 1/254 of the largest value of its row in int8, and 1/16 of the value itself in fp8 (E4M3).
`model.attention` widens them where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "KV_FORMATS",
    "AnyLayerKV",
    "LayerKV",
    "QuantizedLayerKV",
    "ReferenceKV",
    "ReferenceTokens",
    "quantize_layer",
]

KV_FORMATS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""The formats in which K/V can be cached besides their own dtype, and the largest value of each."""


class LayerKV(NamedTuple):
    """Keys (after norm and rotation) and values of the reference tokens in one layer, each (1, S_ref, H, D)."""

    k: Tensor
    v: Tensor

    def dense(self, dtype: torch.dtype) -> LayerKV:
        """Return itself."""
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> LayerKV:
        return LayerKV(*(x.to(device, non_blocking=non_blocking) for x in self))

    @property
    def num_tokens(self) -> int:
        return self.k.shape[1]


class QuantizedLayerKV(NamedTuple):
    """One layer in int8 or fp8: k and v (1, S_ref, H, D), scales (1, S_ref, H, 1) float32."""

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor

    def dense(self, dtype: torch.dtype) -> LayerKV:
        """Return it widened to a dtype."""
        return LayerKV((self.k.float() * self.k_scale).to(dtype), (self.v.float() * self.v_scale).to(dtype))

    def to(self, device: torch.device, *, non_blocking: bool = False) -> QuantizedLayerKV:
        return QuantizedLayerKV(*(x.to(device, non_blocking=non_blocking) for x in self))

    @property
    def num_tokens(self) -> int:
        return self.k.shape[1]


AnyLayerKV = LayerKV | QuantizedLayerKV


class ReferenceTokens(NamedTuple):
    """The reference tokens themselves, (1, S_ref, in_channels): all that can be kept where they attend to everything."""

    tokens: Tensor

    def to(self, device: torch.device, *, non_blocking: bool = False) -> ReferenceTokens:
        return ReferenceTokens(self.tokens.to(device, non_blocking=non_blocking))

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[1]


def quantize_layer(layer: LayerKV, kind: str) -> QuantizedLayerKV:
    """Quantize a layer to a format of `KV_FORMATS`."""
    (k, k_scale), (v, v_scale) = (_quantize(x, kind) for x in layer)
    return QuantizedLayerKV(k, v, k_scale, v_scale)


def _quantize(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    dtype, top = KV_FORMATS[kind]
    wide = x.float()
    # a least scale, so that rows of zeros and of tiny values stay finite
    scale = (wide.abs().amax(dim=-1, keepdim=True) / top).clamp(min=1e-30)
    values = wide / scale
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceKV:
    """What is kept of reference tokens. Immutable by contract.

    `layers` are the keys and values of every layer, double-stream blocks first; of a joint model the tokens alone.
    """

    layers: tuple[AnyLayerKV, ...] | tuple[ReferenceTokens]

    @property
    def tokens(self) -> Tensor | None:
        """The tokens (1, S_ref, in_channels) of a joint model's references; None where K/V are kept."""
        first = self.layers[0]
        return first.tokens if isinstance(first, ReferenceTokens) else None

    @property
    def kv(self) -> tuple[AnyLayerKV, ...]:
        """The keys and values of every layer; none where tokens are kept."""
        return tuple(layer for layer in self.layers if not isinstance(layer, ReferenceTokens))

    @property
    def num_tokens(self) -> int:
        """Number of reference tokens S_ref."""
        return self.layers[0].num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept, scales included."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer)

    @property
    def device(self) -> torch.device:
        return self.layers[0][0].device
