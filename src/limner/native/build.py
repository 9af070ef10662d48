"""Compile C sources of this folder at first use, and load them.

A library is compiled (2 seconds) into `$XDG_CACHE_HOME/limner`, under a name with the digest of source and compiler, and
shares the OpenMP threads of torch. If others can write that folder, or this user cannot, it is built for this process
alone. Without a compiler, or with LIMNER_NATIVE=0, there is none. Knows the machine, nothing of what sources do.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

__all__ = ["Library"]

_logger = logging.getLogger("limner")
_FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-fopenmp",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512bf16",
)


class Library:
    """C sources as a library: `files`, with `common.h` before them.

    They are read at once, so that source and module have the same version even if files are replaced under a running
    process.

    `flags` are further flags of the compiler. `missing` says why this machine cannot run it, None if it can. `declare`
    sets the argument types of a loaded library.
    """

    def __init__(
        self,
        name: str,
        *,
        files: Sequence[str],
        flags: Sequence[str] = (),
        missing: Callable[[], str | None],
        declare: Callable[[ctypes.CDLL], None],
    ) -> None:
        self._name, self._flags = name, (*_FLAGS, *flags)
        self._files = tuple(files)
        self._source = b"\n".join(Path(__file__).with_name(file).read_bytes() for file in ("common.h", *files))
        self._missing, self._declare = missing, declare

    @cached_property
    def digest(self) -> str:
        """A digest of the source, comments included. It is part of the content key of references."""
        return hashlib.sha256(self._source).hexdigest()[:8]

    @property
    def loaded(self) -> ctypes.CDLL | None:
        """The library, built if need be; None if it cannot be built or loaded, with the reason in the log."""
        return None if isinstance(self._found, str) else self._found

    @property
    def why_missing(self) -> str | None:
        """Why there is none here; None if there is."""
        return self._found if isinstance(self._found, str) else None

    @cached_property
    def _found(self) -> ctypes.CDLL | str:
        """The library; the reason if it cannot be built or loaded."""
        try:
            reason = _why_none() or self._missing()
            if reason is None and not _compiler():
                reason = "there is no C compiler (CC, cc, gcc or clang)"
            if reason is None:
                return self._from_cache()
        except (OSError, subprocess.SubprocessError, RuntimeError, ValueError, AttributeError) as error:
            output = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
            reason = f"{_compiler()[0]} says: {output}" if output else str(error)
        _logger.info("no native %s: %s", self._name, reason)
        return reason

    def _from_cache(self) -> ctypes.CDLL:
        """Load the library from the cache; build it if it is missing or does not load (a build was interrupted)."""
        folder = _cache_folder()
        if folder is None:
            with tempfile.TemporaryDirectory() as private:
                return self._load(self._build(Path(private) / f"{self._name}.so"))
        version = subprocess.run([*_compiler(), "--version"], capture_output=True, check=True).stdout
        digest = hashlib.sha256(b"\0".join([self._source, version, " ".join(self._flags).encode()])).hexdigest()[:16]
        path = folder / f"{self._name}-{digest}.so"
        if _is_ours(path):
            try:
                return self._load(path)
            except (OSError, AttributeError) as error:
                _logger.warning("%s is built again: %s", path, error)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            os.replace(self._build(Path(temporary) / path.name), path)
        return self._load(path)

    def _build(self, path: Path) -> Path:
        command = [*_compiler(), *self._flags, "-shared", "-o", str(path), "-x", "c", "-"]
        subprocess.run(command, input=self._source, capture_output=True, check=True, timeout=120)
        path.chmod(0o700)
        return path

    def _load(self, path: Path) -> ctypes.CDLL:
        library = ctypes.CDLL(str(path))
        self._declare(library)
        _logger.info("native %s: %s", self._name, path)
        return library


def _why_none() -> str | None:
    if os.environ.get("LIMNER_NATIVE") == "0":
        return "LIMNER_NATIVE is 0"
    return None if sys.platform == "linux" else "the system is not Linux"


def _compiler() -> list[str]:
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return [found] if found else []


def _cache_folder() -> Path | None:
    """Return the folder of built libraries; None if this user cannot write it, or others can."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limner"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if _is_ours(folder) and os.access(folder, os.W_OK | os.X_OK) else None


def _is_ours(path: Path) -> bool:
    """Return True if a file or folder exists, belongs to this user, and nobody else can write it."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022
