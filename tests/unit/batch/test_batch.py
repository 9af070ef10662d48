"""Bulk editing in one process: the manifest, the order of work, what is done again and what is not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.tiny import picture

from limner import CapacityError, Pipeline
from limner.batch import Batch, BatchOptions, BatchSummary, Drawer
from limner.batch.manifest import BrokenRow, read_manifest, seed_of
from limner.deploy.ray_batch import check_nodes, this_node
from limner.engine.load import check_model, load_pipeline
from limner.errors import CheckpointError, Conflict, InvalidRequest, OutputError
from limner.images import read_metadata
from limner.options import ModelOptions

ROWS = [
    {"id": "one", "prompt": "make it blue", "references": ["a.png"], "size": "64x64"},
    {"id": "two", "prompt": "put b into a", "references": ["a.png", "b.png"], "size": "64x80", "seed": 7},
    {"id": "three", "prompt": "a dog", "size": "64x64", "steps": 2},
    {"id": "four", "prompt": "make it red", "references": ["same.png"], "size": "64x64"},
    {"id": "five", "prompt": "put b into a, red", "references": ["a.png", "b.png"], "size": "64x64"},
    {"id": "six", "prompt": "put b into a, big", "references": ["a.png", "b.png"], "size": "64x80"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png and same.png have the same pixels in other files."""
    picture(96, 70).save(tmp_path / "a.png")
    picture(96, 70).save(tmp_path / "same.png", compress_level=1)
    picture(64, 80, seed=1).save(tmp_path / "b.png")
    write(tmp_path, ROWS)
    return tmp_path


def write(folder: Path, rows: list[dict[str, Any]] | bytes) -> None:
    data = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "rows.jsonl").write_bytes(data)


def run(
    folder: Path,
    pipe: Pipeline,
    progress: Callable[[int, int, int], None] | None = None,
    *,
    out: str = "out",
    **options: Any,
) -> BatchSummary:
    options |= {"manifest": folder / "rows.jsonl", "folder": folder / out}
    with Batch(BatchOptions(**options), progress=progress) as batch:
        pipe.store = batch.store
        batch.draw(pipe, batch.plan(pipe))
        return batch.finish()


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


def stop_after(rows: int) -> Callable[[int, int, int], None]:
    """As a kill between two rows: what is on disk is what was there."""

    def progress(done: int, of: int, failed: int) -> None:
        if done == rows:
            raise KeyboardInterrupt

    return progress


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


def test_rows_of_one_size_follow_each_other(folder: Path, pipe: Pipeline) -> None:
    with Batch(BatchOptions(manifest=folder / "rows.jsonl", folder=folder / "out")) as batch:
        groups = batch.plan(pipe)
    assert [[task.id for task in group.tasks] for group in groups] == [
        ["one", "four"],
        ["two", "six", "five"],
        ["three"],
    ]


def test_a_row_is_what_the_pipeline_makes_of_it_alone(folder: Path, pipe: Pipeline) -> None:
    run(folder, pipe)
    for row, name in ((ROWS[5], "six"), (ROWS[3], "four")):
        files = [folder / file for file in row["references"]]  # type: ignore[attr-defined]
        width, height = map(int, str(row["size"]).split("x"))
        seed = torch.Generator().manual_seed(seed_of(name))
        alone = pipe(str(row["prompt"]), image=files, width=width, height=height, generator=[seed]).images[0]
        with Image.open(folder / "out" / f"{name}.png") as found:
            assert np.array_equal(np.asarray(found), np.asarray(alone))


def test_seeds_come_from_ids_and_stay() -> None:
    assert seed_of("one") == 1997727856
    assert len({seed_of(str(i)) for i in range(1000)}) == 1000


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


