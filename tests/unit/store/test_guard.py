"""Calls that hang or fail: pauses, trials, and messages without credentials."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.faulty import FaultyFileSystem, faulty, fill, refuse
from tests.support.references import KEY, never, references, same

from limner import References, ReferenceStore
from limner.errors import RemoteError
from limner.places import without_credentials
from limner.store import Bucket


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


def test_calls_that_hang_do_not_add_up(tmp_path: Path, problem: dict[str, Any], hang: Callable[[], None]) -> None:
    """Each leaves a thread; what a person asks for is tried in any case, but not without end."""
    tier = faulty(tmp_path, timeout=0.05)
    before = sum(thread.name == "limner-remote" for thread in threading.enumerate())
    problem["info"] = hang
    FaultyFileSystem.calls.clear()
    for _ in range(20):
        with pytest.raises(RemoteError, match="no answer within|calls still wait for it; try again later"):
            tier.holds(KEY, explicit=True)
    assert len(FaultyFileSystem.calls) == 8
    assert sum(thread.name == "limner-remote" for thread in threading.enumerate()) - before <= 8
    problem.clear()
    assert not tier.holds(KEY)  # a request tries as it did, and when there was an answer all may
    assert not tier.holds(KEY, explicit=True)


def test_a_filesystem_that_broke_is_opened_anew(
    tmp_path: Path, problem: dict[str, Any], clock: Callable[[float], None]
) -> None:
    """A connection that was lost, as one of SFTP, does not come back by itself."""
    fill(f"faulty://{tmp_path}/far", 0)
    bucket = faulty(tmp_path)
    store = ReferenceStore(remote=bucket)
    assert bucket._opened is not None
    broken, _ = bucket._opened
    broken.get_file = lambda *_, **__: refuse()
    assert store.get(KEY, references)[1] == "miss"
    store._placement.host.drop(KEY)
    clock(10)
    assert store.get(KEY, never)[1] == "remote"


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
        Bucket(url)
    told = "".join(traceback.format_exception(caught.value)[-1:])
    assert "cannot log in to" in told
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    if secret is not None:
        assert secret not in told
        assert url not in told


_HANGS = """
import time
from limner import ReferenceStore
from limner.store import RemoteTier
from tests.support.faulty import FaultyFileSystem
from tests.support.references import references
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
