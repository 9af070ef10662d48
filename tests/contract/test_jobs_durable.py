"""Jobs that outlive the process, idempotency keys, events, shutdown, and a disk that fails."""

from __future__ import annotations

import io
import json
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.serving import BOB, KEYS, SIZE, Served, opened, png, text, types
from tests.support.tiny import Gate

from limner import Pipeline
from limner.errors import OutputError
from limner.server import run
from limner.server.jobs.settings import RunnerSettings
from limner.server.jobs.storage import StorageInUse
from limner.server.jobs.store import JobStore
from limner.server.logs import log_everything

KEY = {"Idempotency-Key": "once"}


@pytest.fixture
def served(pipe: Pipeline, tmp_path: Path) -> Iterator[Served]:
    with Served(pipe, tmp_path / "data") as served:
        yield served


def test_an_idempotency_key_makes_one_job(served: Served, pipe: Pipeline, tmp_path: Path) -> None:
    body = {"prompt": "a", **SIZE, "input_image": text(png())}

    def post(key: str = "once", path: str = "/v1/edit", **more: Any) -> httpx.Response:
        return served.http.post(path, json={**body, **more}, headers={"Idempotency-Key": key})

    first = post()
    assert first.status_code == 200
    again = [post() for _ in range(3)]
    assert [answer.json() for answer in again] == [first.json()] * 3
    for more in (
        {"prompt": "b"},
        {"seed": 1},
        {"input_image": text(png(seed=2))},
        {"num_images": 2},
        {"width": 80},
        {"safety_tolerance": 3},
        {"output_format": "png"},
    ):
        answer = post(**more)
        assert answer.status_code == 409, more
        types(answer)
    assert len(served.files("inputs")) == 1  # that of the refused one is not kept
    assert post("two").json()["id"] != first.json()["id"]
    assert post("seeded", seed=4).json() == post("seeded", seed=4).json()
    for key in ("", "x" * 256):
        assert post(key).status_code == 422
    served.poll(first.json()["id"])
    served.stop()
    with Served(pipe, tmp_path / "data") as after:
        answer = after.http.post("/v1/edit", json=body, headers=KEY)
        assert answer.json()["id"] == first.json()["id"]
        assert after.http.post("/v1/edit", json={**body, "prompt": "b"}, headers=KEY).status_code == 409


def test_an_idempotency_key_is_of_its_owner(pipe: Pipeline, tmp_path: Path) -> None:
    with Served(pipe, tmp_path / "data", keys=KEYS) as served:
        hers = served.submit(headers=KEY)["id"]
        assert served.submit(headers={**KEY, "x-key": BOB})["id"] != hers
        assert served.submit(headers=KEY)["id"] == hers


