"""Where weights come from: a path on this disk, or the id of a repository on the Hugging Face hub.

Knows nothing of what is in either.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from limner.errors import CheckpointError, first_line

__all__ = ["Hub", "download_failures", "downloading", "is_hub_id", "local_path"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hub:
    """How repositories are read; the names and meanings are those of `huggingface_hub`. The token is never shown.

    `revision` is a branch, tag or commit of the model's repository. `token` is a text, True (that of the login) or False
    (none).
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def of_others(self) -> Hub:
        """Return what holds for other repositories than the model's."""
        return replace(self, revision=None)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for the hub's client."""
        return {
            "revision": self.revision,
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
        }


def local_path(given: str | os.PathLike[str], *, field: str) -> tuple[Path, bool]:
    """Return what was given as a path, and True if it exists. Raises `CheckpointError`."""
    if given == "":
        raise CheckpointError(f"{field}: '' is empty; give a path or hub id, or leave it out")
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
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{field}: {hub_id} has a licence that has to be accepted: visit https://huggingface.co/{hub_id} with your "
            f"account, then run: hf auth login (or set HF_TOKEN); or give {instead}"
        ) from error
    except download_failures() as error:
        raise CheckpointError(
            f"{field}: {hub_id} is not in the local cache and could not be downloaded ({first_line(error)}); "
            f"check the name, the network and your hub login, or give {instead}"
        ) from error
