"""A filesystem that fails, the passing of time, and places that machines share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tests.support.faulty import FaultyFileSystem

from limner.store import bucket, disk_tier, guard, remote_tier, writes


@pytest.fixture
def problem() -> Iterator[dict[str, Callable[[], None]]]:
    FaultyFileSystem.problem, FaultyFileSystem.calls = {}, []
    yield FaultyFileSystem.problem
    FaultyFileSystem.problem = {}


@pytest.fixture
def hang() -> Iterator[Callable[[], None]]:
    over = threading.Event()
    yield lambda: (over.wait(60), None)[1]
    over.set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time go by for the pauses of the tier, and for what was seen there."""
    real, ahead = time.monotonic, [0.0]

    class Clock:
        def monotonic(self) -> float:
            return real() + ahead[0]

        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

    for module in (bucket, disk_tier, guard, remote_tier, writes):
        monkeypatch.setattr(module, "time", Clock())

    def go(seconds: float) -> None:
        ahead[0] += seconds

    return go


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/bucket/prefix"
    else:
        yield "memory://bucket/prefix"
        fs = fsspec.filesystem("memory")
        if fs.exists("/bucket"):
            fs.rm("/bucket", recursive=True)
