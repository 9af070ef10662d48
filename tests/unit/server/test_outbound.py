"""Pictures by text and by URL: what is fetched, and the many things that are not. Nothing leaves this machine."""

from __future__ import annotations

import asyncio
import base64
import datetime
import gzip
import ipaddress
import itertools
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpcore2
import pytest
from tests.support.network import FILE, PUBLIC, PUBLIC_6, Network, default_context, redirect, reply, serving

from limner.errors import InvalidRequest, RemoteError
from limner.server.outbound.client import Origin, OutboundClient, OutboundPolicy, Reply, address_problem, parse_url
from limner.server.outbound.pictures import decode_picture, fetch_picture, read_picture

MAX = 10_000


def fetch(url: str, network: Network, *, max_bytes: int = MAX, **policy: Any) -> bytes:
    async def run() -> bytes:
        client = OutboundClient(
            OutboundPolicy(**policy), resolver=network.resolve, connector=network, ssl_context=default_context()
        )
        return await fetch_picture(url, client=client, max_bytes=max_bytes)

    return asyncio.run(run())


GOOD = "https://pictures.example.org/a.png"


def test_a_good_fetch() -> None:
    network = Network(reply())
    assert fetch("https://Pictures.example.org/a%20b.png?x=1&y=%2F#part", network) == FILE
    assert network.asked == ["pictures.example.org"]
    assert network.connected == [(PUBLIC, 443)]  # the address, not the name
    assert network.tls == ["pictures.example.org"]
    head, _, body = network.sent.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "GET /a%20b.png?x=1&y=%2F HTTP/1.1"
    assert sorted(line.partition(":")[0] for line in lines[1:]) == [
        "Accept",
        "Accept-Encoding",
        "Connection",
        "Host",
        "User-Agent",
    ]
    assert "Host: pictures.example.org" in lines
    assert body == b""
    assert network.closed


