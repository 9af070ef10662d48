"""Requests that the service makes because a caller named a URL: which URLs, which addresses, how much, how long.

Owns the grammar of such URLs, the table of addresses that are not public, and a client that connects to the address that
was checked and to no other. Knows nothing of pictures and webhooks.

Whoever names a URL must not reach with it what only this machine can reach. Therefore a name is resolved once, every
address of the answer has to be public, and the connection goes to one of these addresses while TLS checks the
certificate against the name. There is no proxy, cookie, redirect, decompression or kept connection here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpcore2
import idna

from limner.errors import InvalidRequest, RemoteError

__all__ = ["Origin", "OutboundClient", "OutboundPolicy", "Reply", "Resolver", "Target", "address_problem", "parse_url"]

MAX_URL_CHARACTERS = 8192
"""Signed URLs of object stores are long; longer ones are refused."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_AUTHORITY = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:@%]+))(?::(?P<port>[0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label like this makes a browser read the host as IPv4

_log = logging.getLogger(__name__)

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Gives all addresses of a host name and port as text; raises OSError if there are none."""


class Origin(NamedTuple):
    """Scheme, host (ASCII, lower case; IPv6 without brackets) and port."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Origin:
        """`http(s)://HOST[:PORT]`, as an operator writes it in a list of what is allowed; raises InvalidRequest."""
        target = parse_url(text, field="allow")
        if target.path != "/" or text.endswith("/"):
            raise InvalidRequest("allow", f"{text!r} is more than an origin; write scheme://host[:port]")
        return target.origin

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """Host and, unless it is the scheme's own, port, as in the header Host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


class Target(NamedTuple):
    """A URL that has been taken apart: where to connect, and what to ask for there (path and query)."""

    origin: Origin
    path: str

    def __str__(self) -> str:
        return f"{self.origin}{self.path}"


@dataclass(frozen=True, kw_only=True, slots=True)
class OutboundPolicy:
    """What may be reached. Times are in seconds; `total_seconds` covers everything from resolving to the last byte.

    `allowed` are origins that an operator trusts although they are not public, not on a port in `ports`, or not https.
    """

    ports: frozenset[int] = frozenset({443})
    allowed: frozenset[Origin] = frozenset()
    connect_seconds: float = 5.0
    total_seconds: float = 30.0
    max_concurrent: int = 16

    def check_url(self, url: str, *, field: str, max_characters: int = MAX_URL_CHARACTERS) -> Target:
        """Take `url` apart and check all that can be checked without the network; raises InvalidRequest."""
        target = parse_url(url, field=field, max_characters=max_characters)
        origin = target.origin
        if origin in self.allowed:
            return target
        if origin.scheme != "https":
            raise InvalidRequest(field, "the URL has to begin with https://")
        if origin.port not in self.ports:
            ports = ", ".join(map(str, sorted(self.ports)))
            raise InvalidRequest(field, f"port {origin.port} of the URL is not allowed; allowed: {ports}")
        literal = _literal(origin.host)
        if literal is None and "." not in origin.host:
            raise InvalidRequest(field, f"{origin.host!r} is not a full host name; write one with its domain")
        if literal is not None and (problem := address_problem(literal)):
            raise InvalidRequest(field, f"{origin.host} {problem}; only public addresses may be named")
        return target


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """An answer; `body` is empty unless the status is 200 and a body was asked for. Names in `headers` are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def parse_url(url: str, *, field: str, max_characters: int = MAX_URL_CHARACTERS) -> Target:
    """Take a http or https URL apart; raises InvalidRequest for all that two parsers might read differently.

    Host names in other scripts are normalised (UTS 46) before they are looked at, so full-width digits are digits. The
    fragment is dropped: it is never sent.
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


def address_problem(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    """Why an address may not be reached, or None for a public one.

    Stricter than `is_global`, which differs between versions of Python and calls multicast, deprecated site-local and
    IPv4-compatible addresses global. IPv6 has to be global unicast (2000::/3, RFC 4291); IPv4-mapped addresses and those
    of the well-known NAT64 prefix (RFC 6052, what DNS64 gives to machines without IPv4) count as the IPv4 address in them,
    tunnels (6to4, Teredo) are refused. A NAT64 prefix of a network's own cannot be told from other addresses.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return address_problem(inner)
        if address not in _GLOBAL_UNICAST:
            return "is not a public address"
    for network, use in _NOT_PUBLIC:
        if address.version == network.version and address in network:
            return f"is not a public address ({use})"
    if not address.is_global or address.is_multicast or address.is_reserved:
        return "is not a public address"
    return None


