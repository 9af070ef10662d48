"""What a store knows of the bucket that machines share: keys that were seen there, failed uploads, the cost of reading.

Owns when an entry is uploaded again, and what happens to damaged objects. The filesystem, timeouts and pauses are
`bucket`'s. A bucket's own rules may remove objects, so that what was seen an hour ago is looked up again. `RemoteError` is
logged here or by the bucket, once.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from limner.errors import CapacityError, InvalidRequest, OutputError, RemoteError
from limner.references import DamagedPack, PackIdentity, References
from limner.store.bucket import Bucket, RemoteObject
from limner.store.entries import Source, StoreEntry
from limner.store.read_cost import ReadCost
from limner.store.tier import FAILURES, Refused, TierStats

__all__ = ["BucketTier"]

_logger = logging.getLogger("limner")
_V = TypeVar("_V")
_UPLOADED_SECONDS = 300.0
"""A damaged object that was written so lately may be incomplete: some filesystems show it while it is written."""
_SEEN_SECONDS = 3600.0
"""How long an object that was seen is assumed to be there."""
_KNOWN_KEYS = 100_000
_HEADERS_AT_ONCE = 16


class Landing(Protocol):
    """A folder that takes fetched packs."""

    @property
    def folder(self) -> Path: ...

    def adopt(self, key: str, path: Path) -> None:
        """Cache the file of a fetched pack, which is within the folder, under its key if there is room."""


class BucketTier:
    """The tier of a bucket. Nothing is evicted there.

    Packs on their way lie in temporary folders of `near`, which caches those that were fetched; without one, of the system.
    """

    name: Source = "remote"
    budget = None

    def __init__(self, bucket: Bucket, *, near: Landing | None = None) -> None:
        self.bucket, self.cost = bucket, ReadCost()
        self._near = near
        self._dropped = 0
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, float] = OrderedDict()
        """When a key was last seen in the bucket."""
        self._not_worth: OrderedDict[str, None] = OrderedDict()
        """Keys that were found to be slower to read than to prefill; they are not tried at each use."""
        self._replace_after: dict[str, float] = {}
        """Keys of damaged objects, and when an upload may replace them."""
        self._errors: OrderedDict[str, RemoteError] = OrderedDict()
        """Why explicit uploads failed."""
        self._failed_at = float("-inf")
        """When an explicit upload failed last."""

    # reading

    def get(self, key: str, *, page_locked: bool = False) -> References | None:
        start = time.perf_counter()
        try:
            with self._temporary_folder() as folder:
                references = self._read(key, folder / "pack", explicit=False, page_locked=page_locked)
                if references is not None and self._near is not None:
                    self._near.adopt(key, folder / "pack")
        except DamagedPack as error:
            self._drop_damaged(key, error)
        except RemoteError:
            pass
        except FAILURES as error:
            _logger.warning("references %s are made again: %s", key[:16], error)
        else:
            if references is not None:
                self.cost.measure(time.perf_counter() - start, references.nbytes)
            return references
        return None

    def _read(self, key: str, path: Path, *, explicit: bool, page_locked: bool = False) -> References | None:
        """Fetch an entry into a file. Returns None if there is none. Raises as `References.load`, and `RemoteError`."""
        if not self.bucket.fetch(key, path, explicit=explicit):
            with self._lock:
                self._seen.pop(key, None)
            return None
        try:
            references = References.load(path, page_locked=page_locked)
        except DamagedPack as error:
            error.args = (str(error).replace(str(path), self.bucket.name(key)),)
            raise
        if references.key != key:
            raise DamagedPack(self.bucket.name(key), f"holds the key {references.key}, not that of its name")
        self._note_seen(key)
        return references

    def _drop_damaged(self, key: str, error: DamagedPack) -> None:
        """Remove a damaged object, unless somebody may still be writing it."""
        try:
            written = self.bucket.modified(key)
            if written is not None and (age := time.time() - written) < _UPLOADED_SECONDS:
                self._allow_replacing(key, after=_UPLOADED_SECONDS - age)
                _logger.info("references %s are made again: %s, perhaps still being written", key[:16], error)
                return
            _logger.warning("dropped %s", error)
            with self._lock:
                self._dropped += 1
            self._allow_replacing(key)
            self.bucket.remove(key, explicit=False)
        except RemoteError as why:
            _logger.warning("%s cannot be removed: %s", self.bucket.name(key), why)

    def holds(self, key: str) -> bool:
        return self.bucket.holds(key, explicit=True)

    def knows(self, key: str) -> bool:
        with self._lock:
            return key in self._seen

    def file(self, key: str) -> None:
        return None

    def keys(self) -> list[str]:
        return [item.key for item in self.bucket.objects()]

    def entries(self) -> Iterator[StoreEntry]:
        def header(item: RemoteObject) -> PackIdentity | str | None:
            try:
                return self.bucket.identity(item)
            except DamagedPack as error:
                return str(error)

        items = self.bucket.objects()
        with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
            for item, identity in zip(items, pool.map(header, items), strict=True):
                if identity is not None:  # it was not removed in between
                    used = item.modified or 0.0
                    yield StoreEntry.of_pack(identity, key=item.key, tier=self.name, nbytes=item.nbytes, used=used)

    def verify(self) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for key in self.keys():
            found[key] = None
            try:
                with self._temporary_folder() as folder:
                    self._read(key, folder / "pack", explicit=True)
            except (InvalidRequest, CapacityError) as error:
                found[key] = str(error)
        return found

    def stats(self) -> TierStats:
        return TierStats(dropped_files=self._dropped)  # bytes and entries would need a listing

    def check_integrity(self) -> None:
        with self._lock:
            assert not self._seen.keys() & self._replace_after.keys()

    # writing

    def wants(self, key: str, *, explicit: bool, new: bool) -> bool:
        is_writable = self.bucket.is_writable
        if explicit:
            if not is_writable:
                self._note(self._errors, key, RemoteError(self.bucket.denied))
            return is_writable
        if not is_writable or self.bucket.is_paused:
            return False
        now = time.monotonic()
        with self._lock:
            if key in self._not_worth or now < self._replace_after.get(key, now):
                return False
            return now - self._seen.get(key, float("-inf")) >= _SEEN_SECONDS

    def is_worth_a_write(self, references: References) -> bool:
        is_worth = self.cost.is_worth_a_write(references)
        if not is_worth:
            self._note(self._not_worth, references.key, None)
        return is_worth

    def put(self, references: References, *, explicit: bool = False, queued_at: float = 0.0) -> None:
        """Upload an entry that is not there; as on disk, read some of those that are not explicit back.

        An explicit upload that was queued before another one failed fails at once, instead of waiting for the same
        filesystem that hangs.
        """
        key = references.key
        is_late = explicit and queued_at < self._failed_at
        try:
            if is_late:
                raise RemoteError(f"remote: {self.bucket.url} failed to take the one before; try again")
            self._upload(references, explicit=explicit)
        except RemoteError as error:
            if explicit:
                self._note(self._errors, key, error)
                self._failed_at = self._failed_at if is_late else time.monotonic()
                if self.bucket.is_writable and not self.bucket.is_paused:  # else the bucket has logged why
                    _logger.warning("references %s were not uploaded: %s", key[:16], error)
            raise
        with self._lock:
            self._errors.pop(key, None)

    def _upload(self, references: References, *, explicit: bool) -> None:
        key = references.key
        with self._lock:
            is_damaged = key in self._replace_after
        if not is_damaged:
            if self.bucket.holds(key, explicit=explicit):
                self._note_seen(key)
                return
            with self._lock:
                self._seen.pop(key, None)
        if not self.bucket.is_writable:
            raise RemoteError(self.bucket.denied)
        with self._temporary_folder() as folder:
            try:
                references.write_to(folder / "pack")
            except OSError as error:
                problem = f"store: {folder / 'pack'} cannot be changed ({error.strerror or error}); check the folder"
                raise OutputError(problem) from error
            self.bucket.upload(folder / "pack", key, explicit=explicit)
            self._note_seen(key)
            if not explicit and self.cost.should_read_back(references):
                self._read_back(references, folder / "copy")

    def _read_back(self, references: References, path: Path) -> None:
        """Measure what reading an entry takes. If its prefill was faster, remove it and raise `Refused`."""
        key, start = references.key, time.perf_counter()
        try:
            self._read(key, path, explicit=False)
            self.cost.check(time.perf_counter() - start, references)
        except RemoteError:  # logged by the bucket; the upload itself succeeded
            return
        except DamagedPack:
            self._allow_replacing(key)
            raise
        except Refused:
            self.bucket.remove(key, explicit=False)
            with self._lock:
                self._seen.pop(key, None)
            self._note(self._not_worth, key, None)
            raise

    def drop(self, key: str) -> bool:
        found = self.bucket.remove(key)
        with self._lock:
            for known in (self._seen, self._not_worth, self._replace_after, self._errors):
                known.pop(key, None)
        return found

    def upload_error(self, key: str) -> RemoteError | None:
        with self._lock:
            return self._errors.get(key)

    # pins and uses: nothing is evicted, so that neither matters

    def pin(self, key: str) -> None:
        pass

    def unpin(self, key: str) -> None:
        pass

    def is_pinned(self, key: str) -> bool:
        return False

    def is_touch_due(self, key: str) -> bool:
        return False

    def touch(self, key: str) -> None:
        pass

    # notes

    def _note_seen(self, key: str) -> None:
        self._note(self._seen, key, time.monotonic())
        with self._lock:
            self._replace_after.pop(key, None)

    def _allow_replacing(self, key: str, *, after: float = 0.0) -> None:
        """Let an upload, so many seconds from now or later, replace the damaged object of a key."""
        with self._lock:
            self._replace_after[key] = time.monotonic() + after
            self._seen.pop(key, None)

    def _note(self, notes: OrderedDict[str, _V], key: str, value: _V) -> None:
        with self._lock:
            notes[key] = value
            notes.move_to_end(key)
            if len(notes) > _KNOWN_KEYS:
                notes.popitem(last=False)

    @contextlib.contextmanager
    def _temporary_folder(self) -> Iterator[Path]:
        """Make a folder that only this process reads, removed at the end."""
        folder = Path(tempfile.mkdtemp(prefix=".limner-", dir=self._near.folder if self._near is not None else None))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
