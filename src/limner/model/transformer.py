"""The rectified-flow transformer: `prefill` for reference tokens, `forward` for everything else.

`prefill` is a pure function of weights, reference tokens and positions. `forward` predicts the velocity of image tokens
and takes what `prefill` gave, or nothing. There are no modes and no state. Knows torch and the geometry only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from limner.config import TransformerConfig
from limner.model.arithmetic import Linear, fast_dtype
from limner.model.attention import choose_kernel
from limner.model.int8 import Int8Linear
from limner.model.kv import AnyLayerKV, ReferenceKV, staged
from limner.model.layers import DoubleBlock, FinalNorm, Modulation, SingleBlock, TimeEmbedding
from limner.model.rope import Rope, rope_table
from limner.native.kernels import has_rows, source_digest
from limner.tokens import TokenLayout

if TYPE_CHECKING:
    from limner.model.parallel import Parallel, TokenSlices

__all__ = ["Transformer"]

_Block = TypeVar("_Block", bound=nn.Module)


class Transformer(nn.Module):
    """Shapes: img (B, S_img, in_channels), txt (B, S_txt, text_width), ids (S, 4); velocity (B, S_img, out_channels)."""

    kernel: str | None = None
    """Attention kernel by name (`limner.model.attention.KERNELS`); None lets the device choose."""
    beside: object | None = None
    """What runs beside the matrices, LoRAs: kept here by who attaches it, so that all who share the network know of it."""
    visit: Callable[[Iterable[nn.Module]], Iterator[nn.Module]] | None = None
    """Who brings the weights of a block before it runs and takes them away after (`limner.memory.residency`); None: they
    are there."""
    parallel: Parallel | None = None
    """The processes that this model is divided among (`limner.model.parallel.divide`); None: it is whole, here."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
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
    def arithmetic(self) -> str:
        """What decides the last bits of a result besides the weights: device, attention kernel and kind of products."""
        kernel = self.kernel or choose_kernel(self.device, self.dtype, self.config.head_dim)
        kernel = f"native {source_digest()}" if kernel == "native" else kernel
        products = self.x_embedder.arithmetic or fast_dtype(self.device, self.dtype)
        names = [self.device.type, kernel, str(products).removeprefix("torch."), *_narrowed_float32(self.device)]
        int8 = {module.multiplies_int8() for module in self.modules() if isinstance(module, Int8Linear)}
        names += [f"rows {source_digest()}"] if has_rows(self.device, self.dtype) else []
        names += sorted("int8 dot products" if instructions else "int8 widened" for instructions in int8)
        names += [f"{self.parallel.mode} parallel {self.parallel.size}"] if self.parallel else []
        return "/".join(names)

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
        double, single, last = self._split_blocks()
        embedding = self.time_guidance_embed(torch.zeros(1, device=self.device))
        mod_double = self.double_stream_modulation_img(embedding)
        (mod_single,) = self.single_stream_modulation(embedding)
        rope = self.rope(ref_ids)
        slices = self._slices(ref_tokens.shape[1])
        if slices is not None:
            ref_tokens, rope = slices.own(ref_tokens, 0), slices.rope(rope)
        gather = slices.gather if slices else None
        ref = self.x_embedder(ref_tokens)
        layers = []
        for block in self._visited(double):
            ref, kv = block.prefill(ref, mod=mod_double, rope=rope, kernel=self.kernel, gather=gather)
            layers.append(kv)
        for single_block in self._visited(single):
            ref, kv = single_block.prefill(ref, mod=mod_single, rope=rope, kernel=self.kernel, gather=gather)
            layers.append(kv)
        for single_block in self._visited([last]):
            layers.append(single_block.prefill_last(ref, mod=mod_single, rope=rope, gather=gather))
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
        slices = self._slices(txt_tokens.shape[1], img_tokens.shape[1])
        if slices is not None:
            txt_tokens, img_tokens, rope = slices.own(txt_tokens, 0), slices.own(img_tokens, 1), slices.rope(rope)
        gather = slices.gather if slices else None
        layout = TokenLayout(num_txt=txt_tokens.shape[1], num_img=img_tokens.shape[1])
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).reshape(-1)
        embedding = self.time_guidance_embed(sigma)
        mod_img = self.double_stream_modulation_img(embedding)
        mod_txt = self.double_stream_modulation_txt(embedding)
        (mod_single,) = self.single_stream_modulation(embedding)
        kept = self._kept(references)

        double, single, last = self._split_blocks()
        img, txt = self.x_embedder(img_tokens), self.context_embedder(txt_tokens)
        for block in self._visited(double):
            img, txt = block(
                img,
                txt,
                mod_img=mod_img,
                mod_txt=mod_txt,
                rope=rope,
                layout=layout,
                references=next(kept),
                kernel=self.kernel,
                gather=gather,
            )
        x = layout.join(txt, img)
        for single_block in self._visited(single):
            x = single_block(x, mod=mod_single, rope=rope, references=next(kept), kernel=self.kernel, gather=gather)
        for single_block in self._visited([last]):
            img = single_block.forward_last(
                x, mod=mod_single, rope=rope, layout=layout, references=next(kept), kernel=self.kernel, gather=gather
            )
        velocity: Tensor = self.proj_out(self.norm_out(img, embedding))
        return velocity if slices is None else slices.whole(velocity, 1)

    def _slices(self, *lengths: int) -> TokenSlices | None:
        """Which tokens of the streams are this process's; None where all are."""
        if self.parallel is None or self.parallel.mode != "sequence":
            return None
        from limner.model.parallel import TokenSlices

        return TokenSlices(self.parallel, lengths)

    def _visited(self, blocks: list[_Block]) -> Iterator[_Block]:
        """The blocks in order, each with its weights where they have to be."""
        if self.visit is None:
            return iter(blocks)
        return cast("Iterator[_Block]", self.visit(blocks))

    def _kept(self, references: ReferenceKV | None) -> Iterator[AnyLayerKV | None]:
        """The K/V of each layer in turn, on this device."""
        if references is None:
            return repeat(None)
        if len(references.layers) != self.config.num_layers:
            raise ValueError(f"references have {len(references.layers)} layers, the model {self.config.num_layers}")
        return staged(references.layers, self.device)

    def _split_blocks(self) -> tuple[list[DoubleBlock], list[SingleBlock], SingleBlock]:
        """Double-stream blocks, single-stream blocks but the last, and the last."""
        double = cast("list[DoubleBlock]", list(self.transformer_blocks))
        *single, last = cast("list[SingleBlock]", list(self.single_transformer_blocks))
        return double, single, last


def _narrowed_float32(device: torch.device) -> list[str]:
    """How torch was told to round the inputs of float32 products and convolutions there, if it was: tf32 or bf16."""
    backends = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    if device.type not in backends:
        return []
    convolutions = torch.backends.cudnn if device.type == "cuda" else torch.backends.mkldnn
    found = {"products": backends[device.type].matmul, "convolutions": convolutions.conv}
    precisions = {name: settings.fp32_precision for name, settings in found.items()}
    return [f"{kind} {name}" for name, kind in precisions.items() if kind not in ("none", "ieee")]
