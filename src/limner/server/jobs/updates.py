"""How far a job is: its updates, and those who watch them.

Works in one event loop. Knows nothing of engines and stores.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

__all__ = ["Update", "UpdateFeed"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Update:
    """The state of a job at one moment: `state` is "queued", "running" or the job's final status.

    `progress` is in [0, 1]; `previews` are small PNG files, one an image, if the model has them and a step is done.
    """

    state: str
    progress: float = 0.0
    step: int = 0
    num_inference_steps: int = 0
    previews: tuple[bytes, ...] = ()

    @property
    def is_final(self) -> bool:
        return self.state not in ("queued", "running")


class UpdateFeed:
    """The updates of one job: the last one, and a queue for each watcher."""

    def __init__(self) -> None:
        self.last = Update(state="queued")
        self.watchers: set[asyncio.Queue[Update | None]] = set()
        self._ended = asyncio.Event()

    def publish(self, update: Update) -> None:
        """Send an update to all watchers. A final one ends the feed."""
        self.last = update
        for queue in self.watchers:
            queue.put_nowait(update)
        if update.is_final:
            self._ended.set()

    def close(self) -> None:
        """End the feed without a final update: this process will not finish the job."""
        for queue in self.watchers:
            queue.put_nowait(None)
        self._ended.set()

    async def wait(self) -> None:
        """Wait for the end of the feed."""
        await self._ended.wait()

    async def watch(self, *, idle: float | None) -> AsyncGenerator[Update | None, None]:
        """Yield the last update and all that follow, and None after `idle` seconds without one.

        Ends after a final update, or when the feed is closed. Close the generator to stop watching.
        """
        queue: asyncio.Queue[Update | None] = asyncio.Queue()
        self.watchers.add(queue)
        try:
            update: Update | None = self.last
            while True:
                yield update
                if update is not None and update.is_final:
                    return
                try:
                    async with asyncio.timeout(idle):
                        update = await queue.get()
                except TimeoutError:
                    update = None
                else:
                    if update is None:
                        return
        finally:
            self.watchers.discard(queue)
