"""Where a job store keeps its rows and files, held by one process at a time: a folder, with SQLite for the rows.

Owns the seam, the lock of a folder and what of SQL differs between databases. Knows no job.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from limner.errors import InvalidRequest, OutputError
from limner.files import write_file
from limner.places import is_url

__all__ = ["Connection", "FolderStorage", "Storage", "StorageInUse", "StorageUnavailable", "check_data", "open_storage"]


class StorageInUse(OutputError):
    """Another process holds the storage, and may leave it."""


class StorageUnavailable(OutputError):
    """The storage does not answer, and may again; what was asked of it was done or not, but not half."""


class Rows(Protocol):
    """What a statement gives."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Connection(Protocol):
    """Statements of one transaction; `?` stands for a value."""

    def execute(self, query: str, values: Sequence[Any] = (), /) -> Rows: ...


class Storage(Protocol):
    """Rows and files of one job store. Safe to use from several threads; `lock` makes several calls one.

    Files have names like "inputs/NAME" and are whole or not there. Every method raises `OutputError` where the storage
    fails, `StorageUnavailable` where it may be back soon.
    """

    name: str
    """As logs and errors tell it, without a password."""
    lock: threading.RLock

    def prepare(self, schema: str, *, version: int) -> None:
        """Makes the tables where there are none. `{real}` and `{strict}` in the schema are what the database calls
        a double, and what makes it keep to types."""

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """What one statement finds."""
        ...

    def transaction(self) -> AbstractContextManager[Connection]:
        """Statements that are all done, or none of them if the block raises."""
        ...

    def write_file(self, name: str, data: bytes, *, private: bool = False) -> None: ...

    def read_file(self, name: str) -> bytes:
        """Raises `FileNotFoundError`."""
        ...

    def has_file(self, name: str) -> bool: ...

    def remove_files(self, names: Iterable[str]) -> None:
        """Those that are there."""

    def files(self, folder: str) -> list[tuple[str, float]]:
        """The names in a folder, and how many seconds ago each was written."""
        ...

    def close(self) -> None:
        """Lets another process have the storage. A second time does nothing."""


def open_storage(data: str | os.PathLike[str]) -> Storage:
    """The storage that a folder's path or a `postgresql://` URL names, held until it is closed.

    Raises `StorageInUse`, `OutputError`, and `InvalidRequest` for a URL of another kind.
    """
    check_data(data)
    if not is_url(data):
        return FolderStorage(data)
    from limner.server.jobs.postgres import PostgresStorage

    return PostgresStorage(os.fspath(data))


def check_data(data: str | os.PathLike[str]) -> None:
    """Raises `InvalidRequest` and `MissingExtra` where it can be known, without asking, that no storage is meant."""
    if not is_url(data):
        return
    kind = os.fspath(data).partition("://")[0]
    if kind not in ("postgresql", "postgres"):
        raise InvalidRequest("data", f"{kind}:// is not read; give a folder, or postgresql://HOST/DATABASE")
    from limner.server.jobs.postgres import check_url

    check_url(os.fspath(data))


class FolderStorage:
    """`Storage` in a folder: `jobs.sqlite`, and files as they are."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.name = str(self.folder)
        self.lock = threading.RLock()
        with contextlib.ExitStack() as opened:
            try:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # prompts, pictures, secrets of webhooks
                held = opened.enter_context((self.folder / "lock").open("w"))
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._db = sqlite3.connect(self.folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
                opened.callback(self._db.close)
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")  # what is answered survives a loss of power too
            except BlockingIOError:
                raise StorageInUse(
                    f"data: {self.folder} is used by another server; stop it, or give another folder"
                ) from None
            except (OSError, sqlite3.Error) as error:
                raise OutputError(f"data: {self.folder} cannot be used ({error}); give another folder") from error
            self._opened = opened.pop_all()

    def prepare(self, schema: str, *, version: int) -> None:
        try:
            (found,) = self._db.execute("PRAGMA user_version").fetchone()
            if found == 0:
                tables = schema.format(real="REAL", strict=" STRICT")
                self._db.executescript(f"BEGIN; {tables} PRAGMA user_version = {version}; COMMIT;")
        except sqlite3.Error as error:
            raise OutputError(f"data: {self.folder} cannot be used ({error}); give another folder") from error
        if found not in (0, version):
            raise OutputError(
                f"data: {self.folder} is of version {found}, this Limner reads {version}; give another folder"
            )

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self.lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise OutputError(f"data: {self.folder} cannot be read ({error})") from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        with self.lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                with contextlib.suppress(sqlite3.Error):
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise OutputError(f"data: {self.folder} cannot be written ({error})") from error
                raise

    def write_file(self, name: str, data: bytes, *, private: bool = False) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"data: {path.parent} cannot be made ({error.strerror or error})") from error
        write_file(path, data, mode=0o600 if private else None)

    def read_file(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise OutputError(f"data: {self.folder / name} cannot be read ({error.strerror or error})") from error

    def has_file(self, name: str) -> bool:
        return (self.folder / name).exists()

    def remove_files(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)

    def files(self, folder: str) -> list[tuple[str, float]]:
        found = []
        for path in (self.folder / folder).glob("*"):
            with contextlib.suppress(FileNotFoundError):
                found.append((path.name, time.time() - path.stat().st_mtime))
        return found

    def close(self) -> None:
        with self.lock:
            self._opened.close()
