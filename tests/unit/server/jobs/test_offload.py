"""Work away from the event loop, repeated while the storage does not answer."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from limner.errors import OutputError
from limner.server.jobs import offload as module
from limner.server.jobs.offload import Offload, pauses
from limner.server.jobs.storage import StorageUnavailable


def test_pauses_double_up_to_the_longest() -> None:
    assert list(itertools.islice(pauses(), 9)) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_calls_run_in_threads_of_their_kind() -> None:
    async def run() -> tuple[str, str]:
        offload = Offload()
        try:
            names = [await call(threading.current_thread) for call in (offload.run, offload.store)]
        finally:
            offload.close()
        return names[0].name, names[1].name

    files, store = asyncio.run(run())
    assert files.startswith("limner-files")
    assert store.startswith("limner-jobs")


def test_only_a_storage_that_may_be_back_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.001)
    errors: list[Exception] = [StorageUnavailable("away"), StorageUnavailable("away")]

    def work() -> str:
        if errors:
            raise errors.pop()
        return "done"

    async def run() -> str:
        offload = Offload()
        try:
            return await offload.with_retry(work)
        finally:
            offload.close()

    assert asyncio.run(run()) == "done"
    errors.append(OutputError("full"))
    with pytest.raises(OutputError, match="full"):
        asyncio.run(run())
