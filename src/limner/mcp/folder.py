"""The one folder whose files an assistant may name: pictures are read from it and written to it, and nowhere else.

Each part of a path is opened beneath the one before, and no symbolic link is followed, so that what is changed in the
folder meanwhile leads nowhere else either. Knows nothing of pictures but their suffixes and the most bytes of a file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from urllib.parse import unquote, urlsplit

from limner.errors import InvalidRequest, OutputError
from limner.images import FORMATS, MAX_FILE_BYTES, printable

__all__ = ["AllowedFolder"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class AllowedFolder:
    """A folder that stays open. Paths are relative to it, or absolute and inside of it, or file:// URLs of such."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises `InvalidRequest` unless the path is a folder."""
        try:
            self._number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise InvalidRequest(
                "--folder", f"{printable(os.fspath(path))} is not a folder that can be read"
            ) from error
        self.path = Path(os.path.abspath(path))
        self._names = (self.path, Path(os.path.realpath(path)))

    def close(self) -> None:
        os.close(self._number)

    def read(self, path: str, *, field: str) -> bytes:
        """Return the bytes of a file. Raises `InvalidRequest` that names `field`."""
        parts = self._parts(path, field=field)
        with self._parent(parts, field=field) as parent:
            try:
                number = os.open(parts[-1], _FILE, dir_fd=parent)
            except OSError as error:
                raise _refusal(path, parts[-1], parent, error, field=field) from None
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, number)
                found = os.fstat(number)
                if not stat.S_ISREG(found.st_mode):
                    raise InvalidRequest(field, f"{printable(path)} is not a file; give a picture file")
                if found.st_size > MAX_FILE_BYTES:
                    raise InvalidRequest(field, f"{printable(path)} is over {MAX_FILE_BYTES} bytes; scale it down")
                with open(number, "rb", closefd=False) as file:
                    return file.read(MAX_FILE_BYTES + 1)

    def check_new(self, path: str, *, field: str) -> str:
        """Return the path, relative to the folder, of a picture that can be written there: no file has this name yet.

        Raises `InvalidRequest` that names `field`.
        """
        parts = self._parts(path, field=field)
        if PurePath(parts[-1]).suffix.lower() not in FORMATS:
            raise InvalidRequest(field, f"{printable(path)} has to end in {', '.join(FORMATS)}")
        with self._parent(parts, field=field) as parent:
            if len(os.fsencode(parts[-1])) > 255:
                raise InvalidRequest(field, f"{printable(path)} is too long a name; give a shorter one")
            if _exists(parts[-1], parent):
                raise InvalidRequest(field, f"{printable(path)} exists already, and is kept; give another name")
            if not os.access(".", os.W_OK, dir_fd=parent):
                raise InvalidRequest(
                    field, f"{printable(path)} cannot be written: its folder is read-only; choose another"
                )
        return os.path.join(*parts)

    def write_new(self, path: str, data: bytes, *, field: str) -> None:
        """Write a new file, whole or not at all. Raises `InvalidRequest` if it exists meanwhile, and `OutputError`."""
        parts = self._parts(path, field=field)
        temporary = f".limner-{os.getpid()}-{secrets.token_hex(8)}"
        with self._parent(parts, field=field) as parent:
            try:
                number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=parent)
                with open(number, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(number)
                _name(temporary, parts[-1], parent)
            except FileExistsError:
                raise InvalidRequest(
                    field, f"{printable(path)} exists already, and is kept; give another name"
                ) from None
            except OSError as error:
                raise OutputError(
                    f"{field}: {printable(path)} cannot be written ({error.strerror or error}); nothing was left there"
                ) from error
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=parent)

    def _parts(self, path: str, *, field: str) -> tuple[str, ...]:
        """Return the parts of a path below the folder, none of them "..". Raises `InvalidRequest`."""
        name = _path_of_url(path, field=field) if path[:5].lower() == "file:" else path
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            raise InvalidRequest(field, f"{path!r} is not a file name") from None
        pure = PurePath(name)
        if pure.is_absolute():
            root = next((root for root in self._names if pure.is_relative_to(root)), None)
            if root is None:
                raise self._outside(path, field=field)
            pure = pure.relative_to(root)
        if ".." in pure.parts:
            raise self._outside(path, field=field)
        if not pure.parts or "\0" in name:
            raise InvalidRequest(field, f"{path!r} is not a file name; give the name of a picture file in {self.path}")
        return pure.parts

    def _outside(self, path: str, *, field: str) -> InvalidRequest:
        return InvalidRequest(
            field, f"{printable(path)} is outside of {self.path}; give a path inside of it, without .."
        )

    @contextlib.contextmanager
    def _parent(self, parts: Sequence[str], *, field: str) -> Iterator[int]:
        """Open the folder that the last part is in."""
        number = os.dup(self._number)
        try:
            for i, part in enumerate(parts[:-1], start=1):
                try:
                    below = os.open(part, _FOLDER, dir_fd=number)
                except OSError as error:
                    raise _refusal(os.path.join(*parts[:i]), part, number, error, field=field) from None
                os.close(number)
                number = below
            yield number
        finally:
            os.close(number)


def _path_of_url(url: str, *, field: str) -> str:
    try:
        parsed = urlsplit(url)
    except ValueError:
        raise InvalidRequest(field, f"{url!r} is not a URL of a file") from None
    if parsed.netloc not in ("", "localhost") or parsed.query or parsed.fragment:
        raise InvalidRequest(field, f"{url!r} is not a URL of a file of this machine, as file:///home/me/cat.png")
    return unquote(parsed.path)


def _exists(name: str, parent: int) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _name(temporary: str, name: str, parent: int) -> None:
    """Give a file its name, unless another has it. Raises `FileExistsError`."""
    try:
        os.link(temporary, name, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a filesystem without hard links
        if _exists(name, parent):
            raise FileExistsError(name) from None
        os.replace(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)


def _refusal(path: str, part: str, parent: int, error: OSError, *, field: str) -> InvalidRequest:
    """Say why a part of a path cannot be opened."""
    with contextlib.suppress(OSError):
        if stat.S_ISLNK(os.stat(part, dir_fd=parent, follow_symlinks=False).st_mode):
            return InvalidRequest(
                field,
                f"{printable(path)} is a symbolic link, which is not followed; put the file itself into the folder",
            )
    return InvalidRequest(field, f"{printable(path)} cannot be opened ({error.strerror or error}); check the name")
