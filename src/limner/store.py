"""Keeps References by content key, in tiers: the device, host memory, a folder on disk.

Owns budgets, the order of eviction, single flight and the files of the disk tier. An entry that a full tier has no room
for goes down a tier, then out; the least recently used goes first, pinned ones stay. What comes back from a tier has the
bits that went in: a damaged file is dropped and made again, never served. Knows nothing of prompts, pipelines or requests.

The disk tier is a folder of packs, `<key>.safetensors`, written beside and renamed, so that any number of processes may
share it; an empty `<key>.pin` keeps a pack from eviction. Entries are written when they are made, in the background, so
that they outlive the process. An entry is kept on disk only where reading it back is cheaper than a prefill; both are
measured.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch

from limner.errors import InvalidRequest, OutputError
from limner.references import References, read_identity

__all__ = ["ReferenceStore", "Source", "StoreEntry", "StoreStats"]

_logger = logging.getLogger("limner")
_KEY = re.compile(r"[0-9a-f]{64}")
Source = Literal["miss", "memory", "disk"]
_TIERS = ("device", "memory", "disk")


@dataclass(kw_only=True, slots=True)
class StoreStats:
    """Counts since the store was made, and bytes now. A hit on the device counts as `hits["device"]`."""

    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TIERS, 0))
    misses: int = 0
    waits: int = 0
    """Requests that found their prefill under way and waited for it."""
    evictions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TIERS, 0))
    nbytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TIERS, 0))
    num_entries: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TIERS, 0))
    dropped_files: int = 0
    """Files of the disk tier that were damaged, foreign or of another format."""
    refused: int = 0
    """Entries that were not kept on disk because reading them back takes longer than a prefill."""
    failed_writes: int = 0
    prefill_seconds: float = 0.0
    prefill_seconds_saved: float = 0.0
    """What the hits would have cost as prefills, less what bringing them back took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreEntry:
    """One entry of a store, as `limner refs ls` shows it."""

    key: str
    tier: str
    nbytes: int
    num_tokens: int
    num_references: int
    pinned: bool
    prefill_seconds: float
    used: float
    """When it was last used, seconds since the epoch."""


