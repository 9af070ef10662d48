"""The velocity of all images of a batch at a step: with isolated or joint references, their weights, and guidance.

Owns what is computed once for all steps: rotary tables, tokens of joint references, and K/V that are used again. Does not
know prompts, pictures or the Euler step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from limner.grid import num_tokens
from limner.memory import reused_bytes
from limner.model.kv import AnyLayerKV, LayerKV, ReferenceKV, quantize_layer
from limner.model.rope import Rope
from limner.model.transformer import RefWeights
from limner.pipeline.arguments import DrawRequest
from limner.pipeline.networks import Networks
from limner.references import References
from limner.tokens import image_ids, text_ids

__all__ = ["Velocity"]


class Velocity:
    """Predicts velocities for one call, step after step."""

    def __init__(self, networks: Networks, request: DrawRequest, references: References | None) -> None:
        self._networks, self._guidance = networks, request.guidance
        self._reference_guidance = request.reference_guidance if references is not None else 1.0
        self._weights = request.reference_weights if references is not None else ()
        self._step = -1
        self._img_ids = image_ids(request.grid)
        tokens = references.tokens if references is not None else None
        self._isolated = references if tokens is None else None
        self._ref_tokens = None if tokens is None else tokens.to(networks.device, networks.dtype)
        self._num_tokens = [num_tokens(size) for size in (references.sizes if references is not None else ())]
        self._ref_ids = references.ids if references is not None else None
        self._reuses = request.reuse == "step0" and tokens is not None
        kept = reused_bytes(networks.transformer.config, request.workload, formats=networks.formats)
        self._kept_bytes = kept // (networks.ranks.shard[1] if networks.ranks.shard else 1) if self._reuses else 0
        self._kept: dict[str, tuple[list[int], ReferenceKV]] = {}
        self._ropes: dict[tuple[int, bool], Rope] = {}

    @property
    def kept_bytes(self) -> int:
        """Bytes of K/V that are used again, once the first step has made them."""
        return self._kept_bytes

    def prepare(self, prompt_embeds: Tensor, negative_embeds: Tensor | None) -> None:
        """Make what all steps use, for prompts of these lengths: a device other than the CPU is sent nothing in a step."""
        as_tokens = self._ref_tokens is not None
        for num_txt in {x.shape[1] for x in (prompt_embeds, negative_embeds) if x is not None}:
            self._rope(num_txt, with_references=as_tokens)
            if as_tokens and (self._reuses or self._reference_guidance != 1):
                self._rope(num_txt, with_references=False)

    def __call__(
        self, latents: Tensor, sigma: Tensor, *, prompt_embeds: Tensor, negative_embeds: Tensor | None, rows: list[int]
    ) -> Tensor:
        """Return the velocity (B, S_img, C) of latents (B, S_img, C) at noise level `sigma`, in float32 with guidance.

        It is called once a step. With reference guidance r, v is v_without + r (v_with - v_without): a second forward
        without references. With guidance s it is v_neg + s (v - v_neg) (Ho and Salimans, "Classifier-Free Diffusion
        Guidance"; written as in diffusers). `negative_embeds` (B, S, text_width) are for that. `rows` are the numbers
        of these images in the batch that the call began with.
        """
        device, dtype = self._networks.device, self._networks.dtype
        self._step += 1
        latents, prompt_embeds = latents.to(dtype), prompt_embeds.to(device, dtype)
        if self._guidance is None or negative_embeds is None:
            return self._guided(latents, prompt_embeds, sigma, rows=rows)
        negative_embeds = negative_embeds.to(device, dtype)
        alike = negative_embeds.shape == prompt_embeds.shape
        # K/V that are used again belong to one side, as does guidance by references
        if self._guidance.together and alike and not self._reuses and self._reference_guidance == 1:
            both = torch.cat([negative_embeds, prompt_embeds])
            joined = self._forward(latents.repeat(2, 1, 1), both, sigma, rows=rows * 2, side="both")
            negative, positive = joined.chunk(2)
        else:
            positive = self._guided(latents, prompt_embeds, sigma, rows=rows)
            negative = self._forward(latents, negative_embeds, sigma, rows=rows, side="negative")
        return negative.float() + self._guidance.scale * (positive.float() - negative.float())

    def _guided(self, latents: Tensor, txt: Tensor, sigma: Tensor, *, rows: list[int]) -> Tensor:
        """The velocity for the prompts, away from what it is without references where that is asked for."""
        velocity = self._forward(latents, txt, sigma, rows=rows, side="prompt")
        if self._reference_guidance == 1:
            return velocity
        without = self._forward(latents, txt, sigma, rows=rows, side="without").float()
        return without + self._reference_guidance * (velocity.float() - without)

    def _reference_weights(self, rows: list[int]) -> RefWeights | list[RefWeights]:
        """(tokens, weight) of each reference in this step; a list of them where those of the images differ."""
        found: list[RefWeights] = [self._weighted(self._weights[row]) for row in rows] if self._weights else [None]
        return found[0] if all(one == found[0] for one in found) else found

    def _weighted(self, weights: tuple[tuple[float, ...], ...] | None) -> RefWeights:
        now = () if weights is None else weights[min(self._step, len(weights) - 1)]
        return None if set(now) <= {1.0} else tuple(zip(self._num_tokens, now, strict=True))

    def _forward(self, latents: Tensor, txt: Tensor, sigma: Tensor, *, rows: list[int], side: str) -> Tensor:
        """`side` says which prompts `txt` are of ("without": no references): K/V that are used again belong to one."""
        transformer, num_txt = self._networks.transformer, txt.shape[1]
        uses = side != "without"
        again = self._again(rows, side)
        as_tokens = uses and self._ref_tokens is not None and again is None
        kept = _Kept(self._networks.kv_cache_dtype) if as_tokens and self._reuses else None
        graphs = transformer.execution.graphs
        forward = transformer if graphs is None else functools.partial(graphs, transformer)
        velocity: Tensor = forward(
            latents,
            txt,
            sigma,
            img_ids=self._img_ids,
            txt_ids=text_ids(num_txt),
            references=(self._isolated or again) if uses else None,
            ref_weights=self._reference_weights(rows) if uses else None,
            ref_tokens=self._ref_tokens if as_tokens else None,
            ref_ids=self._ref_ids if as_tokens else None,
            rope=self._rope(num_txt, with_references=as_tokens),
            kept=kept and kept.append,
        )
        if kept is not None:
            self._kept[side] = list(rows), ReferenceKV(layers=tuple(kept.layers))
        return velocity

    def _again(self, rows: list[int], side: str) -> ReferenceKV | None:
        """The K/V that joint references had in the first step, for the images that are left."""
        if side not in self._kept:
            return None
        had, kv = self._kept[side]
        if had != rows:
            places = [had.index(row) for row in rows]
            kv = ReferenceKV(layers=tuple(type(layer)(*(x[places] for x in layer)) for layer in kv.kv))
            self._kept[side] = list(rows), kv
        return kv

    def _rope(self, num_txt: int, *, with_references: bool) -> Rope:
        key = num_txt, with_references
        if key not in self._ropes:
            ids: Sequence[Tensor] = [text_ids(num_txt), self._img_ids]
            if with_references and self._ref_ids is not None:
                ids = [*ids, self._ref_ids]
            self._ropes[key] = self._networks.transformer.rope(torch.cat(list(ids)))
        return self._ropes[key]


class _Kept:
    """The K/V of joint references in the first step, layer by layer, quantized as soon as they are there."""

    def __init__(self, quantization: str | None) -> None:
        self.layers: list[AnyLayerKV] = []
        self._quantization = quantization

    def append(self, layer: LayerKV) -> None:
        self.layers.append(layer if self._quantization is None else quantize_layer(layer, self._quantization))
