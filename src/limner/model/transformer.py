"""The rectified-flow transformer: `prefill` for reference tokens, `forward` for everything else.

`prefill` is a pure function of weights, reference tokens and positions. `forward` predicts the velocity of image tokens
and takes what `prefill` gave, or nothing. There are no modes and no state. Knows torch and the geometry only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn

from limner.config import TransformerConfig
from limner.model.arithmetic import Linear, fast_dtype
from limner.model.attention import choose_kernel
from limner.model.context import BlockContext, Execution, Staging
from limner.model.int8 import Int8Linear
from limner.model.kv import AnyLayerKV, ReferenceKV, staged
from limner.model.layers import DoubleBlock, FinalNorm, Modulation, SingleBlock, TimeEmbedding
from limner.model.rope import Rope, rope_table
from limner.model.shards import Ranks
from limner.native.kernels import has_rows, source_digest
from limner.tokens import TokenLayout

__all__ = ["Transformer"]

_Block = TypeVar("_Block", bound=nn.Module)


class _Changes(TypedDict, total=False):
    """The fields of `Execution`."""

    kernel: str | None
    staging: Staging
    ranks: Ranks


class Transformer(nn.Module):
    """Shapes: img (B, S_img, in_channels), txt (B, S_txt, text_width), ids (S, 4); velocity (B, S_img, out_channels)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.execution = Execution()
        self._attached: object | None = None
        width = config.width
        self.time_guidance_embed = TimeEmbedding(channels=config.time_channels, width=width)
        self.double_stream_modulation_img = Modulation(width=width, num=2)
        self.double_stream_modulation_txt = Modulation(width=width, num=2)
        self.single_stream_modulation = Modulation(width=width, num=1)
        self.x_embedder = Linear(config.in_channels, width)
        self.context_embedder = Linear(config.text_width, width)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(config) for _ in range(config.num_double_blocks)])
        self.single_transformer_blocks = nn.ModuleList([SingleBlock(config) for _ in range(config.num_single_blocks)])
        self.norm_out = FinalNorm(width=width, eps=config.eps)
        self.proj_out = Linear(width, config.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.x_embedder.weight.device

    @property
    def kernel(self) -> str | None:
        """Attention kernel by name (`limner.model.attention.KERNELS`); None lets the device choose."""
        return self.execution.kernel

    @kernel.setter
    def kernel(self, name: str | None) -> None:
        self.use(kernel=name)

    def use(self, **changes: Unpack[_Changes]) -> None:
        """Change how the transformer runs: its attention `kernel`, the `staging` of weights, its `ranks`."""
        self.execution = replace(self.execution, **changes)

    @property
    def attached(self) -> object | None:
        """The LoRA adapters attached to this network, shared by every pipeline that uses it; None before `attach`."""
        return self._attached

    def attach(self, adapters: object) -> None:
        """Register the LoRA adapters of this network, in place of others."""
        self._attached = adapters

    @property
    def arithmetic(self) -> str:
        """What decides the last bits of a result besides the weights: device, attention kernel and kind of products."""
        kernel = self.kernel or choose_kernel(self.device, self.dtype, self.config.head_dim)
        kernel = f"native {source_digest()}" if kernel == "native" else kernel
        products = self.x_embedder.arithmetic or fast_dtype(self.device, self.dtype)
        names = [self.device.type, kernel, str(products).removeprefix("torch."), *_narrowed_float32(self.device)]
        int8 = {module.multiplies_int8() for module in self.modules() if isinstance(module, Int8Linear)}
        names += [f"rows {source_digest()}"] if has_rows(self.device, self.dtype) else []
        names += sorted("int8 dot products" if instructions else "int8 widened" for instructions in int8)
        return "/".join([*names, *self.execution.ranks.arithmetic])

    @property
    def quantization(self) -> str | None:
        """ "int8" if the blocks' matrices are `Int8Linear`, else None."""
        return "int8" if any(isinstance(module, Int8Linear) for module in self.modules()) else None

    def use_arithmetic(self, dtype: torch.dtype | None) -> None:
        """Sets the dtype of matrix products (float32, or that of the weights); None lets the device choose."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.arithmetic = dtype

    def rope(self, ids: Tensor) -> Rope:
        """The rotary table of positions `ids` (S, 4)."""
        return rope_table(ids.to(self.device), axes=self.config.rope_axes, theta=self.config.rope_theta)

    def prefill(self, ref_tokens: Tensor, ref_ids: Tensor) -> ReferenceKV:
        """The K/V of reference tokens (1, S_ref, in_channels) at positions `ref_ids` (S_ref, 4), in every layer.

        References attend to references only and are modulated at noise level 0; so the result depends on weights and
        references alone. The last block computes K and V and nothing else. A batch of B is allowed, for training.
        """
        slices = self.execution.ranks.token_slices(ref_tokens.shape[1])
        ref_tokens = slices.own(ref_tokens, 0)
        layout = TokenLayout(num_txt=0, num_img=ref_tokens.shape[1])
        rope = slices.rope(self.rope(ref_ids))
        context = BlockContext(rope=rope, layout=layout, kernel=self.kernel, slices=slices)
        embedding = self.time_guidance_embed(torch.zeros(1, device=self.device))
        mod_double = self.double_stream_modulation_img(embedding)
        (mod_single,) = self.single_stream_modulation(embedding)

        layers = []
        ref = self.x_embedder(ref_tokens)
        for block in self._staged(self._double_blocks):
            ref, kv = block.prefill(ref, mod=mod_double, context=context)
            layers.append(kv)
        for single_block in self._staged(self._single_blocks[:-1]):
            ref, kv = single_block.prefill(ref, mod=mod_single, context=context)
            layers.append(kv)
        for last_block in self._staged(self._single_blocks[-1:]):
            layers.append(last_block.prefill_last(ref, mod=mod_single, context=context))
        return ReferenceKV(layers=tuple(layers))

    def forward(
        self,
        img_tokens: Tensor,
        txt_tokens: Tensor,
        sigma: Tensor | float,
        *,
        img_ids: Tensor,
        txt_ids: Tensor,
        references: ReferenceKV | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        """The velocity of image tokens (B, S_img, in_channels) at noise level `sigma`, a number or (B,).

        `references` serve the whole batch. `rope`, if given, is `self.rope([txt_ids, img_ids])`, made once for all steps.
        """
        rope = rope or self.rope(torch.cat([txt_ids, img_ids]))
        slices = self.execution.ranks.token_slices(txt_tokens.shape[1], img_tokens.shape[1])
        txt_tokens, img_tokens = slices.own(txt_tokens, 0), slices.own(img_tokens, 1)
        layout = TokenLayout(num_txt=txt_tokens.shape[1], num_img=img_tokens.shape[1])
        context = BlockContext(rope=slices.rope(rope), layout=layout, kernel=self.kernel, slices=slices)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).reshape(-1)
        embedding = self.time_guidance_embed(sigma)
        mod_img = self.double_stream_modulation_img(embedding)
        mod_txt = self.double_stream_modulation_txt(embedding)
        (mod_single,) = self.single_stream_modulation(embedding)

        kv = self._layers_of(references)
        img, txt = self.x_embedder(img_tokens), self.context_embedder(txt_tokens)
        for block in self._staged(self._double_blocks):
            img, txt = block(img, txt, mod_img=mod_img, mod_txt=mod_txt, context=context, references=next(kv))
        x = layout.join(txt, img)
        for single_block in self._staged(self._single_blocks[:-1]):
            x = single_block(x, mod=mod_single, context=context, references=next(kv))
        for last_block in self._staged(self._single_blocks[-1:]):
            img = last_block.forward_last(x, mod=mod_single, context=context, references=next(kv))
        velocity: Tensor = self.proj_out(self.norm_out(img, embedding))
        return slices.whole(velocity, 1)

    @property
    def _double_blocks(self) -> list[DoubleBlock]:
        return cast("list[DoubleBlock]", list(self.transformer_blocks))

    @property
    def _single_blocks(self) -> list[SingleBlock]:
        return cast("list[SingleBlock]", list(self.single_transformer_blocks))

    def _staged(self, blocks: Sequence[_Block]) -> Iterator[_Block]:
        """The blocks in order, each with its weights in memory."""
        return cast("Iterator[_Block]", self.execution.staging.visit(blocks))

    def _layers_of(self, references: ReferenceKV | None) -> Iterator[AnyLayerKV | None]:
        """The K/V of each layer in turn, on this device; None for each without references."""
        if references is None:
            return repeat(None)
        if len(references.layers) != self.config.num_layers:
            raise ValueError(f"references have {len(references.layers)} layers, the model {self.config.num_layers}")
        return staged(references.layers, self.device)


def _narrowed_float32(device: torch.device) -> list[str]:
    """How torch was told to round the inputs of float32 products and convolutions there, if it was: tf32 or bf16."""
    backends = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    if device.type not in backends:
        return []
    convolutions = torch.backends.cudnn if device.type == "cuda" else torch.backends.mkldnn
    found = {"products": backends[device.type].matmul, "convolutions": convolutions.conv}
    precisions = {name: settings.fp32_precision for name, settings in found.items()}
    return [f"{kind} {name}" for name, kind in precisions.items() if kind not in ("none", "ieee")]
