"""Progress of a call and the seconds of its parts. Knows nothing of the parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Progress", "Stopwatch", "Timings", "silent"]

Progress = Callable[[str, int, int], None]
"""Called with a part's name, how much of it is done, and of how much."""


def silent(part: str, done: int, of: int) -> None:
    """Report nothing: the progress of callers that give none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds of each part of a call: prompts to tokens, references to K/V, each step, latents to pictures."""

    text: float
    references: float
    steps: tuple[float, ...]
    decode: float

    @property
    def total(self) -> float:
        return self.text + self.references + sum(self.steps) + self.decode


class Stopwatch:
    """Time of consecutive parts, each until the work that was queued on the device is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap, or since the start."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start, self._start = self._start, time.perf_counter()
        return self._start - start
