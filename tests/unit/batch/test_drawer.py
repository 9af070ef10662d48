"""Drawing groups: images of the pipeline, errors of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.batches import ROWS, results, run
from tests.support.tiny import picture

from limner import CapacityError, Pipeline
from limner.batch import Batch, BatchOptions
from limner.batch.manifest import seed_of
from limner.images import read_metadata


def test_a_row_is_what_the_pipeline_makes_of_it_alone(folder: Path, pipe: Pipeline) -> None:
    pipe.sizes = ((64, 64),)
    run(folder, pipe)
    told = {result["id"]: result["warnings"] for result in results(folder)}
    shown = "64x80 is not a size that this model has learned to draw: 64x64"
    assert (told["four"], told["six"]) == ([], [f'size: {shown}; give "size": "64x64"'])
    for row, name in ((ROWS[5], "six"), (ROWS[3], "four")):
        files = [folder / file for file in row["references"]]  # type: ignore[attr-defined]
        width, height = map(int, str(row["size"]).split("x"))
        seed = torch.Generator().manual_seed(seed_of(name))
        alone = pipe(str(row["prompt"]), image=files, width=width, height=height, generator=[seed]).images[0]
        with Image.open(folder / "out" / f"{name}.png") as found:
            assert np.array_equal(np.asarray(found), np.asarray(alone))


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


def test_references_that_change_while_it_runs(folder: Path, pipe: Pipeline) -> None:
    with Batch(BatchOptions(manifest=folder / "rows.jsonl", folder=folder / "out")) as batch:
        pipe.store = batch.store
        groups = batch.plan(pipe)
        picture(96, 70, seed=9).save(folder / "a.png")
        batch.draw(pipe, groups)
        assert batch.finish().failed == 5
    assert "a file changed while the batch ran" in results(folder)[0]["error"]["message"]
    assert run(folder, pipe).drawn == 5
