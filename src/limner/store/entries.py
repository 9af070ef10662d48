"""The small values that a store hands out: entries, counts, sources. Knows no tier."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from limner.references import PackIdentity

__all__ = ["Source", "StoreEntry", "StoreStats"]

Source = Literal["miss", "memory", "disk", "remote"]
_LOCAL = ("device", "memory", "disk")
"""Tiers of this machine, whose bytes are known. Those of the remote tier would need a listing each time."""


@dataclass(kw_only=True, slots=True)
class StoreStats:
    """Counts since the store was made, and current bytes. `hits` has every tier, the other dicts those of this machine."""

    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*_LOCAL, "remote"), 0))
    misses: int = 0
    waits: int = 0
    """Requests that found their prefill under way and waited for it."""
    evictions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_LOCAL, 0))
    nbytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_LOCAL, 0))
    num_entries: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_LOCAL, 0))
    pending_bytes: int = 0
    """Bytes in the write queues of disk and remote tier."""
    dropped_files: int = 0
    """Files of the disk tier and objects that were damaged, foreign or of another format."""
    refused: int = 0
    """Entries that were not written or uploaded: slower to read back than a prefill, no room, or the queue was full."""
    failed_writes: int = 0
    prefill_seconds: float = 0.0
    prefill_seconds_saved: float = 0.0
    """Prefill seconds of all hits, less the seconds spent on reading or waiting for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreEntry:
    """One entry of one tier, as `limner refs ls` shows it."""

    key: str
    tier: str
    nbytes: int
    num_tokens: int
    num_references: int
    pinned: bool
    prefill_seconds: float
    used: float
    """When it was last used (in the remote tier: written), in seconds since the epoch."""
    problem: str | None = None
    """Why its header cannot be read, if so; tokens and references are then 0."""

    @classmethod
    def of_pack(
        cls, identity: PackIdentity | str, *, key: str, tier: str, nbytes: int, used: float, pinned: bool = False
    ) -> StoreEntry:
        """Return the entry of a pack; a text in place of the identity is the problem of its header."""
        known = None if isinstance(identity, str) else identity
        return cls(
            key=key,
            tier=tier,
            nbytes=nbytes,
            num_tokens=known.num_tokens if known else 0,
            num_references=len(known.reports) if known else 0,
            pinned=pinned,
            prefill_seconds=known.prefill_seconds if known else 0.0,
            used=used,
            problem=identity if isinstance(identity, str) else None,
        )
