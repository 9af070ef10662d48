"""How much an owner may do: requests a minute, unfinished jobs at once.

Knows nothing of HTTP and of keys, and nothing of jobs beyond how many are unfinished.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from limner.errors import InvalidRequest, RateLimited
from limner.options import ServiceOptions
from limner.server.access.keys import Owner

__all__ = ["LimitPolicy", "Limiter", "Slot"]

_TOKEN = 1 - 1e-9  # fractions of a token, added one by one, sum to a little less than one


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitPolicy:
    """Limits of one owner: requests a minute in the long run, `burst` requests at once, `concurrent` unfinished jobs."""

    requests_per_minute: float = ServiceOptions.requests_per_minute
    burst: int = round(ServiceOptions.requests_per_minute)
    concurrent: int = ServiceOptions.concurrent

    def __post_init__(self) -> None:
        if not (math.isfinite(self.requests_per_minute) and self.requests_per_minute > 0):
            raise InvalidRequest("requests_per_minute", f"{self.requests_per_minute} is not a number above 0")
        for field in ("burst", "concurrent"):
            if getattr(self, field) < 1:
                raise InvalidRequest(field, f"{getattr(self, field)} is below 1")


class Limiter:
    """Count requests (a token bucket an owner) and unfinished jobs of owners. Thread-safe; `clock` is monotonic seconds.

    An owner takes memory while a job of theirs runs, or until their bucket is full again.
    """

    def __init__(self, policy: LimitPolicy | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.policy = policy or LimitPolicy()
        self._clock = clock
        self._lock = threading.Lock()
        self._rate = self.policy.requests_per_minute / 60
        # owner's id -> (tokens left, when they were counted), least recently used first
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._running: dict[str, list[Slot]] = {}
        self._mean_seconds: float | None = None

    def admit(self, owner: Owner) -> None:
        """Count one request. Raises `RateLimited`, with the time until the next token, if the bucket is empty."""
        with self._lock:
            now = self._clock()
            self._forget_full(now)
            tokens, counted = self._buckets.get(owner.id, (float(self.policy.burst), now))
            tokens = min(self.policy.burst, tokens + (now - counted) * self._rate)
            admitted = tokens >= _TOKEN
            self._buckets[owner.id] = (max(0.0, tokens - 1) if admitted else tokens, now)
            self._buckets.move_to_end(owner.id)
            if not admitted:
                raise RateLimited(
                    f"{owner.name} may send {self.policy.requests_per_minute:g} requests a minute",
                    retry_after=_whole_seconds((_TOKEN - tokens) / self._rate),
                )

    def hold(self, owner: Owner, *, beyond_limit: bool = False) -> Slot:
        """Take one of the owner's slots for a job; return it with `Slot.release` or by leaving a `with` block.

        Raises `RateLimited` if all are taken. `beyond_limit` is for jobs that were accepted before, such as those that
        a restart finds in the store.

        `retry_after` estimates when the oldest job ends: the mean duration of jobs (a moving average over all owners)
        less the time it has run. If no job has ended yet, or it is over the mean already, the estimate is as long again
        as it has run: the median for a process of which only the age is known.
        """
        with self._lock:
            now = self._clock()
            held = self._running.get(owner.id, [])
            if len(held) >= self.policy.concurrent and not beyond_limit:
                age = now - held[0].since
                mean = self._mean_seconds
                remaining = mean - age if mean is not None and mean > age else age
                raise RateLimited(
                    f"{owner.name} has {len(held)} unfinished jobs and may have {self.policy.concurrent}",
                    retry_after=_whole_seconds(remaining),
                )
            slot = Slot(self, owner.id, now)
            self._running.setdefault(owner.id, []).append(slot)
            return slot

    def running(self, owner: Owner) -> int:
        """Number of slots that the owner has taken."""
        with self._lock:
            return len(self._running.get(owner.id, ()))

    @property
    def num_owners(self) -> int:
        """Number of owners that take memory."""
        with self._lock:
            return len(self._buckets.keys() | self._running.keys())

    def _forget_full(self, now: float) -> None:
        """Drop buckets that are full again: they equal a new bucket."""
        fills = self.policy.burst / self._rate
        while self._buckets:
            key, (_, counted) = next(iter(self._buckets.items()))
            if now - counted < fills:
                return
            del self._buckets[key]

    def _release(self, slot: Slot) -> None:
        with self._lock:
            held = self._running.get(slot.owner_id, [])
            if slot not in held:
                return
            held.remove(slot)
            if not held:
                del self._running[slot.owner_id]
            took = self._clock() - slot.since
            self._mean_seconds = took if self._mean_seconds is None else 0.8 * self._mean_seconds + 0.2 * took


class Slot:
    """The slot of one unfinished job. Releasing it again does nothing."""

    __slots__ = ("_limiter", "owner_id", "since")

    def __init__(self, limiter: Limiter, owner_id: str, since: float) -> None:
        self._limiter = limiter
        self.owner_id = owner_id
        self.since = since

    def release(self) -> None:
        self._limiter._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _whole_seconds(seconds: float) -> int:
    """Round up, so that a caller who waits as long is not refused again."""
    return max(1, math.ceil(seconds))
