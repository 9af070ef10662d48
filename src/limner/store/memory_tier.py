"""References in the memory of one device, or of the host. Knows no other tier."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from limner.references import References
from limner.store.entries import StoreEntry
from limner.store.tier import Refused, TierStats

__all__ = ["MemoryTier"]


@dataclass(slots=True)
class _Cached:
    references: References
    used: float


class MemoryTier:
    """A byte budget of References on one device, least recently used first.

    `pinned` is shared by the memory tiers of a store, because a pin holds on every device. `on_evict` is given each entry
    that had to go, after the lock was released.
    """

    def __init__(
        self, name: str, device: torch.device, budget: int, *, pinned: set[str], on_evict: Callable[[References], None]
    ) -> None:
        self.name, self.device, self.budget = name, device, budget
        self.nbytes = 0
        self._pinned, self._on_evict = pinned, on_evict
        self._cached: OrderedDict[str, _Cached] = OrderedDict()
        self._evictions = 0
        self._lock = threading.RLock()

    def get(self, key: str) -> References | None:
        with self._lock:
            cached = self._cached.get(key)
            if cached is None:
                return None
            cached.used = time.time()
            self._cached.move_to_end(key)
            return cached.references

    def has_room(self, references: References) -> bool:
        """Return True if an entry fits alongside the pinned ones."""
        with self._lock:
            others = [c.references.nbytes for k, c in self._cached.items() if k in self._pinned and k != references.key]
        return references.nbytes <= self.budget - sum(others)

    def put(self, references: References, *, explicit: bool = False, queued_at: float = 0.0) -> None:
        with self._lock:
            if not self.has_room(references):
                raise Refused(f"it has {references.nbytes} bytes, the budget of {self.name} is {self.budget}")
            self._pop(references.key)
            self._cached[references.key] = _Cached(references, time.time())
            self.nbytes += references.nbytes
            evicted = []
            for key in [key for key in self._cached if key not in self._pinned and key != references.key]:
                if self.nbytes <= self.budget:
                    break
                evicted += self._pop(key)
            self._evictions += len(evicted)
        for victim in evicted:
            self._on_evict(victim)

    def drop(self, key: str) -> bool:
        with self._lock:
            self._pinned.discard(key)
            return bool(self._pop(key))

    def _pop(self, key: str) -> list[References]:
        cached = self._cached.pop(key, None)
        if cached is None:
            return []
        self.nbytes -= cached.references.nbytes
        return [cached.references]

    def pin(self, key: str) -> None:
        self._pinned.add(key)

    def unpin(self, key: str) -> None:
        self._pinned.discard(key)

    def knows(self, key: str) -> bool:
        return key in self._cached

    def keys(self) -> list[str]:
        with self._lock:
            return list(self._cached)

    def entries(self) -> Iterator[StoreEntry]:
        with self._lock:
            found = list(self._cached.items())
        for key, cached in found:
            yield StoreEntry(
                key=key,
                tier=self.name,
                nbytes=cached.references.nbytes,
                num_tokens=cached.references.num_tokens,
                num_references=len(cached.references.reports),
                pinned=key in self._pinned,
                prefill_seconds=cached.references.prefill_seconds,
                used=cached.used,
            )

    def verify(self) -> dict[str, str | None]:
        return {}  # only files are verified

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(nbytes=self.nbytes, num_entries=len(self._cached), evictions=self._evictions)

    def check_integrity(self) -> None:
        with self._lock:
            assert self.nbytes == sum(cached.references.nbytes for cached in self._cached.values()) <= self.budget
            for key, cached in self._cached.items():
                assert (key, self.device) == (cached.references.key, cached.references.device)
