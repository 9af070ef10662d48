"""`limner inspect` and `limner convert`: any layout in, the same weights out."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import checkpoints as made
from tests.support.checkpoints import TEXT, TRANSFORMER, VAE, tensors_of
from tests.support.tiny import make_transformer

from limner import Pipeline
from limner.cli import main
from limner.config import TransformerConfig
from limner.weights.folder import load_transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    network = make_transformer(128, text_width=256, double=1, single=1)
    return {name: value.bfloat16() for name, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def files(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same transformer in every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    tensors = made.original(state)
    return {
        "diffusers": made.save(state, folder / "diffusers.safetensors"),
        "original": made.save(tensors, folder / "original.safetensors"),
        "comfyui": made.save(tensors, folder / "comfyui.safetensors", prefix="model.diffusion_model."),
        "fp8": made.save(made.fp8(tensors)[0], folder / "fp8.safetensors"),
        "gguf": made.save_gguf(tensors.items(), folder / "model.gguf", kind="Q4_K"),
    }


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def inspect(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    code, out, err = run(capsys, "inspect", *args, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b)


def test_inspect_tells_layout_geometry_and_digests(
    files: dict[str, Path], state: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {}
    for layout, file in files.items():
        found = inspect(capsys, file, "--verify")
        assert found["whole"]
        (part,) = found["parts"]
        assert (part["part"], part["layout"]) == ("transformer", layout)
        assert part["geometry"] == {
            "name": "custom",
            "double_blocks": 1,
            "single_blocks": 1,
            "heads": 2,
            "head_dim": 128,
            "text_width": 256,
            "in_channels": 16,
        }
        assert part["sha256"] == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
        assert part["missing"] == part["unexpected"] == part["not_finite"] == []
        assert sum(kind["tensors"] for kind in part["dtypes"].values()) == part["num_tensors"]
        assert part["loads_as"] == "bfloat16"
        weights[layout] = part["weights"]
    assert weights["diffusers"] == weights["original"] == weights["comfyui"]
    assert len(set(weights.values())) == 3
    fp8 = inspect(capsys, files["fp8"], "--no-digest")["parts"][0]
    assert (fp8["sha256"], fp8["weights"], fp8["not_finite"]) == (None, None, None)
    assert fp8["dtypes"]["F8_E4M3"]["tensors"] == 10 + 1  # and the marker
    assert any("input_scale are not used" in note for note in fp8["notes"])
    code, out, _ = run(capsys, "inspect", files["gguf"], "--no-digest")
    assert code == 0
    assert "transformer: gguf, custom: double_blocks 1, single_blocks 1, heads 2" in out
    assert re.search(r"Q4_K 10 \(\d+ bytes\)", out)


def test_inspect_gives_the_digest_of_the_loaded_network(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, pipe = inspect(capsys, tiny_folder, "--verify"), Pipeline.from_pretrained(tiny_folder)
    modules = {"transformer": pipe.transformer, "vae": pipe.autoencoder, "text_encoder": pipe.text_encoder}
    assert [part["part"] for part in found["parts"]] == list(modules)
    for part in found["parts"]:
        assert part["weights"] == pipe._digests.of(modules[part["part"]]), part["part"]
        assert part["layout"] == "diffusers"


def test_inspect_says_what_is_missing_and_damaged(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_copy / TRANSFORMER
    tensors = tensors_of(file)
    tensors.pop("proj_out.weight")
    tensors["norm_out.linear.weight"] = torch.zeros(3, 3)
    made.save(tensors, file)
    shutil.rmtree(tiny_copy / "tokenizer")
    (tiny_copy / VAE).write_bytes((tiny_copy / VAE).read_bytes()[:-100])
    code, out, _ = run(capsys, "inspect", tiny_copy, "--verify")
    assert code == 1
    for line in (
        "  missing: proj_out.weight",
        "missing: tokenizer",
        f"damaged: {tiny_copy / VAE}: cannot be read",
        "  wrong: norm_out.linear.weight is [3, 3], the configuration asks for [64, 32]",
        "text_encoder: diffusers, hidden_size 16",
    ):
        assert line in out
    bad = tensors_of(tiny_copy / TEXT)
    bad["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")  # not one of the sampled
    made.save(bad, tiny_copy / TEXT)
    code, out, _ = run(capsys, "inspect", tiny_copy / "text_encoder", "--verify", "--json")
    assert code == 1
    assert json.loads(out)["parts"][0]["not_finite"] == ["layers.0.mlp.up_proj.weight"]
    assert run(capsys, "inspect", tiny_copy / "text_encoder", "--no-digest")[0] == 0


def test_refused_in_one_line(tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02}q\x00.")
    code, out, err = run(capsys, "inspect", tmp_path / "model.ckpt")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"limner: .*model.ckpt: is a pickle[^\n]*\n", err)
    for arguments, message in (
        ([tmp_path / "nothing"], "neither a folder nor a hub id"),
        ([files["original"], "--part", "vae"], "holds no vae of a layout that is known, but a transformer"),
    ):
        code, _, err = run(capsys, "inspect", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


@pytest.mark.parametrize("layout", ["diffusers", "original", "comfyui", "fp8", "gguf"])
def test_every_layout_becomes_every_other(
    layout: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To a diffusers folder (which diffusers loads), to the original file, and back: no bit changes after the first."""
    from diffusers import Flux2Transformer2DModel

    expected = load_transformer(files[layout], dtype=None, device=CPU).state_dict()
    folder, file, again = tmp_path / "folder", tmp_path / "file.safetensors", tmp_path / "again"
    assert run(capsys, "convert", files[layout], "-o", folder, "--to", "diffusers")[0] == 0
    theirs = Flux2Transformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert same(dict(theirs.state_dict()), expected)
    assert run(capsys, "convert", folder, "-o", file, "--to", "original")[0] == 0
    assert same(tensors_of(file), made.original(expected))
    assert run(capsys, "convert", file, "-o", again, "--to", "diffusers")[0] == 0
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()
    name = "diffusion_pytorch_model.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("layout", ["original", "fp8", "gguf"])
