"""The order of tiers, single flight, and what a store says of all of them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.faulty import fill
from tests.support.references import KEY, ONE, TOKENS, file_of, fill_folder, never, references, same
from tests.support.tiny import generators, picture

from limner import InvalidRequest, Pipeline, References, ReferenceStore


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


def test_what_came_from_disk_is_kept_on_the_device(tmp_path: Path) -> None:
    fill_folder(tmp_path, 0)
    store = ReferenceStore(disk_path=tmp_path, device_bytes=ONE, memory_bytes=ONE)
    assert store.get(references().key, never, device="meta")[0].device.type == "meta"
    assert store.stats().num_entries["device"] == 1
    store.get(references().key, never, device="meta")
    assert store.stats().hits == {"device": 1, "memory": 0, "disk": 1, "remote": 0}


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

    fill_folder(tmp_path, 0, 1)
    size = file_of(tmp_path, references()).stat().st_size
    store = ReferenceStore(disk_path=tmp_path, disk_bytes=2 * size)
    store.pin(references(0).key)
    store.get(large.key, lambda: large)
    store.flush()
    assert store.stats().refused == 1
    assert [file_of(tmp_path, one).exists() for one in (references(0), references(1), large)] == [True, True, False]


def test_references_of_another_key_are_refused() -> None:
    store = ReferenceStore()
    with pytest.raises(InvalidRequest, match=f"make gave References of the key {references(1).key}"):
        store.get(references().key, lambda: references(1))
    assert store.get(references().key, references)[1] == "miss"


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


def test_keys_of_the_folder_before_it(tmp_path: Path) -> None:
    """What is in the folder alone can be removed by its key too."""
    url = f"file://{tmp_path}/far"
    fill(url, 0)
    before = ReferenceStore(disk_path=tmp_path / "near")
    for number in (0, 1):
        before.put(references(number))
    before.flush()
    store = ReferenceStore(remote=url, disk_path=tmp_path / "near")
    assert store.keys() == [KEY, references(1).key]
    assert all(store.remove(key) for key in store.keys())  # noqa: SIM118
    assert store.keys() == []


def test_pin_of_what_is_there_alone(url: str) -> None:
    fill(url, 0)
    store = ReferenceStore(remote=url)
    store.pin(KEY)
    with pytest.raises(InvalidRequest, match="is not in the store"):
        store.pin(references(1).key)


def test_open(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/far"
    ReferenceStore.open(url, cache=tmp_path / "near", disk_bytes=100).flush()
    assert (tmp_path / "near").is_dir()
    for options, message in (
        ({"place": str(tmp_path), "cache": tmp_path}, "store_cache: .* is a folder before a URL"),
        ({"place": url, "disk_bytes": 100}, "store_bytes: 100 is the budget of a folder"),
        ({"place": str(tmp_path / "no"), "make": False}, "store: .*no is not a folder"),
        ({"place": f"{url}/no", "make": False}, "is not there; check the name"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            ReferenceStore.open(**options)  # type: ignore[arg-type]
