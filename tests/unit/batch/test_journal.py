"""Journals: lines of processes that were killed, and of those that nobody collected."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.batches import run, stop_after

from limner import Pipeline
from limner.batch import Batch, BatchOptions, Drawer


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
