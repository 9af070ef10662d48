"""Packs in a filesystem of fsspec (`s3://bucket/prefix`, `gs://`, `sftp://`, `file:///`), which machines share.

Owns the filesystem, the names of objects, and how long anybody waits. An object is `<prefix>/<key>.safetensors`;
others are not touched. It never changes: it is put whole, or removed. Nothing is evicted here. Knows of References no more
than what the header of a pack says.

A filesystem may hang, so that each call runs in a thread of its own and is given up after a time: a thread that hangs holds
nobody, also not the end of the process. After a failure the tier is away: nobody asks it for a while, which grows with
each failure up to minutes; then one caller tries. That is logged when it starts and when it ends. Calls that a person asked
for (`asked`) are tried in any case, and raise. One that says that nothing may be written is not written to for minutes:
rights come back, as when a token that expired is renewed.

No message has the credentials that a URL may hold.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from limner.errors import InvalidRequest, LimnerError, OutputError, RemoteError
from limner.places import secrets_of, without_credentials
from limner.references import CONTENT_KEY, PackIdentity, check_key, parse_identity, read_identity

__all__ = ["RemoteObject", "RemoteTier"]

_logger = logging.getLogger("limner")
_R = TypeVar("_R")
_NAME = re.compile(rf"({CONTENT_KEY.pattern})\.safetensors")
_START_FACTOR = 4.0
"""The first answer may take so many times `timeout`: names, connections and credentials are looked up."""
_UPLOAD_FACTOR = 12.0
_UPLOAD_BYTES_PER_SECOND = 1 << 20
"""An upload holds nobody: it may take 12 times `timeout`, and a second for each of its MiB."""
_LIST_FACTOR = 12.0
_FIRST_AWAY, _LAST_AWAY = 5.0, 300.0
_MOST_LEFT = 8
"""Calls that a person asked for are not tried while so many that were given up still hang: each has a thread."""
_TORN = ".limner-"
_TORN_SECONDS = 86400.0
"""What was not renamed for so long is of a writer that was killed."""
_HEAD = 1 << 16
"""Bytes that have the header of most packs."""
_LONGEST_HEADER = 100 << 20
_UNKNOWN_PREFILL = 60.0
"""Seconds that a prefill is taken to save where the pack does not say."""
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
"""Where filesystems say when an object was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteObject:
    """A pack as a listing shows it. `modified` is in seconds since the epoch; None where the filesystem does not say."""

    key: str
    nbytes: int
    modified: float | None


