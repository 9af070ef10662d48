"""Packs in a filesystem of fsspec (`s3://bucket/prefix`, `gs://`, `sftp://`, `file:///`), which machines share.

Owns the filesystem, the names of objects, and how long each kind of call may take. An object is
`<prefix>/<key>.safetensors`; others are not touched. It is put whole or removed, never changed, and nothing is evicted.
Knows the header of a pack, not References. `guard` bounds the calls and pauses them after failures.

If the filesystem denies a write, nothing is written for 5 minutes; then one write is tried with fresh credentials, because
an expired token looks like a missing right.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limner.errors import InvalidRequest, RemoteError
from limner.references import CONTENT_KEY, LONGEST_HEADER, PackIdentity, check_key, parse_identity, read_identity
from limner.store.filesystems import check_url, has_folders, modified_at, stopper
from limner.store.guard import CallGuard, WriteDenied

__all__ = ["Bucket", "RemoteObject", "RemoteTier"]

_logger = logging.getLogger("limner")
_NAME = re.compile(rf"({CONTENT_KEY.pattern})\.safetensors")
_START_FACTOR = 4.0
"""The first answer may take so many times `timeout`: names, connections and credentials are looked up."""
_UPLOAD_FACTOR = 12.0
_UPLOAD_BYTES_PER_SECOND = 1 << 20
"""An upload delays no request: it may take 12 times `timeout`, and a second for each of its MiB."""
_LIST_FACTOR = 12.0
_DENIED_SECONDS = 300.0
_TEMPORARY = ".limner-"
_TORN_SECONDS = 86400.0
"""A temporary object that was not renamed for so long is of a writer that was killed."""
_HEAD = 1 << 16
"""The header of most packs is within so many bytes."""
_UNKNOWN_PREFILL = 60.0
"""Seconds that a prefill is assumed to take where the pack does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteObject:
    """A pack in a listing. `modified` is in seconds since the epoch, None where the filesystem does not say."""

    key: str
    nbytes: int
    modified: float | None


