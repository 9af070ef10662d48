"""`Storage` in a PostgreSQL database, for services whose jobs have to outlive the machine that runs them.

Rows and files are tables of the schema `limner`. An advisory lock of the session makes one process at a time hold them.
The lock ends with the process or its machine, and the next process continues the jobs. After a lost connection the
storage reconnects, and continues only if it gets the lock again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from limner.errors import InvalidRequest, LimnerError, MissingExtra, OutputError, first_line
from limner.server.jobs.storage import Connection, Row, StorageInUse, StorageUnavailable, Value

try:
    import psycopg
    from psycopg import conninfo
except ImportError as error:
    raise MissingExtra("data: postgresql://", package="psycopg", extra="postgres") from error

__all__ = ["PostgresStorage", "check_url"]

_logger = logging.getLogger("limner.server")
_R = TypeVar("_R")
_LOCK = (0x4C494D4E, 1)
"""The advisory lock of a job store, in its database."""
_DEFAULTS: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20000,
    "application_name": "limner",
    "target_session_attrs": "read-write",  # the primary of several hosts: a standby has locks of its own
}
_SESSION = (
    "SET search_path TO limner",
    "SET statement_timeout = '15s'",
    # the server notices within 25 s, not hours, that a machine is gone; until then the lock stays taken
    "SET tcp_keepalives_idle = 10",
    "SET tcp_keepalives_interval = 5",
    "SET tcp_keepalives_count = 3",
    "SET tcp_user_timeout = '25s'",  # also while an answer is being sent, when there are no keepalives
)
_HANGS_SECONDS = 20.0
"""Longest wait for an answer: longer than `statement_timeout`, at which the server itself gives a statement up."""
_FILES = """
CREATE TABLE files (folder TEXT, name TEXT, data BYTEA NOT NULL, written TIMESTAMPTZ NOT NULL, PRIMARY KEY (folder, name));
CREATE TABLE version (version INTEGER NOT NULL);
"""
_RECONNECT_SECONDS = 5.0
_PAUSE = 0.25
_AGAIN_SECONDS = 1.0
"""Pause after a failed reconnection, in which calls fail at once."""


class _Connection(psycopg.Connection[Any]):
    """A connection that is closed if the server hangs."""

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().wait(_bounded(gen, time.monotonic() + _HANGS_SECONDS), *args, **kwargs)
        except _Hangs as error:
            self.close()
            raise psycopg.OperationalError(f"no answer for {_HANGS_SECONDS:g} s") from error


class _Hangs(Exception):
    pass


def _bounded(gen: Generator[Any, Any, _R], end: float) -> Generator[Any, Any, _R]:
    """Run the steps of a statement until a deadline; psycopg resumes them now and then even if nothing arrived."""
    try:
        wanted = next(gen)
        while True:
            came = yield wanted
            if time.monotonic() > end:
                raise _Hangs
            wanted = gen.send(came)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def check_url(url: str) -> dict[str, Any]:
    """Return the parts of a URL by libpq's names. Raises `InvalidRequest` without the URL, which may hold a password."""
    try:
        return dict(conninfo.conninfo_to_dict(url))
    except psycopg.Error:
        raise InvalidRequest(
            "data",
            "the postgresql:// URL cannot be read; give postgresql://USER@HOST:PORT/DATABASE, with other "
            "characters as %XX",
        ) from None


