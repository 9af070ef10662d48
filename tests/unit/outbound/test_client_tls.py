"""The client against a real TLS server on this machine."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.certificates import Authority
from tests.support.network import FILE, MAX, redirect, reply, serving

from limner.errors import InvalidRequest
from limner.outbound.client import OutboundClient, Reply
from limner.outbound.pictures import fetch_picture
from limner.outbound.policy import OutboundPolicy
from limner.outbound.urls import Origin, parse_url


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.pem())


def real(
    run: Callable[[OutboundClient, int], Awaitable[Any]],
    *,
    server: ssl.SSLContext,
    client: ssl.SSLContext,
    answer: Callable[[bytes], bytes] = lambda head: reply(),
) -> list[str | None]:
    """Run against a real TLS server under the name pictures.test; gives the names that clients asked for."""
    names: list[str | None] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    async def main() -> None:
        async with serving(server, answer, names) as port:
            policy = OutboundPolicy(allowed=frozenset({Origin("https", "pictures.test", port)}), total_seconds=20)
            await run(OutboundClient(policy, resolver=resolve, ssl_context=client), port)

    asyncio.run(main())
    return names


def test_a_real_tls_server(authority: Authority, tmp_path: Path) -> None:
    heads = []

    def answer(head: bytes) -> bytes:
        heads.append(head.decode())
        return redirect("/real.png") if b"GET /a.png" in head else reply()

    async def run(client: OutboundClient, port: int) -> None:
        url = f"https://pictures.test:{port}/a.png"
        assert await fetch_picture(url, client=client, max_bytes=MAX) == FILE
        assert f"Host: pictures.test:{port}\r\n" in heads[0]
        with pytest.raises(InvalidRequest, match="port"):  # the same server under its address
            await fetch_picture(f"https://127.0.0.1:{port}/", client=client, max_bytes=MAX)

    names = real(
        run, server=authority.server_context("pictures.test", tmp_path), client=trusting(authority), answer=answer
    )
    assert names == ["pictures.test", "pictures.test"]
    assert len(heads) == 2


@pytest.mark.parametrize(
    ("host", "days", "trusted", "reason"),
    [
        ("other.test", 1, True, "certificate of pictures.test is not valid.*mismatch"),
        ("pictures.test", -1, True, "certificate of pictures.test is not valid.*expired"),
        ("pictures.test", 1, False, "certificate of pictures.test is not valid"),
    ],
)
def test_wrong_certificates(
    authority: Authority, tmp_path: Path, host: str, days: int, trusted: bool, reason: str
) -> None:
    heads: list[bytes] = []

    def answer(head: bytes) -> bytes:
        heads.append(head)
        return reply()

    async def run(client: OutboundClient, port: int) -> None:
        with pytest.raises(InvalidRequest, match=reason):
            await fetch_picture(f"https://pictures.test:{port}/", client=client, max_bytes=MAX)

    context = authority.server_context(host, tmp_path, days=days)
    real(run, server=context, client=trusting(authority if trusted else Authority()), answer=answer)
    assert heads == []  # nothing was asked of a server that is not who it should be


def test_without_a_rule_loopback_is_out_of_reach_with_the_real_resolver() -> None:
    """`localhost` through the system: known without a network, resolved, refused."""
    accepted = threading.Event()

    async def run() -> None:
        async with serving(None, lambda head: accepted.set() or reply(), []) as port:  # type: ignore[func-returns-value]
            client = OutboundClient(OutboundPolicy(ports=frozenset({port})))
            try:
                target = parse_url(f"https://localhost:{port}/", field="x")
                with pytest.raises(InvalidRequest, match="localhost has an address that is not public"):
                    await client.resolve(target, field="x")
                allowed = OutboundClient(OutboundPolicy(allowed=frozenset({Origin("http", "localhost", port)})))
                got = await allowed.request("GET", f"http://localhost:{port}/", field="x", headers={}, max_bytes=MAX)
                assert got == Reply(status=200, headers={"content-length": str(len(FILE))}, body=FILE)
                allowed.close()
            finally:
                client.close()

    asyncio.run(run())
    assert accepted.is_set()
