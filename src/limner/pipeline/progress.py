"""Progress of a call and the seconds of its parts. Knows nothing of the parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Lap", "Progress", "Stopwatch", "Timings", "silent"]

Progress = Callable[[str, int, int], None]
"""Called with a part's name, how much of it is done, and of how much."""


def silent(part: str, done: int, of: int) -> None:
    """Report nothing: the progress of callers that give none."""


class Lap:
    """A part between two marks: clock times, or events on a CUDA stream."""

    __slots__ = ("_end", "_start")

    def __init__(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> None:
        self._start, self._end = start, end

    @property
    def seconds(self) -> float:
        """Seconds from mark to mark; on CUDA it waits as `wait` does."""
        self.wait()
        start, end = self._start, self._end
        if isinstance(start, float) and isinstance(end, float):
            return end - start
        assert not isinstance(start, float)
        assert not isinstance(end, float)
        return float(start.elapsed_time(end)) / 1000

    def wait(self) -> None:
        """Wait until the work before the second mark is done. Of clock times it is."""
        if not isinstance(self._end, float) and not self._end.query():  # type: ignore[no-untyped-call]
            self._end.synchronize()


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds of each part of a call: prompts to tokens, references to K/V, each step, latents to pictures.

    What puts pictures back into their canvases counts as `decode`.
    """

    text: float
    references: float
    steps: tuple[float, ...]
    decode: float

    @classmethod
    def of(cls, *, text: Lap, references: Lap, steps: Sequence[Lap], decode: Lap) -> Timings:
        """Return the seconds of laps. On CUDA it waits for the last one, and so for all."""
        last = decode.seconds
        return cls(
            text=text.seconds, references=references.seconds, steps=tuple(step.seconds for step in steps), decode=last
        )

    @property
    def total(self) -> float:
        return self.text + self.references + sum(self.steps) + self.decode


class Stopwatch:
    """Time of consecutive parts, each until the work that was queued on the device is done.

    On CUDA marks are events, so that measuring waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = self._mark()

    def lap(self) -> Lap:
        """Return the part since the last lap, or since the start."""
        before, self._last = self._last, self._mark()
        return Lap(before, self._last)

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
