"""The rectified-flow transformer: `prefill` for reference tokens, `forward` for text and image tokens.

`prefill` is a pure function of weights, reference tokens and positions. `forward` predicts the velocity of image tokens and
takes the result of `prefill`, or None. Neither changes the transformer: how it runs is in `execution`, which only `use`
changes. Knows torch and the geometry; does not know files, steps or pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from limner.config import TransformerConfig
from limner.errors import InvalidRequest
from limner.model.arithmetic import Linear, fast_dtype
from limner.model.attention import KeyWeights, choose_kernel, reads_narrow
from limner.model.context import BlockContext, Execution, Staging
from limner.model.fingerprint import arithmetic_name
from limner.model.int8 import Int8Linear, settle_products
from limner.model.kv import AnyLayerKV, LayerKV, ReferenceKV, quantize_layer
from limner.model.layers import DoubleBlock, FinalNorm, Modulation, SingleBlock, TimeEmbedding
from limner.model.rope import Rope, rope_table
from limner.model.shards import Ranks, RecordedTokens
from limner.model.transfer import layer_kv
from limner.tokens import TokenLayout

__all__ = ["RefWeights", "Transformer"]

_logger = logging.getLogger("limner")
RefWeights = tuple[tuple[int, float], ...] | None
"""(tokens, weight) of each reference; None: all weights are 1."""
_Block = TypeVar("_Block", bound=nn.Module)


class _Changes(TypedDict, total=False):
    """The fields of `Execution`."""

    kernel: str | None
    staging: Staging
    ranks: Ranks
    graphs: Callable[..., Tensor] | None


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
        """Change how the transformer runs: its attention `kernel`, the `staging` of weights, its `ranks`, `graphs`."""
        self.execution = replace(self.execution, **changes)

    def __getstate__(self) -> dict[str, object]:
        """A copy starts without adapters, staging and other processes."""
        return {**self.__dict__, "_attached": None, "execution": Execution(kernel=self.execution.kernel)}

    @property
    def attached(self) -> object | None:
        """The LoRA adapters attached to this network, shared by every pipeline that uses it; None before `attach`."""
        return self._attached

    def attach(self, adapters: object) -> None:
        """Register the LoRA adapters of this network, in place of others."""
        self._attached = adapters

    @property
    def arithmetic(self) -> str:
        """Name of all that decides the last bits of a result besides the weights (`limner.model.fingerprint`)."""
        return arithmetic_name(self, self.execution, like=self.x_embedder, head_dim=self.config.head_dim)

    @property
    def quantization(self) -> str | None:
        """ "int8" if the blocks' matrices are `Int8Linear`, else None."""
        return "int8" if any(isinstance(module, Int8Linear) for module in self.modules()) else None

    def settle(self) -> None:
        """Try and measure the kernels of a GPU now, not in a step, and round int8 weights to fp8 where that is faster.

        To be called when the weights are where they stay. On other devices nothing is done.
        """
        if self.device.type == "cuda":
            if self.execution.ranks.alone:  # several processes would have to agree
                settle_products(self, self.dtype)
            reads_narrow(self.device, self.dtype, self.config.head_dim)
            _logger.info("arithmetic: %s", self.arithmetic)

    def use_arithmetic(self, dtype: torch.dtype | None, *, tiled: bool = True) -> None:
        """Set the dtype of products (None: the device chooses); `tiled`: those in bfloat16 may use AMX tiles."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.arithmetic, module.tiled = dtype, tiled

    def compile_blocks(self, backend: str | None = "inductor") -> None:
        """Compile the blocks' forwards with torch.compile, each as one graph; None: run them as they are again.

        Prefills and the last block are left alone. What is chosen by measuring or logging is chosen here, before. On a CPU
        attention is torch's flash kernel, and half precision is refused: our own kernels are not for torch.compile.
        """
        if backend is not None and self.device.type == "cpu" and self.dtype != torch.float32:
            raise InvalidRequest("compile_blocks", f"on a CPU is for torch.float32, not for {self.dtype}; leave it out")
        if backend is not None:
            from torch import _dynamo

            _dynamo.config.skip_nnmodule_hook_guards = False  # LoRAs are hooks, which may come and go
        self.use_arithmetic(None if backend is None else fast_dtype(self.device, self.dtype))
        kernel = "flash" if self.device.type == "cpu" else choose_kernel(self.device, self.dtype, self.config.head_dim)
        self.use(kernel=None if backend is None else kernel)
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            if backend is None:
                block._compiled_call_impl = None
            else:
                block.compile(backend=backend, fullgraph=True)

    def rope(self, ids: Tensor) -> Rope:
        """Return the rotary table of positions `ids` (S, 4)."""
        return rope_table(ids.to(self.device), axes=self.config.rope_axes, theta=self.config.rope_theta)

    def prefill(self, ref_tokens: Tensor, ref_ids: Tensor, *, quantization: str | None = None) -> ReferenceKV:
        """Return the K/V of reference tokens (1, S_ref, in_channels) at positions `ref_ids` (S_ref, 4), in every layer.

        References attend to references only and are modulated at noise level 0, so the result depends on weights and
        references alone. The last block computes K and V and nothing else. A batch of B is allowed, for training. With
        `quantization` (`kv.KV_FORMATS`) each layer is quantized as soon as it is there: never two of them are wide.
        """
        slices = self.execution.ranks.token_slices(ref_tokens.shape[1])
        ref_tokens = slices.own(ref_tokens, 0)
        layout = TokenLayout(num_txt=0, num_img=ref_tokens.shape[1])
        context = BlockContext(rope=slices.rope(self.rope(ref_ids)), layout=layout, kernel=self.kernel, slices=slices)
        embedding = self.time_guidance_embed(torch.zeros(1, device=self.device))
        mod_double = self.double_stream_modulation_img(embedding)
        (mod_single,) = self.single_stream_modulation(embedding)

        layers: list[AnyLayerKV] = []

        def keep(layer: LayerKV) -> None:
            layers.append(layer if quantization is None else quantize_layer(layer, quantization))

        *single, last = self.single_transformer_blocks
        ref = self.x_embedder(ref_tokens)
        for block in self._staged(DoubleBlock, self.transformer_blocks):
            ref, kv = block.prefill(ref, mod=mod_double, context=context)
            keep(kv)
        for single_block in self._staged(SingleBlock, single):
            ref, kv = single_block.prefill(ref, mod=mod_single, context=context)
            keep(kv)
        for last_block in self._staged(SingleBlock, [last]):
            keep(last_block.prefill_last(ref, mod=mod_single, context=context))
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
        ref_tokens: Tensor | None = None,
        ref_ids: Tensor | None = None,
        ref_weights: RefWeights | list[RefWeights] = None,
        rope: Rope | None = None,
        kept: Callable[[LayerKV], None] | None = None,
    ) -> Tensor:
        """Return the velocity (B, S_img, out_channels) of image tokens at noise level `sigma`, a number or (B,).

        `references` are the K/V of isolated references, shared by the batch. Joint ones are `ref_tokens` (1 or B, S_ref,
        in_channels) at `ref_ids` (S_ref, 4), further tokens at the same noise level. `ref_weights` are (tokens, weight) of
        each reference in order: log weight is added to the scores of its keys, for all tokens; 0: nothing attends to it. A
        list has those of each image. `rope`, if given, is the table of [txt_ids, img_ids, ref_ids], computed once for all
        steps. `kept` is called with the K/V (B, S_ref, H, D) that joint references have at this noise level, layer by
        layer. Raises `ValueError` for references of another number of layers.
        """
        if ref_tokens is None:
            ref_tokens, ref_ids = img_tokens[:, :0], img_ids[:0]
        assert ref_ids is not None
        rope = rope or self.rope(torch.cat([txt_ids, img_ids, ref_ids]))
        streams = [txt_tokens, img_tokens, ref_tokens.expand(len(img_tokens), -1, -1)]
        slices = self.execution.ranks.token_slices(*(x.shape[1] for x in streams if x.shape[1]))
        streams = [slices.own(x, i) if x.shape[1] else x for i, x in enumerate(streams)]
        num_txt, num_img, num_ref = (x.shape[1] for x in streams)
        layout = TokenLayout(num_txt=num_txt, num_img=num_img, num_ref=num_ref)
        if kept is not None:
            slices = RecordedTokens(layout.ref, kept)

        def weights_of(image: RefWeights) -> KeyWeights | None:
            if image is None:
                return None
            return KeyWeights(own=((num_txt + num_img, 1.0), *image)) if num_ref else KeyWeights(cached=image)

        context = BlockContext(
            rope=slices.rope(rope),
            layout=layout,
            kernel=self.kernel,
            slices=slices,
            weights=[*map(weights_of, ref_weights)] if isinstance(ref_weights, list) else weights_of(ref_weights),
        )
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).reshape(-1)
        embedding = self.time_guidance_embed(sigma)
        mod_img = self.double_stream_modulation_img(embedding)
        mod_txt = self.double_stream_modulation_txt(embedding)
        (mod_single,) = self.single_stream_modulation(embedding)

        kv = layer_kv(references, self.config.num_layers, device=self.device)
        *single, last = self.single_transformer_blocks
        txt, img = self.context_embedder(streams[0]), self.x_embedder(torch.cat(streams[1:], dim=1))
        for block in self._staged(DoubleBlock, self.transformer_blocks):
            img, txt = block(img, txt, mod_img=mod_img, mod_txt=mod_txt, context=context, references=next(kv))
        x = layout.join(txt, img)
        for single_block in self._staged(SingleBlock, single):
            x = single_block(x, mod=mod_single, context=context, references=next(kv))
        for last_block in self._staged(SingleBlock, [last]):
            img = last_block.forward_last(x, mod=mod_single, context=context, references=next(kv))
        velocity: Tensor = self.proj_out(self.norm_out(img, embedding))
        return slices.whole(velocity, 1)

    def _staged(self, kind: type[_Block], blocks: Iterable[nn.Module]) -> Iterator[_Block]:
        """Yield the blocks in order, each with its weights in memory."""
        for block in self.execution.staging.visit(blocks):
            assert isinstance(block, kind)
            yield block
