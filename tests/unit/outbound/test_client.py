"""Connections go to checked addresses alone; hostile and slow answers end."""

from __future__ import annotations

import asyncio
import gzip
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import httpcore2
import pytest
from tests.support.network import FILE, GOOD, MAX, PUBLIC, PUBLIC_6, Network, fetch, redirect, reply

from limner.errors import InvalidRequest, RemoteError
from limner.outbound.client import OutboundClient
from limner.outbound.pictures import fetch_picture
from limner.outbound.policy import OutboundPolicy

REFUSED_ANSWERS = {
    "private": ["10.0.0.5"],
    "loopback": ["127.0.0.1"],
    "metadata": ["169.254.169.254"],
    "v6 private": ["fd12::1"],
    "v6 mapped": ["::ffff:10.0.0.5"],
    "v6 with a zone": ["fe80::1%eth0"],
    "nat64 of a private one": ["64:ff9b::a00:5"],
    "6to4 of a public one": ["2002:5db8:d70e::1"],
    "public first": [PUBLIC, "10.0.0.5"],
    "public last": ["10.0.0.5", PUBLIC],
    "public IPv4, private IPv6": [PUBLIC, "::1"],
    "one of many": [*(f"93.184.215.{n}" for n in range(50)), "192.168.1.1", *(f"93.184.216.{n}" for n in range(50))],
    "no address": ["not-an-address"],
}


@pytest.mark.parametrize("name", REFUSED_ANSWERS)
def test_names_with_an_address_that_is_not_public_are_refused(name: str) -> None:
    network = Network(names={"inside.example.org": REFUSED_ANSWERS[name]})
    with pytest.raises(InvalidRequest, match=r"inside\.example\.org has an address that is not public") as caught:
        fetch("https://inside.example.org/", network)
    assert network.connected == []
    for address in REFUSED_ANSWERS[name]:  # what a name means inside is not told
        assert address not in str(caught.value)


def test_names_that_mean_nothing() -> None:
    network = Network(names={"empty.example.org": []})
    for host in ("empty.example.org", "unknown.example.org"):
        with pytest.raises(InvalidRequest, match="is not known"):
            fetch(f"https://{host}/", network)
    assert network.connected == []


def test_a_name_that_changes_between_check_and_connection() -> None:
    """Rebinding: the first answer is public, all others are not. It is asked once, and that answer is used."""
    network = Network(reply(), names={"rebind.example.org": [[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]]})
    assert fetch("https://rebind.example.org/", network) == FILE
    assert network.asked == ["rebind.example.org"]
    assert network.connected == [(PUBLIC, 443)]


def test_a_name_that_changes_between_redirects() -> None:
    network = Network(
        redirect("https://rebind.example.org/again"), names={"rebind.example.org": [[PUBLIC], ["127.0.0.1"]]}
    )
    with pytest.raises(InvalidRequest, match="not public"):
        fetch("https://rebind.example.org/", network)
    assert network.connected == [(PUBLIC, 443)]


def test_the_next_address_is_tried_if_one_is_dead() -> None:
    network = Network(reply(), names={"two.example.org": [PUBLIC_6, PUBLIC]}, dead=[PUBLIC_6])
    assert fetch("https://two.example.org/", network) == FILE
    assert network.connected == [(PUBLIC_6, 443), (PUBLIC, 443)]
    network = Network(names={"two.example.org": [PUBLIC_6, PUBLIC]}, dead=[PUBLIC_6, PUBLIC])
    with pytest.raises(InvalidRequest, match="no connection to two"):
        fetch("https://two.example.org/", network)


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://10.0.0.1:3128")
    network = Network(reply())
    assert fetch(GOOD, network) == FILE
    assert network.connected == [(PUBLIC, 443)]


def chunked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    yield reply(b"", headers={"Transfer-Encoding": "chunked"}, length=None)
    for piece in pieces:
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def endless_head() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\n"
    yield from (b"X-%d: y\r\n" % n for n in itertools.count())


BODIES: dict[str, tuple[Callable[[], bytes | Iterable[bytes]], str]] = {
    "announced too large": (lambda: reply(length=MAX + 1), f"{MAX + 1} bytes; at most {MAX}"),
    "announced beyond all numbers": (lambda: reply(length="9" * 5000), "bytes; at most|did not speak HTTP"),
    "too large": (lambda: reply(bytes(MAX + 1), length=None), f"larger than {MAX}"),
    "endless": (
        lambda: itertools.chain([reply(b"", length=None)], itertools.repeat(bytes(1000))),
        f"larger than {MAX}",
    ),
    "endless chunks": (lambda: chunked(itertools.repeat(bytes(1000))), f"larger than {MAX}"),
    "shorter than announced": (lambda: reply(length=len(FILE) + 1), "did not speak HTTP"),
    "broken chunks": (lambda: [*itertools.islice(chunked([b"abc"]), 2), b"zz\r\n"], "did not speak HTTP"),
    "two lengths": (lambda: reply(headers={"content-length": "7"}), "did not speak HTTP|more than once"),
    "negative length": (lambda: reply(length=-1), "did not speak HTTP"),
    "gzip bomb": (
        lambda: reply(gzip.compress(bytes(10 << 20), 9)[:9000], headers={"Content-Encoding": "gzip"}),
        "compressed",
    ),
    "other codings": (lambda: reply(headers={"Content-Encoding": "br, zstd"}), "compressed"),
    "coded twice": (
        lambda: reply(headers={"Content-Encoding": "identity", "content-encoding": "gzip"}),
        "more than once",
    ),
    "coded on the way": (
        lambda: reply(headers={"Transfer-Encoding": "gzip, chunked"}, length=None),
        "did not speak HTTP",
    ),
    "endless head": (endless_head, "did not speak HTTP"),
    "no HTTP": (lambda: b"SSH-2.0-OpenSSH_9.6\r\n", "did not speak HTTP"),
    "nothing": (lambda: b"", "did not speak HTTP"),
    "not found": (lambda: reply(status="404 Not Found"), "status 404"),
    "partial": (lambda: reply(status="206 Partial Content"), "status 206"),
    "not modified": (lambda: reply(b"", status="304 Not Modified"), "status 304"),
    "other protocol": (lambda: reply(b"", status="101 Switching Protocols", length=None), "did not speak HTTP"),
}


