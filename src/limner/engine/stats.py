"""The counts of an engine. Knows nothing of how they come about."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["EngineStats"]


@dataclass(kw_only=True, slots=True)
class EngineStats:
    """Requests that wait and run now, and counts since the engine was made."""

    waiting: int = 0
    running: int = 0
    accepted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    batches: int = 0
    images: int = 0
    prefills: int = 0
    """Prefills that were computed, for an edit or alone."""
    busy_seconds: float = 0.0
    waited_seconds: float = 0.0
    batch_sizes: dict[int, int] = field(default_factory=dict)
    """How many batches had how many images."""

    def count_batch(self, num_images: int, *, prefilled: bool) -> None:
        """Count a batch that was drawn, and its prefill if one was computed."""
        self.batches += 1
        self.images += num_images
        self.prefills += prefilled
        self.batch_sizes[num_images] = self.batch_sizes.get(num_images, 0) + 1
