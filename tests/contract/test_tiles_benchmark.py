"""benchmarks/tiles.py at small shapes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from tests.support.native import has_tiles

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "tiles.py"


@has_tiles
def test_every_contender_is_right(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_tiles", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--tiny", "--rounds", "1", "-o", str(tmp_path / "tiles.json")])
    report = json.loads((tmp_path / "tiles.json").read_text())
    for part in ("wide", "narrow"):
        errors = [report[part][name]["error"] for name in ("torch bfloat16", "tiles bfloat16", "tiles int8")]
        assert max(errors) < 3e-3
    assert report["attention"]["tiles"]["error"] < 6e-3
    assert 0 < report["blocks"]["bfloat16"]["difference"] < 0.02
    assert 0 < report["blocks"]["int8"]["difference"] < 0.05
