"""Picks the storage that a folder or a URL names."""

from __future__ import annotations

import os

from limner.errors import InvalidRequest
from limner.places import is_url
from limner.server.jobs.sqlite import FolderStorage
from limner.server.jobs.storage import Storage

__all__ = ["check_data", "open_storage"]


def open_storage(data: str | os.PathLike[str]) -> Storage:
    """Open the storage at a folder or a `postgresql://` URL, held until it is closed.

    Raises `StorageInUse`, `OutputError`, `MissingExtra`, and `InvalidRequest` for a URL of another kind.
    """
    check_data(data)
    if not is_url(data):
        return FolderStorage(data)
    from limner.server.jobs.postgres import PostgresStorage  # an optional extra

    return PostgresStorage(os.fspath(data))


def check_data(data: str | os.PathLike[str]) -> None:
    """Raise `InvalidRequest` or `MissingExtra` for a place that can be refused without connecting to it."""
    if not is_url(data):
        return
    kind = os.fspath(data).partition("://")[0]
    if kind not in ("postgresql", "postgres"):
        raise InvalidRequest("data", f"{kind}:// is not read; give a folder, or postgresql://HOST/DATABASE")
    from limner.server.jobs.postgres import check_url  # an optional extra

    check_url(os.fspath(data))
