"""Files: write them whole or not at all, and name them in messages. Knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from limner.errors import OutputError

__all__ = ["atomic_write", "open_regular", "printable", "write_file"]


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file for reading if it is a regular one: a pipe or a device would make the reader wait. Raises `OSError`."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(number).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return open(number, "rb")
    except BaseException:
        os.close(number)
        raise


def write_file(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write a file whole or not at all; `mode` are its permission bits, set before the first byte. Raises `OutputError`."""
    with atomic_write(path) as temporary, temporary.open("xb") as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(data)


@contextlib.contextmanager
def atomic_write(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Give a temporary file name in the folder of `path`, renamed to `path` when the block ends, removed if it fails.

    Without `synced` the data are not flushed to the disk first: after a power failure the file may be torn.
    Raises `OutputError`.
    """
    temporary = path.with_name(f".limner-{os.getpid()}-{secrets.token_hex(8)}")
    try:
        yield temporary
        if synced:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"output: {path} cannot be written ({error.strerror or error}); nothing was left there"
        ) from error


def printable(text: str) -> str:
    """Return a file name as valid UTF-8, which every terminal and log accepts."""
    return os.fsencode(text).decode("utf-8", "replace")
