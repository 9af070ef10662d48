"""What machines share: hits, uploads, and damaged objects."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.faulty import FaultyFileSystem, faulty, fill, refuse
from tests.support.references import (
    DAMAGES,
    KEY,
    LONG_AGO,
    damage_empty,
    damage_flip,
    damage_truncate,
    never,
    references,
    same,
)
from tests.support.tiny import generators, picture

from limner import InvalidRequest, Pipeline, References, ReferenceStore
from limner.errors import RemoteError


@pytest.mark.parametrize("cached", [False, True])
def test_a_second_machine_hits(url: str, cached: bool, tmp_path: Path) -> None:
    first = ReferenceStore(remote=url, disk_path=tmp_path / "one" if cached else None)
    made, source = first.get(KEY, references)
    assert source == "miss"
    first.flush()
    assert first.stats().pending_bytes == 0
    second = ReferenceStore(remote=url, disk_path=tmp_path / "two" if cached else None)
    assert KEY not in second  # asks nobody
    found, source = second.get(KEY, never)
    assert source == "remote"
    assert same(found, made)
    assert KEY in second
    assert second.get(KEY, never)[1] == "memory"
    stats = second.stats()
    assert (stats.hits["remote"], stats.hits["memory"], stats.hits["disk"], stats.misses) == (1, 1, 0, 0)
    assert 0 < stats.prefill_seconds_saved <= 200
    assert "remote" not in stats.nbytes
    if cached:
        assert [p.name for p in (tmp_path / "two").iterdir()] == [f"{KEY}.safetensors"]
        found, source = ReferenceStore(remote=url, disk_path=tmp_path / "two").get(KEY, never)
        assert source == "disk"
        assert same(found, made)
    second.check_integrity()


def test_pictures_are_the_same_bit_for_bit(tiny_folder: Path, url: str) -> None:
    pictures, found = [picture(80, 64), picture(64, 96, seed=1)], []
    for source in ("miss", "remote"):
        store = ReferenceStore(remote=url)
        pipe = Pipeline.from_pretrained(tiny_folder, store=store)
        out = pipe(
            "a red cat",
            image=pictures,
            width=64,
            height=64,
            num_inference_steps=2,
            generator=generators(7),
            output_type="np",
        )
        assert out.reference_cache == source
        found.append(out.images)
        store.put(pipe.prefill(pictures))  # whatever reading costs here
        store.flush()
    assert (found[0] == found[1]).all()


def _make(url: str, cache: Path, told: Any) -> None:
    store = ReferenceStore(remote=url, disk_path=cache)
    told.put(store.get(KEY, references)[1])
    store.flush()


def test_two_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    for number, expected in enumerate(("miss", "remote")):
        process = context.Process(target=_make, args=(f"file://{tmp_path}/far", tmp_path / str(number), told))
        process.start()
        assert told.get(timeout=120) == expected
        process.join()
        assert process.exitcode == 0


def test_requests_at_once_fetch_once(tmp_path: Path, problem: dict[str, Any]) -> None:
    fill(f"faulty://{tmp_path}/far", 0)
    store, go, sources = ReferenceStore(remote=faulty(tmp_path)), threading.Event(), []
    FaultyFileSystem.calls.clear()
    problem["get"] = lambda: (go.wait(10), None)[1]
    threads = [threading.Thread(target=lambda: sources.append(store.get(KEY, never)[1])) for _ in range(5)]
    for thread in threads:
        thread.start()
    while store.stats().waits < 4:
        time.sleep(0.001)
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(sources) == ["memory"] * 4 + ["remote"]
    assert FaultyFileSystem.calls.count("get") == 1


def test_what_is_there_is_not_uploaded_again(tmp_path: Path, problem: dict[str, Any]) -> None:
    fill(f"faulty://{tmp_path}/far", 0)
    FaultyFileSystem.calls.clear()
    store = ReferenceStore(remote=faulty(tmp_path), disk_path=tmp_path / "near")
    store.put(references())
    store.flush()
    store.get(KEY, never)
    store.flush()
    assert FaultyFileSystem.calls.count("put") == 0


def test_a_folder_that_was_there_before_is_offered(tmp_path: Path) -> None:
    """Entries on disk that the remote tier does not have go there when they are used."""
    before = ReferenceStore(disk_path=tmp_path / "near")
    before.put(references())
    before.flush()
    store = ReferenceStore(disk_path=tmp_path / "near", remote=f"file://{tmp_path}/far")
    assert store.get(KEY, never)[1] == "disk"
    store.flush()
    assert ReferenceStore(remote=f"file://{tmp_path}/far").get(KEY, never)[1] == "remote"


def test_what_is_dear_to_read_is_not_uploaded(tmp_path: Path, problem: dict[str, Any]) -> None:
    store = ReferenceStore(remote=faulty(tmp_path))
    cheap = references(seconds=1e-9)
    store.get(cheap.key, lambda: cheap)
    store.flush()
    assert list((tmp_path / "far").iterdir()) == []
    assert store.stats().refused == 1
    assert cheap.key not in ReferenceStore(remote=faulty(tmp_path)).keys()  # noqa: SIM118
    FaultyFileSystem.calls.clear()
    store.get(cheap.key, never)
    store.flush()
    assert FaultyFileSystem.calls == []  # not offered each time that it is used
    other = references(1, seconds=1e-9)
    FaultyFileSystem.calls.clear()
    store.get(other.key, lambda: other)  # by now the cost is known: not even uploaded
    store.get(other.key, never)
    store.flush()
    assert FaultyFileSystem.calls == ["get"]  # whether it was there
    assert store.stats().refused == 2
    store.put(cheap)  # asked for
    store.flush()
    assert store.outlives(cheap.key)


def test_what_is_asked_for_stays_whatever_was_under_way(tmp_path: Path, problem: dict[str, Any]) -> None:
    """`limner refs warm` prefills, which uploads what is worth it, and then asks for it."""
    go = threading.Event()
    problem["put"] = lambda: (go.wait(30), None)[1]
    store, cheap = ReferenceStore(remote=faulty(tmp_path)), references(seconds=1e-9)
    store.get(cheap.key, lambda: cheap)
    while "put" not in FaultyFileSystem.calls:
        time.sleep(0.001)
    store.put(cheap)
    go.set()
    store.flush()
    assert store.outlives(cheap.key)
    assert (store.stats().refused, store.stats().pending_bytes) == (1, 0)
    assert store.remove(cheap.key)


def test_what_went_from_the_bucket_is_put_back_when_it_is_used(
    tmp_path: Path, problem: dict[str, Any], clock: Callable[[float], None]
) -> None:
    """A bucket's rules remove what is old, however much it is used."""
    store = ReferenceStore(remote=faulty(tmp_path))
    store.put(references())
    store.flush()
    for file in (tmp_path / "far").iterdir():
        file.unlink()
    FaultyFileSystem.calls.clear()
    for seconds, calls in ((0.0, 0), (3500.0, 0), (200.0, 1)):
        clock(seconds)
        for _ in range(3):
            assert store.get(KEY, never)[1] == "memory"
            store.flush()
        assert FaultyFileSystem.calls.count("put") == calls
    assert store.keys() == [KEY]
    FaultyFileSystem.calls.clear()
    for _ in range(2):  # asked once an hour
        clock(3700)
        for _ in range(3):
            store.get(KEY, never)
            store.flush()
    assert FaultyFileSystem.calls == ["info"] * 2


