"""What the server needs of an engine: that of this process, or one whose pipelines are in other processes.

Knows nothing of either; `limner.engine.Engine` and `limner.deploy.remote.RemoteEngine` have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from limner.config import ReferencePolicy
from limner.engine import EditRequest, EngineStats, Event
from limner.images import PreparedReference
from limner.store import StoreStats

__all__ = ["Backend", "BackendPipeline", "BackendStore"]


class BackendStore(Protocol):
    """Where K/V of references are kept, by content key."""

    def __contains__(self, key: str) -> bool: ...

    def remove(self, key: str) -> bool: ...

    def stats(self) -> StoreStats: ...


class BackendPipeline(Protocol):
    """The model that draws."""

    @property
    def default_size(self) -> tuple[int, int]: ...

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def reference_policy(self) -> ReferencePolicy: ...

    @property
    def latent_preview(self) -> Any: ...

    @property
    def digest(self) -> str: ...

    @property
    def store(self) -> BackendStore: ...

    def key_of(self, prepared: Sequence[PreparedReference]) -> str: ...


class Backend(Protocol):
    """The queue; meanings are those of `limner.engine.Engine`."""

    max_waiting: int
    max_batch: int

    @property
    def pipe(self) -> BackendPipeline: ...

    @property
    def is_alive(self) -> bool: ...

    def check(self, request: EditRequest) -> tuple[int, int]: ...

    def check_room(self, *, beside: int = 0) -> None: ...

    def submit(
        self,
        request: EditRequest,
        *,
        id: str,
        listener: Callable[[Event], None],
        owner: str = "local",
        priority: int = 0,
        timeout: float | None = None,
        accepted: bool = False,
    ) -> None: ...

    def prefill(
        self,
        references: Sequence[PreparedReference],
        *,
        id: str,
        listener: Callable[[Event], None],
        owner: str = "local",
        priority: int = 0,
        accepted: bool = False,
    ) -> None: ...

    def cancel(self, id: str) -> bool: ...

    def stats(self) -> EngineStats: ...

    def close(self, *, timeout: float = 0.0) -> list[str]: ...
