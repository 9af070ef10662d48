"""Masks, outpainting, weights and preserve on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.tiny import picture

from limner.cli import main
from limner.images import feathered, read_metadata


@pytest.fixture
def words(tiny_folder: Path, tmp_path: Path) -> list[str]:
    picture(96, 64).save(tmp_path / "a.png")
    picture(64, 64, seed=1).save(tmp_path / "b.png")
    files = ["-i", str(tmp_path / "a.png"), "-i", str(tmp_path / "b.png")]
    return ["edit", "a dog", *files, "--seed", "3", "--model", str(tiny_folder), "-o"]


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_a_mask(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = Image.new("L", (96, 64))
    mask.paste(255, (40, 20, 70, 50))
    mask.save(tmp_path / "mask.png")
    made = tmp_path / "made.png"
    assert main([*words, str(made), "--mask", str(tmp_path / "mask.png"), "--mask-blur", "3", "--json"]) == 0
    canvas, outside = pixels(tmp_path / "a.png"), feathered(np.asarray(mask), 3) == 0
    assert np.array_equal(pixels(made)[outside], canvas[outside])
    assert np.abs(pixels(made)[~outside].astype(int) - canvas[~outside]).mean() > 5
    (report,) = json.loads(capsys.readouterr().out)["canvas"]
    assert report["size"] == [96, 64]
    assert read_metadata(made)["box"] == list(report["box"])


def test_other_controls(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(*more: str) -> np.ndarray:
        assert main([*words, str(tmp_path / "made.png"), *more]) == 0, capsys.readouterr().err
        return pixels(tmp_path / "made.png")

    plain = draw()
    capsys.readouterr()
    assert draw("--expand", "5,0,30,16").shape == (80, 131, 3)
    first, _, written, replaced, *drawn = capsys.readouterr().out.splitlines()
    assert first.endswith("a.png: 96x64, repainted")
    assert "made.png: seed 3, 131x80, " in written
    assert "made.png: replaced an earlier picture of Limner" in replaced
    assert drawn[0].startswith("canvas 131x80, drawn whole as 144x80, ")
    assert drawn[1:] == ["image 1 as the model sees it: 80x64, at 16, 0 of what is drawn"]
    assert np.array_equal(draw("--reference-weight", "1", "--reference-weight", "1"), plain)
    for changed in (
        ["--reference-weight", "1", "--reference-weight", "0"],
        ["--reference-guidance", "3"],
        ["--strength", "0.5"],
    ):
        assert not np.array_equal(draw(*changed), plain)
    capsys.readouterr()
    draw("--preserve", "auto")
    assert "of the canvas; drift" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--expand", "1,2"], "'1,2' is not LEFT,TOP,RIGHT,BOTTOM"),
        (["--mask-blur", "3"], "limner: --mask-blur: needs --mask or --expand; without"),
        (
            ["--canvas", "a.png"],
            "limner: --canvas: says which picture is repainted; give one of --mask, --expand, --strength, ",
        ),
        (
            ["--mask", "black.png"],
            "limner: --mask: no pixel is white, so nothing would be drawn; mark what is to change",
        ),
        (["--size", "100x64"], "limner: --size: width 100 is not a multiple of 16"),
        (["--reference-weight", "1"], "limner: --reference-weight: there are 1 for 2 references"),
        (["--mask", "nowhere.png"], "limner: --mask: nowhere.png cannot be read"),
        (
            ["--canvas", "clear.png", "--strength", "1"],
            "limner: --canvas clear.png: it is transparent in places; flatten it, or "
            "say what stands behind it: --background white\n",
        ),
    ],
)
def test_what_is_refused(
    more: list[str],
    problem: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (96, 64)).save("black.png")
    Image.new("RGBA", (96, 64)).save("clear.png")
    try:
        code = main([*words, str(tmp_path / "made.png"), *more])
    except SystemExit as error:  # of the parser
        code = int(error.code or 0)
    assert code == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "made.png").exists()
