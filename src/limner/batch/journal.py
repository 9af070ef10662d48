"""Results of rows as JSON lines: how one looks, and files of them that only grow.

Owns the durability of a line and the check of what is read back. Knows nothing of images or of how rows are drawn.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limner.errors import InvalidRequest, OutputError

__all__ = ["Journal", "Result", "failure", "read_journal"]

Result = dict[str, Any]
"""One line of the results: what became of a row."""


def failure(error: Exception, *, line: int, id: str | None) -> Result:
    """Return the result of a row that could not be drawn."""
    described = {"type": type(error).__name__, "message": " ".join(str(error).split())}
    return {"line": line, "id": id, "status": "error", "error": described}


class Journal:
    """A file of JSON lines that only grows; a line is on disk when `append` returns. Raises `OutputError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("ab")
            _truncate_to_last_line(path)
        except OSError as error:
            raise self._failure(error) from error

    def append(self, values: Mapping[str, Any]) -> None:
        """Write a line and wait until it is on disk."""
        try:
            self._file.write(json.dumps(values).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is left in the buffer is what append failed to write
            self._file.close()

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(f"output: {self.path} cannot be written ({error.strerror or error})")


def _truncate_to_last_line(path: Path) -> None:
    """Remove the part of a line that a process left which was killed while it wrote."""
    with path.open("rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Give the whole lines of a journal; none if there is no file. Raises `InvalidRequest` if it is something else."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InvalidRequest("output", f"{path} cannot be read ({error.strerror or error})") from error
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            yield _checked(json.loads(line))
        except (ValueError, KeyError, RecursionError) as error:
            raise InvalidRequest(
                "output",
                f"line {number} of {path} is no result of a batch ({error}); move the file away, or give "
                "another folder",
            ) from None


def _checked(values: object) -> dict[str, Any]:
    """A line of a journal: a result, or a prefill. Raises `ValueError` and `KeyError`."""
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__}")
    if "prefill" not in values and values["status"] not in ("ok", "error"):
        raise ValueError(f"status {values['status']!r}")
    texts = ("id", "file", "sha256", "fingerprint")
    if values.get("status") == "ok" and not all(isinstance(values[name], str) for name in texts):
        raise ValueError("not all its fields are texts")
    return values
