"""Loading: strict about every tensor, clear about every damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.support.tiny import generators, picture

from limner import CheckpointError, InvalidRequest, Pipeline
from limner.cli import main
from limner.config import KLEIN_4B, KLEIN_9B, ReferencePolicy, TransformerConfig
from limner.model.transformer import Transformer

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (
        lambda f: (f / "model_index.json").unlink(),
        "has no model_index.json; give a folder in the diffusers layout",
    ),
    "no part": (lambda f: shutil.rmtree(f / "vae"), "has no vae"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no diffusion_pytorch_model.safetensors"),
    "pickle": (
        lambda f: (f / WEIGHTS).rename(f / "transformer" / "model.bin"),
        "model.bin is a pickle and is not read",
    ),
    "truncated": (lambda f: truncate(f / WEIGHTS), "is truncated or damaged"),
    "not safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 500), "is truncated or damaged"),
    "missing tensor": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.pop("proj_out.weight")),
        "missing proj_out.weight; these weights",
    ),
    "unexpected tensor": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({"more.weight": torch.zeros(1)})),
        "unexpected more.weight",
    ),
    "other shape": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({"proj_out.weight": torch.zeros(2, 2)})),
        r"proj_out.weight is \[2, 2\], the configuration asks for \[16, 32\]",
    ),
    "broken json": (lambda f: (f / "transformer" / "config.json").write_text("{"), "config.json: is not JSON"),
    "json list": (
        lambda f: (f / "transformer" / "config.json").write_text("[]"),
        "has to hold a JSON object, not list",
    ),
    "guidance": (
        lambda f: edit_json(f / "transformer" / "config.json", guidance_embeds=True),
        "guidance_embeds is true",
    ),
    "axes": (
        lambda f: edit_json(f / "transformer" / "config.json", axes_dims_rope=[4, 4, 4, 8]),
        "add up to attention_head_dim=16",
    ),
    "not a transformer": (
        lambda f: (f / "transformer" / "config.json").write_text('{"guidance_embeds": false}'),
        "missing num_layers",
    ),
    "text encoder of another kind": (
        lambda f: edit_json(f / "text_encoder" / "config.json", model_type="t5"),
        "model_type='t5' is not supported; allowed: qwen3",
    ),
    "text encoder layer missing": (
        lambda f: edit_tensors(
            f / "text_encoder" / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight")
        ),
        "missing model.layers.1.mlp.up_proj.weight",
    ),
    "tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"), "tokenizer"),
    "scheduler": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", use_karras_sigmas=True),
        "use_karras_sigmas=True is not",
    ),
    "autoencoder of another model": (
        lambda f: (
            edit_json(f / "transformer" / "config.json", in_channels=32),
            edit_tensors(
                f / WEIGHTS,
                lambda t: t.update({"x_embedder.weight": torch.zeros(32, 32), "proj_out.weight": torch.zeros(32, 32)}),
            ),
        ),
        "autoencoder has 16 token channels, the transformer 32",
    ),
    "text width": (
        lambda f: (
            edit_json(f / "transformer" / "config.json", joint_attention_dim=64),
            edit_tensors(f / WEIGHTS, lambda t: t.update({"context_embedder.weight": torch.zeros(32, 64)})),
        ),
        "text tokens are 48 wide, the transformer reads 64",
    ),
    "index of another pipeline": (
        lambda f: edit_json(f / "model_index.json", _class_name="StableDiffusionPipeline"),
        "is of a StableDiffusionPipeline",
    ),
    "odd is_distilled": (lambda f: edit_json(f / "model_index.json", is_distilled=1), "has to be true or false"),
    "odd references": (lambda f: (f / "limner.json").write_text('{"references": "all"}'), "is not one of None"),
    "scheduler of another kind": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler"),
        "DDIMScheduler is not",
    ),
    "shift": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", shift=None),
        "shift=None has to be a number",
    ),
    "layers as text": (
        lambda f: edit_json(f / "transformer" / "config.json", num_layers="a"),
        "num_layers='a' has to be a whole",
    ),
    "half a layer": (
        lambda f: edit_json(f / "transformer" / "config.json", num_layers=2.5),
        "num_layers=2.5 has to be a whole",
    ),
    "no ratio": (lambda f: edit_json(f / "transformer" / "config.json", mlp_ratio=None), "transformer.config.json"),
    "no axes": (lambda f: edit_json(f / "transformer" / "config.json", axes_dims_rope=5), "transformer.config.json"),
    "no heads": (
        lambda f: edit_json(f / "transformer" / "config.json", num_attention_heads=0),
        "num_heads=0 has to be",
    ),
    "text width as text": (
        lambda f: edit_json(f / "text_encoder" / "config.json", hidden_size="abc"),
        "does not describe a network",
    ),
    "text layers": (
        lambda f: edit_json(f / "text_encoder" / "config.json", num_hidden_layers="x"),
        "num_hidden_layers='x'",
    ),
    "vae groups": (lambda f: edit_json(f / "vae" / "config.json", norm_num_groups=0), "does not describe a network"),
    "settings": (
        lambda f: (f / "limner.json").write_text('{"default_dtype": "float99"}'),
        "default_dtype='float99' is not one of",
    ),
    "settings size": (
        lambda f: (f / "limner.json").write_text('{"default_size": [100, 128]}'),
        "default_size=.* has to be",
    ),
    "settings sizes": (
        lambda f: (f / "limner.json").write_text('{"sizes": [[128, 100]]}'),
        "sizes=.* has to be a list",
    ),
    "settings default": (
        lambda f: (f / "limner.json").write_text('{"sizes": [[64, 64]], "default_size": [64, 96]}'),
        "has to be one of sizes=",
    ),
    "settings pixels": (
        lambda f: (f / "limner.json").write_text('{"max_reference_pixels": "16k"}'),
        "max_reference_pixels='16k' has to be",
    ),
    "no chat template": (
        lambda f: [p.unlink() for p in (f / "tokenizer").glob("chat_template*")],
        "the tokenizer cannot be used",
    ),
    "shard outside the folder": (
        lambda f: (
            (f / WEIGHTS).rename(f / "elsewhere.safetensors"),
            (f / "transformer" / f"{WEIGHTS.name}.index.json").write_text(
                json.dumps({"weight_map": {"proj_out.weight": "../elsewhere.safetensors"}})
            ),
        ),
        "shards have to be .safetensors files beside it",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_refuses_damage(name: str, tiny_copy: Path) -> None:
    damage, message = DAMAGE[name]
    damage(tiny_copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        Pipeline.from_pretrained(tiny_copy)
    assert str(tiny_copy) in str(caught.value)


def test_a_model_says_which_sizes_it_draws(
    tiny_copy: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another size is drawn, with a warning; a model that says nothing draws any."""
    told = "64x96 is not a size that this model has learned to draw: 64x64, 96x64"
    for settings, height, warnings in (
        ({"sizes": [[64, 64], [96, 64]]}, 96, [told]),
        ({"sizes": [[64, 64], [64, 96]]}, 96, []),
        ({}, 96, []),
    ):
        (tiny_copy / "limner.json").write_text(json.dumps(settings))
        caplog.clear()
        with caplog.at_level("WARNING", logger="limner"):
            out = Pipeline.from_pretrained(tiny_copy)("a dog", width=64, height=height)
        assert out.images[0].size == (64, height)
        assert caplog.messages == warnings
        remedy = "; give width 64 and height 64, or leave both out"
        assert out.warnings == tuple(f"width, height: {told}{remedy}" for told in warnings)
        if settings:
            assert Pipeline.from_pretrained(tiny_copy)("a dog").images[0].size == (64, 64)
            assert caplog.messages == warnings
    (tiny_copy / "limner.json").write_text(json.dumps({"sizes": [[64, 64], [96, 64]]}))
    picture(150, 90).save(tiny_copy / "a.png")
    edit = ["edit", "a dog", "-i", tiny_copy / "a.png", "-o", tiny_copy / "out.png", "--model", tiny_copy]
    for more, size, warned in (
        ([], "96x64", ""),
        (["--max-pixels", 13500], "96x64", ""),
        (["--size", "64x96"], "64x96", f"warning: --size: {told}; give --size 64x64, or leave it out\n"),
    ):
        assert main([*map(str, [*edit, *more])]) == 0
        printed = capsys.readouterr().out
        assert "150x90, scaled to 107x64, cut 5 left, 0 top, 6 right, 0 bottom, used as 96x64" in printed
        assert f", {size}, " in printed
        assert "".join(line for line in printed.splitlines(keepends=True) if line.startswith("warning")) == warned
    for policy, remedy in (
        (ReferencePolicy(sizes=()), "give width 96 and height 64"),  # a higher cap would change nothing
        (ReferencePolicy(sizes=(), max_pixels=6143), "give width 96 and height 64"),
        (
            ReferencePolicy(sizes=((96, 64),), max_pixels=6143),
            "it is that of image 1, which needs 6144 pixels (max_pixels) to be used as 96x64",
        ),
    ):
        pipe = Pipeline.from_pretrained(tiny_copy, reference_policy=policy)
        (told_of_image,) = pipe("a dog", image=picture(90, 72)).warnings
        assert told_of_image.endswith(f"; {remedy}")
    (tiny_copy / "limner.json").write_text(json.dumps({"sizes": [[96, 64]]}))
    picture(90, 72).save(tiny_copy / "a.png")
    assert main([*map(str, [*edit, "--max-pixels", 6143])]) == 0
    assert "image 1, which needs 6144 pixels (--max-pixels) to be used as 96x64\n" in capsys.readouterr().out
    (tiny_copy / "limner.json").unlink()