def test_requests_at_once_under_one_key_make_one_job(served: Served) -> None:
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.append(served.submit(headers=KEY)["id"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 1
    served.poll(ids[0])
    assert sum(served.service.jobs.counts().values()) == 1
    assert served.service.limiter.num_owners <= 1


def test_a_restart_takes_up_what_was_left(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, gate = tmp_path / "data", Gate(monkeypatch)
    with Served(pipe, data, drain=0.2) as served:
        done = served.draw(seed=1, output_format="png")
        gate.shut()
        ids = [served.submit(seed=seed, input_image=text(png(seed=seed)), output_format="png")["id"] for seed in (1, 2)]
        assert gate.entered.wait(60)

        def dropped() -> None:  # what runs has to end before the engine's thread can
            while served.engine.is_alive or served.engine.stats().waiting:
                time.sleep(0.01)
            gate.open()

        threading.Thread(target=dropped).start()
    store = JobStore(data)
    assert {job.id for job in store.pending()} == set(ids)
    store.close()
    with Served(pipe, data) as after:
        found = [after.poll(id_) for id_ in ids]
        assert [result["status"] for result in found] == ["Ready"] * 2
        assert after.poll(done["id"])["result"]["seed"] == 1
        assert (
            after.http.get(httpx.URL(done["result"]["sample"]).raw_path.decode()).status_code == 200
        )  # the same secret
        straight = after.draw(seed=2, input_image=text(png(seed=2)), output_format="png")
        pictures = [opened(httpx.get(r["result"]["sample"]).content) for r in (found[1], straight)]
        assert pictures[0].tobytes() == pictures[1].tobytes()
        assert len(after.files("results")) == 4


def test_a_job_on_its_way_to_the_engine_is_left_too(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    with Served(pipe, data, drain=0.2) as served:
        read = served.service.jobs.picture

        def slow(report: Any) -> Any:
            end = time.monotonic() + 60
            while served.engine.is_alive:
                assert time.monotonic() < end
                time.sleep(0.01)
            return read(report)

        monkeypatch.setattr(served.service.jobs, "picture", slow)
        id_ = served.submit(input_image=text(png()))["id"]
    with Served(pipe, data) as after:
        assert after.poll(id_)["status"] == "Ready"


def test_a_running_job_is_finished_before_the_server_ends(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    answers: list[int] = []
    with Served(pipe, tmp_path / "data") as served:
        gate.shut()
        body = {"prompt": "a", "size": "64x64"}
        waiting = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=60).status_code
            )
        )
        waiting.start()
        assert gate.entered.wait(60)
        id_ = served.submit()["id"]
        ready = served.http.get("/readyz").status_code
        served.server.should_exit = True
        end = time.monotonic() + 60
        while served.service.ready:
            assert time.monotonic() < end
            time.sleep(0.01)
        gate.open()
        waiting.join(60)
    assert (ready, answers) == (200, [200])
    store = JobStore(tmp_path / "data")
    assert store.get(id_).status == "ready"  # type: ignore[union-attr]
    store.close()


def test_who_comes_second_ends_before_it_loads_a_model_or_stands_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = run.ServeOptions(host="127.0.0.1", port=0, data=str(tmp_path), keys=None)
    first = JobStore(tmp_path)
    monkeypatch.setattr(run, "log_everything", lambda form: None)

    def load() -> Pipeline:
        raise AssertionError("it loads")

    with pytest.raises(StorageInUse, match="is used by another server"):
        run.serve(load, options, model_name="m")
    with pytest.raises(AssertionError, match="it loads"):  # on standby it does that first
        run.serve(load, replace(options, standby=True), model_name="m")

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            first.close()

    waits: list[float] = []
    monkeypatch.setattr(run.time, "sleep", wait)
    caplog.set_level(logging.INFO, "limner.server")
    run.open_jobs(replace(options, standby=True)).close()
    assert len(waits) == 3
    assert caplog.text.count("standby") == 1  # it is told once


def test_results_expire(pipe: Pipeline, tmp_path: Path) -> None:
    runner = RunnerSettings(keep_results=0.3, keep_jobs=0.3, clean_every=0.1)
    with Served(pipe, tmp_path / "data", runner=runner) as served:
        found = served.draw(input_image=text(png()))
        sample = found["result"]["sample"]
        end = time.monotonic() + 60
        while served.files("results") or served.files("inputs"):
            assert time.monotonic() < end
            time.sleep(0.05)
        answer = httpx.get(sample)
        assert answer.status_code == 404
        types(answer)
        assert served.http.get("/v1/get_result", params={"id": found["id"]}).json()["status"] == "Task not found"


def test_events(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.shut()
    id_ = served.submit()["id"]
    threading.Timer(0.2, gate.open).start()
    with served.http.stream("GET", f"/v1/jobs/{id_}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.partition(": ") for line in answer.iter_lines() if line]
    names = [value for name, _, value in events if name == "event"]
    entries = [json.loads(value) for name, _, value in events if name == "data"]
    assert names[0] in ("queued", "running")
    assert names[-1] == "ready"
    progress = [entry["progress"] for entry in entries]
    assert progress == sorted(progress)
    assert entries[-1]["result"]["sample"].startswith(served.url)
    assert [entry["status"] for entry in entries[:-1]] == ["pending"] * (len(entries) - 1)
    with served.http.stream("GET", f"/v1/jobs/{id_}/events") as answer:  # of one that has ended
        assert [line for line in answer.iter_lines() if line.startswith("event")] == ["event: ready"]
    listed = served.http.get("/v1/jobs", params={"limit": 1}).json()["data"]
    assert [entry["id"] for entry in listed] == [id_]
    assert served.http.get(f"/v1/jobs/{id_}").json()["status"] == "ready"


def test_a_watcher_who_goes_away_is_forgotten(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.shut()
    id_ = served.submit()["id"]
    live = served.service.runner._live[id_]
    with served.http.stream("GET", f"/v1/jobs/{id_}/events") as answer:
        lines = answer.iter_lines()
        next(lines)
        assert len(live.feed.watchers) == 1
    end = time.monotonic() + 60
    while live.feed.watchers:
        assert time.monotonic() < end
        time.sleep(0.02)
    gate.open()
    served.poll(id_)
    assert not served.service.runner._live
    while len(served.service.runner._tasks):  # the last one ends within a turn of the loop
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_disk_that_fails_accepts_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.draw()

    class Broken:
        """The connection, of which writing fails as on a full disk."""

        in_transaction = False

        def __init__(self, inner: sqlite3.Connection) -> None:
            self.inner = inner

        def execute(self, query: str, *values: Any) -> Any:
            if query.startswith(("INSERT", "UPDATE")):
                raise sqlite3.OperationalError("database or disk is full")
            return self.inner.execute(query, *values)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    jobs = served.service.jobs
    body = {"prompt": "a", **SIZE, "input_image": text(png(seed=50))}
    with monkeypatch.context() as patched:
        storage = jobs._storage
        patched.setattr(storage, "_db", Broken(storage._db))  # type: ignore[attr-defined]
        storage._db.__class__.in_transaction = property(  # type: ignore[attr-defined]
            lambda self: self.inner.in_transaction
        )
        answer = served.http.post("/v1/edit", json=body)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        types(answer)
        assert str(served.data) not in answer.text
        answer = served.http.post("/v1/images/generations", json={"prompt": "a", "size": "64x64"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert served.http.post("/v1/references", json={"images": [text(png(seed=51))]}).status_code == 503
    assert served.files("inputs") == []
    assert served.service.limiter.num_owners <= 1
    assert jobs.counts() == {"ready": 1}
    assert served.draw()["status"] == "Ready"


def test_a_job_whose_end_cannot_be_written_ends_when_it_can(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, tried = served.service.jobs, threading.Event()

    def fails(*_: Any, **__: Any) -> None:
        tried.set()
        raise OutputError("full")

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "end", fails)
        id_ = served.submit()["id"]
        assert tried.wait(60)
        assert served.http.get("/v1/get_result", params={"id": id_}).json()["status"] == "Pending"
    assert served.poll(id_)["status"] == "Ready"


def test_health_and_metrics(served: Served) -> None:
    assert served.http.get("/healthz").json()["status"] == "ok"
    assert served.http.get("/readyz").json() == {"status": "ready"}
    served.draw(input_image=text(png()), num_images=2)
    served.http.request("BREW", "/v1/edit")
    served.http.get("/v1/nothing/../here")
    answer = served.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples: dict[str, float] = {}
    labels: list[dict[str, str]] = []
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            samples[sample.name] = samples.get(sample.name, 0) + sample.value
            labels.append(sample.labels)
    assert samples["limner_engine_images_total"] == 2
    assert samples["limner_engine_finished_total"] == 1
    assert samples["limner_references_misses_total"] == 1
    assert samples["limner_jobs_live"] == 0
    assert samples["limner_jobs"] == 1
    methods = {found["method"] for found in labels if "method" in found}
    assert methods == {"GET", "POST", "other"}
    routes = {found["route"] for found in labels if "route" in found}
    assert {"/v1/edit", "/v1/get_result", "/readyz", "other"} <= routes
    assert not any("nothing" in route for route in routes)


def test_a_server_without_keys_is_for_this_machine(served: Served) -> None:
    body = {"prompt": "a", **SIZE}
    for host in ("localhost", f"127.0.0.1:{served.port}", "[::1]:80"):
        assert served.http.get("/healthz", headers={"host": host}).status_code == 200
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "a@127.0.0.1",
        "[::1",
        "testserver",
    ):
        answer = served.http.post("/v1/edit", json=body, headers={"host": host})
        assert answer.status_code == 400, host
        types(answer)
    for origin in ("https://evil.example", "null", "http://localhost.evil.example"):
        assert served.http.post("/v1/edit", json=body, headers={"origin": origin}).status_code == 400
    assert served.http.post("/v1/edit", json=body, headers={"origin": served.url}).status_code == 200


def test_logs_are_lines_of_json(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in ("limner", "uvicorn")]
    before = root.handlers[:], root.level, [(one.handlers[:], one.level, one.propagate) for one in loggers]
    try:
        log_everything("json")
        served.draw(prompt='{"level": "quiet"}\n"')
        logging.getLogger("limner.server").error("%s", 'no\nnew line "', exc_info=ValueError("x"))
        logging.getLogger("uvicorn.error").info("started")
        logging.getLogger("other").warning("careful")
        logging.getLogger("other").info("not told")
    finally:
        logging.captureWarnings(False)
        root.handlers, root.level = before[0], before[1]
        for one, (handlers, level, propagate) in zip(loggers, before[2], strict=True):
            one.handlers, one.level, one.propagate = handlers, level, propagate
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert all({"time", "level"} <= set(line) for line in lines)
    events = [line for line in lines if line.get("event") == "request"]
    assert {"method", "route", "status", "ms", "owner"} <= set(events[0])
    (ended,) = (line for line in lines if line.get("event") == "job")
    assert ended["status"] == "ready"
    assert [line["message"] for line in lines if "message" in line] == ['no\nnew line "', "started", "careful"]
    assert "ValueError: x" in next(line for line in lines if line["level"] == "error")["exception"]


def test_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    """One process, as it is run: serves, logs JSON, and ends well on a signal."""
    words = [sys.executable, "-m", "limner", "serve", "--port", "0", "--model", tiny_folder, "--unsafe-no-checks"]
    process = subprocess.Popen([*map(str, words), "--data", str(tmp_path / "data")], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if "Uvicorn running" in line:
                break
        url = json.loads(lines[-1])["message"].split("running on ")[1].split(" ")[0]
        answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", "size": "64x64"}, timeout=60)
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        rest, code = process.stderr.read(), process.wait(60)
    finally:
        process.kill()
        process.stderr.close()
    assert code in (0, -signal.SIGTERM)
    assert all(isinstance(json.loads(line), dict) for line in [*lines, *rest.splitlines()])
    done = subprocess.run(
        [*map(str, words), "--data", str(tmp_path / "data"), "--host", "0.0.0.0"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "can be reached from other machines, and there are no keys" in done.stderr
