"""The three networks of a model: where they run, in which formats, and what identifies their weights.

Knows modules, digests and memory. Does not know prompts, pictures or stores.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from limner.config import AutoencoderConfig, ModelGeometry, TextConfig
from limner.errors import InvalidRequest
from limner.grid import PIXELS
from limner.kinds import ModelKind
from limner.memory import Formats, Workload, kv_bytes, phase_bytes
from limner.memory.residency import Residency
from limner.memory.staged import Staged
from limner.model.autoencoder import Autoencoder
from limner.model.gpu.products import right_products
from limner.model.int8 import packs_weights, tile_threads
from limner.model.shards import Ranks
from limner.model.text_encoder import TextEncoder
from limner.model.transformer import Transformer
from limner.pipeline.adapters import Adapters
from limner.weights.digest import WeightDigests

__all__ = ["Networks"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Networks:
    """The networks of a pipeline at one moment, with their LoRAs, digests and memory limit.

    `kind` is what the weights were trained for. `kv_cache_dtype` is the format of cached K/V: "int8", "fp8", or None for
    the dtype of the arithmetic; the tokens of joint references have the latter.
    """

    transformer: Transformer
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    adapters: Adapters
    digests: WeightDigests
    residency: Residency
    kv_cache_dtype: str | None
    kind: ModelKind

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def ranks(self) -> Ranks:
        """The processes that the transformer is divided among."""
        return self.transformer.execution.ranks

    @property
    def arithmetic(self) -> str:
        """What decides the last bits of a result besides weights: device, attention kernel, dtype of matrix products, and
        the layout of the autoencoder's maps where it is not torch's plain one."""
        own = self.autoencoder.arithmetic
        return self.transformer.arithmetic if own is None else f"{self.transformer.arithmetic}/{own}"

    def latents_shape(self, workload: Workload) -> tuple[int, int, int, int]:
        """Return the shape (B, 4 C, h, w) of the latents of a call."""
        width, height = workload.size
        return workload.batch, self.transformer.config.in_channels, height // PIXELS, width // PIXELS

    @property
    def reference_shard(self) -> tuple[int, int] | None:
        """(rank, size) of the heads of cached K/V in this process, or None for all; tokens are whole everywhere."""
        return None if self.kind.joint else self.ranks.shard

    # identity

    def reference_weights(self) -> str:
        """Return the digest of what K/V of references, or a joint model's tokens, depend on, apart from arithmetic and
        pictures.

        Tokens depend on the autoencoder alone, so LoRAs leave them as they are.
        """
        return self.token_weights() if self.kind.joint else self._drawing_weights()

    def token_weights(self) -> str:
        """Return the digest of what the tokens of a picture depend on."""
        return _joined_digest(self.digests.of(self.autoencoder), self._autoencoder_geometry(), "tokens")

    def _autoencoder_geometry(self) -> str:
        network = {name: value for name, value in self.autoencoder.network.config.items() if not name.startswith("_")}
        return json.dumps(network, sort_keys=True, default=str)

    def _drawing_weights(self) -> str:
        """Return the digest of transformer and autoencoder.

        It covers the weights of transformer (LoRAs and their strengths included) and autoencoder, and their geometry:
        rotary base and axes, the epsilons and groups of norms are in no tensor.
        """
        network = {name: value for name, value in self.autoencoder.network.config.items() if not name.startswith("_")}
        geometry = json.dumps([asdict(self.transformer.config), network], sort_keys=True, default=str)
        return _joined_digest(self.adapters.weights_digest(), self.digests.of(self.autoencoder), geometry)

    def digest(self) -> str:
        """Return the digest of all weights."""
        return _joined_digest(self._drawing_weights(), self.digests.of(self.text_encoder))

    # memory

    @property
    def geometry(self) -> ModelGeometry:
        """Geometry of the three networks."""
        text = TextConfig.from_transformers(self.text_encoder.network.config.to_dict())
        return ModelGeometry(
            transformer=self.transformer.config,
            text_encoder=replace(text, num_used=len(self.text_encoder.network.layers)),
            autoencoder=AutoencoderConfig.from_diffusers(dict(self.autoencoder.network.config)),
        )

    @property
    def formats(self) -> Formats:
        """The formats of weights, K/V and products, for `limner.memory`."""
        parts = {"transformer": self.transformer, "autoencoder": self.autoencoder, "text_encoder": self.text_encoder}
        return Formats(
            itemsize=self.dtype.itemsize,
            quantize=self.transformer.quantization,
            quantize_text=self.text_encoder.quantization is not None,
            kv=self.kv_cache_dtype,
            packed=self.device.type == "cpu" and packs_weights(self.transformer, self.text_encoder),
            tile_threads=tile_threads() if self.device.type == "cpu" else 0,
            anonymous=frozenset(name for name, part in parts.items() if not self.residency.mapped(part)),
        )

    def kv_bytes(self, num_ref: int) -> int:
        """Return the bytes of what is kept of `num_ref` reference tokens in this process."""
        config, joint = self.transformer.config, self.kind.joint
        whole = kv_bytes(config, num_ref, itemsize=self.dtype.itemsize, kv=self.kv_cache_dtype, joint=joint)
        return whole // (self.reference_shard[1] if self.reference_shard else 1)

    def working(self, phase: str, workload: Workload, *, cached: int = 0) -> AbstractContextManager[None]:
        """Keep the weights of a phase's network in memory. `cached` bytes stay allocated after the phase."""
        networks: dict[str, nn.Module] = {"encode text": self.text_encoder, "encode references": self.autoencoder}
        network = networks.get(phase, self.autoencoder if phase == "decode" else self.transformer)
        growth = phase_bytes(self.geometry, workload, formats=self.formats, whole_pixels=self.autoencoder.whole_pixels)
        return self.residency.working(network, growth=growth[phase] + cached)

    def adopt(self) -> None:
        """Put the networks under the memory limit, as their weights are now."""
        transformer, text = self.transformer, self.text_encoder.network
        self.residency.adopt(transformer, [*transformer.transformer_blocks, *transformer.single_transformer_blocks])
        self.residency.adopt(self.text_encoder, list(text.layers), tables=[text.embed_tokens], hooks=True)
        self.residency.adopt(self.autoencoder)
        if isinstance(self.residency, Staged):  # now it is known where the transformer runs
            transformer.settle()
            if self.text_encoder.quantization is not None:  # its weights are in host memory between its turns
                right_products(transformer.device, self.text_encoder.dtype)

    def to(self, target: torch.device | torch.dtype) -> None:
        """Move the networks to a device, or cast them to a dtype. Raises `InvalidRequest`."""
        if isinstance(self.residency, Staged):
            raise InvalidRequest(
                "to", "weights with a memory_limit stay where they are; give device and dtype to from_pretrained"
            )
        is_cast = isinstance(target, torch.dtype)
        with self.adapters.removed():  # and attached again in the new place
            for part in (self.transformer, self.autoencoder, self.text_encoder):
                with nullcontext() if is_cast else self.digests.moving(part):
                    part.to(target)
                    if isinstance(part, (Transformer, TextEncoder)):
                        part.settle()
        self.text_encoder.rebuild_rotary()
        self.adopt()


def _joined_digest(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()
