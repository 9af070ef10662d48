"""Threads that read callers' large bodies and decode their pictures, and nothing else, with a time for each.

A decoder cannot be stopped. One that takes too long is left: its caller is answered, its thread ends when it ends. Owners
share the threads: a place that is free goes to who has fewest, and none has more than half. What takes longer than most is
given less of the processors (under Linux), since the threads that draw wait for the slowest one of them in each layer.
Knows nothing of pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from limner.cores import num_cores
from limner.errors import InvalidRequest, QueueFull

__all__ = ["Decoders"]

_logger = logging.getLogger("limner.server")
_R = TypeVar("_R")
_SHORT_SECONDS = 0.05
"""What takes longer steps back: most pictures do not."""
_NICE = 10
"""Of a processor that a thread of the engine wants too, one with this gets a tenth."""
_PATIENCE = 4
"""The time in which it only waits for a processor does not count, until this many times its seconds are over."""
_SOON = 0.01
_MOST = 8
"""Threads, by default: each has a picture in memory, and more would take the processors from those that draw."""


class Decoders:
    """At most `threads` decode at once, of one owner half of them. Each has `seconds`; `max_left` that took longer may run.

    Of one owner half of those may be left. By default `threads` are as many as processors, 2 to 8. Use it in one loop.
    """

    def __init__(self, *, threads: int | None = None, seconds: float = 30.0, max_left: int = 4) -> None:
        self._threads = max(2, min(num_cores(), _MOST)) if threads is None else threads
        self._of_owner = max(1, self._threads // 2)
        self._seconds = seconds
        self._max_left, self._left_of_owner = max_left, max(1, max_left // 2)
        self._running: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._waiting: dict[asyncio.Future[None], str] = {}
        """Who waits, the longest first, with its owner."""

    async def run(self, call: Callable[[], _R], *, field: str, owner: str = "") -> _R:
        """Make a call of an owner, for which `field` names the picture.

        Raises what the call raises, `InvalidRequest` when its time is over, and `QueueFull` while too many are left.
        """
        await self._take_place(owner)
        mine, in_all = self._left[owner], self._left.total()
        if mine >= self._left_of_owner or in_all >= self._max_left:
            self._give_place(owner)
            raise QueueFull(
                f"{field}: {mine} of your pictures, {in_all} in all, are still being decoded after their "
                f"{self._seconds:g} s; at most {self._left_of_owner} and {self._max_left} may be; send it again later"
            )
        future: asyncio.Future[_R] = asyncio.get_running_loop().create_future()
        self._start(call, future, field=field, owner=owner)
        return await future

    async def _take_place(self, owner: str) -> None:
        place = asyncio.get_running_loop().create_future()
        self._waiting[place] = owner
        self._share()
        try:
            await place
        except asyncio.CancelledError:
            if self._waiting.pop(place, None) is None and not place.cancelled():  # it was given meanwhile
                self._give_place(owner)
            raise

    def _give_place(self, owner: str) -> None:
        self._running[owner] -= 1
        if not self._running[owner]:
            del self._running[owner]
        self._share()

    def _share(self) -> None:
        """Give free places to those who wait, first to owners who have fewest."""
        while self._running.total() < self._threads:
            waiting = [(self._running[who], n, place) for n, (place, who) in enumerate(self._waiting.items())]
            fewest, _, place = min(waiting, default=(self._of_owner, 0, None))
            if place is None or fewest >= self._of_owner:
                return
            owner = self._waiting.pop(place)
            if not place.done():  # its caller has not left
                self._running[owner] += 1
                place.set_result(None)

    def _start(self, call: Callable[[], _R], future: asyncio.Future[_R], *, field: str, owner: str) -> None:
        """Work in a thread of its own, which keeps no process from ending, and settle the future in its event loop.

        The place is held until the work ends or its time is over, whether or not its caller still waits.
        """
        loop, is_left, started = future.get_loop(), False, time.monotonic()
        timer = loop.call_later(min(_SHORT_SECONDS, self._seconds), lambda: check())

        def check() -> None:
            nonlocal is_left, timer
            _step_back(thread)
            taken = time.monotonic() - started
            left = min(self._seconds - _worked(thread, taken), _PATIENCE * self._seconds - taken)
            if left > 0:
                timer = loop.call_later(max(left, _SOON), check)
                return
            is_left = True
            self._left[owner] += 1
            self._give_place(owner)
            _logger.warning("%s: reading it took over %g s; its thread is left", field, self._seconds)
            if not future.done():
                problem = f"reading it took over {self._seconds:g} s, the limit; send a smaller picture"
                future.set_exception(InvalidRequest(field, problem))

        def settle(done: Callable[[], None]) -> None:
            timer.cancel()
            if is_left:
                self._left[owner] -= 1
            else:
                self._give_place(owner)
            if not future.done():
                done()

        def decode() -> None:
            try:
                done = functools.partial(future.set_result, call())
            except Exception as error:
                done = functools.partial(future.set_exception, error)
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(settle, done)

        thread = threading.Thread(target=decode, name="limner-decoder", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the machine has no thread left
            settle(functools.partial(future.set_exception, QueueFull(f"{field}: {error}; send it again later")))


def _step_back(thread: threading.Thread) -> None:
    """Let a thread have less of the processors than others, where the system has a priority for each."""
    if sys.platform == "linux" and thread.is_alive() and thread.native_id is not None:
        with contextlib.suppress(OSError):  # it has just ended, or this is not allowed here
            os.setpriority(os.PRIO_PROCESS, thread.native_id, _NICE)


def _worked(thread: threading.Thread, taken: float) -> float:
    """Return the seconds that a thread had a processor or waited for other things than one: `taken` where none is told."""
    try:
        waited = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[1]
    except (OSError, IndexError):
        return taken
    return taken - int(waited) / 1e9
