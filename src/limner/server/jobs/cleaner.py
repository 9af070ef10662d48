"""Removes old results and jobs from the store, now and then, and gives back memory that is free.

It also has jobs adopted that no task brings to their end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from limner.errors import LimnerError
from limner.memory.free import collect
from limner.server.jobs.offload import Offload
from limner.server.jobs.store import JobStore
from limner.server.jobs.tasks import Tasks

__all__ = ["Cleaner"]

_logger = logging.getLogger("limner.server")


class Cleaner:
    """Clean every `every` seconds; ended jobs are known for `keep_jobs` seconds after their results have expired.

    Free memory is given back every `give_back_every` seconds.
    `keep_bytes`: the oldest jobs go where results and pictures of jobs have more; None: they may have any number.
    """

    def __init__(
        self,
        *,
        jobs: JobStore,
        offload: Offload,
        every: float,
        give_back_every: float,
        keep_jobs: float,
        keep_bytes: int | None,
        adopt_lost: Callable[[], Awaitable[None]],
    ) -> None:
        self._jobs = jobs
        self._offload = offload
        self._every = every
        self._give_back_every = give_back_every
        self._keep_jobs = keep_jobs
        self._keep_bytes = keep_bytes
        self._adopt_lost = adopt_lost
        self._tasks = Tasks()

    def start(self) -> None:
        self._tasks.spawn(self._run())
        self._tasks.spawn(self._give_back())

    async def stop(self) -> None:
        await self._tasks.cancel()

    async def _run(self) -> None:
        while True:
            try:
                await self._offload.store(self._jobs.clean, forget_seconds=self._keep_jobs)
                if self._keep_bytes is not None:
                    await self._offload.store(self._jobs.trim, self._keep_bytes)
                await self._adopt_lost()
            except (LimnerError, OSError):
                _logger.exception("old results could not be removed")
            await asyncio.sleep(self._every)

    async def _give_back(self) -> None:
        while True:
            await self._offload.run(collect)
            await asyncio.sleep(self._give_back_every)
