"""Keeps References by content key, in tiers: devices, host memory, a folder on disk, a filesystem that machines share.

Owns budgets, the order of eviction, single flight and the files of the disk tier. An entry that a full tier has no room
for goes down a tier, then out; the least recently used goes first, pinned ones stay. What comes back from a tier has the
bits that went in: a damaged file is dropped and made again, never served. Knows nothing of prompts, pipelines or requests.

Keeping is best effort: what was made is delivered, whatever becomes of its copies. A copy on a device leaves the one in
host memory where it is, to go when its turn comes; so evicting from the device costs no copy back.

The disk tier is a folder of packs, `<key>.safetensors`, written beside and renamed, so that any number of processes may
share it; an empty `<key>.pin` keeps a pack from eviction. Other files are not touched. Entries are written when they are
made, in the background, so that they outlive the process. An entry is kept on disk only where reading it back is cheaper
than a prefill; both are measured.

The last tier is `remote_tier`'s. What is asked for and nowhere else is fetched from there, into the folder if there is one,
checked as any pack, and kept as what came from disk. What is made is uploaded in the background, as it is written to disk;
so is what is used and was not uploaded when it was made. Nothing is evicted there. While it is away, requests prefill.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar

import psutil
import torch

from limner.errors import InvalidRequest, LimnerError, OutputError, RemoteError
from limner.files import atomic_write
from limner.places import check_store, is_url
from limner.references import CONTENT_KEY, DamagedPack, PackIdentity, References, check_key, read_identity, write_pack
from limner.store.bucket import RemoteObject, RemoteTier

__all__ = ["ReferenceStore", "RemoteTier", "Source", "StoreEntry", "StoreStats"]

_logger = logging.getLogger("limner")
_V = TypeVar("_V")
Source = Literal["miss", "memory", "disk", "remote"]
_TIERS = ("device", "memory", "disk")
"""Those of this machine, whose bytes are known. The remote one is not counted: that would be a listing each time."""
_SHARE = 4
"""A budget that is not given is this part of the memory that is free."""
_TORN_SECONDS = 600.0
"""A file that a writer has not written to for so long is one that was killed."""
_TOUCH_SECONDS = 60.0
"""How often at most the file of an entry that is used in memory hears of it."""
_UPLOADED_SECONDS = 300.0
"""A damaged object that was written so lately may be half of one: on some filesystems it is seen while it is written."""
_SEEN_SECONDS = 3600.0
"""How long an object that was there is taken to be there still: a bucket's rules may remove it."""
_KNOWN_KEYS = 100_000
_UPLOADS_BYTES = 4 << 30
"""What waits to be uploaded may have so many, or a quarter of what is free, where the budget of memory is smaller."""
_HEADERS_AT_ONCE = 16
_FAILURES = (LimnerError, OSError, RuntimeError, MemoryError)
"""What reading, writing and moving may raise; torch reports memory that ran out as a `RuntimeError`."""


@dataclass(kw_only=True, slots=True)
class StoreStats:
    """Counts since the store was made, and bytes now. A hit on a device counts as `hits["device"]`.

    `hits` has the remote tier too; evictions, bytes and entries are those of this machine.
    """

    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*_TIERS, "remote"), 0))
    misses: int = 0
    waits: int = 0
    """Requests that found their prefill under way and waited for it."""
    evictions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TIERS, 0))
    nbytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TIERS, 0))
    num_entries: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TIERS, 0))
    pending_bytes: int = 0
    """Bytes that wait to be written to disk, and those that wait to be uploaded."""
    dropped_files: int = 0
    """Files of the disk tier and objects that were damaged, foreign or of another format."""
    refused: int = 0
    """Times that an entry was not written or uploaded: reading it back takes longer than a prefill, it has no room beside
    pinned ones, or too many bytes waited."""
    failed_writes: int = 0
    prefill_seconds: float = 0.0
    prefill_seconds_saved: float = 0.0
    """What the hits would have cost as prefills, less what bringing them back, or waiting for them, took."""


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
    problem: str | None = None
    """What is wrong with its file, if its header cannot be read; tokens and references are then 0."""


@dataclass(slots=True)
class _Kept:
    references: References
    used: float


