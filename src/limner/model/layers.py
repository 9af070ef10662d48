"""Blocks of the transformer: embedders, modulation, double-stream and single-stream blocks.

Shapes: B batch, S sequence, C width, M MLP width, H heads, D head dimension. Module names are those of diffusers'
`Flux2Transformer2DModel`, so its state dict needs no renaming. Each block has two passes with the same weights: `forward`
for text and image tokens, and `prefill` for reference tokens, which attend to themselves only and see neither prompt nor
noise. Knows nothing of steps or files, nor of how a sequence is made (`limner.tokens`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.config import TransformerConfig
from limner.model.arithmetic import Linear
from limner.model.attention import attend
from limner.model.context import BlockContext
from limner.model.kv import AnyLayerKV, LayerKV
from limner.model.rope import Rope
from limner.model.rows import Heads, rows_of

__all__ = ["DoubleBlock", "FinalNorm", "Modulation", "SingleBlock", "TimeEmbedding"]


class Shift(NamedTuple):
    """One modulation: each (C,) if the batch shares it, else (B, 1, C)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def norm(self, x: Tensor, eps: float) -> Tensor:
        """LayerNorm(x) (1 + scale) + shift."""
        return rows_of(x).norm(x, self.shift, self.scale, eps=eps)

    def add(self, x: Tensor, change: Tensor) -> Tensor:
        """x + gate * change."""
        return rows_of(x).add(x, self.gate, change)


class TimeEmbedding(nn.Module):
    """sigma (B,) to the conditioning vector (B, C). The factor 1000 is applied here and nowhere else."""

    def __init__(self, *, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.timestep_embedder = nn.ModuleDict({"linear_1": Linear(channels, width), "linear_2": Linear(width, width)})

    def forward(self, sigma: Tensor) -> Tensor:
        half = self.channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angles = (sigma.float() * 1000)[:, None] * torch.exp(-math.log(10000) * exponents)
        linear_1, linear_2 = self.timestep_embedder["linear_1"], self.timestep_embedder["linear_2"]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(linear_1.parameters()).dtype)
        embedding: Tensor = linear_2(F.silu(linear_1(waves)))
        return embedding


class Modulation(nn.Module):
    """The conditioning vector (B, C) to `num` modulations, shared by all blocks of a kind."""

    def __init__(self, *, width: int, num: int) -> None:
        super().__init__()
        self.num = num
        self.linear = Linear(width, 3 * num * width)

    def forward(self, embedding: Tensor) -> tuple[Shift, ...]:
        parts = _conditioned(self.linear, embedding).chunk(3 * self.num, dim=-1)
        return tuple(Shift(*parts[3 * i : 3 * i + 3]) for i in range(self.num))


