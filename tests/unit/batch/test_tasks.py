"""Rows as tasks: their order, and options."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tests.support.batches import ROWS, results, run, write

from limner import Pipeline
from limner.batch import Batch, BatchOptions
from limner.errors import InvalidRequest


def test_rows_of_one_size_follow_each_other(folder: Path, pipe: Pipeline) -> None:
    with Batch(BatchOptions(manifest=folder / "rows.jsonl", folder=folder / "out")) as batch:
        groups = batch.plan(pipe)
    assert [[task.id for task in group.tasks] for group in groups] == [
        ["one", "four"],
        ["two", "six", "five"],
        ["three"],
    ]


def test_ids_name_files_so_case_does_not_tell_them_apart(folder: Path, pipe: Pipeline) -> None:
    write(folder, [ROWS[2], {**ROWS[2], "id": "THREE"}, {**ROWS[2], "id": "nul", "references": ["a\0b.png"]}])
    summary = run(folder, pipe)
    assert (summary.drawn, summary.failed) == (1, 2)
    _, twice, nul = results(folder)
    assert twice["error"]["message"].startswith("id: 'THREE' is also the id of line 1")
    assert nul["error"]["type"] == "InvalidRequest"


def test_formats(folder: Path, pipe: Pipeline) -> None:
    write(folder, ROWS[2:3])
    for kind, name in (("jpeg", "three.jpg"), ("webp", "three.webp")):
        assert run(folder, pipe, format=kind).drawn == 1
        with Image.open(folder / "out" / name) as image:
            assert image.format == kind.upper()
    with pytest.raises(InvalidRequest, match="format: 'gif' is not one of"):
        BatchOptions(manifest=folder, folder=folder, format="gif")