# Hosts and URLs that are refused without a question to the network.
REFUSED_AT_ONCE = {
    # private and special addresses
    "loopback": ("https://127.0.0.1/", "not a public address"),
    "all of loopback": ("https://127.255.1.2/", "not a public address"),
    "this host": ("https://0.0.0.0/", "not a public address"),
    "cloud metadata": ("https://169.254.169.254/latest/meta-data/", "link-local"),
    "ten": ("https://10.1.2.3/", "private"),
    "172": ("https://172.31.255.255/", "private"),
    "192": ("https://192.168.0.1/", "private"),
    "carrier": ("https://100.100.100.200/", "carriers"),
    "oracle metadata": ("https://192.0.0.192/", "not a public address"),
    "azure metadata": ("https://168.63.129.16/", "metadata"),
    "benchmark": ("https://198.19.0.1/", "not a public address"),
    "documentation": ("https://203.0.113.7/", "documentation"),
    "multicast": ("https://239.1.1.1/", "multicast"),
    "broadcast": ("https://255.255.255.255/", "not a public address"),
    "6to4 relay": ("https://192.88.99.1/", "not a public address"),
    "v6 loopback": ("https://[::1]/", "not a public address"),
    "v6 unspecified": ("https://[::]/", "not a public address"),
    "v6 unique local": ("https://[fd00:ec2::254]/", "not a public address"),
    "v6 link-local": ("https://[fe80::1]/", "not a public address"),
    "v6 site-local": ("https://[fec0::1]/", "not a public address"),
    "v6 multicast": ("https://[ff0e::1]/", "not a public address"),
    "v6 documentation": ("https://[2001:db8::1]/", "not a public address"),
    "new v6 documentation": ("https://[3fff::1]/", "not a public address"),
    "mapped": ("https://[::ffff:127.0.0.1]/", "loopback"),
    "mapped in hex": ("https://[::ffff:a9fe:a9fe]/", "link-local"),
    "compatible": ("https://[::127.0.0.1]/", "not a public address"),
    "translated": ("https://[::ffff:0:7f00:1]/", "not a public address"),
    "6to4": ("https://[2002:7f00:1::]/", "6to4"),
    "nat64": ("https://[64:ff9b::10.0.0.1]/", "private"),
    "local nat64": ("https://[64:ff9b:1::1]/", "not a public address"),
    "teredo": ("https://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/", "Teredo"),
    # forms of addresses that programs read in different ways
    "decimal": ("https://2130706433/", "four decimal numbers"),
    "hex": ("https://0x7f000001/", "four decimal numbers"),
    "octal": ("https://0177.0.0.1/", "four decimal numbers"),
    "hex in parts": ("https://0x7f.0.0.1/", "four decimal numbers"),
    "short": ("https://127.1/", "four decimal numbers"),
    "number at the end": ("https://example.1/", "four decimal numbers"),
    "hex at the end": ("https://example.0x1/", "four decimal numbers"),
    "full-width digits": ("https://\uff11\uff12\uff17.\uff10.\uff10.\uff11/", "loopback"),
    "ideographic dots": ("https://127\u30020\u30020\u30021/", "loopback"),
    "circled digits": ("https://①②⑦.⓪.⓪.①/", "loopback|not allowed"),
    "zone": ("https://[fe80::1%25eth0]/", "host and port"),
    "brackets around IPv4": ("https://[127.0.0.1]/", "not allowed|taken apart"),
    "future address": ("https://[v1.fe80::a+en1]/", "host and port|taken apart"),
    # names
    "localhost": ("https://localhost/", "not a full host name"),
    "single label": ("https://redis/", "not a full host name"),
    "trailing dot": ("https://pictures.example.org./a", "ends in a dot"),
    "empty label": ("https://pictures..example.org/a", "labels"),
    "leading dot": ("https://.example.org/a", "labels"),
    "underscore": ("https://a_b.example.org/a", "labels"),
    "percent in the host": ("https://127%2e0%2e0%2e1/", "host and port"),
    "long label": (f"https://{'a' * 64}.example.org/", "labels"),
    "long name": (f"https://{'a.' * 130}example.org/", "labels"),
    "soft hyphen only": ("https://\u00ad.example.org/", "control characters|not allowed"),
    "slash in disguise": ("https://pictures.example.org\u2100.evil.example/", "taken apart|not allowed"),
    # schemes
    "http": ("http://pictures.example.org/a.png", "begin with https"),
    "ftp": ("ftp://pictures.example.org/a.png", "begin with https"),
    "file": ("file:///etc/passwd", "begin with https"),
    "gopher": ("gopher://127.0.0.1:6379/_INFO", "begin with https"),
    "no slashes": ("https:pictures.example.org/a.png", "begin with https"),
    "one slash": ("https:/pictures.example.org/a.png", "begin with https"),
    "three slashes": ("https:///pictures.example.org/a.png", "host and port"),
    "no scheme": ("//pictures.example.org/a.png", "begin with https"),
    # credentials, ports, characters
    "user": ("https://anna@pictures.example.org/", "user name"),
    "password": ("https://anna:secret@pictures.example.org/", "user name"),
    "host in disguise": ("https://pictures.example.org@127.0.0.1/", "user name"),
    "backslash": ("https://pictures.example.org\\@127.0.0.1/", "backslashes"),
    "ssh": ("https://pictures.example.org:22/", "port 22"),
    "http port": ("https://pictures.example.org:80/", "port 80"),
    "port zero": ("https://pictures.example.org:0/", "port 0"),
    "large port": ("https://pictures.example.org:65979/", "port 65979"),
    "empty port": ("https://pictures.example.org:/", "host and port"),
    "sign in the port": ("https://pictures.example.org:+443/", "host and port"),
    "other digits in the port": ("https://pictures.example.org:\uff14\uff14\uff13/", "host and port|taken apart"),
    "two ports": ("https://pictures.example.org:443:80/", "host and port"),
    "line break": ("https://pictures.example.org/\r\nX-Header: 1", "control characters"),
    "tab in the scheme": ("ht\ttps://pictures.example.org/", "control characters"),
    "nul": ("https://pictures.example.org/\0", "control characters"),
    "space": (" https://pictures.example.org/", "spaces"),
    "not ASCII": ("https://pictures.example.org/ä.png", "percent-encode"),
    "surrogate": ("https://pictures.example.org/\ud800", "control characters"),
    "long": ("https://pictures.example.org/" + "a" * 9000, "characters"),
    "empty": ("", "characters"),
}


