"""The layers of a Qwen3 that text tokens are read from, with the names of transformers' `Qwen3Model`.

It computes what transformers' class does with torch's attention, operation for operation, so results are the same to the
last bit, unless matrices were made int8 (`limner.model.int8`). Its own, since importing transformers' class takes longer
than drawing a small picture.

Shapes: ids, mask (B, S); hidden states (B, S, C); queries (B, H, S, D), keys and values (B, H_kv, S, D). Knows torch; does
not know prompts and files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.config import NetworkConfig

__all__ = ["Qwen3", "is_plain"]

_NEEDED = frozenset(
    {
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
        *("num_hidden_layers", "rms_norm_eps"),
    }
)
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("qwen3",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
}
_WITHOUT_EFFECT = frozenset(
    {
        *(
            "architectures",
            "attention_dropout",
            "bos_token_id",
            "dtype",
            "eos_token_id",
            "initializer_range",
            "layer_types",
        ),
        *("max_position_embeddings", "max_window_layers", "pad_token_id", "rope_parameters", "rope_theta"),
        *("sliding_window", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache"),
        *("quantization_config", "_name_or_path"),
    }
)
"""Keys that change nothing of hidden states without windows, or that are checked apart."""
_MAX_GROUPED_HEAD = 256
"""Widest heads of which torch's attention itself repeats keys and values, as transformers chooses."""


def is_plain(config: Mapping[str, Any]) -> bool:
    """Return True for a configuration of `Qwen3`; others (windows, stretched rotation) are for transformers' class."""
    return (
        config.keys() >= _NEEDED
        and config.keys() <= _NEEDED | _FIXED.keys() | _WITHOUT_EFFECT
        and all(config.get(name, values[0]) in values for name, values in _FIXED.items())
        and _rope_theta(config) is not None
    )


def _rope_theta(config: Mapping[str, Any]) -> float | None:
    """Return the base of rotary frequencies, None if they are not the plain ones."""
    rope = config.get("rope_parameters", {"rope_theta": config.get("rope_theta")})
    if not isinstance(rope, dict) or not rope.keys() <= {"rope_theta", "rope_type"}:
        return None
    theta = rope.get("rope_theta")
    if rope.get("rope_type", "default") != "default" or not isinstance(theta, (int, float)):
        return None
    return float(theta)


class Qwen3(nn.Module):
    """Embedding, `num_hidden_layers` layers of a configuration that `is_plain`, and a norm after the last one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = NetworkConfig(config)
        sizes = config["vocab_size"], config["hidden_size"]
        # given a table, since random values on the meta device import torch's compiler
        self.embed_tokens = nn.Embedding(*sizes, _weight=torch.zeros(sizes))
        self.layers = nn.ModuleList(Qwen3Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm: nn.Module = RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])

    def forward(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Return the hidden states before each layer and after the last, normed: `num_hidden_layers` + 1 of them.

        `mask` (B, S) is True for tokens that are read, False for padding; None reads all.
        """
        x = self.embed_tokens(ids)
        cos_sin = self._rotation(x)
        attended = None if mask is None else _causal(mask)
        states = [x]
        for layer in self.layers:
            x = layer(x, cos_sin, attended)
            states.append(x)
        states[-1] = self.norm(x)
        return tuple(states)

    def _rotation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin (1, 1, S, D) of each position, computed in float32."""
        dim, theta = self.config.head_dim, _rope_theta(self.config)
        assert theta is not None
        with torch.device(like.device):
            frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
            angles = torch.arange(like.shape[1])[:, None].float() * frequencies
        angles_11SD = torch.cat((angles, angles), dim=-1)[None, None]
        return angles_11SD.cos().to(like.dtype), angles_11SD.sin().to(like.dtype)


class Qwen3Layer(nn.Module):
    """Attention and an MLP, each of the normed stream and added to it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Attention(config)
        self.mlp = MLP(width, config["intermediate_size"])
        self.input_layernorm = RMSNorm(width, eps=eps)
        self.post_attention_layernorm = RMSNorm(width, eps=eps)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], attended: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, attended)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Projection(nn.Linear):
    """A matrix without bias, in the dtype of its weights on every device, as transformers multiplies.

    `limner.model.arithmetic.Linear` widens where that is faster, which changes last bits.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def prepare(self, x: Tensor) -> Tensor:
        """As `Linear.prepare`: nothing is done."""
        return x


class Attention(nn.Module):
    """Causal attention, several heads to one of the keys and values."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, self.head_dim = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.groups = heads // kv_heads
        self.q_proj = Projection(width, heads * self.head_dim)
        self.k_proj = Projection(width, kv_heads * self.head_dim)
        self.v_proj = Projection(width, kv_heads * self.head_dim)
        self.o_proj = Projection(heads * self.head_dim, width)
        self.q_norm = RMSNorm(self.head_dim, eps=config["rms_norm_eps"])
        self.k_norm = RMSNorm(self.head_dim, eps=config["rms_norm_eps"])

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], attended: Tensor | None) -> Tensor:
        heads, x = (*x.shape[:2], -1, self.head_dim), self.q_proj.prepare(x)  # once for three matrices
        q = _rotated(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos_sin)
        k = _rotated(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos_sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        grouped = self.groups > 1 and attended is None and self.head_dim <= _MAX_GROUPED_HEAD
        if self.groups > 1 and not grouped:
            k, v = (part.repeat_interleave(self.groups, dim=1) for part in (k, v))
        causal = attended is None and heads[1] > 1
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attended, is_causal=causal, scale=self.head_dim**-0.5, enable_gqa=grouped
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Projection(width, inner)
        self.up_proj = Projection(width, inner)
        self.down_proj = Projection(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate_proj.prepare(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), in float32, and rounded before it is scaled."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def _rotated(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (B, H, S, D): each half of D holds one coordinate of its pairs."""
    cos, sin = cos_sin
    first, second = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)


def _causal(mask: Tensor) -> Tensor:
    """Return (B, 1, S, S), True where a position reads another: the earlier ones and itself, without padding."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions[None, :] <= positions[:, None]) & mask[:, None, None, :]
