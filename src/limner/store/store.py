"""References by content key, in tiers: memory of devices, host memory, a folder on disk, a bucket that machines share.

Owns the order of the tiers and single flight. What memory evicts, and what was just made, is offered to the tiers of files,
in the background. References from a tier have the bits that went in. `get` returns them even if caching fails. Knows
nothing of prompts, pipelines or requests.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from itertools import chain
from pathlib import Path

import torch

from limner.errors import InvalidRequest, RemoteError
from limner.memory.free import free_bytes
from limner.places import check_store, is_url
from limner.references import References
from limner.store.bucket import Bucket
from limner.store.disk_tier import DiskTier
from limner.store.entries import Source, StoreEntry, StoreStats
from limner.store.placement import Placement, with_index
from limner.store.remote_tier import BucketTier
from limner.store.tier import FAILURES, BackingTier, Tier
from limner.store.writes import BackgroundWrites

__all__ = ["ReferenceStore"]

_logger = logging.getLogger("limner")
_UPLOAD_BYTES = 4 << 30
"""Entries in host memory that wait for their upload may have so many bytes, at most a quarter of what is free."""


class _Missing(Exception):
    """An entry is in no tier, and is not to be made."""


class ReferenceStore:
    """Tiers of References with byte budgets. Safe to share by threads; its folder, by processes.

    `device_bytes` is the budget on each device that has memory of its own, `memory_bytes` that of host memory; on a
    CPU only `memory_bytes` counts. None takes a quarter of what is free when the store or the device is first used.
    `disk_bytes` is the budget of the folder `disk_path`, if one is given; None never removes an entry there. `remote` is a
    URL of fsspec, as `s3://bucket/prefix`, which machines share and where nothing is evicted; or a `RemoteTier` with times
    of its own. Raises `InvalidRequest`, and `RemoteError` where it cannot be reached.
    """

    def __init__(
        self,
        *,
        device_bytes: int | None = None,
        memory_bytes: int | None = None,
        disk_path: str | os.PathLike[str] | None = None,
        disk_bytes: int | None = 64 << 30,
        remote: str | Bucket | None = None,
    ) -> None:
        budgets = {"device_bytes": device_bytes, "memory_bytes": memory_bytes, "disk_bytes": disk_bytes}
        for name, budget in budgets.items():
            if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 0):
                raise InvalidRequest(name, f"{budget!r} is not a budget; use 0 (keep nothing) or more bytes")
        self._placement = Placement(device_bytes=device_bytes, memory_bytes=memory_bytes, on_evict=self._offer)
        self._backing: list[BackgroundWrites] = []
        self._flights: dict[str, Future[References]] = {}
        self._stats = StoreStats()
        self._warned_of_budgets = False
        self._lock = threading.RLock()
        most = self._placement.host.budget
        disk = DiskTier(Path(disk_path), disk_bytes) if disk_path is not None else None
        if disk is not None:
            self._backing.append(BackgroundWrites(disk, max_bytes=most, max_host_bytes=most))
        if remote is not None:
            bucket = Bucket(remote) if isinstance(remote, str) else remote
            most_uploads = max(most, min(_UPLOAD_BYTES, free_bytes() // 4))
            tier = BucketTier(bucket, near=disk if disk is not None and disk.writable else None)
            self._backing.append(BackgroundWrites(tier, max_bytes=most, max_host_bytes=most_uploads))

    @classmethod
    def open(
        cls,
        place: str | os.PathLike[str],
        *,
        cache: str | os.PathLike[str] | None = None,
        disk_bytes: int | None = None,
        memory_bytes: int | None = None,
        make: bool = True,
    ) -> ReferenceStore:
        """Return the store in a folder with a budget of `disk_bytes`, or under a URL with such a folder `cache` before it.

        Raises `InvalidRequest`, without `make` also where there is no folder, and `RemoteError`.
        """
        check_store(place, cache=cache, disk_bytes=disk_bytes)
        if not is_url(place):
            if not make and not Path(place).is_dir():
                raise InvalidRequest("store", f"{place} is not a folder; check the name")
            return cls(disk_path=place, disk_bytes=disk_bytes, memory_bytes=memory_bytes)
        bucket = Bucket(str(place), make=make)
        return cls(disk_path=cache, disk_bytes=disk_bytes, memory_bytes=memory_bytes, remote=bucket)

    # reading

    def get(
        self, key: str, make: Callable[[], References], *, device: torch.device | str = "cpu"
    ) -> tuple[References, Source]:
        """Return the References of a key, and where they came from; `make` them if no tier has them.

        Callers that ask for one key at once share one `make`. If it fails, its caller gets the error and the next caller
        tries. References that fit the budget of a device are returned on it, others in host memory. Raises
        `InvalidRequest` if `make` returns References of another key.
        """
        device, start = with_index(device), time.perf_counter()
        while True:
            with self._lock:  # one step: an entry that just landed is in memory before its flight ends
                name, found = self._placement.get(key, device)
                flight = self._flights.get(key)
                if found is None and flight is None:
                    flight = self._flights[key] = Future()
                    break
                self._stats.waits += found is None
            if found is None and flight is not None:
                wait([flight])
                if flight.exception() is not None:
                    continue  # the caller that made it has the error; now it is this one's turn
                found = flight.result()
            assert found is not None
            found = self._placement.place(found, device)
            self._count(name, found, start)
            for writes in self._backing:
                writes.touch(found)
            return found, "memory"
        try:
            found, source = self._from_backing(key, device) or (_make(key, make), "miss")
        except BaseException as error:
            with self._lock:
                del self._flights[key]
            flight.set_exception(error)
            raise
        flight.set_result(found)  # delivered, even if caching fails
        self._count(source, found, start)
        try:
            return self._cache(found, device=device, new=source == "miss"), source
        finally:
            with self._lock:
                del self._flights[key]

    def find(self, key: str, *, device: torch.device | str = "cpu") -> tuple[References, Source] | None:
        """Do as `get`, but return None if no tier has an undamaged entry."""

        def missing() -> References:
            raise _Missing

        try:
            return self.get(key, missing, device=device)
        except _Missing:
            return None

    def place(self, references: References, *, device: torch.device | str) -> References:
        """Return References on a device, cached there, if its memory has room alongside pinned entries.

        Else they are returned where they are; the transformer then copies them layer by layer.
        """
        return self._placement.place(references, with_index(device))

    def _from_backing(self, key: str, device: torch.device) -> tuple[References, Source] | None:
        for writes in self._backing:
            if (references := writes.tier.get(key, page_locked=device.type == "cuda")) is not None:
                return references, writes.tier.name
        return None

    def _count(self, name: str, references: References, start: float) -> None:
        with self._lock:
            if name == "miss":
                self._stats.misses += 1
                self._stats.prefill_seconds += references.prefill_seconds
            else:
                self._stats.hits[name] += 1
                self._stats.prefill_seconds_saved += references.prefill_seconds - (time.perf_counter() - start)

    # caching

    def put(self, references: References) -> None:
        """Cache References made elsewhere, such as a pack; in files too, even if reading is slower than a prefill.

        They are uploaded in the background, even while a failing remote tier is paused; `upload_error` tells if that fails.
        """
        self._cache(references, device=references.device, explicit=True)

    def _cache(
        self, references: References, *, device: torch.device, explicit: bool = False, new: bool = True
    ) -> References:
        """Offer an entry to the tiers of files and cache it in memory. Return it as it is there. Log failures."""
        try:
            self._offer(references, explicit=explicit, new=new)
        except FAILURES as error:
            _logger.warning("references %s are not cached: %s", references.key[:16], error)
        self._warn_of_budgets(references, device)
        return self._placement.cache(references, device)

    def _offer(self, references: References, *, explicit: bool = False, new: bool = True) -> None:
        for writes in self._backing:
            writes.offer(references, explicit=explicit, new=new)

    def _warn_of_budgets(self, references: References, device: torch.device) -> None:
        """Warn once if an entry is over the budget of every tier: it will be computed each time."""
        tiers: list[Tier] = [self._placement.tier(device), self._placement.host, *self._backing_tiers]
        if self._warned_of_budgets or any(t.budget is None or t.budget >= references.nbytes for t in tiers):
            return
        self._warned_of_budgets = True
        _logger.warning(
            "references of %d bytes fit into no tier of the store (%s) and will be computed each time; raise "
            "memory_bytes, or give disk_path and disk_bytes",
            references.nbytes,
            ", ".join(f"{tier.name} {tier.budget}" for tier in tiers),
        )

    def flush(self) -> None:
        """Wait until everything that waits is written and uploaded. A remote tier that hangs is given up after a time."""
        for writes in self._backing:
            writes.flush()

    # managing

    def pin(self, key: str) -> None:
        """Keep an entry from eviction in every tier; on disk for all processes, and also if it is yet to be written.

        The remote tier evicts nothing, and is asked only about an entry that no other tier has. Raises `InvalidRequest`,
        `OutputError` and `RemoteError`.
        """
        if key not in self and not any(tier.holds(key) for tier in self._backing_tiers):
            raise InvalidRequest("key", f"{key} is not in the store; prefill its references first")
        for tier in self._tiers:
            tier.pin(key)

    def unpin(self, key: str) -> None:
        """Let an entry be evicted again. Raises `OutputError`."""
        for tier in self._tiers:
            tier.unpin(key)

    def remove(self, key: str) -> bool:
        """Remove an entry from every tier. Returns True if there was one. References in use stay whole.

        Other machines that share the remote tier keep their copies. Raises `OutputError`, and `RemoteError` where it is
        left in the remote tier alone.
        """
        found = [tier.drop(key) for tier in self._placement.tiers]
        found += [writes.drop(key) for writes in self._backing]
        return any(found)

    def outlives(self, key: str) -> bool:
        """Return True if other processes find an entry: in the remote tier if there is one, else on disk.

        Raises `RemoteError`.
        """
        return any(tier.holds(key) for tier in self._backing_tiers[-1:])

    def keys(self) -> list[str]:
        """Return the keys in the remote tier, and on disk. Lists the remote tier. Raises `RemoteError`."""
        return list(dict.fromkeys(chain.from_iterable(tier.keys() for tier in reversed(self._backing_tiers))))

    def upload_error(self, key: str) -> RemoteError | None:
        """Return why an entry that was `put` is not in the remote tier, if its upload failed."""
        return next((error for tier in self._backing_tiers if (error := tier.upload_error(key)) is not None), None)

    def file(self, key: str) -> Path | None:
        """Return the file of an entry in the disk tier, if there is one."""
        return next((file for tier in self._backing_tiers if (file := tier.file(key)) is not None), None)

    def entries(self) -> Iterator[StoreEntry]:
        """Yield every entry of every tier, the least recently used of a tier first; damaged files as such.

        Lists the remote tier and reads the header of each object; `used` is then when it was written. Raises `RemoteError`.
        """
        for tier in self._tiers:
            yield from tier.entries()

    def verify(self) -> dict[str, str | None]:
        """Read every file of the disk tier and every object of the remote one. Returns by key None, or what is wrong.

        Removes nothing. Raises `RemoteError`.
        """
        found: dict[str, str | None] = {}
        for tier in self._tiers:
            for key, problem in tier.verify().items():
                found[key] = found.get(key) or problem
        return found

    def stats(self) -> StoreStats:
        """Return a copy of the counts, with the current bytes and entries of each tier."""
        with self._lock:
            copy = dataclasses.replace(self._stats, hits=dict(self._stats.hits))
        copy.nbytes, copy.num_entries, copy.evictions = (dict.fromkeys(copy.nbytes, 0) for _ in range(3))
        for tier in self._tiers:
            of_tier = tier.stats()
            copy.dropped_files += of_tier.dropped_files
            if tier.name in copy.nbytes:
                copy.nbytes[tier.name] += of_tier.nbytes
                copy.num_entries[tier.name] += of_tier.num_entries
                copy.evictions[tier.name] += of_tier.evictions
        copy.pending_bytes = sum(writes.pending_bytes for writes in self._backing)
        copy.refused = sum(writes.num_refused for writes in self._backing)
        copy.failed_writes = sum(writes.num_failed for writes in self._backing)
        return copy

    def check_integrity(self) -> None:
        """Raise `AssertionError` if the counts, budgets and keys of a tier contradict each other. For tests."""
        for tier in self._tiers:
            tier.check_integrity()
        for writes in self._backing:
            writes.check_integrity()

    @property
    def nbytes(self) -> int:
        """Bytes in memory: of devices and of the host."""
        return sum(tier.nbytes for tier in self._placement.tiers)

    def __len__(self) -> int:
        """Return the number of entries in memory."""
        return len(set(chain.from_iterable(tier.keys() for tier in self._placement.tiers)))

    def __contains__(self, key: str) -> bool:
        """Return True for an entry on this machine, or last seen in the remote tier; asks no other machine."""
        return any(tier.knows(key) for tier in self._tiers)

    @property
    def _backing_tiers(self) -> list[BackingTier]:
        return [writes.tier for writes in self._backing]

    @property
    def _tiers(self) -> list[Tier]:
        """All tiers, the fastest first."""
        return [*self._placement.tiers, *self._backing_tiers]


def _make(key: str, make: Callable[[], References]) -> References:
    found = make()
    if found.key != key:
        raise InvalidRequest("key", f"make gave References of the key {found.key}, not of {key}")
    return found
