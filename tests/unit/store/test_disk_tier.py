"""The folder of packs: budget, pins, damage, several processes."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.references import (
    DAMAGES,
    LONG_AGO,
    ONE,
    TOKENS,
    damage_empty,
    damage_flip,
    file_of,
    fill_folder,
    never,
    references,
    same,
)

from limner import InvalidRequest, OutputError, References, ReferenceStore


def test_disk_outlives_the_process(tmp_path: Path) -> None:
    first = ReferenceStore(disk_path=tmp_path / "store")
    first.get(references().key, references)
    first.flush()
    second = ReferenceStore(disk_path=tmp_path / "store")
    found, source = second.get(references().key, never)
    assert source == "disk"
    assert same(found, references())
    assert second.get(references().key, never)[1] == "memory"
    stats = second.stats()
    assert (stats.hits["disk"], stats.hits["memory"], stats.misses) == (1, 1, 0)
    assert stats.num_entries == {"device": 0, "memory": 1, "disk": 1}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damaged_files_are_dropped_and_made_again(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ReferenceStore(disk_path=tmp_path)
    store.get(references().key, references)
    store.flush()
    damage(tmp_path / f"{references().key}.safetensors")
    assert store.verify()[references().key] is not None
    fresh = ReferenceStore(disk_path=tmp_path)
    with caplog.at_level(logging.WARNING, logger="limner"):
        found, source = fresh.get(references().key, references)
    assert source == "miss"
    assert same(found, references())
    assert "dropped" in caplog.text
    assert fresh.stats().dropped_files == 1
    fresh.flush()
    assert fresh.verify() == {references().key: None}  # written again


def test_disk_budget_and_pins(tmp_path: Path) -> None:
    some = [references(i) for i in range(4)]
    store = ReferenceStore(disk_path=tmp_path, memory_bytes=0)
    for i, one in enumerate(some[:2]):
        store.get(one.key, lambda one=one: one)
        store.flush()
        os.utime(tmp_path / f"{one.key}.safetensors", (i, i))
    store.pin(some[0].key)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) // 2
    small = ReferenceStore(disk_path=tmp_path, disk_bytes=2 * size + 100, memory_bytes=0)
    small.get(some[2].key, lambda: some[2])
    small.flush()
    assert [one.key in small for one in some] == [True, False, True, False]
    assert small.stats().evictions["disk"] == 1
    assert {entry.key: entry.pinned for entry in small.entries()} == {some[0].key: True, some[2].key: False}


def test_eviction_while_in_use(tmp_path: Path) -> None:
    store = ReferenceStore(disk_path=tmp_path, memory_bytes=ONE)
    store.get(references().key, references)
    store.flush()
    fresh = ReferenceStore(disk_path=tmp_path, memory_bytes=ONE)
    kept, source = fresh.get(references().key, never)
    assert source == "disk"
    (tmp_path / f"{kept.key}.safetensors").unlink()
    fresh.get(references(1).key, lambda: references(1))
    assert same(kept, references())


def test_what_is_dear_to_read_is_not_fill_folder(tmp_path: Path) -> None:
    store = ReferenceStore(disk_path=tmp_path)
    cheap = references(seconds=1e-9)
    store.get(cheap.key, lambda: cheap)
    store.flush()
    assert list(tmp_path.glob("*.safetensors")) == []
    assert store.stats().refused == 1
    other = references(1, seconds=1e-9)
    store.get(other.key, lambda: other)  # by now the rate is known: not even written
    assert store.stats().refused == 2
    assert list(tmp_path.glob("*")) == []


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = ReferenceStore(disk_path=tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    assert same(store.get(references().key, references)[0], references())
    store.flush()
    assert store.stats().failed_writes == 1
    assert list(tmp_path.iterdir()) == []
    assert store.get(references().key, never)[1] == "memory"


def _write_for_ever(folder: Path) -> None:
    for number in range(10**6):
        references(number, tokens=4096).save(folder / f"{references(number, tokens=4096).key}.safetensors")


def test_a_writer_that_is_killed_leaves_nothing_torn(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(tmp_path,))
    process.start()
    while len(list(tmp_path.glob("*.safetensors"))) < 2:
        time.sleep(0.01)
    while not list(tmp_path.glob(".limner-*")):  # in the middle of a write
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (tmp_path / ".limner-1-0").write_bytes(b"torn")  # of a process whose number another one has now
    torn = list(tmp_path.glob(".limner-*"))
    assert set(ReferenceStore(disk_path=tmp_path).verify().values()) == {None}
    assert list(tmp_path.glob(".limner-*")) == torn  # somebody may be writing them
    for file in torn:
        os.utime(file, (0, 0))
    ReferenceStore(disk_path=tmp_path)
    assert list(tmp_path.glob(".limner-*")) == []


def _ask_for(folder: Path, numbers: list[int], results: Any) -> None:
    store = ReferenceStore(disk_path=folder, memory_bytes=0, disk_bytes=3 * ONE)
    wrong = 0
    for number in numbers:
        found, _ = store.get(references(number).key, lambda number=number: references(number))
        wrong += not same(found, references(number))
    store.flush()
    results.put((wrong, store.stats().dropped_files, store.stats().failed_writes))


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Over a budget that makes them evict each other's entries."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    orders = [[i % 6 for i in range(60)], [(i * 5) % 6 for i in range(60)]]
    processes = [context.Process(target=_ask_for, args=(tmp_path, order, results)) for order in orders]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found == [(0, 0, 0)] * 2
    assert set(ReferenceStore(disk_path=tmp_path).verify().values()) <= {None}


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="disk_path: .*cannot be made"):
        ReferenceStore(disk_path=tmp_path / "file" / "store")


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    foreign = tmp_path / "flux-model.safetensors"
    save_file({"a": torch.zeros(10_000)}, foreign)
    os.utime(foreign, (0, 0))
    fill_folder(tmp_path, 0, 1)
    store = ReferenceStore(disk_path=tmp_path, disk_bytes=2 * ONE)
    store.get(references(2).key, lambda: references(2))
    store.flush()
    assert foreign.exists()
    assert [references(i).key in ReferenceStore(disk_path=tmp_path) for i in range(3)] == [False, False, True]
    assert [entry.key for entry in store.entries() if entry.tier == "disk"] == [references(2).key]
    assert store.verify() == {references(2).key: None}


def test_no_budget_evicts_nothing(tmp_path: Path) -> None:
    fill_folder(tmp_path, *range(4))
    store = ReferenceStore(disk_path=tmp_path, disk_bytes=None)
    store.get(references(4).key, lambda: references(4))
    store.flush()
    assert store.stats().num_entries["disk"] == 5


def test_a_fault_of_the_disk_is_a_miss_and_costs_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Too many open files, as under load: whole and pinned entries stay."""
    fill_folder(tmp_path, 0)
    store = ReferenceStore(disk_path=tmp_path)
    store.pin(references().key)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        source = store.get(references().key, references)[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert source == "miss"
    assert "are made again" in caplog.text
    assert store.stats().dropped_files == 0
    assert ReferenceStore(disk_path=tmp_path).get(references().key, never)[1] == "disk"


def test_damaged_files_that_cannot_be_removed_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill_folder(tmp_path, 0)
    damage_flip(file_of(tmp_path, references()))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "unlink", refuse)
    store = ReferenceStore(disk_path=tmp_path)
    assert store.get(references().key, references)[1] == "miss"
    assert "cannot be removed" in caplog.text
    with pytest.raises(OutputError, match="cannot be changed"):
        store.remove(references().key)


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    file_of(tmp_path, references()).mkdir()
    store = ReferenceStore(disk_path=tmp_path)
    assert store.get(references().key, references)[1] == "miss"
    store.flush()
    assert (list(store.entries())[1:], store.verify()) == ([], {})


