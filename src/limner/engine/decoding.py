"""Decodes the pictures of one batch while the engine's thread takes the steps of the next, on a CPU.

Owns the thread for that, and knows what the batch that is decoded there may take in memory. Knows no queue and no pipeline.
A batch is handed over only where another one waits: with all processors its own pictures are there sooner. The thread has
one processor; the steps keep all of theirs (docs/log.md has what was tried).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

__all__ = ["Decoder"]


class Decoder:
    """One thread that decodes one batch at a time. Its methods are for the engine's thread alone."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None
        self._num_bytes = 0

    @property
    def is_free(self) -> bool:
        """Whether nothing is decoded now."""
        return self._last is None or self._last.done()

    @property
    def num_bytes(self) -> int:
        """What the batch that is decoded now may take in memory."""
        return 0 if self.is_free else self._num_bytes

    def start(self, work: Callable[[], None], *, num_bytes: int) -> None:
        """Run `work`, which catches what it raises, in the thread. Only while it is free."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="limner-decode", initializer=_use_one_processor)
            self._thread.submit(int).result()
            torch.set_num_threads(
                torch.get_num_threads()
            )  # threads that begin later get what was set last, by any thread
        self._num_bytes = num_bytes
        self._last = self._thread.submit(work)

    def wait(self) -> None:
        """Wait until it is free."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait until it is free, and end the thread."""
        if self._thread is not None:
            self._thread.shutdown()


def _use_one_processor() -> None:
    torch.get_num_threads()  # the first use in a thread takes what was set last, by any thread
    torch.set_num_threads(1)
