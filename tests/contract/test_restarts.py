"""What a restart finds: more jobs than may wait, a folder that cannot be written, and what the next version wrote."""

from __future__ import annotations

import errno
import json
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.serving import ANNA, BOB, KEYS, Served, png, text
from tests.support.tiny import Gate

from limner import Pipeline
from limner.errors import OutputError
from limner.server.jobs import offload, sqlite
from limner.server.jobs.store import JobStore


def left_behind(pipe: Pipeline, data: Path, gate: Gate, *, number: int) -> list[str]:
    """Jobs with a picture each that a server leaves pending; every fourth is Bob's."""
    gate.shut()
    with Served(pipe, data, keys=KEYS, drain=0.1) as served:
        ids = []
        for seed in range(number):
            headers = {"x-key": BOB if seed % 4 == 3 else ANNA}
            ids.append(served.submit(seed=seed, input_image=text(png(seed=seed)), headers=headers)["id"])

        def open_later() -> None:
            while served.engine.is_alive or served.engine.stats().waiting:
                time.sleep(0.01)
            gate.open()

        opening = threading.Thread(target=open_later)
        opening.start()
    opening.join()
    store = JobStore(data)
    left = [job.id for job in store.pending()]
    store.close()
    return [id_ for id_ in ids if id_ in left]


