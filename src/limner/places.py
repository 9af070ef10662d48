"""Where things are kept: a folder, or a URL, and how either may be shown.

Owns what tells a URL from a folder, and what in a URL is a secret. Reaches nothing: whether a place is there, others know.
"""

from __future__ import annotations

import os
from urllib.parse import unquote

from limner.errors import InvalidRequest

__all__ = ["absolute", "check_store", "is_url", "secrets_of", "without_credentials"]

_SHORTEST_SECRET = 6
"""A value of a query, or a user without a password, that is shorter is no secret: to look for it would garble messages."""
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs", "az")
"""Azure's, where a container stands before the account: `abfs://container@account.dfs.core.windows.net/prefix`."""


def is_url(place: object) -> bool:
    """Whether a place is a URL, not a folder."""
    return isinstance(place, str) and "://" in place


def absolute(place: str) -> str:
    """A place that does not depend on the folder of a process: a URL as it is, the whole path of a folder."""
    return place if is_url(place) else os.path.abspath(place)


def without_credentials(place: str) -> str:
    """A place as it may be shown: a URL without user, password and query."""
    if not is_url(place):
        return place
    scheme, rest, query = _parts(place)
    user = _user(scheme, rest)
    shown = f"***{rest[len(user) :]}" if user else rest
    return f"{scheme}://{shown}" + ("?***" if query else "")


def secrets_of(url: str) -> list[str]:
    """What no message may have: user, password and query of a URL, as they are and unquoted, the longest first."""
    scheme, rest, query = _parts(url)
    user = _user(scheme, rest)
    password = user.partition(":")[2]
    found = {password, query, user if password or len(user) >= _SHORTEST_SECRET else ""}
    found |= {value for part in query.split("&") if len(value := part.partition("=")[2]) >= _SHORTEST_SECRET}
    return sorted({text for one in found for text in (one, unquote(one)) if text}, key=len, reverse=True)


def check_store(place: object, *, cache: object, disk_bytes: int | None) -> None:
    """Raises `InvalidRequest` where a store's folder `cache`, or the budget of a folder, has no place beside its place."""
    if cache is not None and not is_url(place):
        raise InvalidRequest("store_cache", f"{cache} is a folder before a URL; give one as the store, or leave it out")
    if disk_bytes is not None and is_url(place) and cache is None:
        raise InvalidRequest(
            "store_bytes", f"{disk_bytes} is the budget of a folder; give one before the URL as store_cache"
        )


def _parts(url: str) -> tuple[str, str, str]:
    """Scheme, what comes after it, and the query."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    return scheme, rest, query


def _user(scheme: str, rest: str) -> str:
    """User and password of a URL without its scheme; a password may have a slash that nobody quoted."""
    authority = rest.partition("/")[0]
    if "@" in authority:
        user = authority.rpartition("@")[0]
        return "" if scheme in _CONTAINERS and ":" not in user else user
    port = authority.partition(":")[2]
    return rest.rpartition("@")[0] if port and not port.isdigit() else ""
