"""Rows that repaint: each is what the pipeline makes of it alone, and its own errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support.batches import results, run, write
from tests.support.tiny import generators, picture

from limner import Pipeline, References
from limner.batch import Batch, BatchOptions
from limner.images import read_metadata
from limner.requests import CONTROL_FIELDS
from limner.store.writes import BackgroundWrites

MASK = {"mask": "mask.png"}
ROWS: list[dict[str, Any]] = [
    {"id": "plain", "prompt": "make it blue", "references": ["whole.png", "b.png"]},
    {"id": "mask", "prompt": "make it red", "references": ["whole.png", "b.png"], **MASK, "mask_blur": 2},
    {"id": "weights", "prompt": "a dog", "references": ["whole.png", "b.png"], **MASK, "reference_weights": [1, 0.5]},
    {"id": "expand", "prompt": "more sea", "references": ["whole.png"], "expand": [0, 0, 32, 16], "steps": 2},
    {
        "id": "canvas",
        "prompt": "a cat",
        "references": ["b.png"],
        "canvas": "a.png",
        "strength": 0.5,
        "preserve": "auto",
    },
    {"id": "guided", "prompt": "a cat", "references": ["b.png"], "reference_guidance": 1.5},
]


@pytest.fixture
def rows(folder: Path) -> Path:
    picture(96, 64, seed=3).save(folder / "whole.png")
    mask = Image.new("L", (96, 64))
    mask.paste(255, (16, 16, 64, 48))
    mask.save(folder / "mask.png")
    write(folder, ROWS)
    return folder


def alone(row: dict[str, Any], folder: Path, pipe: Pipeline, seed: int) -> Any:
    names = {"references": "image", "mask": "mask_image", "steps": "num_inference_steps"}
    given = {names.get(name, name): value for name, value in row.items() if name != "id"}
    given["image"] = [folder / name for name in given["image"]]
    for name in {"mask_image", "canvas"} & given.keys():
        given[name] = folder / given[name]
    return pipe(given.pop("prompt"), **given, generator=generators(seed))


def test_rows_are_what_the_pipeline_makes_of_them_alone(rows: Path, pipe: Pipeline) -> None:
    summary = run(rows, pipe)
    assert (summary.drawn, summary.failed, summary.prefills) == (6, 0, 3)  # the first three have the same references
    found = {row["id"]: row for row in results(rows)}
    for row in ROWS:
        result = found[row["id"]]
        expected = alone(row, rows, pipe, result["seed"])
        with Image.open(rows / "out" / result["file"]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(expected.images[0])), row
        metadata = read_metadata(rows / "out" / result["file"])
        assert {**metadata, **json.loads(json.dumps(expected.metadata))} == metadata
        asked = {name: value for name, value in row.items() if name in CONTROL_FIELDS}
        assert asked.items() <= result.items()
        assert result["size"] == "{}x{}".format(*expected.images[0].size)
        assert result.get("repainted") == json.loads(json.dumps([asdict(one) for one in expected.canvas] or [None]))[0]
        assert result["reference_key"] == expected.reference_key
    assert found["expand"]["size"] == "128x80"
    assert set(found["canvas"]["preserved"]) == {"share_kept", "drift_pixels", "drift_colour"}


def test_a_row_is_drawn_again_when_its_mask_or_canvas_changes(rows: Path, pipe: Pipeline) -> None:
    write(rows, ROWS[1:5])
    run(rows, pipe)
    assert run(rows, pipe).drawn == 0
    with Image.open(rows / "mask.png") as mask:
        mask.point(lambda value: value // 2).save(rows / "mask.png")
    assert run(rows, pipe).drawn == 2
    picture(96, 70, seed=8).save(rows / "a.png")
    assert run(rows, pipe).drawn == 1
    write(rows, [ROWS[1], {**ROWS[2], "reference_weights": [1, 0.6]}, *ROWS[3:5]])
    assert run(rows, pipe).drawn == 1


def test_errors_are_those_of_a_row(rows: Path, pipe: Pipeline) -> None:
    Image.new("L", (64, 64)).save(rows / "small.png")
    Image.new("L", (96, 64)).save(rows / "black.png")
    Image.new("L", (96, 64), 255).save(rows / "white.png")
    Image.new("RGBA", (96, 64)).save(rows / "clear.png")
    good = {"prompt": "p", "references": ["whole.png"], "steps": 1}
    broken: list[tuple[dict[str, Any], str]] = [
        ({"mask": "small.png"}, "mask: it is 64x64 and the canvas 96x64"),
        ({"mask": "none.png"}, "none.png cannot be read"),
        ({**MASK, "size": "64x64"}, "size: is that of the canvas, and of the result; leave it out"),
        ({**MASK, "references": []}, "references: there are none to repaint"),
        ({"reference_weights": [1, 1]}, "reference_weights: there are 2 for 1 references"),
        ({"expand": {"side": 3}}, "expand: side are not expand, size, anchor or overlap"),
        ({"mask_blur": 3}, "mask_blur: needs mask or expand"),
        ({"canvas": "a.png"}, "canvas: says which picture is repainted; give one of mask, expand, strength, preserve"),
        ({**MASK, "expand": [1, 0, 0, 0]}, "expand: mask and expand are both given"),
        ({"mask": "a.png"}, "mask a.png: it has colours"),
        ({**MASK, "mask_blur": -1}, "mask_blur: -1 is not a whole number of pixels"),
        ({**MASK, "padding_mask_crop": True}, "padding_mask_crop: True is not a whole number of pixels"),
        ({"strength": "all"}, "strength: 'all' is not a number over 0"),
        ({"preserve": True}, "preserve: True is not one of None, 'auto'"),
        ({"reference_guidance": "2"}, "reference_guidance: '2' is not a number"),
        ({"reference_weights": [{}]}, "reference_weights: [{}] are not numbers"),
        ({"mask": "black.png"}, "mask: no pixel is white, so nothing would be drawn"),
        ({"size": "100x64"}, "size: width 100 is not a multiple of 16"),
        ({"guidance": -1}, "guidance: -1 is not a number of at least 0"),
        (
            {"references": ["clear.png"]},
            "clear.png: it is transparent in places; flatten it, or say what stands behind it: "
            "limner batch --background white",
        ),
    ]
    write(
        rows,
        [{**good, "id": f"{i}", **row} for i, (row, _) in enumerate(broken)]
        + [{**good, "id": "white", "mask": "white.png"}],
    )
    summary = run(rows, pipe)
    assert (summary.drawn, summary.failed, summary.warned) == (1, len(broken), 1)
    found = results(rows)
    for result, (_, message) in zip(found, broken, strict=False):
        assert message in result["error"]["message"].replace(f"{rows}/", "")
    assert found[-1]["warnings"][0].startswith("mask: it is white everywhere")


def test_the_hidden_store_forgets_canvases(rows: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    write(rows, ROWS[1:5])
    left = []
    enqueue = BackgroundWrites.try_enqueue

    def wait_and_enqueue(writes: BackgroundWrites, references: References, *, explicit: bool) -> bool:
        writes.flush()  # a batch's queue has room for one entry: on a slow disk the second would not be kept
        return enqueue(writes, references, explicit=explicit)

    monkeypatch.setattr(BackgroundWrites, "try_enqueue", wait_and_enqueue)

    def look(done: int, of: int, failed: int) -> None:
        pipe.store.flush()
        left.append(len(list((rows / "out" / ".limner-batch" / "store").glob("*.safetensors"))))

    run(rows, pipe, look)
    assert max(left) == 2  # K/V of a group, and the tokens of a canvas
    with Batch(BatchOptions(manifest=rows / "rows.jsonl", folder=rows / "again")) as batch:
        pipe.store = batch.store
        batch.draw(pipe, batch.plan(pipe))
        batch.store.flush()
        assert not list((rows / "again" / ".limner-batch" / "store").glob("*.safetensors"))


def test_a_mask_that_changes_while_it_runs(rows: Path, pipe: Pipeline) -> None:
    with Batch(BatchOptions(manifest=rows / "rows.jsonl", folder=rows / "out")) as batch:
        pipe.store = batch.store
        groups = batch.plan(pipe)
        Image.new("L", (96, 64), 255).save(rows / "mask.png")
        batch.draw(pipe, groups)
        assert batch.finish().failed == 2
    assert "mask: a file changed while the batch ran" in results(rows)[1]["error"]["message"]


def test_a_mask_that_vanishes_is_an_error_of_its_own_rows(rows: Path, pipe: Pipeline) -> None:
    (rows / "mask.png").rename(rows / "first.png")
    shutil.copy(rows / "first.png", rows / "mask.png")
    first = {"id": "first", "prompt": "p", "references": ["whole.png", "b.png"], "mask": "first.png"}
    write(rows, [first, *ROWS[:3]])
    with Batch(BatchOptions(manifest=rows / "rows.jsonl", folder=rows / "out")) as batch:
        pipe.store = batch.store
        groups = batch.plan(pipe)
        assert [[task.id for task in group.tasks] for group in groups] == [["first", "plain", "mask", "weights"]]
        (rows / "first.png").unlink()
        batch.draw(pipe, groups)
        summary = batch.finish()
        assert (summary.drawn, summary.failed, summary.prefills) == (3, 1, 1)
        assert "first.png cannot be read" in results(rows)[0]["error"]["message"]


def test_rows_whose_masks_are_all_gone_have_each_their_own_error(rows: Path, pipe: Pipeline) -> None:
    shutil.copy(rows / "mask.png", rows / "first.png")
    write(rows, [{**ROWS[1], "id": "first", "mask": "first.png"}, *ROWS[1:3]])
    with Batch(BatchOptions(manifest=rows / "rows.jsonl", folder=rows / "out")) as batch:
        pipe.store = batch.store
        groups = batch.plan(pipe)
        (rows / "first.png").unlink()
        Image.new("L", (96, 64), 255).save(rows / "mask.png")
        batch.draw(pipe, groups)
        assert batch.finish().failed == 3
    errors = [row["error"]["message"] for row in results(rows)]
    assert ["changed while" in error for error in errors] == [False, True, True]


def test_rows_that_repaint_are_drawn_side_by_side(rows: Path, pipe: Pipeline) -> None:
    run(rows, pipe, out="single")
    calls = []
    call = pipe.transformer.forward
    pipe.transformer.forward = lambda x, *a, **k: calls.append(len(x)) or call(x, *a, **k)  # type: ignore[func-returns-value]
    run(rows, pipe, images_at_once=3)
    assert max(calls) == 3
    for row in ROWS[:3]:
        with (
            Image.open(rows / "out" / f"{row['id']}.png") as one,
            Image.open(rows / "single" / f"{row['id']}.png") as other,
        ):
            assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
            assert one.info["limner"] == other.info["limner"]
