"""Objects under a URL: slow copies, permissions, temporary names, and places that cannot be used."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tests.support.faulty import FaultyFileSystem, faulty, fill, refuse
from tests.support.references import KEY, LONG_AGO, damage_flip, never, references, same

from limner import InvalidRequest, References, ReferenceStore
from limner.errors import RemoteError
from limner.store import Bucket
from limner.store import bucket as bucket_module


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
    bucket = faulty(tmp_path)
    store = ReferenceStore(remote=bucket)
    assert bucket._opened is not None
    old, _ = bucket._opened

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
    assert bucket._opened is not None
    assert bucket._opened[0] is not old
    assert store.upload_error(references(1).key) is None


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
        Bucket(f"file://{tmp_path}/file")
    with pytest.raises(InvalidRequest, match="/typo is not there; check the name"):
        Bucket(f"file://{tmp_path}/typo", make=False)
    assert not (tmp_path / "typo").exists()
    with pytest.raises(RemoteError, match="cannot be opened .NotADirectoryError"):
        Bucket(f"file://{tmp_path}/file/x")
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
    Bucket("bucket://there/prefix")
    Bucket("bucket://locked/prefix")  # what is in it may be open
    with pytest.raises(InvalidRequest, match="bucket://gone/prefix is in no bucket that is there; make gone first"):
        Bucket("bucket://gone/prefix")


def test_long_headers_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(f"file://{tmp_path}/far", 0)
    monkeypatch.setattr(bucket_module, "_HEAD", 100)
    (entry,) = ReferenceStore(remote=f"file://{tmp_path}/far").entries()
    assert (entry.problem, entry.num_tokens) == (None, 16)
