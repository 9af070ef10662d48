"""Jobs in PostgreSQL: connections that are lost, servers that stop, processes that take over."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import psycopg
import psycopg.sql
import pytest
from tests.support.jobs import job, reference
from tests.support.postgres import PROGRAMS, WHY, Server, kill_sessions

from limner.errors import InvalidRequest, OutputError
from limner.server.jobs import postgres
from limner.server.jobs.open import check_data
from limner.server.jobs.storage import StorageInUse, StorageUnavailable
from limner.server.jobs.store import JobStore

pytestmark = pytest.mark.skipif(not PROGRAMS, reason=WHY)


@pytest.fixture
def url(server: Server) -> str:
    return server.url()


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    yield store
    store.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_RECONNECT_SECONDS", 0.3)


class Wire:
    """A way to the server that can be cut: callers see the end, and the server hears of nothing."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._port))
            self._pairs.append((near, far))
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
        except OSError:
            pass

    def cut(self) -> None:
        for near, _ in self._pairs:
            with contextlib.suppress(OSError):  # it was cut before
                near.shutdown(socket.SHUT_RDWR)
        time.sleep(0.05)

    def close(self) -> None:
        self._listening.close()
        for near, far in self._pairs:
            near.close()
            far.close()


def wired(url: str, wire: Wire) -> str:
    return url.replace(f":{urlsplit(url).port}/", f":{wire.port}/")


def test_a_lost_connection_is_made_again(store: JobStore, url: str, caplog: pytest.LogCaptureFixture) -> None:
    own = reference(1)
    kept, _ = store.add(job(own), [own])
    kill_sessions(url)
    assert store.get(kept.id) == kept
    kill_sessions(url)
    more, new = store.add(job(own), [own])
    assert new
    kill_sessions(url)
    assert store.end(more.id, "ready", result={}, keep_seconds=60) is not None
    assert store.counts() == {"pending": 1, "ready": 1}
    assert "connected to postgresql://127.0.0.1/" in caplog.text
    with pytest.raises(StorageInUse):  # the new connection has the lock too
        JobStore(url)


def test_a_transaction_that_loses_its_connection_leaves_nothing(store: JobStore, url: str) -> None:
    kept, _ = store.add(job())

    def work(then: Callable[[], None]) -> None:
        with store._storage.transaction() as db:
            db.execute("UPDATE jobs SET status = 'ready' WHERE id = ?", (kept.id,))
            then()
            db.execute("UPDATE jobs SET ended = 1 WHERE id = ?", (kept.id,))

    def fail() -> None:
        raise KeyError

    with pytest.raises(StorageUnavailable, match="cannot be written"):
        work(lambda: kill_sessions(url))
    assert store.get(kept.id) == kept
    with pytest.raises(KeyError):
        work(fail)
    assert store.get(kept.id) == kept
    work(lambda: None)
    assert store.counts() == {"ready": 1}


