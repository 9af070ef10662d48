"""Writes in the background: one queue and one thread for each tier of files.

Owns which writes wait, for how many bytes, and that they are done before the process ends. Does not know where a tier is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait

from limner.errors import RemoteError
from limner.references import References
from limner.store.tier import FAILURES, BackingTier, Refused

__all__ = ["BackgroundWrites"]

_logger = logging.getLogger("limner")


class BackgroundWrites:
    """The write queue of one tier.

    Entries that wait hold memory. Those in a device's memory may have up to `max_bytes` in all, those in host memory up to
    `max_host_bytes`; one entry may wait in any case.
    """

    def __init__(self, tier: BackingTier, *, max_bytes: int, max_host_bytes: int) -> None:
        self.tier = tier
        self.pending_bytes = self.num_refused = self.num_failed = 0
        self._max_bytes, self._max_host_bytes = max_bytes, max_host_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"limner-write-{tier.name}")
        self._tasks: dict[str, list[Future[None]]] = {}
        self._warned_of_full = False
        self._lock = threading.Lock()
        # `atexit` is too late: by then the executors of asyncio, which filesystems use, have ended
        if (register := getattr(threading, "_register_atexit", None)) is not None:
            with contextlib.suppress(RuntimeError):  # the process ends already
                register(_finish_at_exit, weakref.ref(self), os.getpid())

    def offer(self, references: References, *, explicit: bool = False, new: bool = True) -> None:
        """Queue an entry if the tier wants it (`BackingTier.wants`), it does not wait already, and the queue has room."""
        key = references.key
        if not self.tier.wants(key, explicit=explicit, new=new) or (key in self._tasks and not explicit):
            return
        explicit = explicit or self.tier.is_pinned(key)
        if self.try_enqueue(references, explicit=explicit):
            with self._lock:
                task = self._thread.submit(self._write, references, explicit, time.monotonic())
                self._tasks.setdefault(key, []).append(task)
            task.add_done_callback(lambda task: self._end(references, task))

    def touch(self, references: References) -> None:
        """Report that memory served an entry: the tier notes the use, or is offered what it may have lost."""
        if self.tier.is_touch_due(references.key):
            self._thread.submit(self.tier.touch, references.key)
        self.offer(references, new=False)

    def try_enqueue(self, references: References, *, explicit: bool) -> bool:
        """Reserve room in the queue. False: the queue is full, or the write would not pay.

        An explicit write is never refused: it waits until the queue is empty.
        """
        limit = self._max_host_bytes if references.device.type == "cpu" else self._max_bytes
        with self._lock:
            pending = self.pending_bytes
            is_full = pending > 0 and pending + references.nbytes > limit
            is_refused = not explicit and (is_full or not self.tier.is_worth_a_write(references))
            self.num_refused += is_refused
            warns = is_full and is_refused and not self._warned_of_full
            self._warned_of_full |= warns
        if warns:
            _logger.warning(
                "%d bytes wait for the %s tier, which is slower than prefills: new entries are not cached there for now",
                pending,
                self.tier.name,
            )
        if is_refused:
            return False
        if is_full:
            self.flush()
        with self._lock:
            self.pending_bytes += references.nbytes
        return True

    def drop(self, key: str) -> bool:
        """Remove an entry, also one that waits to be written. Returns True if there was one. Raises as `Tier.drop`."""
        with self._lock:
            tasks = list(self._tasks.get(key, ()))
        running = [task for task in tasks if not task.cancel()]
        wait(running)
        return self.tier.drop(key) or len(running) < len(tasks)

    def flush(self) -> None:
        """Wait until everything that was queued is written, or was given up."""
        self._thread.submit(lambda: None).result()

    def check_integrity(self) -> None:
        """Raise `AssertionError` if bytes wait where no write does. For tests."""
        with self._lock:
            assert self.pending_bytes >= 0
            assert self._tasks or self.pending_bytes == 0

    def _write(self, references: References, explicit: bool, queued_at: float) -> None:
        name, tier = references.key[:16], self.tier.name
        try:
            self.tier.put(references, explicit=explicit, queued_at=queued_at)
        except Refused as why:
            with self._lock:
                self.num_refused += 1
            level = logging.WARNING if explicit else logging.INFO
            _logger.log(level, "references %s are not cached in the %s tier: %s", name, tier, why)
        except FAILURES as error:
            with self._lock:
                self.num_failed += 1
            if not isinstance(error, RemoteError):  # those are logged by the remote tier
                _logger.warning("references %s were not written to the %s tier: %s", name, tier, error)

    def _end(self, references: References, task: Future[None]) -> None:
        with self._lock:
            self.pending_bytes -= references.nbytes
            self._tasks[references.key].remove(task)
            if not self._tasks[references.key]:
                del self._tasks[references.key]
            self._warned_of_full &= self.pending_bytes > 0

    def _finish(self) -> None:
        with self._lock:
            tasks = [task for of_key in self._tasks.values() for task in of_key]
        wait(tasks)


def _finish_at_exit(writes: weakref.ref[BackgroundWrites], process: int) -> None:
    """Wait for writes at the end of a process. A forked one has no thread that would do those of its parent."""
    found = writes()
    if found is not None and process == os.getpid():
        found._finish()
