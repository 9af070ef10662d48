"""How references are fitted to the grid, and what callers are warned of: command line, manifests, HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.support.serving import Served, png, text
from tests.support.tiny import picture

from limner import Pipeline, ReferencePolicy
from limner.cli import main
from limner.config import KnownWords
from limner.images import encode, prepare_reference

MISSING = "prompt: mentions 'image 2', and 1 reference is given; give image 2, or change the prompt"
UNKNOWN = "prompt: the model was not trained on 'into'; its card says what it understands: "
WORDS = ["a", "as", "image", "in", "put", "use"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(100, 70).save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder that says which words it knows."""
    made = tmp_path / "model"
    made.mkdir()
    for one in tiny_folder.iterdir():
        (made / one.name).symlink_to(one)
    (made / "limner.json").write_text(json.dumps({"words": WORDS}))
    (made / "README.md").write_text("It draws")
    return made


def digest(fit: str) -> str:
    return prepare_reference(picture(100, 70), policy=ReferencePolicy(fit=fit)).report.digest


def test_command_line(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "edit",
        "put image 1 into image 2",
        "-i",
        str(folder / "a.png"),
        "-o",
        str(folder / "b.png"),
        "--force",
        "--model",
        str(model),
    ]
    assert main([*words, "--fit", "pad", "--steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "padded 6 left, 5 top, 6 right, 5 bottom, used as 112x80" in printed
    unknown = f"{UNKNOWN}{model}/README.md"
    assert f"warning: {MISSING}\nwarning: {unknown}\n" in printed
    assert main([*words, "--fit", "resize", "--steps", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["warnings"] == [MISSING, unknown]
    assert found["references"][0]["digest"] == digest("resize")
    assert found["references"][0]["box"] == [0, 0, 96, 64]
    assert found["references"][0]["source_box"] == [0, 0, 100, 70]
    assert main(["refs", "inspect", str(folder / "a.png"), "--fit", "pad", "--model", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["references"][0]["digest"] == digest("pad")


def test_manifest(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row says how its references are fitted, or the run does."""
    rows: list[dict[str, Any]] = [
        {"id": "pad", "fit": "pad"},
        {"id": "crop", "fit": "crop"},
        {"id": "run"},
        {"id": "two", "prompt": "put image 2 into a"},
        {"id": "bad", "fit": "cover"},
    ]
    rows = [{"prompt": "a", "references": ["a.png"], "steps": 1, **row} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["batch", str(folder / "rows.jsonl"), "-o", str(folder / "out"), "--model", str(model)]
    assert main([*words, "--fit", "resize"]) == 1
    told, unknown = capsys.readouterr(), f"{UNKNOWN}{model}/README.md"
    assert "fit: 'cover' is not one of crop, pad, resize" in told.err
    assert f"warning: line 4 (two): {MISSING}\nwarning: line 4 (two): {unknown}\n" in told.err
    assert "4 drawn, 1 failed, 1 with warnings;" in told.out
    lines = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    found = {line["id"]: line for line in lines}
    assert {name: found[name]["references"][0]["digest"] for name in ("pad", "crop", "run")} == {
        "pad": digest("pad"),
        "crop": digest("crop"),
        "run": digest("resize"),
    }
    assert found["pad"]["size"] == "112x80"
    assert (found["run"]["warnings"], found["two"]["warnings"]) == ([], [MISSING, unknown])


def test_http(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.text_encoder.known = KnownWords(frozenset(WORDS), "/a/folder/of/the/server/README.md")
    unknown = f"{UNKNOWN}GET /v1/model-card"
    with Served(pipe, tmp_path / "data") as served:
        image = png(100, 70)
        digests = set()
        for fit in ("crop", "pad", "resize", None):
            body = {"images": [text(image)], **({"fit": fit} if fit else {})}
            made = served.http.post("/v1/references", json={**body, "prefill": False})
            assert made.status_code == 201, made.text
            digests.add(made.json()["references"][0]["digest"])
            form = served.http.post(
                "/v1/references", files={"image": image}, data={"prefill": "false", **({"fit": fit} if fit else {})}
            )
            assert form.json()["id"] == made.json()["id"]
        assert len(digests) == 3
        assert made.json()["references"][0]["source_box"] == [2, 3, 98, 67]
        refused = served.http.post("/v1/references", json={"images": [text(image)], "fit": "cover"})
        assert refused.status_code == 422
        assert "fit" in refused.text
        refused = served.http.post("/v1/references", files={"image": image}, data={"fit": "cover"})
        assert refused.status_code == 422
        answer = served.submit(
            "/v1/edit",
            prompt="put image 1 into image 2",
            input_image=text(image),
            fit="pad",
            num_inference_steps=1,
            width=0,
            height=0,
        )
        found = served.poll(answer["id"])["result"]
        assert (found["width"], found["height"]) == (112, 80)
        assert found["limner"]["warnings"] == [MISSING, unknown]
        assert found["limner"]["references"][0]["added"] == [6, 5, 6, 5]
        assert found["limner"]["references"][0]["box"] == [6, 5, 106, 75]
        again = served.http.post("/v1/edit", json={"prompt": "a", "references": made.json()["id"], "fit": "pad"})
        assert (again.status_code, "fitted when they were uploaded" in again.text) == (422, True)
        form = served.http.post(
            "/v1/images/edits",
            files={"image": image, "mask": encode(Image.new("RGBA", (100, 70)), "png")},
            data={"prompt": "put a into image 2", "num_inference_steps": "1"},
        )
        white = "mask: it is white everywhere, so nothing of the canvas is kept; black is kept"
        assert form.json()["limner"]["warnings"] == [white, MISSING, unknown]


def test_a_report_of_a_picture_outlives_the_job(pipe: Pipeline, tmp_path: Path) -> None:
    """What was padded and which profile it had is stored with handles and jobs."""
    with Served(pipe, tmp_path / "data") as served:
        made = served.http.post("/v1/references", json={"images": [text(png(100, 70))], "fit": "pad"}).json()
        assert served.http.get(f"/v1/references/{made['id']}").json()["references"] == made["references"]
        assert made["references"][0]["added"] == [6, 5, 6, 5]