def test_damaged_files_are_listed_and_removed(tmp_path: Path) -> None:
    fill_folder(tmp_path, 0, 1)
    damage_empty(file_of(tmp_path, references(0)))
    store = ReferenceStore(disk_path=tmp_path)
    whole, damaged = store.entries()
    assert (damaged.key, damaged.num_tokens, whole.num_tokens, whole.problem) == (references(0).key, 0, TOKENS, None)
    assert damaged.problem is not None
    assert store.remove(damaged.key)
    assert [entry.key for entry in store.entries()] == [references(1).key]


def test_what_is_pinned_or_asked_for_is_kept_however_dear(tmp_path: Path) -> None:
    """Also if another process asks while this one finds that reading is dear: a file that has its name is never taken back."""
    cheap = references(seconds=1e-9)
    store, other = ReferenceStore(disk_path=tmp_path), ReferenceStore(disk_path=tmp_path)
    busy = threading.Event()
    store._backing[0]._thread.submit(busy.wait, 10)
    store.get(cheap.key, lambda: cheap)
    other.put(cheap)
    other.flush()
    busy.set()
    store.flush()
    assert file_of(tmp_path, cheap).exists()
    pinned = references(1, seconds=1e-9)
    store.get(pinned.key, lambda: pinned)
    store.flush()
    assert not file_of(tmp_path, pinned).exists()
    store.pin(pinned.key)
    store = ReferenceStore(disk_path=tmp_path)
    store.get(pinned.key, lambda: pinned)
    store.flush()
    assert file_of(tmp_path, pinned).exists()