class RemoteTier:
    """Packs under a URL. Safe to share by threads; the place, by processes and machines.

    `timeout` is how many seconds the first byte, each further one and any short answer may take. `make` makes the folder
    where a filesystem has folders. Raises `InvalidRequest` for a URL that cannot be used, its package missing among the
    reasons, and `RemoteError` where it cannot be reached.
    """

    def __init__(self, url: str, *, timeout: float = 5.0, make: bool = True) -> None:
        self._url, self.url = url, without_credentials(url)
        self.timeout = timeout
        self.read_only = ""
        """Why it could not be written when that was last tried; "" if it could."""
        self._secrets = secrets_of(url)
        self._lock = threading.Lock()
        self._made: tuple[Any, str] | None = None
        self._away, self._until, self._read_only_until = 0.0, 0.0, 0.0
        self._left: list[threading.Thread] = []
        """Of calls that were given up since it last answered."""
        self._looked_for_torn = False
        self._check_url()
        try:
            problem = self._bounded(lambda: self._probe(make=make), _START_FACTOR * timeout, doing="be opened")
        except FileNotFoundError:
            problem = "is not there; check the name"
        if problem:
            raise InvalidRequest("remote", f"{self.url} {problem}")

    # what there is

    def fetch(self, key: str, path: Path, *, asked: bool = False) -> bool:
        """Copies an object into a local file; False if there is none. What comes is not looked at.

        Gives up when no byte has come for `timeout`, and when it takes that much longer than the prefill that it saves.
        Raises `RemoteError`, and `OutputError` where the local disk has no room.
        """
        given_up = threading.Event()

        def get() -> bool:
            fs, root = self._filesystem()
            if given_up.is_set():
                return False
            try:
                fs.get_file(_object(root, key), str(path), callback=_stopper(given_up))
            finally:
                if given_up.is_set():
                    path.unlink(missing_ok=True)
            return True

        try:
            return self._ask(get, self._until_slow(path, given_up, patient=asked), doing="be read", asked=asked)
        except FileNotFoundError:
            return False

    def _until_slow(self, path: Path, given_up: threading.Event, *, patient: bool) -> Callable[[Future[bool]], str]:
        """Waits for a copy as long as it gets on: "" when it has ended, else why not to wait any longer."""

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
                elif not patient and now - start > (limit or self.timeout):
                    problem = f"{seen} bytes took {now - start:.1f} s, which a prefill does not"
                if problem:
                    given_up.set()
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)
                    return problem
            return ""

        return watch

    def holds(self, key: str, *, asked: bool = False) -> bool:
        """Whether there is an object of that key. Raises `RemoteError`."""
        return self._info(key, asked=asked) is not None

    def modified(self, key: str) -> float | None:
        """When an object was written, seconds since the epoch; None if nobody knows. Raises `RemoteError`."""
        info = self._info(key, asked=True)
        return None if info is None else _modified(info)

    def _info(self, key: str, *, asked: bool) -> dict[str, Any] | None:
        def look() -> dict[str, Any]:
            fs, root = self._filesystem()
            fs.invalidate_cache()
            return dict(fs.info(_object(root, key)))

        try:
            return self._ask(look, self.timeout, doing="be asked", asked=asked)
        except FileNotFoundError:
            return None

    def objects(self) -> list[RemoteObject]:
        """All packs there, by their names, the oldest first. Asks for a listing. Raises `RemoteError`."""

        def look() -> list[RemoteObject]:
            fs, root = self._filesystem()
            fs.invalidate_cache()
            found = []
            for info in fs.ls(root, detail=True):
                match = _NAME.fullmatch(str(info["name"]).rpartition("/")[2])
                if match and info.get("type") == "file":
                    found.append(RemoteObject(key=match[1], nbytes=int(info["size"] or 0), modified=_modified(info)))
            return sorted(found, key=lambda one: (one.modified or 0.0, one.key))

        try:
            return self._ask(look, _LIST_FACTOR * self.timeout, doing="be listed", asked=True)
        except FileNotFoundError:
            return []

    def identity(self, item: RemoteObject) -> PackIdentity | None:
        """What the header of an object says; None if it is gone. Raises `DamagedPack` and `RemoteError`."""

        def head() -> bytes:
            fs, root = self._filesystem()
            path = _object(root, item.key)
            data: bytes = fs.cat_file(path, start=0, end=min(_HEAD, item.nbytes))
            length = 8 + int.from_bytes(data[:8], "little")
            if len(data) < length <= min(_LONGEST_HEADER, item.nbytes):
                data = fs.cat_file(path, start=0, end=length)
            return data

        try:
            data = self._ask(head, 2 * self.timeout, doing="be read", asked=True)
        except FileNotFoundError:
            return None
        return parse_identity(data, nbytes=item.nbytes, where=self.name(item.key))

    def name(self, key: str) -> str:
        """The name of an object, as it may be shown."""
        return f"{self.url.rstrip('/')}/{key}.safetensors"

    # what changes it

    @property
    def is_writable(self) -> bool:
        """Whether writing may be tried: nobody was refused it for some minutes."""
        with self._lock:
            return time.monotonic() >= self._read_only_until

    def upload(self, path: Path, key: str, *, asked: bool = False) -> None:
        """Puts a local file under the name of its key, whole or not at all. Raises `RemoteError`."""

        def put() -> None:
            fs, root = self._filesystem()
            try:
                if _has_folders(root):
                    self._put_beside(fs, root, path, key)
                else:
                    fs.put_file(str(path), _object(root, key))
            except FileNotFoundError as error:  # no bucket: that is no object that is not there
                raise ConnectionError(str(error)) from error

        seconds = _UPLOAD_FACTOR * self.timeout + _size(path) / _UPLOAD_BYTES_PER_SECOND
        try:
            self._ask(put, seconds, doing="be written", asked=asked)
        except _ReadOnly as error:
            raise self._refused(error) from None
        with self._lock:
            was_read_only, self.read_only = self.read_only, ""
        if was_read_only:
            _logger.warning("%s can be written again", self.url)

    def _refused(self, error: _ReadOnly) -> RemoteError:
        """Nothing is written for a while, and then as by one who has just come: with credentials that are read anew."""
        told = f"{error}; check that the credentials in the environment may write there"
        with self._lock:
            was_read_only, self.read_only = self.read_only, told
            self._read_only_until = time.monotonic() + _LAST_AWAY
            self._made = None
        if not was_read_only:
            _logger.warning("%s: its entries are used, and for now none is added", error)
        return RemoteError(told)

    def _put_beside(self, fs: Any, root: str, path: Path, key: str) -> None:
        """Puts a file where half of one would be seen: under a name of its own, which it then changes."""
        fs.makedirs(root, exist_ok=True)
        if not self._looked_for_torn:
            self._looked_for_torn = True
            with contextlib.suppress(Exception):
                _remove_torn(fs, root)
        beside, target = f"{root}/{_TORN}{secrets.token_hex(8)}", _object(root, key)
        try:
            fs.put_file(str(path), beside)
            try:
                fs.mv(beside, target)
            except OSError:
                if not fs.exists(target):
                    raise
                fs.rm_file(target)  # some do not rename over what is there
                fs.mv(beside, target)
        except BaseException:
            with contextlib.suppress(Exception):
                fs.rm_file(beside)
            raise

    def remove(self, key: str, *, asked: bool = True) -> bool:
        """Removes an object; whether there was one. Raises `RemoteError`."""

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
            return self._ask(drop, 2 * self.timeout, doing="be changed", asked=asked)
        except _ReadOnly as error:
            with self._lock:
                self._made = None  # its credentials may be old
            raise RemoteError(str(error)) from None

    # asking

    @property
    def is_away(self) -> bool:
        """Whether it failed and is left alone for now."""
        with self._lock:
            return time.monotonic() < self._until

    def _ask(
        self, call: Callable[[], _R], seconds: float | Callable[[Future[_R]], str], *, doing: str, asked: bool = False
    ) -> _R:
        """What a call gives. Raises `FileNotFoundError` as it does; else what `_bounded` raises, after which it is away."""
        if asked:
            self._check_left()
        is_trial = not asked and self._enter()
        try:
            found = self._bounded(call, seconds, doing=doing)
        except (FileNotFoundError, _ReadOnly, OutputError):
            self._answered()
            raise
        except RemoteError as error:
            self._failed(error, counts=not asked, is_trial=is_trial)
            raise
        self._answered()
        return found

    def _enter(self) -> bool:
        """Lets in who may ask now; whether that is the one caller who tries again after a failure."""
        with self._lock:
            now = time.monotonic()
            if now < self._until:
                raise RemoteError(
                    f"remote: {self.url} does not answer, and is left alone for {self._until - now:.0f} s"
                )
            if self._away:
                self._until = now + self._away
            return self._away > 0

    def _check_left(self) -> None:
        """Raises `RemoteError` while too many calls hang that nobody waits for."""
        with self._lock:
            self._left = [thread for thread in self._left if thread.is_alive()]
            if len(self._left) >= _MOST_LEFT:
                raise RemoteError(
                    f"remote: {self.url} does not answer: {len(self._left)} calls still wait for it; try again later"
                )

    def _answered(self) -> None:
        with self._lock:
            was_away, self._away, self._until = self._away, 0.0, 0.0
            self._left = []
        if was_away:
            _logger.warning("%s answers again", self.url)

    def _failed(self, error: RemoteError, *, counts: bool, is_trial: bool) -> None:
        with self._lock:
            self._made = None  # a connection that broke does not mend
            first = not self._away
            if not counts or not (first or is_trial):  # of several that failed at once, one counts
                return
            self._away = _FIRST_AWAY if first else min(2 * self._away, _LAST_AWAY)
            self._until = time.monotonic() + self._away
        if first:
            _logger.warning(
                "%s; it is left alone for a while, and tried again: references are computed meanwhile", error
            )

    def _bounded(self, call: Callable[[], _R], seconds: float | Callable[[Future[_R]], str], *, doing: str) -> _R:
        """What a call gives within a time, in a thread that is left behind if it hangs.

        Raises what is wrong as `RemoteError`, `_ReadOnly`, `OutputError`, or `FileNotFoundError`; none with credentials.
        """
        done: Future[_R] = Future()

        def run() -> None:
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)

        thread = threading.Thread(target=run, name="limner-remote", daemon=True)
        thread.start()
        if isinstance(seconds, (int, float)):
            problem = "" if wait([done], timeout=seconds).done else f"no answer within {seconds:g} s"
        else:
            problem = seconds(done)
        if problem:
            with self._lock:
                self._left = [*(left for left in self._left if left.is_alive()), thread]
            raise self._error(doing, problem)
        error = done.exception()
        if error is None:
            return done.result()
        if isinstance(error, LimnerError):
            raise error
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError from None
        told = self._told(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and doing == "be read":
            raise OutputError(f"store: no room for what is fetched ({told}); free some space") from None
        if doing in ("be written", "be changed") and isinstance(error, (PermissionError, NotImplementedError)):
            raise _ReadOnly(f"remote: {self.url} cannot {doing} ({told})") from None
        raise self._error(doing, told) from None

    def _error(self, doing: str, problem: str) -> RemoteError:
        return RemoteError(
            f"remote: {self.url} cannot {doing} ({problem}); check the address, the credentials in the environment, "
            "and that they may list, read, write and remove there"
        )

    def _told(self, error: BaseException) -> str:
        """An error in one line, without credentials."""
        text = self._scrubbed(" ".join(str(error).split()))
        return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__

    # the filesystem

    def _check_url(self) -> None:
        """Raises `InvalidRequest` unless fsspec has a filesystem for the URL, and its package is there."""
        import fsspec

        protocol = self._url.partition("://")[0]
        if "::" in protocol or not re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol):
            raise InvalidRequest(
                "remote", f"{self.url} is not a URL of one filesystem; give one such as s3://bucket/prefix"
            )
        try:
            fsspec.get_filesystem_class(protocol)
        except ValueError:
            raise InvalidRequest(
                "remote",
                f"{self.url}: no filesystem is known for {protocol}://; use s3://, gs://, abfs://, sftp:// or "
                "another one of fsspec",
            ) from None
        except ImportError as error:
            packages = {
                "s3": "s3fs",
                "s3a": "s3fs",
                "gs": "gcsfs",
                "gcs": "gcsfs",
                "abfs": "adlfs",
                "abfss": "adlfs",
                "az": "adlfs",
                "sftp": "paramiko",
                "ssh": "paramiko",
                "smb": "smbprotocol",
            }
            remedy = f"pip install {packages[protocol]}" if protocol in packages else self._told(error)
            raise InvalidRequest("remote", f"{self.url} needs a package that is not installed: {remedy}") from None

    def _filesystem(self) -> tuple[Any, str]:
        """The filesystem, made anew after a failure, and the path of the prefix in it. To be called in `_bounded`."""
        made = self._made
        if made is None:
            import fsspec

            fs, root = fsspec.core.url_to_fs(self._url, skip_instance_cache=True)
            made = self._made = fs, str(root).rstrip("/")
        return made

    def _probe(self, *, make: bool) -> str:
        """What is wrong with the place, if anything is; nothing is written there, but a folder where `make` says so."""
        fs, root = self._filesystem()
        if not root:
            return "names no bucket or folder; give one such as s3://bucket/prefix"
        try:
            found = fs.info(root)
        except FileNotFoundError:
            if _has_folders(root):
                if not make:
                    return "is not there; check the name"
                fs.makedirs(root, exist_ok=True)
                return ""
            bucket = root.partition("/")[0]
            with contextlib.suppress(PermissionError):  # one that may not be looked at, but what is in it
                try:
                    fs.info(bucket)
                except FileNotFoundError:
                    return f"is in no bucket that is there; make {self._scrubbed(bucket)} first, or check the name"
            return ""
        return "is a file; give a prefix or a folder" if found.get("type") == "file" else ""

    def _scrubbed(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class _ReadOnly(Exception):
    """It answers, and may not be changed."""


def _object(root: str, key: str) -> str:
    check_key(key)
    return f"{root}/{key}.safetensors"


def _has_folders(root: str) -> bool:
    """Whether a path is in a filesystem with folders: those of object stores start with a bucket."""
    return root.startswith("/")


def _remove_torn(fs: Any, root: str) -> None:
    """What writers left that were killed while writing."""
    for info in fs.ls(root, detail=True):
        written = _modified(info)
        if str(info["name"]).rpartition("/")[2].startswith(_TORN) and written and time.time() - written > _TORN_SECONDS:
            with contextlib.suppress(Exception):
                fs.rm_file(info["name"])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _modified(info: dict[str, Any]) -> float | None:
    """When an object was written, from what its filesystem says of it."""
    for name in _TIMES:
        value = info.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return None


def _stopper(given_up: threading.Event) -> Any:
    """A callback of fsspec that ends a copy that nobody waits for."""
    from fsspec.callbacks import Callback

    class Stopper(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            if given_up.is_set():
                raise ConnectionAbortedError("nobody waits for it")

    return Stopper()
