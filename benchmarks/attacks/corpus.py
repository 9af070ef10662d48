"""Hostile requests, each of which a server has to refuse with a 4xx: `cases()`. The attacks and the tests send them.

A body that never comes times out after `BODY_SECONDS` where a test sets the server so.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import socket
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image, PngImagePlugin

BODY_SECONDS = 0.7
_HOSTED, _FORM = "/v1/flux-2-klein-9b", "/v1/images/edits"
_JSON = {"content-type": "application/json"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request: keyword arguments of httpx, or bytes as they go over the wire."""

    name: str
    request: dict[str, Any] = field(default_factory=dict)
    raw: bytes = b""

    def send(self, url: str, *, key: str | None = None) -> int:
        """The status of the answer."""
        if not self.raw:
            request = {"method": "POST", **self.request}
            headers = {**({"x-key": key} if key else {}), **request.pop("headers", {})}
            path = request.pop("path", _HOSTED)
            return httpx.request(url=f"{url}{path}", headers=headers, timeout=60, **request).status_code
        target = httpx.URL(url)
        line = f"x-key: {key}\r\n".encode() if key else b""
        with socket.create_connection((target.host, target.port or 80), timeout=60) as connection:
            head = self.raw.replace(b"HOST", f"{target.host}:{target.port}".encode()).replace(b"KEY\r\n", line)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # answered before it had read all
                connection.sendall(head)
            answer = b""
            while b"\r\n" not in answer and (more := connection.recv(65536)):
                answer += more
        return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def picture(width: int = 96, height: int = 80, *, mode: str = "RGB", format: str = "PNG", **options: Any) -> bytes:  # noqa: A002
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(100)
    elif mode != "RGB":
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes, *, crc: int | None = None) -> bytes:
    """A chunk of a PNG file."""
    found = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", found)


def png(width: int, height: int, *, bits: int = 8, colour: int = 2, before: bytes = b"", data: bytes = b"") -> bytes:
    """Return a PNG file with this header, whatever data follow."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def deflated(size: int, value: bytes = b"\0") -> bytes:
    """`size` equal bytes, compressed about a thousand times."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(value * (1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, packer.flush()])


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def sized_jpeg(width: int, height: int) -> bytes:
    data = picture(format="JPEG")
    return patched(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, bytes(1 << 20))
    return buffer.getvalue()