@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_hostile_urls_are_refused_without_asking_anybody(name: str) -> None:
    url, reason = REFUSED_AT_ONCE[name]
    network = Network()
    with pytest.raises(InvalidRequest, match=reason) as caught:
        fetch(url, network)
    assert caught.value.field == "input_image"
    assert "secret" not in str(caught.value)
    assert (network.asked, network.connected) == ([], [])


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


def test_public_literals_and_other_scripts() -> None:
    network = Network(reply(), reply(), reply(), names={"xn--bcher-kva.example": [PUBLIC]})
    assert fetch(f"https://{PUBLIC}/", network) == FILE
    assert fetch(f"https://[{PUBLIC_6}]:443/", network) == FILE
    assert fetch("https://BÜCHER.example/", network) == FILE
    assert network.connected == [(PUBLIC, 443), (PUBLIC_6, 443), (PUBLIC, 443)]
    assert network.tls == [PUBLIC, PUBLIC_6, "xn--bcher-kva.example"]
    assert network.asked == ["xn--bcher-kva.example"]
    assert f"Host: [{PUBLIC_6}]\r\n".encode() in network.sent


REDIRECTS = {
    "http": ("http://pictures.example.org/a.png", "not https"),
    "private": ("https://10.0.0.1/", "not a public address"),
    "metadata": ("https://169.254.169.254/latest/", "not a public address"),
    "name of a private one": ("https://inside.example.org/", "not public"),
    "another port": ("https://pictures.example.org:8443/", "port 8443"),
    "user": ("https://a:b@pictures.example.org/", "user name"),
    "same scheme, private": ("//127.0.0.1/", "not a public address"),
    "file": ("file:///etc/passwd", "not https"),
    "data": ("data:image/png;base64,AAAA", "not https"),
    "script": ("javascript:alert(1)", "not https"),
    "broken": ("https://[::1", "no URL|taken apart|host and port"),
    "nowhere": ("", "without saying where"),
}


@pytest.mark.parametrize("name", REDIRECTS)
def test_redirects_are_checked_like_the_first_url(name: str) -> None:
    location, reason = REDIRECTS[name]
    network = Network(redirect(location), names={"inside.example.org": ["10.0.0.5"]})
    with pytest.raises(InvalidRequest, match=reason):
        fetch(GOOD, network)
    assert network.connected == [(PUBLIC, 443)]  # the first one alone


@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T", "308 P"])
def test_three_redirects_are_followed(status: str) -> None:
    network = Network(redirect("/b", status), redirect("c?d", status), redirect(f"https://{PUBLIC}/e", status), reply())
    assert fetch(GOOD, network) == FILE
    assert network.connected == [(PUBLIC, 443)] * 4
    assert [line for line in network.sent.decode().split("\r\n") if line.startswith("GET")] == [
        "GET /a.png HTTP/1.1",
        "GET /b HTTP/1.1",
        "GET /c?d HTTP/1.1",
        "GET /e HTTP/1.1",
    ]


def test_four_redirects_are_not() -> None:
    network = Network(*[redirect("/again")] * 5)
    with pytest.raises(InvalidRequest, match="more than 3 times"):
        fetch(GOOD, network)
    assert len(network.connected) == 4


