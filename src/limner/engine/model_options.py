"""How a pipeline is loaded, as plain values that can be sent to other processes.

Owns the one way from options to a pipeline, for the command line and for workers. Knows nothing of parsers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from limner.config import ReferencePolicy
from limner.pipeline import Pipeline, Progress
from limner.store import ReferenceStore
from limner.weights.lora import resolve_lora

__all__ = ["ModelOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """What `Pipeline.from_pretrained` takes, and LoRAs with their strengths (file, folder or hub id, strength)."""

    model: str | None = None
    transformer: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    device: str = "cpu"
    kv_cache_dtype: str | None = None
    memory_limit: str | None = None
    parallel: str | None = None
    policy: ReferencePolicy = field(default_factory=ReferencePolicy)
    loras: tuple[tuple[str, float], ...] = ()

    def check(self) -> None:
        """Refuses what can be refused before a model is loaded."""
        self._lora_files()

    def _lora_files(self) -> list[tuple[Path, float]]:
        return [(resolve_lora(source), strength) for source, strength in self.loras]

    def load(self, *, store: ReferenceStore | None = None, progress: Progress | None = None) -> Pipeline:
        """Raises as `Pipeline.from_pretrained` and `Pipeline.load_lora_weights` do."""
        loras = self._lora_files()
        pipe = Pipeline.from_pretrained(
            self.model,
            transformer=self.transformer,
            vae=self.vae,
            text_encoder=self.text_encoder,
            torch_dtype=getattr(torch, self.dtype) if self.dtype else None,
            device=self.device,
            store=store,
            reference_policy=self.policy,
            quantize=self.quantize,
            kv_cache_dtype=self.kv_cache_dtype,
            memory_limit=self.memory_limit,
            parallel=self.parallel,
            progress=progress,
        )
        if loras:
            names = [f"{file.stem}-{i}" for i, (file, _) in enumerate(loras, start=1)]
            for name, (file, _) in zip(names, loras, strict=True):
                pipe.load_lora_weights(file, name)
            pipe.set_adapters(names, [strength for _, strength in loras])
        return pipe
