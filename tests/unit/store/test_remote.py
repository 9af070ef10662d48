"""The remote tier of the store: what machines share, and what happens when it is damaged, fails or hangs."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from tests.support.tiny import generators, picture
from tests.unit.store.test_store import (
    damage_empty,
    damage_flip,
    damage_foreign,
    damage_other_key,
    damage_truncate,
    references,
    same,
)

import limner.store
import limner.store.bucket as remote_tier
from limner import InvalidRequest, Pipeline, References, ReferenceStore
from limner.errors import RemoteError
from limner.places import without_credentials
from limner.store.bucket import RemoteTier

KEY = references().key
LONG_AGO = time.time() - 3600


def never() -> References:
    raise AssertionError("made again")


class FaultyFileSystem(LocalFileSystem):
    """The local filesystem, that hangs or fails in the calls that a test names."""

    protocol = "faulty"
    problem: dict[str, Callable[[], None]] = {}  # noqa: RUF012
    calls: list[str] = []  # noqa: RUF012

    def _meet(self, name: str) -> None:
        self.calls.append(name)
        (self.problem.get(name) or self.problem.get("all") or (lambda: None))()

    def info(self, path: Any, **kwargs: Any) -> Any:
        self._meet("info")
        return super().info(path, **kwargs)

    def ls(self, path: Any, detail: bool = False, **kwargs: Any) -> Any:
        self._meet("ls")
        return super().ls(path, detail=detail, **kwargs)

    def get_file(self, path1: Any, path2: Any, callback: Any = None, **kwargs: Any) -> Any:
        self._meet("get")
        return super().get_file(path1, path2, callback=callback, **kwargs)

    def put_file(self, path1: Any, path2: Any, callback: Any = None, **kwargs: Any) -> Any:
        self._meet("put")
        return super().put_file(path1, path2, callback=callback, **kwargs)

    def mv(self, path1: Any, path2: Any, recursive: bool = True, **kwargs: Any) -> None:
        self._meet("mv")
        super().mv(path1, path2, recursive=recursive, **kwargs)

    def rm_file(self, path: Any) -> None:
        self._meet("rm")
        super().rm_file(path)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(LocalFileSystem._strip_protocol(str(path).replace("faulty://", "file://", 1)))


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


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

    for module in (remote_tier, limner.store):
        monkeypatch.setattr(module, "time", Clock())

    def go(seconds: float) -> None:
        ahead[0] += seconds

    return go


def refuse() -> None:
    raise ConnectionError("the line is cut")


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/bucket/prefix"
    else:
        yield "memory://bucket/prefix"
        fs = fsspec.filesystem("memory")
        if fs.exists("/bucket"):
            fs.rm("/bucket", recursive=True)


def fill(url: str, *numbers: int) -> None:
    """Entries that another machine made."""
    store = ReferenceStore(remote=url)
    for number in numbers:
        store.put(references(number))
    store.flush()
    assert sorted(store.keys()) == sorted(references(number).key for number in numbers)


def faulty(tmp_path: Path, *, timeout: float = 5.0) -> RemoteTier:
    return RemoteTier(f"faulty://{tmp_path}/far", timeout=timeout)


# sharing


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
    monkeypatch.setattr(limner.store, "_UPLOADS_BYTES", 2 * references().nbytes)
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


# damage


DAMAGES = [damage_truncate, damage_flip, damage_foreign, damage_other_key, damage_empty]


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
        assert store._remote is not None
        assert not store._remote.knows(KEY)
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


# failure


def test_a_remote_that_fails_is_left_alone_and_tried_again(
    tmp_path: Path, problem: dict[str, Any], clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    fill(f"faulty://{tmp_path}/far", 0)
    store = ReferenceStore(remote=faulty(tmp_path), memory_bytes=0)
    FaultyFileSystem.calls.clear()
    problem["all"] = refuse

    def ask() -> str:
        source = str(store.get(KEY, references)[1])
        store.flush()
        return source

    with caplog.at_level(logging.WARNING, logger="limner"):
        assert [ask() for _ in range(3)] == ["miss"] * 3
        assert len(FaultyFileSystem.calls) == 1  # then nobody asked
        for seconds, tries in ((4, 1), (2, 2), (9, 2), (2, 3), (19, 3), (2, 4)):  # after 5, 10, 20 s
            clock(seconds)
            assert ask() == "miss"
            assert len(FaultyFileSystem.calls) == tries, seconds
        for _ in range(10):  # never longer than 5 minutes
            clock(301)
            before = len(FaultyFileSystem.calls)
            assert [ask() for _ in range(3)] == ["miss"] * 3
            assert len(FaultyFileSystem.calls) == before + 1
        (record,) = caplog.records  # once
        assert "the line is cut" in record.getMessage()
        assert f"faulty://{tmp_path}/far" in record.getMessage()
        problem.clear()
        clock(301)
        assert ask() == "remote"
        assert "answers again" in caplog.records[-1].getMessage()
        assert len(caplog.records) == 2
    store.check_integrity()


def test_one_request_alone_tries_again(
    tmp_path: Path, problem: dict[str, Any], hang: Callable[[], None], clock: Callable[[float], None]
) -> None:
    store = ReferenceStore(remote=faulty(tmp_path))
    problem["all"] = refuse
    store.get(KEY, references)
    clock(6)
    problem["all"] = hang
    FaultyFileSystem.calls.clear()
    tries = threading.Thread(target=store.get, args=(references(1).key, lambda: references(1)))
    tries.start()
    while not FaultyFileSystem.calls:
        time.sleep(0.001)
    start = time.monotonic()
    assert store.get(references(2).key, lambda: references(2))[1] == "miss"
    assert time.monotonic() - start < 3  # the other one waits for 5 s
    assert tries.is_alive()
    assert len(FaultyFileSystem.calls) == 1
    tries.join()


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


@pytest.mark.parametrize("call", ["get", "put", "info"])
def test_a_remote_that_hangs_holds_nobody(
    call: str, tmp_path: Path, problem: dict[str, Any], hang: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    fill(f"faulty://{tmp_path}/far", 1)
    store = ReferenceStore(remote=faulty(tmp_path, timeout=0.2), disk_path=tmp_path / "near")
    problem[call] = hang
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="limner"):
        for number in (0, 1, 2):
            source = store.get(references(number).key, lambda number=number: references(number))[1]
            assert source == ("remote" if number == 1 and call != "get" else "miss")
        assert time.monotonic() - start < 10
        store.flush()
    assert time.monotonic() - start < 20
    assert (
        len([r for r in caplog.records if "no answer within" in r.getMessage() or "nothing more" in r.getMessage()])
        == 1
    )
    assert store.stats().pending_bytes == 0
    files = list((tmp_path / "near").iterdir())
    assert [f for f in files if f.name.startswith(".limner")] == []
    assert all(
        same(References.load(f), references(number))
        for number in range(3)
        for f in files
        if f.stem == references(number).key
    )


@pytest.mark.parametrize(
    ("seconds", "piece", "pause", "source"),
    [
        (100.0, 5000, 0.2, "remote"),  # slower than the timeout in all, and each piece in time
        (100.0, 5000, 3.0, "miss"),  # stalls
        (0.1, 5000, 0.2, "miss"),  # each piece in time, and slower than the prefill
        (100.0, 100, 0.2, "miss"),  # not even its header comes in time
    ],
)
def test_a_slow_copy_is_waited_for_as_long_as_it_is_worth_it(
    seconds: float,
    piece: int,
    pause: float,
    source: str,
    tmp_path: Path,
    problem: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = references(0, seconds=seconds, tokens=128)
    store = ReferenceStore(remote=f"faulty://{tmp_path}/far")
    store.put(entry)
    store.flush()
    size = (tmp_path / "far" / f"{entry.key}.safetensors").stat().st_size
    assert 10 * 5000 < size < 12 * 5000
    ended = threading.Event()

    def slow(self: Any, path1: str, path2: str, callback: Any, **_: Any) -> None:
        data = Path(path1).read_bytes()
        try:
            with open(path2, "wb", buffering=0) as file:
                for start in range(0, len(data), piece):
                    file.write(data[start : start + piece])
                    time.sleep(pause)
                    callback.relative_update(piece)
        finally:
            ended.set()

    monkeypatch.setattr(FaultyFileSystem, "get_file", slow)
    store, start = ReferenceStore(remote=faulty(tmp_path, timeout=1.0), disk_path=tmp_path / "near"), time.monotonic()
    found, told = store.get(entry.key, lambda: entry)
    took = time.monotonic() - start
    assert told == source
    assert same(found, entry)
    assert took > 1.5 if source == "remote" else took < 8
    assert ended.wait(5)  # and a copy that nobody waits for ends too
    store.flush()
    assert [p for p in (tmp_path / "near").iterdir() if p.name.startswith(".limner")] == []


def test_no_permission_to_write(tmp_path: Path, problem: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Entries are used, none is added, and it is said once."""
    fill(f"faulty://{tmp_path}/far", 0)

    def deny() -> None:
        raise PermissionError("AccessDenied")

    problem["put"] = problem["rm"] = deny
    store = ReferenceStore(remote=faulty(tmp_path))
    with caplog.at_level(logging.WARNING, logger="limner"):
        for number in (1, 2, 3):
            store.get(references(number).key, lambda number=number: references(number))
            store.flush()
        assert store.get(KEY, never)[1] == "remote"
    (record,) = caplog.records
    assert "for now none is added" in record.getMessage()
    assert store.stats().failed_writes == 1
    store.put(references(4))
    assert "cannot be written (PermissionError: AccessDenied); check that" in str(store.upload_error(references(4).key))
    with pytest.raises(RemoteError, match="cannot be changed .PermissionError: AccessDenied"):
        store.remove(KEY)


