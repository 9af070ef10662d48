"""`Storage` in a folder, with SQLite for the rows. An open lock file makes one process at a time hold it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from limner.errors import OutputError
from limner.files import write_file
from limner.server.jobs.storage import Connection, Row, StorageFull, StorageInUse, Value, may_pass

__all__ = ["FolderStorage"]

_PASSING = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
)
_PROBE_BYTES = 64 << 10


class FolderStorage:
    """`Storage` in a folder: rows in `jobs.sqlite`, files as files."""

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
                self._db.execute("PRAGMA synchronous = FULL")  # an answered write survives a power failure
            except BlockingIOError:
                raise StorageInUse(
                    f"data: {self.folder} is used by another server; stop it, or give another folder with --data"
                ) from None
            except (OSError, sqlite3.Error) as error:
                problem = "is a file" if self.folder.is_file() else f"cannot be used ({error})"
                raise OutputError(f"data: {self.folder} {problem}; give another folder with --data") from error
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

    def rows(self, query: str, values: Sequence[Value] = ()) -> list[Row]:
        with self.lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise _problem(f"data: {self.folder} cannot be read ({error})", error) from error

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
                    raise _problem(f"data: {self.folder} cannot be written ({error})", error) from error
                raise

    def write_file(self, name: str, data: bytes, *, private: bool = False) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise _problem(f"data: {path.parent} cannot be made ({error.strerror or error})", error) from error
        try:
            write_file(path, data, mode=0o600 if private else None)
        except OutputError as error:
            raise _problem(str(error), error.__cause__) from error.__cause__

    def read_file(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            message = f"data: {self.folder / name} cannot be read ({error.strerror or error})"
            raise _problem(message, error) from error

    def has_file(self, name: str) -> bool:
        return (self.folder / name).exists()

    def remove_files(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)

    def files(self, folder: str) -> list[tuple[str, float, int]]:
        found, now = [], time.time()
        for path in (self.folder / folder).glob("*"):
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                found.append((path.name, now - about.st_mtime, about.st_size))
        return found

    def check_writable(self) -> None:
        self.write_file("probe", bytes(_PROBE_BYTES))
        self.remove_files(["probe"])

    def close(self) -> None:
        with self.lock:
            self._opened.close()


def _problem(message: str, error: BaseException | None) -> OutputError:
    """Return an error of the storage: a `StorageFull` if the same call may succeed later."""
    code = getattr(error, "sqlite_errorcode", None)  # its lowest byte is the kind
    passing = may_pass(error) or (code is not None and code & 0xFF in _PASSING)
    return StorageFull(message) if passing else OutputError(message)
