"""Connections and event streams of one caller leave room for others, and a lack of files ends no job."""

from __future__ import annotations

import errno
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.serving import ANNA, BOB, KEYS, Served

from limner import Pipeline
from limner.errors import OutputError
from limner.server import descriptors
from limner.server.jobs import offload, sqlite


def held_job(served: Served) -> tuple[str, threading.Event]:
    """A job that stays pending until the event is set."""
    go_on, jobs = threading.Event(), served.service.jobs
    write = jobs.write_results

    def waits(*args: Any, **kwargs: Any) -> Any:
        assert go_on.wait(60)
        return write(*args, **kwargs)

    jobs.write_results = waits
    return served.submit()["id"], go_on


def open_stream(served: Served, id: str) -> tuple[socket.socket, bytes]:
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=60)
    connection.sendall(f"GET /v1/jobs/{id}/events HTTP/1.1\r\nHost: localhost\r\nX-Key: {ANNA}\r\n\r\n".encode())
    return connection, connection.recv(65536)


def test_event_streams_of_one_owner_are_counted(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limner.server.app.max_streams", lambda: 6)
    with Served(pipe, tmp_path / "data", keys=KEYS) as served:
        id_, go_on = held_job(served)
        streams = [open_stream(served, id_) for _ in range(4)]
        assert [b" 200 " in answer.splitlines()[0] for _, answer in streams] == [True, True, True, False]
        refused = served.http.get(f"/v1/jobs/{id_}/events")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert "close one, or poll GET /v1/jobs/{id}" in refused.json()["detail"][0]["msg"]
        stream = {"prompt": "a", "size": "64x64", "stream": True}
        assert served.http.post("/v1/images/generations", json=stream).status_code == 429
        assert served.service.jobs.counts() == {"pending": 1}
        assert served.http.get(f"/v1/jobs/{id_}").status_code == 200
        for connection, _ in streams:
            connection.close()
        go_on.set()
        assert served.poll(id_)["status"] == "Ready"
        with served.http.stream("GET", f"/v1/jobs/{id_}/events") as events:
            assert events.status_code == 200
            assert "event: ready" in "".join(events.iter_text())


def test_idle_connections_make_room(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "max_connections", lambda: 8)
    with Served(pipe, tmp_path / "data", keys=KEYS) as served:
        idle = [socket.create_connection(("127.0.0.1", served.port), timeout=60) for _ in range(30)]
        bob = httpx.Client(base_url=served.url, headers={"x-key": BOB}, timeout=60)
        assert bob.get("/healthz").status_code == 200
        assert idle[0].recv(100) == b""  # closed: it had waited longest
        assert len(served.server.server_state.connections) <= 9
        id_, go_on = held_job(served)
        busy = [open_stream(served, id_)[0] for _ in range(4)]
        wait = b"POST /v1/edit HTTP/1.1\r\nHost: localhost\r\nX-Key: %b\r\nContent-Length: 9\r\n\r\n" % ANNA.encode()
        for _ in range(8):  # bodies that do not come
            busy.append(socket.create_connection(("127.0.0.1", served.port), timeout=60))
            busy[-1].sendall(wait)
        with httpx.Client(base_url=served.url) as other:
            while (answer := other.get("/healthz")).status_code == 200:
                pass
        assert (answer.status_code, answer.headers["connection"]) == (503, "close")
        assert "as many connections as it may" in answer.json()["detail"][0]["msg"]
        for connection in [*busy, *idle]:
            connection.close()
        go_on.set()
        assert served.poll(id_)["status"] == "Ready"
        bob.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOSPC, errno.EIO])
def test_a_lack_of_files_or_room_ends_no_job(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(offload, "_FIRST_PAUSE", 0.01)
    write, failed = sqlite.write_file, 0

    def fails(path: Path, data: bytes, **options: Any) -> None:
        nonlocal failed
        if path.parent.name == "results" and failed < 3:
            failed += 1
            raise OutputError("output: not written") from OSError(code, "lack")
        write(path, data, **options)

    monkeypatch.setattr(sqlite, "write_file", fails)
    with Served(pipe, tmp_path / "data") as served:
        assert served.draw()["status"] == "Ready"
    assert failed == 3


def test_not_ready_while_nothing_can_be_written(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limner.server.jobs.store._CHECK_SECONDS", 0.0)
    with Served(pipe, tmp_path / "data") as served:
        assert served.http.get("/readyz").json() == {"status": "ready"}
        with monkeypatch.context() as patched:

            def full(path: Path, data: bytes, **_: Any) -> None:
                raise OutputError("output: full") from OSError(errno.ENOSPC, "No space left on device")

            patched.setattr(sqlite, "write_file", full)
            answer = served.http.get("/readyz")
            assert answer.status_code == 503
            assert answer.json() == {"status": "the job store fails: No space left on device"}
        assert served.http.get("/readyz").status_code == 200
        assert not (served.data / "probe").exists()
