"""Connections and event streams of one caller leave room for others, and a lack of files ends no job."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.certificates import Authority
from tests.support.serving import ANNA, BOB, KEYS, Served

from limner import Pipeline
from limner.errors import OutputError
from limner.server import descriptors
from limner.server.access import bodies
from limner.server.http.connection import HastyProtocol, Intake
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


def test_handshakes_that_do_not_end_are_few_and_short(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "max_connections", lambda: 16)
    certificate = Authority().server_file("localhost", tmp_path)
    with Served(pipe, tmp_path / "data", certificate=certificate) as served:
        idle = [socket.create_connection(("127.0.0.1", served.port), timeout=60) for _ in range(30)]
        idle[1].sendall(b"\x16\x03\x01\x02\x00\x01")
        idle[2].sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert served.draw()["status"] == "Ready"
        assert served.http.get("/healthz").status_code == 200
        assert served.submit()["polling_url"].startswith("https://")
        assert idle[0].recv(100) == b""  # closed: it was the oldest
        for connection in idle:
            connection.close()
    monkeypatch.setattr(HastyProtocol, "head_seconds", 0.2)
    with Served(pipe, tmp_path / "other", certificate=certificate) as served:
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
            assert connection.recv(100) == b""  # not before its time is over: it is alone
        # a request that comes in one piece with the end of the handshake
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    connection.sendall(outgoing.read())
                    incoming.write(connection.recv(65536))
            tls.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            connection.sendall(outgoing.read())
            answer = b""
            while b"ok" not in answer:
                incoming.write(connection.recv(65536))
                with contextlib.suppress(ssl.SSLWantReadError):
                    answer += tls.read(65536)
            assert answer.startswith(b"HTTP/1.1 200")


def test_a_caller_who_reads_nothing_is_left(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such callers would hold answers in memory, and places of event streams, for any time."""
    monkeypatch.setattr(HastyProtocol, "write_seconds", 0.1)
    with Served(pipe, tmp_path / "data") as served:
        page = served.http.get("/openapi.json").content
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(60)
            connection.connect(("127.0.0.1", served.port))
            request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
            connection.sendall(request * 500)  # more than buffers of sockets take
            assert len(page) * 500 > 16 << 20
            end = time.monotonic() + 60
            while len(served.server.server_state.connections) > 1:  # that of `served.http`
                assert time.monotonic() < end
                time.sleep(0.02)
        assert served.draw()["status"] == "Ready"


def test_one_who_reads_slowly_has_time(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HastyProtocol, "write_seconds", 0.2)
    with Served(pipe, tmp_path / "data") as served, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", served.port))
        request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(request * 100)
        count, tail, reads = 0, b"", 0
        while count < 100:
            found = connection.recv(1 << 16)
            assert found, f"closed after {count} answers"
            count += (tail + found).count(b"HTTP/1.1 200") - tail.count(b"HTTP/1.1 200")
            tail, reads = found[-11:], reads + 1
            if reads % 20 == 0:
                time.sleep(0.02)


def test_a_body_in_crumbs_is_refused(pipe: Pipeline, tmp_path: Path) -> None:
    """Each chunk is parsed in the event loop: a body of 256 kB in chunks of a byte held it for half a second."""
    head = b"POST /v1/edit HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"

    def status(body: bytes, size: int) -> bytes:
        chunks = [body[at : at + size] for at in range(0, len(body), size)]
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head + b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in chunks) + b"0\r\n\r\n")
            return connection.recv(12)

    with Served(pipe, tmp_path / "data") as served:
        assert status(b'{"prompt": "a", "width": 64, "height": 64}' + b" " * 800, 1) == b"HTTP/1.1 200"
        assert status(b'{"prompt": "a", "width": 64, "height": 64}' + b" " * 300_000, 256) == b"HTTP/1.1 200"
        assert status(b'{"prompt": "a", "width": 64, "height": 64}' + b" " * 300_000, 1) == b"HTTP/1.1 400"


def test_a_caller_who_sends_no_chunk_makes_nobody_wait(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is there before the body, and what follows is none: uvicorn raises where it would send its 400."""
    is_open = Intake.is_open
    monkeypatch.setattr(Intake, "is_open", lambda intake, loop: is_open(intake, loop) and False)  # as in a crowd
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with Served(pipe, tmp_path / "data") as served:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
                connection.sendall(head)
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
                connection.sendall(b"zz\r\n")
                with contextlib.suppress(ConnectionError):
                    while connection.recv(65536):
                        pass
            assert httpx.get(f"{served.url}/healthz", timeout=20).status_code == 200


def test_slow_bodies_of_one_owner_stop_no_other(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "_COMING", 4)
    head = b"POST /v1/edit HTTP/1.1\r\nHost: localhost\r\nX-Key: %b\r\nContent-Length: 2000\r\n\r\n" % ANNA.encode()
    with Served(pipe, tmp_path / "data", keys=KEYS, max_buffered_bytes=4000) as served:
        slow = [socket.create_connection(("127.0.0.1", served.port), timeout=60) for _ in range(6)]
        for connection in slow:
            connection.sendall(head + b" " * 240)
        refused = [connection for connection in slow if select.select([connection], [], [], 1.0)[0]]
        answers = [connection.recv(65536) for connection in refused]
        assert len(answers) == 2
        assert all(answer.startswith(b"HTTP/1.1 429") and b"retry-after: 5" in answer for answer in answers)
        bob = {"x-key": BOB}
        answer = served.http.post("/v1/edit", json={"prompt": "a", "width": 64, "height": 64}, headers=bob)
        assert answer.status_code == 200, answer.text
        mine = served.http.post("/v1/edit", json={"prompt": "a" * 500})
        assert mine.status_code == 429
        for connection in slow:
            connection.close()
        assert served.poll(answer.json()["id"], headers=bob)["status"] == "Ready"
        while served.http.post("/v1/edit", json={"prompt": "a", "width": 64, "height": 64}).status_code == 429:
            time.sleep(0.01)  # until the connections are seen to be closed


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
