"""Places that hold things: a folder or a URL, and how either is shown without credentials.

Owns how a URL differs from a folder, and which parts of a URL are secret. Reads nothing: it does not know whether a place
exists.
"""

from __future__ import annotations

import os
from urllib.parse import unquote

from limner.errors import InvalidRequest

__all__ = ["absolute", "check_store", "is_url", "secrets_of", "without_credentials"]

_SHORTEST_SECRET = 6
"""A shorter value of a query, or user without a password, is not replaced in messages: every "e" would become "***"."""
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs", "az")
"""Schemes of Azure, where a container stands before the account: `abfs://container@account.dfs.core.windows.net/prefix`."""


def is_url(place: object) -> bool:
    """Return True for a URL, False for a folder."""
    return isinstance(place, str) and "://" in place


def absolute(place: str) -> str:
    """Return a place that does not depend on the working directory: a URL as it is, the absolute path of a folder."""
    return place if is_url(place) else os.path.abspath(place)


def without_credentials(place: str) -> str:
    """Return a place for messages: a URL without user, password and query."""
    if not is_url(place):
        return place
    scheme, rest, query = _parts(place)
    user = _user(scheme, rest)
    shown = f"***{rest[len(user) :]}" if user else rest
    return f"{scheme}://{shown}" + ("?***" if query else "")


def secrets_of(url: str) -> list[str]:
    """Return user, password and query of a URL, which no message may hold, as they are and unquoted, the longest first."""
    scheme, rest, query = _parts(url)
    user = _user(scheme, rest)
    password = user.partition(":")[2]
    found = {password, query, user if password or len(user) >= _SHORTEST_SECRET else ""}
    found |= {value for part in query.split("&") if len(value := part.partition("=")[2]) >= _SHORTEST_SECRET}
    return sorted({text for one in found for text in (one, unquote(one)) if text}, key=len, reverse=True)


def check_store(place: object, *, cache: object, disk_bytes: int | None) -> None:
    """Raise `InvalidRequest` for a folder `cache` without a URL, or a budget of a folder with a URL alone."""
    if cache is not None and not is_url(place):
        raise InvalidRequest("store_cache", f"{cache} is a folder before a URL; give one as the store, or leave it out")
    if disk_bytes is not None and is_url(place) and cache is None:
        raise InvalidRequest(
            "store_bytes", f"{disk_bytes} is the budget of a folder; give one before the URL as store_cache"
        )


def _parts(url: str) -> tuple[str, str, str]:
    """Return the scheme, the text after it, and the query."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    return scheme, rest, query


def _user(scheme: str, rest: str) -> str:
    """Return user and password of a URL without its scheme. A password may have a slash that was not quoted."""
    authority = rest.partition("/")[0]
    if "@" in authority:
        user = authority.rpartition("@")[0]
        return "" if scheme in _CONTAINERS and ":" not in user else user
    port = authority.partition(":")[2]
    return rest.rpartition("@")[0] if port and not port.isdigit() else ""