def test_a_model_says_how_many_pixels_a_reference_keeps(tiny_copy: Path) -> None:
    """`limner.json` counts where the user left it to the model, in Python and on the command line."""
    (tiny_copy / "limner.json").write_text('{"max_reference_pixels": 4096}')
    own = ReferencePolicy(background="white", max_pixels=9216)
    for given, pixels in ((None, 4096), (ReferencePolicy(background="white"), 4096), (own, 9216)):
        pipe = Pipeline.from_pretrained(tiny_copy, reference_policy=given)
        assert pipe.reference_policy.max_pixels == pixels
        assert pipe.reference_policy.background == (given.background if given else None)
    picture(96, 96).save(tiny_copy / "a.png")
    for more, size in (([], (64, 64)), (["--max-pixels", "9216"], (96, 96))):
        arguments = [
            "edit",
            "a dog",
            "-i",
            tiny_copy / "a.png",
            "-o",
            tiny_copy / "out.png",
            "--model",
            tiny_copy,
            *more,
        ]
        assert main([str(a) for a in arguments]) == 0
        with Image.open(tiny_copy / "out.png") as out:
            assert out.size == size
    (tiny_copy / "limner.json").unlink()
    assert Pipeline.from_pretrained(tiny_copy).reference_policy.max_pixels == 1024 * 1024


