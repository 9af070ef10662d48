"""Writes in the background: bounded queues, and the end of the process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.faulty import FaultyFileSystem, faulty
from tests.support.references import KEY, ONE, file_of, never, references

from limner import ReferenceStore
from limner.store import store as store_module


def test_pins_hold_for_what_is_yet_to_be_written(tmp_path: Path) -> None:
    store = ReferenceStore(disk_path=tmp_path)
    busy = threading.Event()
    store._backing[0]._thread.submit(busy.wait, 10)
    store.get(references().key, references)
    store.pin(references().key)
    busy.set()
    store.flush()
    other = ReferenceStore(disk_path=tmp_path, disk_bytes=2 * ONE)
    other.get(references(1).key, lambda: references(1))
    other.flush()
    assert file_of(tmp_path, references()).exists()
    assert other.stats().evictions["disk"] == 0


def test_what_waits_to_be_written_is_bounded(tmp_path: Path) -> None:
    store = ReferenceStore(disk_path=tmp_path, memory_bytes=2 * ONE)
    busy = threading.Event()
    store._backing[0]._thread.submit(busy.wait, 10)
    for number in range(4):
        store.get(references(number).key, lambda number=number: references(number))
    assert store.stats().pending_bytes == 2 * ONE
    assert store.stats().refused >= 2
    busy.set()
    store.put(references(4))  # asked for: waits
    store.flush()
    assert store.stats().pending_bytes == 0
    assert file_of(tmp_path, references(4)).exists()


def test_what_waits_is_not_queued_again(tmp_path: Path, problem: dict[str, Any]) -> None:
    go = threading.Event()
    problem["put"] = lambda: (go.wait(30), None)[1]
    store = ReferenceStore(remote=faulty(tmp_path))
    store.get(KEY, references)
    for _ in range(3):
        assert store.get(KEY, never)[1] == "memory"
    assert store.stats().pending_bytes == ONE
    store.check_integrity()
    go.set()
    store.flush()
    assert FaultyFileSystem.calls.count("put") == 1
    store.check_integrity()


def test_uploads_that_are_slower_than_prefills_wait_where_nothing_is_kept_in_memory(
    tmp_path: Path, problem: dict[str, Any]
) -> None:
    go = threading.Event()
    problem["put"] = lambda: (go.wait(30), None)[1]
    store = ReferenceStore(remote=faulty(tmp_path), memory_bytes=0)
    for number in range(6):
        store.get(references(number).key, lambda number=number: references(number))
    go.set()
    store.flush()
    assert (store.stats().refused, len(store.keys())) == (0, 6)


def test_that_too_much_waits_to_be_uploaded_is_told_once(
    tmp_path: Path, problem: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "_UPLOAD_BYTES", 2 * references().nbytes)
    store = ReferenceStore(remote=faulty(tmp_path), memory_bytes=0)
    with caplog.at_level(logging.WARNING, logger="limner"):
        for turn in (1, 2):
            go = threading.Event()
            problem["put"] = lambda go=go: (go.wait(30), None)[1]
            for number in range(5):
                store.get(references(10 * turn + number).key, lambda n=10 * turn + number: references(n))
            assert (store.stats().refused, store.stats().pending_bytes) == (3 * turn, 2 * references().nbytes)
            go.set()
            store.flush()
            assert len(caplog.records) == turn
            assert "wait for the remote tier" in caplog.text
    assert len(store.keys()) == 4


def test_removed_everywhere_also_what_waits_to_be_uploaded(tmp_path: Path, problem: dict[str, Any]) -> None:
    go = threading.Event()
    problem["put"] = lambda: (go.wait(30), None)[1]
    store = ReferenceStore(remote=faulty(tmp_path), disk_path=tmp_path / "near")
    for number in range(2):  # the first is being uploaded, the second waits
        store.get(references(number).key, lambda number=number: references(number))
    while "put" not in FaultyFileSystem.calls:
        time.sleep(0.001)
    assert store.stats().pending_bytes >= 2 * references().nbytes
    assert store.remove(references(1).key)
    threading.Timer(0.2, go.set).start()
    assert store.remove(KEY)  # waits for it
    store.flush()
    assert [list((tmp_path / name).iterdir()) for name in ("near", "far")] == [[], []]
    assert store.stats().pending_bytes == 0


_ENDS_AT_ONCE = """
from pathlib import Path
from limner import ReferenceStore
from tests.support.references import references
store = ReferenceStore(disk_path={near!r}, remote={far!r})
for number in range(3):
    store.get(references(number).key, lambda: references(number))
"""


def test_what_waits_is_written_when_the_process_ends(tmp_path: Path) -> None:
    program = _ENDS_AT_ONCE.format(near=str(tmp_path / "near"), far=f"file://{tmp_path}/far")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("near", "far"):
        assert {file.stem for file in (tmp_path / name).iterdir()} == {references(n).key for n in range(3)}


_NEEDS_NAMES = """
import asyncio, sys, time
import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from limner import ReferenceStore
from tests.support.references import references

class Net(AsyncFileSystem):
    "Local files, before which a name is looked up, as for each connection."
    protocol, cachable, local = "net", False, LocalFileSystem()
    @classmethod
    def _strip_protocol(cls, path):
        return str(path).replace("net://", "")
    async def _look_up(self):
        await asyncio.get_running_loop().getaddrinfo("localhost", 80)
    async def _info(self, path, **kwargs):
        await self._look_up()
        return self.local.info(path)
    async def _get_file(self, far, near, **kwargs):
        await self._look_up()
        self.local.get_file(far, near)
    async def _put_file(self, near, far, **kwargs):
        await asyncio.sleep(0.2)
        await self._look_up()
        self.local.put_file(near, far)
    def makedirs(self, path, exist_ok=False):
        self.local.makedirs(path, exist_ok=exist_ok)
    def mv(self, old, new):
        self.local.mv(old, new)

fsspec.register_implementation("net", Net, clobber=True)
store = ReferenceStore(remote="net://{far}")
for number in range(3):
    store.get(references(number).key, lambda: references(number))
"""


def test_a_filesystem_that_needs_executors_takes_what_waits_when_the_process_ends(tmp_path: Path) -> None:
    """asyncio looks up names on one, and Python ends those before anything else."""
    program = _NEEDS_NAMES.replace("{far}", str(tmp_path / "far"))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {file.stem for file in (tmp_path / "far").iterdir()} == {references(n).key for n in range(3)}


def _fork(far: str) -> None:
    store = ReferenceStore(remote=f"faulty://{far}")
    busy = threading.Event()
    FaultyFileSystem.problem["put"] = lambda: (busy.wait(60), None)[1]
    store.get(KEY, references)
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join(20)
    ended = child.exitcode == 0
    child.kill()
    os._exit(0 if ended else 1)


def test_a_process_that_was_forked_does_not_wait_for_uploads_of_its_parent(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_fork, args=(str(tmp_path / "far"),))
    process.start()
    process.join(120)
    assert process.exitcode == 0
