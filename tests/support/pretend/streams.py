"""Streams, events and the order of work on a pretended device, and the races that this order allows.

Everything runs at once and in the order of the calls, so values never show a missing wait. Vector clocks do: each stream
counts its operations, and knows of every other stream up to where it has waited for it; so does the host. An operation
that reads what another stream wrote without having waited for that, or overwrites what another still reads, is a race.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["HOST", "Event", "Race", "Stream", "Streams", "Uses"]

HOST = -1
Clock = dict[int, int]
"""By stream, how many of its operations are known to be done."""


class Race(AssertionError):
    """Two streams, or a stream and the host, use the same memory, and neither waits for the other."""


@dataclass(eq=False)
class Uses:
    """Who wrote some memory last, and who has read it since: streams or the host, and places in their order.

    `owner` is the stream where it was allocated, None for host memory; `recorded` are those of `record_stream`.
    """

    owner: Stream | None = None
    writer: tuple[int, int] | None = None
    readers: Clock = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


class Streams:
    """The streams of a device, which of them is the present one of a thread, and what each knows of the others.

    `waited` is called with what made the host wait.
    """

    def __init__(self, waited: Callable[[str], None]) -> None:
        self.waited, self.all, self.host = waited, list[Stream](), Clock()
        self._numbers, self._local = itertools.count(), threading.local()
        self.default = Stream(self)

    def number(self) -> int:
        return next(self._numbers)

    @property
    def current(self) -> Stream:
        return getattr(self._local, "stream", self.default)

    @current.setter
    def current(self, stream: Stream) -> None:
        self._local.stream = stream

    def read(self, uses: Uses, who: Stream | None, what: str) -> None:
        """A stream, or (None) the host, reads some memory."""
        self._check(uses.writer, who, "{0} reads what {1} writes, without waiting for it: " + what)
        uses.readers[_id(who)] = self._tick(who)

    def write(self, uses: Uses, who: Stream | None, what: str) -> None:
        for reader in uses.readers.items():
            self._check(reader, who, "{0} overwrites what {1} reads, without waiting for it: " + what)
        self._check(uses.writer, who, "{0} and {1} write to the same memory: " + what)
        uses.readers, uses.writer = {}, (_id(who), self._tick(who))

    def free(self, uses: Uses) -> None:
        """Memory goes back to the stream where it was allocated: other streams have to be done with it, or recorded."""
        for other in [*uses.readers.items(), *([uses.writer] if uses.writer else [])]:
            if uses.owner is not None and other[0] not in uses.recorded:
                self._check(other, uses.owner, "memory of {0} is freed while {1} uses it")

    def synchronize(self, *_: Any) -> None:
        """The host waits for everything."""
        self.waited("cuda.synchronize")
        for stream in self.all:
            _merge(self.host, stream.clock)

    def is_done(self, clock: Clock) -> bool:
        """Whether the host has waited for all of this."""
        return all(self.host.get(who, 0) >= place for who, place in clock.items())

    def _check(self, other: tuple[int, int] | None, who: Stream | None, problem: str) -> None:
        """Raise `Race` unless an operation of a stream (None: of the host) comes after another one."""
        if other is None or other[0] in (HOST, _id(who)):  # what is queued comes after what the host did before
            return
        known = max(self.host.get(other[0], 0), 0 if who is None else who.clock.get(other[0], 0))
        if known < other[1]:
            raise Race(problem.format(_name(_id(who)), _name(other[0])))

    def _tick(self, who: Stream | None) -> int:
        if who is None:
            return 0
        who.clock[who.number] += 1
        return who.clock[who.number]


class Stream:
    """As `torch.cuda.Stream`; also the context that `torch.cuda.stream` returns."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.number = streams, streams.number()
        self.clock: Clock = {self.number: 0}
        self._before: list[Stream] = []
        streams.all.append(self)

    @property
    def now(self) -> tuple[int, int]:
        """The last operation that was queued."""
        return self.number, self.clock[self.number]

    def wait_stream(self, other: Stream) -> None:
        _merge(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        _merge(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.streams)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.streams.waited("stream.synchronize")
        _merge(self.streams.host, self.clock)

    def __enter__(self) -> Stream:
        self._before.append(self.streams.current)
        self.streams.current = self
        return self

    def __exit__(self, *_: object) -> None:
        self.streams.current = self._before.pop()


class Event:
    """As `torch.cuda.Event`, with the times of the host."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.clock, self.at = streams, Clock(), 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.clock, self.at = dict((stream or self.streams.current).clock), time.perf_counter() * 1e3

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.streams.current).wait_event(self)

    def query(self) -> bool:
        return self.streams.is_done(self.clock)

    def synchronize(self) -> None:
        if not self.query():
            self.streams.waited("event.synchronize")
        _merge(self.streams.host, self.clock)

    def elapsed_time(self, other: Event) -> float:
        if not (self.query() and other.query()):
            raise RuntimeError("the time of an event that is not done: synchronize it first")
        return other.at - self.at


def _merge(clock: Clock, other: Clock) -> None:
    for who, place in other.items():
        clock[who] = max(clock.get(who, 0), place)


def _id(who: Stream | None) -> int:
    return HOST if who is None else who.number


def _name(who: int) -> str:
    return {HOST: "the host", 0: "the main stream"}.get(who, f"stream {who}")
