"""Draw and edit pictures with FLUX.2-[klein] models; the K/V of references are computed once and kept.

    import limner

    pipe = limner.Pipeline.from_pretrained()  # the bundled model; or "klein-9b-kv", a folder, a hub id
    out = pipe("use the background of image 2", image=["cat.png", "beach.png"])
    out.images[0].save("cat-on-beach.png")

`Pipeline` is one call at a time, `Engine` many requests at once, `References` the kept K/V, `ReferenceStore` where they
are kept. `Flux2KleinKVPipeline` and its like have the names of diffusers. Errors are `LimnerError`s that say what to do.

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
        AccessDenied,
        BudgetSpent,
        Cancelled,
        CapacityError,
        CheckpointError,
        Conflict,
        DeadlineExceeded,
        InvalidRequest,
        LimnerError,
        MissingExtra,
        Moderated,
        NotFound,
        NumericalError,
        OutputError,
        QueueFull,
        RateLimited,
        RemoteError,
    )
    from limner.images import ReferenceReport
    from limner.pipeline import (
        Flux2KleinInpaintPipeline,
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
    "AccessDenied",
    "BudgetSpent",
    "Cancelled",
    "CapacityError",
    "CheckpointError",
    "Conflict",
    "DeadlineExceeded",
    "EditRequest",
    "Engine",
    "Flux2KleinInpaintPipeline",
    "Flux2KleinKVPipeline",
    "Flux2KleinPipeline",
    "InvalidRequest",
    "LimnerError",
    "MissingExtra",
    "Moderated",
    "NotFound",
    "NumericalError",
    "OutputError",
    "Pipeline",
    "PipelineOutput",
    "PrefillRequest",
    "PromptReport",
    "QueueFull",
    "RateLimited",
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
        "AccessDenied",
        "BudgetSpent",
        "Cancelled",
        "CapacityError",
        "CheckpointError",
        "Conflict",
        "DeadlineExceeded",
        "InvalidRequest",
        "LimnerError",
        "MissingExtra",
        "Moderated",
        "NotFound",
        "NumericalError",
        "OutputError",
        "QueueFull",
        "RateLimited",
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