def test_cookies_are_not_kept() -> None:
    answer = reply(b"", status="302 F", headers={"Location": "/b", "Set-Cookie": "a=b"})
    network = Network(answer, reply())
    assert fetch(GOOD, network) == FILE
    assert b"ookie" not in network.sent


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


PUBLIC_ADDRESSES = [
    PUBLIC,
    PUBLIC_6,
    "8.8.8.8",
    "1.1.1.1",
    "2001:4860:4860::8888",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
    "172.32.0.1",
    "192.0.1.1",
    "2a00:1450::1",
]


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public_addresses(address: str) -> None:
    assert address_problem(ipaddress.ip_address(address)) is None


def test_no_address_passes_that_python_calls_private() -> None:
    """Whatever the table says: 20,000 addresses of all kinds against `ipaddress`, in both notations of IPv4."""
    passed = 0
    for number in range(0, 1 << 32, (1 << 32) // 20_000):
        plain = ipaddress.IPv4Address(number)
        mapped = ipaddress.IPv6Address((0xFFFF << 32) | number)
        problem = address_problem(plain)
        assert problem == address_problem(mapped)
        if problem is None:
            assert plain.is_global
            passed += 1
    assert passed > 15_000


def test_url_parts() -> None:
    target = parse_url("HTTPS://EXAMPLE.org:8443?q#f", field="x")
    assert (*target.origin, target.path) == ("https", "example.org", 8443, "/?q")
    assert str(target) == "https://example.org:8443/?q"
    assert str(parse_url("https://[2A00::0:1]:443/", field="x")) == "https://[2a00::1]/"
    assert Origin.parse("http://127.0.0.1:9000") == Origin("http", "127.0.0.1", 9000)
    for wrong in ("https://example.org/", "https://example.org/a", "example.org", "https://*.example.org"):
        with pytest.raises(InvalidRequest, match="allow"):
            Origin.parse(wrong)


def test_allowed_origins_are_exact() -> None:
    allowed = frozenset({Origin.parse("http://127.0.0.1:9000"), Origin.parse("https://store:9443")})
    network = Network(reply(), reply(), names={"store": ["10.0.0.7"]})
    assert fetch("http://127.0.0.1:9000/a", network, allowed=allowed) == FILE
    assert fetch("https://store:9443/a", network, allowed=allowed) == FILE
    assert network.connected == [("127.0.0.1", 9000), ("10.0.0.7", 9443)]
    assert network.tls == ["store"]
    assert b"Host: 127.0.0.1:9000\r\n" in network.sent
    for url in (
        "http://127.0.0.1:9001/",
        "https://127.0.0.1:9000/",
        "https://store/",
        "http://store:9443/",
        "http://127.0.0.2:9000/",
    ):
        with pytest.raises(InvalidRequest):
            fetch(url, network, allowed=allowed)
    network = Network(redirect("http://127.0.0.1:9000/a"))
    with pytest.raises(InvalidRequest, match="not https"):
        fetch(GOOD, network, allowed=allowed)


def test_ports_can_be_allowed() -> None:
    network = Network(reply())
    assert fetch("https://pictures.example.org:8443/", network, ports=frozenset({443, 8443})) == FILE
    assert network.connected == [(PUBLIC, 8443)]


# A real server


class Authority:
    """A certificate authority and certificates of its own."""

    def __init__(self) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        self._x509, self._hash, self._new = x509, hashes.SHA256(), lambda: ec.generate_private_key(ec.SECP256R1())
        self._key = self._new()
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "limner tests")])
        self.certificate = self._issue(self._name, self._key, None, 1)

    def _issue(self, subject: Any, key: Any, host: str | None, days: int) -> Any:
        x509 = self._x509
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=10))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if host is None:
            usage = dict.fromkeys(
                (
                    "digital_signature",
                    "content_commitment",
                    "key_encipherment",
                    "data_encipherment",
                    "key_agreement",
                    "encipher_only",
                    "decipher_only",
                ),
                False,
            )
            builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        else:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        return builder.sign(self._key, self._hash)

    def pem(self) -> str:
        from cryptography.hazmat.primitives.serialization import Encoding

        return self.certificate.public_bytes(Encoding.PEM).decode()

    def server_context(self, host: str, folder: Path, *, days: int = 1) -> ssl.SSLContext:
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        key = self._new()
        subject = self._x509.Name([self._x509.NameAttribute(self._x509.NameOID.COMMON_NAME, host)])
        chain = folder / f"{host}.pem"
        chain.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + self._issue(subject, key, host, days).public_bytes(Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        return context


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


# Text


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("size", range(1, 8))
def test_base64_in_its_forms(size: int) -> None:
    data = FILE[:size]
    for given in (
        text(data),
        f"data:image/png;base64,{text(data)}",
        f"DATA:Image/svg+xml;BASE64,{text(data)}",
        f"data:;base64,{text(data)}",
        base64.encodebytes(data).decode(),
        f" {text(data)[:2]}\r\n\t{text(data)[2:]}\n",
    ):
        assert decode_picture(given, max_bytes=size) == data
        assert asyncio.run(read_picture(given, client=None, max_bytes=size)) == data
        with pytest.raises(InvalidRequest, match=f"the file has {size} bytes; at most {size - 1}"):
            decode_picture(given, max_bytes=size - 1)


def test_the_size_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> bytes:
        raise AssertionError("decoded")

    monkeypatch.setattr("limner.server.outbound.pictures.binascii.a2b_base64", never)
    with pytest.raises(InvalidRequest, match="the file has 3000 bytes; at most 2999"):
        decode_picture("AAAA" * 1000, max_bytes=2999)


BAD_TEXT = {
    "empty": ("", "is empty"),
    "spaces": (" \n", "is empty"),
    "empty data URL": ("data:image/png;base64,", "is empty"),
    "cut": ("AAAAA", "no multiple of 4"),
    "no padding": ("AAA", "no multiple of 4"),
    "URL alphabet": ("AA-_", "is not base64"),
    "other characters": ("AA!A", "is not base64"),
    "not ASCII": ("AAAÄ", "is not base64"),
    "full-width": ("\uff21\uff21\uff21\uff21", "is not base64"),
    "surrogate": ("AAA\ud800", "is not base64"),
    "padding inside": ("AA==AAAA", "is not base64"),
    "only padding": ("====", "is not base64"),
    "three of padding": ("A===", "is not base64"),
    "other spaces": ("AA\u00a0A", "is not base64"),
    "nul": ("AA\0A", "is not base64"),
    "not base64": ("data:image/png,AAAA", "the data URL is not"),
    "other kind": ("data:text/html;base64,AAAA", "the data URL is not"),
    "parameters": ("data:image/png;charset=utf-8;base64,AAAA", "the data URL is not"),
    "percent": ("data:image/png;base64,AA%2B", "no multiple of 4|is not base64"),
    "a URL in a data URL": ("data:https://example.org/a.png", "the data URL is not"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text(name: str) -> None:
    given, reason = BAD_TEXT[name]
    with pytest.raises(InvalidRequest, match=f"input_image_2: .*({reason})") as caught:
        decode_picture(given, max_bytes=MAX, field="input_image_2")
    assert caught.value.field == "input_image_2"


def test_urls_are_off_unless_there_is_a_client() -> None:
    for url in (GOOD, "http://a", "file:///etc/passwd", "HTTPS://a"):
        with pytest.raises(InvalidRequest, match="switched off"):
            asyncio.run(read_picture(url, client=None, max_bytes=MAX))
    network = Network(reply())

    async def run() -> bytes:
        client = OutboundClient(resolver=network.resolve, connector=network)
        return await read_picture(GOOD, client=client, max_bytes=MAX)

    assert asyncio.run(run()) == FILE


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
