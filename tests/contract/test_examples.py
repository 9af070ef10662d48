"""Every file of `examples/` runs as it stands, in a folder where `limner samples` was typed."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from limner.cli.main import main

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("examples")
    assert main(["samples", str(found / "samples")]) == 0
    return found


def test_there_are_ten() -> None:
    assert len(EXAMPLES) >= 10


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_it_runs(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = set(folder.iterdir())
    runpy.run_path(str(file), run_name="__main__")
    assert set(folder.iterdir()) - before, "nothing was written"
