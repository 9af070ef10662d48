"""The batches that are being drawn: usually one, and the shorter ones that it lets through between two of its steps.

Knows no queue and no pipeline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from limner.engine.rows import Rows
from limner.pipeline import Timings

__all__ = ["Run"]


@dataclass(kw_only=True, eq=False, slots=True)
class Run:
    """A batch that is being drawn, and what it may take in memory. Times are in seconds of the engine's clock.

    It lets others through for half of the time at most: after a pause it runs for as long as that took.
    """

    rows: Rows
    num_steps: int
    num_bytes: int
    steps_done: int = 0
    _pauses: dict[int, float] = field(default_factory=dict)
    """Seconds of the pauses, by the number of the step before."""
    _next_pause: float = 0.0

    @property
    def paused(self) -> float:
        """Seconds of all pauses."""
        return sum(self._pauses.values())

    @property
    def work_left(self) -> int:
        """Pixels that are left to draw, as in `Admission.work`."""
        return sum(job.step_work for job in self.rows.jobs) * (self.num_steps - self.steps_done)

    def may_pause(self, now: float) -> bool:
        """Whether it has run long enough since its last pause, and is not at its end."""
        return self.steps_done < self.num_steps and now >= self._next_pause

    def pause(self, start: float, end: float) -> None:
        """Note a pause after the last step."""
        self._pauses[self.steps_done - 1] = end - start
        self._next_pause = max(self._next_pause, end + (end - start))

    def never_pause(self) -> None:
        """Let nothing through any more."""
        self._next_pause = math.inf

    def without_pauses(self, timings: Timings) -> Timings:
        """Return timings whose steps have the pauses in them as those of the steps alone."""
        steps = tuple(max(0.0, taken - self._pauses.get(i, 0.0)) for i, taken in enumerate(timings.steps))
        return replace(timings, steps=steps)
