"""The numbers that ship with the bundled model: whole, what the model card shows, and better than the baselines."""

from __future__ import annotations

import json
import re
from typing import Any

from limner.weights.folder import bundled_model

TASKS = ("draw", "edit", "combine2", "combine3", "combine4", "held_out")


def evaluation() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((bundled_model() / "evaluation.json").read_text())
    return result


def test_every_task_has_enough_cases_and_every_measure() -> None:
    result = evaluation()
    assert result["cases"] >= 200
    assert set(result["tasks"]) == set(TASKS)
    for task, row in result["tasks"].items():
        assert {"psnr", "ssim", "success", "sticker", "place", "form", "scene", "copy", "nearest"} <= set(row), task


def test_the_model_beats_copying() -> None:
    for task, row in evaluation()["tasks"].items():
        assert row["psnr"] > row["copy"], task


def test_the_model_card_shows_these_numbers() -> None:
    card = (bundled_model() / "README.md").read_text()
    for task, row in evaluation()["tasks"].items():
        (line,) = re.findall(rf"^\| {task} \|.*$", card, flags=re.MULTILINE)
        assert f"| {row['psnr']:.1f} | {row['ssim']:.3f} | {100 * row['success']:.1f} % |" in line
