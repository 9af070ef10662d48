"""Where weights come from: a path on this disk, or the id of a repository on the Hugging Face hub.

Knows nothing of what is in either.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from limner.errors import CheckpointError, first_line

__all__ = ["download_failures", "downloading", "is_hub_id", "local_path"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local_path(given: str | os.PathLike[str], *, field: str) -> tuple[Path, bool]:
    """Return what was given as a path, and True if it exists. Raises `CheckpointError`."""
    try:
        path = Path(given)
        return path, path.exists()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{field}: {given!r} is not a path or hub id ({error})") from error


def is_hub_id(text: str) -> bool:
    """Return True for owner/name; it may still be a path."""
    return _HUB_ID.fullmatch(text) is not None


def download_failures() -> tuple[type[Exception], ...]:
    """Return the exceptions of the hub's client for what cannot be downloaded and is not in its cache."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    return LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError


@contextlib.contextmanager
def downloading(hub_id: str, *, field: str, instead: str) -> Iterator[None]:
    """Raise `CheckpointError` for a failed download; `instead` is what the message says to give in its place."""
    try:
        yield
    except download_failures() as error:
        raise CheckpointError(
            f"{field}: {hub_id} is not in the local cache and could not be downloaded ({first_line(error)}); "
            f"check the name, the network and your hub login, or give {instead}"
        ) from error
