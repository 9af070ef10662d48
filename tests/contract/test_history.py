"""The history over HTTP: how long results are kept, jobs that are removed, what there is to read of the model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.support.serving import ANNA, BOB, KEYS, Served, png, text
from tests.support.tiny import Gate

from limner import Pipeline
from limner.engine.about import ModelAbout
from limner.images import encode
from limner.options import ServeOptions
from limner.server.jobs.settings import FOR_GOOD, RunnerSettings


@pytest.fixture
def served(pipe: Pipeline, tmp_path: Path) -> Any:
    about = ModelAbout(card="# It draws", words=("a", "ball"))
    with Served(pipe, tmp_path / "data", keys=KEYS, about=about) as served:
        yield served


def test_a_service_without_keys_keeps_a_history_that_room_limits() -> None:
    alone, keyed = (RunnerSettings.of(ServeOptions(), is_open=is_open) for is_open in (True, False))
    assert (alone.keep_results, alone.keep_bytes) == (FOR_GOOD, 2 << 30)
    assert (keyed.keep_results, keyed.keep_bytes) == (600, None)
    told = RunnerSettings.of(ServeOptions(keep_results=5, keep_bytes=7), is_open=True)
    assert (told.keep_results, told.keep_bytes) == (5, 7)


def test_a_job_is_removed_with_its_pictures_and_only_by_its_owner(served: Served) -> None:
    first, second = (served.draw(input_image=text(png(seed=1)), seed=seed) for seed in (1, 2))
    ids = [found["id"] for found in (first, second)]
    assert served.http.delete(f"/v1/jobs/{ids[0]}", headers={"x-key": BOB}).status_code == 404
    assert served.http.delete(f"/v1/jobs/{ids[0]}").json()["status"] == "ready"  # it has ended, and stays
    answer = served.http.delete(f"/v1/jobs/{ids[0]}", params={"forget": True})
    assert (answer.status_code, answer.json()["id"]) == (200, ids[0])
    assert served.http.get(f"/v1/jobs/{ids[0]}").status_code == 404
    assert served.http.get(first["result"]["sample"]).status_code == 404
    assert served.http.get(second["result"]["sample"]).status_code == 200
    assert len(served.files("inputs")) == 1
    assert served.http.delete("/v1/jobs", headers={"x-key": BOB}).json() == {"deleted": 0}
    assert served.http.delete("/v1/jobs").json() == {"deleted": 1}
    assert served.files("inputs") == served.files("results") == []


def test_a_removed_job_whose_webhook_is_due_is_not_found(served: Served) -> None:
    """Its row stays until the webhook is delivered; who asks for the job is told that it is gone."""
    mask = encode(Image.new("L", (64, 64), 255), "png")
    body = {"prompt": "a", "canvas": text(png(seed=2)), "input_image": text(png(seed=1)), "mask": text(mask)}
    answer = served.http.post("/v1/edit", json=body, headers={"Idempotency-Key": "k"})
    id_ = answer.json()["id"]
    sample = served.poll(id_)["result"]["sample"]
    with served.service.jobs._storage.transaction() as db:
        db.execute("UPDATE jobs SET webhook_due = ?, webhook_attempts = 1 WHERE id = ?", (1e12, id_))  # tried once
    names = ("references/1.png", "canvas.png", "mask.png", "events")
    paths = [f"/v1/jobs/{id_}", f"/v1/get_result?id={id_}", sample, *(f"/v1/jobs/{id_}/{name}" for name in names)]
    assert [served.http.get(path).status_code for path in paths] == [200] * 7
    assert served.http.delete("/v1/jobs").json() == {"deleted": 1}
    assert sum(served.service.jobs.counts().values()) == 1
    assert [served.http.get(path).status_code for path in paths] == [404] * 7
    assert served.http.get("/v1/jobs").json()["data"] == []
    assert served.http.delete(f"/v1/jobs/{id_}").status_code == 404
    again = served.http.post("/v1/edit", json=body, headers={"Idempotency-Key": "k"})
    assert again.status_code == 200
    assert again.json()["id"] != id_


def test_a_running_job_is_cancelled_and_removed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.shut()
    first = served.submit()["id"]
    assert gate.entered.wait(60)
    waiting = served.submit()["id"]
    assert served.http.delete("/v1/jobs").json() == {"deleted": 0}  # none has ended
    assert served.http.delete(f"/v1/jobs/{waiting}?forget=true").json()["status"] == "cancelled"
    assert served.http.get(f"/v1/jobs/{waiting}").status_code == 404
    gate.open()
    assert served.poll(first)["status"] == "Ready"


def test_jobs_are_listed_page_by_page(served: Served) -> None:
    ids = [served.submit(seed=seed)["id"] for seed in range(3)]
    for id_ in ids:
        served.poll(id_)
    newest = served.http.get("/v1/jobs", params={"limit": 2}).json()["data"]
    assert [one["id"] for one in newest] == [ids[2], ids[1]]
    rest = served.http.get("/v1/jobs", params={"limit": 2, "before": newest[-1]["created"]}).json()["data"]
    assert [one["id"] for one in rest] == [ids[0]]
    assert served.http.get("/v1/jobs", params={"before": "nan"}).status_code == 422


def test_the_oldest_jobs_go_when_there_is_no_room(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limner.server.jobs.room._YOUNG_SECONDS", 0.0)
    runner = RunnerSettings(keep_bytes=1, clean_every=0.05)
    with Served(pipe, tmp_path / "data", runner=runner) as served:
        id_, end = served.submit()["id"], time.monotonic() + 60
        while served.http.get("/v1/jobs").json()["data"]:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert served.http.get(f"/v1/jobs/{id_}").status_code == 404
        assert served.http.get("/v1/capabilities").json()["keep_bytes"] == 1


def test_what_there_is_to_read_of_the_model(served: Served) -> None:
    able = served.http.get("/v1/capabilities").json()
    assert (able["words"], able["loras"]) == (["a", "ball"], [])
    assert (able["keep_seconds"], able["keep_bytes"], able["fetch_urls"]) == (600, None, False)
    card = served.http.get("/v1/model-card")
    assert card.json() == {"model": able["model"], "card": "# It draws", "url": None}
    assert served.http.get("/v1/model-card", headers={"x-key": ""}).status_code == 403
    assert ANNA not in card.text
