"""Which LoRAs act, by each way in: over HTTP in every dialect, and what is stored and told of it; rows; an assistant."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from tests.support.batches import results, run, write
from tests.support.lora_files import SHAPES, kohya, make_pairs, original
from tests.support.lora_files import write as write_lora
from tests.support.serving import ANNA, BOB, KEYS, Served, opened, png, text
from tests.support.tiny import generators, picture

from limner import Pipeline
from limner.engine.load import load_pipeline
from limner.images import read_metadata
from limner.options import ModelOptions
from limner.server.jobs.rows import fingerprint

EDITS, GENERATIONS = "/v1/images/edits", "/v1/images/generations"
LORAS = {"ink-v1.5": 0.5, "grain": -0.25}


@pytest.fixture(scope="module")
def options(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    folder = tmp_path_factory.mktemp("loras")
    ink = write_lora(folder, original(make_pairs()), "ink-v1.5.safetensors")
    grain = write_lora(folder, kohya(make_pairs(1, names=SHAPES), alpha=2.0), "grain.safetensors")
    return ModelOptions(model=str(tiny_folder), loras=((str(ink), 0.8), (str(grain), 1.0)))


@pytest.fixture(scope="module")
def model(options: ModelOptions) -> Pipeline:
    return load_pipeline(options)


@pytest.fixture(scope="module")
def served(options: ModelOptions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With ink-v1.5 at 0.8 and grain at 1."""
    with Served(load_pipeline(options), tmp_path_factory.mktemp("service") / "data", keys=KEYS) as served:
        yield served


def array(data: bytes) -> np.ndarray:
    return np.asarray(opened(data).convert("RGB"))


def told(loras: Any) -> list[tuple[str, float]]:
    return sorted((lora["name"], lora["strength"]) for lora in loras)


def drawn(model: Pipeline, *, image: bool = True, **options: Any) -> np.ndarray:
    """What the pipeline draws of the requests below."""
    given = {"image": picture(64, 64)} if image else {"width": 64, "height": 64}
    return np.asarray(model("a red ball", generator=generators(3), **given, **options).images[0])


