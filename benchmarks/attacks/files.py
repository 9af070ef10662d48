"""Pictures that are much work to decode: some are refused, some are within every limit.

Their jobs have no time to be drawn, since decoding is meant here, and not the device.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image

from attacks import corpus
from attacks.target import Target, text


@functools.cache
def noise(side: int, *, kind: str = "PNG", seed: int = 0, **options: Any) -> bytes:
    """A file of random pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


def _post(target: Target, *files: bytes, threads: int = 4) -> None:
    target.post("/v1/edit", *(target.body(input_image=text(data), timeout=0.001) for data in files), threads=threads)


def scans(target: Target, *, side: int = 8000) -> None:
    """Progressive JPEG files of 64 megapixels and 310 scans."""
    _post(target, corpus.many_scans(300, side=side))


def scans_in_limits(target: Target, *, side: int = 8000) -> None:
    """Progressive JPEG files of 64 megapixels with as many scans as are allowed."""
    _post(target, corpus.many_scans(90, side=side))


def bombs(target: Target) -> None:
    """PNG, JPEG and WebP files whose structure or metadata blow up."""
    files = {**corpus.structures(), **corpus.pictures()}
    _post(target, *(data for name, data in files.items() if len(data) < 15 << 20 and "scans" not in name))


def large_pictures(target: Target, *, side: int = 8000) -> None:
    """Plain JPEG and PNG files of 64 megapixels."""
    image = Image.new("RGB", (side, side), "red")
    files = []
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        files.append(buffer.getvalue())
    _post(target, *files)


def hostile_requests(target: Target) -> None:
    """All requests of the corpus, one after another."""
    while not target.stop.is_set():
        for case in corpus.cases():
            if target.stop.is_set():
                return
            if "that does not come" in case.name or "that stops" in case.name or "without end" in case.name:
                continue  # 30 seconds each; see slow_bodies
            status = case.send(target.url, key=target.key)
            target.count(status)
            if not 400 <= status < 500:
                target.count(f"{case.name}: {status}")