def test_rights_that_come_back(
    tmp_path: Path, problem: dict[str, Any], clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A token that expired is no permission until it is renewed, by credentials that are read anew."""
    store = ReferenceStore(remote=faulty(tmp_path))
    assert store._remote is not None
    assert store._remote.tier._made is not None
    old, _ = store._remote.tier._made

    def deny() -> None:
        raise PermissionError("ExpiredToken")

    problem["put"] = deny
    with caplog.at_level(logging.WARNING, logger="limner"):
        for _ in range(3):
            for number in range(2):
                store.get(references(number).key, lambda number=number: references(number))
                store.put(references(number))
            store.flush()
            clock(310)
        assert FaultyFileSystem.calls.count("put") == 3  # one each time
        assert ["none is added" in record.getMessage() for record in caplog.records] == [True]
        problem.clear()
        store.get(KEY, never)
        store.flush()
        store.put(references(1))
        store.flush()
    assert "can be written again" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2
    assert len(store.keys()) == 2
    assert store._remote.tier._made is not None
    assert store._remote.tier._made[0] is not old
    assert store.upload_error(references(1).key) is None


def test_what_is_asked_for_is_uploaded_while_the_tier_is_left_alone(tmp_path: Path, problem: dict[str, Any]) -> None:
    store = ReferenceStore(remote=faulty(tmp_path))
    assert store._remote is not None
    problem["get"] = refuse
    assert store.get(KEY, references)[1] == "miss"
    problem.clear()
    assert store._remote.tier.is_away
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


def test_calls_that_hang_do_not_add_up(tmp_path: Path, problem: dict[str, Any], hang: Callable[[], None]) -> None:
    """Each leaves a thread; what a person asks for is tried in any case, but not without end."""
    tier = faulty(tmp_path, timeout=0.05)
    before = sum(thread.name == "limner-remote" for thread in threading.enumerate())
    problem["info"] = hang
    FaultyFileSystem.calls.clear()
    for _ in range(20):
        with pytest.raises(RemoteError, match="no answer within|calls still wait for it; try again later"):
            tier.holds(KEY, asked=True)
    assert len(FaultyFileSystem.calls) == 8
    assert sum(thread.name == "limner-remote" for thread in threading.enumerate()) - before <= 8
    problem.clear()
    assert not tier.holds(KEY)  # a request tries as it did, and when there was an answer all may
    assert not tier.holds(KEY, asked=True)


def test_a_filesystem_that_broke_is_opened_anew(
    tmp_path: Path, problem: dict[str, Any], clock: Callable[[float], None]
) -> None:
    """A connection that was lost, as one of SFTP, does not come back by itself."""
    fill(f"faulty://{tmp_path}/far", 0)
    store = ReferenceStore(remote=faulty(tmp_path))
    assert store._remote is not None
    assert store._remote.tier._made is not None
    broken, _ = store._remote.tier._made
    broken.get_file = lambda *_, **__: refuse()
    assert store.get(KEY, references)[1] == "miss"
    store._memory.pop(KEY)
    clock(10)
    assert store.get(KEY, never)[1] == "remote"


def test_no_room_for_what_is_fetched(tmp_path: Path, problem: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """That is the trouble of this machine, and no reason to leave the remote tier alone."""
    fill(f"faulty://{tmp_path}/far", 0, 1)

    def full() -> None:
        raise OSError(28, "No space left on device")

    problem["get"] = full
    store = ReferenceStore(remote=faulty(tmp_path), disk_path=tmp_path / "near")
    with caplog.at_level(logging.WARNING, logger="limner"):
        assert store.get(KEY, references)[1] == "miss"
    assert "no room for what is fetched" in caplog.text
    problem.clear()
    assert store.get(references(1).key, never)[1] == "remote"


def test_nobody_sees_half_of_what_is_put_into_a_folder(tmp_path: Path, problem: dict[str, Any]) -> None:
    store, seen = ReferenceStore(remote=faulty(tmp_path)), []
    problem["mv"] = lambda: seen.append([p.name for p in (tmp_path / "far").iterdir()])
    store.put(references())
    store.flush()
    ((name,),) = seen
    assert name.startswith(".limner-")
    assert [p.name for p in (tmp_path / "far").iterdir()] == [f"{KEY}.safetensors"]
    problem["mv"] = refuse
    store.put(references(1))
    store.flush()
    assert [p.name for p in (tmp_path / "far").iterdir()] == [f"{KEY}.safetensors"]  # nothing is left


def test_a_folder_that_does_not_rename_over_what_is_there(tmp_path: Path, problem: dict[str, Any]) -> None:
    file = tmp_path / "far" / f"{KEY}.safetensors"
    fill(f"faulty://{tmp_path}/far", 0)
    damage_flip(file)

    def taken() -> None:
        if file.exists():
            raise FileExistsError(file)

    problem["mv"] = taken
    references().save(tmp_path / "pack.safetensors")
    faulty(tmp_path).upload(tmp_path / "pack.safetensors", KEY)
    assert same(References.load(file), references())


def test_what_writers_left_that_were_killed_goes(tmp_path: Path) -> None:
    far = tmp_path / "far"
    far.mkdir()
    for name in (".limner-old", ".limner-new", "old"):
        (far / name).write_bytes(b"x")
        if "old" in name:
            os.utime(far / name, (LONG_AGO - 86400, LONG_AGO - 86400))
    fill(f"file://{far}", 0)
    assert {p.name for p in far.iterdir()} == {".limner-new", "old", f"{KEY}.safetensors"}


def test_a_request_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched into the folder before is there in any case: nobody waits until that is on disk."""
    fill(f"file://{tmp_path}/far", 0)
    store, synced = ReferenceStore(remote=f"file://{tmp_path}/far", disk_path=tmp_path / "near"), []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert store.get(KEY, never)[1] == "remote"
    assert store.file(KEY) is not None
    assert synced == []


# what is opened


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://bucket/x", "remote: nosuch://bucket/x: no filesystem is known for nosuch://"),
        (
            "smb://anna:hunter22@host/share/x",
            r"remote: smb://\*\*\*@host/share/x needs a package .* pip install smbprotocol",
        ),
        ("memory://", "remote: memory:// names no bucket or folder"),
        ("simplecache::file:///x", "remote: simplecache::file:///x is not a URL of one filesystem"),
    ],
)
def test_what_cannot_be_a_remote(url: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        ReferenceStore(remote=url)
    assert "hunter22" not in str(caught.value)


def test_places_that_are_not_there(tmp_path: Path, problem: dict[str, Any], hang: Callable[[], None]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidRequest, match="/file is a file; give a prefix"):
        RemoteTier(f"file://{tmp_path}/file")
    with pytest.raises(InvalidRequest, match="/typo is not there; check the name"):
        RemoteTier(f"file://{tmp_path}/typo", make=False)
    assert not (tmp_path / "typo").exists()
    with pytest.raises(RemoteError, match="cannot be opened .NotADirectoryError"):
        RemoteTier(f"file://{tmp_path}/file/x")
    problem["info"] = refuse
    with pytest.raises(
        RemoteError, match=f"remote: faulty://{tmp_path}/far cannot be opened .ConnectionError: the line is cut.; check"
    ):
        faulty(tmp_path)
    problem["info"] = hang
    start = time.monotonic()
    with pytest.raises(RemoteError, match="no answer within 0.4 s"):
        faulty(tmp_path, timeout=0.1)
    assert time.monotonic() - start < 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_made(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(RemoteError, match="PermissionError"):
        ReferenceStore(remote=f"file://{tmp_path}/far")
    tmp_path.chmod(stat.S_IRWXU)


class BucketFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """An object store with one bucket and nothing in it."""

    protocol = "bucket"

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        if path == "there":
            return {"name": path, "type": "directory", "size": 0}
        if path == "locked":
            raise PermissionError(path)
        raise FileNotFoundError(path)


fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)


def test_a_bucket_that_is_not_there() -> None:
    RemoteTier("bucket://there/prefix")
    RemoteTier("bucket://locked/prefix")  # what is in it may be open
    with pytest.raises(InvalidRequest, match="bucket://gone/prefix is in no bucket that is there; make gone first"):
        RemoteTier("bucket://gone/prefix")


SECRETS = [
    ("faulty://anna:pa55word@host/dir", "pa55word", "faulty://***@host/dir"),
    ("faulty://anna:pa%2F55word@host/dir", "pa/55word", "faulty://***@host/dir"),
    ("faulty://anna:pa/55word@host/dir", "pa/55word", "faulty://***@host/dir"),
    ("faulty://anna:p@ss@host/dir", "p@ss", "faulty://***@host/dir"),
    ("faulty://tokentoken@host/dir", "tokentoken", "faulty://***@host/dir"),
    ("faulty://host/dir?signature=s1gnature&x=1", "s1gnature", "faulty://host/dir?***"),
    ("faulty://host:22/dir@2", None, "faulty://host:22/dir@2"),
]


@pytest.mark.parametrize(("url", "secret", "shown"), SECRETS)
def test_credentials_are_not_told(
    url: str, secret: str | None, shown: str, problem: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert without_credentials(url) == shown

    def tell() -> None:
        raise ConnectionError(f"cannot log in to {url} with {secret!r}")

    problem["info"] = tell
    with pytest.raises(RemoteError, match=re.escape(f"remote: {shown} cannot be opened")) as caught:
        RemoteTier(url)
    told = "".join(traceback.format_exception(caught.value)[-1:])
    assert "cannot log in to" in told
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    if secret is not None:
        assert secret not in told
        assert url not in told


# managing


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


def test_damaged_headers_are_listed(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/far"
    fill(url, 0, 1)
    (tmp_path / "far" / f"{KEY}.safetensors").write_bytes(b"torn")
    problems = {entry.key: entry.problem for entry in ReferenceStore(remote=url).entries()}
    assert problems[references(1).key] is None
    assert "is damaged or no safetensors file" in str(problems[KEY])


def test_long_headers_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(f"file://{tmp_path}/far", 0)
    monkeypatch.setattr(remote_tier, "_HEAD", 100)
    (entry,) = ReferenceStore(remote=f"file://{tmp_path}/far").entries()
    assert (entry.problem, entry.num_tokens) == (None, 16)


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


def test_what_cannot_be_removed_is_said(tmp_path: Path, problem: dict[str, Any]) -> None:
    fill(f"faulty://{tmp_path}/far", 0)
    store = ReferenceStore(remote=faulty(tmp_path))
    store.get(KEY, never)
    problem["all"] = refuse
    with pytest.raises(RemoteError, match="cannot be changed"):
        store.remove(KEY)
    assert KEY not in store._memory.entries
    for call in (store.keys, lambda: list(store.entries()), store.verify, lambda: store.outlives(KEY)):
        with pytest.raises(RemoteError):
            call()
    assert store.get(references(1).key, lambda: references(1))[1] == "miss"
    problem.clear()
    assert store.find(KEY) is None  # left alone
    assert store.remove(KEY)  # what a person asks for does not wait until it is tried again


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


_ENDS_AT_ONCE = """
from pathlib import Path
from limner import ReferenceStore
from tests.unit.store.test_store import references
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
from tests.unit.store.test_store import references

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


_HANGS = """
import time
from limner import ReferenceStore
from limner.store.bucket import RemoteTier
from tests.unit.store.test_remote import FaultyFileSystem, references
store = ReferenceStore(remote=RemoteTier({far!r}, timeout=0.2))
FaultyFileSystem.problem["get"] = lambda: time.sleep(300)
print(store.get(references().key, references)[1])
"""


def test_a_copy_that_hangs_does_not_hold_the_end_of_the_process(tmp_path: Path) -> None:
    program = _HANGS.format(far=f"faulty://{tmp_path}/far")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "miss\n")


def test_torn_folders_of_writers_that_were_killed_go(tmp_path: Path) -> None:
    torn = tmp_path / ".limner-x"
    torn.mkdir()
    (torn / "pack").write_bytes(b"x")
    ReferenceStore(disk_path=tmp_path)
    assert torn.exists()
    os.utime(torn, (LONG_AGO, LONG_AGO))
    ReferenceStore(disk_path=tmp_path)
    assert not torn.exists()
