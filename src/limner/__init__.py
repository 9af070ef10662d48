"""Limner draws and edits pictures with FLUX.2-[klein]-KV-class models, and caches the K/V of references.

The public names below are imported on first use, so that `import limner` and `limner --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from limner.version import __version__

if TYPE_CHECKING:
    from limner.config import ReferencePolicy, TransformerConfig
    from limner.engine import Engine
    from limner.errors import (
        Cancelled,
        CapacityError,
        CheckpointError,
        InvalidRequest,
        LimnerError,
        MissingExtra,
        NumericalError,
        OutputError,
        RemoteError,
    )
    from limner.images import ReferenceReport
    from limner.pipeline import (
        Flux2KleinKVPipeline,
        Flux2KleinPipeline,
        Pipeline,
        PipelineOutput,
        PromptReport,
        Timings,
    )
    from limner.references import References
    from limner.requests import EditRequest, PrefillRequest
    from limner.store import ReferenceStore, RemoteTier, StoreEntry, StoreStats

__all__ = [
    "Cancelled",
    "CapacityError",
    "CheckpointError",
    "EditRequest",
    "Engine",
    "Flux2KleinInpaintPipeline",
    "Flux2KleinKVPipeline",
    "Flux2KleinPipeline",
    "InvalidRequest",
    "LimnerError",
    "MissingExtra",
    "NumericalError",
    "OutputError",
    "Pipeline",
    "PipelineOutput",
    "PrefillRequest",
    "PromptReport",
    "ReferencePolicy",
    "ReferenceReport",
    "ReferenceStore",
    "References",
    "RemoteError",
    "RemoteTier",
    "StoreEntry",
    "StoreStats",
    "Timings",
    "TransformerConfig",
    "__version__",
]

_HOMES = {
    "config": ("ReferencePolicy", "TransformerConfig"),
    "engine": ("Engine",),
    "errors": (
        "Cancelled",
        "CapacityError",
        "CheckpointError",
        "InvalidRequest",
        "LimnerError",
        "MissingExtra",
        "NumericalError",
        "OutputError",
        "RemoteError",
    ),
    "images": ("ReferenceReport",),
    "pipeline": (
        "Flux2KleinInpaintPipeline",
        "Flux2KleinKVPipeline",
        "Flux2KleinPipeline",
        "Pipeline",
        "PipelineOutput",
        "PromptReport",
        "Timings",
    ),
    "references": ("References",),
    "requests": ("EditRequest", "PrefillRequest"),
    "store": ("ReferenceStore", "RemoteTier", "StoreEntry", "StoreStats"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"limner.{module}"), name)
    raise AttributeError(f"module 'limner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