class FinalNorm(nn.Module):
    """The last modulated LayerNorm; its linear gives (scale, shift), in this order."""

    def __init__(self, *, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.linear = Linear(width, 2 * width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = _conditioned(self.linear, embedding).chunk(2, dim=-1)
        return rows_of(x).norm(x, shift, scale, eps=self.eps)


def _conditioned(linear: nn.Module, embedding: Tensor) -> Tensor:
    """(B, C) to (N,) for a batch of 1, which all share, else to (B, 1, N)."""
    values: Tensor = linear(F.silu(embedding))
    return values[0] if values.shape[0] == 1 else values[:, None]


class Ungated(NamedTuple):
    """What both MLP halves are made of, as `prepare` of a matrix gave it, where product and gate are one."""

    x: Any


MlpInput: TypeAlias = Tensor | Ungated
"""The projections of both MLP halves (B, S, 2 M), or what they are made of."""


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear_in = Linear(config.width, 2 * config.mlp_width)
        self.linear_out = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        linear, prepared = self.linear_in, self.linear_in.prepare(x)
        if linear.gates(prepared):
            gated = linear.gated(prepared)
        else:
            hidden = linear(prepared)
            gated = rows_of(hidden).gated_silu(hidden)
        return self.linear_out(gated)  # type: ignore[no-any-return]


class JointAttention(nn.Module):
    """Projections of a double-stream block: one set for the image (or reference) stream and one for the text stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.head_dim
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.add_q_proj = Linear(width, width)
        self.add_k_proj = Linear(width, width)
        self.add_v_proj = Linear(width, width)
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.to_add_out = Linear(width, width)
        self.norm_q = nn.RMSNorm(config.head_dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.head_dim, eps=config.eps)
        self.norm_added_q = nn.RMSNorm(config.head_dim, eps=config.eps)
        self.norm_added_k = nn.RMSNorm(config.head_dim, eps=config.eps)

    def project_img(self, x: Tensor) -> Heads:
        """(B, S, C) to q, k and v, each (B, S, H, D), before norm and rotation."""
        x = self.to_q.prepare(x)
        q, k, v = (_heads(linear(x), self.head_dim) for linear in (self.to_q, self.to_k, self.to_v))
        return Heads(q=q, k=k, v=v, norm_q=self.norm_q, norm_k=self.norm_k)

    def project_txt(self, x: Tensor) -> Heads:
        """As `project_img`, of the text stream."""
        x = self.add_q_proj.prepare(x)
        q, k, v = (_heads(linear(x), self.head_dim) for linear in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        return Heads(q=q, k=k, v=v, norm_q=self.norm_added_q, norm_k=self.norm_added_k)


class DoubleBlock(nn.Module):
    """Text and image (or reference) tokens with weights of their own and one joint attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn = JointAttention(config)
        self.ff = FeedForward(config)
        self.ff_context = FeedForward(config)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        *,
        mod_img: tuple[Shift, ...],
        mod_txt: tuple[Shift, ...],
        context: BlockContext,
        references: AnyLayerKV | None,
    ) -> tuple[Tensor, Tensor]:
        """(B, S_img, C) and (B, S_txt, C) to the same; tokens attend to the K/V of `references` too.

        Joint references are further tokens of `img`.
        """
        layout, eps = context.layout, self.eps
        heads_img = self.attn.project_img(mod_img[0].norm(img, eps))
        heads_txt = self.attn.project_txt(mod_txt[0].norm(txt, eps))
        q, k, v = rows_of(img).attention_input([heads_txt, heads_img], context.rope)
        k, v = context.slices.gather(k, v)
        out = attend(q, k, v, references=references, weights=context.weights, kernel=context.kernel).flatten(2)
        out_txt, out_img = layout.split(out)
        img = mod_img[0].add(img, self.attn.to_out[0](out_img))
        txt = mod_txt[0].add(txt, self.attn.to_add_out(out_txt))
        img = mod_img[1].add(img, self.ff(mod_img[1].norm(img, eps)))
        txt = mod_txt[1].add(txt, self.ff_context(mod_txt[1].norm(txt, eps)))
        return img, txt

    def prefill(self, ref: Tensor, *, mod: tuple[Shift, ...], context: BlockContext) -> tuple[Tensor, LayerKV]:
        """(B, S_ref, C) to the same, and the K/V of this layer."""
        heads = self.attn.project_img(mod[0].norm(ref, self.eps))
        q, k, v = rows_of(ref).attention_input([heads], context.rope)
        k, v = context.slices.gather(k, v)
        out = attend(q, k, v, kernel=context.kernel).flatten(2)
        ref = mod[0].add(ref, self.attn.to_out[0](out))
        ref = mod[1].add(ref, self.ff(mod[1].norm(ref, self.eps)))
        return ref, LayerKV(k, v)


class ParallelAttention(nn.Module):
    """Projections of a single-stream block: one matrix in for q, k, v and both MLP halves, one out."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.to_qkv_mlp_proj = Linear(config.width, 3 * config.width + 2 * config.mlp_width)
        self.to_out = Linear(config.width + config.mlp_width, config.width)
        self.norm_q = nn.RMSNorm(config.head_dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.head_dim, eps=config.eps)

    @property
    def width(self) -> int:
        """Features of the heads of this process: (3 C + 2 M) outputs less twice the (C + M) inputs of `to_out`."""
        return self.to_qkv_mlp_proj.out_features - 2 * self.to_out.in_features

    @property
    def _mlp(self) -> slice:
        """The features of both MLP halves."""
        return slice(3 * self.width, None)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor, MlpInput]:
        """(B, S, C) to q and k after norm and rotation, v: each (B, S, H, D); and what `merge` makes the MLP's part of."""
        linear, prepared = self.to_qkv_mlp_proj, self.to_qkv_mlp_proj.prepare(x)
        if linear.gates(prepared, self._mlp):
            q, k, v = linear(prepared, slice(0, 3 * self.width)).chunk(3, dim=-1)
            mlp: MlpInput = Ungated(prepared)
        else:
            parts = [self.width] * 3 + [linear.out_features - 3 * self.width]
            q, k, v, mlp = linear(prepared).split(parts, dim=-1)
        q, k, v = (_heads(part, self.head_dim) for part in (q, k, v))
        heads = Heads(q=q, k=k, v=v, norm_q=self.norm_q, norm_k=self.norm_k)
        return *rows_of(x).attention_input([heads], rope), mlp

    def project_kv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Only k after norm and rotation, and v, each (B, S, H, D)."""
        both = self.to_qkv_mlp_proj(x, slice(self.width, 3 * self.width))
        k, v = (_heads(part, self.head_dim) for part in both.chunk(2, dim=-1))
        return rows_of(x).norm_rope(k, self.norm_k, rope), v

    def project_q_mlp(self, x: Tensor, rope: Rope) -> tuple[Tensor, MlpInput]:
        """Only q after norm and rotation, (B, S, H, D), and what `merge` makes the MLP's part of."""
        linear, prepared = self.to_qkv_mlp_proj, self.to_qkv_mlp_proj.prepare(x)
        q = _heads(linear(prepared, slice(0, self.width)), self.head_dim)
        gates = linear.gates(prepared, self._mlp)
        mlp: MlpInput = Ungated(prepared) if gates else linear(prepared, self._mlp)
        return rows_of(x).norm_rope(q, self.norm_q, rope), mlp

    def merge(self, attended: Tensor, mlp: MlpInput) -> Tensor:
        """Attention's result (B, S, H, D) and what `project` gave for the MLP back to the stream, (B, S, C)."""
        if isinstance(mlp, Tensor):
            joined = rows_of(mlp).join_gated(attended, mlp)
        else:
            joined = attended.new_empty(*attended.shape[:2], self.to_out.in_features)
            joined[..., : self.width] = attended.flatten(2)
            self.to_qkv_mlp_proj.gated(mlp.x, self._mlp, out=joined[..., self.width :])
        return self.to_out(joined)  # type: ignore[no-any-return]


class SingleBlock(nn.Module):
    """All tokens in one stream; attention and MLP in parallel."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn = ParallelAttention(config)

    def forward(self, x: Tensor, *, mod: Shift, context: BlockContext, references: AnyLayerKV | None) -> Tensor:
        """(B, S, C) of the sequence to the same; tokens attend to the K/V of `references` too."""
        q, k, v, mlp = self.attn.project(mod.norm(x, self.eps), context.rope)
        k, v = context.slices.gather(k, v)
        out = attend(q, k, v, references=references, weights=context.weights, kernel=context.kernel)
        return mod.add(x, self.attn.merge(out, mlp))

    def forward_last(self, x: Tensor, *, mod: Shift, context: BlockContext, references: AnyLayerKV | None) -> Tensor:
        """(B, S, C) to (B, S_img, C): the last block computes image queries only; other outputs are unused."""
        normed, layout = mod.norm(x, self.eps), context.layout
        k, v = context.slices.gather(*self.attn.project_kv(normed, context.rope))
        q, mlp = self.attn.project_q_mlp(normed[:, layout.img], context.rope.at(layout.img))
        out = attend(q, k, v, references=references, weights=context.weights, kernel=context.kernel)
        return mod.add(x[:, layout.img], self.attn.merge(out, mlp))

    def prefill(self, ref: Tensor, *, mod: Shift, context: BlockContext) -> tuple[Tensor, LayerKV]:
        """(B, S_ref, C) to the same, and the K/V of this layer."""
        q, k, v, mlp = self.attn.project(mod.norm(ref, self.eps), context.rope)
        k, v = context.slices.gather(k, v)
        out = attend(q, k, v, kernel=context.kernel)
        # v is a view of the whole projection; a copy keeps S_ref * C values alive instead of S_ref * (3 C + 2 M)
        return mod.add(ref, self.attn.merge(out, mlp)), LayerKV(k, v.contiguous())

    def prefill_last(self, ref: Tensor, *, mod: Shift, context: BlockContext) -> LayerKV:
        """Only the K/V of this layer: the last block skips reference queries; their output is unused."""
        k, v = context.slices.gather(*self.attn.project_kv(mod.norm(ref, self.eps), context.rope))
        return LayerKV(k, v.contiguous())


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, S, H D) to (B, S, H, D)."""
    return x.reshape(*x.shape[:-1], -1, head_dim)
