"""The store of References: tiers of memory, disk and a remote place, by content key."""

from __future__ import annotations

from limner.store.bucket import Bucket, RemoteTier
from limner.store.entries import Source, StoreEntry, StoreStats
from limner.store.store import ReferenceStore

__all__ = ["Bucket", "ReferenceStore", "RemoteTier", "Source", "StoreEntry", "StoreStats"]
