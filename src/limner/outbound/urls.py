"""The grammar of URLs that callers name: scheme, host, port and path, read in one way only.

Knows nothing of which of them may be reached.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple
from urllib.parse import urlsplit

import idna

from limner.errors import InvalidRequest

__all__ = ["MAX_URL_CHARACTERS", "Origin", "Target", "parse_url"]

MAX_URL_CHARACTERS = 8192
"""Signed URLs of object stores are long; longer ones are refused."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_AUTHORITY = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:@%]+))(?::(?P<port>[0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # browsers read a host with such a last label as IPv4


class Origin(NamedTuple):
    """Scheme, host (ASCII, lower case; IPv6 without brackets) and port."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Origin:
        """Read `http(s)://HOST[:PORT]`, as an operator writes it in a list of allowed origins. Raises `InvalidRequest`."""
        target = parse_url(text, field="allow")
        if target.path != "/" or text.endswith("/"):
            raise InvalidRequest("allow", f"{text!r} is more than an origin; write scheme://host[:port]")
        return target.origin

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """Host, and the port unless it is the scheme's default, as in the header Host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


class Target(NamedTuple):
    """A parsed URL: where to connect, and what to request there (path and query)."""

    origin: Origin
    path: str

    def __str__(self) -> str:
        return f"{self.origin}{self.path}"


def parse_url(url: str, *, field: str, max_characters: int = MAX_URL_CHARACTERS) -> Target:
    """Take an http or https URL apart. Raises `InvalidRequest` for anything that two parsers might read differently.

    Host names in other scripts are normalised first (UTS 46), so full-width digits are digits. The fragment is dropped:
    it is never sent.
    """

    def refuse(problem: str) -> InvalidRequest:
        return InvalidRequest(field, f"{problem}; write https://host/path")

    if not 1 <= len(url) <= max_characters:
        raise refuse(f"the URL has {len(url)} characters; 1 to {max_characters} are allowed")
    if "\\" in url or any(not c.isprintable() or c.isspace() for c in url):
        raise refuse("spaces, control characters and backslashes do not belong into a URL")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise refuse("the URL cannot be taken apart") from None
    if parts.scheme not in _DEFAULT_PORTS or not url.lower().startswith(f"{parts.scheme}://"):
        raise refuse("the URL does not begin with https://")
    if "@" in parts.netloc:
        raise refuse("the URL has a user name or password in it")
    found = _AUTHORITY.fullmatch(parts.netloc)
    if found is None:
        raise refuse("host and port of the URL are not host[:port]")
    try:
        host = ipaddress.IPv6Address(found["v6"]).compressed if found["v6"] else _host_name(found["name"])
    except ValueError as error:
        raise refuse(f"the host of the URL is not allowed: {error}") from None
    port = int(found["port"] or _DEFAULT_PORTS[parts.scheme])
    if not 1 <= port <= 65535:
        raise refuse(f"port {port} does not exist")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not path.isascii():
        raise refuse("path and query have characters that are not ASCII; percent-encode them")
    return Target(Origin(parts.scheme, host, port), path)


def _host_name(name: str) -> str:
    """Return a host name in its one form, ASCII and lower case. Raises `ValueError` for others."""
    host = name.lower()
    if not host.isascii():
        host = idna.encode(name, uts46=True).decode().lower()  # IDNAError is a ValueError
    labels = host.split(".")
    if not labels[-1]:
        raise ValueError("it ends in a dot")
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("names are labels of letters, digits and hyphens, joined by dots")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise ValueError("addresses are four decimal numbers from 0 to 255") from None
    return host
