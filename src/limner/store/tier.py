"""What a store needs of its tiers: the methods that all share, and those of tiers that are written in the background.

A tier owns its entries, its budget and the order of eviction. It does not know the tiers above and below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from limner.errors import LimnerError, RemoteError
from limner.references import References
from limner.store.entries import Source, StoreEntry

__all__ = ["FAILURES", "BackingTier", "Refused", "Tier", "TierStats"]

FAILURES = (LimnerError, OSError, RuntimeError, MemoryError)
"""Exceptions of reading, writing and moving; torch reports exhausted memory as a `RuntimeError`."""


class Refused(Exception):
    """A tier does not cache an entry, for a reason that is no failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TierStats:
    """Current bytes and entries of a tier, evictions and damaged files since it was made."""

    nbytes: int = 0
    num_entries: int = 0
    evictions: int = 0
    dropped_files: int = 0


class Tier(Protocol):
    """One place that caches References by key. Safe to share by threads."""

    @property
    def name(self) -> str:
        """ "device", "memory", "disk" or "remote"."""

    @property
    def budget(self) -> int | None:
        """Bytes that it may hold; None sets no limit."""

    def get(self, key: str) -> References | None:
        """Return the entry of a key and note its use. None if it is absent, damaged or cannot be read now."""

    def put(self, references: References, *, explicit: bool = False, queued_at: float = 0.0) -> None:
        """Cache an entry, in place of the least recently used ones.

        `explicit`: a caller asked for it, so it is written even if reading it back is slower than a prefill.
        `queued_at`: when it was queued for this tier (`time.monotonic`). Raises `Refused`, and one of `FAILURES`.
        """

    def drop(self, key: str) -> bool:
        """Remove an entry and its pin. Returns True if there was one. Raises `OutputError` and `RemoteError`."""

    def pin(self, key: str) -> None:
        """Keep an entry from eviction, also one that is yet to come. Raises `OutputError`."""

    def unpin(self, key: str) -> None:
        """Let an entry be evicted again. Raises `OutputError`."""

    def knows(self, key: str) -> bool:
        """Return True if it holds an entry, as far as is known without asking another machine."""

    def keys(self) -> list[str]:
        """Return all keys, the least recently used first. Raises `RemoteError`."""

    def entries(self) -> Iterator[StoreEntry]:
        """Yield all entries, the least recently used first, damaged ones with their problem. Raises `RemoteError`."""

    def verify(self) -> dict[str, str | None]:
        """Read every file. Returns by key None or what is wrong with it. Removes nothing. Raises `RemoteError`."""

    def stats(self) -> TierStats:
        """Return the current counts."""

    def check_integrity(self) -> None:
        """Raise `AssertionError` if the records of the tier contradict each other. For tests."""


class BackingTier(Tier, Protocol):
    """A tier of files, written in the background by `BackgroundWrites`, whose entries outlive the process."""

    @property
    def name(self) -> Source: ...

    def get(self, key: str, *, page_locked: bool = False) -> References | None:
        """As that of a `Tier`; with `page_locked` into memory from which a GPU copies without waiting."""

    def wants(self, key: str, *, explicit: bool, new: bool) -> bool:
        """Return True if an entry should be written, without waiting for anything.

        `new`: it was just made, or evicted from memory. False: it was used, and may be gone from this tier.
        """

    def is_worth_a_write(self, references: References) -> bool:
        """Return True unless reading the entry back is expected to take longer than its prefill."""

    def is_pinned(self, key: str) -> bool:
        """Return True if an entry is pinned in this tier."""

    def is_touch_due(self, key: str) -> bool:
        """Return True if `touch` should be called for an entry that memory served, and take that as done."""

    def touch(self, key: str) -> None:
        """Note a use that this tier did not serve."""

    def holds(self, key: str) -> bool:
        """Return True if it holds an entry; asks other machines. Raises `RemoteError`."""

    def file(self, key: str) -> Path | None:
        """Return the local file of an entry, if there is one."""

    def upload_error(self, key: str) -> RemoteError | None:
        """Return why the last explicit write of an entry to another machine failed, if it did."""