def test_int8_is_that_of_loading(
    layout: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "convert", files[layout], "-o", tmp_path / "int8", "--to", "int8")[0] == 0
    found = load_transformer(tmp_path / "int8", dtype=None, device=CPU)
    assert found.quantization == "int8"
    assert same(
        found.state_dict(), load_transformer(files[layout], dtype=None, device=CPU, quantize="int8").state_dict()
    )
    single = tmp_path / "int8" / "diffusion_pytorch_model.safetensors"
    assert inspect(capsys, tmp_path / "int8", "--no-digest")["parts"][0]["layout"] == "int8"
    (tmp_path / "int8" / "config.json").rename(tmp_path / "config.json")  # the file alone says what it is
    assert same(load_transformer(single, dtype=None, device=CPU).state_dict(), found.state_dict())
    assert run(capsys, "convert", single, "-o", tmp_path / "wide", "--to", "diffusers")[0] == 0
    wide = load_transformer(tmp_path / "wide", dtype=None, device=CPU).state_dict()
    matrix = "single_transformer_blocks.0.attn.to_out.weight"
    scaled = found.state_dict()[matrix].float() * found.state_dict()[f"{matrix}_scale"][:, None]
    assert torch.equal(wide[matrix], scaled.bfloat16())


def test_a_whole_model_there_and_back(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Pipeline.from_pretrained(tiny_folder)
    assert run(capsys, "convert", tiny_folder, "-o", tmp_path / "files", "--to", "original")[0] == 0
    parts = {"transformer": "transformer", "vae": "ae", "text_encoder": "text_encoder"}
    sources = {part: tmp_path / "files" / f"{name}.safetensors" for part, name in parts.items()}
    single = Pipeline.from_pretrained(
        tmp_path / "files", **sources
    )  # without the folders: what is needed is in the headers
    assert single.digest == before.digest
    assert same(tensors_of(sources["vae"]), made.original_vae(tensors_of(tiny_folder / VAE)))
    for part, file in sources.items():
        assert run(capsys, "convert", file, "-o", tmp_path / part, "--to", "diffusers")[0] == 0
        stem = (TEXT if part == "text_encoder" else VAE).name
        assert same(tensors_of(tmp_path / part / stem), tensors_of(tiny_folder / part / stem))
    back = Pipeline.from_pretrained(tiny_folder, **{part: tmp_path / part for part in sources})
    assert back.digest == before.digest
    assert run(capsys, "convert", tiny_folder, "-o", tmp_path / "int8", "--to", "int8")[0] == 0
    quantized = Pipeline.from_pretrained(tiny_folder, quantize="int8")
    assert Pipeline.from_pretrained(tmp_path / "int8").digest == quantized.digest
    assert run(capsys, "quantize", tiny_folder, "-o", tmp_path / "same")[0] == 0
    assert (tmp_path / "same" / TRANSFORMER).read_bytes() == (tmp_path / "int8" / TRANSFORMER).read_bytes()
    code, _, _ = run(
        capsys, "convert", tiny_folder, "-o", tmp_path / "half", "--to", "diffusers", "--dtype", "bfloat16"
    )
    assert code == 0
    half = Pipeline.from_pretrained(tmp_path / "half")
    assert half.digest == Pipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16).digest
    assert json.loads((tmp_path / "half" / "text_encoder" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_become_one_file(tiny_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import Flux2Transformer2DModel

    expected = tensors_of(tiny_copy / TRANSFORMER)
    network = Flux2Transformer2DModel.from_pretrained(tiny_copy / "transformer")
    shutil.rmtree(tiny_copy / "transformer")
    network.save_pretrained(tiny_copy / "transformer", max_shard_size="100KB")
    assert len(list((tiny_copy / "transformer").glob("*.safetensors"))) > 2
    found = inspect(capsys, tiny_copy / "transformer")["parts"][0]
    assert len(found["sha256"]) > 2
    assert (
        run(capsys, "convert", tiny_copy / "transformer", "-o", tmp_path / "a.safetensors", "--to", "original")[0] == 0
    )
    assert same(tensors_of(tmp_path / "a.safetensors"), made.original(expected))


def test_nothing_is_written_over_or_left_half(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, *args: object) -> None:
        before = sorted(tmp_path.iterdir())
        code, out, err = run(capsys, "convert", *args)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
        assert sorted(tmp_path.iterdir()) == before

    there = tmp_path / "there"
    there.write_text("mine")
    refused("is there already; give a new folder or name", files["original"], "-o", there, "--to", "diffusers")
    assert there.read_text() == "mine"
    refused("does not end in .safetensors", files["original"], "-o", tmp_path / "x", "--to", "original")
    refused("make it first", files["original"], "-o", tmp_path / "no" / "x", "--to", "diffusers")
    broken = tensors_of(files["original"])
    broken["single_blocks.0.norm.key_norm.scale"][0] = float("nan")
    file = made.save(broken, tmp_path / "nan.safetensors")
    refused(
        "single_blocks.0.norm.key_norm.scale holds values that are not", file, "-o", tmp_path / "x", "--to", "diffusers"
    )
    full = shutil._ntuple_diskusage(10, 10, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    refused("GiB are free there; free some space", files["original"], "-o", tmp_path / "x", "--to", "int8")


def test_nothing_to_convert(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "convert", tiny_folder, "-o", tmp_path / "x", "--to", "diffusers")
    assert (code, "is in diffusers' layout already" in err) == (2, True)


def test_a_part_without_int8(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "convert", tiny_folder / "vae", "-o", tmp_path / "x", "--to", "int8")
    assert (code, "int8 is a layout of the transformer and the text encoder" in err) == (2, True)


def test_the_model_folder_says_what_a_file_does_not(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = made.save(made.original(tensors_of(tiny_folder / TRANSFORMER)), tmp_path / "tiny.safetensors")
    code, _, err = run(capsys, "inspect", file)
    assert (code, "does not say how they are rotated" in err) == (2, True)
    found = inspect(capsys, file, "--model", tiny_folder)
    assert found["parts"][0]["geometry"]["head_dim"] == 16
    code, _, _ = run(capsys, "convert", file, "-o", tmp_path / "folder", "--to", "diffusers", "--model", tiny_folder)
    assert code == 0
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    expected = json.loads((tiny_folder / "transformer" / "config.json").read_text())
    assert TransformerConfig.from_diffusers(config) == TransformerConfig.from_diffusers(expected)


def test_as_typed(files: dict[str, Path], tiny_folder: Path, tmp_path: Path) -> None:
    """In a process of its own; and a picture with a part from elsewhere."""
    done = subprocess.run(
        [sys.executable, "-m", "limner", "inspect", str(files["gguf"])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("transformer: gguf, custom: ")
    vae = made.save(made.original_vae(tensors_of(tiny_folder / VAE)), tmp_path / "ae.safetensors")
    arguments = ["generate", "a dog", "-o", tmp_path / "a.png", "--size", "64x64", "--model", tiny_folder, "--vae", vae]
    assert main([str(argument) for argument in arguments]) == 0
    assert (tmp_path / "a.png").stat().st_size > 500