class PostgresStorage:
    """`Storage` at a `postgresql://` URL, as libpq reads it; libpq may also find the password elsewhere."""

    def __init__(self, url: str) -> None:
        given = check_url(url)
        self._conninfo = conninfo.make_conninfo(**{**_DEFAULTS, **given})
        self.name = "postgresql://{}/{}".format(given.get("host", ""), given.get("dbname", ""))
        self.lock = threading.RLock()
        self._closed, self._in_transaction, self._not_before = False, False, 0.0
        self._session: tuple[int, str] | None = None  # process id and start time of the server's side of the connection
        try:
            self._db = self._connect()
        except psycopg.Error as error:
            raise StorageUnavailable(
                f"data: {self.name} cannot be reached ({first_line(error)}); check the URL"
            ) from error

    # connections

    def _connect(self) -> psycopg.Connection[Any]:
        """Return a connection that holds the lock. Raises `StorageInUse` and psycopg's errors."""
        db = _Connection.connect(self._conninfo, autocommit=True)
        try:
            for statement in _SESSION:
                db.execute(statement)
            if not self._take_lock(db):
                raise StorageInUse(
                    f"data: {self.name} is used by another server; stop it, or give another database with --data"
                )
            self._session = self._own_session(db)
        except BaseException:
            db.close()
            raise
        return db

    def _take_lock(self, db: psycopg.Connection[Any]) -> bool:
        """Take the lock, also from an earlier session of ours that the server believes alive. False: others have it."""
        lock = "SELECT pg_try_advisory_lock(%s, %s)"
        if _one(db, lock, _LOCK):
            return True
        holder = db.execute(
            "SELECT a.pid, a.backend_start::text FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
            "WHERE l.locktype = 'advisory' AND l.granted AND l.classid = %s AND l.objid = %s AND l.objsubid = 2 "
            "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            _LOCK,
        ).fetchone()
        if holder is not None:
            if holder != self._session:
                return False
            db.execute("SELECT pg_terminate_backend(%s, 3000)", (holder[0],))
        return bool(_one(db, lock, _LOCK))

    @staticmethod
    def _own_session(db: psycopg.Connection[Any]) -> tuple[int, str]:
        found = db.execute(
            "SELECT pid, backend_start::text FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        ).fetchone()
        assert found is not None
        return found[0], found[1]

    def _connection(self) -> psycopg.Connection[Any]:
        """Return a connection that is not known to be broken. Raises `StorageUnavailable`."""
        if self._closed:
            raise OutputError(f"data: {self.name} is closed")
        if not self._db.closed:
            return self._db
        end = time.monotonic() + _RECONNECT_SECONDS
        if end - _RECONNECT_SECONDS < self._not_before:
            raise StorageUnavailable(f"data: {self.name} does not answer")
        while True:
            try:
                self._db = self._connect()
                _logger.warning("connected to %s again", self.name)
                return self._db
            except (psycopg.OperationalError, StorageInUse) as error:
                if time.monotonic() > end or isinstance(error, StorageInUse):
                    self._not_before = time.monotonic() + _AGAIN_SECONDS
                    raise StorageUnavailable(f"data: {self.name} cannot be reached ({first_line(error)})") from error
            except psycopg.Error as error:
                raise self._failed("used", error) from error
            time.sleep(_PAUSE)

    def _failed(self, what: str, error: psycopg.Error) -> OutputError:
        if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):  # the host is no longer the primary
            self._db.close()
        may_be_back = self._db.closed or isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
        kind = StorageUnavailable if may_be_back else OutputError
        return kind(f"data: {self.name} cannot be {what} ({first_line(error)})")

    def close(self) -> None:
        with self.lock:
            if not self._closed:
                with contextlib.suppress(psycopg.Error):  # at once, not when the server notices that the session ended
                    self._db.execute("SELECT pg_advisory_unlock_all()")
            self._closed = True
            self._db.close()

    # rows

    def prepare(self, schema: str, *, version: int) -> None:
        with self.transaction() as db:
            if _one(db, "SELECT to_regclass('limner.version')") is None:
                if _one(db, "SELECT to_regnamespace('limner')") is None:
                    db.execute("CREATE SCHEMA limner")
                db.execute(schema.format(real="DOUBLE PRECISION", strict="") + _FILES)
                db.execute("INSERT INTO version VALUES (?)", (version,))
            found = _one(db, "SELECT version FROM version")
        if found != version:
            raise OutputError(
                f"data: {self.name} is of version {found}, this Limner reads {version}; give another database"
            )

    def rows(self, query: str, values: Sequence[Value] = ()) -> list[Row]:
        return self._run("read", query, values).fetchall()

    def _run(self, what: str, query: str, values: Sequence[Value], *, binary: bool = False) -> psycopg.Cursor[Any]:
        """Run one statement that may be done twice: outside a transaction it is repeated once if its connection is lost."""
        with self.lock:
            for is_last in (self._in_transaction, True):
                db = self._connection() if not self._in_transaction else self._db
                try:
                    return db.execute(_translated(query), values, binary=binary)
                except psycopg.Error as error:
                    if is_last or not db.closed:
                        raise self._failed(what, error) from error
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A lost connection undoes the transaction. If it is lost during the commit, the status is queried afterwards."""
        with self.lock:
            self._run("written", "BEGIN", ())
            db, self._in_transaction = self._db, True
            try:
                yield _Statements(db)
                number = _one(db, "SELECT pg_current_xact_id_if_assigned()::text")
                self._in_transaction = False
                try:
                    db.execute("COMMIT")
                except psycopg.OperationalError:
                    if not db.closed or number is None or not self._was_committed(number):
                        raise
            except BaseException as error:
                self._in_transaction = False
                with contextlib.suppress(psycopg.Error):
                    if not db.closed:
                        db.execute("ROLLBACK")
                if isinstance(error, psycopg.Error):
                    raise self._failed("written", error) from error
                raise

    def _was_committed(self, number: str) -> bool:
        """Return whether a transaction of a lost connection was committed. It is over: its lock could be taken again."""
        return bool(self.rows("SELECT pg_xact_status(?::xid8)", (number,))[0][0] == "committed")

    # files

    def write_file(self, name: str, data: bytes, *, private: bool = False) -> None:
        folder, _, base = name.rpartition("/")
        self._run(
            "written",
            "INSERT INTO files VALUES (?, ?, ?, now()) "
            "ON CONFLICT (folder, name) DO UPDATE SET data = excluded.data, written = excluded.written",
            (folder, base, data),
        )

    def read_file(self, name: str) -> bytes:
        folder, _, base = name.rpartition("/")
        query = "SELECT data FROM files WHERE folder = ? AND name = ?"
        found = self._run("read", query, (folder, base), binary=True).fetchone()
        if found is None:
            raise FileNotFoundError(f"{name} is not in {self.name}")
        return bytes(found[0])

    def has_file(self, name: str) -> bool:
        folder, _, base = name.rpartition("/")
        return bool(self.rows("SELECT 1 FROM files WHERE folder = ? AND name = ?", (folder, base)))

    def remove_files(self, names: Iterable[str]) -> None:
        by_folder: dict[str, list[str]] = {}
        for name in names:
            folder, _, base = name.rpartition("/")
            by_folder.setdefault(folder, []).append(base)
        for folder, found in by_folder.items():
            try:
                self._run("written", "DELETE FROM files WHERE folder = ? AND name = ANY(?)", (folder, found))
            except LimnerError as error:
                _logger.warning("%d files of %s are not removed now: %s", len(found), folder, error)

    def check_writable(self) -> None:
        self.rows("SELECT 1")  # connections are to a primary, which can be written

    def files(self, folder: str) -> list[tuple[str, float, int]]:
        query = (
            "SELECT name, extract(epoch FROM now() - written)::float8, octet_length(data) FROM files WHERE folder = ?"
        )
        return [(name, seconds, size) for name, seconds, size in self.rows(query, (folder,))]


class _Statements:
    """`Connection` over psycopg's."""

    def __init__(self, db: psycopg.Connection[Any]) -> None:
        self._db = db

    def execute(self, query: str, values: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        return self._db.execute(_translated(query), values or None)


def _one(db: Any, query: str, values: Sequence[Any] = ()) -> Any:
    row = db.execute(query, values).fetchone()
    return None if row is None else row[0]


@functools.cache
def _translated(query: str) -> Any:
    return query.replace("?", "%s")
