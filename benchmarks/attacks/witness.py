"""Who looks whether others wait: a bystander who edits once a second, and the pulse of the event loop.

As a program it does both for a time, and prints what it saw as JSON.

    python -m attacks.witness URL KEY SECONDS PORT FOR WEBHOOKS
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from attacks.target import UNVERIFIED, text

_PICTURE = Path(__file__).parents[2] / "src" / "limner" / "assets" / "samples" / "cat.png"
_PATIENCE = 120.0
"""Seconds after which a job of the bystander counts as lost."""


@dataclass(kw_only=True)
class Seen:
    """What a bystander saw: seconds from sending a job until its picture is read, and until its webhook came."""

    seconds: list[float] = field(default_factory=list)
    webhook_seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    pings: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Medians and worst values. `pause` is the longest ping over the median one."""
        return {
            "jobs": len(self.seconds),
            "p50": round(statistics.median(self.seconds), 3) if self.seconds else None,
            "worst": round(max(self.seconds), 3) if self.seconds else None,
            "webhook_worst": round(max(self.webhook_seconds), 3) if self.webhook_seconds else None,
            "pings": len(self.pings),
            "ping_p50": round(statistics.median(self.pings), 4) if self.pings else None,
            "ping_worst": round(max(self.pings), 4) if self.pings else None,
            "problems": self.problems,
        }


class Bystander:
    """Another owner, who sends a job every `every` seconds, however long the ones before take."""

    def __init__(self, url: str, key: str, *, size: int | None = None, webhooks: int | None = None) -> None:
        self._client = httpx.Client(base_url=url, headers={"x-key": key}, timeout=60, verify=UNVERIFIED)
        self._size, self._webhooks = size, webhooks
        self.seen = Seen()
        self._came: dict[str, float] = {}

    def run(self, seconds: float, *, every: float = 1.0, least: int = 1) -> None:
        """Send jobs for a time, and no fewer than `least`; wait for the last one."""
        with self._receiver():
            end, threads, number = time.monotonic() + seconds, [], 0
            while number < least or time.monotonic() < end:
                threads.append(threading.Thread(target=self._edit, args=(number,)))
                threads[-1].start()
                number += 1
                time.sleep(max(0.0, min(end, end - seconds + number * every) - time.monotonic()))
            for thread in threads:
                thread.join()
        self._client.close()

    def _edit(self, number: int) -> None:
        try:
            self._draw(number)
        except Exception as error:
            self.seen.problems.append(f"{number}: {error!r}")

    def _draw(self, number: int) -> None:
        body: dict[str, Any] = {
            "prompt": "make the sticker bigger",
            "seed": number,
            "input_image": text(_PICTURE.read_bytes()),
        }
        if self._size is not None:
            body |= {"width": self._size, "height": self._size}
        if self._webhooks is not None:
            body["webhook_url"] = f"http://127.0.0.1:{self._webhooks}/{number}"
        start = time.monotonic()
        answer = self._client.post("/v1/edit", json=body)
        if answer.status_code != 200:
            self.seen.problems.append(f"{number}: {answer.status_code} {answer.text[:200]}")
            return
        found = self._wait(answer.json()["id"], start)
        if found["status"] != "Ready":
            self.seen.problems.append(f"{number}: {found['status']} {found['details']}")
            return
        picture = self._client.get(found["result"]["sample"])
        took = time.monotonic() - start
        if picture.status_code != 200:
            self.seen.problems.append(f"{number}: its picture is not there, {picture.status_code}")
            return
        self.seen.seconds.append(took)
        if self._webhooks is not None:
            while str(number) not in self._came:
                if time.monotonic() - start > _PATIENCE:
                    self.seen.problems.append(f"{number}: its webhook did not come")
                    return
                time.sleep(0.05)
            self.seen.webhook_seconds.append(self._came[str(number)] - start)

    def _wait(self, id_: str, start: float) -> Any:
        """Ask often until the job has ended; it is lost if that takes too long."""
        while True:
            answer = self._client.get("/v1/get_result", params={"id": id_})
            found = answer.json()
            if answer.status_code != 200 or found["status"] != "Pending":
                return found
            if time.monotonic() - start > _PATIENCE:
                return {"status": f"pending after {_PATIENCE:g} s", "details": None}
            time.sleep(0.05)

    @contextlib.contextmanager
    def _receiver(self) -> Any:
        if self._webhooks is None:
            yield
            return
        came = self._came

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                came.setdefault(self.path[1:], time.monotonic())
                self.rfile.read(int(self.headers.get("content-length", "0")))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", self._webhooks), Handler) as server:
            serving = threading.Thread(target=server.serve_forever)
            serving.start()
            try:
                yield
            finally:
                server.shutdown()
                serving.join()


def pulse(url: str, seconds: float, seen: Seen, *, every: float = 0.01) -> None:
    """Ask for /healthz again and again; its handler does nothing, so a late answer shows an event loop that was held."""
    parts = httpx.URL(url)
    if parts.scheme != "http":
        return  # a handshake or a cipher would be measured
    address = (parts.host, parts.port or 80)
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    end, connection = time.monotonic() + seconds, None
    while time.monotonic() < end:
        start = time.monotonic()
        try:
            if connection is None:
                connection = socket.create_connection(address, timeout=60)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(request)
            answer = b""
            while b'"status":"ok"' not in answer:
                more = connection.recv(65536)
                if not more:
                    raise ConnectionResetError
                answer += more
            seen.pings.append(time.monotonic() - start)
        except OSError as error:
            if connection is not None:
                connection.close()
                connection = None
            if not isinstance(error, ConnectionResetError):
                seen.problems.append(f"ping: {error!r}")
        time.sleep(every)
    if connection is not None:
        connection.close()


def main() -> None:
    url, key, seconds, port = sys.argv[1:]
    with contextlib.suppress(OSError):  # what it measures is not to be its own waiting for a processor
        os.nice(-5)
    child = os.fork() if url.startswith("http://") else None
    if child == 0:  # the pulse has a process of its own, so that no picture holds it
        seen = Seen()
        pulse(url, float(seconds), seen)
        print(json.dumps({"pulse": asdict(seen)}), flush=True)
        os._exit(0)
    bystander = Bystander(url, key, webhooks=int(port) or None)
    bystander.run(float(seconds))
    if child is not None:
        os.waitpid(child, 0)
    print(json.dumps({"bystander": asdict(bystander.seen)}), flush=True)


if __name__ == "__main__":
    main()
