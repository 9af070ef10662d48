"""Blocking work away from the event loop: thread pools that all parts of a server share, and repeated attempts.

Knows nothing of what runs in them.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from limner.server.jobs.decoders import Decoders
from limner.server.jobs.storage import StorageUnavailable, may_pass

__all__ = ["LONGEST_PAUSE", "Offload", "pauses"]

_logger = logging.getLogger("limner.server")
_P = ParamSpec("_P")
_R = TypeVar("_R")
_FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


class Offload:
    """One thread for the job store, four for files, results and checks, and the decoders. Use it in one event loop."""

    def __init__(self, decoders: Decoders | None = None) -> None:
        self._decoders = decoders or Decoders()
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="limner-files")
        # one, since SQLite writes one at a time anyway
        self._store_thread = ThreadPoolExecutor(1, thread_name_prefix="limner-jobs")

    async def store(self, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Make a call of the job store."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._store_thread, functools.partial(call, *args, **kwargs))

    async def run(self, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Do work on stored files, results and checks."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(call, *args, **kwargs))

    async def decode(self, call: Callable[[], _R], *, field: str, owner: str) -> _R:
        """Decode what an owner sent as `field`, in threads that no other work waits for; see `Decoders.run`."""
        return await self._decoders.run(call, field=field, owner=owner)

    async def with_retry(self, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Do work on stored files, again and again while it lacks what may come back, so that no picture is lost.

        That is a storage that does not answer, room on the disk, or file descriptors.
        """
        for pause in pauses():
            try:
                return await self.run(call, *args, **kwargs)
            except (StorageUnavailable, OSError) as error:
                if isinstance(error, OSError) and not may_pass(error):
                    raise
                _logger.warning("%s; tried again in %g s", error, pause)
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Wait for the work that runs; work that has not begun is dropped, except calls of the job store.

        Decoding is not waited for.
        """
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._store_thread.shutdown(wait=True)


def pauses() -> Iterator[float]:
    """Seconds between attempts, without end: twice as long each time, up to `LONGEST_PAUSE`."""
    pause = _FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)