def test_the_folder_before_it_keeps_its_budget(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/far"
    fill(url, 0, 1, 2)
    size = max(p.stat().st_size for p in (tmp_path / "far").iterdir())
    store = ReferenceStore(remote=url, disk_path=tmp_path / "near", disk_bytes=2 * size, memory_bytes=0)
    for number in range(3):
        assert store.get(references(number).key, never)[1] == "remote"
    assert {p.stem for p in (tmp_path / "near").glob("*.safetensors")} == {references(n).key for n in (1, 2)}
    assert store.stats().evictions["disk"] == 1
    tight = ReferenceStore(remote=url, disk_path=tmp_path / "tight", disk_bytes=size // 2, memory_bytes=0)
    assert same(tight.get(KEY, never)[0], references())  # delivered, and not kept there
    assert list((tmp_path / "tight").iterdir()) == []
    assert len(list((tmp_path / "far").iterdir())) == 3  # nothing is evicted there


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damaged_objects_are_dropped_and_made_again(
    damage: Callable[[Path], None], cached: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, file = f"file://{tmp_path}/far", tmp_path / "far" / f"{KEY}.safetensors"
    fill(url, 0)
    damage(file)
    os.utime(file, (LONG_AGO, LONG_AGO))
    store = ReferenceStore(remote=url, disk_path=tmp_path / "near" if cached else None)
    assert list(store.verify().values()) != [None]
    with caplog.at_level(logging.WARNING, logger="limner"):
        found, source = store.get(KEY, references)
    assert source == "miss"
    assert same(found, references())
    assert f"dropped references: {url}/{KEY}.safetensors" in caplog.text
    assert store.stats().dropped_files == 1
    store.flush()
    assert ReferenceStore(remote=url).verify() == {KEY: None}  # uploaded again


@pytest.mark.parametrize("damage", [damage_truncate, damage_empty], ids=lambda f: f.__name__)
def test_what_may_still_be_being_written_is_left_alone(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, file = f"file://{tmp_path}/far", tmp_path / "far" / f"{KEY}.safetensors"
    fill(url, 0)
    damage(file)
    half = file.read_bytes()
    store = ReferenceStore(remote=url, disk_path=tmp_path / "near")
    with caplog.at_level(logging.WARNING, logger="limner"):
        found, source = store.get(KEY, references)
    store.flush()
    assert source == "miss"
    assert same(found, references())
    assert file.read_bytes() == half
    assert (caplog.text, store.stats().dropped_files) == ("", 0)


def test_half_an_object_is_replaced_when_nobody_can_be_writing_it(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    file = tmp_path / "far" / f"{KEY}.safetensors"
    fill(f"file://{tmp_path}/far", 0)
    damage_truncate(file)
    half = file.read_bytes()
    store = ReferenceStore(remote=f"file://{tmp_path}/far")
    assert store.get(KEY, references)[1] == "miss"
    for seconds in (0, 290):
        clock(seconds)
        store.get(KEY, never)
        store.flush()
        assert file.read_bytes() == half
        assert not store._backing[0].tier.knows(KEY)
    clock(20)
    store.get(KEY, never)
    store.flush()
    assert same(References.load(file), references())
    assert KEY in store


def test_half_an_object_that_was_ended_is_not_replaced(
    tmp_path: Path, problem: dict[str, Any], clock: Callable[[float], None]
) -> None:
    file = tmp_path / "far" / f"{KEY}.safetensors"
    fill(f"faulty://{tmp_path}/far", 0)
    whole = file.read_bytes()
    damage_truncate(file)
    store = ReferenceStore(remote=faulty(tmp_path), memory_bytes=0)
    assert store.get(KEY, references)[1] == "miss"
    file.write_bytes(whole)
    FaultyFileSystem.calls.clear()
    assert store.get(KEY, never)[1] == "remote"
    clock(400)
    store.get(KEY, never)
    store.flush()
    assert FaultyFileSystem.calls.count("put") == 0


def test_a_damaged_object_that_cannot_be_removed_is_replaced(tmp_path: Path, problem: dict[str, Any]) -> None:
    file = tmp_path / "far" / f"{KEY}.safetensors"
    fill(f"faulty://{tmp_path}/far", 0)
    damage_flip(file)
    os.utime(file, (LONG_AGO, LONG_AGO))

    def deny() -> None:
        raise PermissionError("no")

    problem["rm"] = deny
    store = ReferenceStore(remote=faulty(tmp_path))
    assert store.get(KEY, references)[1] == "miss"
    store.flush()
    assert same(References.load(file), references())


def test_foreign_objects_are_not_touched(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/far"
    fill(url, 0)
    (tmp_path / "far" / "notes.txt").write_text("mine")
    (tmp_path / "far" / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "far" / f"{'a' * 64}.safetensors").mkdir()
    store = ReferenceStore(remote=url)
    assert store.keys() == [KEY]
    assert [entry.key for entry in store.entries()] == [KEY]
    assert store.verify() == {KEY: None}
    with pytest.raises(InvalidRequest, match="is not a content key"):
        store.remove("../notes")
    assert (tmp_path / "far" / "notes.txt").read_text() == "mine"


def test_what_was_made_meanwhile_is_uploaded_when_it_is_used_again(
    tmp_path: Path, problem: dict[str, Any], clock: Callable[[float], None]
) -> None:
    store = ReferenceStore(remote=faulty(tmp_path))
    problem["all"] = refuse
    assert store.get(KEY, references)[1] == "miss"
    store.flush()
    problem.clear()
    assert list((tmp_path / "far").iterdir()) == []
    clock(10)
    assert store.get(KEY, never)[1] == "memory"
    store.flush()
    assert store.outlives(KEY)


def test_a_failed_upload_is_counted(tmp_path: Path, problem: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    store = ReferenceStore(remote=faulty(tmp_path))
    problem["put"] = refuse
    with caplog.at_level(logging.WARNING, logger="limner"):
        assert same(store.get(KEY, references)[0], references())
        store.flush()
    assert (store.stats().failed_writes, store.stats().pending_bytes) == (1, 0)
    assert len(caplog.records) == 1
    assert store.get(KEY, never)[1] == "memory"


def test_what_is_asked_for_is_uploaded_while_the_tier_is_left_alone(tmp_path: Path, problem: dict[str, Any]) -> None:
    bucket = faulty(tmp_path)
    store = ReferenceStore(remote=bucket)
    problem["get"] = refuse
    assert store.get(KEY, references)[1] == "miss"
    problem.clear()
    assert bucket.is_paused
    store.put(references())
    store.flush()
    assert store.keys() == [KEY]
    assert store.upload_error(KEY) is None


def test_that_what_was_asked_for_failed_is_said(
    tmp_path: Path, problem: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    store = ReferenceStore(remote=faulty(tmp_path))
    problem["put"] = refuse
    with caplog.at_level(logging.WARNING, logger="limner"):
        store.put(references())
        store.flush()
    assert "were not uploaded" in caplog.text
    assert "ConnectionError: the line is cut" in caplog.text
    assert "ConnectionError: the line is cut" in str(store.upload_error(KEY))
    problem.clear()
    store.put(references())
    store.flush()
    assert store.upload_error(KEY) is None


def test_what_is_asked_for_does_not_queue_up_before_one_that_hangs(
    tmp_path: Path, problem: dict[str, Any], hang: Callable[[], None]
) -> None:
    store = ReferenceStore(remote=faulty(tmp_path, timeout=0.2))
    FaultyFileSystem.calls.clear()
    problem["info"] = hang
    for number in range(20):
        store.put(references(number))
    store.flush()
    assert FaultyFileSystem.calls == ["info"]
    assert (store.stats().failed_writes, store.stats().pending_bytes) == (20, 0)
    problem.clear()
    store.put(references(0))
    store.flush()
    assert store.keys() == [KEY]


def test_a_request_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched into the folder before is there in any case: nobody waits until that is on disk."""
    fill(f"file://{tmp_path}/far", 0)
    store, synced = ReferenceStore(remote=f"file://{tmp_path}/far", disk_path=tmp_path / "near"), []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert store.get(KEY, never)[1] == "remote"
    assert store.file(KEY) is not None
    assert synced == []


def test_entries_verify_and_remove(url: str) -> None:
    fill(url, 0, 1)
    store = ReferenceStore(remote=url)
    entries = {entry.key: entry for entry in store.entries()}
    assert set(entries) == {references(n).key for n in range(2)}
    entry = entries[KEY]
    assert (entry.tier, entry.num_tokens, entry.num_references, entry.prefill_seconds, entry.problem) == (
        "remote",
        16,
        1,
        100.0,
        None,
    )
    assert entry.nbytes > references().nbytes
    assert abs(entry.used - time.time()) < 600
    assert store.verify() == dict.fromkeys(entries)
    store.get(KEY, never)
    store.pin(KEY)
    assert store.remove(KEY)
    assert KEY not in store
    assert not store.remove(KEY)
    assert ReferenceStore(remote=url).keys() == [references(1).key]
    assert ReferenceStore(remote=url).find(KEY) is None


def test_damaged_headers_are_listed(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/far"
    fill(url, 0, 1)
    (tmp_path / "far" / f"{KEY}.safetensors").write_bytes(b"torn")
    problems = {entry.key: entry.problem for entry in ReferenceStore(remote=url).entries()}
    assert problems[references(1).key] is None
    assert "is damaged or no safetensors file" in str(problems[KEY])


def test_what_cannot_be_removed_is_said(tmp_path: Path, problem: dict[str, Any]) -> None:
    fill(f"faulty://{tmp_path}/far", 0)
    store = ReferenceStore(remote=faulty(tmp_path))
    store.get(KEY, never)
    problem["all"] = refuse
    with pytest.raises(RemoteError, match="cannot be changed"):
        store.remove(KEY)
    assert not store._placement.host.knows(KEY)
    for call in (store.keys, lambda: list(store.entries()), store.verify, lambda: store.outlives(KEY)):
        with pytest.raises(RemoteError):
            call()
    assert store.get(references(1).key, lambda: references(1))[1] == "miss"
    problem.clear()
    assert store.find(KEY) is None  # left alone
    assert store.remove(KEY)  # what a person asks for does not wait until it is tried again