class Bucket:
    """Packs under a URL. Safe to share by threads; the place, by processes and machines.

    `timeout` bounds, in seconds, the wait for the first byte, for each further one and for any short answer. `make` makes
    the folder where a filesystem has folders. Raises `InvalidRequest` for a URL that cannot be used, also if its package
    is missing, and `RemoteError` where it cannot be reached.
    """

    def __init__(self, url: str, *, timeout: float = 5.0, make: bool = True) -> None:
        self._url, self.timeout = url, timeout
        self._guard = CallGuard(url, on_failure=self._close)
        self.url = self._guard.url
        self.denied = ""
        """Why the last write was denied; "" if it was not."""
        self._denied_until = 0.0
        self._lock = threading.Lock()
        self._opened: tuple[Any, str] | None = None
        self._removed_torn = False
        check_url(url, describe=self._guard.describe)
        try:
            problem = self._guard.bounded(lambda: self._probe(make=make), _START_FACTOR * timeout, doing="be opened")
        except FileNotFoundError:
            problem = "is not there; check the name"
        if problem:
            raise InvalidRequest("remote", f"{self.url} {problem}")

    @property
    def is_paused(self) -> bool:
        """True while it is left alone after a failure, except by explicit calls."""
        return self._guard.is_open

    @property
    def is_writable(self) -> bool:
        """True unless a write was denied in the last minutes."""
        with self._lock:
            return time.monotonic() >= self._denied_until

    # reading

    def fetch(self, key: str, path: Path, *, explicit: bool = False) -> bool:
        """Copy an object, unchecked, into a local file. Returns False if there is none.

        Gives up when no byte has come for `timeout`, and, unless explicit, when it takes `timeout` longer than the prefill
        that it saves. Raises `RemoteError`, and `OutputError` where the local disk has no room.
        """
        given_up = threading.Event()

        def get() -> bool:
            fs, root = self._filesystem()
            if given_up.is_set():
                return False
            try:
                fs.get_file(_object(root, key), str(path), callback=stopper(given_up))
            finally:
                if given_up.is_set():
                    path.unlink(missing_ok=True)
            return True

        limit = self._until_slow(path, given_up, is_patient=explicit)
        try:
            return self._guard.call(get, limit, doing="be read", explicit=explicit)
        except FileNotFoundError:
            return False

    def _until_slow(self, path: Path, given_up: threading.Event, *, is_patient: bool) -> Callable[[Future[bool]], str]:
        """Return a limit for `CallGuard.call` that waits for a copy as long as it progresses and is worth the wait."""

        def watch(copy: Future[bool]) -> str:
            start = progress = time.monotonic()
            seen, limit = 0, None
            while not wait([copy], timeout=min(0.1, self.timeout / 4)).done:
                now, size = time.monotonic(), _size(path)
                if size != seen:
                    seen, progress = size, now
                if limit is None and seen > 0:
                    with contextlib.suppress(InvalidRequest):  # its header is not there yet
                        limit = self.timeout + (read_identity(path).prefill_seconds or _UNKNOWN_PREFILL)
                problem = ""
                if now - progress > self.timeout:
                    problem = f"nothing more came for {self.timeout:g} s, after {seen} bytes"
                elif not is_patient and now - start > (limit or self.timeout):
                    problem = f"{seen} bytes took {now - start:.1f} s, which a prefill does not"
                if problem:
                    given_up.set()
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)
                    return problem
            return ""

        return watch

    def holds(self, key: str, *, explicit: bool = False) -> bool:
        """Return True if there is an object of that key. Raises `RemoteError`."""
        return self._info(key, explicit=explicit) is not None

    def modified(self, key: str) -> float | None:
        """Return when an object was written, in seconds since the epoch; None if unknown. Raises `RemoteError`."""
        info = self._info(key, explicit=True)
        return None if info is None else modified_at(info)

    def _info(self, key: str, *, explicit: bool) -> dict[str, Any] | None:
        def look() -> dict[str, Any]:
            fs, root = self._filesystem()
            fs.invalidate_cache()
            return dict(fs.info(_object(root, key)))

        try:
            return self._guard.call(look, self.timeout, doing="be asked", explicit=explicit)
        except FileNotFoundError:
            return None

    def objects(self) -> list[RemoteObject]:
        """List all packs by their names, the oldest first. Raises `RemoteError`."""

        def look() -> list[RemoteObject]:
            fs, root = self._filesystem()
            fs.invalidate_cache()
            found = []
            for info in fs.ls(root, detail=True):
                match = _NAME.fullmatch(str(info["name"]).rpartition("/")[2])
                if match and info.get("type") == "file":
                    found.append(RemoteObject(key=match[1], nbytes=int(info["size"] or 0), modified=modified_at(info)))
            return sorted(found, key=lambda item: (item.modified or 0.0, item.key))

        try:
            return self._guard.call(look, _LIST_FACTOR * self.timeout, doing="be listed", explicit=True)
        except FileNotFoundError:
            return []

    def identity(self, item: RemoteObject) -> PackIdentity | None:
        """Return the header of an object, None if it is gone. Raises `DamagedPack` and `RemoteError`."""

        def head() -> bytes:
            fs, root = self._filesystem()
            path = _object(root, item.key)
            data: bytes = fs.cat_file(path, start=0, end=min(_HEAD, item.nbytes))
            length = 8 + int.from_bytes(data[:8], "little")
            if len(data) < length <= min(8 + LONGEST_HEADER, item.nbytes):
                data = fs.cat_file(path, start=0, end=length)
            return data

        try:
            data = self._guard.call(head, 2 * self.timeout, doing="be read", explicit=True)
        except FileNotFoundError:
            return None
        return parse_identity(data, nbytes=item.nbytes, where=self.name(item.key))

    def name(self, key: str) -> str:
        """Return the name of an object for messages."""
        return f"{self.url.rstrip('/')}/{key}.safetensors"

    # writing

    def upload(self, path: Path, key: str, *, explicit: bool = False) -> None:
        """Put a local file under the name of its key, whole or not at all. Raises `RemoteError`."""

        def put() -> None:
            fs, root = self._filesystem()
            try:
                if has_folders(root):
                    self._put_and_rename(fs, root, path, key)
                else:
                    fs.put_file(str(path), _object(root, key))
            except FileNotFoundError as error:  # the bucket is gone: not the answer that an object is not there
                raise ConnectionError(str(error)) from error

        seconds = _UPLOAD_FACTOR * self.timeout + _size(path) / _UPLOAD_BYTES_PER_SECOND
        try:
            self._guard.call(put, seconds, doing="be written", explicit=explicit)
        except WriteDenied as error:
            raise self._deny(error) from None
        with self._lock:
            was_denied, self.denied = self.denied, ""
        if was_denied:
            _logger.warning("%s can be written again", self.url)

    def _deny(self, error: WriteDenied) -> RemoteError:
        """Pause writes, and open the filesystem anew for the next one, so that credentials are read again."""
        message = f"{error}; check that the credentials in the environment may write there"
        with self._lock:
            was_denied, self.denied = self.denied, message
            self._denied_until = time.monotonic() + _DENIED_SECONDS
        self._close()
        if not was_denied:
            _logger.warning("%s: its entries are used, and for now none is added", error)
        return RemoteError(message)

    def _put_and_rename(self, fs: Any, root: str, path: Path, key: str) -> None:
        """Put a file under a temporary name and rename it, where others would see half of it while it is written."""
        fs.makedirs(root, exist_ok=True)
        if not self._removed_torn:
            self._removed_torn = True
            with contextlib.suppress(Exception):
                _remove_torn(fs, root)
        temporary, target = f"{root}/{_TEMPORARY}{secrets.token_hex(8)}", _object(root, key)
        try:
            fs.put_file(str(path), temporary)
            try:
                fs.mv(temporary, target)
            except OSError:
                if not fs.exists(target):
                    raise
                fs.rm_file(target)  # some filesystems do not rename over an existing file
                fs.mv(temporary, target)
        except BaseException:
            with contextlib.suppress(Exception):
                fs.rm_file(temporary)
            raise

    def remove(self, key: str, *, explicit: bool = True) -> bool:
        """Remove an object. Returns True if there was one. Raises `RemoteError`."""

        def drop() -> bool:
            fs, root = self._filesystem()
            fs.invalidate_cache()
            try:
                fs.info(_object(root, key))
                fs.rm_file(_object(root, key))
            except FileNotFoundError:
                return False
            fs.invalidate_cache()
            return True

        try:
            return self._guard.call(drop, 2 * self.timeout, doing="be changed", explicit=explicit)
        except WriteDenied as error:
            self._close()  # its credentials may be old
            raise RemoteError(str(error)) from None

    # the filesystem

    def _filesystem(self) -> tuple[Any, str]:
        """Return the filesystem, opened anew after a failure, and the path of the prefix. May hang: call it guarded."""
        opened = self._opened
        if opened is None:
            import fsspec

            fs, root = fsspec.core.url_to_fs(self._url, skip_instance_cache=True)
            opened = self._opened = fs, str(root).rstrip("/")
        return opened

    def _close(self) -> None:
        """Have the filesystem opened anew: a broken connection does not mend, and credentials may be old."""
        self._opened = None

    def _probe(self, *, make: bool) -> str:
        """Return what is wrong with the place, "" if nothing is. Writes nothing, but makes the folder if `make`."""
        fs, root = self._filesystem()
        if not root:
            return "names no bucket or folder; give one such as s3://bucket/prefix"
        try:
            found = fs.info(root)
        except FileNotFoundError:
            if has_folders(root):
                if not make:
                    return "is not there; check the name"
                fs.makedirs(root, exist_ok=True)
                return ""
            bucket = root.partition("/")[0]
            with contextlib.suppress(PermissionError):  # the bucket may be closed, and its objects open
                try:
                    fs.info(bucket)
                except FileNotFoundError:
                    shown = self._guard.scrub(bucket)
                    return f"is in no bucket that is there; make {shown} first, or check the name"
            return ""
        return "is a file; give a prefix or a folder" if found.get("type") == "file" else ""


RemoteTier = Bucket
"""The public name, as in `ReferenceStore(remote=RemoteTier(url, timeout=60))`."""


def _object(root: str, key: str) -> str:
    check_key(key)
    return f"{root}/{key}.safetensors"


def _remove_torn(fs: Any, root: str) -> None:
    """Remove temporary objects of writers that were killed."""
    for info in fs.ls(root, detail=True):
        name, written = str(info["name"]).rpartition("/")[2], modified_at(info)
        if name.startswith(_TEMPORARY) and written and time.time() - written > _TORN_SECONDS:
            with contextlib.suppress(Exception):
                fs.rm_file(info["name"])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