def animated(format: str) -> bytes:  # noqa: A002
    frames = [Image.new("RGB", (96, 80), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def many_scans(more: int, *, side: int) -> bytes:
    """A progressive JPEG with its last scan so many times more: some bytes each, and a pass over all pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG", progressive=True, quality=1)
    data = buffer.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * more + data[-2:]


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP file of 96x80 with these chunks."""
    header = (b"VP8X", b"\x0e\0\0\0" + struct.pack("<I", 95)[:3] + struct.pack("<I", 79)[:3])
    parts = [kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in (header, *chunks)]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def structures() -> dict[str, bytes]:
    """Small files whose structure makes a decoder work long: scans, segments, chunks, frames and metadata."""
    jpeg, whole = picture(format="JPEG"), picture()
    pixels = (b"VP8 ", picture(format="WEBP")[20:])
    exif = b"\xff\xe1\x00\x0aExif\0\0MM"
    return {
        "jpeg of 300 scans": many_scans(300, side=128),
        "jpeg of 64 megapixels and 310 scans": many_scans(300, side=8000),
        "jpeg of 5000 comments": jpeg[:2] + b"\xff\xfe\x00\x02" * 5000 + jpeg[2:],
        "jpeg of 100000 EXIF segments": jpeg[:2] + exif * 100_000 + jpeg[2:],
        "png of 5000 texts": whole[:33] + chunk(b"tEXt", b"k\0v") * 5000 + whole[33:],
        "png of 200000 pixel chunks": whole[:33] + chunk(b"IDAT", b"") * 200_000 + whole[33:],
        "png of 100 profiles": whole[:33] + chunk(b"iCCP", b"k\0\0" + deflated(1 << 20)) * 100 + whole[33:],
        "png with EXIF of 2 MiB": whole[:33] + chunk(b"eXIf", bytes(2 << 20)) + whole[33:],
        "png of 5000 frames": whole[:33] + chunk(b"acTL", struct.pack(">II", 5000, 0)) + whole[33:],
        "webp of 5000 chunks": webp(pixels, *[(b"ABCD", b"")] * 5000),
        "webp of 900 frames": webp(*[(b"ANMF", bytes(16))] * 900),
        "webp with EXIF of 2 MiB": webp(pixels, (b"EXIF", bytes(2 << 20))),
    }


def exif_of(data: bytes) -> dict[str, Any]:
    return {"exif": b"Exif\0\0" + data}


def pictures() -> dict[str, bytes]:
    """Files that are not pictures, or not allowed ones."""
    whole, jpeg, webp = picture(), picture(format="JPEG"), picture(format="WEBP")
    rows = zlib.compress(b"\0" * (80 * (1 + 96 * 3)))
    many = b"".join(chunk(b"zTXt", b"k%d\0\0" % i + deflated(1 << 20)) for i in range(80))
    files = {
        "png cut in half": whole[: len(whole) // 2],
        "png without its pixels": whole[:33],
        "png signature alone": whole[:8],
        "jpeg cut in half": jpeg[: len(jpeg) // 2],
        "webp cut in half": webp[: len(webp) // 2],
        "png bomb, 900 megapixels": png(30000, 30000, bits=1, colour=0, data=deflated(100 << 20)),
        "png bomb, 67 megapixels": png(8200, 8200, data=deflated(200 << 20)),
        "png that says 2 billion pixels a side": png(2**31 - 1, 2**31 - 1, data=rows),
        "png that says no pixels": png(0, 80, data=rows),
        "jpeg bomb": sized_jpeg(65500, 65500),
        "jpeg that says no pixels": sized_jpeg(0, 0),
        "webp bomb": patched(webp, webp.index(b"\x9d\x01\x2a") + 3, struct.pack("<HH", 16383, 16383)),
        "png with a wrong checksum": whole[:-20] + b"\0\0\0\0" + whole[-16:],
        "png with a wrong header checksum": patched(whole, 29, b"\0\0\0\0"),
        "png with pixels that are not compressed": png(96, 80, data=b"not zlib"),
        "png with too few pixels": png(96, 80, data=zlib.compress(b"\0" * 100)),
        "png with an unknown colour type": png(96, 80, colour=5, data=rows),
        "zTXt bomb": png(96, 80, before=chunk(b"zTXt", b"k\0\0" + deflated(200 << 20)), data=rows),
        "many zTXt bombs": png(96, 80, before=many, data=rows),
        "iTXt bomb": png(96, 80, before=chunk(b"iTXt", b"k\0\1\0\0\0" + deflated(200 << 20)), data=rows),
        "iCCP bomb": png(96, 80, before=chunk(b"iCCP", b"k\0\0" + deflated(200 << 20)), data=rows),
        "broken EXIF in jpeg": picture(format="JPEG", **exif_of(b"XX*\0nonsense")),
        "broken EXIF in png": png(96, 80, before=chunk(b"eXIf", b"XX*\0nonsense"), data=rows),
        "broken EXIF in webp": picture(format="WEBP", **exif_of(b"XX*\0nonsense")),
        "EXIF as text that is not hexadecimal": png(
            96, 80, before=chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 8\nzzzzzzzz"), data=rows
        ),
        "a file of 21 MiB": whole + bytes(21 << 20),
        "gif": picture(format="GIF"),
        "tiff": picture(format="TIFF"),
        "bmp": picture(format="BMP"),
        "ico": picture(64, 64, format="ICO"),
        "jpeg 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100),
        "jpeg xl": b"\xff\x0a" + bytes(100),
        "avif": b"\0\0\0\x20ftypavif" + bytes(100),
        "mp4": b"\0\0\0\x20ftypisom" + bytes(100),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="96" height="80"/>',
        "svg with a script": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>',
        "xml entity bomb": b'<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><svg>&b;</svg>',
        "html": b"<!doctype html><script>alert(1)</script>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 80\n(x) run\n",
        "pdf": b"%PDF-1.7\n" + bytes(100),
        "zip": zipped("a.png"),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "program": b"\x7fELF\x02\x01\x01" + bytes(100),
        "gif that is a script": b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)",
        "html before a png": b"<script>alert(1)</script>" + whole,
        "zip before a png": zipped("a.png") + whole,
        "pdf before a jpeg": b"%PDF-1.7\n" + jpeg,
        "nothing": b"",
        "one byte": b"\x89",
        "zeros": bytes(1 << 16),
        "noise": random.Random(0).randbytes(1 << 16),
        "animated png": animated("PNG"),
        "animated webp": animated("WEBP"),
        "16 bit grey": png(96, 80, bits=16, colour=0, data=zlib.compress(b"\0" * (80 * (1 + 96 * 2)))),
        "16 bit colour": png(96, 80, bits=16, colour=2, data=zlib.compress(b"\0" * (80 * (1 + 96 * 6)))),
        "CMYK": picture(mode="CMYK", format="JPEG"),
        "transparent png": picture(mode="RGBA"),
        "transparent grey": picture(mode="LA"),
        "transparent webp": picture(mode="RGBA", format="WEBP"),
        "one pixel": picture(1, 1),
        "too small": picture(63, 80),
        "too long": picture(1024, 64),
        **structures(),
    }
    palette = Image.new("P", (96, 80))
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    return {**files, "transparent palette": buffer.getvalue()}


def harmless() -> dict[str, bytes]:
    """Files with other data besides a picture; only the picture is read."""
    info = PngImagePlugin.PngInfo()
    info.add_text("k", "x" * 500_000)
    return {
        "html behind a png": picture() + b"<script>alert(1)</script>",
        "zip behind a jpeg": picture(format="JPEG") + zipped("a"),
        "script in a comment": picture(format="JPEG", comment=b"<?php system('id'); ?>"),
        "long text": picture(pnginfo=info),
        "large profile": picture(icc_profile=bytes(500_000)),
    }


def _json_cases() -> dict[str, Any]:
    """Bodies of the hosted dialect: values, or bytes as they are."""
    good = text(picture())
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    many = {f"field{i}": i for i in range(5000)}
    long = b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"
    images = {
        "data URL of html": "data:text/html;base64,PGI+",
        "data URL of svg": "data:image/svg+xml;base64,PHN2Zy8+",
        "data URL without base64": "data:image/png,abc",
        "empty data URL": "data:image/png;base64,",
        "data URL in capitals of another type": "DATA:TEXT/HTML;BASE64,PGI+",
        "base64 with other characters": good[:-8] + "!!!!!!!!",
        "base64 that is cut": good[:-3],
        "base64 for URLs": "-_-_",
        "base64 with padding inside": "aGk=aGk=",
        "base64 of other letters": "\uff41" * 4,
        "file": "file:///etc/passwd",
        "loopback": "http://127.0.0.1/a.png",
        "metadata of a cloud": "http://169.254.169.254/latest/meta-data/",
        "loopback by name": "https://localhost/a.png",
        "loopback as one number": "https://2130706433/",
        "loopback in IPv6": "https://[::1]/a.png",
        "mapped loopback": "https://[::ffff:127.0.0.1]/",
        "ftp": "ftp://example.org/a.png",
        "gopher": "gopher://127.0.0.1:6379/_FLUSHALL",
        "script": "javascript:alert(1)",
        "blank": " ",
    }
    fields: dict[str, Any] = {
        "prompt null": {"prompt": None},
        "prompt number": {"prompt": 5},
        "prompt list": {"prompt": ["a"]},
        "prompt object": {"prompt": {"a": 1}},
        "prompt empty": {"prompt": ""},
        "prompt blank": {"prompt": " \n"},
        "prompt too long": {"prompt": "a" * 40_000},
        "prompt with NUL": {"prompt": "a\0b"},
        "prompt lone surrogate": b'{"prompt": "a\\ud800b"}',
        "no prompt": {},
        "array": [],
        "string": b'"a"',
        "null": b"null",
        "nothing": b"",
        "one brace": b"{",
        "trailing": b'{"prompt": "a"} x',
        "two bodies": b'{"prompt": "a"}{"prompt": "b"}',
        "NaN": b'{"prompt": "a", "seed": NaN}',
        "Infinity": b'{"prompt": "a", "timeout": Infinity}',
        "minus Infinity": b'{"prompt": "a", "timeout": -Infinity}',
        "1e999": b'{"prompt": "a", "timeout": 1e999}',
        "integer of 5000 digits": long,
        "width 10^30": {"prompt": "a", "width": 10**30},
        "seed 2^64": {"prompt": "a", "seed": 2**64},
        "true as a number": {"prompt": "a", "seed": True},
        "number as text": {"prompt": "a", "seed": "1"},
        "deep": b"[" * 100_000,
        "deep and closed": b"[" * 90_000 + b"]" * 90_000,
        "deep value": {"prompt": deep},
        "deep objects": b'{"a":' * 50_000,
        "many lists": b"[" + b"[]," * 2_000_000 + b"[]]",
        "many names": {"prompt": "a", **many},
        "a name twice": b'{"prompt": "a", "prompt": "b"}',
        "byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
        "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
        "latin-1": '{"prompt": "é"}'.encode("latin-1"),
        "unknown name": {"prompt": "a", "stepz": 4},
        "eleventh picture": {"prompt": "a", "input_image_11": good},
        "handle with a path": {"prompt": "a", "references": "../../etc/passwd"},
        "handle with NUL": {"prompt": "a", "references": "\0" * 64},
        "handle long": {"prompt": "a", "references": "a" * 100_000},
        "webhook inside": {"prompt": "a", "webhook_url": "https://10.0.0.1/"},
        "webhook with a line break": {"prompt": "a", "webhook_url": "https://example.org/\r\nx: y"},
        "webhook too long": {"prompt": "a", "webhook_url": "https://example.org/" + "a" * 3000},
        "webhook object": {"prompt": "a", "webhook_url": {}},
    }
    pictures = {f"picture by {name}": {"prompt": "a", "input_image": value} for name, value in images.items()}
    return {**fields, **pictures, "picture object": {"prompt": "a", "input_image": {}}}


def form(*parts: bytes, end: bool = True) -> bytes:
    return b"".join(b"--B\r\n" + part + b"\r\n" for part in parts) + (b"--B--\r\n" if end else b"")


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value


def _form_cases() -> dict[str, tuple[str, bytes]]:
    """Content types and bodies for the OpenAI dialect."""
    file = part("image", picture(), '; filename="a.png"')
    prompt = part("prompt", b"a")
    kind = "multipart/form-data; boundary=B"
    inner = b"Content-Type: multipart/mixed; boundary=C\r\n\r\n"
    nested = b'Content-Disposition: form-data; name="image"; filename="a"\r\n' + inner
    return {
        "no boundary": ("multipart/form-data", form(file, prompt)),
        "another boundary": ("multipart/form-data; boundary=X", form(file, prompt)),
        "an empty boundary": ("multipart/form-data; boundary=", form(file, prompt)),
        "a boundary of 10000 characters": (f"multipart/form-data; boundary={'b' * 10000}", form(file, prompt)),
        "no end": (kind, form(file, prompt, end=False)[:-40]),
        "nothing": (kind, b""),
        "not a form": (kind, b"hello"),
        "urlencoded": ("application/x-www-form-urlencoded", b"prompt=a"),
        "json as a form": ("application/json", b'{"prompt": "a"}'),
        "no type": ("", form(file, prompt)),
        "5000 parts": (kind, form(*[part(f"a{i}", b"x") for i in range(5000)])),
        "5000 files": (kind, form(*[part("image", b"x", '; filename="a"')] * 5000)),
        "21 pictures": (kind, form(prompt, *[file] * 21)),
        "17 pictures": (kind, form(prompt, *[file] * 17)),
        "nested": (kind, form(prompt, nested + b"--C\r\n" + file + b"\r\n--C--")),
        "the prompt twice": (kind, form(file, prompt, prompt)),
        "a picture as text": (kind, form(prompt, part("image", picture()))),
        "an unknown field": (kind, form(file, prompt, part("steps", b"4"))),
        "an unknown file": (kind, form(file, prompt, part("other", b"x", '; filename="a"'))),
        "a file name with a path": (kind, form(prompt, part("image", b"x", '; filename="../../../etc/cron.d/x"'))),
        "a file name with NUL": (kind, form(prompt, part("image", b"x", '; filename="a\0b"'))),
        "a field name with a path": (kind, form(file, prompt, part("../../x", b"1"))),
        "no name": (kind, form(file, b"Content-Disposition: form-data\r\n\r\na")),
        "no disposition": (kind, form(file, b"X: y\r\n\r\na")),
        "a part header of 100 kB": (kind, form(file, b"X: " + b"y" * 100_000 + b"\r\n" + prompt)),
        "1000 part headers": (kind, form(file, b"".join(b"X%d: y\r\n" % i for i in range(1000)) + prompt)),
        "a prompt of 21 MiB": (kind, form(file, part("prompt", b"a" * (21 << 20)))),
        "a prompt that is not UTF-8": (f"{kind}; charset=undefined", form(file, part("prompt", b"\xff\xfe"))),
        "a charset that computes": (f"{kind}; charset=punycode", form(file, part("prompt", b"a-" + b"9" * 30_000))),
        "another charset": (f"{kind}; charset=idna", form(file, part("prompt", b"a..b"))),
        "n as a word": (kind, form(file, prompt, part("n", b"many"))),
        "a size as a formula": (kind, form(file, prompt, part("size", b"1e3x1e3"))),
        "a mask": (kind, form(file, prompt, part("mask", picture(), '; filename="m.png"'))),
        "lines without returns": (kind, form(file, prompt).replace(b"\r\n", b"\n")),
        "dashes": (kind, b"--B" + b"\r\n--" * 500_000),
    }


def _raw_cases() -> dict[str, bytes]:
    """Requests as they go over the wire; HOST and KEY are filled in."""
    head = b"POST /v1/edit HTTP/1.1\r\nHost: HOST\r\nKEY\r\nContent-Type: application/json\r\n"
    body = b'{"prompt": ""}'
    return {
        "a body that does not come": head + b"Content-Length: 100\r\n\r\n",
        "a body that stops": head + b"Content-Length: 100\r\n\r\n" + body,
        "chunks without end": head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "a chunk size that is no number": head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
        "a chunk of 2^64 bytes": head + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nhello\r\n",
        "a body of 10 GB announced": head + b"Content-Length: 10000000000\r\n\r\n",
        "a length of 30 digits": head + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
        "a negative length": head + b"Content-Length: -1\r\n\r\n",
        "a length that is no number": head + b"Content-Length: many\r\n\r\n",
        "two lengths": head + b"Content-Length: 14\r\nContent-Length: 15\r\n\r\n" + body,
        "a length and chunks": head + b"Content-Length: 14\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "too short a length": head + b"Content-Length: 5\r\n\r\n" + body,
        "another coding": head + b"Transfer-Encoding: gzip\r\n\r\n" + body,
        "a header of 100 kB": head + b"X: " + b"y" * 100_000 + b"\r\nContent-Length: 14\r\n\r\n" + body,
        "5000 headers": head + b"".join(b"X%d: y\r\n" % i for i in range(5000)) + b"Content-Length: 14\r\n\r\n" + body,
        "a header without a colon": head + b"nonsense\r\nContent-Length: 14\r\n\r\n" + body,
        "a header with NUL": head + b"X: a\0b\r\nContent-Length: 14\r\n\r\n" + body,
        "a header that goes on": head + b" folded\r\n X: y\r\nContent-Length: 14\r\n\r\n" + body,
        "a line of 100 kB": b"POST /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: HOST\r\n\r\n",
        "another version": b"POST /v1/edit HTTP/9.9\r\nHost: HOST\r\n\r\n",
        "no host": b"POST /v1/edit HTTP/1.1\r\nKEY\r\nContent-Length: 14\r\n\r\n" + body,
        "two hosts": head + b"Host: evil.example\r\nContent-Length: 14\r\n\r\n" + body,
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "an unknown method": b"BREW /v1/edit HTTP/1.1\r\nHost: HOST\r\nKEY\r\nContent-Length: 0\r\n\r\n",
        "a method of other characters": b"P\xd6ST /v1/edit HTTP/1.1\r\nHost: HOST\r\n\r\n",
        "a path with NUL": b"GET /v1/jobs/%00 HTTP/1.1\r\nHost: HOST\r\nKEY\r\n\r\n",
        "a path upwards": b"GET /../../../etc/passwd HTTP/1.1\r\nHost: HOST\r\nKEY\r\n\r\n",
        "a path that is not UTF-8": b"GET /v1/jobs/%ff%fe HTTP/1.1\r\nHost: HOST\r\nKEY\r\n\r\n",
        "a file of the page upwards": b"GET /static/..%2f..%2fapp.py HTTP/1.1\r\nHost: HOST\r\nKEY\r\n\r\n",
        "a result upwards": b"GET /v1/results/..%2f..%2fsecret/1.png?expires=1&signature=0 HTTP/1.1\r\nHost: HOST\r\n\r\n",
        "a result of 5000 digits": b"GET /v1/results/a/1.png?signature=a&expires="
        + b"9" * 5000
        + b" HTTP/1.1\r\nHost: HOST\r\n\r\n",
        "a handle upwards": b"DELETE /v1/references/..%2f..%2fx HTTP/1.1\r\nHost: HOST\r\nKEY\r\n\r\n",
    }


def cases() -> Iterator[Case]:
    """The corpus. Pictures come in by both dialects."""
    for name, data in pictures().items():
        yield Case(name=f"picture: {name}", request={"json": {"prompt": "a", "input_image": text(data)}})
        files = [("image", ("a.png", data, "image/png")), ("prompt", (None, "a"))]
        yield Case(name=f"picture in a form: {name}", request={"path": _FORM, "files": files})
    for name, body in _json_cases().items():
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        yield Case(name=f"json: {name}", request={"path": "/v1/edit", "content": content, "headers": _JSON})
    for name, (kind, body) in _form_cases().items():
        headers = {"content-type": kind} if kind else {}
        yield Case(name=f"form: {name}", request={"path": _FORM, "content": body, "headers": headers})
    for name, raw in _raw_cases().items():
        yield Case(name=f"http: {name}", raw=raw)
    for name, value in (("empty", ""), ("long", "a" * 300), ("not ASCII", "\xe9")):
        headers = {"Idempotency-Key": value.encode("latin-1")}
        yield Case(name=f"idempotency key: {name}", request={"json": {"prompt": "a"}, "headers": headers})