def edit(served: Served, **body: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """The picture of a job of the hosted dialect, and its entry."""
    found = served.draw(seed=3, output_format="png", input_image=text(png()), **body)
    assert found["status"] == "Ready", found
    return array(served.http.get(found["result"]["sample"]).content), served.http.get(f"/v1/jobs/{found['id']}").json()


def test_what_there_is_and_how_it_acts_unless_asked(served: Served, model: Pipeline) -> None:
    able = served.http.get("/v1/capabilities").json()
    assert able["loras"] == [{"name": "ink-v1.5", "strength": 0.8}, {"name": "grain", "strength": 1.0}]
    assert "loras" in able["controls"]
    image, entry = edit(served)
    assert np.array_equal(image, drawn(model))
    assert entry["controls"] is None
    assert told(entry["result"]["limner"]["loras"]) == [("grain", 1.0), ("ink-v1.5", 0.8)]


def test_a_job_has_its_own(served: Served, model: Pipeline) -> None:
    """In the picture, in its metadata, in what is told of the job."""
    image, entry = edit(served, loras=LORAS)
    assert np.array_equal(image, drawn(model, loras=LORAS))
    assert not np.array_equal(image, drawn(model))
    assert entry["controls"] == {"loras": LORAS}
    assert told(entry["result"]["limner"]["loras"]) == sorted(LORAS.items())
    file = served.http.get(entry["result"]["sample"]).content
    assert told(read_metadata(file)["loras"]) == sorted(LORAS.items())
    none, entry = edit(served, loras={})
    assert np.array_equal(none, drawn(model, loras={}))
    assert entry["result"]["limner"]["loras"] == []
    assert entry["controls"] == {"loras": {}}
    assert "loras" not in read_metadata(served.http.get(entry["result"]["sample"]).content)
    null, _ = edit(served, loras=None)
    assert np.array_equal(null, drawn(model))


def test_the_hosted_endpoints_and_a_part_that_is_repainted(served: Served, model: Pipeline) -> None:
    body = {"prompt": "a red ball", "seed": 3, "output_format": "png", "width": 64, "height": 64, "loras": {"grain": 2}}
    found = served.poll(served.http.post("/v1/flux-2-klein-9b", json=body).json()["id"])
    image = array(served.http.get(found["result"]["sample"]).content)
    assert np.array_equal(image, drawn(model, image=False, loras={"grain": 2.0}))
    body = {"prompt": "a red ball", "seed": 3, "output_format": "png", "input_image": text(png())}
    found = served.poll(served.http.post("/v1/edit", json={**body, "strength": 0.5, "loras": LORAS}).json()["id"])
    image = array(served.http.get(found["result"]["sample"]).content)
    assert np.array_equal(image, drawn(model, strength=0.5, loras=LORAS))


def test_openais_client_with_and_without_pictures(served: Served, model: Pipeline) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=ANNA, max_retries=0)
    extra = {"seed": 3, "loras": LORAS}

    def image_of(answer: Any) -> np.ndarray:
        return array(base64.b64decode(answer.data[0].b64_json))

    made = client.images.generate(prompt="a red ball", size="64x64", extra_body=extra)  # type: ignore[call-overload]
    assert np.array_equal(image_of(made), drawn(model, image=False, loras=LORAS))
    form = client.images.edit(prompt="a red ball", image=("a.png", png()), extra_body=extra)
    assert np.array_equal(image_of(form), drawn(model, loras=LORAS))
    for body in (
        {"json": {"prompt": "a red ball", "image": text(png()), **extra}},
        {
            "data": {"prompt": "a red ball", "seed": "3", "loras": '{"ink-v1.5": 0.5, "grain": -0.25}'},
            "files": {"image": png()},
        },
    ):
        answer = served.http.post(EDITS, **body)
        assert answer.status_code == 200, answer.text
        assert np.array_equal(array(base64.b64decode(answer.json()["data"][0]["b64_json"])), drawn(model, loras=LORAS))
        assert told(answer.json()["limner"]["loras"]) == sorted(LORAS.items())


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        (
            {"style": 1.0},
            "'style' not loaded; loaded: ink-v1.5, grain; more are loaded with --lora FILE when limner starts",
        ),
        ({"grain": "strong"}, "valid number"),
        ({"grain": True}, "valid number"),
        ({"grain": None}, "valid number"),
        ({"": 1.0}, "at least 1 character"),
        (["grain"], "valid dictionary"),
        ("grain", "is not JSON"),
    ],
    ids=str,
)
def test_what_is_refused_is_no_job(loras: Any, message: str, served: Served) -> None:
    before = served.http.get("/v1/jobs").json()
    answer = served.http.post("/v1/edit", json={"prompt": "a", "width": 64, "height": 64, "loras": loras})
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert problem["loc"][:2] == ["body", "loras"]
    assert message in problem["msg"]
    answer = served.http.post(GENERATIONS, json={"prompt": "a", "size": "64x64", "loras": loras})
    assert answer.status_code in (400, 422)
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"].startswith("loras")
    assert served.http.get("/v1/jobs").json() == before


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(value: str, served: Served) -> None:
    text = f'{{"prompt": "a", "width": 64, "height": 64, "loras": {{"grain": {value}}}}}'
    answer = served.http.post("/v1/edit", content=text, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    answer = served.http.post(EDITS, data={"prompt": "a", "loras[grain]": value}, files={"image": png()})
    assert answer.status_code in (400, 422), answer.text
    assert "finite number" in answer.json()["error"]["message"]
    answer = served.http.post(EDITS, data={"prompt": "a", "loras[grain]": "1", "loras": "{}"}, files={"image": png()})
    assert "is there twice" in answer.json()["error"]["message"]


def test_a_handle_is_good_for_all_and_removing_it_removes_the_kv_of_all(served: Served) -> None:
    image = text(png(seed=8))
    handle = served.http.post("/v1/references", json={"images": [image]}).json()["id"]
    entries = []
    for loras in (None, {"grain": 0.5}, {"grain": 0.5}):
        found = served.draw(references=handle, loras=loras)
        entries.append(served.http.get(f"/v1/jobs/{found['id']}").json())
    assert [one["references"] for one in entries] == [handle] * 3
    keys = [one["result"]["limner"]["reference_key"] for one in entries]
    assert keys[0] == handle
    assert keys[1] == keys[2] != handle
    assert [one["result"]["limner"]["reference_cache"] for one in entries] == ["memory", "miss", "memory"]
    assert all(served.engine.holds(key) for key in keys)
    other = {"x-key": BOB}
    assert served.http.post("/v1/references", json={"images": [image]}, headers=other).status_code == 201
    assert served.http.delete(f"/v1/references/{handle}").status_code == 200
    assert all(served.engine.holds(key) for key in keys)  # Bob has them
    handle = served.http.post("/v1/references", json={"images": [image]}).json()["id"]
    assert served.http.delete(f"/v1/references/{handle}", headers=other).status_code == 200
    assert served.http.delete(f"/v1/references/{handle}").status_code == 200
    assert not any(served.engine.holds(key) for key in keys)


def made(served: Served, *, key: str = ANNA, **body: Any) -> tuple[str, str, str]:
    """The id of a job, the key of its K/V, and where they were."""
    auth = {"x-key": key}
    found = served.poll(served.submit(headers=auth, **body)["id"], headers=auth)
    told = served.http.get(f"/v1/jobs/{found['id']}", headers=auth).json()["result"]["limner"]
    return found["id"], told["reference_key"], told["reference_cache"]


def upload(served: Served, seed: int, *, key: str = ANNA) -> str:
    answer = served.http.post("/v1/references", json={"images": [text(png(seed=seed))]}, headers={"x-key": key})
    return str(answer.json()["id"])


def delete(served: Served, path: str, *, key: str = ANNA) -> None:
    assert served.http.delete(path, headers={"x-key": key}).status_code == 200


def test_kv_of_one_owner_go_when_the_last_other_deletes_the_handle(served: Served) -> None:
    handle = upload(served, 11)
    _, own, _ = made(served, references=handle, loras={"grain": 0.5})
    assert upload(served, 11, key=BOB) == handle
    delete(served, f"/v1/references/{handle}")
    assert served.engine.holds(own)
    delete(served, f"/v1/references/{handle}", key=BOB)
    assert not served.engine.holds(own)
    assert not served.engine.holds(handle)


def test_kv_of_jobs_that_were_removed_or_sent_the_pictures_themselves_go_with_the_handle(served: Served) -> None:
    handle = upload(served, 12)
    gone, removed, _ = made(served, references=handle, loras={"grain": 0.5})
    delete(served, f"/v1/jobs/{gone}?forget=true")
    _, sent, _ = made(served, input_image=text(png(seed=12)), loras={"grain": -0.5})
    _, other, _ = made(served, input_image=text(png(seed=13)), loras={"grain": 0.5})
    assert all(served.engine.holds(key) for key in (handle, removed, sent, other))
    delete(served, f"/v1/references/{handle}")
    assert [served.engine.holds(key) for key in (handle, removed, sent, other)] == [False, False, False, True]


def test_after_a_deletion_no_use_of_others_is_told(served: Served) -> None:
    handle = upload(served, 14)
    assert made(served, references=handle, loras={"grain": 0.5})[2] == "miss"
    delete(served, f"/v1/references/{handle}")
    assert made(served, key=BOB, input_image=text(png(seed=14)), loras={"grain": 0.5})[2] == "miss"
    handle = upload(served, 14)
    assert made(served, references=handle, loras={"grain": 0.5})[2] == "miss"
    assert made(served, references=handle, loras={"grain": 0.5})[2] == "memory"


def test_a_job_is_stored_with_them(served: Served) -> None:
    """So that a service that starts again draws it as it was asked for, and a repeated one is known."""
    key = {"Idempotency-Key": "with-loras"}
    first = served.submit(seed=3, loras=LORAS, headers=key)
    assert served.submit(seed=3, loras=dict(reversed(LORAS.items())), headers=key)["id"] == first["id"]
    answer = served.http.post(
        "/v1/edit", json={"prompt": "a red ball", "width": 64, "height": 64, "seed": 3}, headers=key
    )
    assert answer.status_code == 409
    served.poll(first["id"])
    job = served.service.jobs.get(first["id"])
    assert job.control == {"loras": LORAS}
    assert fingerprint(job) != fingerprint(replace(job, control={}))


def test_rows_of_a_manifest_have_their_own(model: Pipeline, tmp_path: Path) -> None:
    """Rows of equal references and LoRAs share one prefill; a row is drawn again when its LoRAs change."""
    picture(64, 64).save(tmp_path / "a.png")
    rows: list[dict[str, Any]] = [
        {"id": "set", "prompt": "a red ball"},
        {"id": "own", "prompt": "a red ball", "loras": LORAS},
        {"id": "same", "prompt": "a blue ball", "loras": dict(reversed(LORAS.items()))},
        {"id": "none", "prompt": "a red ball", "loras": {}},
        {"id": "unknown", "prompt": "a red ball", "loras": {"style": 1}},
        {"id": "list", "prompt": "a red ball", "loras": ["grain"]},
        {"id": "text", "prompt": "a red ball", "loras": {"grain": "x"}},
    ]
    rows = [{**row, "references": ["a.png"], "seed": 3} for row in rows]
    write(tmp_path, rows)
    summary = run(tmp_path, model)
    assert (summary.drawn, summary.failed, summary.prefills) == (4, 3, 3)
    found = {row["id"]: row for row in results(tmp_path)}
    for row in rows[:4]:
        given = {} if "loras" not in row else {"loras": row["loras"]}
        data = (tmp_path / "out" / found[row["id"]]["file"]).read_bytes()
        out = model(row["prompt"], image=picture(64, 64), generator=generators(3), **given)
        assert np.array_equal(array(data), np.asarray(out.images[0])), row
        assert found[row["id"]].get("loras") == row.get("loras")
        assert told(read_metadata(data).get("loras", ())) == told(out.metadata.get("loras", ()))
    assert "'style' not loaded; loaded: ink-v1.5, grain" in found["unknown"]["error"]["message"]
    assert "is not names with strengths" in found["list"]["error"]["message"]
    assert "'x' of 'grain' is not a finite number" in found["text"]["error"]["message"]
    rows[1]["loras"] = {"grain": 1}
    write(tmp_path, rows)
    assert run(tmp_path, model).drawn == 1


def test_rows_with_the_same_loras_otherwise_written_share_a_prefill(model: Pipeline, tmp_path: Path) -> None:
    """Their K/V stay in the hidden store until the last of them is drawn, and no longer."""
    picture(64, 64).save(tmp_path / "a.png")
    usual = {"grain": 1, "ink-v1.5": 0.8}
    asked: list[Any] = [None, {}, usual, {"grain": 0}, {"grain": 0.0, "ink-v1.5": 0}, {**usual, "grain": 1.0}]
    rows = [{"prompt": "a red ball", "references": ["a.png"], "seed": i, "loras": x} for i, x in enumerate(asked)]
    write(tmp_path, [{"id": f"r{i}", **row} for i, row in enumerate(rows)])
    kept = []

    def progress(done: int, of: int, failed: int) -> None:
        kept.append(len(list((tmp_path / "out" / ".limner-batch" / "store").glob("*.safetensors"))))

    summary = run(tmp_path, model, progress)
    assert (summary.failed, summary.prefills) == (0, 2)
    assert max(kept) == 2
    assert kept[-1] == 0


def test_rows_of_a_joint_model_share_tokens_whatever_their_loras(
    options: ModelOptions, standard_folder: Path, tmp_path: Path
) -> None:
    joint = load_pipeline(replace(options, model=str(standard_folder)))
    picture(64, 64).save(tmp_path / "a.png")
    asked: list[Any] = [None, {}, {"grain": 2}]
    rows = [{"prompt": "a red ball", "references": ["a.png"], "seed": i, "loras": x} for i, x in enumerate(asked)]
    write(tmp_path, [{"id": f"r{i}", **row} for i, row in enumerate(rows)])
    summary = run(tmp_path, joint)
    assert (summary.failed, summary.prefills) == (0, 1)
    assert len({row["reference_key"] for row in results(tmp_path)}) == 1


def test_rows_without_references_and_several_at_once(model: Pipeline, tmp_path: Path) -> None:
    asked: list[Any] = [{"grain": 1}, {}, {"grain": 1}, {}]
    write(
        tmp_path,
        [
            {"id": f"r{i}", "prompt": "a red ball", "seed": 3 + i, "size": "64x64", "loras": x}
            for i, x in enumerate(asked)
        ],
    )
    assert run(tmp_path, model, images_at_once=4).failed == 0
    for i, row in enumerate(results(tmp_path)):
        metadata = read_metadata(tmp_path / "out" / row["file"])
        assert told(metadata.get("loras", ())) == [(name, float(x)) for name, x in asked[i].items()]