class _Tier:
    """References in the memory of one device, least recently used first. Not locked: the store does that."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.entries: OrderedDict[str, _Kept] = OrderedDict()
        self.nbytes = 0

    def get(self, key: str) -> References | None:
        if key not in self.entries:
            return None
        kept = self.entries[key]
        kept.used = time.time()
        self.entries.move_to_end(key)
        return kept.references

    def has_room(self, references: References, *, pinned: set[str]) -> bool:
        """Whether an entry fits beside the pinned ones."""
        others = sum(
            kept.references.nbytes for key, kept in self.entries.items() if key in pinned and key != references.key
        )
        return references.nbytes <= self.budget - others

    def put(self, references: References, *, pinned: set[str]) -> list[References]:
        """Keeps an entry that has room; gives those that had to go for it."""
        self.pop(references.key)
        self.entries[references.key] = _Kept(references, time.time())
        self.nbytes += references.nbytes
        gone = []
        for key in [k for k in self.entries if k not in pinned and k != references.key]:
            if self.nbytes <= self.budget:
                break
            if (victim := self.pop(key)) is not None:
                gone.append(victim)
        return gone

    def pop(self, key: str) -> References | None:
        kept = self.entries.pop(key, None)
        if kept is None:
            return None
        self.nbytes -= kept.references.nbytes
        return kept.references


class _ReadCost:
    """What reading entries back takes, as measured: an overhead, and seconds for each byte of large ones."""

    LARGE = 8 << 20
    FIRST, LAST = 8, 1024
    """After so many refusals one entry is written and read all the same; each time that was in vain, twice as many."""

    def __init__(self) -> None:
        self.overhead: float | None = None
        self.seconds_per_byte: float | None = None
        self._refusals, self._patience = 0, self.FIRST

    def expected(self, nbytes: int) -> float:
        return (self.overhead or 0.0) + (self.seconds_per_byte or 0.0) * nbytes

    def measure(self, seconds: float, nbytes: int) -> None:
        """Small entries tell the overhead alone, large ones the rate alone."""
        if nbytes >= self.LARGE:
            rate = max(0.0, seconds - (self.overhead or 0.0)) / nbytes
            self.seconds_per_byte = _mixed(self.seconds_per_byte, rate)
        else:
            self.overhead = _mixed(self.overhead, max(0.0, seconds - (self.seconds_per_byte or 0.0) * nbytes))

    def is_worth_a_write(self, references: References) -> bool:
        """Whether reading is expected to be cheaper than the prefill; now and then yes all the same, to measure again."""
        if not self.is_dear(references):
            self._refusals, self._patience = 0, self.FIRST
            return True
        self._refusals += 1
        if self._refusals <= self._patience:
            return False
        self._refusals, self._patience = 0, min(2 * self._patience, self.LAST)
        return True

    def is_dear(self, references: References) -> bool:
        """Whether reading is expected to take longer than the prefill took, if that is known."""
        return 0 < references.prefill_seconds <= self.expected(references.nbytes)


def _mixed(old: float | None, new: float) -> float:
    """A running mean that takes good news at once: a disk that was busy for a moment is not slow."""
    return new if old is None or new < old / 2 else 0.7 * old + 0.3 * new


class _Missing(Exception):
    """An entry was asked for only if it is there."""


class _Refused(Exception):
    """Why an entry is not kept on disk."""


class _Disk:
    """A folder of packs, shared by processes. `budget` None sets no limit; a folder may be one to read from only."""

    MEASURED = 3
    """So many entries are read back when they are written, to know what that takes."""

    def __init__(self, folder: Path, budget: int | None) -> None:
        self.folder, self.budget = folder, budget
        self.cost = _ReadCost()
        self.evictions, self._to_measure = 0, self.MEASURED
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(
                "disk_path", f"{folder} cannot be made ({error.strerror}); give a folder that can be written"
            ) from error
        self.writable = os.access(folder, os.W_OK | os.X_OK)
        if self.writable:
            self._remove_torn()
        else:
            _logger.warning("%s cannot be written: its entries are used, and none is added", folder)

    def file(self, key: str) -> Path:
        check_key(key)
        return self.folder / f"{key}.safetensors"

    def pin_file(self, key: str) -> Path:
        return self.file(key).with_suffix(".pin")

    def files(self) -> list[tuple[Path, os.stat_result]]:
        """Packs, by their names, with their stat, least recently used first."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            if CONTENT_KEY.fullmatch(path.stem):
                with contextlib.suppress(OSError):
                    if stat.S_ISREG((status := path.stat()).st_mode):
                        found.append((path, status))
        return sorted(found, key=lambda pair: pair[1].st_mtime_ns)

    def read(self, key: str) -> References | None:
        """The entry of a key; None if there is none. Raises as `References.load` does."""
        path = self.file(key)
        if not path.is_file():
            return None
        start = time.perf_counter()
        try:
            references = References.load(path)
        except DamagedPack:
            raise
        except InvalidRequest:
            if not path.exists():  # another process evicted it in between
                return None
            raise
        if references.key != key:
            raise DamagedPack(path, f"holds the key {references.key}, not that of its name")
        self.cost.measure(time.perf_counter() - start, references.nbytes)
        self.touch(key)
        return references

    def touch(self, key: str) -> None:
        """Says that an entry was used now."""
        with contextlib.suppress(OSError):
            os.utime(self.file(key))

    def drop(self, key: str) -> None:
        try:
            self.file(key).unlink(missing_ok=True)
        except OSError as error:
            _logger.warning("%s cannot be removed: %s", self.file(key), error)

    def write(self, references: References, *, asked: bool) -> None:
        """Writes an entry, in the place of those used least recently.

        One that was not asked for is read back before it gets its name, if that was done seldom yet or is expected to be
        dear. Raises `OutputError` and `_Refused`.
        """
        self._make_room(references.nbytes)
        try:
            self._write(references, asked=asked)
        except OutputError as error:
            full = isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
            if not full or self.budget is None or not self._evict(references.nbytes):
                raise
            self._write(references, asked=asked)
        if self.budget is not None:  # its header, and what other processes wrote
            self._evict(self._nbytes() - self.budget)

    def _write(self, references: References, *, asked: bool) -> None:
        path = self.file(references.key)
        with atomic_write(path) as beside:
            write_pack(references, beside)
            if self.budget is not None and beside.stat().st_size > self.budget - self._pinned_bytes():
                raise _Refused(f"its file has {beside.stat().st_size} bytes")
            if not asked and (self._to_measure > 0 or self.cost.is_dear(references)):
                self._to_measure -= 1
                seconds = self._time_read(beside, references.nbytes)
                if 0 < references.prefill_seconds <= seconds:
                    raise _Refused(f"reading takes {seconds:.3f} s, a prefill {references.prefill_seconds:.3f} s")

    def make_room_for(self, path: Path) -> None:
        """Evicts until a file that is about to get its name fits into the budget. Raises `_Refused`."""
        self._make_room(path.stat().st_size)

    def _time_read(self, path: Path, nbytes: int) -> float:
        """Seconds to read a pack from the disk itself, as far as the system allows it to be asked for."""
        if hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        References.load(path)
        seconds = time.perf_counter() - start
        self.cost.measure(seconds, nbytes)
        return seconds

    def _nbytes(self) -> int:
        return sum(status.st_size for _, status in self.files())

    def _pinned_bytes(self) -> int:
        return sum(status.st_size for path, status in self.files() if path.with_suffix(".pin").exists())

    def _make_room(self, nbytes: int) -> None:
        """Evicts until so many bytes fit into the budget. Raises `_Refused` if pins leave no room."""
        if self.budget is None:
            return
        pinned = self._pinned_bytes()
        if nbytes > self.budget - pinned:
            raise _Refused(f"it has {nbytes} bytes, the folder's budget {self.budget}, pinned entries {pinned}")
        self._evict(nbytes + self._nbytes() - self.budget)

    def _evict(self, nbytes: int) -> int:
        """Removes the least recently used packs until so many bytes are gone, or only pinned ones are left; how many."""
        gone = 0
        for path, status in self.files():
            if nbytes <= 0:
                break
            if path.with_suffix(".pin").exists():
                continue
            path.unlink(missing_ok=True)
            nbytes, gone = nbytes - status.st_size, gone + 1
        self.evictions += gone
        return gone

    def _remove_torn(self) -> None:
        """What writers left that were killed while writing."""
        for path in self.folder.glob(".limner-*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - _TORN_SECONDS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Remote:
    """The remote tier as the store uses it: what is known to be there, what waits to be uploaded, what reading costs."""

    def __init__(self, remote: str | RemoteTier) -> None:
        self.tier = RemoteTier(remote) if isinstance(remote, str) else remote
        self.cost = _ReadCost()
        self._to_measure = _Disk.MEASURED
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="limner-upload")
        self._lock = threading.Lock()
        self._uploads: dict[str, list[Future[None]]] = {}
        self._seen: OrderedDict[str, float] = OrderedDict()
        """When a key was last seen there."""
        self._refused: OrderedDict[str, float] = OrderedDict()
        """Not to be asked about each time that they are used."""
        self._to_replace: dict[str, float] = {}
        """Keys whose objects are damaged, and from when on an upload may take their place."""
        self._failures: OrderedDict[str, RemoteError] = OrderedDict()
        """Why what was asked for was not uploaded."""
        self._failed = float("-inf")
        """When an upload that was asked for failed last."""
        register = getattr(threading, "_register_atexit", None)  # `atexit` is too late: asyncio's executors have ended
        if register is not None:
            with contextlib.suppress(RuntimeError):  # the process ends already
                register(_upload_at_exit, weakref.ref(self), os.getpid())

    def knows(self, key: str) -> bool:
        with self._lock:
            return key in self._seen

    def wants(self, key: str, *, asked: bool) -> bool:
        """Whether an entry may have to be uploaded: it was not seen there lately, and the tier can be written now.

        One that was asked for is tried in any case, unless the tier has just said that it may not be written.
        """
        is_writable = self.tier.is_writable
        if asked:
            if not is_writable:
                self._note(self._failures, key, RemoteError(self.tier.read_only))
            return is_writable
        if not is_writable or self.tier.is_away:
            return False
        now = time.monotonic()
        with self._lock:
            if key in self._uploads or key in self._refused or now < self._to_replace.get(key, now):
                return False
            return now - self._seen.get(key, float("-inf")) >= _SEEN_SECONDS

    def refuse(self, key: str) -> None:
        self._note(self._refused, key, time.monotonic())

    def replace(self, key: str, *, after: float = 0.0) -> None:
        """An upload of that key, so many seconds from now or later, takes the place of what is there."""
        with self._lock:
            self._to_replace[key] = time.monotonic() + after
            self._seen.pop(key, None)

    @property
    def has_told(self) -> bool:
        """Whether the tier has said that it fails, or that it cannot be written."""
        return self.tier.is_away or not self.tier.is_writable

    def failure(self, key: str) -> RemoteError | None:
        with self._lock:
            return self._failures.get(key)

    def holds(self, key: str) -> bool:
        """Asks whether an entry is there. Raises `RemoteError`."""
        return self.tier.holds(key, asked=True)

    def read(self, key: str, path: Path, *, asked: bool = False) -> References | None:
        """The entry of a key, by way of a file; None if there is none.

        Raises what `References.load` does, and `RemoteError`.
        """
        if not self.tier.fetch(key, path, asked=asked):
            with self._lock:
                self._seen.pop(key, None)
            return None
        try:
            references = References.load(path)
        except DamagedPack as error:
            error.args = (str(error).replace(str(path), self.tier.name(key)),)
            raise
        if references.key != key:
            raise DamagedPack(self.tier.name(key), f"holds the key {references.key}, not that of its name")
        self._saw(key)
        return references

    def submit(self, key: str, upload: Callable[[], None], *, ended: Callable[[], None]) -> None:
        """Uploads on the thread for that; `ended` is called when that was done, failed or was cancelled."""

        def end(future: Future[None]) -> None:
            with self._lock:
                self._uploads[key].remove(future)
                if not self._uploads[key]:
                    del self._uploads[key]
            ended()

        with self._lock:
            waiting = self._uploader.submit(upload)
            self._uploads.setdefault(key, []).append(waiting)
        waiting.add_done_callback(end)

    def write(self, references: References, folder: Path, *, asked: bool, since: float) -> None:
        """Uploads an entry that is not there. One that was not asked for is then read back, as on disk.

        Of those asked for that waited while one failed (`since` when), none is tried: all would wait for what hangs. Raises
        `RemoteError`, `OutputError` and `_Refused`.
        """
        key = references.key
        is_late = asked and since < self._failed
        try:
            if is_late:
                raise RemoteError(f"remote: {self.tier.url} failed to take the one before; try again")
            self._write(references, folder, asked=asked)
        except RemoteError as error:
            if asked:
                self._note(self._failures, key, error)
                self._failed = self._failed if is_late else time.monotonic()
            raise
        with self._lock:
            self._failures.pop(key, None)

    def _write(self, references: References, folder: Path, *, asked: bool) -> None:
        key, path = references.key, folder / "pack"
        with self._lock:
            damaged = key in self._to_replace
        if not damaged:
            if self.tier.holds(key, asked=asked):
                self._saw(key)
                return
            with self._lock:
                self._seen.pop(key, None)
        if not self.tier.is_writable:
            raise RemoteError(self.tier.read_only)
        with _typed(path):
            write_pack(references, path)
        self.tier.upload(path, key, asked=asked)
        self._saw(key)
        if not asked and (self._to_measure > 0 or self.cost.is_dear(references)):
            self._to_measure -= 1
            self._measure(references, folder / "copy")

    def _measure(self, references: References, path: Path) -> None:
        """Reads an entry back; removes it and raises `_Refused` where that takes longer than the prefill."""
        start = time.perf_counter()
        try:
            self.read(references.key, path)
        except RemoteError:  # the tier says so; what was uploaded is there
            return
        except DamagedPack:
            self.replace(references.key)
            raise
        seconds = time.perf_counter() - start
        self.cost.measure(seconds, references.nbytes)
        if 0 < references.prefill_seconds <= seconds:
            self.tier.remove(references.key, asked=False)
            with self._lock:
                self._seen.pop(references.key, None)
            self.refuse(references.key)
            raise _Refused(f"reading takes {seconds:.3f} s, a prefill {references.prefill_seconds:.3f} s")

    def remove(self, key: str) -> bool:
        """Removes an entry, also one that is yet to be uploaded; whether there was one. Raises `RemoteError`."""
        with self._lock:
            uploads = list(self._uploads.get(key, ()))
        wait([upload for upload in uploads if not upload.cancel()])
        found = self.tier.remove(key)
        with self._lock:
            for known in (self._seen, self._refused, self._to_replace, self._failures):
                known.pop(key, None)
        return found

    def entries(self) -> Iterator[StoreEntry]:
        """Every entry, the oldest first, with what its header says. Raises `RemoteError`."""

        def header(item: RemoteObject) -> tuple[PackIdentity | None, str | None]:
            try:
                return self.tier.identity(item), None
            except DamagedPack as error:
                return None, str(error)

        items = self.tier.objects()
        with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
            for item, (identity, problem) in zip(items, pool.map(header, items), strict=True):
                if identity is not None or problem is not None:  # else it went meanwhile
                    yield _entry(
                        identity,
                        key=item.key,
                        tier="remote",
                        nbytes=item.nbytes,
                        pinned=False,
                        used=item.modified or 0.0,
                        problem=problem,
                    )

    def problem(self, key: str) -> str | None:
        """What is wrong with an object, if anything is. Raises `RemoteError`."""
        try:
            with _own_folder() as folder:
                self.read(key, folder / "pack", asked=True)
        except InvalidRequest as error:
            return str(error)
        return None

    def flush(self) -> None:
        self._uploader.submit(lambda: None).result()

    def flush_at_exit(self) -> None:
        with self._lock:
            uploads = [upload for of_key in self._uploads.values() for upload in of_key]
        wait(uploads)

    def _saw(self, key: str) -> None:
        self._note(self._seen, key, time.monotonic())
        with self._lock:
            self._to_replace.pop(key, None)

    def _note(self, keys: OrderedDict[str, _V], key: str, value: _V) -> None:
        with self._lock:
            keys[key] = value
            keys.move_to_end(key)
            if len(keys) > _KNOWN_KEYS:
                keys.popitem(last=False)


