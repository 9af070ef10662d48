"""A client for requests that the service makes because a caller named a URL.

Owns connecting to an address that was checked and to no other, and the limits on time and size. Knows nothing of
pictures and webhooks.

A URL from a caller must not reach what only this machine can reach. Therefore a name is resolved once, every address of
the answer has to be public, and the connection goes to one of these addresses while TLS checks the certificate against
the name. There is no proxy, cookie, redirect, decompression or connection reuse here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpcore2

from limner.errors import InvalidRequest, RemoteError
from limner.outbound.addresses import address_problem, literal_address
from limner.outbound.policy import OutboundPolicy
from limner.outbound.urls import Origin, Target

__all__ = ["OutboundClient", "Reply", "Resolver"]

_logger = logging.getLogger(__name__)

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Gives all addresses of a host name and port as text; raises OSError if there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """An answer. `body` is empty unless the status is 200 and `max_bytes` was given. Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class OutboundClient:
    """Make requests under a policy. Use it in one event loop; `close` ends the threads of its resolver.

    Only `resolver` and `connector` touch the network. `ssl_context` checks certificates (default: the system's
    authorities; `SSL_CERT_FILE` is honoured).
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
        self._slots = asyncio.Semaphore(self.policy.max_concurrent)

    def close(self) -> None:
        """End the resolver's threads."""
        if isinstance(self._resolver, _SystemResolver):
            self._resolver.close()

    def deadline(self) -> float:
        """Return when a request that begins now has to be over, in the event loop's time."""
        return asyncio.get_running_loop().time() + self.policy.total_seconds

    async def resolve(self, target: Target, *, field: str) -> tuple[str, ...]:
        """Return the addresses to connect to.

        Raises `InvalidRequest` if one of them is not public, `RemoteError` if there is none. The message names no
        address: it would reveal to a caller how names of this network resolve.
        """
        origin = target.origin
        if literal_address(origin.host) is not None:
            return (origin.host,)  # checked with the URL
        try:
            found = tuple(dict.fromkeys(await self._resolver(origin.host, origin.port)))
        except (OSError, UnicodeError):
            found = ()
        if not found:
            raise RemoteError(f"{field}: the host {origin.host} is not known")
        if origin not in self.policy.allowed:
            for text in found:
                literal = literal_address(text)
                problem = "is not an address" if literal is None else address_problem(literal)
                if problem:
                    _logger.warning("refused %s: its address %s %s", origin, text, problem)
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
        """Make one request; redirects are not followed. With `max_bytes` the body of a 200 is read, up to that size.

        Raises `InvalidRequest` if the URL, an address or the body is not allowed, `RemoteError` if the other side fails.
        """
        target = self.policy.check_url(url, field=field)
        host = target.origin.host
        try:
            async with asyncio.timeout_at(self.deadline() if deadline is None else deadline), self._slots:
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
            network_backend=_PinnedBackend(self._connector, origin, addresses),
        )
        sent = {
            "Host": origin.authority,
            "User-Agent": "limner",
            "Accept-Encoding": "identity",
            "Connection": "close",
            **headers,
        }
        lines = [(name.encode(), value.encode()) for name, value in sent.items()]
        # Made of the checked parts, so that no second parser reads the URL.
        url = httpcore2.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=target.path)
        seconds = self.policy.connect_seconds
        timeout = {"connect": seconds, "read": None, "write": None}  # one deadline covers all of it
        async with (
            connection,
            connection.stream(method, url, headers=lines, content=content, extensions={"timeout": timeout}) as response,
        ):
            received = _received(response.headers, field)
            body = b""
            if max_bytes is not None and response.status == 200:
                body = await _read(response, received, field=field, max_bytes=max_bytes)
            return Reply(status=response.status, headers=received, body=body)


async def _read(response: httpcore2.Response, headers: Mapping[str, str], *, field: str, max_bytes: int) -> bytes:
    """Read the body as it was sent, counting as it arrives. One announced too large is not read at all."""
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
    """Return headers by lower-case name. A header that decides anything here must not have two different values."""
    received: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if received.setdefault(name, value) != value and name in ("location", "content-encoding", "content-length"):
            raise RemoteError(f"{field}: the answer has the header {name} more than once")
    return received


class _PinnedBackend(httpcore2.AsyncNetworkBackend):
    """Connect to the addresses that were checked, whatever the name resolves to by now."""

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
    """`getaddrinfo` in threads of its own: names that resolve slowly must not hold up other work."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="limner-resolve")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return [str(address[0]) for *_, address in found]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