@pytest.mark.parametrize("name", BODIES)
def test_hostile_answers(name: str) -> None:
    make, reason = BODIES[name]
    network = Network(make())
    with pytest.raises(InvalidRequest, match=reason):
        fetch(GOOD, network)
    assert network.received < 200_000  # no more was taken than it took to refuse it
    assert network.closed


def test_what_is_announced_too_large_is_not_read() -> None:
    body = (bytes(1000) for _ in itertools.count())
    network = Network(itertools.chain([reply(b"", length=10**9)], body))
    with pytest.raises(InvalidRequest, match="at most"):
        fetch(GOOD, network)
    assert network.received < 1000


def test_bodies_in_all_lawful_forms() -> None:
    for answer in (
        reply(),
        reply(length=None),  # until the connection closes
        list(chunked([FILE[:100], FILE[100:]])),
        [bytes([byte]) for byte in reply()],
        reply(headers={"Content-Encoding": "identity"}),
        b"HTTP/1.1 103 Early Hints\r\n\r\n" + reply(),
    ):
        assert fetch(GOOD, Network(answer), max_bytes=len(FILE)) == FILE
    assert fetch(GOOD, Network(reply() + b"and more than announced")) == FILE


SLOW: dict[str, Callable[[], Iterable[bytes]]] = {
    "no answer": lambda: (b"" for _ in range(0)),
    "slow head": lambda: (bytes([byte]) for byte in reply()),
    "slow body": lambda: itertools.chain([reply(b"", length=9000)], itertools.repeat(b"x")),
    "endless hints": lambda: itertools.repeat(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_answers_end_at_the_time_limit(name: str) -> None:
    network = Network(SLOW[name](), pause=0.5 if name == "no answer" else 0.01)
    with pytest.raises(InvalidRequest, match="took too long; send the file as base64"):
        fetch(GOOD, network, total_seconds=0.15)
    assert network.closed


def test_the_time_limit_is_over_all_redirects() -> None:
    network = Network(*[redirect("/again")] * 3, reply(), pause=0.06)
    with pytest.raises(InvalidRequest, match="too long"):
        fetch(GOOD, network, total_seconds=0.15)
    assert len(network.connected) < 4


def test_slow_names_and_connections_end_too() -> None:
    class Hanging(Network):
        async def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore2.AsyncNetworkStream:
            self.connected.append((host, port))
            await asyncio.sleep(60)
            raise AssertionError

    with pytest.raises(InvalidRequest, match="too long"):
        fetch(GOOD, Hanging(), total_seconds=0.05)

    async def forever(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return [PUBLIC]

    async def run() -> None:
        client = OutboundClient(OutboundPolicy(total_seconds=0.05), resolver=forever, connector=Network())
        await fetch_picture(GOOD, client=client, max_bytes=MAX)

    with pytest.raises(InvalidRequest, match="too long"):
        asyncio.run(run())


def test_no_more_requests_at_once_than_allowed() -> None:
    most = now = 0

    async def resolve(host: str, port: int) -> Sequence[str]:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.005)
        now -= 1
        return [PUBLIC]

    async def run() -> None:
        network = Network(*[reply()] * 12)
        client = OutboundClient(OutboundPolicy(max_concurrent=3), resolver=resolve, connector=network)
        assert (
            await asyncio.gather(*(fetch_picture(GOOD, client=client, max_bytes=MAX) for _ in range(12))) == [FILE] * 12
        )

    asyncio.run(run())
    assert most == 3


def test_a_cancelled_fetch_closes_its_connection() -> None:
    network = Network(itertools.chain([reply(b"", length=9000)], itertools.repeat(b"x")), pause=0.01)

    async def run() -> None:
        client = OutboundClient(resolver=network.resolve, connector=network)
        task = asyncio.ensure_future(fetch_picture(GOOD, client=client, max_bytes=MAX))
        while network.received < 20:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert network.closed


def test_what_may_pass_later_is_another_error_below_fetch() -> None:
    """Webhooks try again after these, and not after a refusal."""

    async def run(url: str, network: Network) -> None:
        client = OutboundClient(resolver=network.resolve, connector=network)
        await client.request("GET", url, field="x", headers={})

    for url, network in (
        ("https://unknown.example.org/", Network()),
        (GOOD, Network(dead=[PUBLIC])),
        (GOOD, Network(b"")),
    ):
        with pytest.raises(RemoteError, match=r"^x: "):
            asyncio.run(run(url, network))