def test_the_disk_hears_of_uses_in_memory(tmp_path: Path) -> None:
    fill_folder(tmp_path, 0, 1)
    store = ReferenceStore(disk_path=tmp_path)
    store.get(references().key, never)
    file = file_of(tmp_path, references())
    os.utime(file, (0, 0))
    for _ in range(2):
        assert store.get(references().key, never)[1] == "memory"
        store.flush()
        assert file.stat().st_mtime > 1
    os.utime(file, (0, 0))
    assert store.get(references().key, never)[1] == "memory"
    store.flush()
    assert file.stat().st_mtime == 0  # not every time


def test_only_the_first_entries_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = References.load
    monkeypatch.setattr(References, "load", lambda path: loaded.append(path) or load(path))
    store = ReferenceStore(disk_path=tmp_path)
    for number in range(6):
        store.get(references(number).key, lambda number=number: references(number))
        store.flush()
    assert (store.stats().num_entries["disk"], len(loaded)) == (6, 3)


def test_more_than_the_folder_may_hold_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ReferenceStore(disk_path=tmp_path, disk_bytes=ONE)  # its file has a header too
    store.put(references())
    store.flush()
    assert store.file(references().key) is None
    assert "are not cached in the disk tier: its file has" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_folder(tmp_path, 0, 1)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if len(list(tmp_path.glob("*.safetensors"))) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    store = ReferenceStore(disk_path=tmp_path)
    store.put(references(2))
    store.flush()
    assert [file_of(tmp_path, references(i)).exists() for i in range(3)] == [False, True, True]
    assert (store.stats().evictions["disk"], store.stats().failed_writes) == (1, 0)


def test_room_is_made_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_folder(tmp_path, 0, 1)
    beside = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (beside.append(sorted(p.name for p in tmp_path.glob("*.safetensors"))), fsync(fd))
    )
    store = ReferenceStore(disk_path=tmp_path, disk_bytes=2 * file_of(tmp_path, references()).stat().st_size)
    store.put(references(2))
    store.flush()
    assert beside == [[file_of(tmp_path, references(1)).name]]


def test_a_folder_to_read_from_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill_folder(tmp_path, 0)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root everything can be written
    store = ReferenceStore(disk_path=tmp_path)
    assert "cannot be written: its entries are used, and none is added" in caplog.text
    assert store.get(references().key, never)[1] == "disk"
    store.get(references(1).key, lambda: references(1))
    store.flush()
    assert (sorted(tmp_path.iterdir()), store.stats().failed_writes) == (before, 0)


def test_torn_folders_of_writers_that_were_killed_go(tmp_path: Path) -> None:
    torn = tmp_path / ".limner-x"
    torn.mkdir()
    (torn / "pack").write_bytes(b"x")
    ReferenceStore(disk_path=tmp_path)
    assert torn.exists()
    os.utime(torn, (LONG_AGO, LONG_AGO))
    ReferenceStore(disk_path=tmp_path)
    assert not torn.exists()
