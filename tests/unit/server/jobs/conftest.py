"""Stores of jobs, in a folder and in PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.jobs import Clock
from tests.support.postgres import PROGRAMS, WHY

from limner.server.jobs.store import JobStore


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["folder", pytest.param("postgresql", marks=pytest.mark.skipif(not PROGRAMS, reason=WHY))])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where jobs may be kept."""
    return str(tmp_path / "data") if request.param == "folder" else request.getfixturevalue("server").url()


@pytest.fixture
def store(data: str, clock: Clock) -> Iterator[JobStore]:
    store = JobStore(data, clock=clock)
    yield store
    store.close()


@pytest.fixture
def on_disk(tmp_path: Path, clock: Clock) -> Iterator[JobStore]:
    store = JobStore(tmp_path / "data", clock=clock)
    yield store
    store.close()
