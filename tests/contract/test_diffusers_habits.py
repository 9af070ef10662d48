"""The behaviours that diffusers' own tests ask of its klein-KV pipeline, of `limner.Flux2KleinKVPipeline`.

docs/compatibility.md lists them under the names of diffusers' tests. Where there is a number to have, it is diffusers': the
same call of its pipeline on the same weights.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import generators, picture

import limner
from limner import Flux2KleinKVPipeline, InvalidRequest

ARGUMENTS: dict[str, Any] = {
    "prompt": "a dog is dancing",
    "num_inference_steps": 2,
    "height": 64,
    "width": 64,
    "max_sequence_length": 32,
}


@pytest.fixture(scope="module")
def klein(tiny_folder: Path) -> Flux2KleinKVPipeline:
    return Flux2KleinKVPipeline.from_pretrained(tiny_folder)


def inputs(**changes: Any) -> dict[str, Any]:
    return {**ARGUMENTS, "image": picture(64, 64), "generator": generators(0)[0], "output_type": "pt", **changes}


def test_call_signature(oracle: Any) -> None:
    ours, theirs = (
        list(inspect.signature(type_.__call__).parameters.values()) for type_ in (Flux2KleinKVPipeline, type(oracle))
    )
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    for own, their in zip(ours[1:], theirs[1:], strict=False):
        if own.name not in ("max_sequence_length", "text_encoder_out_layers"):  # None: what fits the text encoder
            assert (list(own.default) if isinstance(own.default, tuple) else own.default) == their.default


def test_output_is_diffusers(klein: Flux2KleinKVPipeline, oracle: Any) -> None:
    found = klein(**inputs(text_encoder_out_layers=(1, 2, 3)))[0]
    assert found.shape == (1, 3, 64, 64)
    expected = oracle(**inputs(text_encoder_out_layers=(1, 2, 3)))[0]
    assert (found - expected).abs().max() < 1e-4


def test_positional_order(klein: Flux2KleinKVPipeline) -> None:
    """diffusers' order, and the order in which diffusers' own example and `Pipeline` write it."""
    rest = {name: value for name, value in inputs().items() if name not in ("image", "prompt")}
    first = klein(picture(64, 64), ARGUMENTS["prompt"], **{**rest, "generator": generators(0)[0]}).images
    second = klein(ARGUMENTS["prompt"], image=picture(64, 64), **{**rest, "generator": generators(0)[0]}).images
    assert torch.equal(first, second)


def test_batches(klein: Flux2KleinKVPipeline) -> None:
    """Unequal prompts, one of them long; a picture of a batch is that of a call of its own."""
    prompts = ["a dog is dancing", "a dog", 100 * "very long"]
    batch = klein(**inputs(prompt=prompts, generator=generators(0, 1, 2)))
    assert len(batch[0]) == 3
    alone = klein(**inputs(prompt=prompts[0]))[0]
    assert (batch[0][0] - alone[0]).abs().max() < 1e-4


@pytest.mark.parametrize("num_prompts", [1, 2])
@pytest.mark.parametrize("num_images", [1, 2])
def test_num_images_per_prompt(klein: Flux2KleinKVPipeline, num_prompts: int, num_images: int) -> None:
    images = klein(**inputs(prompt=num_prompts * ["a dog"], num_images_per_prompt=num_images))[0]
    assert images.shape[0] == num_prompts * num_images


def test_dictionary_and_tuple_are_the_same(klein: Flux2KleinKVPipeline) -> None:
    out = klein(**inputs())
    given = klein(**inputs(), return_dict=False)
    assert isinstance(given, tuple)
    assert len(given) == 1
    for found in (out[0], out["images"], out.images, out.to_tuple()[0], dict(out)["images"], given[0]):
        assert torch.equal(found, out.images)
    assert list(out) == ["images"]
    assert out["seeds"] == (0,)
    with pytest.raises(KeyError, match="nothing"):
        out["nothing"]


def test_components(klein: Flux2KleinKVPipeline, oracle: Any) -> None:
    assert set(klein.components) == set(oracle.components)
    again = Flux2KleinKVPipeline(**klein.components)
    assert again.transformer is klein.transformer
    assert torch.equal(again(**inputs())[0], klein(**inputs())[0])
    theirs = Flux2KleinKVPipeline(**oracle.components)
    assert torch.equal(theirs(**inputs())[0], klein(**inputs())[0])
    assert klein.config.is_distilled is True
    assert klein.config["_class_name"] == type(oracle).__name__
    assert klein.vae.config.latent_channels == oracle.vae.config.latent_channels
    assert klein.tokenizer.vocab_size == oracle.tokenizer.vocab_size
    assert (klein.vae_scale_factor, klein.tokenizer_max_length, klein.default_sample_size) == (8, 512, 128)


def test_the_scheduler_is_diffusers_and_can_be_set(tiny_folder: Path) -> None:
    klein = Flux2KleinKVPipeline.from_pretrained(tiny_folder)
    before = klein(**inputs())[0]
    kind = type(klein.scheduler)
    assert kind.__name__ == "FlowMatchEulerDiscreteScheduler"
    klein.scheduler = kind.from_config(klein.scheduler.config, use_dynamic_shifting=False, shift=2.0)
    assert klein.schedule.static_shift == 2.0
    assert klein.scheduler.config.shift == 2.0
    assert not torch.equal(klein(**inputs())[0], before)
    with pytest.raises(InvalidRequest, match="scheduler"):
        klein.scheduler = "euler"


def test_to_dtype(tiny_folder: Path) -> None:
    klein = Flux2KleinKVPipeline.from_pretrained(tiny_folder)
    for arguments, given, expected in (
        ((), {"dtype": torch.float16}, torch.float16),
        (("cpu", torch.bfloat16), {}, torch.bfloat16),
        ((torch.float32,), {}, torch.float32),
        (("cpu",), {"dtype": torch.float32}, torch.float32),
    ):
        assert klein.to(*arguments, **given) is klein
        kinds = [one.dtype for one in klein.components.values() if isinstance(one, torch.nn.Module)]
        assert kinds == [expected] * 3
    with pytest.raises(TypeError, match="typ: is not an argument of to; did you mean dtype"):
        klein.to(typ=torch.float32)


def test_callback_inputs(klein: Flux2KleinKVPipeline, oracle: Any) -> None:
    seen: list[tuple[int, set[str], int, bool]] = []

    def zeros_at_the_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if hasattr(pipe, "store"):
            seen.append((step, set(tensors), pipe.num_timesteps, pipe.interrupt))
            assert pipe.current_timestep is timestep
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    given = {
        "callback_on_step_end": zeros_at_the_end,
        "callback_on_step_end_tensor_inputs": klein._callback_tensor_inputs,
        "output_type": "latent",
    }
    found = klein(**inputs(**given))[0]
    expected = oracle(**inputs(**given, text_encoder_out_layers=(1, 2, 3)))[0]
    assert torch.allclose(found, expected)
    assert seen == [(0, {"latents", "prompt_embeds"}, 2, False), (1, {"latents", "prompt_embeds"}, 2, False)]
    assert klein._callback_tensor_inputs == oracle._callback_tensor_inputs


def test_interrupt(klein: Flux2KleinKVPipeline) -> None:
    steps: list[int] = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = True
        assert pipe.interrupt
        return tensors

    klein(**inputs(callback_on_step_end=stop))
    assert steps == [0]


def test_sizes_go_down_to_the_grid_with_a_warning(
    klein: Flux2KleinKVPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    for height, width, expected in ((80, 80, (80, 80)), (136, 121, (128, 112))):
        out = klein(**inputs(height=height, width=width))
        assert tuple(out.images.shape[-2:]) == expected
    assert out.warnings == (
        "width: 121 is not a multiple of 16; drawn with 112",
        "height: 136 is not a multiple of 16; drawn with 128",
    )
    assert "121 is not a multiple of 16" in caplog.text
    with pytest.raises(InvalidRequest, match="width: 121 is not a multiple of 16 of at least 64; use 112 or 128"):
        klein(**inputs(width=121, size_policy="refuse"))
    with pytest.raises(InvalidRequest, match="height: 63"):
        klein(**inputs(height=63))
    with pytest.raises(InvalidRequest, match="size_policy: 'round' is not one of refuse, floor"):
        klein(**inputs(size_policy="round"))


def test_without_image(klein: Flux2KleinKVPipeline) -> None:
    assert klein(**inputs(image=None))[0].shape == (1, 3, 64, 64)


def test_switches_that_have_no_effect(klein: Flux2KleinKVPipeline, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "limner")
    before = klein(**inputs())[0]
    for name in (
        "enable_vae_tiling",
        "enable_vae_slicing",
        "enable_attention_slicing",
        "fuse_qkv_projections",
        "unfuse_qkv_projections",
    ):
        getattr(klein, name)()
        assert f"{name} has no effect: " in caplog.text
    assert torch.equal(klein(**inputs())[0], before)


def test_encoded_prompts_are_diffusers(klein: Flux2KleinKVPipeline, oracle: Any) -> None:
    found, ids = klein.encode_prompt("a dog", num_images_per_prompt=2, max_sequence_length=32)
    expected, their_ids = oracle.encode_prompt(
        "a dog", num_images_per_prompt=2, max_sequence_length=32, text_encoder_out_layers=(1, 2, 3)
    )
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(ids, their_ids)
    drawn = klein(**inputs(prompt=None, prompt_embeds=found[:1]))[0]
    assert torch.equal(drawn, klein(**inputs(prompt="a dog"))[0])


def test_empty_prompt_is_diffusers(klein: Flux2KleinKVPipeline, oracle: Any) -> None:
    expected = oracle(**inputs(prompt="", text_encoder_out_layers=(1, 2, 3)))[0]
    assert (klein(**inputs(prompt=""))[0] - expected).abs().max() < 1e-4


# loading and saving


def test_saved_and_loaded_by_both(tiny_folder: Path, tmp_path: Path, oracle: Any) -> None:
    klein = Flux2KleinKVPipeline.from_pretrained(tiny_folder)
    expected = klein(**inputs())[0]
    klein.save_pretrained(tmp_path / "saved")
    assert torch.equal(Flux2KleinKVPipeline.from_pretrained(tmp_path / "saved")(**inputs())[0], expected)
    theirs = type(oracle).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    assert (theirs(**inputs(text_encoder_out_layers=(1, 2, 3)))[0] - expected).abs().max() < 1e-4
    with pytest.raises(Exception, match="is there already and not empty"):
        klein.save_pretrained(tmp_path / "saved")
    klein.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    narrow = Flux2KleinKVPipeline.from_pretrained(tmp_path / "narrow")
    assert {one.dtype for one in narrow.components.values() if isinstance(one, torch.nn.Module)} == {torch.bfloat16}
    assert torch.equal(narrow(**inputs())[0], klein(**inputs())[0])


def test_saved_from_parts_of_diffusers(oracle: Any, tmp_path: Path) -> None:
    """The text encoder's last layers are not in the pipeline; they are those of the network that it was given."""
    Flux2KleinKVPipeline.from_diffusers(oracle).save_pretrained(tmp_path / "taken over")
    klein = Flux2KleinKVPipeline(**oracle.components)
    klein.save_pretrained(tmp_path / "saved")
    shared = Flux2KleinKVPipeline(**klein.components)
    with pytest.raises(limner.CheckpointError, match="its last layers, which no call reads, are not in memory"):
        shared.save_pretrained(tmp_path / "shared")
    assert torch.equal(Flux2KleinKVPipeline.from_pretrained(tmp_path / "saved")(**inputs())[0], klein(**inputs())[0])


