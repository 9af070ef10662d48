"""How filesystems of fsspec differ: the packages they need, folders or buckets, and how they tell the time of writing.

Opens none of them.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from limner.errors import InvalidRequest
from limner.places import without_credentials

__all__ = ["check_url", "has_folders", "modified_at", "stopper"]

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
}
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
"""Names under which filesystems give the time of writing."""


def check_url(url: str, *, describe: Callable[[BaseException], str]) -> None:
    """Raise `InvalidRequest` unless fsspec has a filesystem for a URL, and its package is installed.

    `describe` turns an error into a line without credentials.
    """
    import fsspec

    shown, protocol = without_credentials(url), url.partition("://")[0]
    if "::" in protocol or not re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol):
        raise InvalidRequest("remote", f"{shown} is not a URL of one filesystem; give one such as s3://bucket/prefix")
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise InvalidRequest(
            "remote",
            f"{shown}: no filesystem is known for {protocol}://; use s3://, gs://, abfs://, sftp:// or "
            "another one of fsspec",
        ) from None
    except ImportError as error:
        remedy = f"pip install {_PACKAGES[protocol]}" if protocol in _PACKAGES else describe(error)
        raise InvalidRequest("remote", f"{shown} needs a package that is not installed: {remedy}") from None


def has_folders(root: str) -> bool:
    """Return True for a path in a filesystem with folders; a path in an object store starts with a bucket."""
    return root.startswith("/")


def modified_at(info: dict[str, Any]) -> float | None:
    """Return the time of writing, in seconds since the epoch, from a filesystem's description of an object."""
    for name in _TIMES:
        value = info.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return None


def stopper(given_up: threading.Event) -> Any:
    """Return a callback of fsspec that ends a copy once the event is set."""
    from fsspec.callbacks import Callback

    class Stopper(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            if given_up.is_set():
                raise ConnectionAbortedError("nobody waits for it")

    return Stopper()