def test_more_jobs_than_may_wait_are_taken_up_a_few_at_a_time(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their pictures would be in memory all at once; and none of them waits for all of another owner's."""
    data, gate = tmp_path / "data", Gate(monkeypatch)
    left = left_behind(pipe, data, gate, number=16)
    assert len(left) >= 14
    gate.shut()
    with Served(pipe, data, keys=KEYS, max_waiting=3, max_batch=1, drain=0.1) as served:
        end = time.monotonic() + 60
        while served.engine.stats().waiting < 3:
            assert time.monotonic() < end
            time.sleep(0.01)
        runner = served.service.runner
        assert runner.num_live == len(left)
        assert served.engine.stats().waiting <= 4
        backlog = list(runner._backlog.values())
        assert len(backlog) >= len(left) - 5
        assert {job.owner for job in backlog[:2]} == {job.owner for job in backlog}  # in turns
        mine = next(job.id for job in backlog if job.owner == KEYS.identify({"x-key": ANNA}).id)
        assert served.http.get(f"/v1/jobs/{mine}").json()["status"] == "pending"
        cancelled = served.http.delete(f"/v1/jobs/{mine}").json()
        assert cancelled["status"] == "cancelled"
        gate.open()
        for id_ in left:
            headers = {"x-key": BOB if served.service.jobs.get(id_).owner != backlog[0].owner else ANNA}
            found = [served.poll(id_, headers={"x-key": key}) for key in (ANNA, BOB)]
            states = {one["status"] for one in found} - {"Task not found"}
            assert states == ({"Error"} if id_ == mine else {"Ready"}), headers
        assert (runner.num_live, runner._num_admitted) == (0, 0)
    left = left_behind(pipe, tmp_path / "other", gate, number=8)
    gate.shut()
    start = time.monotonic()
    with Served(pipe, tmp_path / "other", keys=KEYS, max_waiting=1, max_batch=1, drain=0.1) as served:
        while not served.engine.stats().waiting:
            time.sleep(0.01)
        threading.Timer(0.3, gate.open).start()  # what runs has to end
    assert time.monotonic() - start < 20  # those that have not begun are not waited for
    store = JobStore(tmp_path / "other")
    assert len(store.pending()) >= len(left) - 4
    store.close()


def test_a_folder_that_becomes_read_only_loses_nothing(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(offload, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr("limner.server.jobs.store._CHECK_SECONDS", 0.0)
    gate = Gate(monkeypatch)
    with Served(pipe, tmp_path / "data") as served:
        done = served.draw()
        gate.shut()
        id_ = served.submit(input_image=text(png()))["id"]
        assert gate.entered.wait(60)
        db = served.service.jobs._storage._db
        with monkeypatch.context() as patched:

            def refuse(path: Path, data: bytes, **_: Any) -> None:
                raise OutputError(f"output: {path} is not written") from OSError(errno.EROFS, "Read-only file system")

            patched.setattr(sqlite, "write_file", refuse)
            served.service.offload._store_thread.submit(db.execute, "PRAGMA query_only = ON").result()
            gate.open()
            answer = served.http.get("/readyz")
            assert (answer.status_code, answer.json()) == (
                503,
                {"status": "the job store fails: Read-only file system"},
            )
            for body in ({"prompt": "a"}, {"prompt": "a", "input_image": text(png(seed=5))}):
                refused = served.http.post("/v1/edit", json={**body, "width": 64, "height": 64})
                assert refused.status_code == 503
                assert "retry-after" in refused.headers
            assert served.http.get(done["result"]["sample"]).status_code == 200
            time.sleep(0.2)
            assert served.http.get(f"/v1/jobs/{id_}").json()["status"] == "pending"
        served.service.offload._store_thread.submit(db.execute, "PRAGMA query_only = OFF").result()
        assert served.poll(id_)["status"] == "Ready"
        assert served.http.get("/readyz").status_code == 200


def test_a_folder_of_the_next_version_is_served(pipe: Pipeline, tmp_path: Path) -> None:
    """Rolling back: tables and columns that are not known, and values that are not, in a folder of the same schema."""
    data = tmp_path / "data"
    with Served(pipe, data) as served:
        done = served.draw(input_image=text(png()))
        handle = served.http.post("/v1/references", json={"images": [text(png(seed=1))]}).json()
        other = served.http.post("/v1/references", json={"images": [text(png(seed=2))]}).json()
    db = sqlite3.connect(data / "jobs.sqlite")
    for table in ("jobs", "handles", "uses", "spent"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN added TEXT NOT NULL DEFAULT 'x'")
    db.execute("CREATE TABLE projects (id TEXT PRIMARY KEY, jobs TEXT)")
    db.execute("CREATE INDEX jobs_added ON jobs (added)")
    (request,) = db.execute("SELECT request FROM jobs").fetchone()
    values = json.loads(request)
    columns = "INSERT INTO jobs (id, owner, created, status, request, added) SELECT ?, owner, created, ?, ?, 'y' FROM jobs LIMIT 1"
    db.execute(columns, ("new-field", "pending", json.dumps({**values, "mask": "m"})))
    db.execute(columns, ("new-status", "paused", request))
    db.execute(columns, ("plain", "pending", json.dumps({**values, "references": []})))
    described = json.loads(db.execute("SELECT described FROM handles WHERE key = ?", (handle["id"],)).fetchone()[0])
    db.execute("UPDATE handles SET described = ? WHERE key = ?", (json.dumps({**described, "new": 1}), handle["id"]))
    db.execute("UPDATE handles SET described = '{\"version\": 2}' WHERE key = ?", (other["id"],))
    db.commit()
    db.close()
    with Served(pipe, data) as served:
        assert served.poll("plain")["status"] == "Ready"
        assert served.poll(done["id"])["status"] == "Ready"
        assert served.http.get(httpx_path(done["result"]["sample"])).status_code == 200
        states = {one["id"]: (one["status"], (one["details"] or {}).get("state")) for one in jobs(served)}
        assert states["new-field"] == states["new-status"] == ("pending", "set aside")
        assert served.draw(references=handle["id"])["status"] == "Ready"
        assert served.http.get(f"/v1/references/{other['id']}").status_code == 404
        assert [one["id"] for one in served.http.get("/v1/references").json()["data"]] == [handle["id"]]
        again = served.http.post("/v1/references", json={"images": [text(png(seed=3))]})
        assert again.status_code == 201
        assert served.http.delete(f"/v1/references/{again.json()['id']}").json()["deleted"]
        assert served.draw(input_image=text(png(seed=4)))["status"] == "Ready"
    db = sqlite3.connect(data / "jobs.sqlite")
    kept = dict(db.execute("SELECT id, added FROM jobs WHERE added = 'y'").fetchall())
    assert kept.keys() == {"new-field", "new-status", "plain"}
    db.close()


def jobs(served: Served) -> list[dict[str, Any]]:
    return list(served.http.get("/v1/jobs").json()["data"])


def httpx_path(url: str) -> str:
    return "/v1/" + url.split("/v1/")[1]
