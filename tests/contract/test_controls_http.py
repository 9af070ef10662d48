"""Masks and other controls over HTTP: what is repainted, what stays to the pixel, what is stored and told of it."""

from __future__ import annotations

import base64
import io
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from tests.support.serving import ANNA, BOB, KEYS, Served, Words, opened, png, text
from tests.support.tiny import Gate, picture

from limner import Pipeline
from limner.images import read_metadata
from limner.server.jobs.rows import read_job
from limner.trust.safety import Checks

EDITS = "/v1/images/edits"
SIZE = (101, 83)
"""Of the canvas: on no grid."""
EDGE = 50
"""What is left of it is repainted."""
NAMES_BEFORE = {
    *("prompt", "seeds", "drawn_seeds", "width", "height", "num_steps", "priority", "timeout", "tolerance"),
    *("output_format", "quality", "options", "references", "mask", "guidance_scale", "negative_prompt"),
}
"""What the version before controls reads of a row; it sets others aside."""


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    words = Words()
    with Served(
        Pipeline.from_pretrained(tiny_folder),
        tmp_path_factory.mktemp("controls") / "data",
        keys=KEYS,
        checks=Checks(checks=(words,)),
        max_canvas_pixels=256 * 256,
    ) as served:
        served.words = words  # type: ignore[attr-defined]
        yield served


def half_mask(size: tuple[int, int] = SIZE, *, drawn: str = "white", edge: int = EDGE) -> bytes:
    """What is left of the edge is white, or transparent."""
    image = Image.new("RGBA", size, (0, 0, 0, 255))
    image.paste((0, 0, 0, 0) if drawn == "transparent" else (255, 255, 255, 255), (0, 0, edge, size[1]))
    buffer = io.BytesIO()
    (image if drawn == "transparent" else image.convert("L")).save(buffer, "PNG")
    return buffer.getvalue()


def array(data: bytes) -> np.ndarray:
    return np.asarray(opened(data).convert("RGB"))


