"""Which running calls of a pipeline are to leave out their remaining steps. Knows no steps and no networks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Call", "InterruptFlag", "Interruption"]


@dataclass(kw_only=True, eq=False, slots=True)
class Call:
    """One call of a pipeline; `interrupted` is read after each step."""

    interrupted: bool = False


class _Interruptible(Protocol):
    _interruption: Interruption


class _Local(threading.local):
    """What one thread has: its running calls, innermost last, and the last one that ended."""

    def __init__(self) -> None:
        self.running: list[Call] = []
        self.last = Call()


class Interruption:
    """The running calls of one pipeline, in any number of threads.

    A thread that draws, as a callback does, reaches its own innermost call alone. A thread that does not draw, such as one
    that serves a stop button, reaches all calls that run.
    """

    def __init__(self) -> None:
        self._running: list[Call] = []
        self._lock = threading.Lock()
        self._local = _Local()

    @contextmanager
    def call(self) -> Iterator[Call]:
        """Begin a call of this thread, which nothing has interrupted yet."""
        call, local = Call(), self._local
        with self._lock:
            self._running.append(call)
        local.running.append(call)
        try:
            yield call
        finally:
            local.last = local.running.pop()
            with self._lock:
                self._running.remove(call)

    def set(self, value: bool) -> None:
        """Say whether this thread's call, or else all running calls, leave out what remains."""
        running = self._local.running
        if running:
            running[-1].interrupted = value
            return
        self._local.last.interrupted = value
        with self._lock:
            for call in self._running:
                call.interrupted = value

    def get(self) -> bool:
        """Return whether this thread's running call, or else its last one, was interrupted."""
        local = self._local
        return (local.running[-1] if local.running else local.last).interrupted


class InterruptFlag:
    """The attribute `_interrupt` of a pipeline, by which diffusers' callbacks stop: its `_interruption`, as one bool."""

    def __get__(self, owner: _Interruptible, kind: type[object] | None = None) -> bool:
        return owner._interruption.get()

    def __set__(self, owner: _Interruptible, value: bool) -> None:
        owner._interruption.set(value)
