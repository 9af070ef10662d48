"""`--lora FILE[:STRENGTH]`: what it does to pictures, packs and stores, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.lora_files import SHAPES, kohya, make_pairs, original
from tests.support.tiny import picture

from limner.cli import build_parser, main
from limner.images import read_metadata


@pytest.fixture
def files(tmp_path: Path) -> Path:
    picture(64, 64).save(tmp_path / "a.png")
    save_file(original(make_pairs()), tmp_path / "style.safetensors")
    save_file(kohya(make_pairs(1, names=SHAPES), alpha=2.0), tmp_path / "other.safetensors")
    return tmp_path


def run(*args: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    found = capsys.readouterr()
    return code, found.out, found.err


def test_pictures_say_which_loras_made_them(files: Path, tiny_folder: Path, capsys: Any) -> None:
    arguments = ["generate", "a dog", "--seed", 1, "--size", "64x64", "--steps", 2, "--model", tiny_folder]
    loras = ["--lora", f"{files / 'style.safetensors'}:0.5", "--lora", f"{files / 'other.safetensors'}:-1e-1"]
    assert run(*arguments, "-o", files / "base.png", capsys=capsys)[0] == 0
    code, out, err = run(*arguments, *loras, "--json", "-o", files / "both.png", capsys=capsys)
    assert (code, err) == (0, "")
    found = read_metadata(files / "both.png")
    assert json.loads(out)["loras"] == found["loras"]
    assert [(lora["name"], lora["strength"]) for lora in found["loras"]] == sorted(
        [("style", 0.5), ("other", -0.1)], key=lambda x: [lora["name"] for lora in found["loras"]].index(x[0])
    )
    assert all(len(lora["digest"]) == 64 for lora in found["loras"])
    base = read_metadata(files / "base.png")
    assert "loras" not in base
    assert found["model"] != base["model"]
    assert (files / "both.png").read_bytes() != (files / "base.png").read_bytes()
    assert (
        run(*arguments, "--lora", f"{files / 'style.safetensors'}:0", "-o", files / "zero.png", capsys=capsys)[0] == 0
    )
    assert (files / "zero.png").read_bytes() == (files / "base.png").read_bytes()


def test_packs_and_stores_are_those_of_a_lora(files: Path, tiny_folder: Path, capsys: Any) -> None:
    lora = ["--lora", f"{files / 'style.safetensors'}:0.7"]
    model, store = ["--model", tiny_folder, "--dtype", "bfloat16"], ["--store", files / "store"]
    pack = ["refs", "pack", files / "a.png", "-o", files / "a.safetensors", *model]
    assert run(*pack, *lora, capsys=capsys)[0] == 0
    edit = ["edit", "bluer", "--size", "64x64", "--steps", 1, "--seed", 1, *model, "-o", files / "out.png", "--json"]
    assert run(*edit, "--references", files / "a.safetensors", *lora, capsys=capsys)[0] == 0
    for other in ([], ["--lora", f"{files / 'style.safetensors'}:0.8"], ["--lora", files / "other.safetensors"]):
        code, _, err = run(*edit, "--references", files / "a.safetensors", *other, capsys=capsys)
        assert code == 2
        assert "prefill the pictures with this pipeline" in err
    code, out, _ = run("refs", "warm", files / "a.png", *model, *store, *lora, "--json", capsys=capsys)
    key = json.loads(out)["key"]
    assert run("refs", "inspect", files / "a.safetensors", "--json", capsys=capsys)[1].count(key) == 1
    found = [
        json.loads(run(*edit, "-i", files / "a.png", *store, *given, capsys=capsys)[1])["reference_cache"]
        for given in (lora, [], ["--lora", files / "style.safetensors"])
    ]
    assert found == ["disk", "miss", "miss"]


def test_a_name_with_a_colon(files: Path) -> None:
    def parsed(text: object) -> Any:
        return build_parser().parse_args(["generate", "x", "-o", "x.png", "--lora", str(text)]).loras

    odd = files / "odd:0.5"
    odd.mkdir()
    assert parsed(odd) == [(str(odd), 1.0)]
    assert parsed(f"{odd}:0.25") == [(str(odd), 0.25)]
    assert parsed("someone/style") == [("someone/style", 1.0)]
    assert parsed("someone/style:2") == [("someone/style", 2.0)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{}/style.safetensors:strong", "strength 'strong' is not a finite number; give FILE or FILE:STRENGTH"),
        ("{}/style.safetensors:", "strength '' is not a finite number"),
        ("{}/style.safetensors:nan", "strength 'nan' is not a finite number"),
        ("{}/style.safetensors:inf", "strength 'inf' is not a finite number"),
        (":0.5", "':0.5': strength '0.5'"),
        ("{}/nothing.safetensors", "nothing.safetensors is neither a file, a folder nor a hub id"),
        ("{}/a.png", "a.png: cannot be read"),
        ("{}/pickle.bin", "pickle.bin is a pickle and is never opened"),
        (
            "{}/wide.safetensors",
            "img_in.lora_A.weight is [4, 16], diffusion_model.img_in.lora_B.weight is [64, 4]; that makes",
        ),
        ("{}/strange.safetensors", "1 of its 3 tensors are not for this transformer: lora_te_x.alpha"),
    ],
)
def test_bad_loras_are_one_line(value: str, message: str, files: Path, tiny_folder: Path, capsys: Any) -> None:
    torch.save({}, files / "pickle.bin")
    save_file(original({"img_in": (torch.ones(4, 16), torch.ones(64, 4))}), files / "wide.safetensors")
    strange = original(make_pairs(names=["img_in"])) | {"lora_te_x.alpha": torch.ones(())}
    save_file(strange, files / "strange.safetensors")
    for command in (
        ["generate", "a dog", "-o", files / "o.png"],
        ["refs", "pack", files / "a.png", "-o", files / "o.safetensors"],
    ):
        code, out, err = run(*command, "--model", tiny_folder, "--lora", value.format(files), capsys=capsys)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert not (files / "o.png").exists()
    assert not (files / "o.safetensors").exists()
