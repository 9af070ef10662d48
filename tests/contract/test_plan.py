"""`limner plan` and `--memory-limit` as a user types them, and the benchmark of full-size models in miniature."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny import picture

from limner.cli import build_parser, main
from limner.memory.pages import can_release
from limner.models import PUBLISHED


def test_plan_prints_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "klein-9b-kv", "--references", "4", "--size", "1024x1024", "--quantize", "int8"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for word in ("klein-9b-kv on cpu", "transformer weights", "K/V of references", "denoise", "peak", "layers"):
        assert word in text
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["components"]["K/V of references"] == 4 * 4096 * 2**19
    assert found["peak"] == max(phase["total"] for phase in found["phases"].values())
    assert found["peaks"]["whole"] == found["peak"] > found["peaks"]["parts"] >= found["peaks"]["layers"]
    assert found["options"] == "--model FOLDER, one that limner quantize wrote"
    assert main([*words, "--quantize-text", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["options"] == "--model FOLDER, one that limner quantize --quantize-text wrote"
    assert both["components"]["text_encoder weights"] < 0.65 * found["components"]["text_encoder weights"]
    assert main(["plan", "--quantize-text", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["options"] == "--text-encoder FOLDER, one that limner convert --part text_encoder --to int8 wrote"


def test_plan_says_what_it_is_for_and_how_to_draw_it(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(*words: str) -> list[str]:
        assert main(["plan", *words]) == 0
        return capsys.readouterr().out.splitlines()

    lines = planned("--model", "klein-9b", "--references", "2", "--reference-size", "512x256", "--memory", "14GiB")
    for line in (
        "klein-9b on cpu, joint references, bfloat16",
        "download: about 35 GB",
        "  pictures     1 of 1024x1024 at once (--num-images, --size)",
        "  references   2 of 512x256 (--references, --reference-size: as the model reads them)",
        "  prompt       up to 512 tokens (--text)",
        "  steps        4; another number takes the same memory",
        "  limner quantize klein-9b -o klein-9b-int8",
    ):
        assert line in lines
    assert lines[-1] == (
        '  limner edit "PROMPT" -i image-1.png -i image-2.png --size 1024x1024 --model klein-9b-int8 --max-pixels 131072 '
        "--memory-limit 14GiB -o picture.png"
    )
    unexplained = [line for line in lines if re.search(r" \d+\.\d\d$", line)]
    assert unexplained == []
    for more in (
        ["--model", "klein-base-4b", "--references", "1", "--canvas", "2000x1000", "--guidance", "3"],
        ["--quantize-text", "--model", "klein-4b", "--num-images", "2", "--dtype", "float32", "--device", "cuda"],
        ["--preserve", "auto", "--kv-cache-dtype", "int8", "--references", "1", "--reference-guidance", "2"],
        ["--quantize", "int8", "--quantize-text", "--references-attention", "joint", "--reuse", "step0"],
    ):
        commands = planned(*more, "--json")
        for command in json.loads(commands[0])["commands"]:
            build_parser().parse_args(shlex.split(command)[1:])
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--model", str(tiny_folder), "--size", "64x80"]):
        (words,) = json.loads(planned(*more, "--json")[0])["commands"]
        assert main(shlex.split(words)[1:]) == 0
        assert ("64x80" if more else "128x128") in capsys.readouterr().out


def test_plan_finds_what_fits(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    words = ["plan", "--model", "klein-9b-kv", "--size", "256x256", "--json"]
    assert main([*words, "--memory", "20GiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["staging"], found["options"]) == ("parts", "--memory-limit 20GiB")
    assert main([*words, "--memory", "24GiB", "--device", "cuda"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["quantize"], found["device"], found["staging"]) == (None, "cuda", "parts")
    assert found["options"] == "--device cuda --memory-limit 24GiB"
    assert found["peak"] <= 24 << 30
    assert found["host"] > 28 << 30
    assert main(["plan", "--model", str(tiny_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["components"]["transformer weights"] < 1 << 20
    assert main(["plan"]) == 0
    assert "bundled on cpu" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "docs/real-weights.md"])
def test_the_memory_of_the_real_weights_is_what_plan_says(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / page).read_text()
    command = "limner plan --device cuda --references 2 --model NAME"
    assert f"`{command}`" in text

    def planned(*more: str) -> int:
        assert main([*command.replace("NAME", name).split()[1:], *more, "--json"]) == 0
        return math.ceil(json.loads(capsys.readouterr().out)["peak"] / 2**30)

    row = r"^\| `(klein-[\w-]+)` .*\| (\d+) GB \| (\d+) GiB(?:, int8 transformer (\d+) GiB)? \|$"
    rows = re.findall(row, text, re.M)
    assert len(rows) >= 4
    for name, download, plain, int8 in rows:
        assert round(PUBLISHED[name].download / 1e9) == int(download), name
        assert planned() == int(plain), name
        assert not int8 or planned("--quantize", "int8") == int(int8), name


def test_plan_reads_which_parts_are_int8(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tiny_folder), "-o", str(tmp_path / "int8"), "--quantize-text", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["text_encoder_nbytes"] > 0
    for folder, quantize, text in ((tiny_folder, None, False), (tmp_path / "int8", "int8", True)):
        assert main(["plan", "--model", str(folder), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["quantize"], found["quantize_text"]) == (quantize, text)


def test_plan_counts_canvases_and_further_forwards(capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*words: str) -> dict[str, Any]:
        assert main(["plan", "--model", "klein-9b-kv", "--references", "2", "--json", *words]) == 0
        return dict(json.loads(capsys.readouterr().out))

    plain, masked = planned(), planned("--canvas", "4000x3000")
    assert masked["components"]["canvases"] == 5 * 12_000_000
    assert masked["phases"]["denoise"]["total"] - plain["phases"]["denoise"]["total"] > 5 * 12_000_000
    assert masked["phases"]["put back"]["anonymous"] > masked["phases"]["encode text"]["anonymous"]
    kept = planned("--canvas", "4000x3000", "--preserve", "auto")
    assert kept["phases"]["put back"]["total"] > masked["phases"]["put back"]["total"]
    assert planned("--preserve", "auto")["components"]["canvases"] == 5 << 20
    guided = planned("--reference-guidance", "1.5")
    assert guided["phases"]["denoise"]["total"] - plain["phases"]["denoise"]["total"] == 3 * 4096 * 128 * 4
    assert (
        planned("--canvas", "4000x3000", "--device", "cuda")["host"] - planned("--device", "cuda")["host"] > 12_000_000
    )
    words = ("--references-attention", "joint")
    first, joint = planned(*words, "--reuse", "step0")["phases"], planned(*words)["phases"]
    assert first["denoise"]["total"] - joint["denoise"]["total"] == 8192 * 2**19  # K/V of two references


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reuse", "step0"], "reuse: is for models with joint references"),
        (["--reference-guidance", "2"], "--reference-guidance: needs references"),
        (["--model", "klein-9b-kv", "--memory", "1GiB"], "--memory: 1.00 GiB are too little; the least is"),
        (["--model", "klein-9b-kv", "--memory", "lots"], "--memory: 'lots' is not an amount of memory"),
        (["--size", "100x100"], "--size: 100 is not a multiple of 16 of at least 64; use 96 or 112"),
        (["--references", "-1"], "--references: -1 has to be 0 or more"),
        (["--num-images", "0"], "--num-images: 0 has to be 1 or more"),
        (["--model", "klein-70b"], "klein-70b is neither a folder nor a hub id"),
    ],
)
def test_plan_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not can_release(), reason="the system cannot drop pages of mapped files")
def test_edit_under_a_limit(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(64, 64).save(tmp_path / "a.png")
    words = ["edit", "a dog", "-i", str(tmp_path / "a.png"), "--seed", "3", "--model", str(tiny_folder)]
    assert main([*words, "-o", str(tmp_path / "free.png")]) == 0
    assert main([*words, "-o", str(tmp_path / "limited.png"), "--memory-limit", "16GiB"]) == 0
    assert (tmp_path / "free.png").read_bytes() == (tmp_path / "limited.png").read_bytes()
    capsys.readouterr()
    assert main([*words, "-o", str(tmp_path / "none.png"), "--memory-limit", "100MiB"]) == 2
    assert "--memory-limit: 0.10 GiB are too little; the least is" in capsys.readouterr().err
    assert (
        main(
            [
                "refs",
                "pack",
                str(tmp_path / "a.png"),
                "-o",
                str(tmp_path / "a.safetensors"),
                "--model",
                str(tiny_folder),
                "--memory-limit",
                "no",
            ]
        )
        == 2
    )
    assert "--memory-limit: 'no'" in capsys.readouterr().err


@pytest.mark.skipif(not can_release(), reason="the system cannot drop pages of mapped files")
def test_full_size_benchmark_in_miniature(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "full_size.py"
    command = [
        sys.executable,
        script,
        "--geometry",
        "small",
        "--side",
        64,
        "--text",
        48,
        "--folder",
        tmp_path / "work",
        "--only",
        "9b-int8",
        "9b-load",
        "4b-256",
        *(("--baseline", "HEAD") if (script.parents[1] / ".git").exists() else ()),
        "-o",
        tmp_path / "out.json",
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert not (tmp_path / "work").exists()
    edit, load, speed = (report["stages"][name] for name in ("9b-int8", "9b-load", "4b-256"))
    assert edit["peak_bytes"] >= edit["peak_anonymous_bytes"] > 0
    assert "baseline" not in edit or edit["ratio"] == round(edit["baseline"]["seconds"] / edit["seconds"], 3)
    assert 0.5 < edit["planned_over_measured"] < 2  # here a process's own memory is nearly all
    assert load["load_seconds"] > 0
    assert {"standard", "diffusers_kv", "warm", "int8_warm"} <= speed["median_seconds"].keys()