class _Tier:
    """References in memory, least recently used first. Not locked: the store does that."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.entries: OrderedDict[str, tuple[References, float]] = OrderedDict()
        self.nbytes = 0

    def get(self, key: str) -> References | None:
        if key not in self.entries:
            return None
        references = self.entries[key][0]
        self.entries[key] = references, time.time()
        self.entries.move_to_end(key)
        return references

    def put(self, references: References, *, pinned: set[str]) -> list[References]:
        """Keeps an entry; gives what had to go for it, the entry itself if there is no room."""
        self.pop(references.key)
        if references.nbytes > self.budget:
            return [references]
        self.entries[references.key] = references, time.time()
        self.nbytes += references.nbytes
        gone = []
        for key in [k for k in self.entries if k not in pinned and k != references.key]:
            if self.nbytes <= self.budget:
                break
            gone.append(self.pop(key))
        if self.nbytes > self.budget and references.key not in pinned:  # the others are pinned
            gone.append(self.pop(references.key))
        return [references for references in gone if references is not None]

    def pop(self, key: str) -> References | None:
        found = self.entries.pop(key, None)
        if found is None:
            return None
        self.nbytes -= found[0].nbytes
        return found[0]


class _Disk:
    """A folder of packs, shared by processes."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self.seconds_per_byte: float | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(
                "disk_path", f"{folder} cannot be made ({error.strerror}); give a folder that can be written"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InvalidRequest("disk_path", f"{folder} cannot be written; give a folder that can")
        self._remove_torn()

    def file(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise InvalidRequest("key", f"{key!r} is not a content key (64 hexadecimal digits)")
        return self.folder / f"{key}.safetensors"

    def pin_file(self, key: str) -> Path:
        return self.file(key).with_suffix(".pin")

    def files(self) -> list[tuple[Path, os.stat_result]]:
        """Packs with their stat, least recently used first."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):
                found.append((path, path.stat()))
        return sorted(found, key=lambda pair: pair[1].st_mtime_ns)

    def nbytes(self) -> int:
        return sum(stat.st_size for _, stat in self.files())

    def read(self, key: str) -> References | None:
        """The entry of a key; None if there is none. Raises `InvalidRequest` for a file that is not what it should be."""
        path = self.file(key)
        if not path.exists():
            return None
        start = time.perf_counter()
        try:
            references = References.load(path)
        except InvalidRequest:
            if not path.exists():  # another process evicted it in between
                return None
            raise
        if references.key != key:
            raise InvalidRequest("references", f"{path} holds the key {references.key}, not that of its name")
        self._measure(time.perf_counter() - start, references.nbytes)
        with contextlib.suppress(OSError):
            os.utime(path)
        return references

    def write(self, references: References) -> None:
        """Raises `OutputError`."""
        references.save(self.file(references.key))

    def time_read(self, references: References) -> float:
        """Seconds to read an entry back from the disk itself, as far as the system allows it to be asked for.

        0 if another process evicted it by now. Raises `InvalidRequest` if it was not written as it should be.
        """
        path = self.file(references.key)
        try:
            if hasattr(os, "posix_fadvise"):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            References.load(path)
        except (InvalidRequest, OSError):
            if not path.exists():
                return 0.0
            raise
        seconds = time.perf_counter() - start
        self._measure(seconds, references.nbytes)
        return seconds

    def _measure(self, seconds: float, nbytes: int) -> None:
        rate = seconds / max(nbytes, 1)
        self.seconds_per_byte = rate if self.seconds_per_byte is None else 0.7 * self.seconds_per_byte + 0.3 * rate

    def evict(self) -> int:
        """Removes the least recently used packs until the budget is kept; gives their number."""
        files, gone = self.files(), 0
        total = sum(stat.st_size for _, stat in files)
        for path, stat in files:
            if total <= self.budget:
                break
            if path.with_suffix(".pin").exists():
                continue
            path.unlink(missing_ok=True)
            total, gone = total - stat.st_size, gone + 1
        return gone

    def _remove_torn(self) -> None:
        """What writers left that were killed while writing."""
        for path in self.folder.glob(".limner-*"):
            match = re.match(r"\.limner-(\d+)-", path.name)
            if match and not _runs(int(match[1])):
                path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class ReferenceStore:
    """Tiers of References with byte budgets. Safe to share by threads; its folder, by processes.

    `device_bytes` is the budget on a device that has memory of its own, `memory_bytes` that of host memory (on the CPU the
    only one of the two), `disk_bytes` that of the folder `disk_path`, if one is given. Raises `InvalidRequest`.
    """

    def __init__(
        self,
        *,
        device_bytes: int = 4 << 30,
        memory_bytes: int = 2 << 30,
        disk_path: str | os.PathLike[str] | None = None,
        disk_bytes: int = 64 << 30,
    ) -> None:
        for name, budget in (
            ("device_bytes", device_bytes),
            ("memory_bytes", memory_bytes),
            ("disk_bytes", disk_bytes),
        ):
            if not isinstance(budget, int) or isinstance(budget, bool) or budget < 0:
                raise InvalidRequest(name, f"{budget!r} is not a budget; use 0 (keep nothing) or more bytes")
        self._device, self._memory = _Tier(device_bytes), _Tier(memory_bytes)
        self._disk = _Disk(Path(disk_path), disk_bytes) if disk_path is not None else None
        self._pinned: set[str] = set()
        self._stats = StoreStats()
        self._lock = threading.RLock()
        self._under_way: dict[str, Future[References]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="limner-store") if self._disk else None
        self._writes: set[Future[None]] = set()

    # reading

    def get(
        self, key: str, make: Callable[[], References], *, device: torch.device | str = "cpu"
    ) -> tuple[References, Source]:
        """The References of a key, and where they came from; made if they are in no tier.

        Callers that ask for one key at once share one `make`; if it fails, its caller hears of it and the next one tries.
        Those that fit the budget of a device come back on it, others in host memory.
        """
        device = torch.device(device)
        while True:
            with self._lock:
                found = self._in_memory(key, device)
                if found is not None:
                    return found, "memory"
                flight = self._under_way.get(key)
                if flight is None:
                    mine = self._under_way[key] = Future()
                    break
                self._stats.waits += 1
            wait([flight])
            if flight.exception() is not None:
                continue  # the one who made it heard of the failure; now it is this caller's turn
            references = flight.result()
            with self._lock:
                self._stats.hits["memory"] += 1
                self._stats.prefill_seconds_saved += references.prefill_seconds
            return self._on(references, device), "memory"
        try:
            found = self._from_disk(key)
            source: Source = "disk"
            if found is None:
                found, source = make(), "miss"
                with self._lock:
                    self._stats.misses += 1
                    self._stats.prefill_seconds += found.prefill_seconds
            self._keep(found, device=device, write=source == "miss")
        except BaseException as error:
            with self._lock:
                del self._under_way[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._under_way[key]
        mine.set_result(found)
        return self._on(found, device), source

    def _in_memory(self, key: str, device: torch.device) -> References | None:
        """From the device or from host memory; counted as a hit."""
        start = time.perf_counter()
        for name, tier in (("device", self._device), ("memory", self._memory)):
            references = tier.get(key)
            if references is not None:
                moved = self._on(references, device)
                if moved is not references:
                    self._keep(moved, device=device, write=False)
                self._stats.hits[name] += 1
                self._stats.prefill_seconds_saved += references.prefill_seconds - (time.perf_counter() - start)
                return moved
        return None

    def _on(self, references: References, device: torch.device) -> References:
        """On a device if its budget has room for them at all, else where they are: they are staged layer by layer."""
        if device.type == "cpu":
            return references.to(device)
        return references.to(device) if references.nbytes <= self._device.budget else references

    def _from_disk(self, key: str) -> References | None:
        if self._disk is None:
            return None
        start = time.perf_counter()
        try:
            references = self._disk.read(key)
        except InvalidRequest as error:
            _logger.warning("dropped %s: %s", self._disk.file(key), error)
            self._disk.file(key).unlink(missing_ok=True)
            with self._lock:
                self._stats.dropped_files += 1
            return None
        if references is not None:
            with self._lock:
                self._stats.hits["disk"] += 1
                self._stats.prefill_seconds_saved += references.prefill_seconds - (time.perf_counter() - start)
        return references

    # keeping

    def put(self, references: References) -> None:
        """Keeps References that were made elsewhere, such as a pack; on disk whatever reading them back costs."""
        self._keep(references, device=references.device, write=True, asked=True)

    def _keep(self, references: References, *, device: torch.device, write: bool, asked: bool = False) -> None:
        with self._lock:
            if references.device.type != "cpu":
                going = self._device.put(references, pinned=self._pinned)
                self._memory.pop(references.key)
                self._stats.evictions["device"] += len(going)
            else:
                going = [references]
            for one in going:  # down a tier
                host = one.to("cpu")
                if device.type == "cuda" and host.nbytes <= self._memory.budget:
                    host = host.pin_memory()
                gone = self._memory.put(host, pinned=self._pinned)
                self._stats.evictions["memory"] += sum(g.key != one.key for g in gone)
        if write and self._disk is not None and self._writer is not None:
            if not asked and not self._worth_reading(references):
                with self._lock:
                    self._stats.refused += 1
                return
            future = self._writer.submit(self._write, references, asked)
            self._writes.add(future)
            future.add_done_callback(self._writes.discard)

    def _worth_reading(self, references: References) -> bool:
        """Whether reading an entry back is expected to be cheaper than its prefill."""
        assert self._disk is not None
        rate = self._disk.seconds_per_byte
        return rate is None or not references.prefill_seconds or rate * references.nbytes < references.prefill_seconds

    def _write(self, references: References, asked: bool) -> None:
        """On the writer's thread: to disk, read back once to know what that costs, and back to the budget."""
        disk = self._disk
        assert disk is not None
        try:
            if disk.file(references.key).exists() or references.nbytes > disk.budget:
                return
            disk.write(references)
            seconds = disk.time_read(references)
            if not asked and references.prefill_seconds and seconds >= references.prefill_seconds:
                disk.file(references.key).unlink(missing_ok=True)
                with self._lock:
                    self._stats.refused += 1
                _logger.info(
                    "references %s are not kept on disk: reading takes %.3f s, a prefill %.3f s",
                    references.key[:16],
                    seconds,
                    references.prefill_seconds,
                )
            gone = disk.evict()
            with self._lock:
                self._stats.evictions["disk"] += gone
        except (OutputError, InvalidRequest, OSError) as error:
            with self._lock:
                self._stats.failed_writes += 1
            _logger.warning("references %s were not written to disk: %s", references.key[:16], error)

    def flush(self) -> None:
        """Waits until all that was given to the disk tier is written."""
        for future in list(self._writes):
            future.result()

    # managing

    def pin(self, key: str) -> None:
        """Keeps an entry from eviction in every tier, on disk for all processes. Raises `InvalidRequest`."""
        if key not in self:
            raise InvalidRequest("key", f"{key} is not in the store; prefill its references first")
        with self._lock:
            self._pinned.add(key)
        if self._disk is not None and self._disk.file(key).exists():
            self._disk.pin_file(key).touch()

    def unpin(self, key: str) -> None:
        """Lets an entry be evicted again."""
        with self._lock:
            self._pinned.discard(key)
        if self._disk is not None:
            self._disk.pin_file(key).unlink(missing_ok=True)

    def remove(self, key: str) -> bool:
        """Forgets an entry in every tier; whether there was one. References in use stay whole."""
        with self._lock:
            self._pinned.discard(key)
            found = [tier.pop(key) for tier in (self._device, self._memory)] != [None, None]
        if self._disk is not None:
            self.flush()
            path = self._disk.file(key)
            found = found or path.exists()
            path.unlink(missing_ok=True)
            self._disk.pin_file(key).unlink(missing_ok=True)
        return found

    def entries(self) -> Iterator[StoreEntry]:
        """Every entry of every tier, the least recently used of a tier first."""
        with self._lock:
            kept = [
                (name, references, used, key in self._pinned)
                for name, tier in (("device", self._device), ("memory", self._memory))
                for key, (references, used) in tier.entries.items()
            ]
        for name, references, used, pinned in kept:
            yield StoreEntry(
                key=references.key, tier=name, nbytes=references.nbytes, num_tokens=references.num_tokens,
                num_references=len(references.reports), pinned=pinned, prefill_seconds=references.prefill_seconds,
                used=used,
            )  # fmt: skip
        if self._disk is None:
            return
        for path, stat in self._disk.files():
            try:
                identity = read_identity(path)
            except InvalidRequest as error:
                _logger.warning("%s: %s", path, error)
                continue
            yield StoreEntry(
                key=path.stem, tier="disk", nbytes=stat.st_size, num_tokens=identity.num_tokens,
                num_references=len(identity.reports), pinned=path.with_suffix(".pin").exists(),
                prefill_seconds=identity.prefill_seconds, used=stat.st_mtime,
            )  # fmt: skip

    def verify(self) -> dict[str, str | None]:
        """Reads every file of the disk tier; by key None, or what is wrong with it. Removes nothing."""
        found: dict[str, str | None] = {}
        for path, _ in self._disk.files() if self._disk else ():
            try:
                references = References.load(path)
                found[path.stem] = None if references.key == path.stem else f"{path} holds the key {references.key}"
            except InvalidRequest as error:
                found[path.stem] = str(error)
        return found

    def stats(self) -> StoreStats:
        """A copy of the counts, with the bytes and entries of each tier now."""
        with self._lock:
            copy = StoreStats(**{f.name: getattr(self._stats, f.name) for f in fields(StoreStats)})
            copy.hits, copy.evictions = dict(self._stats.hits), dict(self._stats.evictions)
            copy.nbytes = {"device": self._device.nbytes, "memory": self._memory.nbytes, "disk": 0}
            copy.num_entries = {"device": len(self._device.entries), "memory": len(self._memory.entries), "disk": 0}
        if self._disk is not None:
            files = self._disk.files()
            copy.nbytes["disk"], copy.num_entries["disk"] = sum(stat.st_size for _, stat in files), len(files)
        return copy

    def check_integrity(self) -> None:
        """Raises `AssertionError` unless counts, budgets and keys agree; for tests."""
        with self._lock:
            for tier in (self._device, self._memory):
                assert tier.nbytes == sum(references.nbytes for references, _ in tier.entries.values())
                assert all(key == references.key for key, (references, _) in tier.entries.items())
                free = [r.nbytes for key, (r, _) in tier.entries.items() if key not in self._pinned]
                assert tier.nbytes <= tier.budget or not free
            both = set(self._device.entries) & set(self._memory.entries)
            assert not both, f"in two tiers: {both}"

    @property
    def nbytes(self) -> int:
        """Bytes in memory: on the device and of the host."""
        return self._device.nbytes + self._memory.nbytes

    def __len__(self) -> int:
        """Entries in memory."""
        return len(self._device.entries) + len(self._memory.entries)

    def __contains__(self, key: str) -> bool:
        if key in self._device.entries or key in self._memory.entries:
            return True
        return self._disk is not None and self._disk.file(key).exists()
