"""The service whose jobs are in PostgreSQL: a restart, a database that stops, an answer of it that is lost."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest
from tests.support.postgres import PROGRAMS, WHY, Server
from tests.support.serving import SIZE, Served, opened, png, text, types
from tests.support.tiny import Gate

from limner import Pipeline
from limner.server.jobs import postgres
from limner.server.jobs import runner as running
from limner.server.jobs.records import Job
from limner.server.jobs.settings import RunnerSettings
from limner.server.jobs.storage import StorageUnavailable

pytestmark = pytest.mark.skipif(not PROGRAMS, reason=WHY)


def test_a_restart_finds_jobs_results_and_references(
    server: Server, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, gate = server.url(), Gate(monkeypatch)
    with Served(pipe, url, drain=0.2) as served:
        kept = served.http.post("/v1/references", json={"images": [text(png())]}).json()["id"]
        done = served.draw(seed=1, input_image=text(png()), output_format="png")
        assert done["status"] == "Ready"
        gate.shut()
        left = served.submit(seed=2, input_image=text(png()))["id"]
        assert gate.entered.wait(60)

        def dropped() -> None:
            while served.engine.is_alive or served.engine.stats().waiting:
                time.sleep(0.01)
            gate.open()

        threading.Thread(target=dropped).start()
    with Served(pipe, url) as after:
        assert after.poll(left)["status"] == "Ready"
        path = httpx.URL(done["result"]["sample"]).raw_path.decode()
        assert opened(after.http.get(path).content).size == (64, 64)
        assert after.http.get(f"/v1/references/{kept}").status_code == 200


def test_a_database_that_stops_loses_no_job(server: Server, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_RECONNECT_SECONDS", 0.2)
    monkeypatch.setattr(postgres, "_AGAIN_SECONDS", 0.1)
    gate = Gate(monkeypatch)
    with Served(pipe, server.url()) as served:
        gate.shut()
        ids = [served.submit(seed=seed, input_image=text(png(seed=seed)))["id"] for seed in (1, 2)]
        assert gate.entered.wait(60)
        server.stop("immediate")
        try:
            answer = served.http.post("/v1/edit", json={"prompt": "a", **SIZE})
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            types(answer)
            assert "postgresql" not in answer.text
            assert served.http.get("/readyz").json() == {"status": "the job store fails"}
            gate.open()
            time.sleep(1.0)  # they are drawn, and cannot be written
        finally:
            server.start()
        end = time.monotonic() + 60
        while served.http.get("/readyz").status_code != 200:  # until it is connected again, nobody learns of his job
            assert time.monotonic() < end
            time.sleep(0.05)
        assert [served.poll(id_)["status"] for id_ in ids] == ["Ready", "Ready"]
        assert served.draw()["status"] == "Ready"


def test_a_job_whose_caller_heard_of_a_failure_is_not_left_behind(
    server: Server, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_LOST_SECONDS", 0.2)
    with Served(pipe, server.url(), runner=RunnerSettings(clean_every=0.1)) as served:
        add, made = served.service.jobs.add, []

        def unheard(job: Job, *args: Any, **kwargs: Any) -> Any:
            made.append(job.id)
            add(job, *args, **kwargs)
            raise StorageUnavailable("data: the answer is lost")

        monkeypatch.setattr(served.service.jobs, "add", unheard)
        assert served.http.post("/v1/edit", json={"prompt": "a", **SIZE}).status_code == 503
        monkeypatch.setattr(served.service.jobs, "add", add)
        assert served.poll(made[0])["status"] == "Ready"
        monkeypatch.setattr(running, "_LOST_SECONDS", 1000.0)
        monkeypatch.setattr(served.service.jobs, "add", unheard)
        body, key = {"prompt": "a", **SIZE}, {"Idempotency-Key": "once"}
        assert served.http.post("/v1/edit", json=body, headers=key).status_code == 503
        monkeypatch.setattr(served.service.jobs, "add", add)
        assert served.http.post("/v1/edit", json=body, headers=key).json()["id"] == made[1]
        assert served.poll(made[1])["status"] == "Ready"  # at once where it is asked for again
        assert served.service.runner._num_admitted == 0
        assert served.service.limiter.num_owners <= 1
