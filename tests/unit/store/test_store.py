"""Tiers, budgets, single flight, and what the disk tier survives."""

from __future__ import annotations

import dataclasses
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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.tiny import generators, picture

from limner import InvalidRequest, OutputError, Pipeline, References, ReferenceStore
from limner.images import ReferenceReport
from limner.model.kv import LayerKV, ReferenceKV
from limner.store import _ReadCost

TOKENS = 16


def references(number: int = 0, *, seconds: float = 100.0, tokens: int = TOKENS) -> References:
    """Small References of their own key; a prefill that is worth keeping."""
    generator = torch.Generator().manual_seed(number)
    layers = tuple(LayerKV(*(torch.randn(1, tokens, 2, 8, generator=generator) for _ in range(2))) for _ in range(3))
    size = (tokens * 16, 16)
    report = ReferenceReport(
        original_size=size,
        oriented=False,
        resized_to=None,
        cut=(0, 0, 0, 0),
        processed_size=size,
        digest=f"{number:064x}",
    )
    return References.make(
        ReferenceKV(layers=layers),
        weights="w",
        kernel="k",
        quantization=None,
        reports=(report,),
        prefill_seconds=seconds,
    )


ONE = references().nbytes


def same(a: References, b: References) -> bool:
    return a.key == b.key and all(
        torch.equal(x, y)
        for one, other in zip(a.layers, b.layers, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def never() -> References:
    raise AssertionError("made again")


def test_least_recently_used_goes_first() -> None:
    store, some = ReferenceStore(memory_bytes=2 * ONE), [references(i) for i in range(3)]
    for one in some[:2]:
        assert store.get(one.key, lambda one=one: one) == (one, "miss")
    assert store.get(some[0].key, never) == (some[0], "memory")  # now the most recently used
    store.get(some[2].key, lambda: some[2])
    assert [one.key in store for one in some] == [True, False, True]
    assert (store.nbytes, len(store)) == (2 * ONE, 2)
    stats = store.stats()
    assert (stats.misses, stats.hits["memory"], stats.evictions["memory"]) == (3, 1, 1)
    assert stats.prefill_seconds == 300
    assert 99 < stats.prefill_seconds_saved <= 100
    store.check_integrity()


def test_pinned_entries_stay() -> None:
    store, some = ReferenceStore(memory_bytes=2 * ONE), [references(i) for i in range(4)]
    for one in some[:2]:
        store.get(one.key, lambda one=one: one)
    store.pin(some[0].key)
    for one in some[2:]:
        store.get(one.key, lambda one=one: one)
        store.check_integrity()
    assert [one.key in store for one in some] == [True, False, False, True]
    store.unpin(some[0].key)
    store.get(some[2].key, lambda: some[2])
    assert some[0].key not in store
    with pytest.raises(InvalidRequest, match="is not in the store"):
        store.pin(some[0].key)


def test_what_does_not_fit_is_served_and_not_kept() -> None:
    store = ReferenceStore(memory_bytes=ONE - 1)
    for _ in range(2):
        assert store.get(references().key, references)[1] == "miss"
    assert (len(store), store.nbytes) == (0, 0)


@pytest.mark.parametrize("name", ["device_bytes", "memory_bytes", "disk_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5, "2GB"])
def test_refuses_budgets(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}: {value!r} is not a budget"):
        ReferenceStore(**{name: value})


def test_requests_at_once_share_one_prefill() -> None:
    store, made, results = ReferenceStore(), [], []
    go = threading.Event()

    def make() -> References:
        made.append(1)
        go.wait(10)
        return references()

    def ask() -> None:
        results.append(store.get(references().key, make))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    while store.stats().waits < 7:
        time.sleep(0.001)
    go.set()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sorted(source for _, source in results) == ["memory"] * 7 + ["miss"]
    assert len({id(found) for found, _ in results}) == 1


def test_a_failed_prefill_poisons_nothing() -> None:
    """Its own caller hears of it; those who waited try for themselves."""
    store, attempts, outcomes = ReferenceStore(), [], []
    started, go = threading.Event(), threading.Event()

    def make() -> References:
        attempts.append(1)
        if len(attempts) == 1:
            started.set()
            go.wait(10)
            raise RuntimeError("out of luck")
        return references()

    def ask() -> None:
        try:
            outcomes.append(store.get(references().key, make)[1])
        except RuntimeError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads[0].start()
    assert started.wait(10)
    for thread in threads[1:]:
        thread.start()
    while store.stats().waits < 2:
        time.sleep(0.001)
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[-1] == "out of luck"
    assert sorted(outcomes)[:2] == ["memory", "miss"]
    assert len(attempts) == 2
    store.check_integrity()


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


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)


def damage_foreign(path: Path) -> None:
    save_file({"a": torch.zeros(3)}, path)


def damage_other_key(path: Path) -> None:
    references(5).save(path)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_flip, damage_foreign, damage_other_key, damage_empty], ids=lambda f: f.__name__
)
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


def test_remove(tmp_path: Path) -> None:
    store = ReferenceStore(disk_path=tmp_path)
    kept, _ = store.get(references().key, references)
    assert store.remove(references().key)
    assert references().key not in store
    assert not store.remove(references().key)
    assert list(tmp_path.iterdir()) == []
    assert same(kept, references())  # in use, and whole
    with pytest.raises(InvalidRequest, match="is not a content key"):
        store.remove("../../etc/passwd")


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


def test_what_is_dear_to_read_is_not_kept_on_disk(tmp_path: Path) -> None:
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


def test_entries_of_another_device_go_down_a_tier() -> None:
    """A device with memory of its own, here `meta`, whose entries have no values to compare."""
    store = ReferenceStore(device_bytes=ONE, memory_bytes=2 * ONE)
    there = [references(i).to("meta") for i in range(3)]
    for one in there[:1]:
        store.get(one.key, lambda one=one: one, device="meta")
    assert store.stats().num_entries == {"device": 1, "memory": 0, "disk": 0}
    assert store.get(there[0].key, never, device="meta") == (there[0], "memory")
    assert store.stats().hits["device"] == 1
    store.check_integrity()


def test_too_large_for_the_device_stays_in_host_memory() -> None:
    store = ReferenceStore(device_bytes=ONE - 1, memory_bytes=2 * ONE)
    found, _ = store.get(references().key, references, device="meta")
    assert found.device.type == "cpu"  # the transformer takes it layer by layer
    assert store.get(references().key, never, device="meta")[0].device.type == "cpu"
    fits = ReferenceStore(device_bytes=ONE, memory_bytes=2 * ONE)
    assert fits.get(references().key, references, device="meta")[0].device.type == "meta"
    assert fits.get(references().key, never, device="meta")[0].device.type == "meta"


def file_of(folder: Path, one: References) -> Path:
    return folder / f"{one.key}.safetensors"


def kept_on_disk(folder: Path, *numbers: int) -> None:
    """Entries in a folder, the first the least recently used."""
    store = ReferenceStore(disk_path=folder, disk_bytes=None)
    for i, number in enumerate(numbers):
        store.put(references(number))
        store.flush()
        os.utime(file_of(folder, references(number)), (i, i))


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    foreign = tmp_path / "flux-model.safetensors"
    save_file({"a": torch.zeros(10_000)}, foreign)
    os.utime(foreign, (0, 0))
    kept_on_disk(tmp_path, 0, 1)
    store = ReferenceStore(disk_path=tmp_path, disk_bytes=2 * ONE)
    store.get(references(2).key, lambda: references(2))
    store.flush()
    assert foreign.exists()
    assert [references(i).key in ReferenceStore(disk_path=tmp_path) for i in range(3)] == [False, False, True]
    assert [entry.key for entry in store.entries() if entry.tier == "disk"] == [references(2).key]
    assert store.verify() == {references(2).key: None}


def test_no_budget_evicts_nothing(tmp_path: Path) -> None:
    kept_on_disk(tmp_path, *range(4))
    store = ReferenceStore(disk_path=tmp_path, disk_bytes=None)
    store.get(references(4).key, lambda: references(4))
    store.flush()
    assert store.stats().num_entries["disk"] == 5


def test_a_fault_of_the_disk_is_a_miss_and_costs_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Too many open files, as under load: whole and pinned entries stay."""
    kept_on_disk(tmp_path, 0)
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
    kept_on_disk(tmp_path, 0)
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
    kept_on_disk(tmp_path, 0, 1)
    damage_empty(file_of(tmp_path, references(0)))
    store = ReferenceStore(disk_path=tmp_path)
    whole, damaged = store.entries()
    assert (damaged.key, damaged.num_tokens, whole.num_tokens, whole.problem) == (references(0).key, 0, TOKENS, None)
    assert damaged.problem is not None
    assert store.remove(damaged.key)
    assert [entry.key for entry in store.entries()] == [references(1).key]


def test_pins_hold_for_what_is_yet_to_be_written(tmp_path: Path) -> None:
    store = ReferenceStore(disk_path=tmp_path)
    busy = threading.Event()
    assert store._writer is not None
    store._writer.submit(busy.wait, 10)
    store.get(references().key, references)
    store.pin(references().key)
    busy.set()
    store.flush()
    other = ReferenceStore(disk_path=tmp_path, disk_bytes=2 * ONE)
    other.get(references(1).key, lambda: references(1))
    other.flush()
    assert file_of(tmp_path, references()).exists()
    assert other.stats().evictions["disk"] == 0


def test_what_is_pinned_or_asked_for_is_kept_however_dear(tmp_path: Path) -> None:
    """Also if another process asks while this one finds that reading is dear: a file that has its name is never taken back."""
    cheap = references(seconds=1e-9)
    store, other = ReferenceStore(disk_path=tmp_path), ReferenceStore(disk_path=tmp_path)
    busy = threading.Event()
    assert store._writer is not None
    store._writer.submit(busy.wait, 10)
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
    kept_on_disk(tmp_path, 0, 1)
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


def test_what_memory_has_no_room_for_goes_down_to_disk(tmp_path: Path) -> None:
    store = ReferenceStore(disk_path=tmp_path, memory_bytes=2 * ONE)
    for number in range(2):
        store.get(references(number).key, lambda number=number: references(number))
    store.flush()
    file_of(tmp_path, references()).unlink()  # another process evicted it
    store.get(references(2).key, lambda: references(2))
    store.flush()
    assert references().key in store
    assert store.get(references().key, never)[1] == "disk"


def test_what_waits_to_be_written_is_bounded(tmp_path: Path) -> None:
    store = ReferenceStore(disk_path=tmp_path, memory_bytes=2 * ONE)
    busy = threading.Event()
    assert store._writer is not None
    store._writer.submit(busy.wait, 10)
    for number in range(4):
        store.get(references(number).key, lambda number=number: references(number))
    assert store.stats().pending_bytes == 2 * ONE
    assert store.stats().refused >= 2
    busy.set()
    store.put(references(4))  # asked for: waits
    store.flush()
    assert store.stats().pending_bytes == 0
    assert file_of(tmp_path, references(4)).exists()


def test_cost_of_reading_tells_small_from_large() -> None:
    """An overhead of 5 ms and 1 GB/s: what 10 KB took says nothing of what 1 GB takes."""
    cost = _ReadCost()
    cost.measure(0.005, 10_000)
    assert cost.expected(1 << 30) < 0.01
    cost.measure(0.105, 100_000_000)
    assert cost.expected(1_000_000_000) == pytest.approx(1.005)
    assert cost.expected(10_000) == pytest.approx(0.00501)


def test_what_was_refused_is_tried_again_now_and_then() -> None:
    cost, one = _ReadCost(), references(seconds=1.0)
    cost.measure(10.0, 10_000)  # a moment when the disk was busy
    tried = [number for number in range(1000) if cost.is_worth_a_write(one)]
    assert tried[:3] == [8, 25, 58]
    cost.measure(0.01, 10_000)
    assert all(cost.is_worth_a_write(one) for _ in range(10))


def test_only_the_first_entries_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = References.load
    monkeypatch.setattr(References, "load", lambda path: loaded.append(path) or load(path))
    store = ReferenceStore(disk_path=tmp_path)
    for number in range(6):
        store.get(references(number).key, lambda number=number: references(number))
        store.flush()
    assert (store.stats().num_entries["disk"], len(loaded)) == (6, 3)


class Elsewhere(References):
    """On a device with memory of its own, which is played: the values are real, and moves are counted."""

    number = 0
    moves: list[str] = []  # noqa: RUF012 (emptied by the tests that read it)

    @property
    def device(self) -> torch.device:
        return torch.device("meta", self.number)

    def to(self, device: torch.device | str) -> References:
        device = torch.device(device)
        if device == self.device:
            return self
        self.moves.append("to")
        return elsewhere(self, device.index or 0) if device.type == "meta" else self._plain()

    def to_host(self, *, page_locked: bool) -> References:
        self.moves.append("to_host")
        return self._plain()

    def _plain(self) -> References:
        return References(**{f.name: getattr(self, f.name) for f in dataclasses.fields(References)})


def elsewhere(one: References, number: int = 0) -> Elsewhere:
    made = Elsewhere(**{f.name: getattr(one, f.name) for f in dataclasses.fields(References)})
    object.__setattr__(made, "number", number)
    made.moves.clear()
    return made


def test_what_came_from_disk_is_kept_on_the_device(tmp_path: Path) -> None:
    kept_on_disk(tmp_path, 0)
    store = ReferenceStore(disk_path=tmp_path, device_bytes=ONE, memory_bytes=ONE)
    assert store.get(references().key, never, device="meta")[0].device.type == "meta"
    assert store.stats().num_entries["device"] == 1
    store.get(references().key, never, device="meta")
    assert store.stats().hits == {"device": 1, "memory": 0, "disk": 1, "remote": 0}


def test_the_device_evicts_to_host_memory_once() -> None:
    store = ReferenceStore(device_bytes=ONE, memory_bytes=2 * ONE)
    there = [elsewhere(references(i)) for i in range(2)]
    for one in there:
        store.get(one.key, lambda one=one: one, device="meta:0")
    assert there[0].moves == ["to_host"]
    found, source = store.get(there[0].key, never)
    assert (same(found, references(0)), source, there[0].moves) == (True, "memory", ["to_host"])
    store.check_integrity()


def test_nothing_is_moved_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReferenceStore(device_bytes=ONE, memory_bytes=0)
    there = [elsewhere(references(i)) for i in range(2)]
    for one in there:
        store.get(one.key, lambda one=one: one, device="meta:0")
    assert there[0].moves == []  # memory keeps nothing: no copy for it
    store = ReferenceStore(device_bytes=ONE, memory_bytes=4 * ONE)
    store.get(references(0).key, lambda: references(0), device="meta")
    store.pin(references(0).key)
    store.get(references(1).key, lambda: references(1), device="meta")

    def moved(*_: Any, **__: Any) -> None:
        raise AssertionError("moved beside a pinned entry that fills the device")

    monkeypatch.setattr(References, "to", moved)
    for _ in range(2):
        assert store.get(references(1).key, never, device="meta")[0].device.type == "cpu"
    store.check_integrity()


def test_pins_do_not_raise_a_budget() -> None:
    store = ReferenceStore(device_bytes=ONE, memory_bytes=4 * ONE)
    for number in range(3):
        store.get(references(number).key, lambda number=number: references(number))
        store.pin(references(number).key)
    for number in range(3):
        store.get(references(number).key, never, device="meta")
    assert store.stats().nbytes["device"] == ONE
    assert len(store) == 3
    store.check_integrity()


def test_devices_share_a_store() -> None:
    """Each has its copy; none is moved to and fro."""
    store, one = ReferenceStore(memory_bytes=ONE), elsewhere(references())
    store.get(one.key, lambda: one, device="meta:0")
    for device in ("meta:1", "cpu"):
        store.get(one.key, never, device=device)
    assert one.moves == ["to"] * 1 or one.moves == ["to"] * 2
    moves = len(one.moves)
    for device in ("meta:0", "meta:1", "cpu") * 3:
        found, _ = store.get(one.key, never, device=device)
        assert found.device == torch.device(device)
    assert len(one.moves) == moves
    assert store.stats().num_entries == {"device": 2, "memory": 1, "disk": 0}
    assert len(store) == 1
    store.check_integrity()


def test_nobody_waits_while_references_are_moved() -> None:
    moving, go = threading.Event(), threading.Event()

    class Slow(Elsewhere):
        def to(self, device: torch.device | str) -> References:
            moving.set()
            assert go.wait(10)
            return super().to(device)

    one = Slow(**{f.name: getattr(references(), f.name) for f in dataclasses.fields(References)})
    store = ReferenceStore()
    store.get(one.key, lambda: one, device="meta:0")
    thread = threading.Thread(target=store.get, args=(one.key, never))
    thread.start()
    assert moving.wait(10)
    asked = threading.Thread(target=store.stats)
    asked.start()
    asked.join(5)
    assert not asked.is_alive()
    go.set()
    thread.join()


def test_given_references_are_placed_by_the_rule_of_the_store() -> None:
    for budget, place in ((ONE, "meta"), (ONE - 1, "cpu")):
        store = ReferenceStore(device_bytes=budget)
        placed = store.place(references(), device="meta")
        assert placed.device.type == place
        assert (store.place(references(), device="meta") is placed) == (place == "meta")  # kept there


def test_budgets_that_are_not_given_come_from_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limner.store.psutil.virtual_memory", lambda: SimpleNamespace(available=8 * ONE))
    store = ReferenceStore()
    for number in range(4):
        store.get(references(number).key, lambda number=number: references(number))
        store.get(references(number).key, never, device="meta")
    assert store.stats().nbytes == {"device": 2 * ONE, "memory": 2 * ONE, "disk": 0}


def test_an_entry_that_no_tier_can_hold_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    store = ReferenceStore(memory_bytes=ONE - 1)
    for number in range(3):
        store.get(references(number).key, lambda number=number: references(number))
    assert caplog.text.count("fit into no tier") == 1
    assert f"references of {ONE} bytes" in caplog.text


def test_nobody_goes_for_what_has_no_room_beside_pins(tmp_path: Path) -> None:
    large = references(9, tokens=2 * TOKENS)
    store = ReferenceStore(memory_bytes=2 * ONE)
    for number in range(2):
        store.get(references(number).key, lambda number=number: references(number))
    store.pin(references(0).key)
    store.get(large.key, lambda: large)
    assert [one.key in store for one in (references(0), references(1), large)] == [True, True, False]

    kept_on_disk(tmp_path, 0, 1)
    size = file_of(tmp_path, references()).stat().st_size
    store = ReferenceStore(disk_path=tmp_path, disk_bytes=2 * size)
    store.pin(references(0).key)
    store.get(large.key, lambda: large)
    store.flush()
    assert store.stats().refused == 1
    assert [file_of(tmp_path, one).exists() for one in (references(0), references(1), large)] == [True, True, False]


def test_more_than_the_folder_may_hold_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ReferenceStore(disk_path=tmp_path, disk_bytes=ONE)  # its file has a header too
    store.put(references())
    store.flush()
    assert store.file(references().key) is None
    assert "are not kept on disk: its file has" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_on_disk(tmp_path, 0, 1)
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
    kept_on_disk(tmp_path, 0, 1)
    beside = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (beside.append(sorted(p.name for p in tmp_path.glob("*.safetensors"))), fsync(fd))
    )
    store = ReferenceStore(disk_path=tmp_path, disk_bytes=2 * file_of(tmp_path, references()).stat().st_size)
    store.put(references(2))
    store.flush()
    assert beside == [[file_of(tmp_path, references(1)).name]]


def test_references_of_another_key_are_refused() -> None:
    store = ReferenceStore()
    with pytest.raises(InvalidRequest, match=f"make gave References of the key {references(1).key}"):
        store.get(references().key, lambda: references(1))
    assert store.get(references().key, references)[1] == "miss"


def test_what_cannot_be_kept_is_delivered(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(Elsewhere):
        def to_host(self, *, page_locked: bool) -> References:
            raise RuntimeError("out of memory")

    one = Stuck(**{f.name: getattr(references(), f.name) for f in dataclasses.fields(References)})
    store = ReferenceStore(device_bytes=0)
    assert store.get(one.key, lambda: one, device="meta:0") == (one, "miss")
    assert "are not kept in memory: out of memory" in caplog.text
    assert store.get(one.key, lambda: one, device="meta:0")[1] == "miss"


def test_those_who_waited_saved_less() -> None:
    store, go = ReferenceStore(), threading.Event()

    def make() -> References:
        go.wait(10)
        return references(seconds=0.5)

    threads = [threading.Thread(target=store.get, args=(references().key, make)) for _ in range(2)]
    for thread in threads:
        thread.start()
    while store.stats().waits < 1:
        time.sleep(0.001)
    time.sleep(0.3)
    go.set()
    for thread in threads:
        thread.join()
    assert store.stats().prefill_seconds_saved <= 0.2


def test_a_folder_to_read_from_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept_on_disk(tmp_path, 0)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root everything can be written
    store = ReferenceStore(disk_path=tmp_path)
    assert "cannot be written: its entries are used, and none is added" in caplog.text
    assert store.get(references().key, never)[1] == "disk"
    store.get(references(1).key, lambda: references(1))
    store.flush()
    assert (sorted(tmp_path.iterdir()), store.stats().failed_writes) == (before, 0)


def test_pipeline_over_every_tier(tiny_folder: Path, tmp_path: Path) -> None:
    """Made, from memory, and from disk by another pipeline: the same picture, bit for bit."""
    pictures = [picture(96, 64), picture(64, 64, seed=1)]
    store = ReferenceStore(disk_path=tmp_path)
    pipe = Pipeline.from_pretrained(tiny_folder, store=store)
    refs = pipe.prefill(pictures)
    assert refs.prefill_seconds > 0
    store.put(refs)  # asked for: kept on disk although reading may be dearer than so small a prefill
    store.flush()

    def draw(owner: Pipeline) -> tuple[torch.Tensor, str]:
        out = owner("a dog", image=pictures, generator=generators(3)[0], output_type="pt", width=64, height=64)
        return out.images, out.reference_cache

    other = Pipeline.from_pretrained(tiny_folder, store=ReferenceStore(disk_path=tmp_path))
    fresh = Pipeline.from_pretrained(tiny_folder)
    found = [draw(pipe), draw(other), draw(other), draw(fresh)]
    assert [cache for _, cache in found] == ["memory", "disk", "memory", "miss"]
    assert all(torch.equal(found[0][0], images) for images, _ in found)


def test_staged_layers_are_the_same_layers() -> None:
    from limner.model.kv import quantize_layer
    from limner.model.transfer import on_device

    layers = references().layers
    assert all(a is b for a, b in zip(on_device(layers, torch.device("cpu")), layers, strict=True))
    narrow = [quantize_layer(layer, "int8") for layer in layers]
    wide = [layer.dense(torch.bfloat16) for layer in on_device(narrow, torch.device("cpu"))]
    assert {x.dtype for layer in wide for x in layer} == {torch.bfloat16}
    assert [layer.k.device.type for layer in on_device(layers, torch.device("meta"))] == ["meta"] * 3
