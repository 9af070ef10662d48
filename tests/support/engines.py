"""A listener of an engine that tests wait for."""

from __future__ import annotations

import threading

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
