"""Which file of a folder is read, variants, and repositories of the hub that are in the cache."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support import checkpoints as made

from limner import CheckpointError, InvalidRequest, Pipeline
from limner.weights.convert import convert
from limner.weights.folder import resolve_model, resolve_part
from limner.weights.hub import Hub
from limner.weights.inspect import inspect


def shard(file: Path, *, stem: str, variant: str = "", add: float = 0.0) -> None:
    """Write shards and their index beside a file, with all values changed."""
    tensors = made.tensors_of(file)
    weight_map = {}
    for number, name in enumerate(sorted(tensors), start=1):
        home = f"{stem}{variant}-{number % 2 + 1:05}-of-00002.safetensors"
        weight_map[name] = home
    for home in set(weight_map.values()):
        own = {n: tensors[n] for n, where in weight_map.items() if where == home}
        save_file({n: v + add if v.is_floating_point() else v for n, v in own.items()}, file.parent / home)
    index = f"{stem}.safetensors.index{variant}.json"
    (file.parent / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_and_a_single_file_that_differ(tiny_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each part as its own library reads it: diffusers the shards, transformers the single file; the log says which."""
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Model

    for part, stem in (
        (made.TRANSFORMER, "diffusion_pytorch_model"),
        (made.VAE, "diffusion_pytorch_model"),
        (made.TEXT, "model"),
    ):
        shard(tiny_copy / part, stem=stem, add=0.25)
    with caplog.at_level(logging.WARNING, logger="limner"):
        ours = Pipeline.from_pretrained(tiny_copy)
    lines = [record.message for record in caplog.records if "has shards and a single file" in record.message]
    assert ["index.json is read" in line for line in lines] == [True, True, False]
    assert "transformer" in lines[0]
    assert "not diffusion_pytorch_model.safetensors" in lines[0]
    for network, theirs in (
        (ours.transformer, Flux2Transformer2DModel.from_pretrained(tiny_copy / "transformer")),
        (ours.autoencoder.network, AutoencoderKLFlux2.from_pretrained(tiny_copy / "vae")),
        (ours.text_encoder.network, Qwen3Model.from_pretrained(tiny_copy / "text_encoder")),
    ):
        expected = theirs.state_dict()
        for name, value in network.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_an_index_without_its_shards(tiny_copy: Path) -> None:
    """Left over from a download that was broken off: diffusers fails too; the message says how to read the single file."""
    file = tiny_copy / made.TRANSFORMER
    shard(file, stem="diffusion_pytorch_model")
    lost = "diffusion_pytorch_model-00002-of-00002.safetensors"
    (file.parent / lost).unlink()
    with pytest.raises(CheckpointError, match=f"not there: {lost}; download what is missing, or remove the index, and"):
        Pipeline.from_pretrained(tiny_copy)
    (file.parent / f"{file.name}.index.json").unlink()
    Pipeline.from_pretrained(tiny_copy)


def test_variants(tiny_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A part that has the variant is read in it, single or sharded; others as they are, and the log says so."""
    transformer, text = tiny_copy / made.TRANSFORMER, tiny_copy / made.TEXT
    plain = Pipeline.from_pretrained(tiny_copy)
    halves = {name: value.half() for name, value in made.tensors_of(transformer).items()}
    made.save(halves, transformer.with_name("diffusion_pytorch_model.fp16.safetensors"))
    shard(text, stem="model", variant=".fp16", add=0.25)
    with caplog.at_level(logging.INFO, logger="limner"):
        found = Pipeline.from_pretrained(tiny_copy, variant="fp16")
    assert found.transformer.state_dict()["proj_out.weight"].dtype == torch.float16
    name = "layers.0.mlp.up_proj.weight"
    before, after = (pipe.text_encoder.network.state_dict()[name] for pipe in (plain, found))
    assert torch.equal(after, before + 0.25)
    assert "vae: has no variant 'fp16', diffusion_pytorch_model.safetensors is read" in caplog.text
    assert Pipeline.from_pretrained(tiny_copy).digest == plain.digest  # the variant is not read unless asked for
    (part,) = inspect(tiny_copy, part="transformer", variant="fp16").parts
    assert set(part.dtypes) == {"F16"}
    convert(tiny_copy / "transformer", tiny_copy / "new", to="diffusers", variant="fp16")
    written = made.tensors_of(tiny_copy / "new" / made.TRANSFORMER.name)
    assert torch.equal(written["proj_out.weight"], halves["proj_out.weight"])


def test_variants_that_are_asked_for_wrongly(tiny_copy: Path) -> None:
    with pytest.raises(InvalidRequest, match="'fp16' is not one of the model's variants; .*no folder has variants"):
        Pipeline.from_pretrained(tiny_copy, variant="fp16")
    file = tiny_copy / made.TRANSFORMER
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"has no diffusion_pytorch_model.safetensors, but fp16 variants; give variant='fp16'"
    ):
        Pipeline.from_pretrained(tiny_copy)
    with pytest.raises(InvalidRequest, match="'bf16' is not one of the model's variants; allowed: fp16"):
        inspect(tiny_copy, variant="bf16")


@pytest.fixture
def cache(tiny_folder: Path, tmp_path: Path) -> Path:
    """A cache of the hub's client with two revisions of a repository, of which the second has another transformer."""
    repository = tmp_path / "cache" / "models--owner--tiny"
    for number, name in enumerate(("main", "v2")):
        commit = str(number) * 40
        shutil.copytree(tiny_folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    file = repository / "snapshots" / ("1" * 40) / made.TRANSFORMER
    made.save({name: value * 2 for name, value in made.tensors_of(file).items()}, file)
    return tmp_path / "cache"


def test_the_hub_s_arguments(cache: Path, tiny_folder: Path) -> None:
    def load(**arguments: object) -> Pipeline:
        return Pipeline.from_pretrained("owner/tiny", cache_dir=cache, local_files_only=True, **arguments)

    first, second = load(), load(revision="v2", token="hf_secret")
    assert first.digest == Pipeline.from_pretrained(tiny_folder).digest
    name = "proj_out.weight"
    assert torch.equal(second.transformer.state_dict()[name], 2 * first.transformer.state_dict()[name])
    with pytest.raises(
        CheckpointError, match="owner/tiny is not in the local cache and could not be downloaded"
    ) as caught:
        load(revision="v3", token="hf_secret")
    assert "hf_secret" not in str(caught.value)
    # a part from another repository has revisions of its own
    hub = Hub(revision="v2", cache_dir=cache, local_files_only=True, token="hf_secret")
    assert resolve_part("transformer", "owner/tiny", model=tiny_folder, hub=hub).parent.name == "0" * 40
    assert "hf_secret" not in repr(hub)


def test_a_revision_of_a_folder(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="limner"):
        assert resolve_model(tiny_folder, hub=Hub(revision="v2")) == tiny_folder
    assert "revision='v2' has no effect" in caplog.text
