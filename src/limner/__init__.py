"""Limner: draws and edits pictures with FLUX.2-[klein]-KV-class models, and keeps the K/V of references.

The public names below are loaded when first used, so that `import limner` and `limner --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limner.config import ReferencePolicy, TransformerConfig
    from limner.errors import (
        Cancelled,
        CapacityError,
        CheckpointError,
        InvalidRequest,
        LimnerError,
        MissingExtra,
        NumericalError,
        OutputError,
    )
    from limner.images import ReferenceReport
    from limner.pipeline import Pipeline, PipelineOutput, PromptReport, Timings
    from limner.pipeline import Pipeline as Flux2KleinKVPipeline
    from limner.references import References
    from limner.store import ReferenceStore, StoreStats

__version__ = "0.1.0"

__all__ = [
    "Cancelled",
    "CapacityError",
    "CheckpointError",
    "Flux2KleinKVPipeline",
    "InvalidRequest",
    "LimnerError",
    "MissingExtra",
    "NumericalError",
    "OutputError",
    "Pipeline",
    "PipelineOutput",
    "PromptReport",
    "ReferencePolicy",
    "ReferenceReport",
    "ReferenceStore",
    "References",
    "StoreStats",
    "Timings",
    "TransformerConfig",
    "__version__",
]

_HOMES = {
    "config": ("ReferencePolicy", "TransformerConfig"),
    "errors": (
        "Cancelled",
        "CapacityError",
        "CheckpointError",
        "InvalidRequest",
        "LimnerError",
        "MissingExtra",
        "NumericalError",
        "OutputError",
    ),
    "images": ("ReferenceReport",),
    "pipeline": ("Pipeline", "PipelineOutput", "PromptReport", "Timings"),
    "references": ("References",),
    "store": ("ReferenceStore", "StoreStats"),
}


def __getattr__(name: str) -> Any:
    if name == "Flux2KleinKVPipeline":  # the name that the model card's example imports
        return __getattr__("Pipeline")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"limner.{module}"), name)
    raise AttributeError(f"module 'limner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
