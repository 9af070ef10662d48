"""What the server needs of an engine and of its model, whether the pipelines are in this process or in others.

Owns the two seams: `Backend`, which `limner.engine.Engine` and `limner.deploy.remote.RemoteEngine` implement, and
`ModelView`, which `PipelineView` and `ModelCard` implement. Knows none of the four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from limner.config import ReferencePolicy
from limner.engine.events import Listener
from limner.engine.stats import EngineStats
from limner.images import PreparedReference
from limner.kinds import ModelKind
from limner.memory import Workload
from limner.pipeline.adapters import AppliedLora
from limner.requests import EditRequest, PrefillRequest
from limner.store import StoreStats

__all__ = ["Backend", "ModelView"]


class ModelView(Protocol):
    """What callers may know of a model without having it."""

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) in pixels of an image without references."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes that the model has learned to draw; none: any."""

    @property
    def kind(self) -> ModelKind:
        """What the model was trained for."""

    @property
    def reference_policy(self) -> ReferencePolicy: ...

    @property
    def text_length(self) -> int:
        """The most tokens of a prompt that the text encoder reads."""

    @property
    def previews(self) -> bool:
        """Whether the model makes previews while it draws."""

    @property
    def loras(self) -> tuple[AppliedLora, ...]:
        """The LoRAs that are loaded, with the strengths of requests that name none."""

    @property
    def digest(self) -> str:
        """Digest of all weights, with the LoRAs of requests that name none."""

    def memory_needed(self, *, num_ref: int, num_own: int, batch: int) -> int:
        """As `Pipeline.memory_needed`."""

    def memory_for(self, workload: Workload) -> int:
        """As `Pipeline.memory_for`."""


class Backend(Protocol):
    """An engine as the server sees it. `Engine` documents what the methods mean."""

    @property
    def max_waiting(self) -> int: ...

    @property
    def max_batch(self) -> int: ...

    @property
    def model(self) -> ModelView: ...

    @property
    def is_alive(self) -> bool: ...

    def opened(self, request: EditRequest) -> EditRequest: ...

    def check(self, request: EditRequest | PrefillRequest) -> tuple[int, int]: ...

    def check_room(self, *, num_admitted: int = 0) -> None: ...

    def submit(
        self,
        request: EditRequest | PrefillRequest,
        *,
        id: str,
        listener: Listener,
        owner: str = "local",
        priority: int = 0,
        timeout: float | None = None,
        accepted: bool = False,
    ) -> None: ...

    def cancel(self, id: str) -> bool: ...

    def key_of(self, prepared: Sequence[PreparedReference]) -> str: ...

    def holds(self, key: str) -> bool: ...

    def forget(self, key: str) -> bool: ...

    def stats(self) -> EngineStats: ...

    def store_stats(self) -> StoreStats: ...

    def close(self, *, timeout: float = 0.0) -> list[str]: ...