def test_a_text_encoder_that_changed_is_not_saved_as_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    klein = Flux2KleinKVPipeline.from_pretrained(tiny_folder)
    with torch.no_grad():
        klein.text_encoder.network.layers[0].input_layernorm.weight.data = (
            klein.text_encoder.network.layers[0].input_layernorm.weight + 1
        )
    with pytest.raises(Exception, match="layers.0.input_layernorm.weight was changed since it was loaded"):
        klein.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_variants_are_in_the_names(klein: Flux2KleinKVPipeline, tmp_path: Path) -> None:
    klein.save_pretrained(tmp_path, variant="fp16")
    index = json.loads((tmp_path / "model_index.json").read_text())
    for part in ("transformer", "vae", "text_encoder"):
        assert part in index
        assert [file.suffixes[-2:] for file in (tmp_path / part).glob("*.safetensors")] == [[".fp16", ".safetensors"]]


def test_a_dtype_for_each_part(tiny_folder: Path) -> None:
    klein = Flux2KleinKVPipeline.from_pretrained(
        tiny_folder, torch_dtype={"transformer": torch.bfloat16, "default": torch.float32}
    )
    found = {name: one.dtype for name, one in klein.components.items() if isinstance(one, torch.nn.Module)}
    assert found == {"transformer": torch.bfloat16, "vae": torch.float32, "text_encoder": torch.float32}
    assert klein(**inputs())[0].isfinite().all()
    assert Flux2KleinKVPipeline.from_pretrained(tiny_folder, torch_dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(InvalidRequest, match="torch_dtype: 'narrow' is not a dtype"):
        Flux2KleinKVPipeline.from_pretrained(tiny_folder, torch_dtype="narrow")


def test_device_map(tiny_folder: Path, klein: Flux2KleinKVPipeline) -> None:
    loaded = Flux2KleinKVPipeline.from_pretrained(
        tiny_folder, device_map="cpu", low_cpu_mem_usage=True, use_safetensors=True
    )
    assert torch.equal(loaded(**inputs())[0], klein(**inputs())[0])
    for given, message in (({"device_map": "balanced"}, "divides a model"), ({"use_safetensors": False}, "pickles")):
        with pytest.raises(InvalidRequest, match=message):
            Flux2KleinKVPipeline.from_pretrained(tiny_folder, **given)
