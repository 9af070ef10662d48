"""Tiers, budgets, single flight, and what the disk tier survives."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import generators, picture

from limner import InvalidRequest, Pipeline, References, ReferenceStore
from limner.images import ReferenceReport
from limner.model.kv import LayerKV, ReferenceKV

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
    monkeypatch.setattr("limner.references.save_file", full)
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
    store = ReferenceStore(disk_path=tmp_path)
    assert set(store.verify().values()) == {None}
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
    from limner.model.kv import quantize_layer, staged

    layers = references().layers
    assert all(a is b for a, b in zip(staged(layers, torch.device("cpu")), layers, strict=True))
    narrow = [quantize_layer(layer, "int8") for layer in layers]
    wide = [layer.dense(torch.bfloat16) for layer in staged(narrow, torch.device("cpu"))]
    assert {x.dtype for layer in wide for x in layer} == {torch.bfloat16}
    assert [layer.k.device.type for layer in staged(layers, torch.device("meta"))] == ["meta"] * 3