@pytest.mark.parametrize("is_done", [True, False])
def test_a_commit_that_is_not_answered_is_asked_about(
    store: JobStore, url: str, monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    execute = psycopg.Connection.execute
    kept, _ = store.add(job())

    def unanswered(db: psycopg.Connection[Any], query: Any, *args: Any, **kwargs: Any) -> Any:
        if query != "COMMIT":
            return execute(db, query, *args, **kwargs)
        monkeypatch.setattr(psycopg.Connection, "execute", execute)
        if is_done:
            execute(db, query)
        db.close()
        raise psycopg.OperationalError("the connection was lost")

    monkeypatch.setattr(psycopg.Connection, "execute", unanswered)
    if is_done:
        ended = store.end(kept.id, "ready", result={}, keep_seconds=60)
        assert ended is not None
        assert ended.status == "ready"
    else:
        with pytest.raises(StorageUnavailable, match="the connection was lost"):
            store.end(kept.id, "ready", result={}, keep_seconds=60)
    assert store.counts() == {"ready" if is_done else "pending": 1}


def test_a_server_that_crashes_has_what_was_answered(server: Server, hasty: None) -> None:
    store, own = JobStore(server.url()), reference(1)
    kept, _ = store.add(job(own), [own])
    server.stop("immediate")
    try:
        for call in (store.pending, lambda: store.add(job(own), [own]), lambda: store.picture_png(own.report.digest)):
            with pytest.raises(StorageUnavailable):
                call()
        start = time.monotonic()
        with pytest.raises(
            StorageUnavailable, match="does not answer"
        ):  # those that wait behind one do not wait as long
            store.counts()
        assert time.monotonic() - start < postgres._RECONNECT_SECONDS
        with pytest.raises(StorageUnavailable, match="cannot be reached"):
            JobStore(server.at("test1"))
    finally:
        server.start()
    store._storage._not_before = 0.0  # type: ignore[attr-defined]
    assert store.pending() == [kept]
    assert store.picture_png(own.report.digest).startswith(b"\x89PNG")
    store.close()


def test_who_lost_the_jobs_to_another_process_does_not_touch_them(url: str, hasty: None) -> None:
    first = JobStore(url)
    kept, _ = first.add(job())
    first._storage._db.close()  # type: ignore[attr-defined]
    second = JobStore(url)
    assert second.pending() == [kept]
    for call in (
        lambda: first.add(job()),
        lambda: first.end(kept.id, "error", result={}, keep_seconds=1),
        first.pending,
    ):
        with pytest.raises(StorageUnavailable):
            call()
    assert second.end(kept.id, "ready", result={}, keep_seconds=60) is not None
    second.close()
    first._storage._not_before = 0.0  # type: ignore[attr-defined]
    assert first.counts() == {"ready": 1}
    first.close()


def test_a_session_of_its_own_that_the_server_believes_alive_is_ended(server: Server, url: str) -> None:
    wire = Wire(server.port)
    store = JobStore(wired(url, wire))
    kept, _ = store.add(job())
    wire.cut()
    assert store.get(kept.id) == kept
    wire.cut()
    with pytest.raises(StorageInUse):  # of others it is not
        JobStore(url)
    store.close()
    wire.close()


def test_a_password_is_told_to_nobody(server: Server, url: str, caplog: pytest.LogCaptureFixture, hasty: None) -> None:
    assert "secret" in url
    texts = []
    with caplog.at_level(logging.DEBUG):
        store = JobStore(url)
        texts.append(store.name)
        kill_sessions(url)
        store.counts()
        for bad, kind in (
            (url, StorageInUse),
            (url.replace("test", "none"), StorageUnavailable),
            (url.replace("127.0.0.1", "%zz"), InvalidRequest),
            (f"{url}?port_=1&password=secret", InvalidRequest),
        ):
            with pytest.raises(kind) as raised:
                JobStore(bad)
            texts.append(str(raised.value))
        store.close()
    assert "secret" not in "".join(texts) + caplog.text


def test_other_versions_and_other_urls_are_refused(url: str) -> None:
    JobStore(url).close()
    with psycopg.connect(url) as db:
        db.execute("UPDATE limner.version SET version = 9")
    with pytest.raises(OutputError, match="is of version 9, this Limner reads 1"):
        JobStore(url)
    with psycopg.connect(url) as db:  # and no lock is left behind
        db.execute("UPDATE limner.version SET version = 1")
        db.execute("UPDATE limner.files SET data = 'x' WHERE name = 'secret'")
    with pytest.raises(OutputError, match="secret of .* is damaged"):
        JobStore(url)
    for other in ("mysql://a/b", "s3://a"):
        with pytest.raises(InvalidRequest, match="is not read; give a folder, or postgresql"):
            check_data(other)


def test_of_two_losses_at_one_commit_no_picture_is_lost(
    store: JobStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was done cannot be asked either: pictures stay, for the job may be there."""
    execute, own = psycopg.Connection.execute, reference(1)
    asked = job(own, idempotency="once")

    def lost(db: psycopg.Connection[Any], query: Any, *args: Any, **kwargs: Any) -> Any:
        if query == "COMMIT":
            execute(db, query)
        if query == "COMMIT" or "pg_xact_status" in str(query):
            db.close()
            raise psycopg.OperationalError("the connection was lost")
        return execute(db, query, *args, **kwargs)

    monkeypatch.setattr(psycopg.Connection, "execute", lost)
    with pytest.raises(StorageUnavailable):
        store.add(asked, [own])
    monkeypatch.setattr(psycopg.Connection, "execute", execute)
    kept, new = store.add(replace(asked, id="again"), [own])
    assert (kept.id, new) == (asked.id, False)
    assert store.picture_png(own.report.digest).startswith(b"\x89PNG")


def test_a_server_that_may_only_be_read_was_the_primary(store: JobStore, url: str, hasty: None) -> None:
    """After a failover the standby is what is connected to, until the other host is."""
    kept, _ = store.add(job())

    def make(read_only: str) -> None:
        with psycopg.connect(url, autocommit=True, options="-c default_transaction_read_only=off") as db:
            name = psycopg.sql.Identifier(urlsplit(url).path.strip("/"))
            db.execute(
                psycopg.sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}").format(
                    name, psycopg.sql.SQL(read_only)
                )
            )

    make("on")
    store._storage._db.execute("SET default_transaction_read_only = on")  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(StorageUnavailable):
            store.end(kept.id, "ready", result={}, keep_seconds=60)
        store._storage._not_before = 0.0  # type: ignore[attr-defined]
    with pytest.raises(StorageUnavailable, match="read-only"):  # locks of a standby are its own
        JobStore(url)
    make("off")
    assert store.end(kept.id, "ready", result={}, keep_seconds=60) is not None


def test_a_server_that_hangs_holds_nobody_for_long(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    monkeypatch.setattr(postgres, "_HANGS_SECONDS", 0.5)
    kept, _ = store.add(job())
    backend = store._storage._session[0]  # type: ignore[attr-defined]
    os.kill(backend, signal.SIGSTOP)
    try:
        start = time.monotonic()
        with pytest.raises(StorageUnavailable):
            store.counts()
        assert time.monotonic() - start < 30  # it would be for ever
    finally:
        os.kill(backend, signal.SIGCONT)
    store._storage._not_before = 0.0  # type: ignore[attr-defined]
    assert store.pending() == [kept]


def test_what_is_closed_is_free(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when the server has seen the session end; and who asks while it is let go gets it."""
    first = JobStore(url)
    with monkeypatch.context() as patched:
        patched.setattr(first._storage._db, "close", lambda: None)  # type: ignore[attr-defined]
        first.close()
        JobStore(url).close()
    first._storage._db.close()  # type: ignore[attr-defined]

    ask, asked = postgres._one, []

    def too_early(db: Any, query: str, *args: Any) -> Any:
        if "pg_try_advisory_lock" in query:
            asked.append(query)
            return ask(db, query, *args) if len(asked) > 1 else False
        return ask(db, query, *args)

    monkeypatch.setattr(postgres, "_one", too_early)
    JobStore(url).close()
    assert len(asked) == 2


def test_who_lost_the_jobs_does_not_draw_over_a_result(url: str) -> None:
    first = JobStore(url)
    kept, _ = first.add(job())
    first._storage._db.close()  # type: ignore[attr-defined]
    second = JobStore(url)
    ended = second.end(
        kept.id, "ready", result={"files": second.write_results(kept.id, [b"its"], suffix="png")}, keep_seconds=60
    )
    second.close()
    assert first.write_results(kept.id, [b"mine"], suffix="png") == [f"{kept.id}-1.png"]
    assert first.end(kept.id, "ready", result={}, keep_seconds=60) is None
    assert ended is not None
    assert first.read_result(ended, 1) == b"its"
    first.close()


def test_a_schema_that_was_made_before_is_enough(server: Server, url: str) -> None:
    """A role that may not make schemas."""
    with psycopg.connect(url) as db:
        db.execute("CREATE ROLE modest LOGIN")
        db.execute("CREATE SCHEMA limner AUTHORIZATION modest")
    store = JobStore(url.replace("limner:secret", "modest"))
    kept, _ = store.add(job())
    assert store.pending() == [kept]
    store.close()
