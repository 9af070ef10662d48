"""No body that a caller sends holds up the event loop, and with it all others."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from tests.support.jobs import POLICY, job
from tests.support.serving import ANNA, KEYS, Served, png, text
from tests.support.tiny import picture

from limner import Pipeline
from limner.images import PreparedReference, ReferenceReport, picture_of_mask, prepare_canvas
from limner.server.access.limits import LimitPolicy
from limner.server.jobs import records
from limner.server.jobs.records import JobPictures
from limner.server.jobs.store import JobStore


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = LimitPolicy(requests_per_minute=1e9, burst=10**6)
    folder = tmp_path_factory.mktemp("loop")
    with Served(Pipeline.from_pretrained(tiny_folder), folder / "data", keys=KEYS, limits=limits) as served:
        yield served


def longest_pause(served: Served, send: Callable[[], None]) -> float:
    """Return the longest time that the server's loop was held while `send` ran."""
    loop, longest, ended = served.service.runner._loop, 0.0, threading.Event()

    async def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not ended.is_set():
            await asyncio.sleep(0.002)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    ticking = asyncio.run_coroutine_threadsafe(tick(), loop)
    try:
        send()
    finally:
        ended.set()
        ticking.result(60)
    return longest


def names(number: int) -> bytes:
    return ("{" + ",".join(f'"k{i}":0' for i in [*range(number), number - 1]) + "}").encode()


def pictures(size: int, *, number: int = 8) -> bytes:
    """Base64 of `size` bytes in each picture, which are no pictures but have to be decoded to see that."""
    fields = ("input_image", *(f"input_image_{i}" for i in range(2, number + 1)))
    return json.dumps({"prompt": "a", **dict.fromkeys(fields, text(bytes(size)))}).encode()


def test_the_first_request_builds_nothing(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI makes its routes at the first request, which held the loop for a quarter of a second."""
    served = Served(Pipeline.from_pretrained(tiny_folder), tmp_path / "data")

    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("built in the event loop")

    monkeypatch.setattr("fastapi.dependencies.utils.analyze_param", built)
    with served:
        assert served.draw()["status"] == "Ready"
        assert served.http.get("/v1/models").status_code == 200
        assert served.http.get("/").status_code == 200
        document = served.http.get("/openapi.json")
        monkeypatch.setattr("fastapi.openapi.utils.get_openapi", built)
        monkeypatch.setattr(served.app, "openapi", built)
        assert served.http.get("/openapi.json").content == document.content  # made once


def test_many_who_ask_for_the_document_at_once_have_it_made_once(tiny_folder: Path, tmp_path: Path) -> None:
    served = Served(Pipeline.from_pretrained(tiny_folder), tmp_path / "data")
    make, made = served.app.openapi, []
    served.app.openapi = lambda: made.append(time.sleep(0.05)) or make()  # type: ignore[method-assign,func-returns-value]
    with served:
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: served.http.get("/openapi.json").content, range(8)))
        assert len(set(answers)) == 1
        assert len(made) == 1


BODIES: dict[str, tuple[Callable[[], bytes], int]] = {
    "40,000 names, one twice": (lambda: names(40_000), 400),
    "1,000,000 unknown fields": (lambda: names(1_000_000), 400),
    "900 unknown fields": (lambda: json.dumps({f"k{i}": 0 for i in range(900)}).encode(), 422),
    "long unknown fields": (lambda: json.dumps({f"{i:0900}": "a" * 1000 for i in range(900)}).encode(), 422),
    "100 MB of pictures": (lambda: pictures(10_000_000), 422),
    "pictures with escapes": (lambda: pictures(1_000_000).replace(b"A", b"\\u0041"), 422),
    "one text of 100 MB": (lambda: json.dumps({"prompt": "a" * 100_000_000}).encode(), 400),
    "a prompt of 30 MB": (lambda: json.dumps({"prompt": "a" * 30_000_000}).encode(), 422),
    "100 MB of spaces": (lambda: b'{"prompt": "a"' + b" " * 100_000_000 + b"}", 400),
    "100 MB of digits": (lambda: b'{"seed": ' + b"1" * 100_000_000 + b"}", 400),
    "100 MB of quotes": (lambda: b'"' * 100_000_000, 400),
    "100 MB of escapes": (lambda: b'{"prompt": "' + b"\\n" * 50_000_000 + b'"}', 400),
}


@pytest.mark.parametrize("name", BODIES)
def test_no_json_holds_the_loop(served: Served, name: str) -> None:
    make, status = BODIES[name]
    body, answers = make(), []
    url, headers = f"{served.url}/v1/edit", {"content-type": "application/json", "x-key": ANNA}
    pause = longest_pause(served, lambda: answers.append(httpx.post(url, content=body, headers=headers, timeout=60)))
    assert answers[0].status_code == status, answers[0].text[:300]
    assert pause < 1.0  # under 0.1 where nothing else runs


@pytest.mark.parametrize("inside", [b"a", b"\r\n", b"\r\n--", b"--B"], ids=["plain", "lines", "near", "boundary"])
@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/references"])
def test_no_form_holds_the_loop(served: Served, path: str, inside: bytes) -> None:
    head = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    body = head + inside * (15_000_000 // len(inside)) + b"\r\n"
    body, answers = body * 5 + b"--B--\r\n", []
    headers = {"content-type": "multipart/form-data; boundary=B", "x-key": ANNA}
    url = f"{served.url}{path}"
    pause = longest_pause(served, lambda: answers.append(httpx.post(url, content=body, headers=headers, timeout=60)))
    assert answers[0].status_code in (400, 422), answers[0].text[:300]
    assert pause < 1.0


def test_a_mask_is_converted_beside_the_loop_and_read_back_only_after_a_restart(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 16 million pixels takes a while each time."""
    threads: list[str] = []
    convert = records.mask_of_picture

    def noted(mask: PreparedReference) -> np.ndarray:
        threads.append(threading.current_thread().name)
        return convert(mask)

    monkeypatch.setattr(records, "mask_of_picture", noted)
    values = np.zeros((64, 64), np.uint8)
    values[:, :32] = 255
    mask, canvas = picture_of_mask(values), prepare_canvas(picture(64, 64), policy=POLICY)
    jobs, control = JobStore(tmp_path / "data"), {"mask_blur": 4}
    left, _ = jobs.add(
        job(canvas=canvas.report, mask=mask.report, control=control, num_inference_steps=1),
        JobPictures(references=(), canvas=canvas, mask=mask).all,
    )
    jobs.close()
    with Served(pipe, tmp_path / "data") as served:
        end = time.monotonic() + 60
        while (found := served.service.jobs.get(left.id)).status == "pending":
            assert time.monotonic() < end
            time.sleep(0.01)
        assert found.status == "ready", found.result
        assert len(threads) == 1
        read: list[str] = []
        original = JobStore.picture

        def kept(store: JobStore, report: ReferenceReport) -> PreparedReference:
            read.append(report.digest)
            return original(store, report)

        monkeypatch.setattr(JobStore, "picture", kept)
        body = {"prompt": "a", "num_inference_steps": 1, "canvas": text(png()), "mask": text(png_of(values))}
        answer = served.http.post("/v1/edit", json=body)
        assert answer.status_code == 200, answer.text
        assert served.poll(answer.json()["id"])["status"] == "Ready"
    assert len(threads) == 2
    assert all(name.startswith("limner-files") for name in threads)
    assert mask.report.digest not in read
    assert len(read) == 1  # the canvas, for the checks


def png_of(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()
