"""benchmarks/device.py runs whole on a CPU, so that it works on the day when there is a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "device.py"


@pytest.fixture(scope="module")
def device() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_device", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # of diffusers and of torch.compile
def test_every_part_runs_on_a_cpu(device: ModuleType, tmp_path: Path) -> None:
    run = device.main(["--device", "cpu", "--tiny", "--quiet", "-o", str(tmp_path / "device.json")])
    assert [(found["part"], found.get("error"), found.get("where")) for found in run.failures] == []
    assert json.loads((tmp_path / "device.json").read_text())[-1]["part"] == "end"
    skipped = [found["part"] for found in run.findings if "skipped" in found]
    assert skipped == ["weights on the host"]
    parts = {found["part"] for found in run.findings}
    assert len(parts) >= len(device.PARTS)
    (goals,) = (found["goals"] for found in run.findings if found["part"] == "goals")
    assert {goal["goal"] for goal in goals if goal["met"] is None} >= {"kept references, 2", "memory of 4 seeds"}


def test_goals_are_held_against_diffusers_at_its_best(device: ModuleType) -> None:
    findings = [
        {"part": "steps", "references": 4, "seconds": {"kept": 1.0, "diffusers_kv": 3.0}},
        {"part": "compiled diffusers", "references": 4, "diffusers_kv": 2.0},
        {"part": "seeds", "gib": {"new": 1.0, "diffusers_kv": 3.0}},
        {"part": "errors", "limner": 0.01, "diffusers": 0.01},
    ]
    found = {goal["goal"]: goal for goal in device.goals(findings)}
    assert (found["kept references, 4"]["found"], found["kept references, 4"]["met"]) == (2.0, False)
    assert found["kept references, 1"]["met"] is None
    assert found["memory of 4 seeds"]["met"]
    assert found["error within bfloat16's"]["met"]


def test_errors_are_findings_and_stop_nothing(device: ModuleType) -> None:
    import torch

    def fails(run: object) -> None:
        raise RuntimeError("no such kernel")

    run = device.Run(torch.device("cpu"), False, 100.0, quiet=True)
    run.do(sys.modules["gpu.measure"].Part(fails, 10))
    run.do(sys.modules["gpu.measure"].Part(fails, 1000))
    assert run.failures[0]["error"] == "RuntimeError: no such kernel"
    assert run.findings[1]["skipped"].endswith("it may take 1000")
