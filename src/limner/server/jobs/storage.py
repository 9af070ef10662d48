"""The seam between jobs and a database: rows and files of one job store, held by one process at a time.

Knows no job and no database.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from limner.errors import OutputError

__all__ = [
    "Connection",
    "Row",
    "Rows",
    "Storage",
    "StorageFull",
    "StorageInUse",
    "StorageUnavailable",
    "Value",
    "may_pass",
]

Value = str | float | bytes | None | list[str]
"""A value in a statement; lists are for PostgreSQL alone."""
Row = tuple[Any, ...]
"""Values as a database gives them: their types are those of the columns that the query names."""


class StorageInUse(OutputError):
    """Another process holds the storage; it may be free later."""


class StorageUnavailable(OutputError):
    """The storage does not answer; it may later. The operation was done wholly or not at all."""


class StorageFull(StorageUnavailable):
    """The machine lacks something: room, file descriptors, memory. The operation was not done."""


_PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EROFS, errno.EAGAIN}
)


def may_pass(error: BaseException | None) -> bool:
    """Return whether an error of the operating system may be gone later, without any change to the data."""
    return isinstance(error, OSError) and error.errno in _PASSING


class Rows(Protocol):
    """The outcome of one statement."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Connection(Protocol):
    """Statements of one transaction; `?` stands for a value."""

    def execute(self, query: str, values: Sequence[Any] = (), /) -> Rows: ...


class Storage(Protocol):
    """Rows and files of one job store. Safe to use from several threads; hold `lock` to make several calls one.

    Files have names like "inputs/NAME" and are whole or not there. Every method raises `OutputError` if the storage
    fails, `StorageUnavailable` if it may be back soon.
    """

    name: str
    """For logs and errors, without a password."""
    lock: threading.RLock

    def prepare(self, schema: str, *, version: int) -> None:
        """Create the tables if there are none.

        `{real}` in the schema stands for the database's type of a double, `{strict}` for what makes it enforce types.
        """

    def rows(self, query: str, values: Sequence[Value] = ()) -> list[Row]:
        """Return the rows that one statement finds."""
        ...

    def transaction(self) -> AbstractContextManager[Connection]:
        """Run statements that are all done, or none of them if the block raises."""
        ...

    def write_file(self, name: str, data: bytes, *, private: bool = False) -> None: ...

    def read_file(self, name: str) -> bytes:
        """Return the contents of a file. Raises `FileNotFoundError`."""
        ...

    def has_file(self, name: str) -> bool: ...

    def remove_files(self, names: Iterable[str]) -> None:
        """Remove files; missing ones are ignored."""

    def files(self, folder: str) -> list[tuple[str, float, int]]:
        """Return the names in a folder, each with the seconds since it was written, and its bytes."""
        ...

    def check_writable(self) -> None:
        """Raise `OutputError` if nothing can be written now."""

    def close(self) -> None:
        """Release the storage for another process. A second call does nothing."""
