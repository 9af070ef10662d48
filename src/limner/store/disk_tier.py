"""A folder of packs, `<key>.safetensors`, that any number of processes may share.

A pack is written under a temporary name and renamed. An empty `<key>.pin` keeps it from eviction, for all processes. Other
files are not touched. Knows no other tier.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from limner.errors import CapacityError, InvalidRequest, OutputError
from limner.files import atomic_write
from limner.references import CONTENT_KEY, DamagedPack, PackIdentity, References, check_key, read_identity
from limner.store.entries import Source, StoreEntry
from limner.store.read_cost import ReadCost, time_read
from limner.store.tier import FAILURES, Refused, TierStats

__all__ = ["DiskTier"]

_logger = logging.getLogger("limner")
_TORN_SECONDS = 600.0
"""A temporary file that was not written to for so long is of a writer that was killed."""
_TOUCH_SECONDS = 60.0
"""How often at most a use in memory sets the time of a file, which orders eviction."""


class DiskTier:
    """A folder of packs with a byte budget; None sets no limit. A folder that cannot be written is read from only."""

    name: Source = "disk"

    def __init__(self, folder: Path, budget: int | None) -> None:
        self.folder, self.cost = folder, ReadCost()
        self._evictions = self._dropped = 0
        self._touched: dict[str, float] = {}
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = "is a file" if folder.is_file() else f"cannot be made ({error.strerror})"
            raise InvalidRequest("disk_path", f"{folder} {problem}; give a folder that can be written") from error
        self.writable = os.access(folder, os.W_OK | os.X_OK)
        self.budget = budget if self.writable else 0
        if self.writable:
            self._remove_torn()
        else:
            _logger.warning("%s cannot be written: its entries are used, and none is added", folder)

    # reading

    def get(self, key: str, *, page_locked: bool = False) -> References | None:
        path = self.folder / f"{key}.safetensors"
        if not CONTENT_KEY.fullmatch(key) or not path.is_file():
            return None
        start = time.perf_counter()
        try:
            references = self._load(path, page_locked=page_locked)
        except DamagedPack as error:
            _logger.warning("dropped %s: %s", path, error)
            with self._lock:
                self._dropped += 1
            try:
                path.unlink(missing_ok=True)
            except OSError as why:
                _logger.warning("%s cannot be removed: %s", path, why)
            return None
        except FAILURES as error:
            if path.exists():  # another process did not evict it in between
                _logger.warning("references %s are made again: %s", key[:16], error)
            return None
        self.cost.measure(time.perf_counter() - start, references.nbytes)
        self.touch(key)
        return references

    @staticmethod
    def _load(path: Path, *, page_locked: bool = False) -> References:
        references = References.load(path, page_locked=page_locked)
        if references.key != path.stem:
            raise DamagedPack(path, f"holds the key {references.key}, not that of its name")
        return references

    def holds(self, key: str) -> bool:
        return self.file(key) is not None

    def knows(self, key: str) -> bool:
        return self._pack(key).exists()

    def file(self, key: str) -> Path | None:
        return path if (path := self._pack(key)).is_file() else None

    def keys(self) -> list[str]:
        return [path.stem for path, _ in self._files()]

    def entries(self) -> Iterator[StoreEntry]:
        for path, status in self._files():
            identity: PackIdentity | str
            try:
                identity = read_identity(path)
            except InvalidRequest as error:
                identity = str(error)
            yield StoreEntry.of_pack(
                identity,
                key=path.stem,
                tier=self.name,
                nbytes=status.st_size,
                used=status.st_mtime,
                pinned=self.is_pinned(path.stem),
            )

    def verify(self) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for path, _ in self._files():
            try:
                self._load(path)
                found[path.stem] = None
            except (InvalidRequest, CapacityError) as error:
                found[path.stem] = str(error)
        return found

    def stats(self) -> TierStats:
        sizes = [status.st_size for _, status in self._files()]
        return TierStats(
            nbytes=sum(sizes), num_entries=len(sizes), evictions=self._evictions, dropped_files=self._dropped
        )

    def check_integrity(self) -> None:
        assert all(path == self._pack(path.stem) for path, _ in self._files())

    # writing

    def wants(self, key: str, *, explicit: bool, new: bool) -> bool:
        return self.writable and (explicit or new) and not self._pack(key).exists()

    def is_worth_a_write(self, references: References) -> bool:
        return self.cost.is_worth_a_write(references)

    def put(self, references: References, *, explicit: bool = False, queued_at: float = 0.0) -> None:
        path = self._pack(references.key)
        if path.exists():
            return
        explicit = explicit or self.is_pinned(references.key)
        self._make_room(references.nbytes)
        try:
            self._write(references, path, explicit=explicit)
        except OutputError as error:
            is_full = isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
            if not is_full or self.budget is None or not self._evict(references.nbytes):
                raise
            self._write(references, path, explicit=explicit)
        if self.budget is not None:  # the header, and what other processes wrote
            self._evict(self._nbytes() - self.budget)

    def _write(self, references: References, path: Path, *, explicit: bool) -> None:
        with atomic_write(path) as temporary:
            references.write_to(temporary)
            nbytes = temporary.stat().st_size
            if self.budget is not None and nbytes > self.budget - self._pinned_bytes():
                raise Refused(f"its file has {nbytes} bytes")
            if not explicit and self.cost.should_read_back(references):
                self.cost.check(time_read(temporary), references)

    def adopt(self, key: str, path: Path) -> None:
        """Move a pack, fetched and checked, into the folder if it has room there. `path` is on the same filesystem."""
        try:
            self._make_room(path.stat().st_size)
            os.replace(path, self._pack(key))  # not flushed to the disk: a torn one is fetched again
        except (Refused, OSError) as why:
            _logger.info("references %s are not cached on disk: %s", key[:16], why)

    def drop(self, key: str) -> bool:
        path = self._pack(key)
        found = path.exists()
        for file in (path, path.with_suffix(".pin")):
            with _output_errors(file):
                file.unlink(missing_ok=True)
        return found

    # pins and uses

    def pin(self, key: str) -> None:
        with _output_errors(file := self._pack(key).with_suffix(".pin")):
            file.touch()

    def unpin(self, key: str) -> None:
        with _output_errors(file := self._pack(key).with_suffix(".pin")):
            file.unlink(missing_ok=True)

    def is_pinned(self, key: str) -> bool:
        return self._pack(key).with_suffix(".pin").exists()

    def is_touch_due(self, key: str) -> bool:
        now = time.monotonic()
        if not self.writable or now - self._touched.get(key, -_TOUCH_SECONDS) < _TOUCH_SECONDS:
            return False
        self._touched = {k: at for k, at in self._touched.items() if now - at < _TOUCH_SECONDS} | {key: now}
        return True

    def touch(self, key: str) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._pack(key))

    def upload_error(self, key: str) -> None:
        return None

    # the folder

    def _pack(self, key: str) -> Path:
        check_key(key)
        return self.folder / f"{key}.safetensors"

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """Return the packs with their stat, least recently used first."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            if CONTENT_KEY.fullmatch(path.stem):
                with contextlib.suppress(OSError):
                    if stat.S_ISREG((status := path.stat()).st_mode):
                        found.append((path, status))
        return sorted(found, key=lambda pair: pair[1].st_mtime_ns)

    def _nbytes(self) -> int:
        return sum(status.st_size for _, status in self._files())

    def _pinned_bytes(self) -> int:
        return sum(status.st_size for path, status in self._files() if self.is_pinned(path.stem))

    def _make_room(self, nbytes: int) -> None:
        """Evict until so many bytes fit into the budget. Raises `Refused` if pins leave no room."""
        if self.budget is None:
            return
        pinned = self._pinned_bytes()
        if nbytes > self.budget - pinned:
            raise Refused(f"it has {nbytes} bytes, the folder's budget {self.budget}, pinned entries {pinned}")
        self._evict(nbytes + self._nbytes() - self.budget)

    def _evict(self, nbytes: int) -> int:
        """Remove the least recently used packs that are not pinned, until so many bytes are gone. Return their number."""
        num_gone = 0
        for path, status in self._files():
            if nbytes <= 0:
                break
            if not self.is_pinned(path.stem):
                path.unlink(missing_ok=True)
                nbytes, num_gone = nbytes - status.st_size, num_gone + 1
        with self._lock:
            self._evictions += num_gone
        return num_gone

    def _remove_torn(self) -> None:
        """Remove temporary files and folders of writers that were killed."""
        for path in self.folder.glob(".limner-*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - _TORN_SECONDS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _output_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"store: {file} cannot be changed ({error.strerror or error}); check the folder") from error