class OutboundClient:
    """Makes requests under a policy. Use it in one event loop; `close` ends the threads of its resolver.

    `resolver` and `connector` are what touches the network; `ssl_context` is what certificates are checked with (the
    system's authorities if not given; `SSL_CERT_FILE` is honoured).
    """

    def __init__(
        self,
        policy: OutboundPolicy | None = None,
        *,
        resolver: Resolver | None = None,
        connector: httpcore2.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.policy = policy or OutboundPolicy()
        self._resolver: Resolver = resolver or _SystemResolver()
        self._connector = connector or httpcore2.AnyIOBackend()
        self._ssl_context = ssl_context or httpcore2.default_ssl_context()
        self._places = asyncio.Semaphore(self.policy.max_concurrent)

    def close(self) -> None:
        """Let the resolver's threads end."""
        if isinstance(self._resolver, _SystemResolver):
            self._resolver.close()

    def deadline(self) -> float:
        """When a request that begins now has to be over, in the time of the event loop."""
        return asyncio.get_running_loop().time() + self.policy.total_seconds

    async def resolve(self, target: Target, *, field: str) -> tuple[str, ...]:
        """The addresses to connect to. Raises InvalidRequest if one of them is not public, RemoteError if there is none.

        The answer names no address: it would tell a caller what the names of this network mean.
        """
        origin = target.origin
        if _literal(origin.host) is not None:
            return (origin.host,)  # checked with the URL
        try:
            found = tuple(dict.fromkeys(await self._resolver(origin.host, origin.port)))
        except (OSError, UnicodeError):
            found = ()
        if not found:
            raise RemoteError(f"{field}: the host {origin.host} is not known")
        if origin not in self.policy.allowed:
            for text in found:
                literal = _literal(text)
                problem = "is not an address" if literal is None else address_problem(literal)
                if problem:
                    _log.warning("refused %s: its address %s %s", origin, text, problem)
                    raise InvalidRequest(
                        field,
                        f"the host {origin.host} has an address that is not public; only public ones may be named",
                    )
        return found

    async def request(
        self,
        method: str,
        url: str,
        *,
        field: str,
        headers: Mapping[str, str],
        content: bytes | None = None,
        max_bytes: int | None = None,
        deadline: float | None = None,
    ) -> Reply:
        """One request and its answer; redirects are answers. With `max_bytes` the body of a 200 is read, up to there.

        Raises InvalidRequest if the URL or what it leads to is not allowed, RemoteError if the other side fails.
        """
        target = self.policy.check_url(url, field=field)
        host = target.origin.host
        try:
            async with asyncio.timeout_at(self.deadline() if deadline is None else deadline), self._places:
                addresses = await self.resolve(target, field=field)
                return await self._exchange(method, target, addresses, field, headers, content, max_bytes)
        except (TimeoutError, httpcore2.TimeoutException):
            raise RemoteError(f"{field}: {host} took too long") from None
        except httpcore2.ConnectError as error:
            cause = error.__cause__
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise RemoteError(f"{field}: the certificate of {host} is not valid ({cause.verify_message})") from None
            raise RemoteError(f"{field}: no connection to {host}") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError):
            raise RemoteError(f"{field}: {host} broke off or did not speak HTTP") from None

    async def _exchange(
        self,
        method: str,
        target: Target,
        addresses: Sequence[str],
        field: str,
        headers: Mapping[str, str],
        content: bytes | None,
        max_bytes: int | None,
    ) -> Reply:
        origin = target.origin
        connection = httpcore2.AsyncHTTPConnection(
            origin=httpcore2.Origin(origin.scheme.encode(), origin.host.encode(), origin.port),
            ssl_context=self._ssl_context,
            network_backend=_Pinned(self._connector, origin, addresses),
        )
        sent = {
            "Host": origin.authority,
            "User-Agent": "limner",
            "Accept-Encoding": "identity",
            "Connection": "close",
            **headers,
        }
        # From the parts that were checked: no second parser reads the URL.
        url = httpcore2.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=target.path)
        seconds = self.policy.connect_seconds
        timeout = {"connect": seconds, "read": None, "write": None}  # the deadline is over all of it
        async with (
            connection,
            connection.stream(
                method, url, headers=list(sent.items()), content=content, extensions={"timeout": timeout}
            ) as response,
        ):
            received = _received(response.headers, field)
            body = b""
            if max_bytes is not None and response.status == 200:
                body = await _read(response, received, field=field, max_bytes=max_bytes)
            return Reply(status=response.status, headers=received, body=body)


