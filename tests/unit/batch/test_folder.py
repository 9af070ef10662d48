"""The folder of results: one run at a time, files that are whole, and results of others."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.batches import results, run

from limner import Pipeline
from limner.batch import Batch, BatchOptions
from limner.errors import Conflict, InvalidRequest, OutputError


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


def test_a_folder_that_cannot_be_written_ends_the_run_and_loses_nothing(
    folder: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from limner.batch import folder as module

    write_file, calls = module.write_file, []

    def full(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OutputError("output: no space left on device")
        write_file(path, data)

    monkeypatch.setattr(module, "write_file", full)
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