def drawn(served: Served, *, headers: Any = None, **body: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """The first picture of a job of the hosted dialect, and its result."""
    result = done(served, **body)
    return array(served.http.get(result["sample"]).content), result


def done(served: Served, **body: Any) -> dict[str, Any]:
    answer = served.http.post("/v1/edit", json={"prompt": "a", "seed": 3, "output_format": "png", **body})
    assert answer.status_code == 200, answer.text
    found = served.poll(answer.json()["id"])
    assert found["status"] == "Ready", found
    return {**found["result"], "id": found["id"]}


def refused(served: Served, **body: Any) -> tuple[str, str]:
    """The field and the message of a refusal."""
    answer = served.http.post("/v1/edit", json={"prompt": "a", **body})
    assert answer.status_code == 422, answer.text
    problem = answer.json()["detail"][0]
    return str(problem["loc"][1]), str(problem["msg"])


def check_masked(found: np.ndarray, canvas: bytes, *, blur: int = 8) -> None:
    """Pixels outside of the mask are the canvas' bit for bit, and inside they are others."""
    kept = array(canvas)
    assert found.shape == kept.shape
    assert np.array_equal(found[:, EDGE + blur :], kept[:, EDGE + blur :])
    assert (found[:, :EDGE] != kept[:, :EDGE]).any(-1).mean() > 0.9


def test_a_mask_over_each_dialect(served: Served) -> None:
    """A form and JSON of OpenAI's, the hosted dialect, the page's way (a handle, the file as canvas): one result."""
    canvas, other = png(*SIZE, seed=5), png(seed=6)
    form = [("image[]", canvas), ("image[]", other), ("mask", half_mask(drawn="transparent"))]
    answer = served.http.post(EDITS, data={"prompt": "a", "seed": "3"}, files=form)
    assert answer.status_code == 200, answer.text
    first = array(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    check_masked(first, canvas)
    told = answer.json()["limner"]
    assert answer.json()["size"] == "101x83"
    assert answer.json()["usage"]["output_tokens"] == 7 * 6  # of what is drawn: the canvas, continued to the grid
    assert told["canvas"] == {
        "size": [101, 83],
        "box": [-6, -7, 106, 89],
        "drawn_size": [112, 96],
        "scale": 1.0,
        "share": pytest.approx((EDGE + 7) / 101, abs=0.02),
    }
    json_body = {
        "prompt": "a",
        "seed": 3,
        "image": [text(canvas), text(other)],
        "mask": {"image_url": text(form[2][1])},
    }
    answer = served.http.post(EDITS, json=json_body)
    assert np.array_equal(array(base64.b64decode(answer.json()["data"][0]["b64_json"])), first)
    hosted = {"input_image": text(canvas), "input_image_2": text(other), "mask": text(half_mask())}
    for path in ("/v1/flux-2-klein-9b", "/v1/edit"):
        answer = served.http.post(path, json={"prompt": "a", "seed": 3, "output_format": "png", **hosted})
        result = served.poll(answer.json()["id"])["result"]
        data = served.http.get(result["sample"]).content
        assert np.array_equal(array(data), first)
        assert (result["width"], result["height"]) == SIZE
        assert read_metadata(data)["box"] == told["canvas"]["box"]
    handle = served.http.post("/v1/references", json={"images": [text(canvas), text(other)]}).json()["id"]
    found, result = drawn(served, references=handle, canvas=text(canvas), mask=text(half_mask()))
    check_masked(found, canvas)
    assert result["limner"]["canvas"] == told["canvas"]
    assert result["limner"]["reference_cache"] == "memory"
    assert not np.array_equal(found, first)  # image 1 is the whole picture then, cropped as every reference


def test_a_mask_with_a_handle_alone(served: Served) -> None:
    """The canvas is image 1 as it is kept; a mask of the file's own size is told the way."""
    canvas = png(*SIZE, seed=7)
    handle = served.http.post("/v1/references", json={"images": [text(canvas)]}).json()
    (report,) = handle["references"]
    assert report["processed_size"] == [96, 80]
    found, _ = drawn(served, references=handle["id"], mask=text(half_mask((96, 80), edge=48)))
    kept = array(canvas)[1:81, 2:98]
    assert np.array_equal(found[:, 56:], kept[:, 56:])
    field, message = refused(served, references=handle["id"], mask=text(half_mask()))
    assert field == "mask"
    assert "it is 101x83 and the canvas 96x80; scale it to the canvas' size: that of image 1 as it is kept" in message
    assert "as canvas" in message
    body = {"prompt": "a", "references": handle["id"], "mask": text(half_mask())}
    assert served.http.post("/v1/edit", json=body).json()["detail"][0]["type"] == "size"


def test_masks_share_references_and_batches(
    served: Served, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight masks, with other weights, over the same references: one prefill, and those that wait are drawn together."""
    gate = Gate(monkeypatch)
    body = {"input_image": text(png(seed=1)), "input_image_2": text(png(seed=2)), "seed": 3, "output_format": "png"}
    with Served(Pipeline.from_pretrained(tiny_folder), tmp_path / "data") as own:
        gate.shut()
        ids = []
        for i in range(8):
            mask = text(half_mask((64, 64), edge=16 + 4 * i))
            answer = own.http.post(
                "/v1/edit", json={"prompt": "a", **body, "mask": mask, "reference_weights": [1, i / 4]}
            )
            ids.append(answer.json()["id"])
            assert gate.entered.wait(60)
        gate.open()
        results = [own.poll(id_)["result"] for id_ in ids]
        pictures = [array(own.http.get(result["sample"]).content) for result in results]
        stats = own.engine.stats()
    assert stats.prefills == 1
    assert max(result["limner"]["batch"] for result in results) > 1
    kept = array(png(seed=1))
    for i, found in enumerate(pictures):
        assert np.array_equal(found[:, 16 + 4 * i + 8 :], kept[:, 16 + 4 * i + 8 :])
        assert not np.array_equal(found[:, : 16 + 4 * i], kept[:, : 16 + 4 * i])


def test_other_controls(served: Served) -> None:
    canvas = png(96, 80, seed=8)
    kept, body = array(canvas), {"input_image": text(canvas)}
    found, result = drawn(served, **body, expand=[32, 0, 0, 16])
    assert found.shape == (96, 128, 3)
    assert np.array_equal(found[: 80 - 24, 32 + 24 :], kept[:-24, 24:])
    assert result["limner"]["canvas"]["size"] == [128, 96]
    same, _ = drawn(served, **body, left=32, bottom=16)  # the names of the hosted expand endpoint
    assert np.array_equal(same, found)
    by_size, _ = drawn(served, **body, expand={"size": [128, 96], "anchor": "top-right"})
    assert np.array_equal(by_size, found)

    plain, _ = drawn(served, **body)
    weak, result = drawn(served, **body, strength=0.3)
    assert np.abs(weak.astype(int) - kept).mean() < np.abs(plain.astype(int) - kept).mean()
    assert np.array_equal(drawn(served, **body, strength=1.0)[0], plain)
    assert np.array_equal(drawn(served, **body, reference_weights=[1.0], reference_guidance=1.0)[0], plain)
    assert not np.array_equal(drawn(served, **body, reference_weights=[0.2])[0], plain)
    assert not np.array_equal(drawn(served, **body, reference_guidance=1.5)[0], plain)

    found, result = drawn(served, **body, preserve="auto")
    (preserved,) = result["limner"]["preserved"]
    assert set(preserved) == {"drift_pixels", "drift_colour", "share_kept", "map"}
    change = opened(served.http.get(preserved["map"]).content)
    assert (change.mode, change.size) == ("L", (96, 80))
    assert np.array_equal(found[np.asarray(change) == 0], kept[np.asarray(change) == 0])
    assert (np.asarray(change) == 0).mean() == pytest.approx(preserved["share_kept"], abs=0.02)
    path = preserved["map"]
    assert served.http.get(path, headers={"x-key": BOB}).status_code == 404
    assert served.http.get(path.replace("1.png", "2.png")).status_code == 404
    other = result["id"] + "-map"
    assert any(name.startswith(other) for name in served.files("results"))
    assert served.http.delete(f"/v1/jobs/{result['id']}?forget=true").status_code == 200
    assert not any(name.startswith(other) for name in served.files("results"))
    assert served.http.get(path).status_code == 404
    found, result = drawn(served, **body, preserve="auto")
    (preserved,) = result["limner"]["preserved"]
    metadata = read_metadata(served.http.get(result["sample"]).content)
    assert metadata["share_kept"] == preserved["share_kept"] == pytest.approx((found == kept).all(-1).mean(), abs=0.02)
    alone, result = drawn(served, canvas=text(canvas), mask=text(half_mask((96, 80), edge=48)))  # without any reference
    assert np.array_equal(alone[:, 56:], kept[:, 56:])
    assert result["limner"]["reference_cache"] == "none"


def test_the_openai_client(served: Served) -> None:
    canvas = png(*SIZE, seed=9)
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=ANNA, max_retries=0) as client:
        arguments: dict[str, Any] = {"image": [canvas, png()], "prompt": "a"}
        mask = half_mask(drawn="transparent")
        found = client.images.edit(**arguments, mask=mask, extra_body={"seed": 3})
        check_masked(array(base64.b64decode(found.data[0].b64_json)), canvas)
        more = {"seed": 3, "reference_weights": [1.0, 0.5], "mask_blur": 0, "strength": 0.5, "reference_guidance": 1.5}
        other = client.images.edit(**arguments, mask=mask, extra_body=more)
        other_array = array(base64.b64decode(other.data[0].b64_json))
        check_masked(other_array, canvas, blur=0)
        body = {**more, "input_image": text(canvas), "input_image_2": text(png()), "mask": text(half_mask())}
        assert np.array_equal(drawn(served, **body)[0], other_array)  # a client spreads lists over fields
        grown = client.images.edit(image=png(), prompt="a", extra_body={"expand": {"size": [96, 64], "anchor": "left"}})
        assert opened(base64.b64decode(grown.data[0].b64_json)).size == (96, 64)
        same = client.images.edit(image=png(), prompt="a", extra_body={"expand": [0, 0, 32, 0], "seed": 1})
        assert same.size == "96x64"
        assert same.limner["canvas"]["size"] == [96, 64]
        events = list(client.images.edit(**arguments, mask=mask, stream=True, extra_body={"seed": 3}))
        assert events[-1].b64_json == found.data[0].b64_json
        for extra, param in (
            ({"strength": 0}, "strength"),
            ({"expand": [1, 2]}, "expand"),
            ({"reference_weights": [1.0, "a"]}, "reference_weights[1]"),
            ({"reference_weights": [1.0, 11.0]}, "reference_weights[1]"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                client.images.edit(**arguments, extra_body=extra)
            assert str(caught.value.param).startswith(param), extra


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"mask": half_mask((64, 64))}, "mask", "it is 64x64 and the canvas 101x83; scale it to the canvas' size"),
        ({"mask": half_mask((83, 101))}, "mask", "or turn it"),
        ({"mask": half_mask(edge=0)}, "mask", "no pixel is white, so nothing would be drawn"),
        ({"mask": half_mask(drawn="transparent")}, "mask", "save it without alpha channel"),
        ({"mask": b"no picture"}, "mask", ""),
        ({"mask": half_mask(), "expand": [16, 0, 0, 0]}, "expand", "expand first"),
        ({"mask": half_mask(), "left": 16}, "expand", "expand first"),
        ({"mask": half_mask(), "preserve": "auto"}, "preserve", "is for edits without a mask"),
        ({"mask": half_mask(), "width": 64, "height": 64}, "width", "comes back as 101x83; leave the size out"),
        ({"mask": half_mask(), "aspect_ratio": "1:4"}, "aspect_ratio", "comes back as 101x83"),
        ({"mask_blur": 4}, "mask_blur", "needs mask or expand"),
        ({"canvas": png()}, "canvas", "give one of mask, expand"),
        ({"expand": [0, 0, 0, 0]}, "expand", "adds nothing"),
        ({"left": 0}, "left", "adds nothing"),
        ({"left": 16, "expand": [16, 0, 0, 0]}, "expand", "give one of them"),
        ({"expand": {"size": [64, 64]}}, "expand", "not larger than the picture"),
        ({"expand": {"size": [640, 640]}}, "expand", "640x640 is over the 65536 pixels that may be repainted"),
        ({"canvas": png(320, 256), "preserve": "auto"}, "canvas", "320x256 is over the 65536 pixels"),
        (
            {"strength": 0.5, "num_images": 9},
            "canvas",
            "101x83, 9 times, is over the 65536 pixels that may be repainted",
        ),
        ({"strength": 0}, "strength", "greater than 0"),
        ({"preserve": "yes"}, "preserve", ""),
        ({"reference_weights": [1, 1]}, "reference_weights", "there are 2 for 1 references"),
        ({"reference_guidance": 99}, "reference_guidance", ""),
    ],
)
def test_what_cannot_be_followed_is_refused(served: Served, body: dict[str, Any], field: str, message: str) -> None:
    before = served.files("inputs")
    sent = {name: text(value) if isinstance(value, bytes) else value for name, value in body.items()}
    found = refused(served, input_image=text(png(*SIZE)), **sent)
    assert found[0] == field
    assert message in found[1]
    assert "mask_image" not in found[1]
    assert served.files("inputs") == before


def test_masks_of_openai_that_do_not_fit_are_refused(served: Served) -> None:
    def error(mask: bytes, **fields: Any) -> tuple[str, str]:
        files = [("image", png(80, 64)), ("mask", mask)]
        answer = served.http.post(EDITS, data={"prompt": "a", **fields}, files=files)
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]["param"], answer.json()["error"]["message"]

    small = half_mask((64, 64), drawn="transparent")
    assert error(small) == ("mask", "mask: it is 64x64 and the canvas 80x64; scale it to the canvas' size")
    assert "make what is to be repainted transparent" in error(half_mask((80, 64)))[1]
    assert "no pixel is transparent" in error(half_mask((80, 64), drawn="transparent", edge=0))[1]
    fitting = half_mask((80, 64), drawn="transparent")
    assert error(fitting, size="64x64") == (
        "size",
        "size: width 64 is asked for, and what is repainted comes back as 80x64; leave the size out",
    )
    answer = served.http.post("/v1/images/generations", json={"prompt": "a", "mask": "AAAA"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "mask")
    answer = served.http.post("/v1/edit", json={"prompt": "a", "mask": text(half_mask())})
    assert "needs a picture to repaint" in answer.json()["detail"][0]["msg"]


def test_what_is_stored_and_shown(served: Served) -> None:
    canvas, mask = png(*SIZE, seed=11), half_mask(edge=49)
    before = set(served.files("inputs"))
    handle = served.http.post("/v1/references", json={"images": [text(png(seed=12))]}).json()["id"]
    result = done(served, references=handle, canvas=text(canvas), mask=text(mask), strength=0.5)
    path = f"/v1/jobs/{result['id']}"
    assert len(set(served.files("inputs")) - before) == 3
    assert np.array_equal(array(served.http.get(f"{path}/canvas.png").content), array(canvas))
    assert np.array_equal(array(served.http.get(f"{path}/mask.png").content), array(mask))
    assert httpx.get(f"{served.url}{path}/mask.png", headers={"x-key": BOB}).status_code == 404
    entry = served.http.get(path).json()
    assert (entry["width"], entry["height"]) == SIZE
    assert entry["controls"] == {"mask": True, "canvas": True, "strength": 0.5}
    plain = done(served, input_image=text(png()))
    assert served.http.get(f"/v1/jobs/{plain['id']}").json()["controls"] is None
    assert served.http.get(f"/v1/jobs/{plain['id']}/mask.png").status_code == 404
    first = done(served, input_image=text(canvas), preserve="auto")
    shown = served.http.get(f"/v1/jobs/{first['id']}/references/1.png").content
    assert opened(shown).size == SIZE  # what is repainted is kept as it came
    able = served.http.get("/v1/capabilities").json()
    assert {"mask", "canvas", "expand", "reference_weights"} <= set(able["controls"])
    assert (able["max_canvas_pixels"], able["mask_blur"]) == (256 * 256, 8)


def test_canvases_are_looked_at(served: Served) -> None:
    words, before = served.words, served.files("inputs")  # type: ignore[attr-defined]
    handle = served.http.post("/v1/references", json={"images": [text(png(seed=21))]}).json()["id"]
    kept, looked = served.files("inputs"), words.looked
    body = {"references": handle, "canvas": text(png(*SIZE, seed=22)), "mask": text(half_mask(edge=31))}
    words.refuse = {"input"}
    found = served.poll(served.http.post("/v1/edit", json={"prompt": "a", **body}).json()["id"])
    words.refuse = set()
    assert (found["status"], words.looked - looked) == ("Request Moderated", 1)
    assert served.files("inputs") == kept != before


def test_a_key_of_idempotency_is_one_mask(served: Served) -> None:
    def post(edge: int, **more: Any) -> httpx.Response:
        body = {"prompt": "a", "input_image": text(png(*SIZE)), "mask": text(half_mask(edge=edge)), **more}
        return served.http.post("/v1/edit", json=body, headers={"idempotency-key": "masked"})

    first = post(40)
    assert post(40).json()["id"] == first.json()["id"]
    assert post(41).status_code == 409
    assert post(40, mask_blur=3).status_code == 409


def test_a_job_goes_on_after_a_restart(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask, canvas and values come back from the disk, and the picture is the one that would have been drawn."""
    gate, data = Gate(monkeypatch), tmp_path / "data"
    pipe, canvas = Pipeline.from_pretrained(tiny_folder), png(*SIZE, seed=6)
    masked: dict[str, Any] = {
        "input_image": text(png()),
        "canvas": text(canvas),
        "mask": text(half_mask()),
        "reference_weights": [0.5],
        "raw": True,
    }
    grown = {"input_image": text(canvas), "expand": {"size": [128, 96], "anchor": "left"}, "strength": 0.5}
    with Served(pipe, data, drain=0.1) as served:
        wanted = [drawn(served, **body)[0] for body in (masked, grown)]
        gate.shut()
        ids = [
            served.http.post("/v1/edit", json={"prompt": "a", "seed": 3, "output_format": "png", **body}).json()["id"]
            for body in (masked, grown)
        ]
        assert gate.entered.wait(60)
        threading.Timer(0.3, gate.open).start()  # while the server stops
    rows = rows_of(data, ids)
    for row in rows:
        assert row["request"].keys() - NAMES_BEFORE == {"control"}  # so the version before leaves it alone
        row["request"]["control"]["voice"] = "a dog"
        assert read_job(row["row"](row["request"])).set_aside
    with Served(pipe, data) as served:
        for id_, expected in zip(ids, wanted, strict=True):
            found = served.poll(id_)["result"]
            assert np.array_equal(array(served.http.get(found["sample"]).content), expected)
        assert served.poll(ids[0])["result"]["limner"]["without_effect"] == ["raw"]
        check_masked(wanted[0], canvas)


def rows_of(data: Path, ids: Sequence[str]) -> list[dict[str, Any]]:
    db = sqlite3.connect(data / "jobs.sqlite")
    found = []
    for id_ in ids:
        row = db.execute("SELECT * FROM jobs WHERE id = ?", (id_,)).fetchone()
        assert row[3] == "pending"
        found.append(
            {"request": json.loads(row[4]), "row": lambda request, row=row: (*row[:4], json.dumps(request), *row[5:])}
        )
    db.close()
    return found


def test_pictures_of_phones_are_turned(served: Served) -> None:
    """The mask is of the picture as it is shown."""
    image = picture(*SIZE, seed=13)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    found, result = drawn(served, input_image=text(buffer.getvalue()), mask=text(half_mask((83, 101), edge=40)))
    assert np.array_equal(found[:, 48:], np.asarray(turned)[:, 48:])
    assert (result["width"], result["height"]) == (83, 101)
