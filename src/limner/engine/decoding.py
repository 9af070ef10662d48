"""Decodes the pictures of one batch while the engine's thread takes the steps of the next, on a CPU.

Owns the thread for that, and knows what the batch that is decoded there may take in memory. Knows no queue and no pipeline.
A batch is handed over only where another one waits: with all processors its own pictures are there sooner. The thread has
one processor; the steps keep all of theirs (docs/log.md has what was tried).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

__all__ = ["Decoder"]


class Decoder:
    """One thread that decodes one batch at a time. Its methods are for the engine's thread alone.

    As the engine's thread it ends with the process, whatever it decodes then.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._free = threading.Event()
        self._free.set()
        self._num_bytes = 0

    @property
    def is_free(self) -> bool:
        """Whether nothing is decoded now."""
        return self._free.is_set()

    @property
    def num_bytes(self) -> int:
        """What the batch that is decoded now may take in memory."""
        return 0 if self.is_free else self._num_bytes

    def start(self, work: Callable[[], None], *, num_bytes: int) -> None:
        """Run `work`, which catches what it raises, in the thread; here, if there can be none. Only while it is free."""
        if self._thread is None:
            ready, thread = threading.Event(), threading.Thread(target=self._run, name="limner-decode", daemon=True)
            self._work.put(ready.set)
            try:
                thread.start()
            except RuntimeError:  # the process ends, or has all threads that it may have
                self._work = SimpleQueue()
                work()
                return
            ready.wait()
            self._thread = thread
            # threads that begin later get what was set last, by any thread
            torch.set_num_threads(torch.get_num_threads())
            self._free.wait()
        self._num_bytes = num_bytes
        self._free.clear()
        self._work.put(work)

    def wait(self) -> None:
        """Wait until it is free."""
        self._free.wait()

    def close(self) -> None:
        """Wait until it is free, and end the thread."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()

    def _run(self) -> None:
        torch.get_num_threads()  # the first use in a thread takes what was set last, by any thread
        torch.set_num_threads(1)
        while (work := self._work.get()) is not None:
            try:
                work()
            finally:
                del work  # and what it holds
                self._free.set()
