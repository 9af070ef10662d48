"""The facts of a model that a server and its admission need: read from a pipeline, or sent by a replica.

Owns `PipelineView` and `ModelCard`, the two `ModelView`s. Knows no queue and no process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from limner.config import ModelGeometry, ReferencePolicy
from limner.grid import PIXELS
from limner.images import PreparedReference
from limner.kinds import ModelKind
from limner.memory import Formats, Workload, call_bytes, control_bytes
from limner.pipeline import Pipeline
from limner.pipeline.adapters import AppliedLora
from limner.references import reference_key

__all__ = ["ModelCard", "PipelineView"]


class PipelineView:
    """The `ModelView` of a pipeline in this process. `digest` reads all weights the first time."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe

    @property
    def default_size(self) -> tuple[int, int]:
        return self._pipe.default_size

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return self._pipe.sizes

    @property
    def kind(self) -> ModelKind:
        return self._pipe.kind

    @property
    def reference_policy(self) -> ReferencePolicy:
        return self._pipe.reference_policy

    @property
    def text_length(self) -> int:
        return self._pipe.text_encoder.max_length

    @property
    def previews(self) -> bool:
        return self._pipe.latent_preview is not None

    @property
    def loras(self) -> tuple[AppliedLora, ...]:
        return self._pipe.networks.adapters.loaded

    @property
    def digest(self) -> str:
        return self._pipe.digest

    def memory_needed(self, *, num_ref: int, num_own: int, batch: int) -> int:
        """As `Pipeline.memory_needed`."""
        return self._pipe.memory_needed(num_ref=num_ref, num_own=num_own, batch=batch)

    def memory_for(self, workload: Workload) -> int:
        """As `Pipeline.memory_for`."""
        return self._pipe.memory_for(workload)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """The `ModelView` of a pipeline in another process, as plain values, and what content keys depend on.

    `memory_bytes` is what calls may take there in addition to the weights.
    """

    digest: str
    reference_weights: str
    dtype: str
    arithmetic: str
    kind: ModelKind
    kv_cache_dtype: str | None
    reference_policy: ReferencePolicy
    default_size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    text_length: int
    previews: bool
    loras: tuple[AppliedLora, ...]
    geometry: ModelGeometry
    formats: Formats
    whole_pixels: int
    memory_bytes: int

    @classmethod
    def of(cls, pipe: Pipeline, *, memory_bytes: int) -> ModelCard:
        """The card of a pipeline; reads all weights the first time."""
        return cls(
            digest=pipe.digest,
            reference_weights=pipe.reference_weights,
            dtype=str(pipe.dtype).removeprefix("torch."),
            arithmetic=pipe.kernel,
            kind=pipe.kind,
            kv_cache_dtype=pipe.kv_cache_dtype,
            reference_policy=pipe.reference_policy,
            default_size=pipe.default_size,
            sizes=pipe.sizes,
            text_length=pipe.text_encoder.max_length,
            previews=pipe.latent_preview is not None,
            loras=pipe.networks.adapters.loaded,
            geometry=pipe.geometry,
            formats=pipe.formats,
            whole_pixels=pipe.autoencoder.whole_pixels,
            memory_bytes=memory_bytes,
        )

    def memory_needed(self, *, num_ref: int, num_own: int, batch: int) -> int:
        """As `Pipeline.memory_needed`."""
        return call_bytes(
            self.geometry.transformer,
            self.geometry.autoencoder,
            num_ref=num_ref,
            num_own=num_own,
            batch=batch,
            formats=self.formats,
            whole_pixels=self.whole_pixels,
            reference_pixels=min(num_ref * PIXELS**2, self.reference_policy.pixels),
            joint=self.kind.joint,
        )

    def memory_for(self, workload: Workload) -> int:
        """As `Pipeline.memory_for`."""
        needed = self.memory_needed(num_ref=workload.num_ref, num_own=workload.num_own, batch=workload.batch)
        geometry = self.geometry
        return needed + control_bytes(
            geometry.transformer, geometry.autoencoder, workload, formats=self.formats, needed=needed
        )

    def key_of(self, prepared: Sequence[PreparedReference]) -> str:
        """As `Pipeline.key_of`, in the arithmetic of the process that made the card."""
        return reference_key(
            weights=self.reference_weights,
            dtype=getattr(torch, self.dtype),
            arithmetic=self.arithmetic,
            digests=[p.report.digest for p in prepared],
            quantization=None if self.kind.joint else self.kv_cache_dtype,
            joint=self.kind.joint,
        )
