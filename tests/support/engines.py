"""A listener of an engine that tests wait for, and what an engine's pictures are compared by."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from limner.engine import EditResult, Event, Failed, Finished, Prefilled


class Heard:
    """A listener that keeps what it hears and can be waited for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, (Finished, Failed, Prefilled)):
            self._ended.set()

    def end(self) -> Event:
        assert self._ended.wait(60)
        return self.events[-1]

    def result(self) -> EditResult:
        end = self.end()
        assert isinstance(end, Finished), end
        return end.result

    def error(self) -> Exception:
        end = self.end()
        assert isinstance(end, Failed), end
        return end.error


def same(a: Any, b: Any) -> bool:
    """Whether two pictures are equal up to rounding: other batches, and decoding beside others, round differently."""
    return bool(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1)
