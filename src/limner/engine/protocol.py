"""What the server needs of an engine: that of this process, or one whose pipelines are in other processes.

Knows nothing of either; `limner.engine.Engine` and `limner.deploy.remote.RemoteEngine` have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from limner.engine import EngineStats, Event, ModelView
from limner.images import PreparedReference
from limner.requests import EditRequest, PrefillRequest
from limner.store import StoreStats

__all__ = ["Backend"]


class Backend(Protocol):
    """The queue; meanings are those of `limner.engine.Engine`."""

    max_waiting: int
    max_batch: int

    @property
    def model(self) -> ModelView: ...

    @property
    def is_alive(self) -> bool: ...

    def check(self, request: EditRequest) -> tuple[int, int]: ...

    def check_room(self, *, beside: int = 0) -> None: ...

    def submit(
        self,
        request: EditRequest | PrefillRequest,
        *,
        id: str,
        listener: Callable[[Event], None],
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