def test_refuses_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        Pipeline.from_pretrained(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        Pipeline.from_pretrained(tmp_path / "file")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="nobody/nothing is not in the local cache and could not be downloaded"):
        Pipeline.from_pretrained("nobody/nothing")
    with pytest.raises(InvalidRequest, match="two names of one argument"):
        Pipeline.from_pretrained(tmp_path, dtype=torch.float32, torch_dtype=torch.float32)


def test_layers_that_nobody_reads_may_be_missing(tiny_copy: Path) -> None:
    """The last layer, the norm and the head of the text encoder are not even looked at."""
    unread = ("model.layers.3.", "model.norm.", "lm_head.")
    edit_tensors(
        tiny_copy / "text_encoder" / "model.safetensors",
        lambda t: [t.pop(name) for name in list(t) if name.startswith(unread)],
    )
    last = "missing model.layers.3"
    assert Pipeline.from_pretrained(tiny_copy)("a dog", height=64, width=64).images
    with pytest.raises(CheckpointError, match=last):
        Pipeline.from_pretrained(tiny_copy, text_encoder_out_layers=(2, 3, 4))
    with pytest.raises(CheckpointError, match="has to name layers 0 to 4"):
        Pipeline.from_pretrained(tiny_copy, text_encoder_out_layers=(2, 3, 5))


def test_shards_give_the_same_model(tiny_copy: Path) -> None:
    whole = Pipeline.from_pretrained(tiny_copy)
    expected = whole("a dog", generator=generators(1)[0], height=64, width=64, output_type="pt").images
    tensors = load_file(tiny_copy / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name].clone() for name in part}, tiny_copy / "transformer" / shard)
        weight_map |= dict.fromkeys(part, shard)
    (tiny_copy / WEIGHTS).unlink()
    index = tiny_copy / "transformer" / f"{WEIGHTS.name}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    sharded = Pipeline.from_pretrained(tiny_copy)
    assert sharded.digest == whole.digest
    found = sharded("a dog", generator=generators(1)[0], height=64, width=64, output_type="pt").images
    assert torch.equal(found, expected)
    index.write_text(json.dumps({"weight_map": weight_map | {"more": shard}}))
    with pytest.raises(CheckpointError, match="lists but the shards lack more"):
        Pipeline.from_pretrained(tiny_copy)


@pytest.mark.parametrize(("config", "billions"), [(KLEIN_9B, 9.08), (KLEIN_4B, 3.88)])
def test_presets_have_the_published_size(config: TransformerConfig, billions: float) -> None:
    with torch.device("meta"):
        transformer = Transformer(config)
    assert round(sum(p.numel() for p in transformer.parameters()) / 1e9, 2) == billions
    assert TransformerConfig.from_diffusers(config.to_diffusers()) == config


def test_digest_follows_every_weight(tiny_folder: Path) -> None:
    pipe, same = Pipeline.from_pretrained(tiny_folder), Pipeline.from_pretrained(tiny_folder)
    before = pipe.digest
    assert same.digest == before
    with torch.no_grad():
        pipe.text_encoder.network.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert pipe.digest != before
    assert pipe.reference_weights == same.reference_weights  # no K/V depends on the text encoder
    assert Pipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16).digest != before
