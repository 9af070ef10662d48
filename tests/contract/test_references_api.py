"""References as resources: uploaded once, used in both dialects, for the key that made them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from tests.support.serving import ANNA, BOB, KEYS, Served, Words, opened, png, text, types

from limner import Pipeline, ReferenceStore
from limner.errors import RemoteError
from limner.images import prepare_reference
from limner.server.access.keys import OPERATOR, KeyRing
from limner.trust.safety import Checks

BOBS = {"x-key": BOB}


@pytest.fixture
def served(pipe: Pipeline, tmp_path: Path) -> Iterator[Served]:
    words = Words()
    with Served(pipe, tmp_path / "data", keys=KEYS, checks=Checks(checks=(words,)), max_handles=3) as served:
        served.words = words  # type: ignore[attr-defined]
        yield served


def upload(served: Served, *seeds: int, headers: Any = None, **fields: Any) -> dict[str, Any]:
    body = {"images": [text(png(96, 64, seed=s)) for s in seeds], **fields}
    answer = served.http.post("/v1/references", json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def test_forgetting_that_fails_can_be_asked_for_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made, store = upload(served, 1), served.service.engine.pipe.store
    path = f"/v1/references/{made['id']}"
    assert (
        served.http.post("/v1/references", json={"images": [text(png(96, 64, seed=1))]}, headers=BOBS).status_code
        == 201
    )

    def fail(key: str) -> bool:
        raise RemoteError("remote: s3://secret-bucket cannot be changed")

    with monkeypatch.context() as patched:
        patched.setattr(store, "remove", fail)
        assert served.http.delete(path, headers=BOBS).status_code == 200  # she has them still: nothing is removed
        answer = served.http.delete(path)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        types(answer)
        assert "secret-bucket" not in answer.text
    assert served.http.get(path).status_code == 200
    assert served.http.delete(path).status_code == 200
    assert made["id"] not in store


def test_a_store_that_machines_share(tiny_folder: Path, tmp_path: Path) -> None:
    """What another machine made is found, counted and forgotten."""
    url, image = f"file://{tmp_path}/far", png(96, 64, seed=1)
    store = ReferenceStore(remote=url)
    store.put(Pipeline.from_pretrained(tiny_folder).prefill(opened(image)))
    store.flush()
    pipe = Pipeline.from_pretrained(tiny_folder, store=ReferenceStore(remote=url))
    with Served(pipe, tmp_path / "data", keys=KEYS, shared_references=True) as served:
        made = upload(served, 1)
        assert (made["cache"], [made["id"]]) == ("remote", store.keys())
        assert made["seconds_saved"] > 0
        told = httpx.get(f"{served.url}/metrics", headers=BOBS).text
        assert 'limner_references_hits_total{tier="remote"} 1.0' in told
        assert 'limner_references_bytes{tier="remote"}' not in told
        assert served.http.delete(f"/v1/references/{made['id']}").json()["deleted"]
    assert store.keys() == []


def test_an_owner_is_told_of_no_hit_that_is_due_to_another(served: Served) -> None:
    """The first use of pictures is told as the miss that it is for somebody who is alone."""
    annas, pictures = upload(served, 1), {"images": [text(png(96, 64, seed=1))]}
    assert annas["cache"] == "miss"

    def ask(path: str) -> dict[str, Any]:
        answer = httpx.get(f"{served.url}{path}", headers=BOBS)
        assert answer.status_code == 200
        return dict(answer.json())

    # left to the first job: that the K/V are there is not told
    bobs = upload(served, 1, headers=BOBS, prefill=False)
    assert (bobs["id"], bobs["cache"], bobs["prefill_seconds"]) == (annas["id"], None, None)
    assert ask(f"/v1/references/{bobs['id']}")["cache"] is None
    # computed at the upload: the same
    bobs = upload(served, 1, headers=BOBS)
    assert (bobs["cache"], bobs["seconds_saved"]) == ("miss", 0.0)
    assert bobs["prefill_seconds"] > 0
    assert served.http.get("/v1/references").json()["data"][0]["prefill_seconds"] == annas["prefill_seconds"]
    # from now on they are his as well
    assert ask(f"/v1/references/{bobs['id']}")["cache"] == "memory"
    again = upload(served, 1, headers=BOBS)
    assert (again["cache"], again["seconds_saved"], again["prefill_seconds"]) == (
        "memory",
        bobs["prefill_seconds"],
        bobs["prefill_seconds"],
    )
    # once he has deleted them, they are another's again
    assert httpx.delete(f"{served.url}/v1/references/{bobs['id']}", headers=BOBS).status_code == 200
    assert upload(served, 1, headers=BOBS)["cache"] == "miss"
    assert served.http.get(f"/v1/references/{annas['id']}").json()["cache"] == "memory"
    assert httpx.post(f"{served.url}/v1/references", json=pictures, headers=BOBS).json()["cache"] == "memory"


def test_a_job_tells_of_no_hit_that_is_due_to_another(served: Served) -> None:
    picture = {"input_image": text(png(96, 64, seed=1)), "seed": 3}

    def told(headers: Any = None) -> dict[str, Any]:
        drawn = served.poll(served.submit(**picture, headers=headers)["id"], headers=headers)
        return dict(drawn["result"]["limner"])

    first, second = told(), told()
    assert (first["reference_cache"], first["seconds_saved"]) == ("miss", 0.0)
    assert second["reference_cache"] == "memory"
    bobs, again = told(BOBS), told(BOBS)
    assert bobs.keys() == first.keys()
    assert (bobs["reference_cache"], bobs["seconds_saved"], bobs["batch"]) == ("miss", 0.0, 1)
    assert bobs["timings"]["references"] > 0.8 * second["seconds_saved"]  # what a prefill takes, and not a look-up
    parts = bobs["timings"]
    assert parts["total"] == pytest.approx(parts["text"] + parts["references"] + sum(parts["steps"]) + parts["decode"])
    assert bobs["ran"] >= parts["references"]
    assert (again["reference_cache"], again["seconds_saved"]) == ("memory", round(parts["references"], 4))
    assert told()["seconds_saved"] == second["seconds_saved"]


def test_metrics_of_references_are_for_the_operator(pipe: Pipeline, tmp_path: Path) -> None:
    keys = KeyRing.from_environment(f"anna:{ANNA},{OPERATOR}:{BOB}")
    with Served(pipe, tmp_path / "data", keys=keys) as served:
        upload(served, 1)
        annas, all_ = (httpx.get(f"{served.url}/metrics", headers={"x-key": key}).text for key in (ANNA, BOB))
        for name in ("limner_references_misses", "limner_prefill_seconds", "limner_engine_prefills"):
            assert name not in annas
            assert name in all_
        assert "limner_engine_batches_total" in annas


def test_references_may_be_shared(pipe: Pipeline, tmp_path: Path) -> None:
    with Served(pipe, tmp_path / "data", keys=KEYS, shared_references=True) as served:
        made = upload(served, 1)
        bobs = upload(served, 1, headers=BOBS)
        assert (bobs["cache"], bobs["seconds_saved"]) == ("memory", made["prefill_seconds"])
        assert "limner_references_hits" in httpx.get(f"{served.url}/metrics", headers=BOBS).text


def test_one_upload_serves_both_dialects(served: Served) -> None:
    made = upload(served, 1, 2)
    assert (made["cache"], made["seconds_saved"], made["num_tokens"]) == ("miss", 0.0, 48)
    assert made["prefill_seconds"] > 0
    assert [report["processed_size"] for report in made["references"]] == [[96, 64]] * 2
    hosted = served.draw(references=made["id"], seed=3, output_format="png")["result"]
    told = hosted["limner"]
    assert (told["reference_cache"], told["reference_key"]) == ("memory", made["id"])
    assert told["seconds_saved"] > 0
    assert told["references"] == made["references"]
    sample = httpx.get(hosted["sample"]).content
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=ANNA, max_retries=0) as client:
        drawn = client.images.generate(
            prompt="a red ball", size="64x64", extra_body={"references": made["id"], "seed": 3}
        )
    assert drawn.limner["reference_cache"] == "memory"  # type: ignore[attr-defined]
    assert opened(base64.b64decode(drawn.data[0].b64_json)).tobytes() == opened(sample).tobytes()
    form = {"prompt": "a red ball", "size": "64x64", "references": made["id"], "seed": "3"}
    answer = served.http.post("/v1/images/edits", files=[(name, (None, value)) for name, value in form.items()])
    assert answer.json()["data"][0]["b64_json"] == drawn.data[0].b64_json
    # and the pictures themselves give what the handle gives
    names = {"input_image": text(png(96, 64, seed=1)), "input_image_2": text(png(96, 64, seed=2))}
    again = served.draw(**names, seed=3, output_format="png")["result"]
    assert again["limner"]["reference_cache"] == "memory"
    assert opened(httpx.get(again["sample"]).content).tobytes() == opened(sample).tobytes()


def test_it_can_be_listed_read_and_deleted(served: Served) -> None:
    first, second = upload(served, 1), upload(served, 2)
    assert upload(served, 1) | {"cache": 0, "seconds_saved": 0} == first | {"cache": 0, "seconds_saved": 0}
    listed = served.http.get("/v1/references").json()["data"]
    assert {entry["id"] for entry in listed} == {first["id"], second["id"]}
    one = served.http.get(f"/v1/references/{first['id']}").json()
    assert one["cache"] == "memory"
    picture = served.http.get(f"/v1/references/{first['id']}/1.png")
    wanted = prepare_reference(png(96, 64, seed=1), policy=served.service.engine.model.reference_policy)
    assert opened(picture.content).tobytes() == wanted.data
    for number in ("0", "2", "-1", "9" * 5000, "x"):
        assert served.http.get(f"/v1/references/{first['id']}/{number}.png").status_code in (404, 422)
    assert len(served.files("inputs")) == 2
    answer = served.http.delete(f"/v1/references/{first['id']}")
    assert answer.json() == {"id": first["id"], "deleted": True}
    assert first["id"] not in served.engine.pipe.store
    assert len(served.files("inputs")) == 1
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/1.png")):
        answer = served.http.request(method, f"/v1/references/{first['id']}{path}")
        assert answer.status_code == 404
        types(answer)
    assert served.http.post("/v1/edit", json={"prompt": "a", "references": first["id"]}).status_code == 404


def test_it_belongs_to_the_key_that_made_it(served: Served) -> None:
    made = upload(served, 1)
    path = f"/v1/references/{made['id']}"
    for method, where in (("GET", path), ("GET", f"{path}/1.png"), ("DELETE", path)):
        assert served.http.request(method, where, headers=BOBS).status_code == 404
    assert served.http.post("/v1/edit", json={"prompt": "a", "references": made["id"]}, headers=BOBS).status_code == 404
    answer = served.http.post("/v1/images/generations", json={"prompt": "a", "references": made["id"]}, headers=BOBS)
    assert answer.status_code == 404
    assert served.http.get("/v1/references", headers=BOBS).json() == {"data": []}
    # he may upload the same pictures; what she deletes then is hers alone
    his = upload(served, 1, headers=BOBS)
    assert his["id"] == made["id"]
    assert served.http.delete(path).status_code == 200
    assert served.http.get(path).status_code == 404
    assert served.http.get(f"{path}/1.png", headers=BOBS).status_code == 200
    assert made["id"] in served.engine.pipe.store


def test_a_form_is_taken_as_well(served: Served) -> None:
    files = [("image", ("a.png", png(96, 64, seed=1))), ("image[]", ("../../b", png(96, 64, seed=2)))]
    answer = served.http.post("/v1/references", files=files, data={"safety_tolerance": "1"})
    assert answer.status_code == 201, answer.text
    assert answer.json()["id"] == upload(served, 1, 2)["id"]
    for wrong in (
        {"files": files, "data": {"safety_tolerance": "6"}},
        {"files": files, "data": {"other": "1"}},
        {"files": [("mask", ("a.png", png()))]},
        {"data": {"image": "x"}},
        {"json": {"images": []}},
        {"json": {"images": "x"}},
        {"json": {"images": [None]}},
        {"json": []},
        {"content": b"x"},
        {"json": {"images": [text(png())] * 17}},
    ):
        answer = served.http.post("/v1/references", **wrong)
        assert answer.status_code == 422, answer.text
        types(answer)


def test_what_is_refused_is_not_kept(served: Served) -> None:
    served.words.refuse = {"input"}  # type: ignore[attr-defined]
    answer = served.http.post("/v1/references", json={"images": [text(png(seed=9))]})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["type"] == "moderation_blocked"
    served.words.refuse = set()  # type: ignore[attr-defined]
    for seed in range(3):
        upload(served, seed)
    answer = served.http.post("/v1/references", json={"images": [text(png(seed=10))]})
    assert answer.status_code == 422
    assert "3 are kept for you" in answer.json()["detail"][0]["msg"]
    upload(served, 0)  # is there
    upload(served, 5, headers=BOBS)
    assert len(served.files("inputs")) == 4


def test_a_stricter_tolerance_than_that_of_the_upload_is_checked_again(served: Served) -> None:
    made = upload(served, 1)
    served.words.refuse = {"input"}  # type: ignore[attr-defined]
    assert served.draw(references=made["id"])["status"] == "Ready"
    assert served.draw(references=made["id"], safety_tolerance=0)["status"] == "Request Moderated"
    assert served.http.get(f"/v1/references/{made['id']}/1.png").status_code == 200


def test_handles_outlive_a_restart(served: Served, pipe: Pipeline, tmp_path: Path) -> None:
    made = upload(served, 1)
    served.stop()
    with Served(pipe, tmp_path / "data", keys=KEYS) as after:
        assert after.draw(references=made["id"])["result"]["limner"]["reference_cache"] == "memory"


def test_a_program_sees_what_is_wrong_with_which_picture(served: Served) -> None:
    """In words for programs: the page asks what stands behind a transparent picture."""
    sheer = io.BytesIO()
    Image.new("RGBA", (64, 64), (1, 2, 3, 99)).save(sheer, "PNG")

    def problem(*files: bytes) -> dict[str, Any]:
        answer = served.http.post("/v1/references", files=[("image", (f"{i}.png", f)) for i, f in enumerate(files)])
        assert answer.status_code == 422, answer.text
        return dict(answer.json()["detail"][0])

    told = problem(png(), sheer.getvalue())
    assert (told["loc"], told["type"]) == (["body", "image", 1], "transparent")
    assert told["msg"].startswith("image: picture 2: it is transparent in places")
    assert (problem(sheer.getvalue())["loc"], problem(sheer.getvalue())["type"]) == (["body", "image"], "transparent")
    told = problem(png(20, 20), png())
    assert (told["loc"], told["type"]) == (["body", "image", 0], "http_422")
    answer = served.http.post(
        "/v1/images/edits",
        data={"prompt": "a"},
        files=[("image[]", ("a.png", png())), ("image[]", ("b.png", sheer.getvalue()))],
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "image[]", "transparent")
