"""Which URLs are refused before anybody is asked, and what an operator may allow."""

from __future__ import annotations

import pytest
from tests.support.network import FILE, GOOD, PUBLIC, Network, fetch, redirect, reply

from limner.errors import InvalidRequest
from limner.outbound.urls import Origin

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
