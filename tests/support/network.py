"""A network that is not there, and a server on this machine, for tests of what the service asks of others."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

import httpcore2

from limner.outbound.client import OutboundClient
from limner.outbound.pictures import fetch_picture
from limner.outbound.policy import OutboundPolicy

PUBLIC, PUBLIC_6 = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
GOOD = "https://pictures.example.org/a.png"
"""A URL that the network below knows."""
MAX = 10_000
"""Bytes that a picture may have."""
FILE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20


def reply(
    body: bytes = FILE, *, status: str = "200 OK", headers: Mapping[str, str] | None = None, length: object = True
) -> bytes:
    """An answer as it goes over the wire. `length`: the real one, one that is claimed, or none."""
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    lines += [] if length is None else [f"Content-Length: {len(body) if length is True else length}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return reply(b"", status=status, headers={"Location": location})


@functools.cache
def default_context() -> ssl.SSLContext:
    """What the client makes by itself, made once: reading all authorities takes longer than most tests."""
    return httpcore2.default_ssl_context()


class Stream(httpcore2.AsyncNetworkStream):
    """A connection that gives prepared pieces, each after `pause` seconds."""

    def __init__(self, network: Network, pieces: Iterable[bytes], pause: float) -> None:
        self.network, self.pieces, self.pause = network, iter(pieces), pause

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        await asyncio.sleep(self.pause)
        piece = next(self.pieces, b"")
        self.network.received += len(piece)
        return piece

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.network.sent += buffer

    async def aclose(self) -> None:
        self.network.closed += 1

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        assert ssl_context.check_hostname
        assert ssl_context.verify_mode is ssl.CERT_REQUIRED
        self.network.tls.append(server_hostname)
        return self


class Network(httpcore2.AsyncNetworkBackend):
    """Resolver and connector that record what they are asked for. `names`: addresses of a name, one answer a question."""

    def __init__(
        self,
        *answers: bytes | Iterable[bytes],
        names: Mapping[str, Sequence[str | Sequence[str]]] | None = None,
        pause: float = 0.0,
        dead: Sequence[str] = (),
    ) -> None:
        self.answers = list(answers)
        self.names = {"pictures.example.org": [PUBLIC], **(names or {})}
        self.pause, self.dead = pause, dead
        self.asked: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.tls: list[str | None] = []
        self.sent = b""
        self.received = self.closed = 0

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.names:
            raise socket.gaierror(-2, "Name or service not known")
        answers = self.names[host]
        if answers and not isinstance(answers[0], str):  # another answer each time
            return answers[min(self.asked.count(host), len(answers)) - 1]
        return answers  # type: ignore[return-value]

    async def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore2.AsyncNetworkStream:
        self.connected.append((host, port))
        if host in self.dead:
            raise httpcore2.ConnectError("refused")
        answer = self.answers.pop(0)
        return Stream(self, [answer] if isinstance(answer, bytes) else answer, self.pause)


@contextlib.asynccontextmanager
async def serving(
    context: ssl.SSLContext | None, answer: Callable[[bytes], bytes], names: list[str | None]
) -> AsyncIterator[int]:
    """A loopback server that answers each head with `answer`; gives its port. `names` are those asked for by TLS."""
    if context is not None:
        context.sni_callback = lambda _, name, __: names.append(name)
    done = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            writer.write(answer(await reader.readuntil(b"\r\n\r\n")))
            await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()
        done.append(True)

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


def fetch(url: str, network: Network, *, max_bytes: int = MAX, **policy: Any) -> bytes:
    """Fetch a picture over a network that is not there."""

    async def run() -> bytes:
        client = OutboundClient(
            OutboundPolicy(**policy), resolver=network.resolve, connector=network, ssl_context=default_context()
        )
        return await fetch_picture(url, client=client, max_bytes=max_bytes)

    return asyncio.run(run())
