"""URLs have one reading."""

from __future__ import annotations

import pytest
from tests.support.network import FILE, PUBLIC, PUBLIC_6, Network, fetch, reply

from limner.errors import InvalidRequest
from limner.outbound.urls import Origin, parse_url


def test_url_parts() -> None:
    target = parse_url("HTTPS://EXAMPLE.org:8443?q#f", field="x")
    assert (*target.origin, target.path) == ("https", "example.org", 8443, "/?q")
    assert str(target) == "https://example.org:8443/?q"
    assert str(parse_url("https://[2A00::0:1]:443/", field="x")) == "https://[2a00::1]/"
    assert Origin.parse("http://127.0.0.1:9000") == Origin("http", "127.0.0.1", 9000)
    for wrong in ("https://example.org/", "https://example.org/a", "example.org", "https://*.example.org"):
        with pytest.raises(InvalidRequest, match="allow"):
            Origin.parse(wrong)


def test_public_literals_and_other_scripts() -> None:
    network = Network(reply(), reply(), reply(), names={"xn--bcher-kva.example": [PUBLIC]})
    assert fetch(f"https://{PUBLIC}/", network) == FILE
    assert fetch(f"https://[{PUBLIC_6}]:443/", network) == FILE
    assert fetch("https://BÜCHER.example/", network) == FILE
    assert network.connected == [(PUBLIC, 443), (PUBLIC_6, 443), (PUBLIC, 443)]
    assert network.tls == [PUBLIC, PUBLIC_6, "xn--bcher-kva.example"]
    assert network.asked == ["xn--bcher-kva.example"]
    assert f"Host: [{PUBLIC_6}]\r\n".encode() in network.sent
