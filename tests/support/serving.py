"""The service over the tiny pipeline, on a loopback port in a thread of this process, and what tests send to it."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx
from PIL import Image

from limner import Pipeline
from limner.engine import Engine
from limner.outbound.client import OutboundClient
from limner.outbound.policy import OutboundPolicy
from limner.server.access.keys import KeyRing
from limner.server.access.limits import LimitPolicy
from limner.server.app import create_app
from limner.server.http.settings import ServeSettings
from limner.server.jobs.settings import RunnerSettings
from limner.server.run import make_server
from limner.trust.provenance import Signer
from limner.trust.safety import Checks, Finding
from tests.support.tiny import picture

ANNA, BOB = "anna-key-0123456789", "bob-key-0123456789a"
KEYS = KeyRing.from_environment(f"anna:{ANNA},bob:{BOB}")
SIZE = {"width": 64, "height": 64}


class Words:
    """A check that refuses prompts with "forbidden", and pictures, where it is told to."""

    name = "words"

    def __init__(self) -> None:
        self.refuse: set[str] = set()
        self.looked = 0
        """How many references were looked at."""

    def check_prompt(self, prompt: str, *, tolerance: int) -> Finding | None:
        return self._finding("prompt") if "forbidden" in prompt else None

    def check_image(self, image: Image.Image, *, role: str, tolerance: int) -> Finding | None:
        self.looked += role == "input"
        return self._finding(role) if role in self.refuse else None

    def _finding(self, category: str) -> Finding:
        return Finding(check=self.name, category=category, reason=f"The {category} is refused.")


class Served:
    """The application under uvicorn, as `limner serve` runs it. `http` sends Anna's key where there are keys."""

    def __init__(
        self,
        pipe: Pipeline,
        data: Path | str,
        *,
        keys: KeyRing | None = None,
        checks: Checks | None = None,
        max_waiting: int = 256,
        max_batch: int = 10,
        drain: float = 30.0,
        signer: Signer | None = None,
        webhook_client: OutboundClient | None = None,
        outbound: OutboundClient | None = None,
        outbound_policy: OutboundPolicy | None = None,
        certificate: Path | None = None,
        **settings: Any,
    ) -> None:
        if outbound_policy is not None:
            settings["outbound"] = outbound_policy
        limits = LimitPolicy(requests_per_minute=1e6, burst=10**6)  # tests send faster than callers may
        settings = {"limits": limits, "runner": RunnerSettings(drain=drain), **settings}
        keyring = keys or KeyRing.open()
        self.engine = Engine(pipe, max_waiting=max_waiting, max_batch=max_batch, memory_bytes=1 << 30)
        self.app = create_app(
            engine=self.engine,
            keyring=keyring,
            checks=checks or Checks(),
            settings=ServeSettings(data=data, **settings),
            signer=signer,
            outbound=outbound,
            webhook_client=webhook_client,
        )
        self.data = data
        self.service = self.app.state.service
        self._headers = {} if keyring.is_open else {"x-key": ANNA}
        self._drain = drain
        self._certificate = None if certificate is None else str(certificate)

    def __enter__(self) -> Self:
        """Serve. `certificate` is a file with chain and key, whose name is localhost."""
        pem = self._certificate
        self.server = make_server(self.app, host="127.0.0.1", port=0, drain=self._drain, certificate=pem, key=pem)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}" if pem is None else f"https://localhost:{self.port}"
        self.http = httpx.Client(base_url=self.url, headers=self._headers, timeout=60, verify=pem is None)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.stop()

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    # what most tests do

    def submit(self, path: str = "/v1/edit", *, headers: Any = None, **body: Any) -> dict[str, Any]:
        """A job of the hosted dialect; gives the answer, which has to be 200."""
        answer = self.http.post(path, json={"prompt": "a red ball", **SIZE, **body}, headers=headers)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def poll(self, id: str, **options: Any) -> dict[str, Any]:
        """The result of a job when it is no longer pending."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            found = self.http.get("/v1/get_result", params={"id": id}, **options).json()
            if found["status"] != "Pending":
                return dict(found)
            time.sleep(0.01)
        raise AssertionError(f"{id} did not end")

    def draw(self, **body: Any) -> dict[str, Any]:
        return self.poll(self.submit(**body)["id"])

    def files(self, folder: str) -> list[str]:
        """Names in a folder of the data: inputs or results."""
        return sorted(file.name for file in (Path(self.data) / folder).glob("*"))


def png(width: int = 64, height: int = 64, *, seed: int = 0, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(width, height, seed=seed).save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def types(answer: httpx.Response) -> Sequence[Any]:
    """Where the errors of a hosted answer are; checks their shape."""
    detail = answer.json()["detail"]
    assert detail
    for problem in detail:
        assert set(problem) == {"loc", "msg", "type"}
    return [tuple(problem["loc"]) for problem in detail]