async def _read(response: httpcore2.Response, headers: Mapping[str, str], *, field: str, max_bytes: int) -> bytes:
    """The body as it was sent, counted while it comes; what was announced too large is not begun."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise InvalidRequest(field, f"the answer is compressed ({encoding[:20]!r}); only files as they are are read")
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise InvalidRequest(field, f"the file has {int(announced)} bytes; at most {max_bytes} are allowed")
    body = bytearray()
    async for chunk in response.aiter_stream():
        body += chunk
        if len(body) > max_bytes:
            raise InvalidRequest(field, f"the file is larger than {max_bytes} bytes, which is the most that is allowed")
    return bytes(body)


def _received(headers: Iterable[tuple[bytes, bytes]], field: str) -> dict[str, str]:
    """Headers by name in lower case. One that decides anything here must not come twice with different values."""
    received: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if received.setdefault(name, value) != value and name in ("location", "content-encoding", "content-length"):
            raise RemoteError(f"{field}: the answer has the header {name} more than once")
    return received


class _Pinned(httpcore2.AsyncNetworkBackend):
    """Connects to the addresses that were checked, whatever the name may mean by now."""

    def __init__(self, inner: httpcore2.AsyncNetworkBackend, origin: Origin, addresses: Sequence[str]) -> None:
        self._inner = inner
        self._origin = origin
        self._addresses = addresses

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        assert (host, port) == (self._origin.host, self._origin.port)
        failure: Exception | None = None
        for address in self._addresses:
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout=timeout, local_address=local_address, socket_options=socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        assert failure is not None
        raise failure


class _SystemResolver:
    """`getaddrinfo` in a few threads of its own: names that take long to resolve must not hold up other work."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="limner-resolve")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return [str(address[0]) for *_, address in found]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _host_name(name: str) -> str:
    """A host name in its one form, ASCII and lower case; raises ValueError for others."""
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


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# From the IANA registries of special-purpose addresses; older versions of Python lack some, and what is deprecated there.
_NOT_PUBLIC: tuple[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, str], ...] = (
    (ipaddress.IPv4Network("0.0.0.0/8"), "this host"),
    (ipaddress.IPv4Network("10.0.0.0/8"), "private"),
    (ipaddress.IPv4Network("100.64.0.0/10"), "shared by carriers"),
    (ipaddress.IPv4Network("127.0.0.0/8"), "loopback"),
    (ipaddress.IPv4Network("168.63.129.16/32"), "metadata of a cloud"),
    (ipaddress.IPv4Network("169.254.0.0/16"), "link-local"),
    (ipaddress.IPv4Network("172.16.0.0/12"), "private"),
    (ipaddress.IPv4Network("192.0.0.0/24"), "protocols"),
    (ipaddress.IPv4Network("192.0.2.0/24"), "documentation"),
    (ipaddress.IPv4Network("192.88.99.0/24"), "6to4 relay"),
    (ipaddress.IPv4Network("192.168.0.0/16"), "private"),
    (ipaddress.IPv4Network("198.18.0.0/15"), "benchmarks"),
    (ipaddress.IPv4Network("198.51.100.0/24"), "documentation"),
    (ipaddress.IPv4Network("203.0.113.0/24"), "documentation"),
    (ipaddress.IPv4Network("224.0.0.0/4"), "multicast"),
    (ipaddress.IPv4Network("240.0.0.0/4"), "reserved"),
    (ipaddress.IPv6Network("2001::/23"), "protocols, Teredo"),
    (ipaddress.IPv6Network("2001:db8::/32"), "documentation"),
    (ipaddress.IPv6Network("2002::/16"), "6to4"),
    (ipaddress.IPv6Network("3fff::/20"), "documentation"),
)
