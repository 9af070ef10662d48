"""Where attacks go to, and how they send: threads that repeat something until they are stopped."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

JSON = {"content-type": "application/json"}
UNVERIFIED = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For servers whose certificate was made for this; made once, since that takes longer than most requests."""
UNVERIFIED.check_hostname, UNVERIFIED.verify_mode = False, ssl.CERT_NONE
_PAUSE = 0.02
"""Seconds after an answer: one caller is meant, not a machine that does nothing else."""


@dataclass(kw_only=True)
class Target:
    """A server, the attacker's key, and what it answered. `hang` is an origin of this machine that answers nothing."""

    url: str
    key: str
    stop: threading.Event
    hang: str | None = None
    size: int = 128
    """Width and height that the model draws fast."""
    statuses: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        parts = httpx.URL(self.url)
        self.address = (parts.host, parts.port or 443)
        self._lock = threading.Lock()

    def count(self, what: object) -> None:
        with self._lock:
            self.statuses[str(what)] += 1

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"x-key": self.key}, timeout=60, verify=UNVERIFIED)

    def head(self, path: str, *lines: str, method: str = "POST") -> bytes:
        """The head of a request as it goes over the wire, without its empty line."""
        return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", f"X-Key: {self.key}", *lines, ""]).encode()

    def connect(self, *, receive: int | None = None) -> socket.socket:
        """A connection; `receive` is how many bytes it buffers."""
        made = socket.socket()
        made.settimeout(10)
        if receive is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        made.connect(self.address)
        return made

    def body(self, **more: Any) -> bytes:
        return json.dumps({"prompt": "a", "width": self.size, "height": self.size, **more}).encode()

    def submit(self, client: httpx.Client, **more: Any) -> str | None:
        """A job; its id where it was accepted."""
        answer = client.post("/v1/edit", content=self.body(**more), headers=JSON)
        self.count(answer.status_code)
        return str(answer.json()["id"]) if answer.status_code == 200 else None

    def repeat(self, send: Callable[[httpx.Client], object], *, threads: int = 2, pause: float = _PAUSE) -> None:
        """Do something in each of several threads again and again until the attack is stopped."""

        def work() -> None:
            with self.client() as client:
                while not self.stop.is_set():
                    try:
                        send(client)
                    except (httpx.HTTPError, OSError) as error:
                        self.count(type(error).__name__)
                    self.stop.wait(pause)

        started = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()

    def post(self, path: str, *bodies: bytes, threads: int = 2, kind: str = "application/json") -> None:
        """Post some bodies in turn, again and again."""
        turns = iter(_cycle(bodies))
        lock = threading.Lock()

        def send(client: httpx.Client) -> None:
            with lock:
                body = next(turns)
            self.count(client.post(path, content=body, headers={"content-type": kind}).status_code)

        self.repeat(send, threads=threads)

    def hold(self, number: int, make: Callable[[], socket.socket], *, again: float = 0.5) -> None:
        """Keep so many connections open; those that were closed are made again."""
        held: list[socket.socket] = []
        with contextlib.ExitStack() as opened:
            opened.callback(lambda: [one.close() for one in held])
            while not self.stop.is_set():
                held = [one for one in held if not _is_closed(one)]
                while len(held) < number and not self.stop.is_set():
                    try:
                        held.append(make())
                        held[-1].setblocking(False)  # with a time limit Python waits for what may be there
                        self.count("connections")
                    except OSError as error:
                        self.count(type(error).__name__)
                        break
                self.stop.wait(again)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _cycle(bodies: tuple[bytes, ...]) -> Iterator[bytes]:
    while True:
        yield from bodies


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection. What came is left."""
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        connection.close()
        return True
