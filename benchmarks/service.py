"""A `limner serve` process for benchmarks: start, wait until it is ready, read its metrics, stop or kill it."""

from __future__ import annotations

import base64
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families

from limner import bench

SAMPLES = Path(__file__).parents[1] / "src" / "limner" / "assets" / "samples"
NAMES = ("cat", "beach", "dog", "meadow", "duck")
MANY = ("--requests-per-minute", "1e9", "--concurrent", "100000", "--max-waiting", "100000")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def picture(name: str) -> bytes:
    return (SAMPLES / f"{name}.png").read_bytes()


def reference_sets(num: int) -> list[tuple[bytes, ...]]:
    """Different ordered lists of one to three sample pictures."""
    sets: list[tuple[str, ...]] = [(a,) for a in NAMES]
    sets += [(a, b) for a in NAMES for b in NAMES if a != b]
    sets += [(a, b, c) for a in NAMES for b in NAMES for c in NAMES if len({a, b, c}) == 3]
    step = len(sets) // num
    return [tuple(picture(name) for name in sets[i * step]) for i in range(num)]


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Server:
    """One server process over a data folder."""

    def __init__(
        self, data: str | Path, *options: str, port: int | None = None, log: Path | None = None, key: str | None = None
    ) -> None:
        """Start it. `key` is for reading metrics, where the server has keys."""
        self.port = port or free_port()
        self.url = f"{'https' if '--tls-key' in options else 'http'}://127.0.0.1:{self.port}"
        self._key = {"x-key": key} if key else {}
        words = [sys.executable, "-m", "limner", "serve", "--port", str(self.port), "--data", str(data), *options]
        self._log = (log or Path(f"{data}.log")).open("ab")
        self.process = subprocess.Popen(words, stderr=self._log, stdout=self._log)

    def wait(self, seconds: float = 120) -> float:
        """Seconds until it was ready."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}; see {self._log.name}")
            try:
                if httpx.get(f"{self.url}/readyz", timeout=2, verify=False).status_code == 200:
                    return time.monotonic() - start
            except httpx.TransportError:
                time.sleep(0.1)
        raise SystemExit(f"the server was not ready within {seconds} s; see {self._log.name}")

    def metrics(self) -> dict[str, float]:
        """Values of all metrics without labels; of those with labels, their sum."""
        found: dict[str, float] = {}
        answer = httpx.get(f"{self.url}/metrics", timeout=60, headers=self._key, verify=False)
        answer.raise_for_status()
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(120)
        self._log.close()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


def machine() -> dict[str, Any]:
    return bench.machine(torch.device("cpu"))
