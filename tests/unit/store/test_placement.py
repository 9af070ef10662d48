"""Which memory References are in: promotion to devices, demotion to the host."""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.references import ONE, Elsewhere, elsewhere, never, references, same

from limner import References, ReferenceStore


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
    monkeypatch.setattr("limner.memory.free.psutil.virtual_memory", lambda: SimpleNamespace(available=8 * ONE))
    store = ReferenceStore()
    for number in range(4):
        store.get(references(number).key, lambda number=number: references(number))
        store.get(references(number).key, never, device="meta")
    assert store.stats().nbytes == {"device": 2 * ONE, "memory": 2 * ONE, "disk": 0}


def test_what_cannot_be_kept_is_delivered(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(Elsewhere):
        def to_host(self, *, page_locked: bool) -> References:
            raise RuntimeError("out of memory")

    one = Stuck(**{f.name: getattr(references(), f.name) for f in dataclasses.fields(References)})
    store = ReferenceStore(device_bytes=0)
    assert store.get(one.key, lambda: one, device="meta:0") == (one, "miss")
    assert "are not cached in memory: out of memory" in caplog.text
    assert store.get(one.key, lambda: one, device="meta:0")[1] == "miss"