def _upload_at_exit(remote: weakref.ref[_Remote], process: int) -> None:
    """Waits for uploads at the end of a process, but of one that was forked: it has no thread that would do them."""
    found = remote()
    if found is not None and process == os.getpid():
        found.flush_at_exit()


class ReferenceStore:
    """Tiers of References with byte budgets. Safe to share by threads; its folder, by processes.

    `device_bytes` is the budget on each device that has memory of its own, `memory_bytes` that of host memory (on the CPU
    the only one of the two); None takes a quarter of what is free when the store or the device is first used.
    `disk_bytes` is the budget of the folder `disk_path`, if one is given; None never removes an entry there. `remote` is a
    URL of fsspec below them, as `s3://bucket/prefix`, which machines share and where nothing is evicted; or a `RemoteTier`
    with times of its own. Raises `InvalidRequest`, and `RemoteError` where it cannot be reached.
    """

    def __init__(
        self,
        *,
        device_bytes: int | None = None,
        memory_bytes: int | None = None,
        disk_path: str | os.PathLike[str] | None = None,
        disk_bytes: int | None = 64 << 30,
        remote: str | RemoteTier | None = None,
    ) -> None:
        for name, budget in (
            ("device_bytes", device_bytes),
            ("memory_bytes", memory_bytes),
            ("disk_bytes", disk_bytes),
        ):
            if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 0):
                raise InvalidRequest(name, f"{budget!r} is not a budget; use 0 (keep nothing) or more bytes")
        self._device_bytes = device_bytes
        self._devices: dict[torch.device, _Tier] = {}
        self._memory = _Tier(memory_bytes if memory_bytes is not None else psutil.virtual_memory().available // _SHARE)
        self._disk = _Disk(Path(disk_path), disk_bytes) if disk_path is not None else None
        self._pinned: set[str] = set()
        self._stats = StoreStats()
        self._lock = threading.RLock()
        self._under_way: dict[str, Future[References]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="limner-store") if self._disk else None
        self._pending = {"disk": 0, "remote": 0}
        self._most_uploads = min(_UPLOADS_BYTES, psutil.virtual_memory().available // _SHARE)
        self._told_full: set[str] = set()
        """Tiers of which it was said that too much waits for them, until nothing does."""
        self._touched: dict[str, float] = {}
        self._warned = False
        self._remote = _Remote(remote) if remote is not None else None

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
        """The store in a folder, or under a URL with a folder `cache` before it; `disk_bytes` is the folder's budget.

        Raises `InvalidRequest`, without `make` also where there is no folder, and `RemoteError`.
        """
        check_store(place, cache=cache, disk_bytes=disk_bytes)
        if not is_url(place):
            if not make and not Path(place).is_dir():
                raise InvalidRequest("store", f"{place} is not a folder; check the name")
            return cls(disk_path=place, disk_bytes=disk_bytes, memory_bytes=memory_bytes)
        remote = RemoteTier(str(place), make=make)
        return cls(disk_path=cache, disk_bytes=disk_bytes, memory_bytes=memory_bytes, remote=remote)

    # reading

    def get(
        self, key: str, make: Callable[[], References], *, device: torch.device | str = "cpu"
    ) -> tuple[References, Source]:
        """The References of a key, and where they came from; made if they are in no tier.

        Callers that ask for one key at once share one `make`; if it fails, its caller hears of it and the next one tries.
        Those that fit the budget of a device come back on it, others in host memory. Raises `InvalidRequest` if `make`
        gives References of another key.
        """
        device, start = _with_index(device), time.perf_counter()
        while True:
            with self._lock:
                name, found = self._in_memory(key, device)
                flight = None if found is not None else self._under_way.get(key)
                if found is None and flight is None:
                    mine = self._under_way[key] = Future()
                    break
                self._stats.waits += found is None
            if flight is not None:
                wait([flight])
                if flight.exception() is not None:
                    continue  # the one who made it heard of the failure; now it is this caller's turn
                name, found = "memory", flight.result()
            assert found is not None
            found = self.place(found, device=device)
            self._count_hit(name, found, start)
            self._touch_file(key)
            self._upload_later(found)
            return found, "memory"
        try:
            found = self._from_disk(key)
            source: Source = "disk"
            if found is None:
                found, source = self._from_remote(key), "remote"
            if found is None:
                found, source = make(), "miss"
                if found.key != key:
                    raise InvalidRequest("key", f"make gave References of the key {found.key}, not of {key}")
        except BaseException as error:
            with self._lock:
                del self._under_way[key]
            mine.set_exception(error)
            raise
        mine.set_result(found)  # delivered, whatever comes of keeping it
        if source != "miss":
            self._count_hit(source, found, start)
        else:
            with self._lock:
                self._stats.misses += 1
                self._stats.prefill_seconds += found.prefill_seconds
        try:
            if source == "disk":
                self._upload_later(found)
            return self._keep(found, device=device, write=source == "miss"), source
        finally:
            with self._lock:
                del self._under_way[key]

    def find(self, key: str, *, device: torch.device | str = "cpu") -> tuple[References, Source] | None:
        """What `get` gives of a key that is in a tier and whole there; None of others."""

        def missing() -> References:
            raise _Missing

        try:
            return self.get(key, missing, device=device)
        except _Missing:
            return None

    def place(self, references: References, *, device: torch.device | str) -> References:
        """References where a device reads them: on it, if its tier has room beside what is pinned there, else where they
        are, to be brought layer by layer. What was moved to a device is kept there."""
        device = _with_index(device)
        if references.device == device:
            return references
        with self._lock:
            there = self._tier(device).get(references.key)
            has_room = self._tier(device).has_room(references, pinned=self._pinned)
        if there is not None:
            return there
        if not has_room and device.type != "cpu":
            return references
        moved = references.to(device)
        self._put(moved)
        return moved

    def _in_memory(self, key: str, device: torch.device) -> tuple[str, References | None]:
        """The tier that has a key and what it has: that of the device, host memory, or another device."""
        for tier in (self._tier(device), self._memory, *self._devices.values()):
            references = tier.get(key)
            if references is not None:
                return "memory" if tier is self._memory else "device", references
        return "memory", None

    def _tier(self, device: torch.device) -> _Tier:
        if device.type == "cpu":
            return self._memory
        with self._lock:
            if device not in self._devices:
                budget = self._device_bytes if self._device_bytes is not None else _free_bytes(device) // _SHARE
                self._devices[device] = _Tier(budget)
            return self._devices[device]

    def _from_disk(self, key: str) -> References | None:
        """None for what is not there, damaged or not to be read now; a damaged file alone is removed."""
        if self._disk is None:
            return None
        try:
            return self._disk.read(key)
        except DamagedPack as error:
            _logger.warning("dropped %s: %s", self._disk.file(key), error)
            self._disk.drop(key)
            with self._lock:
                self._stats.dropped_files += 1
        except _FAILURES as error:
            _logger.warning("references %s are made again: %s", key[:16], error)
        return None

    def _from_remote(self, key: str) -> References | None:
        """None for what is not there, damaged, or not to be had now; the request then goes on with a prefill."""
        remote, start = self._remote, time.perf_counter()
        if remote is None:
            return None
        try:
            references = self._fetch(key, remote)
        except DamagedPack as error:
            self._drop_object(key, error, remote)
        except RemoteError:  # the tier says so, once
            pass
        except _FAILURES as error:
            _logger.warning("references %s are made again: %s", key[:16], error)
        else:
            if references is not None:
                remote.cost.measure(time.perf_counter() - start, references.nbytes)
            return references
        return None

    def _fetch(self, key: str, remote: _Remote) -> References | None:
        """The entry of the remote tier, which is then also in the folder, if there is one with room. Raises as it does."""
        disk, references = self._disk, None
        if disk is None or not disk.writable:
            with _own_folder() as folder:
                return remote.read(key, folder / "pack")
        try:
            with atomic_write(disk.file(key), synced=False) as beside:  # one that is torn is fetched again
                references = remote.read(key, beside)
                if references is None:
                    raise _Missing
                disk.make_room_for(beside)
        except _Missing:
            return None
        except (_Refused, OutputError) as why:
            if references is None:
                raise
            _logger.info("references %s are not kept on disk: %s", key[:16], why)
        return references

    def _drop_object(self, key: str, error: DamagedPack, remote: _Remote) -> None:
        """Removes a damaged object, unless somebody may still be writing it."""
        try:
            written = remote.tier.modified(key)
            if written is not None and (age := time.time() - written) < _UPLOADED_SECONDS:
                remote.replace(key, after=_UPLOADED_SECONDS - age)
                _logger.info("references %s are made again: %s, perhaps still being written", key[:16], error)
                return
            _logger.warning("dropped %s", error)
            with self._lock:
                self._stats.dropped_files += 1
            remote.replace(key)
            remote.tier.remove(key, asked=False)
        except RemoteError as why:
            _logger.warning("%s cannot be removed: %s", remote.tier.name(key), why)

    def _count_hit(self, tier: str, references: References, start: float) -> None:
        with self._lock:
            self._stats.hits[tier] += 1
            self._stats.prefill_seconds_saved += references.prefill_seconds - (time.perf_counter() - start)

    # keeping

    def put(self, references: References) -> None:
        """Keeps References that were made elsewhere, such as a pack; on disk whatever reading them back costs.

        They are uploaded in the background, also while the remote tier is left alone; `upload_error` says if that failed.
        """
        self._keep(references, device=references.device, write=True, asked=True)

    def _keep(self, references: References, *, device: torch.device, write: bool, asked: bool = False) -> References:
        """Puts an entry into the highest tier that has room for it; gives it as it is there. Failures are logged."""
        try:
            if write:
                self._write_later(references, asked=asked)
            if references.device != device and (device.type == "cpu" or self._has_room(references, device)):
                return self.place(references, device=device)
            host = references.device.type == "cpu"
            if host and device.type == "cuda" and self._has_room(references, references.device):
                references = references.to_host(page_locked=True)
            if not self._put(references):
                self._warn_of_budgets(references, device)
                if not host:
                    self._go_down(references)
        except _FAILURES as error:
            _logger.warning("references %s are not kept in memory: %s", references.key[:16], error)
        return references

    def _has_room(self, references: References, device: torch.device) -> bool:
        with self._lock:
            return self._tier(device).has_room(references, pinned=self._pinned)

    def _put(self, references: References) -> bool:
        """Into the tier of the device where they are, if they have room there; what goes for them goes down."""
        with self._lock:
            tier = self._tier(references.device)
            if not tier.has_room(references, pinned=self._pinned):
                return False
            gone = tier.put(references, pinned=self._pinned)
            self._stats.evictions["memory" if tier is self._memory else "device"] += len(gone)
        for victim in gone:
            self._go_down(victim)
        return True

    def _go_down(self, references: References) -> None:
        """From a device to host memory, from there to disk, if it is not there already. Failures are logged."""
        with self._lock:
            there = references.key in self._memory.entries
        if there:
            return
        try:
            if references.device.type != "cpu" and self._has_room(references, torch.device("cpu")):
                self._put(references.to_host(page_locked=references.device.type == "cuda"))
            else:
                self._write_later(references)
        except _FAILURES as error:
            _logger.warning("references %s are not kept in memory: %s", references.key[:16], error)

    def _warn_of_budgets(self, references: References, device: torch.device) -> None:
        """Once, if an entry is over the budget of every tier: it will be made anew each time."""
        disk = self._disk.budget if self._disk is not None and self._disk.writable else 0
        budgets = {str(device): self._tier(device).budget, "memory": self._memory.budget, "disk": disk}
        if self._warned or self._remote is not None:
            return
        if any(budget is None or budget >= references.nbytes for budget in budgets.values()):
            return
        self._warned = True
        _logger.warning(
            "references of %d bytes fit into no tier of the store (%s) and will be computed each time; raise "
            "memory_bytes, or give disk_path and disk_bytes",
            references.nbytes,
            ", ".join(f"{name} {budget}" for name, budget in budgets.items()),
        )

    def _write_later(self, references: References, *, asked: bool = False) -> None:
        """To disk and to the remote tier, each on a thread of its own, if it is not there."""
        self._to_disk_later(references, asked=asked)
        self._upload_later(references, asked=asked)

    def _to_disk_later(self, references: References, *, asked: bool) -> None:
        disk = self._disk
        if disk is None or self._writer is None or not disk.writable:
            return
        asked = asked or disk.pin_file(references.key).exists()
        if not asked and disk.file(references.key).exists():
            return
        if self._may_wait("disk", references, disk.cost, asked=asked):
            self._writer.submit(self._write, references, asked)

    def _upload_later(self, references: References, *, asked: bool = False) -> None:
        remote = self._remote
        if remote is None or not remote.wants(references.key, asked=asked):
            return
        if self._may_wait("remote", references, remote.cost, asked=asked):
            since = time.monotonic()
            remote.submit(
                references.key,
                lambda: self._upload(references, remote, asked=asked, since=since),
                ended=lambda: self._waits_no_more("remote", references),
            )
        elif remote.cost.is_dear(references):
            remote.refuse(references.key)

    def _may_wait(self, tier: str, references: References, cost: _ReadCost, *, asked: bool) -> bool:
        """Whether an entry joins those that wait for a tier; it is then counted there.

        No more waits for each than host memory may hold, and one entry in any case. More may wait to be uploaded, which is
        slow, if it is not in a device's memory.
        """
        most = self._memory.budget
        if tier == "remote" and references.device.type == "cpu":
            most = max(most, self._most_uploads)
        with self._lock:
            waiting = self._pending[tier]
            full = waiting > 0 and waiting + references.nbytes > most
            refused = not asked and (full or not cost.is_worth_a_write(references))
            self._stats.refused += refused
            is_news = full and refused and tier not in self._told_full
            if is_news:
                self._told_full.add(tier)
        if is_news:
            _logger.warning(
                "%d bytes wait for the %s tier, which takes less than is made: what is made now is not kept there",
                waiting,
                tier,
            )
        if refused:
            return False
        if full:
            self.flush()
        with self._lock:
            self._pending[tier] += references.nbytes
        return True

    def _write(self, references: References, asked: bool) -> None:
        disk, key = self._disk, references.key
        assert disk is not None
        try:
            with self._counted("on disk", "written to disk", references, asked=asked):
                if not disk.file(key).exists():
                    disk.write(references, asked=asked or disk.pin_file(key).exists())
        finally:
            self._waits_no_more("disk", references)

    def _upload(self, references: References, remote: _Remote, *, asked: bool, since: float) -> None:
        with (
            self._counted("in the remote tier", "uploaded", references, asked=asked),
            _own_folder(self._disk) as folder,
        ):
            remote.write(references, folder, asked=asked, since=since)

    def _waits_no_more(self, tier: str, references: References) -> None:
        with self._lock:
            self._pending[tier] -= references.nbytes
            if not self._pending[tier]:
                self._told_full.discard(tier)

    @contextlib.contextmanager
    def _counted(self, where: str, done: str, references: References, *, asked: bool) -> Iterator[None]:
        """Counts and logs what becomes of a write in the background."""
        try:
            yield
        except _Refused as why:
            with self._lock:
                self._stats.refused += 1
            _logger.log(
                logging.WARNING if asked else logging.INFO,
                "references %s are not kept %s: %s",
                references.key[:16],
                where,
                why,
            )
        except _FAILURES as error:
            with self._lock:
                self._stats.failed_writes += 1
            if not isinstance(error, RemoteError) or (asked and self._remote is not None and not self._remote.has_told):
                _logger.warning("references %s were not %s: %s", references.key[:16], done, error)

    def _touch_file(self, key: str) -> None:
        """Tells the disk tier of a use in memory, now and then, so that what is used most is not evicted there first."""
        if self._disk is None or self._writer is None or not self._disk.writable:
            return
        now = time.monotonic()
        with self._lock:
            if now - self._touched.get(key, -_TOUCH_SECONDS) < _TOUCH_SECONDS:
                return
            self._touched = {k: told for k, told in self._touched.items() if now - told < _TOUCH_SECONDS} | {key: now}
        self._writer.submit(self._disk.touch, key)

    def flush(self) -> None:
        """Waits until all that was given to the disk tier is written, and what was given to the remote one uploaded.

        A remote one that hangs is given up after a time.
        """
        if self._writer is not None:
            self._writer.submit(lambda: None).result()
        if self._remote is not None:
            self._remote.flush()

    # managing

    def pin(self, key: str) -> None:
        """Keeps an entry from eviction in every tier, on disk for all processes and also if it is yet to be written.

        The remote tier evicts nothing, and is asked only whether it has one that is nowhere else. Raises `InvalidRequest`,
        `OutputError` and `RemoteError`.
        """
        if key not in self and not (self._remote is not None and self._remote.holds(key)):
            raise InvalidRequest("key", f"{key} is not in the store; prefill its references first")
        with self._lock:
            self._pinned.add(key)
        if self._disk is not None:
            with _typed(self._disk.pin_file(key)):
                self._disk.pin_file(key).touch()

    def unpin(self, key: str) -> None:
        """Lets an entry be evicted again. Raises `OutputError`."""
        with self._lock:
            self._pinned.discard(key)
        if self._disk is not None:
            with _typed(self._disk.pin_file(key)):
                self._disk.pin_file(key).unlink(missing_ok=True)

    def remove(self, key: str) -> bool:
        """Forgets an entry in every tier; whether there was one. References in use stay whole.

        Other machines that share the remote tier keep their own copies. Raises `OutputError`, and `RemoteError` where it is
        left in the remote tier alone.
        """
        with self._lock:
            self._pinned.discard(key)
            found = any([tier.pop(key) is not None for tier in (self._memory, *self._devices.values())])  # noqa: C419 (all)
        if self._disk is not None and self._writer is not None:
            self._writer.submit(lambda: None).result()
            path = self._disk.file(key)
            found = found or path.exists()
            for file in (path, self._disk.pin_file(key)):
                with _typed(file):
                    file.unlink(missing_ok=True)
        if self._remote is not None:
            found = self._remote.remove(key) or found
        return found

    def outlives(self, key: str) -> bool:
        """Whether an entry is where other processes find it: in the remote tier if there is one, else on disk.

        Raises `RemoteError`.
        """
        return self._remote.holds(key) if self._remote is not None else self.file(key) is not None

    def keys(self) -> list[str]:
        """The keys of what is in the remote tier, and on disk. Lists the remote tier; raises `RemoteError`."""
        far = [item.key for item in self._remote.tier.objects()] if self._remote is not None else []
        near = [path.stem for path, _ in self._disk.files()] if self._disk is not None else []
        return list(dict.fromkeys([*far, *near]))

    def upload_error(self, key: str) -> RemoteError | None:
        """Why an entry that was `put` is not in the remote tier, if its upload failed."""
        return self._remote.failure(key) if self._remote is not None else None

    def file(self, key: str) -> Path | None:
        """The file of an entry in the disk tier, if there is one."""
        if self._disk is None or not self._disk.file(key).is_file():
            return None
        return self._disk.file(key)

    def entries(self) -> Iterator[StoreEntry]:
        """Every entry of every tier, the least recently used of a tier first; damaged files as such.

        Lists the remote tier and reads the header of each object; `used` is then when it was written. Raises `RemoteError`.
        """
        with self._lock:
            tiers = [("device", tier) for tier in self._devices.values()] + [("memory", self._memory)]
            found = [
                StoreEntry(
                    key=key,
                    tier=name,
                    nbytes=kept.references.nbytes,
                    num_tokens=kept.references.num_tokens,
                    num_references=len(kept.references.reports),
                    pinned=key in self._pinned,
                    prefill_seconds=kept.references.prefill_seconds,
                    used=kept.used,
                )
                for name, tier in tiers
                for key, kept in tier.entries.items()
            ]
        yield from found
        for path, status in self._disk.files() if self._disk is not None else ():
            identity, problem = None, None
            try:
                identity = read_identity(path)
            except InvalidRequest as error:
                problem = str(error)
            yield _entry(
                identity,
                key=path.stem,
                tier="disk",
                nbytes=status.st_size,
                pinned=path.with_suffix(".pin").exists(),
                used=status.st_mtime,
                problem=problem,
            )
        if self._remote is not None:
            yield from self._remote.entries()

    def verify(self) -> dict[str, str | None]:
        """Reads every file of the disk tier, and every object of the remote one; by key None, or what is wrong with it.

        Removes nothing. Raises `RemoteError`.
        """
        found: dict[str, str | None] = {}
        for path, _ in self._disk.files() if self._disk else ():
            try:
                references = References.load(path)
                found[path.stem] = None if references.key == path.stem else f"{path} holds the key {references.key}"
            except InvalidRequest as error:
                found[path.stem] = str(error)
        for item in self._remote.tier.objects() if self._remote is not None else ():
            problem = self._remote.problem(item.key) if self._remote is not None else None
            found[item.key] = found.get(item.key) or problem
        return found

    def stats(self) -> StoreStats:
        """A copy of the counts, with the bytes and entries of each tier now."""
        with self._lock:
            copy = StoreStats(**{f.name: getattr(self._stats, f.name) for f in fields(StoreStats)})
            copy.hits, copy.evictions = dict(self._stats.hits), dict(self._stats.evictions)
            copy.pending_bytes = sum(self._pending.values())
            devices = list(self._devices.values())
            copy.nbytes = {"device": sum(tier.nbytes for tier in devices), "memory": self._memory.nbytes, "disk": 0}
            copy.num_entries = {
                "device": sum(len(tier.entries) for tier in devices),
                "memory": len(self._memory.entries),
                "disk": 0,
            }
        if self._disk is not None:
            files = self._disk.files()
            copy.evictions["disk"] = self._disk.evictions
            copy.nbytes["disk"], copy.num_entries["disk"] = sum(status.st_size for _, status in files), len(files)
        return copy

    def check_integrity(self) -> None:
        """Raises `AssertionError` unless counts, budgets and keys agree; for tests."""
        with self._lock:
            for device, tier in [(torch.device("cpu"), self._memory), *self._devices.items()]:
                assert tier.nbytes == sum(kept.references.nbytes for kept in tier.entries.values()) <= tier.budget
                for key, kept in tier.entries.items():
                    assert (key, device) == (kept.references.key, kept.references.device)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: on devices and of the host."""
        return sum(tier.nbytes for tier in (self._memory, *self._devices.values()))

    def __len__(self) -> int:
        """Entries in memory."""
        return len(set(self._memory.entries).union(*(tier.entries for tier in self._devices.values())))

    def __contains__(self, key: str) -> bool:
        """Whether an entry is on this machine, or was in the remote tier when it was last seen; asks nobody."""
        if any(key in tier.entries for tier in (self._memory, *self._devices.values())):
            return True
        if self._disk is not None and self._disk.file(key).exists():
            return True
        return self._remote is not None and self._remote.knows(key)


def _entry(
    identity: PackIdentity | None, *, key: str, tier: str, nbytes: int, pinned: bool, used: float, problem: str | None
) -> StoreEntry:
    """An entry as the header of its pack describes it."""
    return StoreEntry(
        key=key,
        tier=tier,
        nbytes=nbytes,
        num_tokens=identity.num_tokens if identity else 0,
        num_references=len(identity.reports) if identity else 0,
        pinned=pinned,
        prefill_seconds=identity.prefill_seconds if identity else 0.0,
        used=used,
        problem=problem,
    )


@contextlib.contextmanager
def _own_folder(disk: _Disk | None = None) -> Iterator[Path]:
    """A new folder that nobody else reads and that goes at the end: in that of the disk tier, or where such files go."""
    within = disk.folder if disk is not None and disk.writable else None
    folder = Path(tempfile.mkdtemp(prefix=".limner-", dir=within))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with_index(device: torch.device | str) -> torch.device:
    """The device under the name that its tensors give it."""
    device = torch.device(device)
    return torch.empty(0, device=device).device if device.index is None else device


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@contextlib.contextmanager
def _typed(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"store: {file} cannot be changed ({error.strerror or error}); check the folder") from error