BROKEN = {
    "text": (b"hello", None, "row: is not one JSON object in UTF-8"),
    "bytes": (b'{"id": "x", "prompt": "\xff"}', None, "row: is not one JSON object in UTF-8"),
    "list": (b"[1]", None, "row: is a JSON list, not an object"),
    "deep": (b"[" * 100_000, None, "row: is not one JSON object"),
    "twice": (b'{"id": "x", "id": "y", "prompt": "p"}', None, "a name stands twice"),
    "no id": (b'{"prompt": "p"}', None, "id: None is not a text of 1 to 200"),
    "number": (b'{"id": 7, "prompt": "p"}', None, "id: 7 is not a text"),
    "path": (b'{"id": "../x", "prompt": "p"}', None, "id: '../x' is not a text"),
    "hidden": (b'{"id": ".x", "prompt": "p"}', None, "id: '.x' is not a text"),
    "unknown": (b'{"id": "x", "prompt": "p", "cfg": 3}', "x", "cfg: is not a field of a row; allowed: id, prompt"),
    "prompt": (b'{"id": "x"}', "x", "prompt: '' is empty"),
    "prompt type": (b'{"id": "x", "prompt": 3}', "x", "prompt: int is not a text"),
    "surrogate": (b'{"id": "x", "prompt": "\\ud800"}', "x", "prompt: is not valid Unicode"),
    "reference": (b'{"id": "x", "prompt": "p", "references": "a.png"}', "x", "references: 'a.png' is not a list"),
    "reference name": (b'{"id": "x", "prompt": "p", "references": ["\\ud800"]}', "x", "is not valid Unicode"),
    "seed": (b'{"id": "x", "prompt": "p", "seed": -1}', "x", "seed: -1 is not a whole number from 0 to"),
    "seed type": (b'{"id": "x", "prompt": "p", "seed": true}', "x", "seed: True is not a whole number"),
    "size": (b'{"id": "x", "prompt": "p", "size": [64, 64]}', "x", 'size: [64, 64] is not "WIDTHxHEIGHT"'),
    "grid": (b'{"id": "x", "prompt": "p", "size": "100x64"}', "x", "width: 100 is not a multiple of 16"),
    "steps": (b'{"id": "x", "prompt": "p", "steps": 0}', "x", "steps: 0 is not a whole number from 1 to 1000"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_an_error_of_that_row(name: str, folder: Path) -> None:
    data, id, message = BROKEN[name]
    write(folder, b'{"id": "before", "prompt": "p"}\n\n' + data + b'\n{"id": "after", "prompt": "p"}')
    before, broken, after = read_manifest(folder / "rows.jsonl")
    assert (before.id, after.id) == ("before", "after")
    assert isinstance(broken, BrokenRow)
    assert (broken.line, broken.id) == (3, id)
    assert message in str(broken.error)


def test_ids_name_files_so_case_does_not_tell_them_apart(folder: Path, pipe: Pipeline) -> None:
    write(folder, [ROWS[2], {**ROWS[2], "id": "THREE"}, {**ROWS[2], "id": "nul", "references": ["a\0b.png"]}])
    summary = run(folder, pipe)
    assert (summary.drawn, summary.failed) == (1, 2)
    _, twice, nul = results(folder)
    assert twice["error"]["message"].startswith("id: 'THREE' is also the id of line 1")
    assert nul["error"]["type"] == "InvalidRequest"


def test_manifests_that_are_none(folder: Path) -> None:
    write(folder, b"\n\n")
    for path, message in (
        (folder / "rows.jsonl", "has no rows"),
        (folder / "no", "No such file"),
        (folder, "directory"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            read_manifest(path)


def test_one_folder_one_run(folder: Path, pipe: Pipeline) -> None:
    options = BatchOptions(manifest=folder / "rows.jsonl", folder=folder / "out")
    with Batch(options), pytest.raises(Conflict, match="another batch runs in"):
        Batch(options)
    assert run(folder, pipe).failed == 0


def test_results_of_others_are_not_taken_for_its_own(folder: Path, pipe: Pipeline) -> None:
    (folder / "out").mkdir()
    mine = folder / "out" / "results.jsonl"
    for text in ('{"score": 3}\n', "hello\n", '{"status": "ok", "id": "one"}\n', "[]\n"):
        mine.write_text(text)
        with pytest.raises(InvalidRequest, match="line 1 of .* is no result of a batch"):
            run(folder, pipe)
        assert mine.read_text() == text
    mine.write_text('{"status": "ok", "id": "on')  # the last line of a run that was killed
    assert run(folder, pipe).drawn == 6
    assert len(results(folder)) == 6


def test_a_torn_line_does_not_spoil_the_next(folder: Path, pipe: Pipeline) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, pipe, stop_after(2))
    with (folder / "out" / "results.jsonl").open("a") as file:
        file.write('{"line": 3, "id": "thr')
    with pytest.raises(KeyboardInterrupt):
        run(folder, pipe, stop_after(4))
    summary = run(folder, pipe)
    assert (summary.done_before, summary.drawn) == (4, 2)


def test_what_a_worker_did_counts_though_nobody_collected_it(folder: Path, pipe: Pipeline) -> None:
    options = BatchOptions(manifest=folder / "rows.jsonl", folder=folder / "out")
    with Batch(options) as batch:
        pipe.store = batch.store
        groups = batch.plan(pipe)
        drawer = Drawer(pipe, batch.options, keep_rows=True)
        assert [result["id"] for result in drawer.draw(groups[1])] == ["two", "six", "five"]
        drawer.close()
    summary = run(folder, pipe)
    assert (summary.done_before, summary.drawn, summary.prefills, summary.prefills_in_all) == (3, 3, 1, 2)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """Errors that a call raises if one of its prompts is a name of it."""
    errors: dict[str, Exception] = {}
    call = Pipeline.__call__

    def broken(self: Pipeline, prompt: Any, **options: Any) -> Any:
        for text in [prompt] if isinstance(prompt, str) else prompt:
            if text in errors:
                raise errors[text]
        return call(self, prompt, **options)

    monkeypatch.setattr(Pipeline, "__call__", broken)
    return errors


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_row_that_cannot_be_drawn_stops_no_other(
    at_once: int, folder: Path, pipe: Pipeline, breaking: dict[str, Exception], caplog: pytest.LogCaptureFixture
) -> None:
    breaking |= {"put b into a": CapacityError("memory ran out"), "make it red": ZeroDivisionError("a bug")}
    summary = run(folder, pipe, images_at_once=at_once)
    assert (summary.drawn, summary.failed, summary.prefills) == (4, 2, 2)
    found = {row["id"]: row for row in results(folder)}
    assert found["two"]["error"] == {"type": "CapacityError", "message": "memory ran out"}
    assert found["four"]["error"] == {"type": "ZeroDivisionError", "message": "a bug"}
    assert "row four: ZeroDivisionError: a bug" in caplog.text
    breaking.clear()
    assert (run(folder, pipe).drawn, len(results(folder))) == (2, 6)


def test_images_at_once_are_the_same_but_for_rounding(folder: Path, pipe: Pipeline) -> None:
    run(folder, pipe, out="single")
    sizes = []
    call = pipe.transformer.forward
    pipe.transformer.forward = lambda x, *a, **k: sizes.append(len(x)) or call(x, *a, **k)  # type: ignore[func-returns-value]
    summary = run(folder, pipe, images_at_once=2)
    assert (summary.drawn, summary.prefills, max(sizes)) == (6, 2, 2)
    for row in ROWS:
        file = f"{row['id']}.png"
        with Image.open(folder / "out" / file) as one, Image.open(folder / "single" / file) as other:
            assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
        assert read_metadata(folder / "out" / file) == read_metadata(folder / "single" / file)


def test_a_folder_that_cannot_be_written_ends_the_run_and_loses_nothing(
    folder: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from limner import batch

    write_file, calls = batch.write_file, []

    def full(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OutputError("output: no space left on device")
        write_file(path, data)

    monkeypatch.setattr(batch, "write_file", full)
    with pytest.raises(OutputError, match="no space left"):
        run(folder, pipe)
    assert len(calls) == 3  # it did not draw what it could not keep
    summary = run(folder, pipe)
    assert (summary.done_before, summary.drawn, summary.prefills_in_all) == (2, 4, 2)
    (folder / "file").write_text("")
    with pytest.raises(InvalidRequest, match="file cannot be written"):
        run(folder, pipe, out="file")
    (folder / "out" / "one.png").unlink()
    (folder / "out" / "one.png").mkdir()
    assert run(folder, pipe).failed == 1


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
    assert "not written to disk" in caplog.text
    with pytest.raises(InvalidRequest, match="kept cannot be made"):
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


def test_references_that_change_while_it_runs(folder: Path, pipe: Pipeline) -> None:
    with Batch(BatchOptions(manifest=folder / "rows.jsonl", folder=folder / "out")) as batch:
        pipe.store = batch.store
        groups = batch.plan(pipe)
        picture(96, 70, seed=9).save(folder / "a.png")
        batch.draw(pipe, groups)
        assert batch.finish().failed == 5
    assert "a file changed while the batch ran" in results(folder)[0]["error"]["message"]
    assert run(folder, pipe).drawn == 5


def test_formats(folder: Path, pipe: Pipeline) -> None:
    write(folder, ROWS[2:3])
    for kind, name in (("jpeg", "three.jpg"), ("webp", "three.webp")):
        assert run(folder, pipe, format=kind).drawn == 1
        with Image.open(folder / "out" / name) as image:
            assert image.format == kind.upper()
    with pytest.raises(InvalidRequest, match="format: 'gif' is not one of"):
        BatchOptions(manifest=folder, folder=folder, format="gif")


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "1.0"}, "node 10.0.0.2 has torch 1.0, this process"),
        ({"limner": "0.0.9"}, "node 10.0.0.2 has limner 0.0.9, this process"),
        ({"python": "3.9.1"}, "node 10.0.0.2 has python 3.9.1, this process"),
        ({"folder": "missing"}, "node 10.0.0.2 does not see the folder"),
        ({"error": "ModuleNotFoundError: no limner"}, "node 10.0.0.2 cannot draw .ModuleNotFoundError"),
    ],
)
def test_nodes_that_differ_are_named_with_both_versions(change: Mapping[str, str], message: str) -> None:
    mine = this_node()
    nodes = {"10.0.0.1": {**mine, "folder": "seen"}, "10.0.0.2": {**mine, "folder": "seen", **change}}
    with pytest.raises(InvalidRequest, match=message) as raised:
        check_nodes(nodes, driver=mine)
    for name in set(change) & set(mine):
        assert mine[name] in str(raised.value)
    check_nodes({"10.0.0.1": nodes["10.0.0.1"]}, driver=mine)
