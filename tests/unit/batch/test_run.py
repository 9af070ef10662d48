"""Bulk editing in one process: what is drawn once, what is done again and what is not."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.support.batches import ROWS, results, run, stop_after, write
from tests.support.tiny import picture

from limner import Pipeline
from limner.batch import Batch, BatchOptions
from limner.engine.load import check_model, load_pipeline
from limner.errors import CheckpointError, InvalidRequest
from limner.images import read_metadata
from limner.options import ModelOptions


def test_each_list_of_references_is_prefilled_once(folder: Path, pipe: Pipeline) -> None:
    summary = run(folder, pipe)
    assert (summary.rows, summary.drawn, summary.failed, summary.prefills) == (6, 6, 0, 2)
    assert pipe.store.stats().misses == 2
    found = results(folder)
    assert [row["id"] for row in found] == [row["id"] for row in ROWS]
    caches = [row["reference_cache"] for row in found]
    assert caches == ["miss", "miss", "none", "memory", "memory", "memory"]
    assert [row["size"] for row in found] == [row["size"] for row in ROWS]
    assert found[0]["reference_key"] == found[3]["reference_key"] != found[1]["reference_key"]
    for row in found:
        with Image.open(folder / "out" / row["file"]) as image:
            assert "{}x{}".format(*image.size) == row["size"]
        metadata = read_metadata(folder / "out" / row["file"])
        assert (metadata["seed"], metadata["model"]) == (row["seed"], pipe.digest)
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(
        [".limner-batch.lock", "results.jsonl", *(f"{row['id']}.png" for row in ROWS)]
    )


@pytest.mark.parametrize("rows", range(1, 6))
def test_goes_on_where_it_was_stopped(rows: int, folder: Path, pipe: Pipeline) -> None:
    whole = folder / "whole"
    run(folder, pipe, out="whole")
    with pytest.raises(KeyboardInterrupt):
        run(folder, pipe, stop_after(rows))
    written = {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.png")}
    assert len(written) == rows
    summary = run(folder, pipe)
    assert (summary.drawn, summary.done_before, summary.failed) == (6 - rows, rows, 0)
    assert summary.prefills_in_all == 2  # those of the first run were kept
    assert [row["id"] for row in results(folder)] == [row["id"] for row in ROWS]
    for name, then in written.items():
        assert (folder / "out" / name).stat().st_mtime_ns == then, name
    for row in ROWS:  # bit for bit those of a run that was not stopped, metadata and all
        file = f"{row['id']}.png"
        assert (folder / "out" / file).read_bytes() == (whole / file).read_bytes()
    again = run(folder, pipe)
    assert (again.drawn, again.done_before, again.prefills) == (0, 6, 0)


def test_what_is_not_as_it_was_is_drawn_again(folder: Path, pipe: Pipeline) -> None:
    run(folder, pipe)
    before = {row["id"]: row for row in results(folder)}
    out = folder / "out"
    (out / "one.png").unlink()
    data = bytearray((out / "two.png").read_bytes())
    data[-20] ^= 1
    (out / "two.png").write_bytes(data)
    changes: dict[str, dict[str, Any]] = {"three": {"prompt": "a cat"}, "five": {"seed": 1}}
    picture(96, 70, seed=5).save(folder / "same.png")  # row four
    write(folder, [{**row, **changes.get(str(row["id"]), {})} for row in ROWS])
    summary = run(folder, pipe)
    assert (summary.drawn, summary.done_before) == (5, 1)
    after = {row["id"]: row for row in results(folder)}
    assert after["six"] == before["six"]
    assert {id for id in after if after[id]["sha256"] == before[id]["sha256"]} == {"one", "two", "six"}
    for change in ({"steps": 3}, {"size": "80x80"}):
        write(folder, [{**ROWS[0], **change}])
        assert run(folder, pipe).drawn == 1
    pipe.to(torch.bfloat16)  # other arithmetic, other pictures
    assert run(folder, pipe).drawn == 1


def test_a_row_that_failed_is_tried_again(folder: Path, pipe: Pipeline) -> None:
    write(folder, [*ROWS[:2], {"id": "late", "prompt": "x", "references": ["late.png"]}, ROWS[2]])
    summary = run(folder, pipe)
    assert (summary.drawn, summary.failed) == (3, 1)
    failed = results(folder)[2]
    assert (failed["id"], failed["status"], failed["error"]["type"]) == ("late", "error", "InvalidRequest")
    assert f"{folder / 'late.png'} cannot be read (No such file" in failed["error"]["message"]
    picture(64, 64).save(folder / "late.png")
    summary = run(folder, pipe)
    assert (summary.drawn, summary.done_before, summary.failed) == (1, 3, 0)
    assert [row["status"] for row in results(folder)] == ["ok"] * 4


def test_a_store_that_goes_away_costs_prefills_and_no_rows(
    folder: Path, pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with Batch(BatchOptions(manifest=folder / "rows.jsonl", folder=folder / "out", store=folder / "kept")) as batch:
        pipe.store = batch.store
        shutil.rmtree(folder / "kept")
        (folder / "kept").write_text("")
        with caplog.at_level(logging.WARNING, "limner"):
            batch.draw(pipe, batch.plan(pipe))
        assert batch.finish().failed == 0
    assert "not written to the disk tier" in caplog.text
    with pytest.raises(InvalidRequest, match="kept is a file; give a folder"):
        run(folder, pipe, store=folder / "kept")


def test_a_given_store_stays_and_a_hidden_one_holds_what_is_under_way(folder: Path, pipe: Pipeline) -> None:
    run(folder, pipe, store=folder / "kept")
    assert len(list((folder / "kept").glob("*.safetensors"))) == 2
    shutil.rmtree(folder / "out")
    assert run(folder, pipe, store=folder / "kept").prefills == 0
    shutil.rmtree(folder / "out")
    seen = []

    def look(done: int, of: int, failed: int) -> None:
        pipe.store.flush()
        seen.append(len(list((folder / "out" / ".limner-batch" / "store").glob("*.safetensors"))))

    run(folder, pipe, look)
    assert max(seen) == 1  # a group's K/V are there until its last row is drawn
    assert seen[-1] == 0


def test_rows_that_left_the_manifest_leave_the_results(
    folder: Path, pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    run(folder, pipe)
    write(folder, ROWS[1:])
    with caplog.at_level(logging.WARNING, "limner"):
        assert run(folder, pipe).done_before == 5
    assert "1 rows of earlier runs are not in the manifest" in caplog.text
    assert (results(folder)[0]["id"], results(folder)[0]["line"]) == ("two", 1)
    assert (folder / "out" / "one.png").is_file()


def test_model_options_are_those_of_the_pipeline(tiny_folder: Path, folder: Path) -> None:
    options = ModelOptions(model=str(tiny_folder), dtype="bfloat16", background="white", max_pixels=4096)
    with Batch(BatchOptions(manifest=folder / "rows.jsonl", folder=folder / "out")) as batch:
        pipe = load_pipeline(options, store=batch.store)
    assert (pipe.dtype, pipe.store) == (torch.bfloat16, batch.store)
    assert (pipe.reference_policy.background, pipe.reference_policy.max_pixels) == ("white", 4096)
    with pytest.raises(CheckpointError, match="missing.safetensors"):
        check_model(replace(options, loras=(("missing.safetensors", 1.0),)))
