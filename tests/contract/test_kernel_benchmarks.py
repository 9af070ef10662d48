"""benchmarks/tiles.py and benchmarks/overlap.py at small shapes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from tests.support.native import has_tiles

PROGRAMS = Path(__file__).parents[2] / "benchmarks"


def report(name: str, folder: Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", PROGRAMS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--tiny", "--rounds", "1", "-o", str(folder / "report.json")])
    assert torch.is_grad_enabled()
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@has_tiles
def test_every_contender_is_right(tmp_path: Path) -> None:
    found = report("tiles", tmp_path)
    for part in ("wide", "narrow"):
        errors = [found[part][name]["error"] for name in ("torch bfloat16", "tiles bfloat16", "tiles int8")]
        assert max(errors) < 3e-3
    assert found["attention"]["tiles"]["error"] < 6e-3
    assert 0 < found["blocks"]["bfloat16"]["difference"] < 0.02
    assert 0 < found["blocks"]["int8"]["difference"] < 0.05


def test_pictures_are_decoded_beside_others_and_in_turn(tmp_path: Path) -> None:
    found = report("overlap", tmp_path)
    assert min(found["median_seconds"]["in turn"], found["median_seconds"]["beside"]) > 0
    assert found["mean_difference_of_255"] < 1  # other processors, other roundings
