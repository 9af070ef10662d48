"""Threads that decode callers' pictures, and nothing else, with a time for each picture.

A decoder cannot be stopped. One that takes too long is left: its caller is answered, its thread ends when it ends. Knows
nothing of pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from limner.errors import InvalidRequest, QueueFull

__all__ = ["Decoders"]

_logger = logging.getLogger("limner.server")
_R = TypeVar("_R")


class Decoders:
    """At most `threads` decode at once. Each has `seconds`; at most `max_left` that took longer may still run.

    Use it in one event loop.
    """

    def __init__(self, *, threads: int = 4, seconds: float = 30.0, max_left: int = 4) -> None:
        self._places = asyncio.Semaphore(threads)
        self._seconds = seconds
        self._max_left = max_left
        self._num_left = 0

    async def run(self, call: Callable[[], _R], *, field: str) -> _R:
        """Make a call, for which `field` names the picture.

        Raises what the call raises, `InvalidRequest` when its time is over, and `QueueFull` while too many are left.
        """
        await self._places.acquire()
        if self._num_left >= self._max_left:
            self._places.release()
            raise QueueFull(
                f"{field}: {self._num_left} pictures are still being decoded after their {self._seconds:g} s; at most "
                f"{self._max_left} may be; send it again later"
            )
        future: asyncio.Future[_R] = asyncio.get_running_loop().create_future()
        self._start(call, future, field=field)
        return await future

    def _start(self, call: Callable[[], _R], future: asyncio.Future[_R], *, field: str) -> None:
        """Work in a thread of its own, which keeps no process from ending, and settle the future in its event loop.

        The place is held until the work ends or its time is over, whether or not its caller still waits.
        """
        loop, is_left = future.get_loop(), False

        def leave() -> None:
            nonlocal is_left
            is_left = True
            self._num_left += 1
            self._places.release()
            _logger.warning("%s: decoding took over %g s; its thread is left", field, self._seconds)
            if not future.done():
                problem = f"decoding took over {self._seconds:g} s, the limit; scale it down, or save it again as a PNG"
                future.set_exception(InvalidRequest(field, problem))

        def settle(done: Callable[[], None]) -> None:
            timer.cancel()
            if is_left:
                self._num_left -= 1
            else:
                self._places.release()
            if not future.done():
                done()

        def decode() -> None:
            try:
                done = functools.partial(future.set_result, call())
            except Exception as error:
                done = functools.partial(future.set_exception, error)
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(settle, done)

        timer = loop.call_later(self._seconds, leave)
        try:
            threading.Thread(target=decode, name="limner-decoder", daemon=True).start()
        except RuntimeError as error:  # the machine has no thread left
            settle(functools.partial(future.set_exception, QueueFull(f"{field}: {error}; send it again later")))
