"""Pictures as text and by URL: base64 in its forms, redirects."""

from __future__ import annotations

import asyncio
import base64

import pytest
from tests.support.network import FILE, GOOD, MAX, PUBLIC, Network, fetch, redirect, reply

from limner.errors import InvalidRequest
from limner.outbound.client import OutboundClient
from limner.outbound.pictures import decode_picture, read_picture


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

    monkeypatch.setattr("limner.outbound.pictures.binascii.a2b_base64", never)
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
