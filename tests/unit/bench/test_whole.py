"""`limner bench --whole`: whole calls of all engines, their phases, what is written, and the plot."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from limner.bench import BenchCase, WholeBench
from limner.bench.models import SIZES, map_int8, random_pipeline, weight_bytes
from limner.bench.plot import draw_phases, save_phases
from limner.bench.whole import PHASES, WHOLE_ENGINES
from limner.cli import main
from limner.errors import InvalidRequest, OutputError
from limner.model.int8 import Int8Linear

SMALL = ("--side", "64", "--reference-side", "64", "--text", "40", "--dtype", "float32")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All engines over the tiny model, without references and with two, from the command line."""
    file = tmp_path_factory.mktemp("whole") / "whole.json"
    main(["bench", "--whole", "tiny", "--references", "0", "2", "--rounds", "1", *SMALL, "-o", str(file)])
    found: dict[str, Any] = json.loads(file.read_text())
    return found | {"file": file}


def test_whole_calls_of_all_engines(report: dict[str, Any]) -> None:
    """Every engine draws what diffusers draws; phases add up; what is kept is not computed again."""
    none, two = report["cases"]
    assert set(none["seconds"]) == {"standard", "diffusers_kv", "cold", "int8_cold"}
    assert set(two["seconds"]) == set(WHOLE_ENGINES)
    for found in report["cases"]:
        assert found["rounds"] == 1
        assert found["pictures"]["spread"] > 0.1  # not flat, where everything agrees
        differences = found["pictures"]["mean_difference"]
        assert all(value < 0.5 / 255 for name, value in differences.items() if not name.startswith("int8"))
        assert all(0 < value < 0.01 for name, value in differences.items() if name.startswith("int8"))
        for name, phases in found["phases"].items():
            assert set(phases) == set(PHASES)
            assert len(found["steps"][name]) == 4
            assert phases["text"] > 0  # the prompt of a call is new
            assert phases["decode"] > 0
            assert phases["png"] > 0
            assert sum(phases.values()) == pytest.approx(found["seconds"][name], abs=1e-3)  # rounded to 0.1 ms
    for name, phases in two["phases"].items():
        assert (phases["encode"] > 0) == (not name.endswith("warm"))
        assert (phases["prefill"] > 0) == name.endswith("cold")
    assert two["times_diffusers_kv"]["diffusers_kv"] == 1
    assert report["size"] == "tiny"


def test_table_and_plot_stand_beside_the_report(report: dict[str, Any]) -> None:
    table = report["file"].with_suffix(".md").read_text()
    assert "| 2 references, 64 x 64 | whole call | text |" in table
    assert table.count("| Limner int8, references kept |") == 1
    with Image.open(report["file"].with_suffix(".png")) as plot:
        assert plot.width > 500


def test_a_bar_for_each_engine(report: dict[str, Any], tmp_path: Path) -> None:
    panels = draw_phases(report).axes
    assert [len(axes.get_yticklabels()) for axes in panels] == [4, 6]
    for axes, found in zip(panels, report["cases"], strict=True):
        ends = [bar.get_x() + bar.get_width() for bar in axes.containers[-1]]
        assert ends == pytest.approx([sum(phases.values()) for phases in reversed(found["phases"].values())])
    save_phases(report, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.format == "PNG"


def test_a_report_that_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the file and its option, and what was measured is not lost."""
    (tmp_path / "edit.json").mkdir()
    given = ("--geometry", "1", "1", "1", "--rounds", "1", "--engines", "cold", "-o", str(tmp_path / "edit.json"))
    assert main(["bench", *SMALL, *given]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["benchmark"] == "edit"
    told = f"limner: --output: {tmp_path / 'edit.json'} cannot be written (Is a directory); nothing was left there"
    assert shown.err.splitlines()[-1] == told


def test_a_plot_is_written_whole_or_not_at_all(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limner.bench.plot.draw_phases", lambda report: Full())
    with pytest.raises(OutputError, match=r"plot.png cannot be written \(No space left on device\)"):
        save_phases(report, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


class Full:
    """A figure whose disk is full."""

    def savefig(self, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_batches_are_whole_calls_too() -> None:
    """Each image of a batch is a file; an engine alone is compared with nothing."""
    bench = WholeBench("tiny", dtype=torch.float32, engines=("cold",))
    case = BenchCase(num_references=1, side=64, reference_side=64, batch=2, num_text=40)
    saved: list[dict[str, Any]] = []
    found = bench.run(case, rounds=2, progress=lambda line: None, save=saved.append)
    assert [one["rounds"] for one in saved] == [1, 2]
    assert found == saved[-1]
    assert [len(values) for values in found["all_seconds"].values()] == [2]
    assert "mean_difference" not in found["pictures"]
    files = bench._call("cold", case, [], prompt="a", store=None)
    sizes = [Image.open(io.BytesIO(file)).size for file in files]
    assert sizes == [(64, 64)] * 2


def test_weights_are_made_once() -> None:
    """The bytes that are promised are those that are there; layers that are not read take none."""
    pipe = random_pipeline(SIZES["tiny"], dtype=torch.bfloat16)
    parts = [*pipe.transformer.parameters(), *pipe.text_encoder.parameters()]
    assert sum({p.data_ptr(): p.nbytes for p in parts}.values()) == weight_bytes(SIZES["tiny"], dtype=torch.bfloat16)
    layers = pipe.text_encoder.model.layers
    assert layers[3].mlp.up_proj.weight.data_ptr() == layers[0].mlp.up_proj.weight.data_ptr()
    assert layers[2].mlp.up_proj.weight.data_ptr() != layers[0].mlp.up_proj.weight.data_ptr()


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limner.bench.whole.free_bytes", lambda device: 1 << 20)
    with pytest.raises(InvalidRequest, match="tiny has weights of .* are free; allowed: tiny, small"):
        WholeBench("tiny", dtype=torch.float32, engines=("cold",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engines", "warm", "reuse"), "--engines: 'reuse' is not measured with --whole; use standard"),
        (("--geometry", "8", "1", "1"), "--geometry: [8, 1, 1] is not for --whole; give it a size: tiny"),
        (("--side", "48"), "--side: 48 is too small"),
        (("--reference-side", "32"), "--reference-side: 32 is too small"),
        (("--references", "1", "1"), "--references: [1, 1] has a number twice"),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--whole", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_int8_matrices_in_files_are_the_same() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(Int8Linear.of(torch.nn.Linear(32, 16, bias=False)))
    before, x = network[0].weight.clone(), torch.randn(3, 32)
    expected = network(x)
    map_int8(network)
    assert torch.equal(network[0].weight, before)
    assert torch.equal(network(x), expected)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert re.search(rf"^{network[0].weight.data_ptr():x}-.*\(deleted\)$", maps.read_text(), re.M)
